"""The boxes of some detector, from a file, for extract_features.py."""

import hashlib
import os

import numpy as np

from lib.datasets.boxes import BoxFile
from lib.datasets.regions import are_shares
from lib.errors import InputError
from position import BoxError, check_boxes

OVERSHOOT = 0.05  # of a side, which a box in pixels may end beyond the image before the file is of other sizes


class GivenBoxes:
    """The boxes of a lib.datasets.boxes.BoxFile with ids; of JSON the best 36 of each image by score.

    n_regions: boxes of each image. is_relative: whether the boxes are shares of the image's sides, as told by their
    values or because the file has the images' sizes; else they are pixels of the upright image.
    Raises InputError for a file of another form, ids that stand twice, corners that are reversed or no numbers.
    """

    def __init__(self, path):
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file, expected proposals, windows, or an .npz or .json file of boxes")
        self.path, file = path, BoxFile(path, best=True)
        if file.names is None:
            raise InputError(f"{path}: holds boxes without ids, expected ids and boxes")
        n, self.n_regions = file.boxes.shape[:2]
        try:
            check_boxes(file.boxes, np.ones((n, 2)) if file.sizes is None else file.sizes)
        except BoxError as error:
            raise file.named(error) from None
        self.boxes, self.is_relative = np.array(file.boxes, dtype=np.float64), are_shares(file.boxes)
        if file.sizes is not None:
            boxes, sizes = file.rows(0, n)
            self.boxes, self.is_relative = boxes / np.tile(sizes[:, None, ::-1], 2), True
            file.check.note()
        self.find, self.found = file.finder(), file.found

    def __str__(self):
        kind = "from 0 to 1" if self.is_relative else "in pixels"
        return f"{self.path}: {self.n_regions} boxes {kind} for each of {np.count_nonzero(self.found)} images"

    def digest(self):
        """The first digits of the file's SHA-256: what a stopped run must have in common with its continuation."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    def row(self, path):
        """The row of the image at path, None where it has no boxes."""
        row = self.find(path)
        return row if row is not None and self.found[row] else None

    def pixels(self, row, size):
        """Boxes (R, 4) of a row, clipped to the image, in its pixels; size is its (height, width).

        Raises ValueError where pixels in the file lie so far outside that they are of an image of another size.
        """
        sides = np.tile(np.array(size[::-1], dtype=np.float64), 2)
        boxes = self.boxes[row] * (sides if self.is_relative else 1.0)
        if not self.is_relative and (boxes > (1 + OVERSHOOT) * sides + 1).any():
            height, width = size
            ends = tuple(boxes[:, 2:].max(0).tolist())
            raise ValueError(f"boxes reach x, y {ends}, the image is {width}×{height}: boxes of another size of it")
        return boxes.clip(0, sides)
