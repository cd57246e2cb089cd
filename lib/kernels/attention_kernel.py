"""model.attend compiled by numba, for a piece of S that is in the processor's cache.

model.attend passes over the whole of S several times; here each context goes through all steps at once. For the L2
norms only: they bound the exponents of the softmax, so that its maximum need not be known beforehand.
"""

import math
from typing import Any, TypeAlias

import numpy as np
from numba import njit

from lib.constants import LEAK
from lib.tensors import EPS

Float: TypeAlias = np.float32
Array: TypeAlias = np.ndarray  # of float32 everywhere, and contiguous
TILE = 512  # columns whose 36 rows of attention are multiplied with the Gram matrix at once
LOG_SUM_EXP, MEAN, MAX, SUM = range(4)
HOW = {"LogSumExp": LOG_SUM_EXP, "Mean": MEAN, "Max": MAX, "Sum": SUM}
ONE, HALF, LIMIT = np.float32(1), np.float32(0.5), np.float32(85)  # the last: of exponents
LOG2_E = np.float32(1.44269504)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2 in two parts, the first exact
EXP = tuple(np.float32(c) for c in (1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5))


# fastmath: no flag that assumes there is no NaN, because it must reach the scores
compiled = njit(nogil=True, fastmath={"contract"}, error_model="numpy")


@njit(fastmath={"contract"}, inline="always")
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
def score_piece(
    S: Array, contexts: Array, gram: Array, queries: Array, norms: Array, options: tuple, scores: Array
) -> None:
    """attend's scores of all contexts with all queries of a piece S (rows, columns), which is overwritten.

    contexts, gram, queries, norms: blocks and values of both pieces.Sides. options: as options_of returns them.
    """
    row = value = 0
    for block in range(len(contexts)):
        N, L, first = contexts[block]
        rows = S[row : row + N * L].reshape(N, L, S.shape[1])
        grams = gram[value : value + N * L * L].reshape(N, L, L)
        score_contexts(rows, grams, norms, queries, options, scores, first)
        row, value = row + N * L, value + N * L * L


def options_of(config: Any) -> tuple:
    """What the compiled functions read of a model.ScoreConfig.

    Slope of leaky values below 0; λ; what is added to norms; the aggregation; its λ_lse; factor of the largest
    attention's term. pieces.applies has the ranges: e^-4λ must be a float32.
    """
    slope = LEAK if config.raw_feature_norm == "clipped_l2norm" else 1
    lse = config.lambda_lse if config.agg_func == "LogSumExp" else 0
    floats = (np.float32(x) for x in (slope, config.lambda_softmax, EPS))
    return *floats, HOW[config.agg_func], np.float32(lse), np.float32(0.5 * config.max_term)
