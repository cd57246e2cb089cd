"""Plain values in a pickle, read without running anything: numbers, texts, lists, tuples, dicts and NumPy arrays.

NumPy pickles arrays of objects (an `info` dict in an .npz file). Unpickling calls whatever a file names. Here these
names stand for the classes below, which build plain values and nothing else, and any other name is refused.
"""

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from lib.errors import InputError, brief

DTYPE = re.compile(r"[<>=|]?[?bBhHiIlLqQefd]|[<>=|]?[biufUS]\d{1,9}|O8?")
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class Plain:
    """What a pickle may name. It has a __setstate__, without which a pickle could set its attributes."""

    def __setstate__(self, state):
        raise InputError("a state")


class Bytes(Plain):
    """Bytes, which protocol 2 has as text."""

    def __new__(cls, text="", encoding="latin-1"):
        return text.encode("latin-1")


class Dtype(Plain):
    """Stands for a NumPy type; its state has the byte order."""

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
            array = np.empty(len(values), dtype=object)
            for i, value in enumerate(values):
                array[i] = value
        else:
            array = np.frombuffer(Bytes(values) if isinstance(values, str) else values, dtype.dtype)
        return array.reshape(shape, order=order)


class Scalar(Plain):
    """A NumPy number or text."""

    def __new__(cls, dtype, data):
        return Values(data, dtype, ())[()]


class Kind(Plain):
    """The type of all arrays, which cannot be made without values."""

    def __init__(self, *_):
        raise InputError("an array without values")


class Array(np.ndarray):
    """An array; its state has its shape and values."""

    def __new__(cls, *_):
        return super().__new__(cls, 0)

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, values = state
        super().__setstate__(Values(values, dtype, shape, "F" if is_fortran else "C").__reduce__()[2])

    def __repr__(self):
        return repr(self.view(np.ndarray))


NAMES = {  # without numpy's inner package ("core" or "_core")
    "numpy.multiarray _reconstruct": Array,
    "numpy ndarray": Kind,
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
        for opcode, argument, _ in pickletools.genops(data):  # raises for a size beyond the end
            if opcode.name in PUTS and argument is not None and argument > len(data):  # the memo takes as much memory
                raise ValueError(f"{opcode.name} {argument}")
        return Unpickler(io.BytesIO(data), encoding="latin-1").load()  # noqa: S301 (it builds NAMES only)
    except InputError as error:
        raise InputError(f"pickle of {error}, expected numbers, texts, lists, dicts and arrays") from None
    except Exception as error:  # pickle and NumPy raise many kinds for damaged data
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"damaged pickle ({type(error).__name__}: {reason})") from None
