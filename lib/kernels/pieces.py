"""Scores of many images with many captions by torch's matrix products, attended to a piece of S at a time.

For CPUs without AMX; attention_kernel.attend_products does the same where amx.py multiplies. Each thread multiplies a
piece and attends to it while it is in the processor's cache; no thread waits for another before the end. oneDNN
multiplies float32 numbers at 240 GFLOP/s a core on an AMD EPYC (Zen 5), where torch.mm, which asks MKL, does 110, and
bfloat16 ones at 460.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from lib.kernels import amx
from lib.kernels.amx import Array, compiled
from lib.kernels.attention_kernel import COLUMNS, ROWS, doubled, group_size, kernel_args, score_contexts
from lib.tensors import norm

Blocks: TypeAlias = list[tuple[int, Tensor]]  # (index of the first context or query, (n, length, D)) each


class Side(NamedTuple):
    """Contexts, whose elements are rows of a piece of S, or queries, whose elements are its columns.

    factor: the matrix of all elements as `multiply` takes it. blocks (n, 3) int: of each block of equally long ones how
    many, how long, index of the first. values: doubled Gram matrices one after the other, or norms of the elements.
    """

    factor: Tensor
    blocks: Array
    values: Array


def has_bfloat16() -> bool:
    """True where the processor has instructions that multiply bfloat16 numbers."""
    processor = torch.cpu.get_capabilities()
    return any(processor.get(name) for name in ("avx512_bf16", "amx_bf16"))


def factor(X: Tensor, bfloat16: bool) -> Tensor:
    """X (n, D) float32 as `multiply` takes it: rounded to bfloat16, or for oneDNN."""
    if bfloat16:
        return X.bfloat16()
    return X.to_mkldnn() if torch.backends.mkldnn.is_available() else X


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The float32 product (n, m) of factors (n, D) and (m, D).

    torch rounds a product of bfloat16 numbers to bfloat16. Those of two halves of D are smaller, and so is what their
    float32 sum has lost: a fifth less for similarities of 0.1, in 3 % more time.
    """
    if left.dtype != torch.bfloat16:
        return linear(left, right).to_dense()
    half = left.shape[1] // 2
    S = torch.mm(left[:, :half], right[:, :half].T).float()
    return S.add_(torch.mm(left[:, half:], right[:, half:].T))


def cut(blocks: Sequence[Tensor], room: int) -> list[Blocks]:
    """Blocks (n, length, D) in pieces of some `room` elements: long blocks are cut, short ones put together."""
    parts, first = [], 0
    for X in blocks:
        for part in X.split(group_size(len(X), X.shape[1], room)):
            parts.append((first, part))
            first += len(part)
    ends = np.cumsum([part.shape[0] * part.shape[1] for _, part in parts])
    numbered = zip(ends // room, parts, strict=True)
    return [[part for _, part in piece] for _, piece in groupby(numbered, key=lambda item: item[0])]


def left_side(contexts: Blocks, bfloat16: bool) -> Side:
    """The Side of contexts (N, L, D)."""
    gram = torch.cat([doubled(X @ X.mT).flatten() for _, X in contexts])
    elements = torch.cat([X.flatten(0, 1) for _, X in contexts])
    return Side(factor(elements, bfloat16), np.array([(*X.shape[:2], first) for first, X in contexts]), gram.numpy())


def right_side(queries: Blocks, bfloat16: bool) -> Side:
    """The Side of queries (M, K, D), of each block the M first elements first."""
    elements = torch.cat([X.transpose(0, 1).flatten(0, 1) for _, X in queries])
    norms = norm(elements, 1).flatten().numpy()
    return Side(factor(elements, bfloat16), np.array([(*X.shape[:2], first) for first, X in queries]), norms)


@compiled
def score_piece(
    S: Array, contexts: Array, gram: Array, queries: Array, norms: Array, options: tuple, scores: Array
) -> None:
    """attend's scores of all contexts with all queries of a piece S (rows, columns), which is overwritten.

    contexts, gram, queries, norms: blocks and values of both Sides. options: as kernel_args returns them.
    """
    row = value = 0
    for block in range(len(contexts)):
        N, L, first = contexts[block]
        rows = S[row : row + N * L].reshape(N, L, S.shape[1])
        grams = gram[value : value + N * L * L].reshape(N, L, L)
        score_contexts(rows, grams, norms, queries, options, scores, first)
        row, value = row + N * L, value + N * L * L


def attend_products(contexts: Sequence[Tensor], queries: Sequence[Tensor], attention: Any) -> Tensor:
    """attend's scores (ΣN, ΣM) of contexts, (N, L, D) each, with queries, (M, K, D) each; S is never whole in memory.

    With torch.set_float32_matmul_precision("medium"), products are bfloat16's where the processor has them.
    """
    bfloat16 = torch.get_float32_matmul_precision() == "medium" and has_bfloat16()
    left = [left_side(blocks, bfloat16) for blocks in cut(contexts, ROWS)]
    right = [right_side(blocks, bfloat16) for blocks in cut(queries, COLUMNS)]
    jobs = [(rows, columns) for columns in right for rows in left]  # the columns stay in the cache for all rows
    args, scores = kernel_args(attention), np.empty((sum(map(len, contexts)), sum(map(len, queries))), np.float32)

    def share(first: int, last: int) -> None:
        for rows, columns in jobs[first:last]:
            S = multiply(rows.factor, columns.factor).numpy()
            score_piece(S, rows.blocks, rows.values, columns.blocks, columns.values, args, scores)

    amx.in_threads(share, len(jobs), shares=8)
    return torch.from_numpy(scores)
