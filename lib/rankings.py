"""Files of an evaluation's results: every query's rank, and every query's best candidates."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lib.files import replace, save_tensors, write_lines

BLOCK = 256  # queries that are sorted at once


def write_ranks(path: str, ranks: Sequence[dict], captions: str) -> None:
    """Write each fold's {"rt": (ranks, top1), "rti": (ranks, top1)} as tensors: a list, or a dict for one fold.

    captions: the digest of the split's captions, in each fold as well.
    """
    folds: list[dict[str, Any]] = [
        {key: [torch.as_tensor(x) for x in pair] for key, pair in fold.items()} | {"captions": captions}
        for fold in ranks
    ]
    replace(path, lambda file: save_tensors(folds if len(folds) > 1 else folds[0], file))


def write_topk(path: str, folds: Sequence[np.ndarray], k: int, ids: Sequence[str] | None) -> None:
    """Write the best k candidates of every query as JSON lines, best first.

    folds: similarities (n_images, n_captions) of consecutive parts of a split. ids: one an image, row numbers where
    None. A line is {"image": id, "captions": [index, …], "scores": […]} for each image, then
    {"caption": index, "images": [id, …], "scores": […]} for each caption; captions count from 0.
    """
    counts = np.cumsum([(0, 0), *(sims.shape for sims in folds)], axis=0).tolist()
    names: Sequence[Any] = range(counts[-1][0]) if ids is None else ids

    def lines() -> Iterator[str]:
        for sims, (image, caption) in zip(folds, counts, strict=False):
            for i, (best, scores) in enumerate(best_candidates(sims, k), image):
                yield json.dumps({"image": names[i], "captions": [caption + c for c in best], "scores": scores})
        for sims, (image, caption) in zip(folds, counts, strict=False):
            for c, (best, scores) in enumerate(best_candidates(sims.T, k), caption):
                yield json.dumps({"caption": c, "images": [names[image + i] for i in best], "scores": scores})

    write_lines(path, lines())


def best_candidates(sims: np.ndarray, k: int) -> Iterator[tuple[list, list]]:
    """For each row of sims (n, m), the k largest columns and their scores, largest first; equal ones by column."""
    for start in range(0, len(sims), BLOCK):
        block = np.ascontiguousarray(sims[start : start + BLOCK])
        order = np.argsort(-block, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(block, order, axis=1).round(6).astype(float)
        yield from zip(order.tolist(), scores.tolist(), strict=True)
