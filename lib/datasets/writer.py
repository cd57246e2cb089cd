"""A split of a dataset folder, written row by row by a job of hours: a stopped run is continued, nothing is half done.

Each file is written as NAME.part. SPLIT_state.part says which rows are on disk; once all are, it becomes
SPLIT_commit.part, and the files get their names: the next run completes that. SPLIT_made.json records what a finished
split was made from.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lib.datasets.arrays import ArrayFile, has_part
from lib.errors import InputError
from lib.files import digest_lines, lock, make_folder, name_in_errors, read_lines, sample_digest, write_lines

SYNC_SECONDS = 10  # a killed run loses at most the rows of so many seconds
SAMPLE = 64  # items, about, of many
NOTED = 3  # of each input: name, size, digest
TEXTS = ("ids.txt", "caps.txt", "made.json")


class Origin(NamedTuple):
    """What a split is made from: what a later run compares.

    settings: all that decides the rows' values. inputs: paths of files that all rows are made from. files: a function
    of an id → the paths of that image's own files.
    """

    settings: dict[str, Any]
    inputs: Sequence[str] = ()
    files: Callable[[str], Sequence[str]] = lambda image_id: ()


class SplitWriter:
    """One split of a dataset folder: its arrays SPLIT_NAME.npy, SPLIT_ids.txt and SPLIT_made.json.

    ids: the images, a row each. arrays: {name: (row shape, dtype)}.
    done (n,) bool: rows that this run or a stopped one before it has written.
    finished: a run of the same origin has made the files already; nothing is left to do.
    Raises InputError where files of these names were made otherwise, unless overwrite.
    """

    def __init__(self, folder, split, ids, arrays, origin, overwrite=False, write_ids=True):
        self.prefix, self.ids, self.write_ids = os.path.join(folder, split), list(ids), write_ids
        self.done = np.zeros(len(self.ids), dtype=bool)
        self.sources = list(map(origin.files, self.ids))
        self.arrays = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
        self.made = {
            "settings": origin.settings,
            "arrays": {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.arrays.items()},
            "ids": digest_lines(self.ids),
            "inputs": [note_of(path) for path in origin.inputs],
            "rows": self._digests(sample(range(len(self.ids)))),
        }
        self.state_path, self.commit_path = self.prefix + "_state.part", self.prefix + "_commit.part"
        if os.path.exists(self.commit_path):
            self._commit()
        self.finished = not overwrite and self._is_finished()
        if not self.finished:
            make_folder(folder)
            self._open(overwrite)

    def write(self, row, **values):
        """Write one row of every array."""
        for name, value in values.items():
            self.files[name].write(row, value)
        self.done[row] = True
        if time.monotonic() - self.synced > SYNC_SECONDS:
            self.sync()

    def sync(self):
        """Bring the rows to disk, then mark them as written."""
        for file in self.files.values():
            file.sync()
        with name_in_errors(self.state_path):
            self.state.seek(0)
            self.state.write(json.dumps(self.made).encode() + b"\n" + self.done.tobytes())
            self.state.truncate()
            self.state.flush()
            os.fsync(self.state.fileno())
        self.synced = time.monotonic()

    def finish(self):
        """Give the files their names. Rows not done are left out, their lines in a SPLIT_caps.txt of this order too.

        Returns the number of rows kept. Raises InputError if that is none.
        """
        kept = np.flatnonzero(self.done)
        if not len(kept):
            raise InputError(f"{self.prefix}: none of the {len(self.ids)} images could be used")
        self.sync()
        if len(kept) < len(self.ids):
            for file in self.files.values():
                file.copy(kept)
        ids = [self.ids[i] for i in kept]
        made = {**self.made, "rows": self._digests(sample(kept)), "kept_ids": digest_lines(ids)}
        texts = {"made.json": [json.dumps(made, indent=1)], "caps.txt": self._captions(kept)}
        if self.write_ids:
            texts["ids.txt"] = ids
        for name, lines in texts.items():
            if lines:
                write_lines(self._path(name) + ".part", lines)
        self._close()
        self.finished = True
        os.replace(self.state_path, self.commit_path)
        self._commit()
        return len(kept)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.finished:
            self.sync()
            self._close()

    def _path(self, name):
        return os.path.realpath(f"{self.prefix}_{name}")

    def _is_finished(self):
        there = [path for name in self.arrays if os.path.exists(path := f"{self.prefix}_{name}.npy")]
        if not there:
            return False
        with contextlib.suppress(FileNotFoundError), open(self.prefix + "_made.json", "rb") as file:
            if len(there) == len(self.arrays) and self._fits(file.read()):
                return True
        raise InputError(f"{there[0]}: there already, and made otherwise; --overwrite replaces it")

    def _fits(self, record):
        """Whether the record (bytes of JSON) of an earlier run says the same, and its inputs are as they were.

        There may be more inputs now. Records of older versions have no digests of inputs and rows, which is said.
        """
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            made = json.loads(record)
            noted = made.get("rows", {})
            sources = self._digests(row for row, image_id in enumerate(self.ids) if image_id in noted)
            fits = (
                all(made[name] == self.made[name] for name in ("settings", "arrays"))
                and self.made["ids"] in (made["ids"], made.get("kept_ids"))
                and all(any(old == new[: len(old)] for new in self.made["inputs"]) for old in made["inputs"])
                and sources.items() <= noted.items()
            )
            if fits and ("rows" not in made or any(len(note) < NOTED for note in made["inputs"])):
                print(f"note: {self.prefix}: kept, though there is no digest of what it was made from")
            return fits
        return False  # no record, or of another form

    def _digests(self, rows):
        """{id: digest of the sources} of those rows that have some."""
        return {self.ids[row]: digest_lines(map(sample_digest, self.sources[row])) for row in rows if self.sources[row]}

    def _open(self, overwrite):
        self.state = open(os.open(self.state_path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        lock(self.state, f"{self.state_path}: another run is writing this split")
        head, marks = self.state.readline(), self.state.read()
        files = {
            name: (self._path(name + ".npy"), (len(self.ids), *shape), dtype)
            for name, (shape, dtype) in self.arrays.items()
        }
        is_whole = len(marks) == len(self.ids) and all(has_part(*file) for file in files.values())
        if is_whole and not overwrite and self._fits(head):
            self.done[:] = np.frombuffer(marks, dtype=np.uint8) == 1
        elif head and not overwrite:
            print(f"note: {self.prefix}: begun anew, the stopped run was of other settings or inputs")
        self.files = {}
        self.sync()  # before the arrays: rows of the stopped run no longer count
        for name, file in files.items():
            self.files[name] = ArrayFile(*file)
            _remove(file[0] + ".kept.part")
        for name in TEXTS:
            _remove(self._path(name) + ".part")

    def _close(self):
        for file in self.files.values():
            file.file.close()
        self.state.close()

    def _captions(self, kept):
        """The lines of SPLIT_caps.txt that belong to the kept rows; None where it needs no change."""
        path, ids_path = self.prefix + "_caps.txt", self.prefix + "_ids.txt"
        if not os.path.isfile(path):
            return None
        lines = read_lines(path)
        ids = read_lines(ids_path) if os.path.isfile(ids_path) else self.ids
        if ids != self.ids or len(lines) % len(ids):
            print(f"note: {path} is of other images, or in another order", file=sys.stderr)
            return None
        k = len(lines) // len(ids)
        return None if len(kept) == len(ids) else [line for i in kept for line in lines[i * k : (i + 1) * k]]

    def _commit(self):
        """Rename NAME.kept.part to NAME.part, and that to NAME; what a stopped run has renamed is passed over."""
        for name in [f"{name}.npy" for name in self.arrays] + [*TEXTS]:
            path = self._path(name)
            for source, target in ((path + ".kept.part", path + ".part"), (path + ".part", path)):
                if os.path.exists(source):
                    os.replace(source, target)
        _remove(self.commit_path)


def sample(items: Iterable[Any]) -> list:
    """Some of many items, spread over them."""
    items = list(items)
    return items[:: len(items) // SAMPLE + 1]


def note_of(path: str) -> list:
    """What a record keeps of a file that something is made from: its name, size and digest."""
    return [os.path.basename(path), os.path.getsize(path), sample_digest(path)]


def _remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
