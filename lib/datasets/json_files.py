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


def read_json(path: str, fits: Callable[[Any], bool], expected: str) -> Any:
    """The value in a small JSON file.

    fits(value) says whether it is of the right form. Raises InputError, naming what was expected, where it is not.
    """
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
    """Yield the items of the array called name in the object that a JSON file holds; name "": of the array it holds.

    Memory: the size of the file and 64 bytes an item; the items become Python objects one by one.
    Raises InputError where the file is truncated or not JSON, or holds no such array.
    """
    with open(path, "rb") as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    array = list[msgspec.Raw]
    kind: Any = msgspec.defstruct("Container", [("items", array)], rename={"items": name}) if name else array
    place = path
    try:
        found = msgspec.json.decode(text, type=kind)
        items = tqdm(found.items if name else found, os.path.basename(path), leave=False, disable=None)
        for number, item in enumerate(items, 1):
            place, text = f"{path}: item {number}", item
            yield msgspec.json.decode(item)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error, msgspec.ValidationError) and place == path:
            expected = f"an object with an array called {name}" if name else "an array"
            raise InputError(f"{path}: found {brief(text[:40])}, expected {expected}") from None
        reason = str(error).splitlines()[0][:200]
        if byte := re.search(r"\(byte (\d+)\)", reason):
            start = max(0, int(byte[1]) - 20)
            reason += f" near {brief(bytes(text)[start : start + 40])}"
        raise InputError(f"{place}: truncated or not JSON ({reason})") from None
