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
FEWEST_WHOLE = 30  # images that a judgement of whole-image features needs
LEAST_WHOLE = 0.1  # correlation of whole-image features that belong; of 100 images: right 0.27, wrong up to 0.05
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
    """own, other, shuffled: mean correlation with the boxes given, another image's, and the regions in another order.

    wrong: whether the boxes belong to other images or regions; None where that cannot be told. text: in words.
    """

    own: float
    other: float
    shuffled: float
    misses: int
    n_images: int
    wrong: bool | None
    text: str

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
    n_regions = min(features.shape[1], grids.shape[1])  # the whole image may follow as a region without a box
    features, grids = features[:, :n_regions], grids[:, :n_regions]
    alike, overlap = likeness(features), overlaps(grids)
    n = len(features)
    own = (alike.pairs * overlap.pairs).sum(1)
    rolled = [np.roll(overlap.pairs, shift, axis=0) for shift in range(1, min(N_OTHERS, n - 1) + 1)]
    others = np.array([(alike.pairs * pairs).sum(1) for pairs in rolled])
    same = np.array([(overlap.pairs * pairs).sum(1) > SAME_BOXES for pairs in rolled])
    order = np.random.default_rng(0).permutation(n_regions)
    shuffled = (alike.pairs * overlaps(grids[:, order]).pairs).sum(1)

    misses = int((own <= np.where(same, -1, others).max(0)).sum()) if n > 1 else 0
    wrong = misses > MOST_MISSES * n
    reason = ""
    if n < FEWEST_IMAGES:
        reason = f"{n} images are too few"
    elif same.mean() > MOST_SAME:
        reason = "most images have the same boxes"
    elif wrong:
        reason = _why_untold(alike, overlap, features.shape[2])
    means = [float(values.mean()) if values.size else 0.0 for values in (own, others, shuffled)]
    text = f"whether the boxes belong to the features cannot be told: {reason}"
    if not reason:
        text = "regions that overlap look alike: {:.2f} with its boxes, {:.2f} with another image's, {:.2f} shuffled"
        text = text.format(*means) + (f"; in {misses} of {n} images others fit better" if misses else "")
    return Judgement(means[0], means[1], means[2], misses, n, None if reason else wrong, text)


def _why_untold(alike, overlap, img_dim):
    """Why boxes could not fit features of img_dim values even if they belonged together; "" if they could."""
    least_spread = max(LEAST_SPREAD, RANDOM_FACTOR / np.sqrt(img_dim))
    spread = alike.spread.mean()
    if spread < least_spread:
        spread = f"standard deviation {spread:.2f}, expected {least_spread:.2f}"
        return f"no regions are more alike than others ({spread})"
    if overlap.spread.mean() < LEAST_OVERLAP_SPREAD:
        return "all regions overlap alike"
    return ""


def judge_whole(features: np.ndarray, whole: np.ndarray) -> Judgement:
    """Judge whether whole-image features (n, D) belong to features of regions (n, R, D), from a sample of images.

    Images whose regions are alike on average have whole-image features that are alike: over all pairs of images
    the two likenesses correlate. own, other: the correlation in this order and in shifted ones.
    """
    n, img_dim = len(features), features.shape[2]
    alike, whole_alike = (likeness(values[None]) for values in (features.mean(axis=1, dtype=np.float32), whole))
    shifts = [likeness(np.roll(whole, shift, axis=0)[None]).pairs for shift in range(1, min(N_OTHERS, n - 1) + 1)]
    own = float((alike.pairs * whole_alike.pairs).sum())
    others = np.array([0.0, *((alike.pairs * pairs).sum() for pairs in shifts)])
    misses = int((own <= others).sum())
    wrong = misses > 0 or own < LEAST_WHOLE
    reason = ""
    if n < FEWEST_WHOLE:
        reason = f"{n} images are too few"
    elif wrong and min(alike.spread.mean(), whole_alike.spread.mean()) < RANDOM_FACTOR / np.sqrt(img_dim):
        reason = "no images are more alike than others"
    other = float(others.mean())
    text = f"whether these features belong to the regions' cannot be told: {reason}"
    if not reason:
        text = "images whose regions are alike have whole-image features that are alike: "
        text += f"{own:.2f} in this order, {other:.2f} in another"
    return Judgement(own, other, 0.0, misses, n, None if reason else wrong, text)


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
        left = overlap if len(boxes) == len(overlap) else overlap[boxes]
        best, lead = _leads(alike, images, left)
        proved = lead >= LEAST_LEAD
        if not proved.any():
            break
        partner[images[proved]] = boxes[best[proved]]
        images, boxes = images[~proved], np.delete(boxes, best[proved])
    return partner


def _leads(alike, images, overlap):
    """For each of the images, rows of alike: the boxes that fit best, and their lead over the next best.

    The lead is 0 where the score is low or another image has the same best boxes with a higher score.
    """
    n = len(images)
    best, score, second = np.empty(n, dtype=np.int64), np.empty(n), np.zeros(n)
    rival = np.zeros(len(overlap))  # of each boxes, the highest score of an image that they are not the best for
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        scores = alike[images[block]] @ overlap.T
        rows = np.arange(len(scores))
        best[block] = scores.argmax(1)
        score[block] = scores[rows, best[block]]
        scores[rows, best[block]] = 0  # what is left are the rivals; nobody needs to lead over less than 0
        second[block] = scores.max(1)
        np.maximum(rival, scores.max(0), out=rival)
    by_score = np.argsort(-score, kind="stable")
    _, first = np.unique(best[by_score], return_index=True)  # the image that each boxes fit best
    claims = np.ones(n, dtype=bool)
    claims[by_score[first]] = False  # True: others have these boxes for their best, and a higher score
    np.maximum.at(rival, best[claims], score[claims])
    lead = score - np.maximum(second, rival[best])
    return best, np.where(claims | (score < LEAST_SCORE), 0, lead)
