"""Boxes of images, as detectors give them: .npz and .npy arrays, COCO-style JSON; and whether they fit their images."""

import math
import os
import re
from array import array

import msgspec
import numpy as np

from lib.constants import N_REGIONS
from lib.datasets.arrays import read_rows
from lib.datasets.ids import canonical_id, read_ids
from lib.datasets.json_files import json_items
from lib.datasets.npz_files import known_names, read_npz, read_sizes
from lib.datasets.regions import are_shares
from lib.errors import InputError, brief
from lib.files import open_npy

NAMES = {  # of arrays in an .npz
    "boxes": ("boxes", "bboxes", "bbox"),
    "sizes": ("image_sizes", "image_size", "sizes"),
    "height": ("image_h",),
    "width": ("image_w",),
    "ids": ("ids", "image_ids", "image_id", "names"),
}
SQUARE = 2  # sizes up to this are those of boxes from 0 to 1
WELL_OUTSIDE = 0.05  # of the image's side
MANY_OUTSIDE = 0.05  # share of the boxes
SMALL_REACH = 0.7  # share of the images' sides beyond which some box of a detector reaches


class CocoImage(msgspec.Struct):
    id: int | str
    height: float | None = None
    width: float | None = None
    file_name: str | None = None


class CocoBox(msgspec.Struct):
    image_id: int | str
    bbox: tuple[float, float, float, float]  # x, y, width, height
    score: float = 0.0


class BoxFile:
    """The boxes of a file's images.

    An .npz holds boxes (n, R, 4), mostly image_sizes (n, 2), heights and widths (or image_h and image_w), and ids (n,);
    an .npy boxes alone. JSON is COCO's: a list of detections, or an object of images (id, height, width, file_name)
    and annotations (image_id, bbox: x, y, width, height; score).
    sizes: of the images, an .npy or HxW for all alike. ids: a file that lists which images in which order.
    n_regions: of JSON, R; images with fewer boxes are padded with boxes without area. xywh: the arrays hold x, y,
    width, height. best: of JSON the best boxes of each image by score, n_regions at most; else all in the file's order.

    boxes (n, R, 4): x1, y1, x2, y2 (or as xywh says). sizes (n, 2) or None. found (n,): boxes before the padding.
    names: list of n ids, or None. file_names: list of n where JSON has them. check: a BoxCheck of the rows read.
    Raises InputError for a file of another form.
    """

    def __init__(self, path, sizes=None, ids=None, n_regions=N_REGIONS, xywh=False, best=False):
        self.path, self.file_names = path, None
        if n_regions < 1:
            raise InputError(f"--n_regions {n_regions}: expected at least 1")
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file, expected boxes in an .npz, .npy or .json file")
        of_json = not path.endswith((".npz", ".npy"))
        if of_json:
            self._read_coco(n_regions, best)
        else:
            self._read_arrays()
        if sizes:
            size = parse_size(sizes)
            self.sizes = np.tile(size, (len(self.boxes), 1)) if size else read_sizes(sizes)
        shape = len(self.boxes), 2
        if self.sizes is not None and self.sizes.shape != shape:
            raise InputError(f"{path}: boxes {self.boxes.shape} with image sizes {self.sizes.shape}, expected {shape}")
        if ids:
            self._pick(ids)
        self.xywh, self.of_widths = xywh and not of_json, xywh or of_json
        self.check = BoxCheck(path, sizes or "the image sizes")

    def _read_arrays(self):
        if self.path.endswith(".npy"):
            arrays = {"boxes": open_npy(self.path)}
        else:
            arrays = read_npz(self.path, set().union(*NAMES.values()), math.inf)
        for name, values in arrays.items():
            kinds, expected = ("iuUS", "names or numbers") if name in NAMES["ids"] else ("fiu", "numbers")
            if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds:
                raise InputError(f"{self.path}: {name} are {brief(values)}, expected an array of {expected}")
        self.boxes, self.sizes, height, width, ids = known_names(arrays, NAMES).values()
        if self.boxes is None:
            raise InputError(f"{self.path}: no boxes, expected an array of the name {' or '.join(NAMES['boxes'])}")
        if self.boxes.ndim != 3 or self.boxes.shape[2] != 4 or not self.boxes.size:
            raise InputError(f"{self.path}: boxes {self.boxes.shape}, expected (n, R, 4), at least one")
        n, n_regions = self.boxes.shape[:2]
        for name, values in (("ids", ids), ("image_h", height), ("image_w", width)):
            if values is not None and values.shape != (n,):
                raise InputError(f"{self.path}: {name} {values.shape} of {n} images, expected ({n},)")
        if self.sizes is None and height is not None and width is not None:
            self.sizes = np.stack([height, width], axis=-1)
        self.names = None if ids is None else [x.decode() if isinstance(x, bytes) else x for x in ids.tolist()]
        self.found = np.full(n, n_regions)

    def _read_coco(self, n_regions, best):
        with open(self.path, "rb") as file:
            is_list = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        images = {} if is_list else {str(image.id): image for image in json_items(self.path, "images", CocoImage)}
        found, strangers = {name: array("f") for name in images}, 0  # x1, y1, x2, y2, score of each box
        for item in json_items(self.path, "" if is_list else "annotations", CocoBox):
            name, (x, y, width, height) = str(item.image_id), item.bbox
            if is_list or name in found:
                found.setdefault(name, array("f")).extend((x, y, x + width, y + height, item.score))
            else:
                strangers += 1
        if strangers:
            print(f"note: {self.path}: {strangers} boxes are of images that it does not list, and left out")
        counts = np.array([len(values) // 5 for values in found.values()], dtype=np.int64)
        if not counts.any():
            raise InputError(f"{self.path}: no boxes for any of {len(found)} images")
        if best:
            n_regions = min(n_regions, int(counts.max()))
        elif counts.max() > n_regions:
            name = brief(list(found)[counts.argmax()])
            raise InputError(f"{self.path}: image {name} has more than {n_regions} boxes (--n_regions)")
        self.boxes = np.zeros((len(found), n_regions, 4), dtype=np.float32)
        for row, values in enumerate(found.values()):
            boxes = np.array(values).reshape(-1, 5)
            if best:
                boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")][:n_regions]
            self.boxes[row, : len(boxes)] = boxes[:, :4]
        self.found, self.names, self.sizes = np.minimum(counts, n_regions), list(found), None
        if images:
            self.file_names = [image.file_name or name for name, image in images.items()]
            sizes = np.array([(image.height, image.width) for image in images.values()], dtype=np.float64)
            self.sizes = None if np.isnan(sizes).any() else sizes

    def _pick(self, ids_path):
        """Keep the images of an id list, in its order."""
        if self.names is None:
            raise InputError(f"{self.path}: holds no ids, which --ids {ids_path} needs")
        find, ids = self.finder(), read_ids(ids_path)
        rows = [find(name) for name in ids]
        if None in rows:
            lost = f"no image {brief(ids[rows.index(None)])}"
            raise InputError(f"{self.path}: {lost} ({rows.count(None)} of {len(ids)} ids are missing)")
        self.boxes, self.found, self.names, self.file_names = self.boxes[rows], self.found[rows], ids, None
        self.sizes = None if self.sizes is None else self.sizes[rows]

    def finder(self):
        """A function of an image's id, file name or path that gives its row; None where the file has no boxes of it.

        Whole names count before base names, file names before ids. Raises InputError where an image stands twice.
        """
        table = {}
        for names in filter(None, (self.names, self.file_names)):
            rows = {}
            for row, name in enumerate(names):
                if (first := rows.setdefault(canonical_id(name), row)) != row:
                    raise InputError(f"{self.path}: image {brief(name)} stands in rows {first} and {row}")
            table |= {base_name(name): row for row, name in enumerate(names)} | rows
        return lambda name: table.get(canonical_id(name), table.get(base_name(name)))

    def rows(self, start, n):
        """Boxes (m, R, 4), x1, y1, x2, y2 in pixels, and sizes (m, 2) of the images start … start+n-1, float64."""
        if self.sizes is None:
            raise InputError(f"{self.path}: no image sizes in it; --sizes gives them")
        boxes, sizes = (np.array(read_rows(x, start, n), dtype=np.float64) for x in (self.boxes, self.sizes))
        if self.xywh:
            boxes[..., 2:] += boxes[..., :2]
        boxes = self.check.in_pixels(boxes, sizes)
        self.check.add(boxes, sizes)
        return boxes, sizes

    def named(self, error, start=0):
        """An InputError that says in which image of the file, counted from start, a position.BoxError is."""
        row = start + error.image
        title = f"{row} (id {brief(self.names[row])})" if self.names else row
        hint = " (x, y, width, height need --xywh)" if "reversed" in error.reason and not self.of_widths else ""
        return InputError(f"{self.path}: {type(error)(title, error.box, error.reason)}{hint}")


def base_name(name: str | int) -> str:
    """The canonical id of a path's last part."""
    return canonical_id(os.path.basename(str(name)))


def parse_size(text: str) -> tuple[float, float] | None:
    """(height, width) of the text HxW; None of another text."""
    pair = re.fullmatch(r"(\d+\.?\d*)[x,](\d+\.?\d*)", text)
    return (float(pair[1]), float(pair[2])) if pair else None


class BoxCheck:
    """Brings boxes to pixels, and counts those that reach well outside their images.

    empty: boxes without area inside their images.
    """

    def __init__(self, path: str, sizes_are: str = "image_h and image_w"):
        """sizes_are: where the sizes come from, for messages."""
        self.path, self.sizes_are = path, sizes_are
        self.shares: bool | None = None  # told by the first boxes
        self.n = self.empty = self.outside = 0
        self.largest_side, self.farthest = 0.0, 0.0

    def in_pixels(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes (n, R, 4), x1, y1, x2, y2, of images of sizes (n, 2), height, width, in pixels."""
        if self.shares is None and boxes.any():
            self.shares = are_shares(boxes) and bool(sizes.max() > SQUARE)
        return boxes * np.tile(sizes[:, None, ::-1], 2) if self.shares else boxes

    def add(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """Count boxes (n, R, 4) in pixels of images of sizes (n, 2); of those without area only how many there are."""
        sides = np.broadcast_to(sizes[:, None, ::-1], (*boxes.shape[:2], 2))
        self.empty += int((np.minimum(boxes[..., 2:], sides) <= np.maximum(boxes[..., :2], 0)).any(-1).sum())
        area = (boxes[..., 2:] > boxes[..., :2]).all(-1)
        boxes, sides = boxes[area], sides[area]
        if not len(boxes):
            return
        with np.errstate(divide="ignore", invalid="ignore"):  # sizes of 0 are named with the grids
            low, high = boxes[:, :2] / sides, boxes[:, 2:] / sides
        self.n += len(boxes)
        self.outside += int(((low < -WELL_OUTSIDE) | (high > 1 + WELL_OUTSIDE)).any(1).sum())
        self.largest_side = max(self.largest_side, float(sides.max()))
        self.farthest = max(self.farthest, float(high.max()))

    def note(self) -> str:
        """What is worth knowing of the boxes, or "". Raises InputError, with likely mistakes, for many outside."""
        if self.outside > MANY_OUTSIDE * self.n:
            raise InputError(
                f"{self.path}: {self.outside} of {self.n} boxes reach well outside their images, "
                f"to {self.farthest:.1f} times {self.sizes_are}: expected height before width, in the pixels of the "
                "boxes (1x1 for boxes from 0 to 1), and x1, y1, x2, y2 in arrays (--xywh), x, y, width, height in JSON"
            )
        if self.outside:
            return f"{self.outside} boxes reach well outside their images"
        if self.shares:
            return "the boxes are from 0 to 1, shares of their images' sides"
        if self.n and self.largest_side <= SQUARE:
            return f"{self.sizes_are} of {self.largest_side:g}: the images are taken for squares"
        if self.n and self.farthest < SMALL_REACH:
            return f"no box reaches beyond {self.farthest:.0%} of its image, are the sizes too large?"
        return ""
