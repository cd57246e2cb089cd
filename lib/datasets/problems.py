"""A report of what is wrong with an input, item by item."""

import os
import sys
from collections import Counter
from typing import TextIO

from tqdm import tqdm

from lib.files import make_folder

MOST_PRINTED = 20


class Problems:
    """Counts problems by kind, prints the first MOST_PRINTED lines and writes all of them to a file at once.

    The file, and its folder where there is none, are made for the first problem.
    """

    def __init__(self, path: str):
        self.path = path
        self.counts: Counter[str] = Counter()
        self.file: TextIO | None = None
        if os.path.exists(path):
            os.remove(path)

    def add(self, kind: str, where: str, what: str) -> None:
        if self.file is None:
            make_folder(os.path.dirname(self.path) or ".")
            self.file = open(self.path, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        self.counts[kind] += 1
        line = f"{where}: {kind}: {what}"
        self.file.write(line + "\n")
        if self.total <= MOST_PRINTED:
            tqdm.write(line, file=sys.stderr)
        elif self.total == MOST_PRINTED + 1:
            tqdm.write(f"… more of them in {self.path}", file=sys.stderr)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self):
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
