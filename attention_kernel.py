"""cross_attention.attend for scoring on CPUs, compiled by numba.

What attend does in passes over the whole of S happens here to one context at a time, while it is in the processor's
cache. For the L2 norms only: they bound the softmax's exponents, so that its maximum need not be known beforehand.
"""

import math
from typing import TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor

import amx

Float: TypeAlias = np.float32
Array: TypeAlias = np.ndarray  # of float32 everywhere, and contiguous
ROWS, COLUMNS = 288, 576  # of S that are multiplied and attended to while they are in a core's cache
TILE = 512  # columns whose 36 rows of attention are multiplied with the Gram matrix at once
ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)
LOG2_E = np.float32(1.44269504)
LN_2_HIGH, LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # ln 2 in two parts, the first exact
EXP = tuple(np.float32(c) for c in (1.98756915e-4, 1.39819995e-3, 8.33345191e-3, 4.16657959e-2, 1.66666655e-1, 0.5))

compiled = njit(nogil=True, fastmath={"contract"})  # no flag that assumes there is no NaN: it must reach the scores


@njit(fastmath={"contract"}, inline="always")
def exp(x: Float) -> Float:  # pragma: no cover
    """e^x in float32 for -87 < x < 88, in operations that vectorise: 2ⁿ · e^r with |r| <= ln 2 / 2 by a polynomial."""
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN_2_HIGH - n * LN_2_LOW
    p = ((((EXP[0] * r + EXP[1]) * r + EXP[2]) * r + EXP[3]) * r + EXP[4]) * r + EXP[5]
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + ONE) * power


@compiled
def scales(similarities: Array, slope: Float, smooth: Float, eps: Float, scale: Array) -> None:  # pragma: no cover
    """scale (K·M) = λ / L2 norm over K of a context element's leaky similarities (K, M)."""
    K, M = similarities.shape
    norm = scale[:M]
    norm[:] = 0
    for k in range(K):
        for m in range(M):
            s = similarities[k, m]
            s = s if s > 0 else s * slope
            norm[m] += s * s
    for m in range(M):
        norm[m] = smooth / (math.sqrt(norm[m]) + eps)
    for k in range(1, K):
        for m in range(M):
            scale[k * M + m] = norm[m]


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
def contexts(  # pragma: no cover
    rows: Array,
    K: int,
    M: int,
    gram: Array,
    slope: Float,
    smooth: Float,
    eps: Float,
    squares: Array,
    dots: Array,
    strongest: Array,
) -> None:
    """attend's sums (N, K·M) of S: its rows (N, L, K·M or more, the rest not looked at), gram as doubled makes it."""
    N, L, columns = len(rows), rows.shape[1], K * M
    scale, total = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for n in range(N):
        total[:], dots[n], strongest[n], squares[n] = 0, 0, 0, 0
        for row in range(L):
            S = rows[n, row][:columns]
            scales(S.reshape(K, M), slope, smooth, eps, scale)
            exponentials(S, scale, slope, smooth, total, dots[n], strongest[n])
        for start in range(0, columns, TILE):
            add_squares(rows[n], start, min(start + TILE, columns), gram[n], squares[n])
        for i in range(columns):
            share = ONE / total[i]
            squares[n, i] *= share * share
            dots[n, i] *= share
            strongest[n, i] *= share


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
    slope: Float,
    smooth: Float,
    eps: Float,
    results: Array,
) -> None:
    """results (3, N, K, M) of parts first to last of S, each of group contexts and piece queries.

    left, right: contexts and queries as left_side and right_side make them. S: memory for such a part.
    """
    N, K, M = results.shape[1:]
    L, pieces, rows, columns = gram.shape[1], -(-M // piece), len(S) // amx.BLOCK, S.shape[1] // amx.BLOCK
    sums = np.empty((3, group, K * piece), np.float32)
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
        count, width = min(group, N - n), min(piece, M - m)
        own = S[: count * L].reshape(count, L, S.shape[1])
        contexts(own, K, width, gram[n : n + count], slope, smooth, eps, sums[0], sums[1], sums[2])
        for what in range(3):
            for i in range(count):
                for k in range(K):
                    results[what, n + i, k, m : m + width] = sums[what, i, k * width : (k + 1) * width]


def doubled(gram: Tensor) -> Tensor:
    """Of symmetric gram (N, L, L), what a sum over half of it needs: twice what is above the diagonal, 0 below."""
    return gram.triu() + gram.triu(1)


def attend(S: Tensor, gram: Tensor, slope: float, smooth: float, eps: float) -> Tensor:
    """With A = softmax over L of λ·S's leaky values over their L2 norm along K: A gram Aᵀ, Σ A S, max A: (3, N, K, M).

    S (N, L, K, M), contiguous, overwritten; gram (N, L, L); both float32 on the CPU. slope: of the leaky values below
    0; smooth: λ, 0 to 20 (e^-4λ is still a float32). Contexts are divided among torch.get_num_threads() threads.
    """
    N, L, K, M = S.shape
    rows, matrices = S.view(N, L, K * M).numpy(), doubled(gram).numpy()
    results = np.empty((3, N, K * M), np.float32)
    numbers = np.float32(slope), np.float32(smooth), np.float32(eps)

    def part(first, last):
        contexts(rows[first:last], K, M, matrices[first:last], *numbers, *results[:, first:last])

    amx.in_threads(part, N)
    return torch.from_numpy(results).view(3, N, K, M)


# ---------------------------------------------------------------- with the product


def has_tiles(contexts: int, queries: int, D: int) -> bool:
    """Whether attend_products pays for this many elements of D values: where it can be had, and for not too few."""
    return min(contexts, queries) >= ROWS and D % amx.STEP == 0 and amx.available()


def group_size(count: int, length: int, room: int) -> int:
    """How many of count things of this length go together, for about so much room; 16 at a time vectorise well."""
    size = max(1, min(count, room // length))
    return size // 16 * 16 or size


def whole_blocks(n: int) -> int:
    """n rounded up to a multiple of amx.BLOCK."""
    return -(-n // amx.BLOCK) * amx.BLOCK


def left_side(contexts: Tensor) -> Tensor:
    """Contexts (N, L, D) as attend_products takes them: in groups, each filled up to whole blocks of rows."""
    N, L, _ = contexts.shape
    group = group_size(N, L, ROWS)
    index = np.full((-(-N // group), whole_blocks(group * L)), -1)
    own = np.arange(len(index) * group * L).reshape(len(index), -1)
    index[:, : group * L] = np.where(own < N * L, own, -1)
    return amx.side(contexts.flatten(0, 1), index.ravel(), right=False)


def right_side(queries: Tensor) -> Tensor:
    """Queries (M, K, D) as attend_products takes them: in groups, each with its first elements first, then the rest."""
    M, K, _ = queries.shape
    piece = group_size(M, K, COLUMNS)
    index = np.full((-(-M // piece), whole_blocks(K * piece)), -1)
    for row, first in zip(index, range(0, M, piece), strict=True):
        own = np.arange(first, min(first + piece, M)) * K + np.arange(K)[:, None]
        row[: own.size] = own.ravel()
    return amx.side(queries.flatten(0, 1), index.ravel(), right=True)


def attend_products(
    left: Tensor, right: Tensor, shape: tuple, gram: Tensor, slope: float, smooth: float, eps: float
) -> Tensor:
    """attend's sums (3, N, K, M) for contexts left and queries right; gram is doubled(the contexts' own).

    shape: of S (N, L, K, M), which never is whole.
    """
    N, L, K, M = shape
    group, piece = group_size(N, L, ROWS), group_size(M, K, COLUMNS)
    sides, matrices = (left.numpy(), right.numpy()), gram.numpy()
    results = np.empty((3, N, K, M), np.float32)
    numbers = np.float32(slope), np.float32(smooth), np.float32(eps)

    def part(first, last):
        S = torch.empty(whole_blocks(group * L), whole_blocks(K * piece) + 16).numpy()
        products_and_contexts(first, last, *sides, group, piece, amx.CONFIGURATION, S, matrices, *numbers, results)

    amx.in_threads(part, -(-N // group) * -(-M // piece))
    return torch.from_numpy(results)
