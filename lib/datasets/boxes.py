"""Files of pixel boxes, for position.py: .npy, .npz and COCO-style JSON."""

import re
from typing import NamedTuple

import numpy as np

from lib.datasets.ids import canonical_id
from lib.datasets.json_files import json_items
from lib.datasets.npz_files import read_sizes
from lib.errors import InputError, brief
from lib.files import open_npy

BOX_NAMES = ("boxes", "bboxes", "bbox")  # of arrays in an .npz
SIZE_NAMES = ("image_sizes", "image_size", "sizes")
WELL_OUTSIDE = 0.05  # of the image's side
MANY_OUTSIDE = 0.05  # share of the boxes
NEARLY_ALL = 0.95  # share of the boxes that another reading must bring inside to be named
SMALL_REACH = 0.7  # share of the images' sides beyond which some box of a detector reaches


class PixelBoxes(NamedTuple):
    """boxes (n, R, 4): x1, y1, x2, y2 in pixels. sizes (n, 2): height, width. found (n,): boxes before the padding.

    names: list of n image ids, or None where the file has none.
    """

    boxes: np.ndarray
    sizes: np.ndarray
    found: np.ndarray
    names: list | None


def read_arrays(path: str, sizes_path: str | None) -> PixelBoxes:
    """Read the boxes of an .npy or .npz file.

    sizes_path: an .npy of image sizes (numbers, or dicts of image_h and image_w), or HxW for all images alike; None
    where the .npz holds them.
    """
    boxes, sizes = _read_npz(path) if path.endswith(".npz") else (open_npy(path), None)
    if sizes_path:
        one_size = re.fullmatch(r"(\d+\.?\d*)[x,](\d+\.?\d*)", sizes_path)
        if one_size:
            sizes = np.tile(np.array(one_size.groups(), dtype=np.float64), (len(boxes), 1))
        else:
            sizes = read_sizes(sizes_path)
    if sizes is None:
        raise InputError(f"{path}: no image sizes in it; --sizes gives them")
    if boxes.ndim != 3 or boxes.shape[2] != 4 or sizes.shape != (len(boxes), 2):
        raise InputError(f"{path}: boxes {boxes.shape} with image sizes {sizes.shape}: expected (n, R, 4) and (n, 2)")
    if not boxes.size:
        raise InputError(f"{path}: boxes {boxes.shape}: none, expected at least one")
    return PixelBoxes(boxes, sizes, np.full(len(boxes), boxes.shape[1]), None)


def _read_npz(path):
    """Boxes, and image sizes or None, of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as archive:  # noqa: TID251
            names = archive.files
            arrays = {name: archive[name] for name in (*BOX_NAMES, *SIZE_NAMES, "image_h", "image_w") if name in names}
    except OSError:  # names the file
        raise
    except Exception as error:  # NumPy, zip and zlib each have their own
        reason = str(error).partition(". If you trust")[0]
        raise InputError(f"{path}: truncated or not an .npz file of numbers ({reason})") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path}: {name} are {array.dtype}, expected numbers")
    boxes, sizes = (next((arrays[name] for name in known if name in arrays), None) for known in (BOX_NAMES, SIZE_NAMES))
    if boxes is None:
        raise InputError(f"{path}: holds {', '.join(names)[:200]}; expected {' or '.join(BOX_NAMES)}")
    if sizes is None and {"image_h", "image_w"} <= set(arrays):
        sizes = np.stack([arrays["image_h"], arrays["image_w"]], axis=-1)
    return boxes, sizes


def read_rows(array: np.ndarray, start: int, n: int) -> np.ndarray:
    """Rows start … start+n-1 (n, …) of an array. A file is mapped anew each time: a map keeps its pages in memory."""
    if isinstance(array, np.memmap) and array.filename:
        array = open_npy(array.filename)
    return array[start : start + n]


def read_coco_boxes(path: str, ids: list[str] | None, n_regions: int) -> PixelBoxes:
    """Read the boxes of a COCO-style JSON file, item by item; images of fewer than n_regions are padded with zeros.

    Its images give id, height, width (and file_name), its annotations image_id and bbox x, y, width, height; the
    regions keep their order in the file. ids: ids or file names of the images to read, None for all in their order.
    """
    try:
        images = {image["id"]: image for image in json_items(path, "images")}
        if ids is not None:
            images = _pick_images(path, images, ids)
        sizes = np.array([(image["height"], image["width"]) for image in images.values()], dtype=np.float64)
        boxes, found = _read_annotations(path, list(images), n_regions)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a COCO-style file of images and annotations ({repr(error)[:200]})") from None
    if not found.any():
        raise InputError(f"{path}: no boxes for any of {len(images)} images")
    return PixelBoxes(boxes, sizes, found, list(images))


def _pick_images(path, images, ids):
    """The images of a list of ids or file names, in its order."""
    by_name = {canonical_id(name): id for id, image in images.items() for name in (image.get("file_name", id), id)}
    lost = [name for name in ids if canonical_id(name) not in by_name]
    if lost:
        raise InputError(f"{path}: no image {brief(lost[0])} ({len(lost)} of {len(ids)} ids are missing)")
    return {by_name[canonical_id(name)]: images[by_name[canonical_id(name)]] for name in ids}


def _read_annotations(path, ids, n_regions):
    """Boxes (n, n_regions, 4) of the images with these ids, and how many each has (n,)."""
    rows = {id: row for row, id in enumerate(ids)}
    boxes = np.zeros((len(ids), n_regions, 4), dtype=np.float32)
    found = np.zeros(len(ids), dtype=np.int64)
    for annotation in json_items(path, "annotations"):
        row = rows.get(annotation["image_id"])
        if row is None:
            continue
        image = brief(annotation["image_id"])
        if found[row] == n_regions:
            raise InputError(f"{path}: image {image} has more than {n_regions} boxes (--n_regions)")
        try:
            x, y, width, height = annotation["bbox"]
            boxes[row, found[row]] = x, y, x + width, y + height
        except (KeyError, TypeError, ValueError):
            what = f"bbox {brief(annotation.get('bbox'))}, expected x, y, width, height"
            raise InputError(f"{path}: image {image}, box {found[row]}: {what}") from None
        found[row] += 1
    return boxes, found


def are_shares(boxes: np.ndarray | float, sizes: np.ndarray | float) -> bool:
    """Whether boxes (…, 4) are shares of their images' sides, which are larger than that; else they are pixels."""
    return bool(np.max(boxes) <= 1 + WELL_OUTSIDE and np.max(sizes) > 2)


class Reach:
    """Counts boxes that reach well outside their images, and would under other readings of the same numbers."""

    def __init__(self, path: str, sizes_are: str, read_as_widths: bool):
        """sizes_are: where the sizes come from, for messages. read_as_widths: the file has x, y, width, height."""
        self.path, self.sizes_are, self.read_as_widths = path, sizes_are, read_as_widths
        self.n = self.outside = self.outside_swapped = self.outside_as_corners = 0
        self.largest, self.largest_side, self.farthest = 0.0, 0.0, 0.0

    def add(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """Count boxes (n, R, 4), x1, y1, x2, y2, of images of sizes (n, 2), height, width; those without area not."""
        area = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        sides = sizes[:, None, ::-1].astype(np.float64)
        self.n += int(area.sum())
        self.outside += int((_reaches_outside(boxes, sides) & area).sum())
        self.outside_swapped += int((_reaches_outside(boxes, sides[..., ::-1]) & area).sum())
        corners = np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)
        reversed_corners = (corners[..., 2:] < corners[..., :2]).any(-1)
        self.outside_as_corners += int(((_reaches_outside(corners, sides) | reversed_corners) & area).sum())
        if area.any():
            self.largest = max(self.largest, float(boxes[area].max()))
            self.largest_side = max(self.largest_side, float(sizes.max()))
            self.farthest = max(self.farthest, float((boxes[..., 2:] / sides)[area].max()))

    def check(self) -> str:
        """A note about the boxes, or "". Raises InputError, naming the likely mistake, where many lie outside."""
        if self.n and are_shares(self.largest, self.largest_side):
            mistake = "boxes from 0 to 1 need --sizes 1x1"
            raise InputError(f"{self.path}: no box reaches beyond 1, in images of {self.largest_side:g}: {mistake}")
        if self.outside > MANY_OUTSIDE * self.n:
            found = f"{self.outside} of {self.n} boxes reach well outside their images"
            raise InputError(f"{self.path}: {found}: {self._mistake()}")
        if self.outside:
            return f"{self.outside} boxes reach well outside their images"
        if self.n and self.farthest < SMALL_REACH:
            return f"no box reaches beyond {self.farthest:.0%} of its image, are the sizes too large?"
        return ""

    def _mistake(self):
        few = (1 - NEARLY_ALL) * self.n
        if self.read_as_widths and self.outside_as_corners <= few:
            return "they look like corners x1, y1, x2, y2, and were read as x, y, width, height"
        if self.outside_swapped <= few:
            return f"height and width look swapped in {self.sizes_are}, expected height first"
        if self.largest_side <= 2:
            return f"{self.sizes_are} of {self.largest_side:g} are for boxes from 0 to 1, these are in pixels"
        return (
            f"they reach to {self.farthest:.1f} times {self.sizes_are}, expected sizes in the pixels of the boxes "
            "(of the images before or after resizing?)"
        )


def _reaches_outside(boxes, sides):
    slack = WELL_OUTSIDE * sides
    return (boxes[..., :2] < -slack).any(-1) | (boxes[..., 2:] > sides + slack).any(-1)
