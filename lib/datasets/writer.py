"""A split of a dataset folder, written row by row by a job of hours: a stopped run is continued, nothing is half done.

Each file is written as NAME.part. SPLIT_state.part says which rows are on disk; SPLIT_commit.part exists while the
files get their names, so that the next run can complete that. SPLIT_made.json records how a finished split was made.
"""

import contextlib
import json
import os
import sys
import time

import numpy as np

from lib.datasets.arrays import ArrayWriter
from lib.datasets.json_files import read_json
from lib.errors import InputError
from lib.files import digest_lines, make_folder, name_in_errors, read_lines, write_lines

try:
    import fcntl
except ImportError:  # Windows: two runs that write one split at once are not noticed there
    fcntl = None  # type: ignore[assignment]

SYNC_SECONDS = 10  # a killed run loses at most the rows of so many seconds
TEXTS = ("ids.txt", "caps.txt", "made.json")


class SplitWriter:
    """One split of a dataset folder: its arrays SPLIT_NAME.npy, SPLIT_ids.txt and SPLIT_made.json.

    ids: the pictures, a row each. arrays: {name: (row shape, dtype)}. settings: what else decides the rows' values.
    inputs: paths of the files they are made from.
    done (n,) bool: rows that this run or a stopped one before it has written.
    finished: a run with the same settings has made the files already; nothing is left to do.
    Raises InputError where files of these names were made otherwise, unless overwrite.
    """

    def __init__(self, folder, split, ids, arrays, settings, inputs=(), overwrite=False, write_ids=True):
        make_folder(folder)
        self.prefix, self.ids, self.overwrite, self.write_ids = (
            os.path.join(folder, split),
            list(ids),
            overwrite,
            write_ids,
        )
        self.done = np.zeros(len(self.ids), dtype=bool)
        self.arrays = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
        self.made = {
            "settings": dict(settings),
            "arrays": {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.arrays.items()},
            "ids": digest_lines(self.ids),
            "inputs": [[os.path.basename(path), os.path.getsize(path)] for path in inputs],
        }
        self.state_path, self.commit_path = self.prefix + "_state.part", self.prefix + "_commit.part"
        if os.path.exists(self.commit_path):
            self._commit()
        self.finished = not overwrite and self._is_finished()
        if not self.finished:
            self._open()

    def write(self, row, **values):
        """Write one row of every array."""
        for name, value in values.items():
            with name_in_errors(self.files[name].part):
                self.files[name].write(row, value)
        self.done[row] = True
        if time.monotonic() - self.synced > SYNC_SECONDS:
            self.sync()

    def sync(self):
        """Bring the rows to disk, then mark them as written."""
        for file in self.files.values():
            with name_in_errors(file.part):
                file.sync()
        with name_in_errors(self.state_path):
            self.state.seek(self.marks_start)
            self.state.write(self.done.tobytes())
            self.state.flush()
            os.fsync(self.state.fileno())
        self.synced = time.monotonic()

    def finish(self):
        """Give the files their names. Rows not done are left out, their lines in a SPLIT_caps.txt of this order too.

        Returns the number of rows kept. Raises InputError if that is none.
        """
        kept = np.flatnonzero(self.done)
        if not len(kept):
            raise InputError(f"{self.prefix}: none of the {len(self.ids)} pictures could be used")
        self.sync()
        if len(kept) < len(self.ids):
            for file in self.files.values():
                with name_in_errors(file.part):
                    file.copy_rows(kept, file.path + ".kept.part")
        ids = [self.ids[i] for i in kept]
        texts = {
            "ids.txt": ids if self.write_ids else None,
            "caps.txt": self._captions(kept),
            "made.json": [json.dumps({**self.made, "kept_ids": digest_lines(ids)}, indent=1)],
        }
        for name, lines in texts.items():
            if lines is not None:
                write_lines(f"{self.prefix}_{name}.part", lines)
        self._close()
        self.finished = True
        write_lines(self.commit_path, [])
        self._commit()
        return len(kept)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.finished:
            self.sync()
            self._close()

    def _is_finished(self):
        paths = [f"{self.prefix}_{name}.npy" for name in self.arrays]
        there = [path for path in paths if os.path.exists(path)]
        made, path = {}, self.prefix + "_made.json"
        if os.path.isfile(path):
            made = read_json(path, lambda made: isinstance(made, dict), "an object; --overwrite makes the split anew")
        same = all(made.get(name) == self.made[name] for name in ("settings", "arrays"))
        asked = made.get("ids") == self.made["ids"] and made.get("inputs") == self.made["inputs"]
        if len(there) == len(paths) and same and (asked or made.get("kept_ids") == self.made["ids"]):
            return True
        if there:
            raise InputError(f"{there[0]}: there already, and made otherwise; --overwrite replaces it")
        return False

    def _open(self):
        with open(self.state_path, "ab"):
            pass
        self.state = open(self.state_path, "r+b")
        _lock(self.state, self.state_path)
        head, marks = self.state.readline(), self.state.read()
        resume = not self.overwrite and _continues(self.state_path, head, self.made) and len(marks) == len(self.ids)
        self.files = {}
        for name, (shape, dtype) in self.arrays.items():
            path = f"{self.prefix}_{name}.npy"
            _remove(path + ".kept.part")
            with name_in_errors(path):
                self.files[name] = ArrayWriter(path, len(self.ids), shape, dtype, resume)
        for name in TEXTS:
            _remove(f"{self.prefix}_{name}.part")
        if resume and all(file.resumed for file in self.files.values()):
            self.done[:] = np.frombuffer(marks, dtype=np.uint8) == 1
        new_head = json.dumps(self.made).encode() + b"\n"
        self.marks_start = len(new_head)
        if new_head != head:
            self.state.seek(0)
            self.state.write(new_head + self.done.tobytes())
            self.state.truncate()
        self.sync()

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
            print(f"note: {path} is of other pictures, or in another order", file=sys.stderr)
            return None
        k = len(lines) // len(ids)
        return None if len(kept) == len(ids) else [line for i in kept for line in lines[i * k : (i + 1) * k]]

    def _commit(self):
        """Rename NAME.kept.part to NAME.part, and that to NAME; what a stopped run has renamed is passed over."""
        for name in [f"{name}.npy" for name in self.arrays] + [*TEXTS]:
            path = f"{self.prefix}_{name}"
            for source, target in ((path + ".kept.part", path + ".part"), (path + ".part", path)):
                if os.path.exists(source):
                    os.replace(source, target)
        _remove(self.state_path)
        _remove(self.commit_path)


def _lock(file, path):
    """Lock an open file against other processes, where the system can. Raises InputError where another one holds it."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another run is writing this split") from None


def _remove(path):
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _continues(path, head, made):
    """Whether the rows of a stopped run (head: its state's first line) are those of this one; new inputs may join."""
    if not head.endswith(b"\n"):  # there was none, or it was stopped while it wrote the line
        return False

    def fits(old):
        return isinstance(old, dict) and set(old) <= set(made) and isinstance(old.get("inputs"), list)

    old = read_json(path, fits, f"an object of {', '.join(made)}; --overwrite begins anew", head)
    inputs = old.pop("inputs")
    return all(entry in made["inputs"] for entry in inputs) and all(old[name] == made[name] for name in old)
