"""What an evaluation prints: SCAN's lines, intervals; and whether several models score the same split."""

import logging
from typing import Any

import numpy as np

from lib.eccv import check_split
from lib.errors import InputError, brief
from lib.intervals import RECALL_AT, group_hits, print_summary

log = logging.getLogger(__name__)

COCO_FOLD = 1000  # images of each of the five folds of MS-COCO's published 1K results


def print_result(result: dict) -> None:
    """Print evalrank's result in SCAN's lines: each fold, where there are several, then the recalls.

    Warns where recalls are not what they are taken for: of few candidates, or of folds other than MS-COCO's.
    """
    print("Images: {n_images}, Captions: {n_captions}".format(**result))
    n_folds = len(result.get("folds", [0]))
    per_fold = min(result["n_images"], result["n_captions"]) // n_folds
    if n_folds > 1:
        print(f"{n_folds} folds of {result['n_images'] // n_folds} images")
        if result["n_images"] != n_folds * COCO_FOLD:
            log.warning("--fold5: %d images a fold, published 1K results have 1,000", result["n_images"] // n_folds)
    if per_fold <= max(RECALL_AT):
        log.warning("only %d images or captions are ranked: R@10 of so few says nothing", per_fold)
    for fold in result.get("folds", ()):
        print("Image to text: {:.1f}, {:.1f}, {:.1f}, {:.1f}, {:.1f}".format(*fold["i2t"]))
        print("Text to image: {:.1f}, {:.1f}, {:.1f}, {:.1f}, {:.1f}".format(*fold["t2i"]))
        print("rsum: {rsum:.1f} ar: {ar:.1f} ari: {ari:.1f}".format(**fold))
    if "folds" in result:
        print("-----------------------------------\nMean metrics: ")
    print("rsum: {rsum:.1f}\nAverage i2t Recall: {ar:.1f}".format(**result))
    print("Image to text: {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*result["i2t"]))
    print("Average t2i Recall: {ari:.1f}".format(**result))
    print("Text to image: {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*result["t2i"]))


def compare(ranks: list, other_ranks: list | None) -> dict:
    """Print the intervals of ranks and, where there are other_ranks, theirs and the paired difference.

    Returns {"intervals", "versus", "difference"}, the last two with other_ranks only.
    """
    hits = all_hits(ranks)
    found = {"intervals": print_summary("95 % intervals, bootstrap over images", hits)}
    if other_ranks is not None:
        other_hits = all_hits(other_ranks)
        found["versus"] = print_summary("The other model", other_hits)
        found["difference"] = print_summary("Paired difference, first minus other", hits - other_hits, signed=True)
    return found


def all_hits(ranks: list) -> np.ndarray:
    """group_hits of each fold's ranks as rank_folds returns them, one below the other."""
    return np.concatenate([group_hits(fold["rt"][0], fold["rti"][0]) for fold in ranks])


def check_same_split(path: Any, dataset: Any, other: Any, eccv: bool) -> None:
    """Raise InputError, naming a model's path, where its data set has other images or captions than the first model's,
    or in another order; with eccv also where it is not MS-COCO's testall."""
    if eccv:
        check_split(dataset.prefix, dataset.n_images, len(dataset.captions), dataset.read_id_lines())
    counts, others = ((x.n_images, len(x.captions)) for x in (dataset, other))
    if counts != others:
        raise InputError(
            f"{path}: ranks {counts[0]} images and {counts[1]} captions, the first model {others[0]} and {others[1]}"
        )
    for kind, rows, other_rows in (
        ("caption", dataset.captions, other.captions),
        ("id", dataset.read_ids() or [], other.read_ids() or []),
    ):
        differ = [i for i, (x, y) in enumerate(zip(rows, other_rows, strict=False)) if x != y]
        if differ:
            raise InputError(
                f"{path}: {kind} {differ[0]} of {dataset.prefix} is {brief(rows[differ[0]])}, that of "
                f"{other.prefix} {brief(other_rows[differ[0]])}"
            )
