"""A float32 product of two matrices by lib/kernels/amx.py alone, to know the rate of its tiles."""

import numpy as np
import torch

from lib.kernels import amx


def product(a, b):
    """a (n, D) · b (m, D)ᵀ; n and m multiples of amx.BLOCK."""
    left = amx.side([(a, np.arange(len(a)))], amx.PARTS["highest"], right=False).numpy()
    right = amx.side([(b, np.arange(len(b)))], amx.PARTS["highest"], right=True).numpy()
    result = torch.empty(len(a), len(b))
    work = left, right, amx.CONFIGURATION, result.numpy()
    amx.in_threads(lambda first, last: multiply_rows(first, last, *work), len(a) // amx.BLOCK)
    return result


@amx.compiled
def multiply_rows(first, last, left, right, configuration, result):
    """The blocks of rows first to last-1 of the result."""
    amx.configure(configuration.ctypes.data)
    sides = left[0, first].ctypes.data, left[0].nbytes, right.ctypes.data, right[0].nbytes
    start, stride = result[first * amx.BLOCK].ctypes.data, result.strides[0]
    amx.multiply(*sides, left.shape[2], len(left), start, last - first, right.shape[1], stride)
