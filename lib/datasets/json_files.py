"""JSON files: small ones read whole, the arrays of large ones item by item."""

import codecs
import os
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from tqdm import tqdm

from lib.errors import InputError, brief

# An escape in JSON: a surrogate pair, half of one or another.
ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(?P<half>u[dD][89a-fA-F]\w\w)|.)", re.DOTALL)
HALF, HALF_ESCAPED = "\uffff", rb"\uffff"  # what stands for half of a pair, which is no character


def read_object(path: str, expected: str) -> dict[str, Any]:
    """The object, not empty, in a small JSON file. Raises InputError, naming what was expected, for another file."""
    with open(path, "rb") as file:
        text = file.read()
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        value = {}
    if not value:
        raise InputError(f"{path}: found {brief(text)}, expected {expected}")
    return value


def json_items(path: str, name: str, kind: Any) -> Iterator[Any]:
    """Yield the items, each a msgspec.Struct of a kind, of the array called name in the object that a JSON file holds.

    name "": of the array that it holds. Memory: the size of the file and 64 bytes an item; the items become Python
    objects one by one. Half of a surrogate pair (an emoji cut in two) becomes HALF.
    Raises InputError where the file is truncated or not JSON, holds no such array, or naming the item (from 0) that is
    of another kind.
    """
    with open(path, "rb") as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    array = list[msgspec.Raw]
    container: Any = msgspec.defstruct("Container", [("items", array)], rename={"items": name}) if name else array
    place, decode = path, msgspec.json.Decoder(kind).decode
    try:
        try:
            found = msgspec.json.decode(text, type=container)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            text = ESCAPE.sub(lambda found: HALF_ESCAPED if found["half"] else found[0], text)
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
