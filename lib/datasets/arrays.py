"""The .npy files of a dataset folder, read and written a few rows at a time.

Plain reads and writes, no memory map: the pages of a map would count as memory of the process.
"""

import io
import math
import os

import numpy as np

from lib.errors import InputError
from lib.files import name_in_errors, open_npy


def npy_header(shape: tuple[int, ...], dtype: np.dtype | type) -> bytes:
    """The bytes before the values of an .npy file."""
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def open_rows(path: str) -> np.ndarray:
    """An .npy file of at least one row, for read_rows. Raises InputError where it is none."""
    array = open_npy(path)
    if 0 in (array.shape or (0,)):
        raise InputError(f"{path}: found {array.shape}, expected a row for each image")
    return array


def read_rows(array: np.ndarray, start: int, n: int = 1) -> np.ndarray:
    """The rows start … start+n-1 (n or as many as there are, …) of an array, read anew where it is mapped."""
    n = max(0, min(n, len(array) - start))
    path = getattr(array, "filename", None)
    if path is None:
        return array[start : start + n]
    if not array.flags.c_contiguous:  # Fortran order: a row lies all over the file
        return np.ascontiguousarray(open_npy(path)[start : start + n])
    place = getattr(array, "offset", 0) + start * array.strides[0]
    return np.fromfile(path, array.dtype, n * array[0].size, offset=place).reshape(n, *array.shape[1:])


def npy_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an .npy file."""
    return len(npy_header(shape, dtype)) + math.prod(shape) * dtype.itemsize


def has_part(path: str, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether PATH.part is there, of an array's full size, as ArrayFile leaves it."""
    return os.path.isfile(path + ".part") and os.path.getsize(path + ".part") == npy_size(shape, dtype)


class ArrayFile:
    """The file PATH.part, an .npy array whose rows are written in any order. A file that is there is gone on with."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype):
        self.path, self.part, self.shape, self.dtype = path, path + ".part", shape, dtype
        header = npy_header(shape, dtype)
        self.start, self.row_bytes = len(header), math.prod(shape[1:]) * dtype.itemsize
        with name_in_errors(self.part):
            self.file = open(self.part, "r+b" if os.path.exists(self.part) else "w+b")
            self.file.write(header)
            self.file.truncate(npy_size(shape, dtype))

    def write(self, row: int, values: np.ndarray) -> None:
        with name_in_errors(self.part):
            self.file.seek(self.start + row * self.row_bytes)
            self.file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())

    def sync(self) -> None:
        with name_in_errors(self.part):
            self.file.flush()
            os.fsync(self.file.fileno())

    def copy(self, rows: np.ndarray) -> None:
        """Write these rows alone to PATH.kept.part."""
        copy = ArrayFile(self.path + ".kept", (len(rows), *self.shape[1:]), self.dtype)
        for i, row in enumerate(rows):
            self.file.seek(self.start + row * self.row_bytes)
            copy.write(i, np.frombuffer(self.file.read(self.row_bytes), self.dtype))
        copy.sync()
        copy.file.close()
