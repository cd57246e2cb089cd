"""The boxes of some detector, from a file, for extract_features.py."""

import hashlib
import os

import numpy as np

from lib.datasets.boxes import BoxFile
from lib.datasets.regions import are_shares
from lib.errors import InputError
from position import BoxError, check_boxes

OVERSHOOT = 0.05  # of a side, which a box in pixels may end beyond the image before the file is of other sizes


class GivenBoxes(BoxFile):
    """A BoxFile with ids; of JSON the best 36 boxes of each image by score.

    boxes (n, R, 4): shares of the image's sides where is_relative, as told by their values or because the file has the
    images' sizes; else pixels of the upright image. digest: the first digits of the file's SHA-256.
    Raises InputError for a file of another form, ids that stand twice, corners that are reversed or no numbers.
    """

    def __init__(self, path):
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file, expected proposals, windows, or an .npz or .json file of boxes")
        super().__init__(path, best=True)
        if self.names is None:
            raise InputError(f"{path}: holds boxes without ids, expected ids and boxes")
        self.row_of = self.finder()
        n, self.n_regions = self.boxes.shape[:2]
        try:
            check_boxes(self.boxes, np.ones((n, 2)) if self.sizes is None else self.sizes)
        except BoxError as error:
            raise self.named(error) from None
        if self.sizes is None:
            self.is_relative = are_shares(self.boxes)
        else:
            boxes, sizes = self.rows(0, n)
            self.boxes, self.is_relative = boxes / np.tile(sizes[:, None, ::-1], 2), True
            self.check.note()
        with open(path, "rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        kind = "from 0 to 1" if self.is_relative else "in pixels"
        print(f"{path}: {self.n_regions} boxes {kind} for each of {np.count_nonzero(self.found)} images")

    def has(self, path):
        """Whether the image at path has boxes."""
        return (row := self.row_of(path)) is not None and self.found[row] > 0

    def pixels(self, path, size):
        """Boxes (R, 4) of the image at path, clipped to it, in its pixels; size is its (height, width).

        Raises ValueError where pixels in the file lie so far outside that they are of an image of another size.
        """
        sides = np.tile(np.array(size[::-1], dtype=np.float64), 2)
        boxes = self.boxes[self.row_of(path)] * (sides if self.is_relative else 1.0)
        if not self.is_relative and (boxes > (1 + OVERSHOOT) * sides + 1).any():
            reach = boxes[:, 2:].max(0).tolist()
            raise ValueError(f"boxes reach x, y {reach}, the image is {size[1]}×{size[0]}: boxes of another size of it")
        return boxes.clip(0, sides)
