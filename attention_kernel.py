"""cross_attention.attend for scoring on CPUs, compiled by numba.

What attend does in passes over the whole of S happens here to one context at a time, while it is in the processor's
cache. For the L2 norms only: they bound the softmax's exponents, so that its maximum need not be known beforehand.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor

import amx

Float: TypeAlias = np.float32
Array: TypeAlias = np.ndarray  # of float32 everywhere, and contiguous
ROWS, COLUMNS = 288, 1024  # of S that are multiplied and attended to while they are in a core's cache
TILE = 512  # columns whose 36 rows of attention are multiplied with the Gram matrix at once
LOG_SUM_EXP, MEAN, MAX, SUM = range(4)
HOW = {"LogSumExp": LOG_SUM_EXP, "Mean": MEAN, "Max": MAX, "Sum": SUM}
ONE, HALF = np.float32(1), np.float32(0.5)
LOG2_E = np.float32(1.44269504)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2 in two parts, the first exact
EXP = tuple(np.float32(c) for c in (1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5))

# fastmath: no flag that assumes there is no NaN, because it must reach the scores
compiled = njit(nogil=True, fastmath={"contract"}, error_model="numpy")


@njit(fastmath={"contract"}, inline="always")
def exp(x: Float) -> Float:  # pragma: no cover
    """e^x in float32 for -87 < x < 88, in operations that vectorise: 2ⁿ · e^r with |r| <= ln 2 / 2 by a polynomial."""
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN_2_HIGH - n * LN_2_LOW
    p = ((((EXP[0] * r + EXP[1]) * r + EXP[2]) * r + EXP[3]) * r + EXP[4]) * r + EXP[5]
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + ONE) * power


@compiled
def fold(values: Array, K: int, M: int, most: bool) -> None:  # pragma: no cover
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
def scales(  # pragma: no cover
    S: Array, K: int, M: int, slope: Float, smooth: Float, eps: Float, scale: Array
) -> None:
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
def exponentials(  # pragma: no cover
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
def add_row(sum: Array, a: Array, g: Float) -> None:  # pragma: no cover
    for i in range(len(sum)):
        sum[i] += g * a[i]


@compiled
def add_products(sum: Array, a: Array, b: Array) -> None:  # pragma: no cover
    for i in range(len(sum)):
        sum[i] += a[i] * b[i]


@compiled
def add_four_rows(  # pragma: no cover
    p: Array, q: Array, r: Array, s: Array, a: Array, b: Array, c: Array, d: Array, gram: Array
) -> None:
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
def add_squares(e: Array, start: int, stop: int, gram: Array, squares: Array) -> None:  # pragma: no cover
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
def aggregate(  # pragma: no cover
    values: Array, K: int, M: int, how: int, smooth: Float, factor: Float, scores: Array
) -> None:
    """scores (M) += factor · AGG_FUNC how, with λ_lse smooth, over the first axis of values (K·M), which are lost."""
    if how == LOG_SUM_EXP:
        for i in range(K * M):
            values[i] = exp(smooth * values[i])
    fold(values, K, M, how == MAX)
    for m in range(M):
        x: Any = values[m]
        if how == LOG_SUM_EXP:
            x = math.log(x) / smooth
        elif how == MEAN:
            x /= K
        scores[m] += factor * x


@compiled
def contexts(  # pragma: no cover
    rows: Array,
    gram: Array,
    norms: Array,
    slope: Float,
    smooth: Float,
    eps: Float,
    how: int,
    lse: Float,
    term: Float,
    scores: Array,
    first_row: int,
    first_column: int,
) -> None:
    """attend's scores of some contexts and queries, from first_row and first_column on.

    rows (N, L, K·M or more, the rest not looked at): of S; gram as doubled makes it; norms (K, M).
    """
    N, L = rows.shape[:2]
    K, M = norms.shape
    columns, lengths = K * M, norms.reshape(K * M)
    scale, total, dots = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    strongest, squares, own = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(M, np.float32)
    for n in range(N):
        total[:], dots[:], strongest[:], squares[:], own[:] = 0, 0, 0, 0, 0
        for row in range(L):
            S = rows[n, row][:columns]
            scales(S, K, M, slope, smooth, eps, scale)
            exponentials(S, scale, slope, smooth, total, dots, strongest)
        for start in range(0, columns, TILE):
            add_squares(rows[n], start, min(start + TILE, columns), gram[n], squares)
        for i in range(columns):
            share = ONE / total[i]
            square = squares[i] * share * share
            both = lengths[i] * math.sqrt(eps * eps * eps if square < eps * eps * eps else square)
            dots[i] *= share / (eps if both < eps else both)
            strongest[i] *= share
        aggregate(dots, K, M, how, lse, ONE, own)
        if term:
            aggregate(strongest, K, M, how, lse, term, own)
        for m in range(M):
            scores[first_row + n, first_column + m] = own[m]


@compiled
def products_and_contexts(  # pragma: no cover
    first: int,
    last: int,
    left: Array,
    right: Array,
    group: int,
    piece: int,
    configuration: Array,
    S: Array,
    gram: Array,
    norms: Array,
    slope: Float,
    smooth: Float,
    eps: Float,
    how: int,
    lse: Float,
    term: Float,
    scores: Array,
) -> None:
    """attend's scores (N, M) of parts first to last, each of group contexts and piece queries.

    left, right: contexts and queries as left_sides and right_sides make them. S: memory for such a part.
    """
    N, L, M = len(gram), gram.shape[1], norms.shape[1]
    pieces, rows, columns = -(-M // piece), len(S) // amx.BLOCK, S.shape[1] // amx.BLOCK
    amx.configure(configuration.ctypes.data)
    for part in range(first, last):
        n, m = part // pieces * group, part % pieces * piece
        amx.multiply(
            left[0, n // group * rows].ctypes.data,
            left[0].nbytes,
            right[0, m // piece * columns].ctypes.data,
            right[0].nbytes,
            left.shape[2],
            len(left),
            S.ctypes.data,
            rows,
            columns,
            S.strides[0],
        )
        count = min(group, N - n)
        own = S[: count * L].reshape(count, L, S.shape[1])
        own_norms = norms[:, m : m + piece].copy()
        contexts(own, gram[n : n + count], own_norms, slope, smooth, eps, how, lse, term, scores, n, m)


def doubled(gram: Tensor) -> Tensor:
    """Of symmetric gram (N, L, L), what a sum over half of it needs: twice what is above the diagonal, 0 below."""
    return gram.triu() + gram.triu(1)


def numbers(options: Any) -> tuple:
    """attend's options as the compiled functions take them."""
    slope, smooth, eps, agg_func, lse, term = options
    return *(np.float32(x) for x in (slope, smooth, eps)), HOW[agg_func], np.float32(lse), np.float32(term)


def attend(S: Tensor, gram: Tensor, norms: Tensor, *options: Any) -> Tensor:
    """cross_attention.attend: scores (N, M) of S (N, L, K, M), gram (N, L, L) and query norms (K, M).

    All float32 on the CPU; S is contiguous, and overwritten. options: slope of leaky values below 0; λ, 0 to 20 (e^-4λ
    is still a float32); what is added to norms; AGG_FUNC's name; λ_lse, to 80; what the largest attention counts.
    Contexts are divided among torch.get_num_threads() threads.
    """
    N, L, K, M = S.shape
    rows, matrices, lengths = S.view(N, L, K * M).numpy(), doubled(gram).numpy(), norms.contiguous().numpy()
    scores = np.empty((N, M), np.float32)

    def part(first, last):
        contexts(rows[first:last], matrices[first:last], lengths, *numbers(options), scores, first, 0)

    amx.in_threads(part, N)
    return torch.from_numpy(scores)


# ---------------------------------------------------------------- with the product


def has_tiles(contexts: int, queries: int, D: int) -> bool:
    """Whether attend_products pays for this many elements of D values: where it can be had, and for not too few."""
    return min(contexts, queries) >= ROWS and D % amx.STEP == 0 and amx.available()


def group_size(count: int, length: int, room: int) -> int:
    """How many of count things of this length go together, for about so much room; 16 at a time vectorise well."""
    size = max(1, room // length)
    return count if count <= size else size // 16 * 16 or size


def whole_blocks(n: int) -> int:
    """n rounded up to a multiple of amx.BLOCK."""
    return -(-n // amx.BLOCK) * amx.BLOCK


def left_sides(contexts: Sequence[Tensor]) -> list[Tensor]:
    """Several contexts (N, L, D) as attend_products takes them: in groups, each filled up to whole blocks of rows."""
    wanted = []
    for own in contexts:
        N, L, _ = own.shape
        group = group_size(N, L, ROWS)
        index = np.full((-(-N // group), whole_blocks(group * L)), -1)
        rows = np.arange(len(index) * group * L).reshape(len(index), -1)
        index[:, : group * L] = np.where(rows < N * L, rows, -1)
        wanted.append((own.flatten(0, 1), index.ravel()))
    return amx.sides(wanted, right=False)


def right_sides(queries: Sequence[Tensor]) -> list[Tensor]:
    """Several queries (M, K, D) as attend_products takes them: in groups, each with the first elements of all first."""
    wanted = []
    for own in queries:
        M, K, _ = own.shape
        piece = group_size(M, K, COLUMNS)
        index = np.full((-(-M // piece), whole_blocks(K * piece)), -1)
        for row, first in zip(index, range(0, M, piece), strict=True):
            rows = np.arange(first, min(first + piece, M)) * K + np.arange(K)[:, None]
            row[: rows.size] = rows.ravel()
        wanted.append((own.flatten(0, 1), index.ravel()))
    return amx.sides(wanted, right=True)


def attend_products(left: Tensor, right: Tensor, gram: Tensor, norms: Tensor, *options: Any) -> Tensor:
    """attend's scores (N, M) of contexts left and queries right, S never being whole.

    gram: doubled(the contexts' own); norms (K, M); options: attend's.
    """
    (N, L, _), (K, M) = gram.shape, norms.shape
    group, piece = group_size(N, L, ROWS), group_size(M, K, COLUMNS)
    sides, matrices, lengths = (left.numpy(), right.numpy()), gram.numpy(), norms.contiguous().numpy()
    scores = np.empty((N, M), np.float32)

    def part(first, last):
        S = torch.empty(whole_blocks(group * L), whole_blocks(K * piece) + 16).numpy()
        work = *sides, group, piece, amx.CONFIGURATION, S, matrices, lengths
        products_and_contexts(first, last, *work, *numbers(options), scores)

    amx.in_threads(part, -(-N // group) * -(-M // piece))
    return torch.from_numpy(scores)
