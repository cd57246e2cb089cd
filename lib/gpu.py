"""Memory of a GPU: what is kept there, and how large a block may be.

On a CPU everything stays where it is and blocks have no limit.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lib.tensors import to_device

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
    return to_device(X if isinstance(X, Tensor) else torch.from_numpy(np.array(X)), device)


class BlockLimit:
    """How many images are scored at once on a device: what its free memory holds, less after a failure."""

    def __init__(self, device: torch.device):
        self.device = device
        self.size: int | None = None

    def fit(self, n_images: int, elements: int) -> int:
        """The limit for n images of that many raw similarities each."""
        free = free_bytes(self.device)
        if free is None:
            return n_images
        fits = max(1, int(SHARE * free / (4 * TEMPORARIES * max(1, elements))))
        return min(n_images, fits, self.size or fits)

    def score(self, score: Callable, images: Sequence[Tensor], captions: tuple) -> Tensor:
        """score(*images, *captions) (I, C) on the CPU, in blocks of images.

        images, captions: as evaluation.score_shards takes them, on the device. Where a block runs out of memory, it is
        scored in halves, with a warning, and so are all after it. Raises torch.OutOfMemoryError where one image is too
        much.
        """
        scores, start, n = [], 0, len(images[0])
        while start < n:
            size = self.fit(n - start, images[0].shape[1] * int(captions[1].sum()))
            try:
                scores.append(score(*(x[start : start + size] for x in images), *captions).cpu())
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self.size = size // 2
                log.warning("%s: out of memory with %d images at once, now %d", self.device, size, self.size)
                torch.cuda.empty_cache()
                continue
            start += size
        return torch.cat(scores)


class FeaturesOnGPU:
    """A DataLoader whose data set's features and grids lie on a GPU: they are put into its batches there.

    The data set's items then have an image's number in their place; the rest of the DataLoader is as it was.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, dataset = loader, loader.dataset
        n, first = dataset.n_images, dataset.features(0)
        self.rows = [torch.empty(n, *x.shape, dtype=x.dtype, device=device) for x in first]
        for start in range(0, n, ROWS):
            block = dataset.features(range(start, min(n, start + ROWS)))
            for target, rows in zip(self.rows, block, strict=True):
                target[start : start + ROWS] = to_device(rows, device)
        dataset.numbers_only = True

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            numbers = to_device(batch[0], self.rows[0].device)
            yield *(x.index_select(0, numbers) for x in self.rows), *batch[1:]


def keep_features(loader: Any, device: torch.device, where: str) -> Any:
    """loader with its data set's features on a GPU, if where (--features_on) says so and they fit; else loader.

    A data set with items of its own keeps them: only the class that defines numbers_only knows what it means.
    """
    free, dataset = free_bytes(device), getattr(loader, "dataset", None)
    makes_items = next((kind for kind in type(dataset).__mro__ if "__getitem__" in vars(kind)), object)
    if free is None or where == "host" or "numbers_only" not in vars(makes_items):
        return loader
    size = dataset.n_images * sum(x.nbytes for x in dataset.features(0))
    fits = size <= free * (AUTO_SHARE if where == "auto" else 1)
    text = "%s: %.1f GB of features %s, %.1f GB are free"
    log.info(text, device, size / 1e9, "are kept there" if fits else "come batch by batch", free / 1e9)
    return FeaturesOnGPU(loader, device) if fits else loader
