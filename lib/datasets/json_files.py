"""JSON files: small ones read whole, the arrays of large ones item by item."""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from tqdm import tqdm

from lib.errors import InputError, brief


def read_json(path: str, fits: Callable[[Any], bool], expected: str, text: bytes | None = None) -> Any:
    """The value in a small JSON file, or in text (bytes of it).

    fits(value) says whether it is of the right form. Raises InputError, naming what was expected, where it is not.
    """
    if text is None:
        with open(path, "rb") as file:
            text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON ({brief(text)}), expected {expected}") from None
    if not fits(value):
        raise InputError(f"{path}: found {brief(value)}, expected {expected}")
    return value


def json_items(path: str, name: str) -> Iterator[Any]:
    """Yield the items of the array called name in the object that a JSON file holds; none where there is no such array.

    name "": the file holds an array itself.
    Memory: the size of the file and 64 bytes an item; the items become Python objects one by one.
    Raises InputError where the file is truncated or not JSON.
    """
    with open(path, "rb") as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    array = list[msgspec.Raw]
    container: Any = msgspec.defstruct("Container", [("items", array, [])], rename={"items": name})
    try:
        items = msgspec.json.decode(text, type=container).items if name else msgspec.json.decode(text, type=array)
    except msgspec.ValidationError:
        return  # JSON of another form
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{path}: truncated or not JSON ({_describe(error, text)})") from None
    decode = msgspec.json.Decoder().decode
    for number, item in enumerate(tqdm(items, os.path.basename(path), leave=False, disable=None), 1):
        try:
            yield decode(item)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(
                f"{path}: item {number} of {name or 'the array'} is not JSON ({_describe(error, item)})"
            ) from None


def _describe(error, text):
    """The reason of a failed decoding, and the text around the byte that it names."""
    reason = str(error).splitlines()[0]
    place = re.search(r"\(byte (\d+)\)", reason)
    if place is None:
        return reason[:200]
    start = max(0, int(place[1]) - 20)
    return f"{reason} near {brief(bytes(text)[start : start + 40])}"
