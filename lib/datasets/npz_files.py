"""An image's regions in an .npz file, or in .npy files, as extractors of regions write them.

Names differ between extractors; NAMES lists those known. Boxes, counts, sizes and scores may also stand in an object
array called `info` (a dict), in a file NAME_info.npy beside NAME.npy, or, boxes alone, in a second folder.
"""

import math
import os
import zipfile
from collections.abc import Collection
from typing import Any

import numpy as np

from lib.datasets import plain_pickle
from lib.datasets.regions import Regions, are_shares
from lib.errors import InputError, brief

NAMES = {
    "features": ("x", "feat", "features", "image_features"),
    "boxes": ("bbox", "boxes", "bboxes"),
    "height": ("image_h", "image_height", "height"),
    "width": ("image_w", "image_width", "width"),
    "count": ("num_bbox", "num_boxes"),
    "scores": ("objects_conf", "object_conf", "scores"),
}
INFO = "info"
MOST_BYTES = 1 << 28  # in an array; 100 regions of 2,048 values are 0.8 MB


def read_regions(path: str, boxes_path: str | None = None, size: tuple[float, float] | None = None) -> Regions:
    """The regions of the image in path (.npz or .npy).

    boxes_path: an .npy of its boxes. size: (height, width) where the file may lack it. Features may stand as (D, R)
    where the boxes tell. Shares of an image of which no size is known are those of a square.
    Raises InputError naming the file and what is malformed.
    """
    fields = _read_fields(path)
    features = _numbers(path, "features", fields["features"], 2)
    scores = None if fields["scores"] is None else _numbers(path, "scores", fields["scores"], 1)
    if boxes_path is not None:
        fields["boxes"] = read_npy(boxes_path)
    boxes = None if fields["boxes"] is None else _numbers(boxes_path or path, "boxes", fields["boxes"], 2)
    if boxes is not None and len(features) != len(boxes) == features.shape[1]:
        features = features.T
    count = len(features) if fields["count"] is None else _integer(path, "num_bbox", fields["count"])
    n_boxes = count if boxes is None else len(boxes)
    if count > len(features) or count > n_boxes or (fields["count"] is None and count < n_boxes):
        found = "" if boxes is None else f" and boxes {boxes.shape}"
        raise InputError(f"{path}: {count} regions (num_bbox) with features {features.shape}{found}")
    if scores is not None:
        scores = scores[:count] if len(scores) >= count else None
    if boxes is None:
        return Regions(None, features[:count], None, scores)
    if boxes.shape[1] != 4:
        raise InputError(f"{boxes_path or path}: boxes {boxes.shape}, expected (R, 4)")
    size = _size(path, fields) or size or ((1, 1) if are_shares(boxes) else None)
    if size is None:
        raise InputError(f"{path}: no image_h and image_w in it, and boxes in pixels; --sizes gives them")
    return Regions(boxes[:count], features[:count], size, scores)


def read_npy(path: str) -> Any:
    """An array of an .npy file, also one of objects of plain types. Raises InputError naming the file."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        return _read_array(path, file, os.path.getsize(path))


def read_sizes(path: str) -> np.ndarray:
    """Image sizes (n, 2), height and width, of an .npy file: numbers, or objects that are dicts of image_h and image_w.

    Raises InputError naming the file, and the image that lacks a size.
    """
    array = read_npy(path)
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: found {brief(array)}, expected an array")
    if array.dtype.kind in "fiu":
        return array
    sizes = np.empty((array.size, 2))
    for number, item in enumerate(array.flat):
        where = f"{path}: image {number}"
        size = _size(where, known_names(item)) if isinstance(item, dict) else None
        if size is None:
            raise InputError(f"{where}: found {brief(item)}, expected image_h and image_w")
        sizes[number] = size
    return sizes


def read_npz(path: str, names: Collection[str], most_bytes: float = MOST_BYTES) -> dict[str, Any]:
    """Those arrays of an .npz file that are among names; what stands for an array of objects is of plain types.

    most_bytes: of an array. Raises InputError naming the file.
    """
    arrays = {}
    try:
        with open(path, "rb") as zipped, zipfile.ZipFile(zipped) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in names:
                    with archive.open(member) as file:
                        arrays[name] = _read_array(path, file, member.file_size, most_bytes)
    except InputError:
        raise
    except Exception as error:  # zipfile and zlib each have their own
        if getattr(error, "filename", None):  # it cannot be opened
            raise
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"{path}: truncated or not an .npz file ({reason})") from None
    return arrays


def known_names(values: dict[str, Any], names: dict[str, tuple[str, ...]] = NAMES) -> dict[str, Any]:
    """{field: the value of the first of its names, None where there is none}. names: {field: its names}."""
    return {field: next((values[name] for name in names[field] if name in values), None) for field in names}


def _read_fields(path):
    """{name in NAMES: value, None where there is none} of an image's file."""
    if path.endswith(".npz"):
        arrays = read_npz(path, {INFO}.union(*NAMES.values()))
    else:
        arrays = {NAMES["features"][0]: read_npy(path)}
        info_path = path.removesuffix(".npy") + "_info.npy"
        if os.path.isfile(info_path):
            arrays[INFO] = read_npy(info_path)
    info = arrays.get(INFO, {})
    if isinstance(info, np.ndarray):
        info = info.item() if info.dtype == object and info.size == 1 else {}
    if not isinstance(info, dict):
        raise InputError(f"{path}: info is {brief(info)}, expected an object array of a dict")
    return known_names({**info, **arrays})


def _read_array(path, file, n_bytes, most_bytes=MOST_BYTES):
    """The array in an open .npy file of n_bytes."""
    if n_bytes > most_bytes:
        raise InputError(f"{path}: an array of {n_bytes} bytes, expected an image's")
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](file)
        if dtype.hasobject:
            return plain_pickle.load(file.read())
        size = math.prod(shape) * dtype.itemsize
        if size > n_bytes:
            raise InputError(f"truncated array, expected {size} bytes for {shape}")
        return np.frombuffer(file.read(size), dtype=dtype).reshape(shape, order="F" if is_fortran else "C")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a broken header makes NumPy raise SyntaxError, tokenize's errors and more
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"{path}: truncated or not an array ({type(error).__name__}: {reason})") from None


def _size(where, fields):
    """(height, width) that an image's fields hold, or None."""
    if fields["height"] is None or fields["width"] is None:
        return None
    return _integer(where, "image_h", fields["height"]), _integer(where, "image_w", fields["width"])


def _numbers(path, name, value, n_dims):
    """A finite float32 array with n_dims dimensions."""
    if value is None:
        raise InputError(f"{path}: no {name}, expected one of {', '.join(NAMES[name])}")
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise InputError(f"{path}: {name} are {brief(value)}, expected an array of numbers")
    if value.ndim != n_dims or not value.size:
        raise InputError(f"{path}: {name} {value.shape}, expected {n_dims} dimensions")
    with np.errstate(over="ignore"):  # to infinite values, which are refused
        array = value.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {name}: NaN or infinite values")
    return array


def _integer(where: str, name: str, value: Any) -> int:
    array = np.asarray(value if isinstance(value, (int, float, np.generic, np.ndarray)) else None)
    if array.size != 1 or array.dtype.kind not in "fiu" or not 1 <= (number := array.item()) < 2**31:
        raise InputError(f"{where}: {name} is {brief(value)}, expected a number of at least 1")
    return int(number)
