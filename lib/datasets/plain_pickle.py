"""Plain values in a pickle, read without running anything: numbers, texts, lists, tuples, dicts and NumPy arrays.

NumPy pickles arrays of objects (an `info` dict in an .npz file). Unpickling calls whatever a file names. Here these
names stand for the functions below, which build plain values and nothing else, and any other name is refused.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from lib.errors import InputError, brief

DTYPE = re.compile(r"[<>=|]?[?bBhHiIlLqQefd]|[<>=|]?[biufUS]\d{1,9}|O8?")
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class Dtype:
    """Stands for a NumPy type; its state has the byte order."""

    def __init__(self, name, *_):
        if not isinstance(name, str) or not DTYPE.fullmatch(name):
            raise InputError(f"type {brief(name)}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray):
    """An array; its state has its shape and values."""

    def __new__(cls, *_):
        return super().__new__(cls, 0)

    def __setstate__(self, state):
        _, shape, dtype, is_fortran, values = state
        super().__setstate__(_array(values, dtype, shape, "F" if is_fortran else "C").__reduce__()[2])


def _array(values, dtype, shape, order="C"):
    """An array of raw bytes, or of a list of objects."""
    if dtype.dtype.hasobject:
        array = np.empty(len(values), dtype=object)
        for i, value in enumerate(values):
            array[i] = value
    else:
        array = np.frombuffer(_bytes(values) if isinstance(values, str) else values, dtype.dtype)
    return array.reshape(shape, order=order)


def _scalar(dtype, data):
    """A NumPy number or text."""
    return _array(data, dtype, ())[()]


def _bytes(text="", encoding="latin-1"):
    """Bytes, which protocol 2 has as text."""
    return text.encode("latin-1")


NAMES: dict[str, Callable] = {  # without numpy's inner package ("core" or "_core")
    "numpy.multiarray _reconstruct": Array,
    "numpy ndarray": Array,
    "numpy dtype": Dtype,
    "numpy.multiarray scalar": _scalar,
    "numpy.numeric _frombuffer": _array,
    "_codecs encode": _bytes,
    "__builtin__ bytes": _bytes,
    "collections OrderedDict": dict,
}


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        build = NAMES.get(re.sub(r"^numpy\._?core\b", "numpy", module) + " " + name)
        if build is None:
            raise InputError(brief(f"{module}.{name}"))
        return lambda *values: build(*values)  # not build itself, whose attributes a pickle could set


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
