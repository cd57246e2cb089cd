"""The .npy files of a dataset folder, read and written a few rows at a time.

Plain reads and writes, no memory map: the pages of a map would count as memory of the process.
"""

import io
import os

import numpy as np
from tqdm import tqdm

from lib.errors import InputError
from lib.files import open_npy


class ArrayWriter:
    """An .npy file of shape (n, *row_shape), filled as PATH.part in any order; a row not written is 0."""

    def __init__(self, path, n, row_shape, dtype, resume=False):
        self.path, self.part, self.dtype, self.row_shape = path, path + ".part", np.dtype(dtype), tuple(row_shape)
        header = _npy_header((n, *self.row_shape), self.dtype)
        self.start = len(header)
        self.row_bytes = int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize
        size = self.start + n * self.row_bytes
        self.resumed = resume and os.path.isfile(self.part) and os.path.getsize(self.part) == size
        self.file = open(self.part, "r+b" if self.resumed else "w+b")
        if not self.resumed:
            self.file.write(header)
            self.file.truncate(size)

    def write(self, row, values):
        """Write values (m, *row_shape) to the rows row … row+m-1."""
        self.file.seek(self.start + row * self.row_bytes)
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())

    def sync(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def copy_rows(self, rows, path):
        """Write a new .npy file at path with these rows (an index array) alone."""
        with open(path, "wb") as file:
            file.write(_npy_header((len(rows), *self.row_shape), self.dtype))
            for row in tqdm(rows, desc=os.path.basename(self.path), unit="row", leave=False, disable=None):
                self.file.seek(self.start + row * self.row_bytes)
                file.write(self.file.read(self.row_bytes))
            file.flush()
            os.fsync(file.fileno())

    def commit(self):
        """Give the file its name."""
        self.sync()
        self.file.close()
        os.replace(self.part, self.path)


class ArrayReader:
    """Rows of an .npy file: shape, dtype, read."""

    def __init__(self, path):
        array = open_npy(path)
        if not isinstance(array, np.memmap):
            raise InputError(f"{path}: found {array.shape}, expected rows")
        self.path, self.shape, self.dtype, self.start = path, array.shape, array.dtype, array.offset
        self.row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        self.file = open(path, "rb", buffering=0) if array.flags.c_contiguous else None

    def __len__(self):
        return self.shape[0]

    def read(self, row, n=1):
        """The rows row … row+n-1 (n or as many as there are, *shape[1:])."""
        if self.file is None:  # Fortran order: a row lies all over the file
            return np.ascontiguousarray(open_npy(self.path)[row : row + n])
        self.file.seek(self.start + row * self.row_bytes)
        n = max(0, min(n, len(self) - row))
        data = self.file.read(n * self.row_bytes)
        return np.frombuffer(data, dtype=self.dtype).reshape(n, *self.shape[1:])


def _npy_header(shape, dtype):
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()
