"""Reductions with finite gradients, fast where no gradient is needed; padding and packing of sequences."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Lens: TypeAlias = Sequence[int] | Tensor  # words of each caption
Mask: TypeAlias = Tensor | None  # bool, False for padding
EPS = 1e-8  # added to norms, and the floor of a cosine's denominator


def norm(X: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Euclidean norm along dim, with a finite gradient at 0.

    Only vector_norm has that gradient; along an inner dimension the sum of squares takes a fiftieth of its time.
    """
    if X.requires_grad:
        return torch.linalg.vector_norm(X, dim=dim, keepdim=keepdim)
    return X.square().sum(dim, keepdim=keepdim).sqrt_()


def max_along(X: Tensor, dim: int) -> Tensor:
    """Maximum along dim; of several equal elements one alone has the gradient.

    amax would divide the gradient among them; without a gradient it takes a fiftieth of max's time.
    """
    return X.max(dim).values if X.requires_grad else X.amax(dim)


def mul_(X: Tensor, Y: Any) -> Tensor:
    """X · Y, in X's own memory where no gradient needs X: half the traffic."""
    return X * Y if X.requires_grad else X.mul_(Y)


def filled(X: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """X with value where mask (bool, broadcast to X) is False; X itself where mask is None."""
    return X if mask is None else X.masked_fill(~mask, value)


def has_bfloat16() -> bool:
    """Whether the processor has instructions that multiply bfloat16 numbers."""
    return any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))


def at_least_float32(X: Tensor) -> Tensor:
    """X as float32 where it is float16 or bfloat16, unchanged where it is float32 or float64."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


# ---------------------------------------------------------------- padding and copies


def to_device(X: Any, device: torch.device) -> Any:
    """X on a device, by a copy that the host does not wait for; None stays None."""
    if X is None:
        return None
    if device.type == "cuda" and X.device.type == "cpu":
        X = X.pin_memory()
    return X.to(device, non_blocking=True)


def pad_rows(rows: Tensor, lens: Tensor) -> Tensor:
    """Rows (ΣW_i, …), sequence after sequence, → (B, W, …), zero behind a sequence's end. lens (B,) on the CPU."""
    inside = torch.arange(int(lens.max())) < lens[:, None]
    return place_rows(rows, to_device(inside.flatten().nonzero()[:, 0], rows.device), inside.shape)


def place_rows(rows: Tensor, positions: Tensor, shape: tuple | torch.Size) -> Tensor:
    """(B, W, …) of shape (B, W), zero but for rows (n, …) at positions (n,) of its B · W rows."""
    empty = rows.new_zeros(shape[0] * shape[1], *rows.shape[1:])
    return empty.index_copy_(0, positions, rows).unflatten(0, tuple(shape))


class PackedOrder(NamedTuple):
    """The order of a PackedSequence: time by time, the longest of B sequences first.

    positions (n,): where each of its n rows is in a padded batch (B, W) of B · W rows; batch_sizes (W,) on the CPU;
    sorted, unsorted (B,): the sequences, longest first, and back.
    """

    positions: Tensor
    batch_sizes: Tensor
    sorted: Tensor
    unsorted: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lens: Sequence[int] | Tensor, device: torch.device) -> "PackedOrder":
        """lens: B lengths. The indices go to the device in one copy that the host does not wait for."""
        lens = torch.as_tensor(lens, dtype=torch.int64).cpu()
        shape = len(lens), int(lens.max())
        order = lens.argsort(descending=True, stable=True)
        inside = torch.arange(shape[1])[:, None] < lens[order]  # (W, B)
        positions = (order * shape[1] + torch.arange(shape[1])[:, None])[inside]
        indices = to_device(torch.cat([order, order.argsort(), positions]), device)
        n = len(lens)
        return cls(indices[2 * n :], inside.sum(1), indices[:n], indices[n : 2 * n], shape)

    def pack(self, rows: Tensor) -> Tensor:
        """Padded (B, ≥ W) → (n,), the rows of a PackedSequence."""
        return rows[:, : self.shape[1]].flatten().index_select(0, self.positions)

    def pad(self, rows: Tensor) -> Tensor:
        """Rows (n, D) of a PackedSequence → (B, W, D), zero behind a sequence's end."""
        return place_rows(rows, self.positions, self.shape)
