"""The first stage of the search: approximate scores, by which the images or captions to score exactly are chosen."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class FirstStage:
    """Approximate scores of a collection's images with a sentence, and of its captions with an image.

    The query is what attends: words in t2i, regions in i2t; the context is what is attended to. A pair's approximate
    score is the mean over the query's elements of the largest dot product with an element of the context, where each
    query element is replaced by its nearest centroid.

    centroids (K, D): directions of unit length. nearest (ΣQ,): the nearest centroid of each query element in the
    collection, grouped by item; starts (items + 1,): where each item's begin. Items are captions in t2i, images in
    i2t. table (K, contexts): the largest dot product of a centroid with the elements of each context, which are the
    images in t2i, the captions in i2t.
    """

    t2i: bool
    centroids: np.ndarray
    nearest: np.ndarray
    starts: np.ndarray
    table: np.ndarray

    def images(self, words: torch.Tensor, count: int) -> np.ndarray:
        """Indices of the best count images for words (W, D), in ascending order."""
        return self.by_table(words, count) if self.t2i else self.by_centroid(words, count)

    def captions(self, regions: torch.Tensor, count: int) -> np.ndarray:
        """Indices of the best count captions for regions (R, D), in ascending order."""
        return self.by_centroid(regions, count) if self.t2i else self.by_table(regions, count)

    def by_table(self, query: torch.Tensor, count: int) -> np.ndarray:
        """The best contexts for the elements of a query (Q, D): the sum of Q rows of the table."""
        nearest = (query.cpu().numpy() @ self.centroids.T).argmax(1)
        return top(self.table[nearest].sum(0, dtype=np.float32), count)

    def by_centroid(self, context: torch.Tensor, count: int) -> np.ndarray:
        """The best queries of the collection for a context (L, D): each element scores as its centroid does."""
        scores = (self.centroids @ context.cpu().numpy().T).max(1)
        sums = np.add.reduceat(scores[self.nearest], self.starts[:-1])
        return top(sums / np.diff(self.starts), count)


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest count scores (n,), in ascending order."""
    count = min(count, len(scores))
    return np.sort(np.argpartition(-scores, count - 1)[:count]) if count else np.arange(0)
