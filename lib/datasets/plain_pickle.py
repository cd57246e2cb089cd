"""Plain values in a pickle, read without running anything: numbers, texts, lists, tuples, dicts and NumPy arrays.

NumPy pickles arrays of objects (an `info` dict in an .npz file). Unpickling calls whatever a file names. Here these
names stand for the functions below, which build plain values and nothing else, and any other name is refused.
"""

import io
import pickle
import re
from typing import Any, ClassVar

import numpy as np

from lib.errors import InputError, brief

DTYPE = re.compile(r"[<>=|]?[?bBhHiIlLqQefd]|[<>=|]?[biufUS]\d{1,9}|O8?")


class Dtype:
    """Stands for a NumPy type while a pickle is read; what comes after it has the byte order."""

    def __init__(self, name, *_):
        if not isinstance(name, str) or not DTYPE.fullmatch(name):
            raise InputError(f"type {brief(name)}")
        self.dtype = np.dtype(name)


def _bytes(text="", encoding="latin-1"):
    """Bytes, which protocol 2 has as text."""
    return text.encode("latin-1")


def _empty(kind, shape, code):
    """An array; what comes after it has its shape and values."""
    return np.empty(0)


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


NAMES = {  # without numpy's inner package ("core" or "_core")
    "numpy.multiarray _reconstruct": _empty,
    "numpy ndarray": "ndarray",  # of _reconstruct, which makes no other kind
    "numpy dtype": Dtype,
    "numpy.multiarray scalar": _scalar,
    "numpy.numeric _frombuffer": _array,
    "_codecs encode": _bytes,
    "__builtin__ bytes": _bytes,
    "collections OrderedDict": dict,
}


class Unpickler(pickle._Unpickler):  # in Python: the one in C takes memory for any size or index that a file names
    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        found = NAMES.get(re.sub(r"^numpy\._?core\b", "numpy", module) + " " + name)
        if found is None:
            raise InputError(brief(f"{module}.{name}"))
        return found

    def load_build(self):
        """Give an array its shape and values, or a type its byte order; nothing else has a state."""
        state, value = self.stack.pop(), self.stack[-1]
        if isinstance(value, np.ndarray):
            _, shape, dtype, is_fortran, values = state
            array = _array(values, dtype, shape, "F" if is_fortran else "C")
            value.__setstate__(array.__reduce__()[2])
        elif isinstance(value, Dtype):
            if state[1] in ("<", ">"):
                value.dtype = value.dtype.newbyteorder(state[1])
        else:
            raise InputError(f"a state of {brief(value)}")

    dispatch[pickle.BUILD[0]] = load_build


def load(data: bytes) -> object:
    """The value in a pickle of plain types. Raises InputError for any other type, and for damaged data."""
    try:
        return Unpickler(io.BytesIO(data), encoding="latin-1").load()
    except InputError as error:
        raise InputError(f"pickle of {error}, expected numbers, texts, lists, dicts and arrays") from None
    except Exception as error:  # pickle and NumPy raise many kinds for damaged data
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"damaged pickle ({type(error).__name__}: {reason})") from None
