"""The regions of one image as feature files hold them, brought to the same number in every image."""

from typing import NamedTuple

import numpy as np

from lib.errors import InputError

REGION_CHOICES = ("fixed", "best", "all")
MOST_SHARE = 1.5  # some detectors overshoot 1 a little


class Regions(NamedTuple):
    """The regions of an image.

    boxes (n, 4): x1, y1, x2, y2 in the units of size; None where there are none. features (n, D).
    size: (height, width), (1, 1) for boxes from 0 to 1; None where there are no boxes.
    scores (n,): how sure the detector was of each; None where that is not known.
    """

    boxes: np.ndarray | None
    features: np.ndarray
    size: tuple[float, float] | None
    scores: np.ndarray | None = None


def are_shares(boxes: np.ndarray) -> bool:
    """Whether the corners of boxes (…, 4) are shares of their images' sides, from 0 to 1; else they are pixels."""
    return bool(boxes.max(initial=0) <= MOST_SHARE)


def fit(regions: Regions, n_regions: int, choice: str) -> Regions:
    """Bring an image to n_regions regions, without their scores.

    choice: "fixed" takes no other number; "best" keeps the n_regions best (by score where there is one, else the
    first) and pads with zero features and boxes without area; "all" pads alike and drops none.
    Raises InputError for a number that it does not take.
    """
    n = len(regions.features)
    if (choice == "fixed" and n != n_regions) or (choice == "all" and n > n_regions):
        raise InputError(f"{n} regions, expected {n_regions} (--regions {choice})")
    kept = np.arange(min(n, n_regions))
    if n > n_regions and regions.scores is not None:
        kept = np.argsort(-regions.scores, kind="stable")[:n_regions]
    padding = ((0, n_regions - len(kept)), (0, 0))
    boxes = None if regions.boxes is None else np.pad(regions.boxes[kept], padding)
    return Regions(boxes, np.pad(regions.features[kept], padding), regions.size)
