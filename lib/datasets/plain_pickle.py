"""Plain values in a pickle, read without running anything: numbers, texts, lists, tuples, dicts and NumPy arrays.

NumPy pickles arrays of objects (an `info` dict in an .npz file). Unpickling calls whatever the file names; here the
instructions are listed by pickletools and carried out by the tables below, and any other one is refused.
"""

import codecs
import pickletools
import re

import numpy as np

from lib.errors import InputError, brief

DTYPE = re.compile(r"[<>=|]?[?bBhHiIlLqQefd]|[<>=|]?[biufUS]\d{1,9}|O8?")
MARK = object()


class _Array:
    """An array of which the shape and the values are still to come. memo_keys: where the memo refers to it."""

    def __init__(self):
        self.memo_keys = []


class _Dtype:
    """A NumPy type of which the byte order is still to come."""

    def __init__(self, name):
        if not isinstance(name, str) or not DTYPE.fullmatch(name):
            raise InputError(f"type {brief(name)}")
        self.dtype = np.dtype(name)


def _array(values, dtype, shape, order="C"):
    """An array of raw bytes, or of a list of objects."""
    if dtype.hasobject:
        array = np.empty(len(values), dtype=object)
        array[:] = values
    else:
        array = np.frombuffer(values.encode("latin-1") if isinstance(values, str) else values, dtype=dtype)
    return array.reshape(shape, order=order)


def _reconstruct(kind, shape, code):
    if kind != "ndarray":
        raise InputError(f"an array of {brief(kind)}")
    return _Array()


# What a pickle may call, by module and name, without numpy's inner package ("core" or "_core").
FUNCTIONS = {
    "numpy.multiarray _reconstruct": _reconstruct,
    "numpy.multiarray scalar": lambda dtype, data: _array(data, dtype.dtype, ())[()],
    "numpy.numeric _frombuffer": lambda data, dtype, shape, order: _array(data, dtype.dtype, shape, order),
    "numpy dtype": lambda name, *_: _Dtype(name),
    "_codecs encode": lambda text, _: codecs.encode(text, "latin-1"),  # bytes in protocol 2
    "__builtin__ bytes": lambda: b"",  # no bytes, in protocol 2
    "collections OrderedDict": dict,
    "numpy ndarray": "ndarray",  # named as an argument only
}


def load(data: bytes) -> object:
    """The value in a pickle of plain types. Raises InputError for any other type, and for damaged data."""
    try:
        return _Machine().run(data)
    except InputError as error:
        raise InputError(f"pickle of {error}, expected numbers, texts, lists, dicts and arrays") from None
    except Exception as error:  # pickletools and NumPy raise many kinds for damaged data
        reason = str(error).partition("\n")[0][:100]
        raise InputError(f"damaged pickle ({type(error).__name__}: {reason})") from None


class _Machine:
    """The pickle's stack and memo. Each instruction NAME is a method or an entry of a table."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def run(self, data):
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                (value,) = self.stack
                if isinstance(value, (_Array, _Dtype)):
                    raise InputError("an unfinished array")
                return value
            if name in LITERALS:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name]())
            elif name in BUILDERS:
                BUILDERS[name](self)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self.put(len(self.memo) if name == "MEMOIZE" else argument)
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.push_function(*argument.split(" ", 1))
            elif name not in ("PROTO", "FRAME"):
                raise InputError(f"instruction {name}")
        raise ValueError("no end")

    def pop_to_mark(self):
        items = []
        while (item := self.stack.pop()) is not MARK:
            items.append(item)
        return items[::-1]

    def put(self, key):
        if isinstance(self.stack[-1], _Array):
            self.stack[-1].memo_keys.append(key)
        self.memo[key] = self.stack[-1]

    def push_function(self, module, name):
        function = FUNCTIONS.get(re.sub(r"^numpy\._?core\b", "numpy", module) + " " + name)
        if function is None:
            raise InputError(brief(f"{module}.{name}"))
        self.stack.append(function)

    def push_named(self):
        name, module = self.stack.pop(), self.stack.pop()
        self.push_function(str(module), str(name))

    def reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or not isinstance(arguments, tuple):  # only FUNCTIONS are callable
            raise InputError("an instruction REDUCE")
        self.stack.append(function(*arguments))

    def build(self):
        state, value = self.stack.pop(), self.stack.pop()
        if isinstance(value, _Dtype):
            if state[1] in ("<", ">"):
                value.dtype = value.dtype.newbyteorder(state[1])
            self.stack.append(value)
        elif isinstance(value, _Array):
            _, shape, dtype, is_fortran, values = state
            array = _array(values, dtype.dtype, shape, "F" if is_fortran else "C")
            self.stack.append(array)
            for key in value.memo_keys:
                self.memo[key] = array
        else:
            raise InputError("an instruction BUILD")

    def append(self, items):
        self._container(list).extend(items)

    def set_items(self, items):
        self._container(dict).update(zip(items[::2], items[1::2], strict=True))

    def _container(self, kind):
        if type(self.stack[-1]) is not kind:
            raise InputError(f"instructions for a {kind.__name__}")
        return self.stack[-1]

    def push(self, value):
        self.stack.append(value)

    def pop_many(self, count):
        items = self.stack[len(self.stack) - count :]
        if len(items) < count:
            raise IndexError("pop from empty stack")
        del self.stack[len(self.stack) - count :]
        return items


LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "MARK": lambda: MARK,
}
BUILDERS = {
    "POP": lambda machine: machine.stack.pop(),
    "POP_MARK": lambda machine: machine.pop_to_mark(),
    "DUP": lambda machine: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine: machine.push(tuple(machine.pop_many(1))),
    "TUPLE2": lambda machine: machine.push(tuple(machine.pop_many(2))),
    "TUPLE3": lambda machine: machine.push(tuple(machine.pop_many(3))),
    "LIST": lambda machine: machine.push(machine.pop_to_mark()),
    "DICT": lambda machine: machine.push(dict(zip(*[iter(machine.pop_to_mark())] * 2, strict=True))),
    "APPEND": lambda machine: machine.append(machine.pop_many(1)),
    "APPENDS": lambda machine: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine: machine.set_items(machine.pop_many(2)),
    "SETITEMS": lambda machine: machine.set_items(machine.pop_to_mark()),
    "STACK_GLOBAL": lambda machine: machine.push_named(),
    "REDUCE": lambda machine: machine.reduce(),
    "BUILD": lambda machine: machine.build(),
}
