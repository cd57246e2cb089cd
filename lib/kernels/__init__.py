"""The door to everything that only makes the model faster. Each function returns None where it has no faster way.

With None from all of them the model computes the same from the formulas in model.py, as it does on devices other than
CPU and CUDA. PFAN_KERNELS names the fastest way that may be used: none, torch, numba (compiled, without AMX) or amx.

blocks.py             captions in blocks of equal length, one matrix product a block
padded.py             captions padded and masked, for GPUs
attention_kernel.py   attention compiled by numba, for scoring on CPUs
pieces.py             the same with the products, a piece at a time, on CPUs without AMX
amx.py                products in the tile registers of CPUs that have them
gru.py                the GRU's backward pass on CPUs
"""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lib.errors import InputError

WAYS = ("none", "torch", "numba", "amx")
COMPILED_FROM = 2**20  # elements of S from which the compiled attention is used: compiling it takes a second
TILES_FROM = 2**25  # elements of S from which its products are compiled as well: that takes seconds


def allowed(way: str) -> bool:
    """True where PFAN_KERNELS allows this way. Raises InputError for a value that is none of WAYS."""
    fastest = os.environ.get("PFAN_KERNELS", WAYS[-1])
    if fastest not in WAYS:
        raise InputError(f"PFAN_KERNELS={fastest}: expected one of {', '.join(WAYS)}")
    return WAYS.index(fastest) >= WAYS.index(way)


def scores(
    images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, pairs: Tensor | None, attention: Any
) -> Tensor | None:
    """model.xattn_score, whose arguments these are: scores (I, C), or (P,) of the pairs (P, 2) only."""
    if not allowed("torch") or images.device.type not in ("cpu", "cuda"):
        return None
    from lib.kernels import blocks, padded

    form: Any = padded if images.device.type == "cuda" and padded.applies(attention) else blocks
    if pairs is None:
        return form.score_all(images, captions, cap_lens, attention)
    return form.score_pairs(images, captions, cap_lens, pairs, attention)


def packed_gru(rnn: nn.GRU, packed: PackedSequence) -> tuple[PackedSequence, Tensor] | None:
    """rnn(packed): the outputs and the final states (layers · directions, B, D)."""
    if not allowed("torch"):
        return None
    from lib.kernels import gru

    return gru.packed_gru(rnn, packed) if gru.applies(rnn, packed) else None


def images_before_compiling(n_regions: int, n_words: int) -> int | None:
    """How many images of n_regions can be scored with n_words at once before the compiled attention is used.

    For a single sentence it is slower, and compiling it takes a second.
    """
    return max(1, (COMPILED_FROM - 1) // max(1, n_regions * n_words))
