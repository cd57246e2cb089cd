"""ECCV Caption and CxC: the 5,000 test images of MS-COCO ranked with more than five right captions an image.

ECCV Caption: Chun et al., ECCV 2022. Crisscrossed Captions (CxC): Parekh et al., EACL 2021. The right pairs and the
metrics are those of the package eccv_caption.
"""

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cache
from typing import Any

import numpy as np

from lib.errors import InputError

N_IMAGES, N_CAPTIONS = 5000, 25000
BEST = 64  # candidates of a query that are ranked: none has as many right ones
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
    """Each query's id → ids of its best candidates, best first; of equal scores a right one comes last."""
    column = {int(candidate): i for i, candidate in enumerate(candidates)}
    found = {}
    for query, row in zip(queries.tolist(), sims, strict=True):
        scores = row.astype(np.float32)
        ids = {x for pairs in (package().eccv_gts, package().cxc_gts) for x in pairs[way].get(query, ())}
        right = [column[x] for x in ids if x in column]
        scores[right] = np.nextafter(scores[right], -np.inf, dtype=np.float32)
        best = np.argpartition(scores, -BEST)[-BEST:]
        found[query] = candidates[best[np.argsort(-scores[best], kind="stable")]].tolist()
    return found


def metrics(sims: np.ndarray) -> dict:
    """ECCV Caption and CxC metrics of the similarities (5000, 25000) of MS-COCO's testall split, in SCAN's order.

    Returns {"eccv_map_at_r": (i2t, t2i), "eccv_rprecision": …, "eccv_r1": …, "cxc_r1": …, "cxc_r5": …, "cxc_r10": …}
    in percent. A tie counts against the model. Raises InputError for another shape.
    """
    sims = np.asarray(sims)
    if sims.shape != (N_IMAGES, N_CAPTIONS):
        raise InputError(f"--eccv: similarities {sims.shape}, expected those of testall, ({N_IMAGES}, {N_CAPTIONS})")
    images, captions = testall_ids()
    ranked = best_ids(sims, images, captions, "i2t"), best_ids(sims.T, captions, images, "t2i")
    names = ("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_recalls")
    with redirect_stderr(io.StringIO()):  # its progress bars
        found = package().compute_all_metrics(*ranked, target_metrics=names, Ks=(1, 5, 10))
    return {key: (100 * float(found[key]["i2t"]), 100 * float(found[key]["t2i"])) for key in LABELS}


def print_metrics(sims: np.ndarray) -> dict:
    """Print and return the metrics of similarities (5000, 25000)."""
    found = metrics(sims)
    print("ECCV Caption and CxC: image to text, text to image")
    for key, (i2t, t2i) in found.items():
        print(f"{LABELS[key]}: {i2t:.1f} {t2i:.1f}")
    return found


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
    if ids is None or list(ids) == [str(row) for row in range(len(ids))]:
        return
    if len(ids) not in (N_IMAGES, N_CAPTIONS):
        raise InputError(f"{prefix}_ids.txt: {len(ids)} ids, expected {N_IMAGES} or {N_CAPTIONS}")
    images, captions = (np.char.mod("%d", x) for x in testall_ids())
    images = images.repeat(len(ids) // N_IMAGES)
    wrong = np.flatnonzero(np.array(ids) != images)
    if len(wrong) and not np.array_equal(ids, captions):
        row = int(wrong[0])
        raise InputError(
            f"{prefix}_ids.txt, line {row + 1}: found {ids[row]}, expected {images[row]} "
            "(--eccv needs the images of testall in SCAN's order)"
        )
