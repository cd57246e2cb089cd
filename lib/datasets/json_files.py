"""JSON files: small ones read whole, the arrays of large ones item by item."""

import json
import os

import ijson
from tqdm import tqdm

from lib.errors import InputError, brief


def read_json(path, fits, expected, text=None):
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


def json_items(path, name):
    """Yield the items of the array called name in the object that a JSON file holds, one by one however large it is.

    name "": the file holds an array itself. Raises InputError where it is not JSON.
    """
    shown = {"desc": os.path.basename(path), "leave": False, "disable": None}
    with open(path, "rb") as file, tqdm.wrapattr(file, "read", total=os.path.getsize(path), **shown) as source:
        events = _shallow(ijson.parse(source, use_float=True, buf_size=8192))
        try:
            yield from ijson.items(events, f"{name}.item" if name else "item")
        except (ijson.JSONError, ValueError, RecursionError) as error:
            said = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            what, place = [*said.strip().splitlines(), "", ""][:2]  # the second line shows the text around it
            place = f" near {place.strip()}" if place.strip() else ""
            raise InputError(f"{path}: truncated or not JSON ({what.strip(' .')}{place})") from None


def _shallow(events):
    """ijson's events, up to where what they describe is nested too deeply to be real (and costs ijson minutes)."""
    for event in events:
        if len(event[0]) > 1000:
            raise ValueError("nested too deeply")
        yield event
