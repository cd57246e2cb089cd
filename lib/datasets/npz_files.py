"""A picture's regions in an .npz file, or in .npy files, as extractors of regions write them.

Names differ between extractors; NAMES lists those known. Boxes, counts, sizes and scores may also stand in an object
array called `info` (a dict), in a file NAME_info.npy beside NAME.npy, or, boxes alone, in a second folder.
"""

import math
import os
import zipfile
from typing import Any

import numpy as np

from lib.datasets import plain_pickle
from lib.datasets.regions import Regions
from lib.errors import InputError, brief
from lib.files import open_npy

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
FOUR = 4  # corners of a box


def read_regions(path: str, boxes_path: str | None = None, size: tuple[float, float] | None = None) -> Regions:
    """The regions of the picture in path (.npz or .npy).

    boxes_path: an .npy of its boxes. size: (height, width) where the file may lack it. Features may stand as (D, R)
    where the boxes tell. Boxes that end at or before 1 are taken as shares of the picture.
    Raises InputError naming the file and what is malformed.
    """
    try:
        fields = _read_fields(path)
        if boxes_path is not None:
            fields["boxes"] = read_npy(boxes_path)
        return _regions(fields, size)
    except InputError as error:
        is_named = str(error).startswith((path, boxes_path or path))
        raise InputError(str(error) if is_named else f"{path}: {error}") from None


def read_npy(path: str) -> np.ndarray:
    """An array of an .npy file, also one of objects of plain types. Raises InputError naming the file."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            return _read_array(file, os.path.getsize(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_sizes(path: str) -> np.ndarray:
    """Image sizes (n, 2), height and width, of an .npy file: numbers, or objects that are dicts of image_h and image_w.

    Raises InputError naming the file, and the picture that lacks a size.
    """
    try:
        return open_npy(path)
    except InputError:
        array = read_npy(path)
        if not isinstance(array, np.ndarray) or array.dtype != object:
            raise
    sizes = np.empty((array.size, 2))
    for number, item in enumerate(array.ravel()):
        for column, field in enumerate(("height", "width")):
            name = next((name for name in NAMES[field] if isinstance(item, dict) and name in item), None)
            if name is None:
                raise InputError(f"{path}: picture {number}: found {brief(item)}, expected image_h and image_w")
            try:
                sizes[number, column] = _integer(item[name], name)
            except InputError as error:
                raise InputError(f"{path}: picture {number}: {error}") from None
    return sizes


def _read_fields(path):
    """{name in NAMES: value} of a picture's file."""
    if path.endswith(".npz"):
        arrays = _read_npz(path)
    else:
        arrays = {NAMES["features"][0]: read_npy(path)}
        info_path = path.removesuffix(".npy") + "_info.npy"
        if os.path.isfile(info_path):
            arrays[INFO] = read_npy(info_path)
    info = _info(arrays.get(INFO))
    return {
        field: next((source[name] for source in (arrays, info) for name in names if name in source), None)
        for field, names in NAMES.items()
    }


def _read_npz(path):
    """The arrays of an .npz file whose names are known."""
    known = {INFO, *(name for names in NAMES.values() for name in names)}
    arrays = {}
    try:
        with open(path, "rb") as zipped, zipfile.ZipFile(zipped) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in known:
                    with archive.open(member) as file:
                        arrays[name] = _read_array(file, member.file_size)
    except InputError:
        raise
    except OSError as error:
        if error.filename:  # it cannot be opened
            raise
        raise InputError(f"damaged .npz file ({error.strerror or error})") from None
    except Exception as error:  # zipfile and zlib each have their own
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"truncated or not an .npz file ({reason})") from None
    return arrays


def _read_array(file, n_bytes):
    """The array in an open .npy file of n_bytes."""
    if n_bytes > MOST_BYTES:
        raise InputError(f"an array of {n_bytes} bytes, expected a picture's")
    try:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read_header[version](file)
        if dtype.hasobject:
            return plain_pickle.load(file.read())
        size = math.prod(shape) * dtype.itemsize
        if size > n_bytes:
            raise InputError(f"truncated array, expected {size} bytes for {shape}")
        data = file.read(size)
        return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if is_fortran else "C")
    except InputError:
        raise
    except Exception as error:  # a broken header makes NumPy raise SyntaxError, tokenize's errors and more
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"truncated or not an array ({type(error).__name__}: {reason})") from None


def _info(value):
    """The dict that an object array of no dimensions holds; {} where there is none."""
    if isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        value = value.item()
    if value is None or isinstance(value, np.ndarray):
        return {}
    if not isinstance(value, dict):
        raise InputError(f"info is {brief(value)}, expected an object array of a dict")
    return value


def _regions(fields, size):
    features = _numbers(fields["features"], "features", 2)
    boxes = scores = None
    if fields["boxes"] is not None:
        boxes = _numbers(fields["boxes"], "boxes", 2)
        if boxes.shape[1] != FOUR:
            raise InputError(f"boxes {boxes.shape}, expected (R, 4)")
        if len(features) != len(boxes) == features.shape[1]:
            features = features.T
    count = len(features) if fields["count"] is None else _integer(fields["count"], "num_bbox")
    if not 1 <= count <= len(features) or (boxes is not None and len(boxes) < count):
        found = "" if boxes is None else f" and boxes {boxes.shape}"
        raise InputError(f"{count} regions (num_bbox) with features {features.shape}{found}")
    if boxes is not None and fields["count"] is None and len(boxes) != count:
        raise InputError(f"boxes {boxes.shape} with features {features.shape}, expected as many")
    if fields["scores"] is not None:
        scores = _numbers(fields["scores"], "scores", 1)
        scores = scores[:count] if len(scores) >= count else None
    features = features[:count]
    if boxes is None:
        return Regions(None, features, None, scores)
    return Regions(boxes[:count], features, _size(fields, boxes[:count], size), scores)


def _size(fields, boxes, size):
    if fields["height"] is not None and fields["width"] is not None:
        return _integer(fields["height"], "image_h"), _integer(fields["width"], "image_w")
    if size is None and boxes.max() <= 1:
        return 1, 1
    if size is None:
        raise InputError("no image_h and image_w in it, and boxes in pixels; --sizes gives them")
    return size


def _numbers(value, name, n_dims):
    """A finite float32 array with n_dims dimensions."""
    if value is None:
        raise InputError(f"no {name}, expected one of {', '.join(NAMES[name])}")
    if not isinstance(value, (np.ndarray, list)):
        raise InputError(f"{name} are {brief(value)}, expected an array")
    try:
        array = np.asarray(value)
        with np.errstate(over="ignore"):  # to infinite values, which are refused below
            array = array.astype(np.float32) if array.dtype.kind in "fiu" else None
    except (ValueError, OverflowError):
        array = None
    if array is None:
        raise InputError(f"{name} are {brief(value)}, expected numbers")
    if array.ndim != n_dims or not array.size:
        raise InputError(f"{name} {array.shape}, expected {n_dims} dimensions")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: NaN or infinite values")
    return array


def _integer(value: Any, name: str) -> int:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiu" or not 1 <= (number := array.item()) < 2**31:
        raise InputError(f"{name} is {brief(value)}, expected a number of at least 1")
    return int(number)
