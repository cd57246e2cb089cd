"""ECCV Caption and CxC: the 5,000 test images of MS-COCO ranked with more than five positives an image.

ECCV Caption: Chun et al., ECCV 2022. Crisscrossed Captions (CxC): Parekh et al., EACL 2021. The positives and the
metrics are those of the package eccv_caption.
"""

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cache
from typing import Any

import numpy as np
import torch

from lib.errors import InputError

N_IMAGES, N_CAPTIONS = 5000, 25000
BEST = 64  # candidates of a query that are ranked: none has as many positives
LABELS = {
    "eccv_map_at_r": "ECCV mAP@R",
    "eccv_rprecision": "ECCV R-Precision",
    "eccv_r1": "ECCV R@1",
    "cxc_r1": "CxC R@1",
    "cxc_r5": "CxC R@5",
    "cxc_r10": "CxC R@10",
}


@cache
def package() -> Any:
    """eccv_caption's Metrics. Raises InputError where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it prefers ujson
        try:
            from eccv_caption import Metrics
        except ImportError:
            raise InputError("--eccv: no package eccv_caption, install it with: pip install eccv_caption") from None
    return Metrics()


def testall_ids() -> tuple[np.ndarray, np.ndarray]:
    """MS-COCO's ids of the testall split's images (5000,) and captions (25000,), in SCAN's order."""
    captions = package().coco_ids
    image_of = package().coco_gts["t2i"]
    return np.array([image_of[caption][0] for caption in captions[:: N_CAPTIONS // N_IMAGES].tolist()]), captions


def best_ids(sims: np.ndarray, queries: np.ndarray, candidates: np.ndarray, way: str) -> dict[int, list[int]]:
    """Each query's id → ids of its 64 best candidates, best first; of equal scores a positive comes last."""
    row, column = ({x: i for i, x in enumerate(ids.tolist())} for ids in (queries, candidates))
    positives = {
        (row[query], column[candidate])
        for pairs in (package().eccv_gts, package().cxc_gts)
        for query, candidates_of_query in pairs[way].items()
        for candidate in candidates_of_query
        if candidate in column
    }
    scores = torch.as_tensor(sims, dtype=torch.float32).clone(memory_format=torch.contiguous_format)
    pairs = torch.tensor(list(positives)).unbind(1)
    scores[pairs] = scores[pairs].nextafter(torch.tensor(-torch.inf))
    best = scores.topk(BEST).indices.numpy()
    return dict(zip(queries.tolist(), candidates[best].tolist(), strict=True))


def print_metrics(sims: np.ndarray) -> dict:
    """Print ECCV Caption and CxC metrics of the similarities (5000, 25000) of MS-COCO's testall split, in SCAN's order.

    Returns {"eccv_map_at_r": (i2t, t2i), "eccv_rprecision": …, "eccv_r1": …, "cxc_r1": …, "cxc_r5": …, "cxc_r10": …}
    in percent. A tie counts against the model.
    """
    images, captions = testall_ids()
    ranked = best_ids(sims, images, captions, "i2t"), best_ids(sims.T, captions, images, "t2i")
    names = ("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_recalls")
    with redirect_stderr(io.StringIO()):  # its progress bars
        found = package().compute_all_metrics(*ranked, target_metrics=names, Ks=(1, 5, 10))
    result = {key: (100 * float(found[key]["i2t"]), 100 * float(found[key]["t2i"])) for key in LABELS}
    print("ECCV Caption and CxC: image to text, text to image")
    for key, values in result.items():
        print("{}: {:.1f} {:.1f}".format(LABELS[key], *values))
    return result


def check_split(prefix: str, n_images: int, n_captions: int, ids: Sequence[str] | None) -> None:
    """Raise InputError where a split is not MS-COCO's testall.

    prefix: folder and name of the split. ids: one for each image or caption, MS-COCO's ids of images or captions; None
    where the split has none. Row numbers are no ids and are not compared.
    """
    if (n_images, n_captions) != (N_IMAGES, N_CAPTIONS):
        raise InputError(
            f"{prefix}: {n_images} images and {n_captions} captions, --eccv expects MS-COCO's testall split "
            f"with {N_IMAGES} and {N_CAPTIONS}"
        )
    images, captions = (x.astype(str) for x in testall_ids())
    found = np.array(images if ids is None else ids)
    expected = images.repeat(len(found) // N_IMAGES)
    wrong = np.flatnonzero(found != expected)
    if len(wrong) and not any(np.array_equal(found, x) for x in (captions, np.arange(len(found)).astype(str))):
        raise InputError(
            f"{prefix}_ids.txt, line {wrong[0] + 1}: found {found[wrong[0]]}, expected {expected[wrong[0]]} "
            "(--eccv needs the images of testall in SCAN's order)"
        )
