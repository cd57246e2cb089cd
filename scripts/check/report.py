"""What check_data.py found, and how it reads arrays."""

import os
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from lib.datasets.arrays import read_rows
from lib.errors import InputError
from lib.files import open_npy

BLOCK_BYTES = 1 << 24  # read at a time


class Report:
    """Lines of the table, faults (training would stop or learn nonsense) and notes (worth knowing)."""

    def __init__(self):
        self.table, self.faults, self.notes = [], [], []

    def row(self, *cells):
        self.table.append([str(cell) for cell in cells])

    def print(self):
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        for cells in self.table:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        for title, lines in (("note", self.notes), ("WRONG", self.faults)):
            for line in lines:
                print(f"{title}: {line}")


def open_array(path: str, dimensions: tuple[str, ...], report: Report) -> np.memmap | None:
    """A mapped .npy file, for read_rows; None and a fault where it has not these dimensions."""
    try:
        array = open_npy(path)
    except InputError as error:
        report.faults.append(str(error))
        return None
    if array.ndim != len(dimensions) or 0 in array.shape:
        report.faults.append(f"{path}: found {array.shape}, expected ({', '.join(dimensions)})")
        return None
    return array


def blocks(array: np.memmap) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start, rows as float32) of an array, about BLOCK_BYTES at a time."""
    size = max(1, BLOCK_BYTES // array[0].nbytes)
    with tqdm(total=len(array), desc=os.path.basename(array.filename), unit="row", leave=False, disable=None) as bar:
        for start in range(0, len(array), size):
            rows = read_rows(array, start, size)
            yield start, rows.astype(np.float32, copy=False)
            bar.update(len(rows))


def sample_rows(array: np.memmap, n_images: int, n: int) -> np.ndarray:
    """Rows of at most n images, spread over an array that has one or more rows for each of n_images."""
    step = len(array) // n_images
    images = np.unique(np.linspace(0, n_images - 1, n).astype(int))
    return np.concatenate([read_rows(array, int(image) * step) for image in images])
