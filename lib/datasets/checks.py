"""Checks of features and position grids that training, evaluation and the data tools share."""

from collections.abc import Sequence

import numpy as np

from lib.constants import N_CELLS, N_SLOTS
from lib.errors import InputError

ROWS = 1024  # that are checked at once
MANY_EQUAL = 0.1  # share of images that equal the one before, from which they are repeats of it


def check_grids(path: str, grids: np.ndarray, region_counts: Sequence[int]) -> None:
    """Raise InputError where grids, of the file at path, are not (n, R, 30 | 31) with cells and weights in range.

    region_counts: what R may be.
    """
    if grids.ndim != 3 or grids.shape[1] not in region_counts or grids.shape[2] not in (2 * N_SLOTS, 2 * N_SLOTS + 1):
        regions = " or ".join(map(str, region_counts))
        raise InputError(f"{path}: found {grids.shape}, expected (images, {regions}, 30 or 31)")
    for start in range(0, len(grids), ROWS):
        block = np.asarray(grids[start : start + ROWS])
        cells, weights = block[..., :N_SLOTS], block[..., N_SLOTS : 2 * N_SLOTS]
        with np.errstate(invalid="ignore"):  # NaN, which the comparison finds
            cells_fit = (cells >= 0) & (cells <= N_CELLS) & (cells == np.floor(cells))
        weights_fit = (weights >= 0) & (weights <= 1.001)  # the tolerance is for float16
        checks = ("cell index", cells, cells_fit, N_CELLS), ("weight", weights, weights_fit, 1)
        for name, values, fit, largest in checks:
            if not fit.all():
                image, region, slot = np.argwhere(~fit)[0]
                where = f"{path}, image {start + image}, region {region}"
                raise InputError(f"{where}: {name} {values[image, region, slot]}, expected 0 to {largest}")


def rows_per_image(path: str, images: np.ndarray) -> int:
    """How many consecutive rows of images (n, R, D), of the file at path, each image takes: often one for each caption.

    The greatest common divisor of the lengths of the runs of equal rows: two equal images side by side lengthen one
    run only. Raises InputError where more than a tenth of the images then equal the one before: images are repeated,
    but not equally often.
    """
    starts = np.flatnonzero([True, *~same_as_previous(images)])
    lengths = np.diff([*starts, len(images)])
    k = int(np.gcd.reduce(lengths))
    if (lengths // k - 1).sum() > max(1, MANY_EQUAL * (len(images) // k)):
        first = int((lengths != lengths[0]).argmax())
        shown = [f"{starts[i]} to {starts[i] + lengths[i] - 1}" for i in (first - 1, first)]
        raise InputError(
            f"{path}: rows {shown[0]} are one image and rows {shown[1]} another, {lengths[first - 1]} and "
            f"{lengths[first]} times the same: expected each image once, or all equally often"
        )
    return k


def same_as_previous(images: np.ndarray) -> np.ndarray:
    """Which rows 1…n-1 of images (n, R, D) equal the row before: (n - 1,) bool.

    A few values of each row tell most rows apart. Rows that agree there are compared whole: a sample of them, and all
    as soon as the sample shows that the few values are not enough.
    """
    sample = np.asarray(images[:, :: max(1, images.shape[1] // 8), :: max(1, images.shape[2] // 8)])
    same = (sample[1:] == sample[:-1]).all(axis=(1, 2))
    alike = np.flatnonzero(same)
    for rows in (alike[:: len(alike) // 256 + 1], alike):
        same[rows] = [np.array_equal(images[row], images[row + 1]) for row in rows]
        if same[rows].all():
            break
    return same
