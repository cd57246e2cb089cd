"""Memory of a GPU: what is kept there, and how large a block may be. On a CPU everything stays where it is."""

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


def score_blocks(score: Callable, images: Sequence[Tensor], captions: tuple, device: torch.device) -> Tensor:
    """score(*images, *captions) (I, C) on the CPU, of as many images at once as the device's free memory holds.

    images, captions: embeddings on the device, as evaluation.score_shards takes them.
    """
    free, size = free_bytes(device), len(images[0])
    if free is not None:
        elements = images[0].shape[1] * int(captions[1].sum())  # of an image's raw similarities
        size = max(1, int(SHARE * free / (4 * TEMPORARIES * elements)))
    blocks = zip(*(x.split(size) for x in images), strict=True)
    return torch.cat([score(*block, *captions).cpu() for block in blocks])


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
