"""blocks.attend for scoring on CPUs, compiled by numba.

blocks.attend passes over the whole of S several times; here each context goes through all steps while it is in the
processor's cache. For the L2 norms only: they bound the softmax's exponents, so that its maximum need not be known
beforehand.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lib.constants import LEAK
from lib.kernels import amx
from lib.kernels.amx import compiled, compiled_inline
from lib.tensors import EPS, norm

Float: TypeAlias = np.float32
Array: TypeAlias = np.ndarray  # of float32 everywhere, and contiguous
ROWS, COLUMNS = 288, 1024  # of S that are multiplied and attended to while they are in a core's cache
TILE = 512  # columns whose 36 rows of attention are multiplied with the Gram matrix at once
LOG_SUM_EXP, MEAN, MAX, SUM = range(4)
HOW = {"LogSumExp": LOG_SUM_EXP, "Mean": MEAN, "Max": MAX, "Sum": SUM}
ONE, HALF, LIMIT = np.float32(1), np.float32(0.5), np.float32(85)  # the last: of exponents
LOG2_E = np.float32(1.44269504)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2 in two parts, the first exact
EXP = tuple(np.float32(c) for c in (1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5))


@compiled_inline
def exp(x: Float) -> Float:
    """e^x in float32 for -87 < x < 88, in operations that vectorise: 2ⁿ · e^r with |r| <= ln 2 / 2 by a polynomial."""
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN_2_HIGH - n * LN_2_LOW
    p = ((((EXP[0] * r + EXP[1]) * r + EXP[2]) * r + EXP[3]) * r + EXP[4]) * r + EXP[5]
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + ONE) * power


@compiled
def fold(values: Array, K: int, M: int, most: bool) -> None:
    """values[:M] = the sum, or the largest, over the first axis of values (K·M), which are lost.

    The lower half takes in the upper one until one row is left: loops that are long, and so vectorise, for any M.
    """
    while K > 1:
        half = (K + 1) // 2
        rest = values[half * M : K * M]
        if most:  # NaN included
            for i in range(len(rest)):
                values[i] = rest[i] if values[i] < rest[i] or rest[i] != rest[i] else values[i]
        else:
            for i in range(len(rest)):
                values[i] += rest[i]
        K = half


@compiled
def scales(S: Array, K: int, M: int, slope: Float, smooth: Float, eps: Float, scale: Array) -> None:
    """scale (K·M) = λ / L2 norm over K of a context element's leaky similarities S (K·M)."""
    for i in range(K * M):
        s = S[i] if S[i] > 0 else S[i] * slope
        scale[i] = s * s
    fold(scale, K, M, False)
    for m in range(M):
        scale[m] = smooth / (math.sqrt(scale[m]) + eps)
    done = M
    while done < K * M:
        copy = scale[done : min(2 * done, K * M)]
        for i in range(len(copy)):
            copy[i] = scale[i]
        done *= 2


@compiled
def exponentials(
    row: Array, scale: Array, slope: Float, smooth: Float, total: Array, dots: Array, strongest: Array
) -> None:
    """One context element's similarities become e^(λ·normalised - λ), and join its context's sums and maximum."""
    for i in range(len(row)):
        s = row[i]
        e = exp((s if s > 0 else s * slope) * scale[i] - smooth)
        row[i] = e
        total[i] += e
        dots[i] += e * s
        strongest[i] = e if e > strongest[i] else strongest[i]


@compiled
def add_row(sum: Array, a: Array, g: Float) -> None:
    for i in range(len(sum)):
        sum[i] += g * a[i]


@compiled
def add_products(sum: Array, a: Array, b: Array) -> None:
    for i in range(len(sum)):
        sum[i] += a[i] * b[i]


@compiled
def add_four_rows(p: Array, q: Array, r: Array, s: Array, a: Array, b: Array, c: Array, d: Array, gram: Array) -> None:
    """(p, q, r, s) += gram (4, 4) · (a, b, c, d): with sixteen numbers at hand a row is read once for four products."""
    p0, p1, p2, p3 = gram[0, 0], gram[0, 1], gram[0, 2], gram[0, 3]
    q0, q1, q2, q3 = gram[1, 0], gram[1, 1], gram[1, 2], gram[1, 3]
    r0, r1, r2, r3 = gram[2, 0], gram[2, 1], gram[2, 2], gram[2, 3]
    s0, s1, s2, s3 = gram[3, 0], gram[3, 1], gram[3, 2], gram[3, 3]
    for i in range(len(p)):
        w, x, y, z = a[i], b[i], c[i], d[i]
        p[i] += p0 * w + p1 * x + p2 * y + p3 * z
        q[i] += q0 * w + q1 * x + q2 * y + q3 * z
        r[i] += r0 * w + r1 * x + r2 * y + r3 * z
        s[i] += s0 * w + s1 * x + s2 * y + s3 * z


@compiled
def add_squares(e: Array, start: int, stop: int, gram: Array, squares: Array) -> None:
    """squares (columns) += e G eᵀ, columns start to stop of e (L, columns); gram is doubled(G)."""
    # e[row][start:stop], not e[row, start:stop]: only of the first numba knows that it is contiguous, and vectorises
    products = np.empty((4, stop - start), np.float32)
    odd = len(e) % 4
    for row in range(odd):
        products[0][:] = 0
        for other in range(row, len(e)):
            add_row(products[0], e[other][start:stop], gram[row, other])
        add_products(squares[start:stop], products[0], e[row][start:stop])
    for row in range(odd, len(e), 4):
        products[:] = 0
        for other in range(row, len(e), 4):
            a, b = e[other][start:stop], e[other + 1][start:stop]
            c, d = e[other + 2][start:stop], e[other + 3][start:stop]
            g = gram[row : row + 4, other : other + 4]
            add_four_rows(products[0], products[1], products[2], products[3], a, b, c, d, g)
        for i in range(4):
            add_products(squares[start:stop], products[i], e[row + i][start:stop])


@compiled
def aggregate(values: Array, K: int, M: int, how: int, smooth: Float, factor: Float, scores: Array) -> None:
    """scores (M) += factor · AGG_FUNC how, with λ_lse smooth, over the first axis of values (K·M), which are lost."""
    if how == LOG_SUM_EXP:
        for i in range(K * M):  # within ±λ_lse, but that the cosine of a context that cancels may be anything
            x = smooth * values[i]
            values[i] = exp(LIMIT if x > LIMIT else -LIMIT if x < -LIMIT else x)
    fold(values, K, M, how == MAX)
    for m in range(M):
        score: Any = values[m]
        if how == LOG_SUM_EXP:
            score = math.log(score) / smooth
        elif how == MEAN:
            score /= K
        scores[m] += factor * score


@compiled
def score_contexts(
    rows: Array, gram: Array, norms: Array, queries: Array, options: tuple, scores: Array, first: int
) -> None:
    """Write attend's scores of N contexts with blocks of equally long queries to scores, from row first on.

    rows (N, L, columns or more, the rest not read): of S, overwritten; gram as doubled makes it; norms (columns).
    queries (n, 3): M, K and the first query's column of scores, for each block; its elements are K·M columns of rows.
    options: as kernel_args returns them.
    """
    slope, smooth, eps, how, lse, term = options
    N, L, columns = len(rows), rows.shape[1], len(norms)
    scale, total, dots = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    strongest, squares = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for n in range(N):
        total[:], dots[:], strongest[:], squares[:] = 0, 0, 0, 0
        for row in range(L):
            S, column = rows[n, row][:columns], 0
            for block in range(len(queries)):
                M, K, _ = queries[block]
                stop = column + K * M
                scales(S[column:stop], K, M, slope, smooth, eps, scale[column:stop])
                column = stop
            exponentials(S, scale, slope, smooth, total, dots, strongest)
        for start in range(0, columns, TILE):
            add_squares(rows[n], start, min(start + TILE, columns), gram[n], squares)
        for i in range(columns):
            share = ONE / total[i]
            square = squares[i] * share * share
            both = norms[i] * math.sqrt(eps * eps * eps if square < eps * eps * eps else square)
            dots[i] *= share / (eps if both < eps else both)
            strongest[i] *= share
        column = 0
        for block in range(len(queries)):
            M, K, query = queries[block]
            stop, block_scores = column + K * M, scores[first + n][query : query + M]
            block_scores[:] = 0
            aggregate(dots[column:stop], K, M, how, lse, ONE, block_scores)
            if term:
                aggregate(strongest[column:stop], K, M, how, lse, term, block_scores)
            column = stop


@compiled
def multiply_and_score(
    jobs: Array,
    left: Array,
    groups: Array,
    gram: Array,
    right: Array,
    pieces: Array,
    norms: Array,
    configuration: Array,
    S: Array,
    options: tuple,
    scores: Array,
) -> None:
    """attend's scores for jobs (n, 2), each a group's number and a piece's.

    The next six arrays are as left_side and right_side make them. S: memory for a group and a piece. options: as
    kernel_args returns them.
    """
    stride, queries = S.shape[1], np.empty((1, 3), np.int64)
    amx.configure(configuration.ctypes.data)
    for job in range(len(jobs)):
        row_block, rows, N, L, context, at = groups[jobs[job, 0]]
        column_block, columns, M, query, start = pieces[jobs[job, 1]]
        amx.multiply(
            left[0, row_block].ctypes.data,
            left[0].nbytes,
            right[0, column_block].ctypes.data,
            right[0].nbytes,
            left.shape[2],
            len(left),
            S.ctypes.data,
            -(-rows // amx.BLOCK),
            -(-columns // amx.BLOCK),
            S.strides[0],
        )
        group_S = S.reshape(S.size)[: rows * stride].reshape(N, L, stride)
        group_gram = gram[at : at + N * L * L].reshape(N, L, L)
        queries[0, 0], queries[0, 1], queries[0, 2] = M, columns // M, query
        score_contexts(group_S, group_gram, norms[start : start + columns], queries, options, scores, context)
    amx.release()


def doubled(gram: Tensor) -> Tensor:
    """Of symmetric gram (N, L, L), what a sum over half of it needs: twice what is above the diagonal, 0 below."""
    return gram.triu() + gram.triu(1)


def kernel_args(attention: Any) -> tuple:
    """The options of a model.Attention as the compiled functions take them.

    Slope of leaky values below 0; λ, 0 to 20 (e^-4λ is still a float32); what is added to norms; the aggregation; its
    λ_lse, to 80; factor of the largest attention's term.
    """
    opt = attention.opt
    slope = LEAK if opt.raw_feature_norm == "clipped_l2norm" else 1
    lse = opt.lambda_lse if opt.agg_func == "LogSumExp" else 0
    floats = (np.float32(x) for x in (slope, opt.lambda_softmax, EPS))
    return *floats, HOW[opt.agg_func], np.float32(lse), np.float32(0.5 * attention.max_term)


def attend(S: Tensor, gram: Tensor, query_norms: Tensor, attention: Any) -> Tensor:
    """blocks.attend: scores (N, M) of S (N, L, K, M), gram (N, L, L) and query norms (K, M).

    All float32 on the CPU; S is contiguous, and overwritten. The N contexts are divided among
    torch.get_num_threads() threads.
    """
    N, L, K, M = S.shape
    rows, grams, norms = S.view(N, L, K * M).numpy(), doubled(gram).numpy(), query_norms.flatten().numpy()
    args, scores, queries = kernel_args(attention), np.empty((N, M), np.float32), np.array([(M, K, 0)])

    def share(first: int, last: int) -> None:
        score_contexts(rows[first:last], grams[first:last], norms, queries, args, scores, first)

    amx.in_threads(share, N)
    return torch.from_numpy(scores)


# ---------------------------------------------------------------- with the product


def group_size(count: int, length: int, room: int) -> int:
    """How many of count things of this length go together, for about so much room; 16 at a time vectorise well."""
    size = max(1, room // length)
    return count if count <= size else size // 16 * 16 or size


def left_side(contexts: Sequence[Tensor], parts: int) -> tuple[Tensor, Array, Array]:
    """Contexts (N, L, D), several of them, in groups of some ROWS rows.

    Returns what amx.side makes of them; groups (n, 6): first block in it, rows, N, L, first context, first value of
    gram; and gram: doubled of the contexts', one after the other.
    """
    wanted, groups = [], []
    block = context = at = 0
    for X in contexts:
        N, L, _ = X.shape
        size, index = group_size(N, L, ROWS), []
        for first in range(0, N, size):
            count = min(size, N - first)
            groups.append((block, count * L, count, L, context + first, at + first * L * L))
            index.append(whole_blocks(np.arange(first * L, (first + count) * L)))
            block += len(index[-1]) // amx.BLOCK
        wanted.append((X.flatten(0, 1), np.concatenate(index)))
        context, at = context + N, at + N * L * L
    gram = torch.cat([doubled(X @ X.mT).flatten() for X in contexts])
    return amx.side(wanted, parts, right=False), np.array(groups), gram.numpy()


def right_side(queries: Sequence[Tensor], parts: int) -> tuple[Tensor, Array, Array]:
    """Queries (M, K, D), several of them, in pieces of some COLUMNS columns.

    Returns what amx.side makes of them, the M first elements of a piece first; pieces (n, 5): first block in it,
    columns, M, first query, first norm; and the norms of the queries' elements in the order of the columns.
    """
    wanted, pieces, norms = [], [], []
    block = query = start = 0
    for X in queries:
        M, K, _ = X.shape
        size, index, X_norms = group_size(M, K, COLUMNS), [], norm(X, 2).flatten().numpy()
        for first in range(0, M, size):
            count = min(size, M - first)
            columns = (np.arange(first, first + count) * K + np.arange(K)[:, None]).ravel()
            pieces.append((block, len(columns), count, query + first, start))
            index.append(whole_blocks(columns))
            norms.append(X_norms[columns])
            block, start = block + len(index[-1]) // amx.BLOCK, start + len(columns)
        wanted.append((X.flatten(0, 1), np.concatenate(index)))
        query += M
    return amx.side(wanted, parts, right=True), np.array(pieces), np.concatenate(norms)


def whole_blocks(index: Array) -> Array:
    """index, filled up with -1 to whole blocks."""
    return np.pad(index, (0, -len(index) % amx.BLOCK), constant_values=-1)


def job_order(n_groups: int, pieces: Array) -> Array:
    """The jobs of multiply_and_score: a run of pieces of some COLUMNS columns stays in the cache for all groups."""
    run_of_piece = np.cumsum(pieces[:, 1]) // COLUMNS
    groups = np.arange(n_groups)
    runs = [np.flatnonzero(run_of_piece == run) for run in np.unique(run_of_piece)]
    return np.concatenate([np.stack([groups.repeat(len(run)), np.tile(run, n_groups)], 1) for run in runs])


def attend_products(contexts: Sequence[Tensor], queries: Sequence[Tensor], attention: Any) -> Tensor:
    """attend's scores (ΣN, ΣM) of contexts, (N, L, D) each, with queries, (M, K, D) each; S is never whole in memory.

    Precision is that of torch.get_float32_matmul_precision().
    """
    parts = amx.PARTS[torch.get_float32_matmul_precision()]
    (left, groups, gram), (right, pieces, norms) = left_side(contexts, parts), right_side(queries, parts)
    scores = np.empty((sum(map(len, contexts)), sum(map(len, queries))), np.float32)
    sides = left.numpy(), groups, gram, right.numpy(), pieces, norms, amx.CONFIGURATION
    jobs, args = job_order(len(groups), pieces), kernel_args(attention)
    rows, columns = (int(-(-table[:, 1].max() // amx.BLOCK)) * amx.BLOCK for table in (groups, pieces))

    def share(first: int, last: int) -> None:
        S = torch.empty(rows, columns + 16).numpy()  # rows of 2ⁿ bytes would compete for places in the cache
        multiply_and_score(jobs[first:last], *sides, S, args, scores)

    amx.in_threads(share, len(jobs), shares=8)
    return torch.from_numpy(scores)
