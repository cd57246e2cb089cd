"""Do these boxes belong to these features? Regions of an image that overlap look alike.

Of each image, over all pairs of its regions: the overlap of their position grids, and the likeness of their
features. With its boxes the two correlate (0.68 on photographs with a detector's boxes, 0.00 with the boxes of another
image or with the regions in another order), so boxes in a wrong order are noticed, and found their images again.
Regions without area, and padded ones (features all 0), do not count.
"""

import logging
from typing import Any, NamedTuple

import numpy as np

from lib import distributed
from lib.constants import N_CELLS, N_SLOTS

log = logging.getLogger(__name__)

FEWEST_IMAGES = 8  # that a judgement needs
FIRST_IMAGES = 32  # of a data set: under a second
N_OTHERS = 10  # images whose boxes are tried on each image
LEAST_SPREAD = 0.15  # standard deviation of the likeness; measured: detector's boxes 0.48, windows 0.22
RANDOM_FACTOR = 2  # random features of D values have 1 / √D
LEAST_OVERLAP_SPREAD = 0.05  # measured: detector's boxes 0.22
SAME_BOXES = 0.9  # correlation of the overlaps in two images; measured: detector's boxes 0.00, windows 1
MOST_SAME = 0.5  # share of images with the same boxes
MOST_MISSES = 0.25  # share of images that another image's boxes fit better; measured: right 0, wrong 0.9
LEAST_SCORE = 0.2  # of a pair found by match; measured: right ones 0.27 and more
LEAST_LEAD = 0.1  # over the next best; measured: wrong ones have less in 997 of 1,000 cases
BLOCK = 128  # images scored at once: 58 MB with the boxes of 113,287


class Signature(NamedTuple):
    """A value for each pair of regions, of n images, as unit vectors of mean 0.

    pairs: (n, R (R - 1) / 2) float32; two images' correlation is their product. spread: (n,) standard deviations.
    """

    pairs: np.ndarray
    spread: np.ndarray


class Judgement(NamedTuple):
    """wrong: whether the boxes belong to other images or regions; None where that cannot be told. text: in words.

    n_images: how many were looked at.
    """

    wrong: bool | None
    text: str
    n_images: int

    def __str__(self):
        return self.text


def overlaps(grids: np.ndarray) -> Signature:
    """How much regions overlap: the cosine of the area weights in all cells. grids: (n, R, 30 | 31)."""
    cells = np.clip(np.nan_to_num(grids[..., :N_SLOTS]), 0, N_CELLS).astype(np.int64)
    area = np.zeros((*cells.shape[:2], N_CELLS + 1), dtype=np.float32)
    np.put_along_axis(area, cells, np.nan_to_num(grids[..., N_SLOTS : 2 * N_SLOTS]).astype(np.float32), axis=2)
    return _signature(area[..., :N_CELLS])


def likeness(features: np.ndarray) -> Signature:
    """How alike regions are: the cosine of their features (n, R, D) less the image's mean."""
    features = np.nan_to_num(np.asarray(features, dtype=np.float32), posinf=0, neginf=0)
    there = features.any(axis=2, keepdims=True)
    mean = features.sum(1, keepdims=True) / np.maximum(there.sum(1, keepdims=True), 1)
    return _signature((features - mean) * there)


def _signature(vectors):
    """Cosines of all pairs of vectors (n, R, D), standardised in each image; a pair with a zero vector counts not."""
    length = np.linalg.norm(vectors, axis=2, keepdims=True)
    there = length[..., 0] > 0
    vectors = vectors / np.where(length > 0, length, 1)
    first, second = np.triu_indices(vectors.shape[1], 1)
    pairs = (vectors @ vectors.transpose(0, 2, 1))[:, first, second]
    valid = there[:, first] & there[:, second]
    count = np.maximum(valid.sum(1, keepdims=True), 1)
    pairs = (pairs - (pairs * valid).sum(1, keepdims=True) / count) * valid
    norm = np.linalg.norm(pairs, axis=1, keepdims=True)
    pairs = (pairs / np.where(norm > 1e-6, norm, 1)).astype(np.float32)
    return Signature(pairs, (norm / np.sqrt(count))[:, 0])


def judge(features: np.ndarray, grids: np.ndarray) -> Judgement:
    """Judge whether grids (n, R, 30 | 31) belong to features (n, R, D), from a sample of images.

    The boxes are wrong if in more than MOST_MISSES of the images another one's fit as well or better, and if
    likeness and overlaps vary so that right boxes would have shown.
    """
    n, n_regions = len(features), min(features.shape[1], grids.shape[1])  # the whole image may follow without a box
    if n < FEWEST_IMAGES:
        return _untold(f"{n} images are too few", n)
    alike, overlap = likeness(features[:, :n_regions]), overlaps(grids[:, :n_regions])
    own = (alike.pairs * overlap.pairs).sum(1)
    rolled = [np.roll(overlap.pairs, shift, axis=0) for shift in range(1, min(N_OTHERS, n - 1) + 1)]
    others = np.array([(alike.pairs * pairs).sum(1) for pairs in rolled])
    same = np.array([(overlap.pairs * pairs).sum(1) > SAME_BOXES for pairs in rolled])
    misses = int((own <= np.where(same, -1, others).max(0)).sum())
    wrong = misses > MOST_MISSES * n
    if same.mean() > MOST_SAME:
        return _untold("most images have the same boxes", n)
    if wrong and alike.spread.mean() < max(LEAST_SPREAD, RANDOM_FACTOR / np.sqrt(features.shape[2])):
        return _untold("no regions are more alike than others", n)
    if wrong and overlap.spread.mean() < LEAST_OVERLAP_SPREAD:
        return _untold("all regions overlap alike", n)
    text = f"regions that overlap look alike: {own.mean():.2f} with its boxes, {others.mean():.2f} with another image's"
    return Judgement(wrong, text + (f"; in {misses} of {n} images others fit better" if misses else ""), n)


def _untold(reason, n):
    return Judgement(None, f"whether the boxes belong to the features cannot be told: {reason}", n)


def warn_of_boxes(dataset: Any) -> None:
    """Log a warning where the boxes of a data.PrecompDataset's first images do not belong to their features."""
    if distributed.rank() > 0 or not getattr(dataset, "need_boxes", False):
        return
    features, *_, grids = dataset.features(range(min(FIRST_IMAGES, dataset.n_images)))
    judgement = judge(features.float().numpy(), grids.numpy())
    if judgement.wrong:
        message = "%s_boxes.npy: of other images or regions than the features: %s. scripts/align.py orders them."
        log.warning(message, dataset.prefix, judgement)


def match(alike: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Find the boxes of each image: row of overlap (m, P) that belongs to each row of alike (n, P), -1 for none.

    alike, overlap: the pairs of likeness and overlaps. A pair is proved where its correlation is at least LEAST_SCORE
    and leads by LEAST_LEAD over that of the image with any other boxes and of the boxes with any other image.
    What is proved is taken out, and the rest compared again, until nothing more is proved.
    """
    partner = np.full(len(alike), -1)
    images, boxes = np.arange(len(alike)), np.arange(len(overlap))
    while len(images) and len(boxes):
        best, proved = _prove(alike, images, overlap if len(boxes) == len(overlap) else overlap[boxes])
        if not proved.any():
            break
        partner[images[proved]] = boxes[best[proved]]
        images, boxes = images[~proved], np.delete(boxes, best[proved])
    return partner


def _prove(alike, images, overlap):
    """For each of the images, rows of alike: the boxes that fit best, and whether that is proved."""
    n = len(images)
    best, score, second = np.empty(n, dtype=np.int64), np.empty(n), np.empty(n)
    highest, rival = np.zeros((2, len(overlap)))  # of each boxes, the two highest scores of an image
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        scores = alike[images[block]] @ overlap.T
        best[block], score[block], second[block] = _two_highest(scores, 1)
        _, here, next_here = _two_highest(scores, 0)
        rival = np.maximum(np.minimum(highest, here), np.maximum(rival, next_here))
        highest = np.maximum(highest, here)
    lead = score - np.maximum(second, rival[best])
    return best, (score >= LEAST_SCORE) & (score == highest[best]) & (lead >= LEAST_LEAD)


def _two_highest(scores, axis):
    """The index of the highest score along an axis, that score, and the next, at least 0."""
    best = scores.argmax(axis, keepdims=True)
    highest = np.take_along_axis(scores, best, axis)
    np.put_along_axis(scores, best, 0, axis)
    second = scores.max(axis)
    np.put_along_axis(scores, best, highest, axis)
    return best.squeeze(axis), highest.squeeze(axis), second
