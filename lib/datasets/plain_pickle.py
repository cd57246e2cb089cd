"""Plain values in a pickle, read without running anything: numbers, texts, lists, tuples, dicts and NumPy arrays.

NumPy pickles arrays of objects (an `info` dict in an .npz file). Unpickling calls whatever a file names. Here these
names stand for the classes below, which build plain values and nothing else, and any other name is refused.
"""

import codecs
import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from lib.errors import InputError, brief

DTYPE = re.compile(r"[<>=|]?[?bBhHiIlLqQefd]|[<>=|]?[biufUS]\d{1,9}|O8?")
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
FRAME_BYTES = 9  # of the instruction FRAME


class Plain:
    """What a pickle may name. It has a __setstate__, without which a pickle could set its attributes."""

    def __setstate__(self, state):
        raise InputError("a state")


class Bytes(Plain):
    """Bytes, which protocol 2 has as text."""

    def __new__(cls, text="", encoding="latin-1"):
        return codecs.encode(text, "latin-1")


class Dtype(Plain):
    """Stands for a NumPy type; the state has the byte order."""

    def __init__(self, name, *_):
        if not isinstance(name, str) or not DTYPE.fullmatch(name):
            raise InputError(f"type {brief(name)}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Values(Plain):
    """An array of raw bytes, or of a list of objects."""

    def __new__(cls, values, dtype, shape, order="C"):
        if dtype.dtype.hasobject:
            array = _objects(values)
        else:
            array = np.frombuffer(values.encode("latin-1") if isinstance(values, str) else values, dtype.dtype)
        return array.reshape(shape, order=order)


class Scalar(Plain):
    """A NumPy number or text."""

    def __new__(cls, dtype, data):
        return Values(data, dtype, ())[()]


class Array(Plain):
    """Stands for an array, which its state has."""

    def __init__(self, kind, shape, code):
        if kind is not Array:
            raise InputError(f"an array of {brief(kind)}")

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, values = state
        self.array = Values(values, dtype, shape, "F" if is_fortran else "C")


NAMES = {  # without numpy's inner package ("core" or "_core")
    "numpy.multiarray _reconstruct": Array,
    "numpy ndarray": Array,
    "numpy dtype": Dtype,
    "numpy.multiarray scalar": Scalar,
    "numpy.numeric _frombuffer": Values,
    "_codecs encode": Bytes,
    "__builtin__ bytes": Bytes,
    "collections OrderedDict": dict,
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = NAMES.get(re.sub(r"^numpy\._?core\b", "numpy", module) + " " + name)
        if found is None:
            raise InputError(brief(f"{module}.{name}"))
        return found


def load(data: bytes) -> object:
    """The value in a pickle of plain types. Raises InputError for any other type, and for damaged data."""
    try:
        pieces, start = [], 0
        instructions: Any = pickletools.genops(data)  # raises for a size beyond the end
        for opcode, argument, place in instructions:
            if opcode.name in PUTS and argument > len(data):  # the memo, a list, would take as much memory
                raise ValueError(f"{opcode.name} {argument}")
            if opcode.name == "FRAME":  # only a hint, and wrong ones upset the unpickler
                pieces.append(data[start:place])
                start = place + FRAME_BYTES
        file = io.BytesIO(b"".join([*pieces, data[start:]]))
        return _finish(Unpickler(file, encoding="latin-1").load(), {})  # noqa: S301 (it builds NAMES only)
    except InputError as error:
        raise InputError(f"pickle of {error}, expected numbers, texts, lists, dicts and arrays") from None
    except Exception as error:  # pickle and NumPy raise many kinds for damaged data
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"damaged pickle ({type(error).__name__}: {reason})") from None


def _objects(values):
    """An array (n,) of n objects, lists among them."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def _finish(value, seen):
    """A value with arrays in place of what stands for them. seen: {id: (value, finished)} of those met before."""
    if id(value) in seen:
        return seen[id(value)][1]
    finished = value.array if isinstance(value, Array) else value
    seen[id(value)] = value, finished
    if isinstance(finished, tuple):
        finished = tuple(_finish(item, seen) for item in finished)
    elif isinstance(finished, list):
        finished[:] = [_finish(item, seen) for item in finished]
    elif isinstance(finished, dict):
        finished.update((key, _finish(item, seen)) for key, item in list(finished.items()))
    elif isinstance(finished, np.ndarray) and finished.dtype == object:
        finished = _objects([_finish(item, seen) for item in finished.flat]).reshape(finished.shape)
    elif isinstance(finished, Plain) or isinstance(finished, type):
        raise InputError(f"an unfinished {brief(finished)}")
    seen[id(value)] = value, finished
    return finished
