"""Read the items of a JSON file's arrays one by one, however large the file."""

import json
import os

from tqdm import tqdm

from errors import InputError

CHUNK = 1 << 20  # characters read at a time
DECODER = json.JSONDecoder()


def json_items(path, *names):
    """Yield (name, item) for each item of the arrays called names in the object that a JSON file holds.

    Only one item is in memory at a time. A file that holds an array instead yields ("", item) for its items.
    Raises InputError where the file is missing or not JSON.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    with (
        open(path, "rb") as file,
        tqdm(
            total=os.path.getsize(path),
            desc=os.path.basename(path),
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar,
    ):
        reader = _Reader(path, file, bar)
        if reader.peek() == "[":
            yield from (("", item) for item in reader.array())
            return
        reader.take("{")
        while reader.peek() != "}":
            name = reader.value()
            reader.take(":")
            if reader.peek() == "[":
                yield from ((name, item) for item in reader.array() if name in names)
            else:
                reader.value()
            if reader.peek() != "}":
                reader.take(",")


class _Reader:
    def __init__(self, path, file, bar):
        self.path, self.file, self.bar = path, file, bar
        self.text, self.at, self.end, self.rest = "", 0, False, b""

    def fill(self):
        data = self.file.read(max(CHUNK, len(self.text) - self.at))  # doubles while one value does not fit
        self.bar.update(len(data))
        self.end = not data
        data = self.rest + data
        cut = len(data)
        while cut and not self.end and data[cut - 1] & 0x80:  # not in the middle of a character
            cut -= 1
        try:
            self.text = self.text[self.at :] + data[:cut].decode("utf-8-sig" if not self.text else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: not UTF-8, expected JSON") from None
        self.rest, self.at = data[cut:], 0

    def peek(self):
        """The next character that is not blank, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.end:
                return self.text[self.at : self.at + 1]
            self.fill()

    def take(self, character):
        if self.peek() != character:
            raise InputError(f"{self.path}: not JSON, found {self.peek()!r} where {character!r} was expected")
        self.at += 1

    def value(self):
        """The next value, whole."""
        self.peek()
        while True:
            try:
                value, at = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.end:
                    raise InputError(f"{self.path}: truncated or not JSON ({error.msg})") from None
            except RecursionError:
                raise InputError(f"{self.path}: not JSON that a data set comes in (nested too deep)") from None
            else:
                if at < len(self.text) or self.end:  # a number may go on in the next chunk
                    self.at = at
                    return value
            self.fill()

    def array(self):
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")
