"""Checks of features, position grids and whole-image features, each and against each other."""

import os
from typing import Any

import numpy as np

from lib.constants import N_CELLS, N_SLOTS
from lib.datasets.region_match import Judgement, judge, judge_whole
from lib.files import open_npy
from scripts.check.report import Report, blocks, sample_rows

SAMPLE = 100  # images whose boxes and whole-image features are compared with their features


def check_features(path: str, report: Report) -> None:
    """NaN or infinite values, and rows that are all zero, of a file of features, where there is one."""
    array = report.attempt(open_npy, path) if os.path.isfile(path) else None
    if array is None or 0 in (array.shape or (0,)):
        return  # opening the data set names what is wrong
    low, high, bad, zero = np.inf, -np.inf, [], 0
    for start, rows in blocks(array):
        finite = np.isfinite(rows.reshape(len(rows), -1)).all(1)
        bad += (start + np.flatnonzero(~finite)).tolist()
        if finite.any():
            low, high = min(low, rows[finite].min()), max(high, rows[finite].max())
        zero += int((rows == 0).all(-1).sum())
    report.row(os.path.basename(path), array.shape, array.dtype, f"{low:.4g} to {high:.4g}")
    if bad:
        report.faults.append(f"{path}: NaN or infinite features in {len(bad)} images, the first is {bad[0]}")
    rows = int(np.prod(array.shape[:-1]))
    if zero == rows:
        report.faults.append(f"{path}: all of the {rows} rows are zero, expected features")
    elif zero:
        report.notes.append(f"{path}: {zero} of {rows} rows are all zero (padding)")


def describe_grids(array: np.ndarray, report: Report) -> None:
    """How many regions and slots of position grids are empty, and where weights do not sum to 1."""
    off_sum, empty, no_cell = [], 0, 0
    for start, grids in blocks(array):
        total = grids[..., N_SLOTS : 2 * N_SLOTS].sum(-1)
        off_sum += (start + np.flatnonzero(((np.abs(total - 1) > 1e-3) & (total != 0)).any(1))).tolist()
        empty += int((total == 0).sum())
        no_cell += int((grids[..., :N_SLOTS] == N_CELLS).sum())
    regions = int(np.prod(array.shape[:2]))
    shares = f"{empty / regions:.1%} regions without area, {no_cell / regions / N_SLOTS:.1%} slots without a cell"
    report.row(os.path.basename(array.filename), array.shape, array.dtype, shares)
    if off_sum:
        what = f"weights of a region that do not sum to 1 in {len(off_sum)} images, the first is {off_sum[0]}"
        report.notes.append(f"{array.filename}: {what}")


def compare_boxes(dataset: Any, report: Report) -> None:
    """Whether the boxes of a sample of a data set's images belong to their features."""
    judgement = judge(*(sample_rows(array, dataset.n_images, SAMPLE) for array in (dataset.images, dataset.boxes)))
    wrong = f"of other images or regions than {dataset.prefix}_ims.npy: {judgement}"
    _tell(judgement, dataset.prefix + "_boxes.npy", wrong + "; scripts/align.py puts them in order", report)


def check_whole(path: str, images: np.ndarray, report: Report) -> None:
    """Whole-image features, and whether those of a sample of images belong to their regions', images."""
    check_features(path, report)
    whole = report.attempt(open_npy, path)
    if whole is None:
        return
    if whole.shape != (len(images), images.shape[2]):
        report.faults.append(f"{path}: found {whole.shape}, expected ({len(images)}, {images.shape[2]})")
        return
    judgement = judge_whole(*(sample_rows(array, len(images), SAMPLE) for array in (images, whole)))
    _tell(judgement, path, f"of other images than their regions: {judgement}", report)


def _tell(judgement: Judgement, path: str, wrong: str, report: Report) -> None:
    if judgement.wrong:
        report.faults.append(f"{path}: {wrong}")
    elif judgement.wrong is None:
        report.notes.append(f"{path}: {judgement}")
    else:
        report.row("", f"{judgement.n_images} images", "", str(judgement))
