"""A split of a dataset folder, written row by row and never half done.

A file is written as NAME.part and gets its name when it is whole. Which rows a stopped run had written
lies beside it in SPLIT_state.part; how a finished split was made, in SPLIT_made.json.
"""

import fcntl
import hashlib
import json
import os
import sys
import time

import numpy as np

from lib.datasets.arrays import ArrayWriter
from lib.datasets.json_files import read_json
from lib.errors import InputError
from lib.files import make_folder, name_in_errors, read_lines, write_lines

SYNC_SECONDS = 10  # a killed run loses at most the rows of so many seconds


class SplitWriter:
    """One split of a dataset folder: its arrays SPLIT_NAME.npy and its SPLIT_ids.txt.

    ids: the pictures, a row each. arrays: {name: (row shape, dtype)}. settings: what else decides the rows' values.
    inputs: paths they are made from. done (n,) bool: rows that this run or a stopped one before it has written.
    finished: a run with these settings has made the files already, and nothing is left to do.
    Raises InputError where files of these names lie there that were made otherwise, unless overwrite.
    """

    def __init__(self, folder, split, ids, arrays, settings, inputs=(), overwrite=False, write_ids=True):
        make_folder(folder)
        self.write_ids = write_ids
        self.prefix, self.ids, self.overwrite = os.path.join(folder, split), list(ids), overwrite
        self.done = np.zeros(len(self.ids), dtype=bool)
        self.arrays = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}
        self.made = {
            "settings": dict(settings),
            "arrays": {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.arrays.items()},
            "ids": digest_lines(self.ids),
            "inputs": [[os.path.basename(path), os.path.getsize(path)] for path in inputs],
        }
        self.state_path = self.prefix + "_state.part"
        self._commit()  # where a run was stopped while it renamed
        self.finished = not overwrite and self._is_finished()
        if not self.finished:
            self._open()

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
        self.state = open(os.open(self.state_path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(self.state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.state_path}: another run is writing this split") from None
        old, marks = self.state.readline(), self.state.read()
        resume = not self.overwrite and _continues(self.state_path, old, self.made) and len(marks) == len(self.ids)
        self.files = {}
        for name, (shape, dtype) in self.arrays.items():
            path = f"{self.prefix}_{name}.npy"
            with name_in_errors(path):
                self.files[name] = ArrayWriter(path, len(self.ids), shape, dtype, resume)
        if resume and all(file.resumed for file in self.files.values()):
            self.done[:] = np.frombuffer(marks, dtype=np.uint8) == 1
        head = json.dumps(self.made).encode() + b"\n"
        self.marks_at = len(head)
        if head != old:
            self.state.seek(0)
            self.state.write(head + self.done.tobytes())
            self.state.truncate()
        self.sync()

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
            self.state.seek(self.marks_at)
            self.state.write(self.done.tobytes())
            self.state.flush()
            os.fsync(self.state.fileno())
        self.synced = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.finished:
            self.sync()
            self.state.close()

    def finish(self):
        """Name the files. Rows not done are left out, of SPLIT_ids.txt and of a SPLIT_caps.txt in this order too.

        Returns the number of rows kept. Raises InputError if that is none.
        """
        kept = np.flatnonzero(self.done)
        if not len(kept):
            raise InputError(f"{self.prefix}: none of the {len(self.ids)} pictures could be used")
        self.sync()
        all_kept = len(kept) == len(self.ids)
        rename = {}
        for file in self.files.values():
            rename[file.path] = file.part
            if not all_kept:
                rename[file.path] = file.path + ".kept.part"
                with name_in_errors(rename[file.path]):
                    file.copy_rows(kept, rename[file.path])
        ids = [self.ids[i] for i in kept]
        texts = {"ids.txt": ids, "made.json": [json.dumps({**self.made, "kept_ids": digest_lines(ids)}, indent=1)]}
        if captions := self._captions(kept):
            texts["caps.txt"] = captions
        if not self.write_ids:
            del texts["ids.txt"]
        for name, lines in texts.items():
            rename[f"{self.prefix}_{name}"] = f"{self.prefix}_{name}.new.part"
            with name_in_errors(rename[f"{self.prefix}_{name}"]):
                write_lines(rename[f"{self.prefix}_{name}"], lines)
        self.finished = True
        for file in self.files.values():
            file.file.close()
        # from here on a stopped run is completed by the next one
        write_lines(self.prefix + "_commit", [json.dumps([[os.path.basename(x) for x in p] for p in rename.items()])])
        self._commit()
        self.state.close()
        return len(kept)

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
        path = self.prefix + "_commit"
        if not os.path.isfile(path):
            return
        folder, split = os.path.split(self.prefix)

        def fits(pairs):
            return isinstance(pairs, list) and all(_is_rename(pair, split) for pair in pairs)

        for name, part in read_json(path, fits, f"pairs of {split}_NAME and its .part to rename; delete it to go on"):
            if os.path.exists(os.path.join(folder, part)):
                os.replace(os.path.join(folder, part), os.path.join(folder, name))
        for part in [self.state_path, *(f"{self.prefix}_{name}.npy.part" for name in self.arrays)]:
            if os.path.exists(part):
                os.remove(part)
        os.remove(path)


def digest_lines(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_rename(pair, split):
    """Whether pair is a file's name and that of its part, of this split and in its folder: nothing else is renamed."""
    match pair:
        case [str(name), str(part)]:
            own = name.startswith(split + "_") and "/" not in name
            return own and part in [name + end for end in (".part", ".kept.part", ".new.part")]
    return False


def _continues(path, line, made):
    """Whether the rows of a stopped run (line, its state's first) are those of this one. More inputs are welcome."""
    if not line.endswith(b"\n"):  # none, or stopped while it wrote that
        return False

    def fits(old):
        return isinstance(old, dict) and set(old) <= set(made) and isinstance(old.get("inputs"), list)

    old = read_json(path, fits, f"an object of {', '.join(made)}; --overwrite begins anew", line)
    inputs = old.pop("inputs")
    return all(entry in made["inputs"] for entry in inputs) and all(old[name] == made[name] for name in old)
