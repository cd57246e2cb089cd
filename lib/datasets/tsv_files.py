"""Feature files with an image a line, tab-separated: bottom-up-attention's, LXMERT's and VinVL's."""

import base64
import binascii
import functools
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated

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


Count = Annotated[int, msgspec.Meta(ge=1, lt=MOST_PIXELS)]


# The JSON of VinVL's lines has one of two forms.
class VinvlObject(msgspec.Struct):
    rect: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    feature: str  # base64
    conf: float | None = None


class VinvlObjects(msgspec.Struct):
    image_h: Count
    image_w: Count
    objects: Annotated[list[VinvlObject], msgspec.Meta(min_length=1)]


class VinvlFeatures(msgspec.Struct):
    num_boxes: Count
    features: str  # base64 of (num_boxes, img_dim + 6), the last six values being the box from 0 to 1


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
    try:
        image = msgspec.json.decode(text, type=VinvlObjects if b'"objects"' in text else VinvlFeatures)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        expected = "expected objects with rect and feature, image_h and image_w, or num_boxes and features"
        raise InputError(f"found {brief(text)}, {expected} ({str(error).splitlines()[0][:100]})") from None
    if isinstance(image, VinvlFeatures):
        features = _floats(image.features.encode(), "features", image.num_boxes, img_dim + BOX_VALUES)
        return Regions(features[:, img_dim : img_dim + 4], features[:, :img_dim], (1, 1))
    features = np.concatenate([_floats(item.feature.encode(), "feature", 1, img_dim) for item in image.objects])
    boxes = np.array([item.rect for item in image.objects], dtype=np.float32)
    scores = [item.conf for item in image.objects]
    if len({score is None for score in scores}) > 1:
        raise InputError("conf of some objects only, expected one of each, or none")
    scores = None if scores[0] is None else np.array(scores, dtype=np.float32)
    return Regions(boxes, features, (image.image_h, image.image_w), scores)


def _count(digits, name):
    number = int(digits) if re.fullmatch(rb"\s*\d{1,12}\s*", digits) else 0
    if not 1 <= number < MOST_PIXELS:
        raise InputError(f"{name} is {brief(digits)}, expected 1 to {MOST_PIXELS}")
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
