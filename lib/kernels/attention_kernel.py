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
Array: TypeAlias = np.ndarray  # of float32, but for the int64 tables of blocks, and contiguous
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
    """values[:M] = the sum, or the largest, over the first axis of values (K·M), which are lost."""
    for k in range(1, K):
        rest = values[k * M : (k + 1) * M]
        if most:  # NaN included
            for m in range(M):
                values[m] = rest[m] if values[m] < rest[m] or rest[m] != rest[m] else values[m]
        else:
            for m in range(M):
                values[m] += rest[m]


@compiled
def scales(S: Array, K: int, M: int, slope: Float, smooth: Float, eps: Float, scale: Array) -> None:
    """scale (K·M) = λ / L2 norm over K of a context element's leaky similarities S (K·M)."""
    for i in range(K * M):
        s = S[i] if S[i] > 0 else S[i] * slope
        scale[i] = s * s
    fold(scale, K, M, False)
    for m in range(M):
        scale[m] = smooth / (math.sqrt(scale[m]) + eps)
    for k in range(1, K):
        scale[k * M : (k + 1) * M] = scale[:M]


@compiled
def exponentials(
    row: Array, scale: Array, slope: Float, smooth: Float, total: Array, dots: Array, largest: Array
) -> None:
    """One context element's similarities become e^(λ·normalised - λ), and join its context's sums and maximum."""
    for i in range(len(row)):
        s = row[i]
        e = exp((s if s > 0 else s * slope) * scale[i] - smooth)
        row[i] = e
        total[i] += e
        dots[i] += e * s
        largest[i] = e if e > largest[i] else largest[i]


@compiled
def add_row(sum: Array, a: Array, g: Float) -> None:
    for i in range(len(sum)):
        sum[i] += g * a[i]


@compiled
def add_products(sum: Array, a: Array, b: Array) -> None:
    for i in range(len(sum)):
        sum[i] += a[i] * b[i]


@compiled
def add_squares(e: Array, gram: Array, products: Array, squares: Array) -> None:
    """squares (columns) += e G eᵀ for e (L, columns); gram: twice G above the diagonal, 0 below. products: room."""
    for row in range(len(e)):
        products[:] = 0
        for other in range(row, len(e)):
            add_row(products, e[other], gram[row, other])
        add_products(squares, products, e[row])


@compiled
def aggregate(values: Array, K: int, M: int, how: int, lse: Float, factor: Float, scores: Array) -> None:
    """scores (M) += factor · AGG_FUNC how of λ_lse lse, over the first axis of values (K·M), which are lost."""
    if how == LOG_SUM_EXP:
        for i in range(K * M):  # within ±λ_lse, but that the cosine of a context that cancels may be anything
            x = lse * values[i]
            values[i] = exp(LIMIT if x > LIMIT else -LIMIT if x < -LIMIT else x)
    fold(values, K, M, how == MAX)
    for m in range(M):
        score: Any = values[m]
        if how == LOG_SUM_EXP:
            score = math.log(score) / lse
        elif how == MEAN:
            score /= K
        scores[m] += factor * score


@compiled
def score_piece(
    S: Array, contexts: Array, gram: Array, queries: Array, norms: Array, options: tuple, scores: Array
) -> None:
    """attend's scores of all contexts with all queries of a piece S (rows, columns), which is overwritten.

    contexts, gram, queries, norms: blocks and values of both pieces.Sides. options: as options_of returns them.
    """
    row = value = 0
    numbers = np.empty((5, S.shape[1]), np.float32)
    for block in range(len(contexts)):
        N, L, first = contexts[block]
        for n in range(N):
            G = gram[value : value + L * L].reshape(L, L)
            score_context(S[row : row + L], G, queries, norms, options, numbers, scores[first + n])
            row, value = row + L, value + L * L


@compiled
def score_context(
    S: Array, gram: Array, queries: Array, norms: Array, options: tuple, numbers: Array, scores: Array
) -> None:
    """Scores of one context, rows S (L, columns), with all queries. numbers (5, columns): room."""
    scale, total, dots, largest, squares = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    total[:], dots[:], largest[:], squares[:] = 0, 0, 0, 0
    slope, smooth, eps, how, lse, term = options
    for row in range(len(S)):
        column = 0
        for block in range(len(queries)):
            M, K, _ = queries[block]
            stop = column + K * M
            scales(S[row][column:stop], K, M, slope, smooth, eps, scale[column:stop])
            column = stop
        exponentials(S[row], scale, slope, smooth, total, dots, largest)
    add_squares(S, gram, scale, squares)
    for i in range(len(norms)):
        share = ONE / total[i]
        square = squares[i] * share * share
        both = norms[i] * math.sqrt(eps * eps * eps if square < eps * eps * eps else square)
        dots[i] *= share / (eps if both < eps else both)
        largest[i] *= share
    column = 0
    for block in range(len(queries)):
        M, K, query = queries[block]
        stop, found = column + K * M, scores[query : query + M]
        found[:] = 0
        aggregate(dots[column:stop], K, M, how, lse, ONE, found)
        if term:
            aggregate(largest[column:stop], K, M, how, lse, term, found)
        column = stop


def options_of(config: Any) -> tuple:
    """What the compiled functions read of a model.ScoreConfig.

    Slope of leaky values below 0; λ; what is added to norms; the aggregation; its λ_lse; factor of the largest
    attention's term. pieces.applies has the ranges: e^-4λ must be a float32.
    """
    slope = LEAK if config.raw_feature_norm == "clipped_l2norm" else 1
    lse = config.lambda_lse if config.agg_func == "LogSumExp" else 0
    floats = (np.float32(x) for x in (slope, config.lambda_softmax, EPS))
    return *floats, HOW[config.agg_func], np.float32(lse), np.float32(0.5 * config.max_term)
