"""Feature files with an image a line, tab-separated: bottom-up-attention's, LXMERT's and VinVL's."""

import base64
import binascii
import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator

import msgspec
import numpy as np
from tqdm import tqdm

from lib.datasets.regions import Regions
from lib.errors import InputError, brief

FIELDS = tuple("image_id image_w image_h num_boxes boxes features".split())
LXMERT_FIELDS = tuple(
    "image_id image_h image_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features".split()
)
VINVL_FIELDS = ("image_id", "json")
FORMS = {"bottom-up-attention's": FIELDS, "LXMERT's": LXMERT_FIELDS, "VinVL's": VINVL_FIELDS}  # {whose: columns}
SCORES = "objects_conf"  # a column of this name says how sure the detector was of each box
LONGEST_LINE = 1 << 26  # bytes; 100 regions are 1.1 MB
HEADER = {b"image_id", b"img_id", b"features"}  # names of columns
MOST_PIXELS = 1 << 31  # of a side
LINES_LOOKED_AT = 100  # to tell the form
BOX_VALUES = 6  # at the end of a VinVL feature: x1, y1, x2, y2, width, height from 0 to 1


def parse_fields(text: str) -> tuple[str, ...]:
    """The names of columns, separated by commas. Raises InputError where one of FIELDS is missing."""
    fields = tuple(text.replace("img_", "image_").split(","))
    if not set(FIELDS) <= set(fields):
        raise InputError(f"--fields {text}: expected {', '.join(FIELDS)} among them")
    return fields


def find_form(paths: list[str]) -> str:
    """The name in FORMS whose columns are as many as most of the first lines have. Raises InputError for others."""
    lines = itertools.islice(read_lines(paths, progress=False), LINES_LOOKED_AT)
    counts = Counter(len(values) for _, values in lines)  # a cut line glued to a whole one has others
    if not counts:
        raise InputError(f"{paths[0]}: no images, expected lines of {', '.join(FIELDS)}, tab-separated")
    n = counts.most_common(1)[0][0]
    found = next((name for name, fields in FORMS.items() if len(fields) == n), None)
    if found is None:
        known = "; ".join(f"{name} {len(fields)}: {', '.join(fields)}" for name, fields in FORMS.items())
        raise InputError(f"{paths[0]}: lines of {n} fields, expected {known}; --fields names columns")
    return found


def read_lines(paths: list[str], progress: bool = True) -> Iterator[tuple[str, list[bytes]]]:
    """Yield ("FILE, line N", fields) for every line except a first one with the columns' names."""
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=total, desc="TSV", unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for path in paths:
            with open(path, "rb") as file:
                for number, line in enumerate(iter(functools.partial(file.readline, LONGEST_LINE), b""), 1):
                    bar.update(len(line))
                    where = f"{path}, line {number}"
                    if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                        raise InputError(f"{where}: longer than {LONGEST_LINE} bytes, expected an image a line")
                    values = line.rstrip(b"\r\n").split(b"\t")
                    if number > 1 or not HEADER & set(values):
                        yield where, values


def image_id(values: list[bytes], fields: tuple[str, ...]) -> str:
    """The id of a line's image; "" where the line is too short."""
    column = fields.index("image_id")
    return values[column].decode("utf-8", "replace").strip() if column < len(values) else ""


def decode(values: list[bytes], fields: tuple[str, ...], img_dim: int) -> Regions:
    """The regions of a line with these columns. Raises InputError saying what is malformed."""
    return _decode_json(values[1], img_dim) if fields == VINVL_FIELDS else _decode_columns(values, fields, img_dim)


def _decode_columns(values, fields, img_dim):
    """Regions of boxes and features in base64 float32: (num_boxes, 4) and (num_boxes, img_dim)."""
    row = dict(zip(fields, values, strict=True))
    width, height, n = (_count(row[name], name) for name in ("image_w", "image_h", "num_boxes"))
    boxes = _floats(row["boxes"], "boxes", n, 4)
    features = _floats(row["features"], "features", n, img_dim)
    scores = _floats(row[SCORES], SCORES, n, 1)[:, 0] if SCORES in row else None
    return Regions(boxes, features, (height, width), scores)


def _decode_json(text, img_dim):
    """Regions of an object of VinVL's, of either form.

    {"image_h", "image_w", "objects": [{"rect": [x1, y1, x2, y2], "feature": base64, "conf"}, …]}
    {"num_boxes", "features": base64 of (num_boxes, img_dim + 6)}, the last six values being the box from 0 to 1
    """
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not JSON ({str(error).splitlines()[0][:100]})") from None
    try:
        if "objects" in value:
            return _decode_objects(value, img_dim)
        n = _count(value["num_boxes"], "num_boxes")
        features = _floats(value["features"].encode(), "features", n, img_dim + BOX_VALUES)
    except (KeyError, TypeError, AttributeError):
        expected = "expected objects with rect and feature, image_h and image_w, or num_boxes and features"
        raise InputError(f"found {brief(value)}, {expected}") from None
    return Regions(features[:, img_dim : img_dim + 4], features[:, :img_dim], (1, 1))


def _decode_objects(value, img_dim):
    objects = value["objects"]
    size = tuple(_count(value[name], name) for name in ("image_h", "image_w"))
    _count(len(objects), "number of objects")
    features = np.concatenate([_floats(item["feature"].encode(), "feature", 1, img_dim) for item in objects])
    try:
        boxes = np.array([item["rect"] for item in objects], dtype=np.float32).reshape(len(objects), 4)
        scores = np.array([item["conf"] for item in objects], dtype=np.float32) if "conf" in objects[0] else None
    except (ValueError, OverflowError):
        raise InputError("rect or conf: expected four numbers, and one") from None
    if scores is not None and scores.shape != (len(objects),):
        raise InputError("conf: expected a number")
    return Regions(boxes, features, size, scores)


def _count(value, name):
    """The number of at least 1 that an int, or digits (bytes), are."""
    number = int(value) if isinstance(value, bytes) and re.fullmatch(rb"\s*\d{1,12}\s*", value) else value
    if not isinstance(number, int) or not 1 <= number < MOST_PIXELS:
        raise InputError(f"{name} is {brief(value)}, expected 1 to {MOST_PIXELS}")
    return number


def _floats(text, name, n, dim):
    text = text.strip()
    if text[:2] in (b"b'", b'b"'):  # bytes that Python 3 printed
        text = text[2:-1]
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise InputError(f"{name} are not base64") from None
    if len(data) != 4 * n * dim:
        raise InputError(f"{name}: {len(data)} bytes, expected {4 * n * dim} ({n} × {dim} float32)")
    values = np.frombuffer(data, dtype="<f4").reshape(n, dim)
    if not np.isfinite(values).all():
        raise InputError(f"{name}: NaN or infinite values")
    return values
