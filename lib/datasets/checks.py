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


def rows_per_image(same: np.ndarray) -> int:
    """How many consecutive rows each image takes, from which rows equal the row before (n - 1,).

    The greatest common divisor of the lengths of the runs of equal rows: two equal images side by side lengthen one
    run only.
    """
    starts = np.flatnonzero(~np.asarray(same, dtype=bool)) + 1
    return int(np.gcd.reduce(np.diff([0, *starts, len(same) + 1])))


def unequal_repeats(same: np.ndarray) -> str | None:
    """A sentence that names rows where features repeat their images, but not equally often; else None.

    same: which rows equal the row before (n - 1,). Where more than a tenth of what rows_per_image takes for images
    equal the image before, the rows are repeats, one for each caption of an image. Fewer, or one, are equal images.
    """
    k, n = rows_per_image(same), len(same) + 1
    starts = np.flatnonzero(np.concatenate([[True], ~np.asarray(same, dtype=bool)]))
    lengths = np.diff([*starts, n])
    if (lengths // k - 1).sum() <= max(1, MANY_EQUAL * (n // k)):
        return None
    first = int((lengths != lengths[0]).argmax())
    shown = [f"{starts[i]} to {starts[i] + lengths[i] - 1}" for i in (first - 1, first)]
    return (
        f"rows {shown[0]} are one image and rows {shown[1]} another, {lengths[first - 1]} and {lengths[first]} times "
        "the same: expected each image once, or all equally often"
    )
