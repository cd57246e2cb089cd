"""What check_data.py found, and how it reads arrays."""

import os
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from lib.datasets.arrays import ArrayReader
from lib.errors import InputError

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


def open_array(path: str, dimensions: tuple[str, ...], report: Report) -> ArrayReader | None:
    """An ArrayReader, or None and a fault."""
    try:
        reader = ArrayReader(path)
    except InputError as error:
        report.faults.append(str(error))
        return None
    if len(reader.shape) != len(dimensions) or 0 in reader.shape:
        report.faults.append(f"{path}: found {reader.shape}, expected ({', '.join(dimensions)})")
        return None
    return reader


def blocks(reader: ArrayReader) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start, rows as float32) of an array, about BLOCK_BYTES at a time."""
    size = max(1, BLOCK_BYTES // max(1, reader.row_bytes))
    with tqdm(total=len(reader), desc=os.path.basename(reader.path), unit="row", leave=False, disable=None) as bar:
        for start in range(0, len(reader), size):
            rows = reader.read(start, size)
            yield start, rows.astype(np.float32, copy=False)
            bar.update(len(rows))


def sample_rows(reader: ArrayReader, n_images: int, n: int) -> np.ndarray:
    """Rows of at most n images, spread over an array that has one or more rows for each of n_images."""
    step = len(reader) // n_images
    images = np.unique(np.linspace(0, n_images - 1, n).astype(int))
    return np.concatenate([reader.read(int(image) * step) for image in images])
