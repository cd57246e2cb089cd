"""Checks of features, position grids and whole-image features, each and against each other."""

import os

import numpy as np

from lib.constants import N_CELLS, N_SLOTS
from lib.datasets.checks import bad_cells, bad_weights
from lib.datasets.region_match import Judgement, judge, judge_whole
from scripts.check.report import Report, blocks, sample_rows

SAMPLE = 100  # images whose boxes and whole-image features are compared with their features
OFF_SUM = "weights of a region that do not sum to 1"


def check_features(array: np.memmap, report: Report) -> np.ndarray:
    """NaN or infinite values, zero rows. Returns which rows equal the row before: (n - 1,) bool."""
    low, high, bad, zero, last = np.inf, -np.inf, [], 0, None
    same = np.zeros(len(array), dtype=bool)
    for start, rows in blocks(array):
        flat = rows.reshape(len(rows), -1)
        finite = np.isfinite(flat).all(1)
        bad += (start + np.flatnonzero(~finite)).tolist()
        if finite.any():
            low, high = min(low, flat[finite].min()), max(high, flat[finite].max())
        zero += int((rows == 0).all(-1).sum())
        before = np.concatenate([flat[:1] if last is None else last, flat[:-1]])
        same[start : start + len(rows)] = (flat == before).all(1)
        last = flat[-1:].copy()
    report.row(os.path.basename(array.filename), array.shape, array.dtype, f"{low:.4g} to {high:.4g}")
    if bad:
        report.faults.append(f"{array.filename}: NaN or infinite features in {len(bad)} images, the first is {bad[0]}")
    rows = int(np.prod(array.shape[:-1]))
    if zero == rows:
        report.faults.append(f"{array.filename}: all of the {rows} rows are zero, expected features")
    elif zero:
        report.notes.append(f"{array.filename}: {zero} of {rows} rows are all zero (padding)")
    return same[1:]


def check_grids(array: np.memmap, report: Report) -> None:
    """Cell indices, weights and their sums of position grids."""
    bad = {f"cell indices outside 0 to {N_CELLS}": [], "weights outside 0 to 1": [], OFF_SUM: []}
    empty, no_cell = 0, 0
    for start, grids in blocks(array):
        cells, total = grids[..., :N_SLOTS], grids[..., N_SLOTS : 2 * N_SLOTS].sum(-1)
        wrong = (
            bad_cells(grids).any((1, 2)),
            bad_weights(grids).any((1, 2)),
            ((np.abs(total - 1) > 1e-3) & (total != 0)).any(1),
        )
        for name, images in zip(bad, wrong, strict=True):
            bad[name] += (start + np.flatnonzero(images)).tolist()
        empty += int((total == 0).sum())
        no_cell += int((cells == N_CELLS).sum())
    regions = int(np.prod(array.shape[:2]))
    report.row(
        os.path.basename(array.filename),
        array.shape,
        array.dtype,
        f"{empty / regions:.1%} regions without area, {no_cell / regions / N_SLOTS:.1%} slots without a cell",
    )
    for name, images in bad.items():
        if images:
            lines = report.notes if name == OFF_SUM else report.faults
            lines.append(f"{array.filename}: {name} in {len(images)} images, the first is {images[0]}")


def compare_boxes(images: np.memmap, boxes: np.memmap, n_images: int, report: Report) -> None:
    """Whether the boxes of a sample of images belong to their features."""
    judgement = judge(sample_rows(images, n_images, SAMPLE), sample_rows(boxes, n_images, SAMPLE))
    wrong = f"{boxes.filename}: of other images or regions than {images.filename}"
    _tell(judgement, boxes, f"{wrong}: {judgement}; scripts/align.py puts them in order", report)


def compare_whole(images: np.memmap, whole: np.memmap, report: Report) -> None:
    """Whether the whole-image features of a sample of images belong to their regions'."""
    judgement = judge_whole(sample_rows(images, len(images), SAMPLE), sample_rows(whole, len(images), SAMPLE))
    _tell(judgement, whole, f"{whole.filename}: of other images than {images.filename}: {judgement}", report)


def _tell(judgement: Judgement, array: np.memmap, fault: str, report: Report) -> None:
    if judgement.wrong:
        report.faults.append(fault)
    elif judgement.wrong is None:
        report.notes.append(f"{array.filename}: {judgement}")
    else:
        report.row("", f"{judgement.n_images} images", "", str(judgement))
