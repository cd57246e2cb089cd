"""What there is to look at in a split: its picture files, and where in a picture its regions lie."""

import os
import re

import numpy as np
from PIL import Image

from lib.constants import N_CELLS, N_SLOTS
from lib.errors import InputError
from lib.files import open_npy

FILES = (".png", ".jpg", ".jpeg", ".webp")
FRAME = (4, 3)  # width and height of the frame of a picture of which nothing is known
SIDE = round(N_CELLS**0.5)  # cells of the grid in a row


class Pictures:
    """Ids, files and regions' boxes of the pictures of a split.

    dataset: its PrecompDataset. folder: of the picture files, named ID.png, ID.jpg or as COCO does; where None,
    SPLIT_images beside the data, and no pictures where there is no such folder either.
    """

    def __init__(self, dataset, folder=None):
        prefix, self.n, self.repeats = dataset.prefix, dataset.n_images, dataset.repeats
        self.n_regions = dataset.images.shape[1]
        if folder is not None and not os.path.isdir(folder):
            raise InputError(f"{folder}: no such folder of pictures")
        self.folder = folder or prefix + "_images"
        self.ids = self._every_image(read_ids(prefix + "_ids.txt")) or [str(i) for i in range(self.n)]
        self.files = find_files(self.folder, self.ids)
        self.pixel_boxes, self.grids = (
            open_npy(path) if os.path.isfile(path) else None
            for path in (prefix + "_pixel_boxes.npy", prefix + "_boxes.npy")
        )
        for name, array in (("_pixel_boxes.npy", self.pixel_boxes), ("_boxes.npy", self.grids)):
            if array is not None and (array.ndim != 3 or len(array) % self.n or array.shape[1] < self.n_regions):
                raise InputError(f"{prefix}{name}: found {array.shape}, expected ({self.n}, {self.n_regions}, …)")

    def _every_image(self, rows):
        """One row of each picture, where the rows repeat each picture equally often; else None."""
        return rows[:: len(rows) // self.n] if rows and len(rows) % self.n == 0 else None

    def row(self, array, number):
        return np.array(array[number * (len(array) // self.n)][: self.n_regions], dtype=np.float32)

    def grid(self, number):
        """Cells (R, 15) int and area weights (R, 15) of a picture's regions, or None where there is no grid file."""
        if self.grids is None:
            return None
        grid = self.row(self.grids, number)
        return grid[:, :N_SLOTS].astype(int), grid[:, N_SLOTS : 2 * N_SLOTS]

    def size(self, number):
        """Width and height of a picture, in pixels where it has a file or pixel boxes."""
        if self.ids[number] in self.files:
            try:
                with Image.open(self.files[self.ids[number]]) as picture:
                    return picture.size
            except OSError:  # the page shows a broken picture on the frame
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
            return np.clip(self.row(self.pixel_boxes, number) / np.tile(self.size(number), 2), 0, 1)
        if self.grids is None:
            return None
        cells, weights = self.grid(number)
        seen = (weights > 0) & (cells < N_CELLS)
        corners = np.stack([cells // SIDE, cells % SIDE], 2) / SIDE  # column, row
        first = np.where(seen[..., None], corners, 1).min(1)
        last = np.where(seen[..., None], corners + 1 / SIDE, 0).max(1)
        return np.concatenate([np.minimum(first, last), last], 1)  # a region without cells has no extent


def read_ids(path):
    """The lines of an id file, [] where there is none."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().split("\n")[:-1] or []


def find_files(folder, ids):
    """{id: path} of the ids that have a picture file in folder: ID.png, ID itself, or NAME_000…ID.jpg (COCO's)."""
    named, numbered = {}, {}
    for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        stem, ending = os.path.splitext(entry)
        if ending.lower() in FILES:
            named[stem] = named[entry] = os.path.join(folder, entry)
            if number := re.search(r"(?:^|\D)0*(\d+)$", stem):
                numbered.setdefault(number[1], named[stem])
    found = {name: named.get(name) or numbered.get(name) for name in ids}
    return {name: path for name, path in found.items() if path}
