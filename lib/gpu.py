"""Memory of a GPU: what is kept there, how large a block may be, and what happens where it runs out.

On a CPU everything stays where it is and blocks have no limit.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.tensors import send

log = logging.getLogger(__name__)
SHARE = 0.5  # of the free memory for what is kept on the GPU; the rest is for blocks
AUTO_SHARE = 1 / 3  # of the free memory for a split's features with --features_on auto
ROWS = 1024  # that are copied to a GPU at once
TEMPORARIES = 8  # tensors as large as a block's raw similarities that attention needs at once


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device, with what PyTorch holds unused; None for other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def resident(X: Any, device: torch.device) -> Any:
    """X, a tensor or an array, as a tensor on a GPU where it takes at most half of the free memory; else X itself."""
    free = free_bytes(device)
    if free is None or not 0 < getattr(X, "nbytes", 0) <= SHARE * free:
        return X
    return send(X if isinstance(X, Tensor) else torch.from_numpy(np.array(X)), device)


def resident_chunks(X: Tensor, device: torch.device, multiple: int) -> Iterator[tuple[int, Tensor]]:
    """Pairs of a first row and the rows from there on, on the device: as many at once as half of the free memory holds.

    multiple: a chunk is a multiple of this many rows, but for the last. On a CPU the only chunk is X.
    """
    free, size = free_bytes(device), max(1, len(X))
    if free is not None and X.nbytes > SHARE * free:
        size = max(1, int(SHARE * free * len(X) / X.nbytes) // multiple) * multiple
    for start in range(0, len(X), size):
        yield start, X if device.type == "cpu" else send(X[start : start + size], device)


def load_rows(rows: Callable, n: int, device: torch.device, share: float) -> list[Tensor] | None:
    """rows(0) … rows(n - 1), tuples of tensors of equal shapes and types, each stacked (n, …) on a GPU.

    None, with a line, where they take more than this share of its free memory; None on a CPU.
    """
    free = free_bytes(device)
    if free is None:
        return None
    first = rows(0)
    size = n * sum(x.nbytes for x in first)
    fits = size <= share * free
    text = "%s: %.1f GB of features %s, %.1f GB are free"
    log.info(text, device, size / 1e9, "are kept there" if fits else "come batch by batch", free / 1e9)
    if not fits:
        return None
    kept = [torch.empty(n, *x.shape, dtype=x.dtype, device=device) for x in first]
    for start in range(0, n, ROWS):
        for target, block in zip(kept, zip(*map(rows, range(start, min(n, start + ROWS))), strict=True), strict=True):
            target[start : start + ROWS] = send(torch.stack(block), device)
    return kept


class BlockLimit:
    """How many images are scored at once on a device. size: the limit; None on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.size: int | None = None

    def fit(self, elements: int) -> int | None:
        """The limit for images of that many raw similarities each: what the free memory holds, less after a failure."""
        free = free_bytes(self.device)
        if free is None:
            return None
        fits = max(1, int(SHARE * free / (4 * TEMPORARIES * max(1, elements))))
        return fits if self.size is None else min(self.size, fits)

    def score(self, images: Tensor, n_words: int, score: Callable[[Tensor], Tensor]) -> Tensor:
        """score(images) (I, C) on the CPU, in blocks of images.

        Where a block runs out of memory, it is scored in halves, with a warning, and so are all after it. Raises
        torch.OutOfMemoryError where one image is too much.
        """
        scores, start = [], 0
        while start < len(images):
            size = self.fit(images.shape[1] * n_words) or len(images)
            block = images[start : start + size]
            try:
                scores.append(score(block).cpu())
            except torch.OutOfMemoryError:
                if len(block) == 1:
                    raise
                self.size = len(block) // 2
                log.warning("%s: out of memory with %d images at once, now %d", self.device, len(block), self.size)
                torch.cuda.empty_cache()
                continue
            start += len(block)
        return torch.cat(scores) if len(scores) != 1 else scores[0]
