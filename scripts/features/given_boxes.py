"""Boxes that some detector has found already: an .npz of ids and boxes, or COCO JSON."""

import hashlib
import os
import zipfile

import numpy as np

from lib.constants import N_REGIONS
from lib.datasets.boxes import BOX_NAMES, SIZE_NAMES
from lib.datasets.ids import canonical_id
from lib.datasets.json_files import json_items
from lib.errors import InputError, brief

ID_NAMES = ("ids", "image_ids", "image_id", "names")  # of arrays in an .npz
MOST_SHARE = 1.5  # corners up to this are shares of the picture's sides: some detectors overshoot 1 a little
OVERSHOOT = 0.05  # of a side, which a box in pixels may end beyond the picture before the file is of other sizes


class GivenBoxes:
    """The boxes of a file by picture.

    path: an .npz with ids (n,) and boxes (n, R, 4) as x1, y1, x2, y2, in pixels or from 0 to 1; where it has
    image_sizes (n, 2), heights and widths, in pixels of those. Or JSON in COCO's form, a list of detections or an
    object with images and annotations, bbox as x, y, width, height in pixels: the best of each picture by score.
    n_regions: R; of JSON the largest number of boxes of a picture, at most 36, and fewer are padded with boxes of
    no area.
    relative: whether the corners are shares of the picture's sides; else they are pixels of the upright picture.
    Raises InputError for a file of another form, ids that stand twice, corners that are reversed or no numbers.
    """

    def __init__(self, path):
        self.path = path
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file, expected proposals, windows, or an .npz or .json file of boxes")
        ids, self.boxes, sizes = read_npz(path) if zipfile.is_zipfile(path) else read_coco(path)
        self.n_regions = self.boxes.shape[1]
        self._check(ids)
        self.relative = sizes is not None or bool(self.boxes.max(initial=0) <= MOST_SHARE)
        if sizes is not None:
            self.boxes = self.boxes / np.tile(sizes[:, None, ::-1], 2)
        self.rows = {}
        for row, image_id in enumerate(ids):
            for name in {canonical_id(image_id), canonical_id(os.path.basename(str(image_id)))}:
                if self.rows.setdefault(name, row) != row:
                    raise InputError(f"{path}: picture {brief(image_id)} stands in rows {self.rows[name]} and {row}")

    def _check(self, ids):
        low, high = self.boxes[..., :2], self.boxes[..., 2:]
        for bad, what in (
            (~np.isfinite(self.boxes).all(-1), "expected numbers"),
            ((high < low).any(-1), "corners are reversed, expected x1 <= x2, y1 <= y2"),
        ):
            if bad.any():
                row, box = np.argwhere(bad)[0]
                found = self.boxes[row, box].tolist()
                raise InputError(f"{self.path}: picture {brief(ids[row])}, box {box}: {found}: {what}")

    def __str__(self):
        kind = "from 0 to 1" if self.relative else "in pixels"
        return f"{self.path}: {self.n_regions} boxes {kind} for each of {len(self.boxes)} pictures"

    def digest(self):
        """The first digits of the file's SHA-256: what a stopped run must have in common with its continuation."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def row(self, path):
        """The row of the picture at path (or with that id), or None."""
        return self.rows.get(canonical_id(path), self.rows.get(canonical_id(os.path.basename(path))))

    def pixels(self, row, size):
        """Boxes (R, 4) of a row, clipped to the picture, in its pixels; size is its (height, width).

        Raises ValueError where pixels in the file lie so far outside that they are of a picture of another size.
        """
        sides = np.tile(np.array(size[::-1], dtype=np.float64), 2)
        boxes = self.boxes[row] * (sides if self.relative else 1.0)
        if not self.relative and (boxes > (1 + OVERSHOOT) * sides + 1).any():
            height, width = size
            ends = tuple(boxes[:, 2:].max(0).tolist())
            raise ValueError(f"boxes reach x, y {ends}, the picture is {width}×{height}: boxes of another size of it")
        return boxes.clip(0, sides)


def read_npz(path):
    """Ids (n,), boxes (n, R, 4) and image sizes (n, 2) or None of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as archive:  # noqa: TID251
            names = archive.files
            ids, boxes, sizes = (
                next((archive[name] for name in known if name in names), None)
                for known in (ID_NAMES, BOX_NAMES, SIZE_NAMES)
            )
            if sizes is None and {"image_h", "image_w"} <= set(names):
                sizes = np.stack([archive["image_h"], archive["image_w"]], axis=-1)
    except Exception as error:  # NumPy, zip and zlib each have their own
        reason = str(error).partition(". If you trust")[0]
        raise InputError(f"{path}: truncated, or not an .npz file of names and numbers ({reason})") from None
    if ids is None or boxes is None:
        raise InputError(f"{path}: holds {', '.join(names)[:200]}; expected ids and boxes")
    if boxes.ndim != 3 or boxes.shape[2] != 4 or not boxes.size or ids.shape != boxes.shape[:1]:
        raise InputError(f"{path}: ids {ids.shape} with boxes {boxes.shape}: expected (n,) and (n, R, 4)")
    if boxes.dtype.kind not in "fiu" or ids.dtype.kind not in "iuUS":
        raise InputError(f"{path}: ids are {ids.dtype}, boxes {boxes.dtype}; expected names and numbers")
    if sizes is not None and (sizes.shape != (len(ids), 2) or sizes.dtype.kind not in "fiu" or not (sizes > 0).all()):
        raise InputError(f"{path}: image sizes {sizes.shape}: expected ({len(ids)}, 2) positive heights and widths")
    ids = [x.decode() if isinstance(x, bytes) else x for x in ids.tolist()]
    return ids, boxes.astype(np.float64), sizes


def read_coco(path):
    """Ids (n,), boxes (n, R, 4), padded with 0, and image sizes (n, 2) or None of COCO JSON, read item by item."""
    listed = starts_with_list(path)
    images = {} if listed else {image["id"]: image for image in items(path, "images", ("id",))}
    found = {}
    for item in items(path, "" if listed else "annotations", ("image_id", "bbox")):
        image_id, bbox = item["image_id"], item["bbox"]
        boxes = found.setdefault(image_id, [])
        try:
            x, y, width, height = map(float, bbox)
            boxes.append((-float(item.get("score", 0)), x, y, x + width, y + height))
        except (TypeError, ValueError):
            what = f"bbox {brief(bbox)}, score {brief(item.get('score'))}; expected x, y, width, height, and a number"
            raise InputError(f"{path}: picture {brief(image_id)}, box {len(boxes)}: {what}") from None
    if not found:
        raise InputError(f"{path}: no boxes in it")
    boxes = np.zeros((len(found), min(N_REGIONS, max(map(len, found.values()))), 4))
    for row, each in enumerate(found.values()):
        best = sorted(each, key=lambda box: box[0])[: boxes.shape[1]]  # stable: the file's order among equals
        boxes[row, : len(best)] = [box[1:] for box in best]
    described = [images.get(image_id, {}) for image_id in found]
    names = [image.get("file_name", image_id) for image, image_id in zip(described, found, strict=True)]
    sizes = [(image.get("height"), image.get("width")) for image in described]
    known = all(isinstance(x, (int, float)) and x > 0 for size in sizes for x in size)
    return names, boxes, np.array(sizes, dtype=np.float64) if known else None


def starts_with_list(path):
    """Whether the first character of a file that is no blank is "[", a list's."""
    with open(path, "rb") as file:
        return file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def items(path, name, needed):
    """Yield the objects of the array called name ("" for the whole file), each with the keys that are needed."""
    for number, item in enumerate(json_items(path, name)):
        if not isinstance(item, dict) or not all(isinstance(item.get(k), (int, str, list)) for k in needed):
            where = name or "detection"
            raise InputError(f"{path}: {where} {number}: {brief(item)}, expected an object with {' and '.join(needed)}")
        yield item
