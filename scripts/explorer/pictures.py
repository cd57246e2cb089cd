"""The image files of a split, and where in an image its regions lie."""

import glob
import os
import re

import numpy as np
from PIL import ExifTags, Image

from lib.constants import N_CELLS, N_SLOTS
from lib.datasets.ids import read_file_names
from lib.errors import InputError
from lib.files import open_npy

FILES = (".png", ".jpg", ".jpeg", ".webp")
FRAME = (4, 3)  # width and height of the frame of an image of which nothing is known
SIDE = round(N_CELLS**0.5)  # cells of the grid in a row
SAMPLE = 16  # images, spread over the split, of which boxes are compared
SMALL = 0.02  # share of the image that a region covers whose cells are all listed
MIN_SMALL = 20  # small regions in the sample, below which nothing is compared
MIN_IOU = 0.1  # of small regions by pixels and by cells; in drawn images 0.45, with another image's cells 0.02
MAX_OUTSIDE = 0.1  # of the boxes may reach more than OUTSIDE pixels beyond their image
OUTSIDE = 2


class Pictures:
    """Ids, files and regions' boxes of the images of a split.

    dataset: its PrecompDataset. folder: of the image files, named as the data's list of file names says, or ID.png,
    ID.jpg, or as COCO does; where None, SPLIT_images beside the data, and no files where there is no such folder.
    Raises InputError where arrays have other shapes, where no file in folder has an id's name, and where boxes, grids
    and image files are not of the same images.
    """

    def __init__(self, dataset, folder=None):
        self.prefix, self.n = dataset.prefix, dataset.n_images
        self.n_regions = dataset.images.shape[1]
        if folder is not None and not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder of images")
        self.folder = folder or self.prefix + "_images"
        ids = dataset.read_ids()
        self.has_ids, self.ids = ids is not None, ids or [str(i) for i in range(self.n)]
        names = read_names(os.path.dirname(self.prefix)) if self.has_ids else {}  # a row's number is no id
        self.files = find_files(self.folder, self.ids, names, by_number=self.has_ids)
        if folder is not None and not self.files:
            raise InputError(f"{folder}: no file of the images, expected names such as {self.ids[0]}.jpg")
        self.pixel_boxes, self.grids = self._open("_pixel_boxes.npy"), self._open("_boxes.npy")
        self.sample = np.unique(np.linspace(0, self.n - 1, min(self.n, SAMPLE)).astype(int)).tolist()
        self._check_files()
        self._check_grids()

    def _open(self, suffix):
        path = self.prefix + suffix
        if not os.path.isfile(path):
            return None
        array = open_npy(path)
        if array.ndim != 3 or len(array) % self.n or array.shape[1] < self.n_regions:
            raise InputError(f"{path}: found {array.shape}, expected ({self.n}, {self.n_regions}, …)")
        return array

    def _check_files(self):
        """Pixel boxes lie in their image files."""
        if self.pixel_boxes is None:
            return
        outside = [
            self.row(self.pixel_boxes, i)[:, 2:] > np.array(self.size(i)) + OUTSIDE
            for i in self.sample
            if self.ids[i] in self.files
        ]
        if outside and (share := np.concatenate(outside).any(1).mean()) > MAX_OUTSIDE:
            raise InputError(
                f"{self.prefix}_pixel_boxes.npy: {100 * share:.0f} % of the boxes reach outside the images in "
                f"{self.folder}, expected boxes of these images at their size"
            )

    def _check_grids(self):
        """Pixel boxes and grids describe the same regions."""
        if self.pixel_boxes is None or self.grids is None:
            return
        overlaps = []
        for i in self.sample:
            by_pixels, by_cells = self._boxes_by_pixels(i), self._boxes_by_cells(i)
            small = np.prod(by_pixels[:, 2:] - by_pixels[:, :2], axis=1) < SMALL
            overlaps += iou(by_pixels[small], by_cells[small]).tolist()
        if len(overlaps) >= MIN_SMALL and np.mean(overlaps) < MIN_IOU:
            raise InputError(
                f"{self.prefix}_pixel_boxes.npy: not the regions of {self.prefix}_boxes.npy "
                f"(overlap {np.mean(overlaps):.2f}), expected boxes of the same images in the same order"
            )

    def row(self, array, number):
        return np.array(array[number * (len(array) // self.n)][: self.n_regions], dtype=np.float32)

    def grid(self, number):
        """Cells (R, 15) int and area weights (R, 15) of an image's regions, or None where there is no grid file."""
        if self.grids is None:
            return None
        grid = self.row(self.grids, number)
        return grid[:, :N_SLOTS].astype(int), grid[:, N_SLOTS : 2 * N_SLOTS]

    def size(self, number):
        """Width and height of an image, in pixels where it has a file or pixel boxes."""
        if self.ids[number] in self.files:
            try:
                with Image.open(self.files[self.ids[number]]) as image:
                    return upright_size(image)
            except OSError:  # the page shows a broken image on the frame
                pass
        if self.pixel_boxes is not None:
            return tuple(self.row(self.pixel_boxes, number)[:, 2:].max(0).tolist())
        return FRAME

    def boxes(self, number):
        """Where each region lies: (R, 4) x1, y1, x2, y2 as shares of width and height, or None where unknown.

        From SPLIT_pixel_boxes.npy, or else the bounding box of the cells that the grid file lists (15 at most, so a
        large region shows smaller than it is).
        """
        if self.pixel_boxes is not None:
            return self._boxes_by_pixels(number)
        return None if self.grids is None else self._boxes_by_cells(number)

    def _boxes_by_pixels(self, number):
        return np.clip(self.row(self.pixel_boxes, number) / np.tile(self.size(number), 2), 0, 1)

    def _boxes_by_cells(self, number):
        cells, weights = self.grid(number)
        listed = (weights > 0) & (cells < N_CELLS)
        corners = np.stack([cells // SIDE, cells % SIDE], 2) / SIDE  # column, row
        first = np.where(listed[..., None], corners, 1).min(1)
        last = np.where(listed[..., None], corners + 1 / SIDE, 0).max(1)
        return np.concatenate([np.minimum(first, last), last], 1)  # a region without cells has no extent


def upright_size(image):
    """Width and height of an image as it is shown, and as its regions were found: turned as its EXIF block says."""
    try:
        lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # a broken block: Pillow raises whatever its parser meets
        lies_on_its_side = False
    return image.size[::-1] if lies_on_its_side else image.size


def iou(a, b):
    """Intersection over union of boxes a (n, 4) and b (n, 4): (n,)."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    both = np.prod(np.maximum(sides, 0), axis=1)
    areas = np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1)
    return both / np.maximum(areas - both, 1e-12)


def read_names(folder):
    """{id: file name} by the list in a data folder: id_mapping.json, or Karpathy's dataset_NAME.json; {} without one.

    vse_infty's id_mapping.json lies beside its folder `precomp`. Raises InputError where there are two lists.
    """
    paths = [
        path for name in ("id_mapping.json", "dataset_*.json") for path in sorted(glob.glob(os.path.join(folder, name)))
    ]
    if not paths and os.path.basename(folder) == "precomp":
        paths = glob.glob(os.path.join(os.path.dirname(folder), "id_mapping.json"))
    if len(paths) > 1:
        raise InputError(f"{paths[0]} and {paths[1]}, expected one list of the images' file names")
    return read_file_names(paths[0]) if paths else {}


def find_files(folder, ids, names=None, by_number=True):
    """{id: path} of the ids that have an image file in folder.

    names: {id: file name}. An id that it lacks has ID.png, ID itself, or NAME_000…ID.jpg (COCO's; by_number: whether
    this form counts). Raises InputError where two files have the name of one id.
    """
    whole, stems, numbers = {}, {}, {}
    for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        stem, ending = os.path.splitext(entry)
        if ending.lower() in FILES:
            whole[entry] = [entry]
            stems.setdefault(stem, []).append(entry)
            if by_number and (number := re.search(r"(?:^|\D)0*(\d+)$", stem)):
                numbers.setdefault(number[1], []).append(entry)
    listed = {image_id: find_listed(folder, name) for image_id, name in (names or {}).items()}
    found = {}
    for image_id in ids:
        entries = next((known[image_id] for known in (listed, whole, stems, numbers) if image_id in known), [])
        if len(entries) > 1:
            raise InputError(f"{folder}: {' and '.join(entries[:2])} for image {image_id}, expected one file")
        if entries:
            found[image_id] = os.path.join(folder, entries[0])
    return found


def find_listed(folder, name):
    """[the path below folder] of a listed file name, with the folder that it may have (val2014/…) or without; or []."""
    below = os.path.normpath(name)
    if below.startswith("..") or os.path.isabs(below) or not below.lower().endswith(FILES):
        return []
    return [path for path in (below, os.path.basename(below)) if os.path.isfile(os.path.join(folder, path))][:1]
