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


def json_items(path: str, name: str, kind: Any) -> Iterator[Any]:
    """Yield the items, each a msgspec.Struct of a kind, of the array called name in the object that a JSON file holds.

    name "": of the array that it holds. Memory: the size of the file and 64 bytes an item; the items become Python
    objects one by one. Raises InputError where the file is truncated or not JSON, holds no such array, or naming the
    item (from 0) that is of another kind.
    """
    with open(path, "rb") as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    array = list[msgspec.Raw]
    container: Any = msgspec.defstruct("Container", [("items", array)], rename={"items": name}) if name else array
    place, decode = path, msgspec.json.Decoder(kind).decode
    try:
        found = msgspec.json.decode(text, type=container)
        items = tqdm(found.items if name else found, os.path.basename(path), leave=False, disable=None)
        for number, item in enumerate(items):
            place, text = f"{path}: {name or 'detection'} {number}", item
            yield decode(item)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        if isinstance(error, msgspec.ValidationError):
            raise InputError(f"{place}: found {brief(bytes(text)[:100])} ({reason})") from None
        if byte := re.search(r"\(byte (\d+)\)", reason):
            start = max(0, int(byte[1]) - 20)
            reason += f" near {brief(bytes(text)[start : start + 40])}"
        raise InputError(f"{place}: truncated or not JSON ({reason})") from None
