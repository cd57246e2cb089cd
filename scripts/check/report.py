"""What check_data.py found, and how it reads arrays."""

import os
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from lib.datasets.arrays import read_rows
from lib.errors import InputError

BLOCK_BYTES = 1 << 24  # read at a time


class Report:
    """Lines of the table, faults (training would stop or learn nonsense) and notes (worth knowing)."""

    def __init__(self):
        self.table, self.faults, self.notes = [], [], []

    def row(self, *cells):
        self.table.append([str(cell) for cell in cells])

    def attempt(self, function, *args):
        """function(*args), or None and a fault where it raises InputError."""
        try:
            return function(*args)
        except InputError as error:
            self.faults.append(str(error))
            return None

    def print(self):
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        for cells in self.table:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        for title, lines in (("note", self.notes), ("WRONG", self.faults)):
            for line in lines:
                print(f"{title}: {line}")


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start, rows as float32) of a mapped array, about BLOCK_BYTES at a time."""
    size = max(1, BLOCK_BYTES // array[0].nbytes)
    name = os.path.basename(array.filename)
    with tqdm(total=len(array), desc=name, unit="row", leave=False, disable=None) as bar:
        for start in range(0, len(array), size):
            rows = read_rows(array, start, size)
            yield start, rows.astype(np.float32, copy=False)
            bar.update(len(rows))


def sample_rows(array: np.ndarray, n_images: int, n: int) -> np.ndarray:
    """Rows of at most n images, spread over an array that has one or more rows for each of n_images."""
    step = len(array) // n_images
    images = np.unique(np.linspace(0, n_images - 1, n).astype(int))
    return np.concatenate([read_rows(array, int(image) * step) for image in images])
