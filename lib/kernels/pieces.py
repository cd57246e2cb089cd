"""Scores of many images with many captions on CPUs: products a piece at a time, attended to in the processor's cache.

Each thread multiplies a piece of S and attends to it (attention_kernel.py) while it is in the cache; no thread waits
for another before the end. oneDNN multiplies float32 numbers at 240 GFLOP/s a core on an AMD EPYC (Zen 5), where
torch.mm, which asks MKL, does 110, and bfloat16 ones at 460. model.py says when the scores are used.

Sizes in the docstrings: N contexts of L elements, M queries of K elements, D embed_size.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from threading import Lock, Thread
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from lib.kernels.blocks import equal_length_groups
from lib.tensors import has_bfloat16, norm

log = logging.getLogger(__name__)

Array: TypeAlias = np.ndarray
Blocks: TypeAlias = list[tuple[int, Tensor]]  # (index of the first context or query, (n, length, D)) each

ROWS, COLUMNS = 288, 1024  # of S in a piece
LEAST_ELEMENTS = 2**20  # of S: below, compiling would take longer than it saves


def applies(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, config: Any) -> bool:
    """Whether `scores` can do this, and pays. The arguments are those of model.xattn_score.

    float32 on the CPU, of embeddings without gradient (in training it saved nothing and took 0.2 GB); an L2 norm, which
    bounds the exponents of the softmax; exponents in range.
    """
    n_regions, n_words = images.shape[0] * images.shape[1], int(torch.as_tensor(cap_lens).sum())
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad for x in (images, captions))
        and not torch.is_autocast_enabled("cpu")
        and config.raw_feature_norm in ("l2norm", "clipped_l2norm")
        and config.agg_func in ("LogSumExp", "Mean", "Max", "Sum")
        and 0 <= config.lambda_softmax <= 20
        and (config.agg_func != "LogSumExp" or 0 < config.lambda_lse <= 80)
        and n_regions * n_words >= LEAST_ELEMENTS
        and min(n_regions, n_words) >= ROWS
    )


def scores(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, config: Any) -> Tensor:
    """Scores (I, C) as model.xattn_score returns them; S is never whole in memory.

    With torch.set_float32_matmul_precision("medium"), products are bfloat16's where the processor has them.
    """
    groups, places = equal_length_groups(captions, torch.as_tensor(cap_lens), block_words=COLUMNS)
    words = [group.words for group in groups]
    contexts, queries = ([images], words) if config.t2i else (words, [images])
    found = attend_pieces(contexts, queries, config)
    return (found if config.t2i else found.T)[:, places]


def sample() -> tuple[Tensor, Tensor, list[int]]:
    """Images, captions and their lengths to compare with: negative similarities, a single word, a region of zeros."""
    lens, generator = [1, 5, 12, 5, 2], torch.Generator().manual_seed(0)
    images, captions = (torch.randn(len(lens), n, 16, generator=generator) / 4 for n in (6, max(lens)))
    images[0, 0] = 0
    for caption, n in zip(captions, lens, strict=True):
        caption[n:] = 0
    return images, captions, lens


def agree(formula_scores: Callable, config: Any) -> bool:
    """Whether `scores` are those of model.formula_scores on the sample. Logs a warning where they are not."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        expected = formula_scores(*sample(), config)
        difference = (scores(*sample(), config) - expected).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(precision)
    if difference <= 1e-4 * max(1, expected.abs().max().item()):
        return True
    log.warning("model.attend differs by %.1g from its compiled form: CPUs score up to 2.5 times slower", difference)
    return False


# ---------------------------------------------------------------- pieces


class Side(NamedTuple):
    """Contexts, whose elements are rows of a piece of S, or queries, whose elements are its columns.

    factor: the matrix of all elements as `multiply` takes it. blocks (n, 3) int: of each block of equally long ones how
    many, how long, index of the first. values: doubled Gram matrices one after the other, or norms of the elements.
    """

    factor: Tensor
    blocks: Array
    values: Array


def factor(X: Tensor, bfloat16: bool) -> Tensor:
    """X (n, D) float32 as `multiply` takes it: rounded to bfloat16, or for oneDNN."""
    if bfloat16:
        return X.bfloat16()
    return X.to_mkldnn() if torch.backends.mkldnn.is_available() else X


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The float32 product (n, m) of factors (n, D) and (m, D).

    torch rounds a product of bfloat16 numbers to bfloat16. Those of two halves of D are smaller, and so is the rounding
    error of their float32 sum: a fifth less for similarities of 0.1, in 3 % more time.
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
        most = max(1, room // X.shape[1])
        for part in X.split(len(X) if len(X) <= most else most // 16 * 16 or most):  # 16 at a time vectorise
            parts.append((first, part))
            first += len(part)
    ends = np.cumsum([part.shape[0] * part.shape[1] for _, part in parts])
    numbered = zip(ends // room, parts, strict=True)
    return [[part for _, part in piece] for _, piece in groupby(numbered, key=lambda item: item[0])]


def left_side(contexts: Blocks, bfloat16: bool) -> Side:
    """The Side of contexts (N, L, D)."""
    grams = [X @ X.mT for _, X in contexts]
    # a sum over half of a symmetric matrix needs twice what is above the diagonal
    doubled = torch.cat([(gram.triu() + gram.triu(1)).flatten() for gram in grams])
    elements = torch.cat([X.flatten(0, 1) for _, X in contexts])
    return Side(factor(elements, bfloat16), np.array([(*X.shape[:2], first) for first, X in contexts]), doubled.numpy())


def right_side(queries: Blocks, bfloat16: bool) -> Side:
    """The Side of queries (M, K, D), of each block the M first elements first."""
    elements = torch.cat([X.transpose(0, 1).flatten(0, 1) for _, X in queries])
    norms = norm(elements, 1).flatten().numpy()
    return Side(factor(elements, bfloat16), np.array([(*X.shape[:2], first) for first, X in queries]), norms)


def attend_pieces(contexts: Sequence[Tensor], queries: Sequence[Tensor], config: Any) -> Tensor:
    """model.attend's scores (ΣN, ΣM) of contexts, (N, L, D) each, with queries, (M, K, D) each."""
    from lib.kernels import attention_kernel  # here, because numba takes half a second to import

    bfloat16 = torch.get_float32_matmul_precision() == "medium" and has_bfloat16()
    left = [left_side(blocks, bfloat16) for blocks in cut(contexts, ROWS)]
    right = [right_side(blocks, bfloat16) for blocks in cut(queries, COLUMNS)]
    jobs = [(rows, columns) for columns in right for rows in left]  # the columns stay in the cache for all rows
    options = attention_kernel.options_of(config)
    found = np.empty((sum(map(len, contexts)), sum(map(len, queries))), np.float32)

    def attend_piece(job: tuple[Side, Side]) -> None:
        rows, columns = job
        S = multiply(rows.factor, columns.factor).numpy()
        attention_kernel.score_piece(S, *rows[1:], *columns[1:], options, found)

    with ThreadPoolExecutor(torch.get_num_threads(), initializer=compute_alone) as pool:
        list(pool.map(attend_piece, jobs))
    return torch.from_numpy(found)


starting = Lock()  # held by a thread while it starts


def compute_alone() -> None:
    """Keep torch's products of this thread in it. set_num_threads is also what later threads start with: another
    thread sets that back."""
    with starting:
        before = torch.get_num_threads()  # asked first: a thread's first question undoes what it set before
        torch.set_num_threads(1)
        other = Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()
