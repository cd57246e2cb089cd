"""The images of a split: their files, their captions, and where in an image its regions lie."""

import glob
import os

import numpy as np
from PIL import ExifTags, Image

from lib.constants import N_CELLS, N_SLOTS
from lib.datasets.ids import canonical_id, read_file_names
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


class SplitImages:
    """Ids, files and regions' boxes of the images of a split.

    dataset: its PrecompDataset. folder: of the image files; where None, SPLIT_images beside the data, and no files
    where there is no such folder. Raises InputError where arrays have other shapes, where no file in folder has an
    id's name, and where boxes, grids and image files are not of the same images.
    """

    def __init__(self, dataset, folder=None):
        self.prefix, self.n = dataset.prefix, dataset.n_images
        self.n_regions = dataset.images.shape[1]
        self.folder = folder or self.prefix + "_images"
        ids = dataset.read_ids()
        self.has_ids, self.ids = ids is not None, ids or [str(i) for i in range(self.n)]
        self.files = find_files(self.folder, ids, read_names(os.path.dirname(self.prefix))) if ids else {}
        if folder is not None and not self.files:
            expected = f"names such as {ids[0]}.jpg" if ids else f"their ids in {self.prefix}_ids.txt"
            raise InputError(f"{folder}: no file of the images, expected {expected}")
        self.pixel_boxes, self.grids = self._open("_pixel_boxes.npy"), self._open("_boxes.npy")
        self.sample = np.unique(np.linspace(0, self.n - 1, min(self.n, SAMPLE)).astype(int)).tolist()
        if self.pixel_boxes is not None:
            self._check_files()
            if self.grids is not None:
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
        with_files = [i for i in self.sample if self.ids[i] in self.files]
        outside = [(self.row(self.pixel_boxes, i)[:, 2:] > np.array(self.size(i)) + OUTSIDE).any(1) for i in with_files]
        if outside and (share := np.mean(outside)) > MAX_OUTSIDE:
            raise InputError(
                f"{self.prefix}_pixel_boxes.npy: {100 * share:.0f} % of the boxes reach outside the images in "
                f"{self.folder}, expected boxes of these images at their size"
            )

    def _check_grids(self):
        """Pixel boxes and grids describe the same regions."""
        by_pixels = np.concatenate([self._boxes_by_pixels(i) for i in self.sample])
        by_cells = np.concatenate([self._boxes_by_cells(i) for i in self.sample])
        small = np.prod(by_pixels[:, 2:] - by_pixels[:, :2], axis=1) < SMALL
        overlaps = iou(by_pixels[small], by_cells[small])
        if len(overlaps) >= MIN_SMALL and overlaps.mean() < MIN_IOU:
            raise InputError(
                f"{self.prefix}_pixel_boxes.npy: not the regions of {self.prefix}_boxes.npy "
                f"(overlap {overlaps.mean():.2f}), expected boxes of the same images in the same order"
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
        """Width and height of an image, in pixels where it has a file or pixel boxes.

        A file is turned as its EXIF block says: so it is shown, and so its regions were found.
        """
        if self.ids[number] in self.files:
            try:
                with Image.open(self.files[self.ids[number]]) as image:
                    lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                    return image.size[::-1] if lies_on_its_side else image.size
            except Exception:  # Pillow's readers raise whatever a broken file leads them to
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
        listed = ((weights > 0) & (cells < N_CELLS))[..., None]
        corners = np.stack([cells // SIDE, cells % SIDE], 2) / SIDE  # column, row
        last = np.where(listed, corners + 1 / SIDE, 0).max(1)
        first = np.where(listed, corners, last[:, None]).min(1)  # a region without cells has no extent
        return np.concatenate([first, last], 1)


def iou(a, b):
    """Intersection over union of boxes a (n, 4) and b (n, 4): (n,)."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    both = np.prod(np.maximum(sides, 0), axis=1)
    areas = np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1)
    return both / np.maximum(areas - both, 1e-12)


def partners(index, n, m):
    """Indices, among a split's m captions (images), of those that belong to one of its n images (captions).

    They belong together in equal consecutive groups, as many as the smaller count.
    """
    groups = min(n, m)
    group = index * groups // n
    return list(range(group * m // groups, (group + 1) * m // groups)) if groups else []


def read_names(folder):
    """{id: file name} by the list in a data folder: id_mapping.json, or Karpathy's dataset_NAME.json; {} without one.

    vse_infty's id_mapping.json lies beside its folder `precomp`. Raises InputError where there are two lists.
    """
    patterns = [os.path.join(glob.escape(folder), name) for name in ("id_mapping.json", "dataset_*.json")]
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    if not paths and os.path.basename(folder) == "precomp":
        paths = glob.glob(os.path.join(glob.escape(os.path.dirname(folder)), "id_mapping.json"))
    if len(paths) > 1:
        raise InputError(f"{paths[0]} and {paths[1]}, expected one list of the images' file names")
    return read_file_names(paths[0]) if paths else {}


def find_files(folder, ids, names):
    """{id: path} of the ids that have an image file in folder: by names {id: file name}, or else by its name.

    Raises InputError where two files have the name of one id.
    """
    by_id, found = {}, {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.lower().endswith(FILES):
            by_id.setdefault(canonical_id(name), []).append(name)
    for image_id in ids:
        listed = os.path.normpath(names.get(image_id, image_id))  # lists have folders (val2014/…) before the names
        paths = [path for path in (listed, os.path.basename(listed)) if is_below(folder, path)]
        files = paths[:1] or by_id.get(canonical_id(image_id), [])
        if len(files) > 1:
            raise InputError(f"{folder}: {' and '.join(files[:2])} for image {image_id}, expected one file")
        if files:
            found[image_id] = os.path.join(folder, files[0])
    return found


def is_below(folder, path):
    """Whether a normalised relative path names an image file below folder, and nothing outside of it."""
    inside = not path.startswith("..") and not os.path.isabs(path) and path.lower().endswith(FILES)
    return inside and os.path.isfile(os.path.join(folder, path))
