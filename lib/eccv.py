"""ECCV Caption and CxC: the 5,000 test images of MS-COCO ranked with more than five right captions an image.

ECCV Caption: Chun et al., ECCV 2022. Crisscrossed Captions (CxC): Parekh et al., EACL 2021. The right pairs come from
the package eccv_caption, which holds them as JSON; caption k of SCAN's testall split is its coco_test_ids.npy[k].
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from lib.errors import InputError

N_IMAGES, N_CAPTIONS = 5000, 25000
CXC_RECALL_AT = (1, 5, 10)
LABELS = {
    "eccv_map_at_r": "ECCV mAP@R",
    "eccv_rprecision": "ECCV R-Precision",
    "eccv_r1": "ECCV R@1",
    "cxc_r1": "CxC R@1",
    "cxc_r5": "CxC R@5",
    "cxc_r10": "CxC R@10",
}


def data_file(name: str) -> str:
    """Path of a data file of the package eccv_caption. Raises InputError where that is not installed."""
    package = importlib.util.find_spec("eccv_caption")
    if package is None or package.origin is None:
        raise InputError("--eccv: no package eccv_caption, install it with: pip install eccv_caption")
    return os.path.join(os.path.dirname(package.origin), "data", name)


def read_json(name: str) -> Any:
    with open(data_file(name), encoding="utf-8") as file:
        return json.load(file)


@cache
def testall_ids() -> tuple[np.ndarray, np.ndarray]:
    """MS-COCO's ids of the testall split's images (5000,) and captions (25000,), in SCAN's order."""
    captions = np.load(data_file("coco_test_ids.npy"), allow_pickle=False)  # noqa: TID251
    image_of = read_json("original_caption_to_image.json")
    images = np.array([int(image_of[str(caption)][0]) for caption in captions[:: N_CAPTIONS // N_IMAGES]])
    return images, captions


def right_pairs(name: str) -> tuple[dict, dict]:
    """Right pairs of a ground truth, eccv or cxc, as rows and columns of testall's similarities.

    Returns {image: captions} and {caption: images}; -1 stands for a right one outside the split, which counts as one
    that is never found.
    """
    images, captions = ({int(x): i for i, x in enumerate(ids)} for ids in testall_ids())

    def as_indices(found, queries, candidates):
        pairs = {queries[int(query)]: {candidates.get(int(x), -1) for x in right} for query, right in found.items()}
        return {query: np.array(sorted(right)) for query, right in pairs.items()}

    return (
        as_indices(read_json(f"{name}_image_to_caption.json"), images, captions),
        as_indices(read_json(f"{name}_caption_to_image.json"), captions, images),
    )


def right_ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Ranks from 1, in ascending order, of a query's right candidates; infinite for one outside the split.

    scores (n,) of all candidates; right (R,): indices of the right ones, -1 for one outside. A wrong candidate with
    the same score comes first.
    """
    inside = scores[right[right >= 0]]
    inside = np.sort(inside)[::-1]
    ahead = (scores >= inside[:, None]).sum(1) - (inside >= inside[:, None]).sum(1)  # wrong ones
    return np.pad(ahead + np.arange(1.0, len(inside) + 1), (0, len(right) - len(inside)), constant_values=np.inf)


def precisions(ranks: np.ndarray) -> tuple[float, float, float]:
    """(mAP@R, R-Precision, R@1) of one query from the ranks (R,) of its right candidates, as in ECCV Caption.

    mAP@R = (1 / R) · Σ over right candidates at a rank of R or better of (right ones up to that rank) / rank.
    """
    n = len(ranks)
    found = ranks[ranks <= n]
    return float((np.arange(1, len(found) + 1) / found).sum() / n), len(found) / n, float(ranks[0] == 1)


def metrics(sims: np.ndarray) -> dict:
    """ECCV Caption and CxC metrics of the similarities (5000, 25000) of MS-COCO's testall split, in SCAN's order.

    Returns {"eccv_map_at_r": (i2t, t2i), "eccv_rprecision": …, "eccv_r1": …, "cxc_r1": …, "cxc_r5": …, "cxc_r10": …}
    in percent. A tie counts against the model. Raises InputError for another shape.
    """
    sims = np.asarray(sims)
    if sims.shape != (N_IMAGES, N_CAPTIONS):
        raise InputError(f"--eccv: similarities {sims.shape}, expected those of testall, ({N_IMAGES}, {N_CAPTIONS})")
    found = {}
    for name, summarise, keys in (
        ("eccv", precisions, ("eccv_map_at_r", "eccv_rprecision", "eccv_r1")),
        ("cxc", lambda ranks: [ranks[0] <= k for k in CXC_RECALL_AT], [f"cxc_r{k}" for k in CXC_RECALL_AT]),
    ):
        both_ways = zip((sims, np.ascontiguousarray(sims.T)), right_pairs(name), strict=True)
        means = [
            np.mean([summarise(right_ranks(scores[query], right)) for query, right in pairs.items()], axis=0)
            for scores, pairs in both_ways
        ]
        found |= {key: (100 * float(i2t), 100 * float(t2i)) for key, i2t, t2i in zip(keys, *means, strict=True)}
    return found


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
    images, captions = (np.char.mod("%d", x) for x in testall_ids())
    if len(ids) not in (N_IMAGES, N_CAPTIONS):
        raise InputError(f"{prefix}_ids.txt: {len(ids)} ids, expected {N_IMAGES} or {N_CAPTIONS}")
    images = images.repeat(len(ids) // N_IMAGES)
    wrong = np.array(ids) != images
    if wrong.any() and not np.array_equal(ids, captions):
        row = int(wrong.argmax())
        raise InputError(
            f"{prefix}_ids.txt, line {row + 1}: found {ids[row]}, expected {images[row]} "
            "(--eccv needs the images of testall in SCAN's order)"
        )
