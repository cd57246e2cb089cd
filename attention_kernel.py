"""cross_attention.attend for scoring on CPUs, compiled by numba.

What attend does in passes over the whole of S happens here to one context at a time, while it is in the processor's
cache. For the L2 norms only: they bound the softmax's exponents, so that its maximum need not be known beforehand.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor

Float: TypeAlias = np.float32
Array: TypeAlias = np.ndarray  # of float32 everywhere, and contiguous
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
def add_rows(  # pragma: no cover
    sum: Array, a: Array, b: Array, c: Array, d: Array, g: Float, h: Float, j: Float, k: Float
) -> None:
    for i in range(len(sum)):
        sum[i] += g * a[i] + h * b[i] + j * c[i] + k * d[i]


@compiled
def add_products(sum: Array, a: Array, b: Array) -> None:  # pragma: no cover
    for i in range(len(sum)):
        sum[i] += a[i] * b[i]


@compiled
def add_squares(e: Array, start: int, stop: int, gram: Array, squares: Array) -> None:  # pragma: no cover
    """squares (columns) += e gram eᵀ, columns start to stop of e (L, columns); half of the symmetric gram is read."""
    # e[row][start:stop], not e[row, start:stop]: only of the first numba knows that it is contiguous, and vectorises
    products = np.empty(stop - start, np.float32)
    for row in range(len(e)):
        products[:] = 0
        g: Array = TWO * gram[row]
        add_row(products, e[row][start:stop], gram[row, row])
        other = row + 1
        while other + 4 <= len(e):
            a, b = e[other][start:stop], e[other + 1][start:stop]
            c, d = e[other + 2][start:stop], e[other + 3][start:stop]
            add_rows(products, a, b, c, d, g[other], g[other + 1], g[other + 2], g[other + 3])
            other += 4
        for rest in range(other, len(e)):
            add_row(products, e[rest][start:stop], g[rest])
        add_products(squares[start:stop], products, e[row][start:stop])


@compiled
def contexts(  # pragma: no cover
    S: Array,
    rows: Array,
    gram: Array,
    slope: Float,
    smooth: Float,
    eps: Float,
    squares: Array,
    dots: Array,
    strongest: Array,
) -> None:
    """attend's sums for S (N, L, K, M), of which rows (N, L, K·M) is a view."""
    N, L, columns = rows.shape
    scale, total = np.empty(columns, np.float32), np.empty(columns, np.float32)
    for n in range(N):
        total[:], dots[n], strongest[n], squares[n] = 0, 0, 0, 0
        for row in range(L):
            scales(S[n, row], slope, smooth, eps, scale)
            exponentials(rows[n, row], scale, slope, smooth, total, dots[n], strongest[n])
        for start in range(0, columns, TILE):
            add_squares(rows[n], start, min(start + TILE, columns), gram[n], squares[n])
        for i in range(columns):
            share = ONE / total[i]
            squares[n, i] *= share * share
            dots[n, i] *= share
            strongest[n, i] *= share


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def attend(S: Tensor, gram: Tensor, slope: float, smooth: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """With A = softmax over L of λ·S's leaky values over their L2 norm along K: (A gram Aᵀ, Σ A S, max A), (N, K, M).

    S (N, L, K, M), contiguous, overwritten; gram (N, L, L); both float32 on the CPU. slope: of the leaky values below
    0; smooth: λ, 0 to 20 (e^-4λ is still a float32). Contexts are divided among torch.get_num_threads() threads.
    """
    N, L, K, M = S.shape
    rows, matrices = S.view(N, L, K * M).numpy(), gram.contiguous().numpy()
    results = np.empty((3, N, K * M), np.float32)
    numbers = np.float32(slope), np.float32(smooth), np.float32(eps)
    cuts = np.linspace(0, N, min(N, torch.get_num_threads()) + 1).astype(int)
    parts = [slice(*cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]

    def part(p):
        contexts(S.numpy()[p], rows[p], matrices[p], *numbers, *results[:, p])

    if len(parts) == 1:
        part(parts[0])
    else:
        list(pool(len(parts)).map(part, parts))
    squares, dots, strongest = torch.from_numpy(results).view(3, N, K, M)
    return squares, dots, strongest
