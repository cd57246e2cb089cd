"""What the dataset tools share: id lists, problem lists, and a split written row by row, never half done.

A file is written as NAME.part and gets its name when it is whole. Which rows a stopped run had written
lies beside it in SPLIT_state.part; how a finished split was made, in SPLIT_made.json.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter

import ijson
import numpy as np
from tqdm import tqdm

from lib.datasets.array_files import ArrayFile
from lib.errors import InputError, brief
from lib.files import read_lines, write_lines

SPLITS = ("train", "dev", "test", "testall")
PICTURE = re.compile(r"\.(jpe?g|png|bmp|gif|webp|tiff?|ppm|pgm)$", re.IGNORECASE)
SYNC_SECONDS = 10  # a killed run loses at most the rows of so many seconds
SHOWN = 20  # problems printed; all of them lie in the problems file


def key(image_id):
    """What two names of one picture have in common: "7", "007.jpg" and "COCO_val2014_000000000007.jpg" are all "7"."""
    name = PICTURE.sub("", str(image_id).strip())
    name = re.sub(r"^(.*/)?COCO_(train|val|test)\d{4}_(?=\d+$)", "", name)
    return (name.lstrip("0") or "0") if name.isdecimal() else name


def make_folder(path):
    """Make the folder path where there is none. Raises InputError where something else has that name."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{path}: is no folder, expected one or a free name")
    os.makedirs(path, exist_ok=True)


@contextlib.contextmanager
def naming(path):
    """What cannot be written inside is told with the path: an error of a full disk does not say of which file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def json_items(path, name):
    """Yield the items of the array called name in the object that a JSON file holds, one by one however large it is.

    Raises InputError where it is not JSON.
    """
    shown = {"desc": os.path.basename(path), "leave": False, "disable": None}
    with open(path, "rb") as file, tqdm.wrapattr(file, "read", total=os.path.getsize(path), **shown) as source:
        try:
            yield from ijson.items(shallow(ijson.parse(source, use_float=True, buf_size=8192)), name + ".item")
        except (ijson.JSONError, ValueError, RecursionError) as error:
            said = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            what, place = [*said.strip().splitlines(), "", ""][:2]  # the second line shows the text around it
            place = f" near {place.strip()}" if place.strip() else ""
            raise InputError(f"{path}: truncated or not JSON ({what.strip(' .')}{place})") from None


def shallow(events):
    """ijson's events, up to where what they describe is nested too deeply to be real (and costs ijson minutes)."""
    for event in events:
        if len(event[0]) > 1000:
            raise ValueError("nested too deeply")
        yield event


def read_ids(path, problems):
    """Ids (list of str) of an id list, one a line; empty and doubled lines go to problems and are left out.

    A list that repeats every id k times in a row (once per caption) counts as one id per k lines.
    """
    lines = read_lines(path)
    starts = [i for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]
    runs = set(np.diff([*starts, len(lines)]).tolist())
    if len(runs) == 1 and runs != {1} and len(set(lines)) == len(starts) > 1:
        return [lines[i] for i in starts]
    ids, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line:
            problems.add("malformed", f"{path}, line {number}", "an empty line, expected an id")
        elif key(line) in seen:
            problems.add("doubled", f"{path}, line {number}", f"id {line} stands in line {seen[key(line)]} already")
        else:
            seen[key(line)] = number
            ids.append(line)
    if not ids:
        raise InputError(f"{path}: no ids, expected one a line")
    return ids


def split_ids(folder, given, problems):
    """Which pictures, in which order: {split: list of ids}.

    given: SPLIT=FILE strings; where there are none, the SPLIT_ids.txt that lie in folder.
    """
    files = {}
    for text in given or ():
        split, _, path = text.partition("=")
        if split not in SPLITS or not path:
            raise InputError(f"--ids {text}: expected SPLIT=FILE, SPLIT one of {', '.join(SPLITS)}")
        files[split] = path
    if not files:
        paths = {split: os.path.join(folder, f"{split}_ids.txt") for split in SPLITS}
        files = {split: path for split, path in paths.items() if os.path.isfile(path)}
    if not files:
        raise InputError(f"{folder}: no SPLIT_ids.txt, expected one there or --ids SPLIT=FILE")
    return {split: read_ids(path, problems) for split, path in files.items()}


class Problems:
    """What is wrong with an input: counted by kind, the first few printed, all of them written to a file at once."""

    def __init__(self, path):
        self.path, self.counts, self.file = path, Counter(), None
        if os.path.exists(path):
            os.remove(path)

    def add(self, kind, where, what):
        self.counts[kind] += 1
        line = f"{where}: {kind}: {what}"
        self.file = self.file or open(self.path, "w", encoding="utf-8", buffering=1)
        self.file.write(line + "\n")
        if self.total <= SHOWN:
            tqdm.write(line, file=sys.stderr)
        elif self.total == SHOWN + 1:
            tqdm.write(f"… more of them in {self.path}", file=sys.stderr)

    @property
    def total(self):
        return sum(self.counts.values())

    def __str__(self):
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items())


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
            "ids": digest(self.ids),
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
            made = read_note(path, lambda made: isinstance(made, dict), "an object; --overwrite makes the split anew")
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
            with naming(path):
                self.files[name] = ArrayFile(path, len(self.ids), shape, dtype, resume)
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
            with naming(self.files[name].part):
                self.files[name].write(row, value)
        self.done[row] = True
        if time.monotonic() - self.synced > SYNC_SECONDS:
            self.sync()

    def sync(self):
        """Bring the rows to disk, then mark them as written."""
        for file in self.files.values():
            with naming(file.part):
                file.sync()
        with naming(self.state_path):
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
                with naming(rename[file.path]):
                    file.copy_rows(kept, rename[file.path])
        ids = [self.ids[i] for i in kept]
        texts = {"ids.txt": ids, "made.json": [json.dumps({**self.made, "kept_ids": digest(ids)}, indent=1)]}
        if captions := self._captions(kept):
            texts["caps.txt"] = captions
        if not self.write_ids:
            del texts["ids.txt"]
        for name, lines in texts.items():
            rename[f"{self.prefix}_{name}"] = f"{self.prefix}_{name}.new.part"
            with naming(rename[f"{self.prefix}_{name}"]):
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

        for name, part in read_note(path, fits, f"pairs of {split}_NAME and its .part to rename; delete it to go on"):
            if os.path.exists(os.path.join(folder, part)):
                os.replace(os.path.join(folder, part), os.path.join(folder, name))
        for part in [self.state_path, *(f"{self.prefix}_{name}.npy.part" for name in self.arrays)]:
            if os.path.exists(part):
                os.remove(part)
        os.remove(path)


def digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_rename(pair, split):
    """Whether pair is a file's name and that of its part, of this split and in its folder: nothing else is renamed."""
    match pair:
        case [str(name), str(part)]:
            own = name.startswith(split + "_") and "/" not in name
            return own and part in [name + end for end in (".part", ".kept.part", ".new.part")]
    return False


def read_note(path, fits, expected, text=None):
    """The JSON in the file path (or in text, bytes of it). Raises InputError where it is none that fits, a function."""
    if text is None:
        with open(path, "rb") as file:
            text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON ({brief(text)}), expected {expected}") from None
    if not fits(value):
        raise InputError(f"{path}: found {brief(value)}, expected {expected}")
    return value


def _continues(path, line, made):
    """Whether the rows of a stopped run (line, its state's first) are those of this one. More inputs are welcome."""
    if not line.endswith(b"\n"):  # none, or stopped while it wrote that
        return False

    def fits(old):
        return isinstance(old, dict) and set(old) <= set(made) and isinstance(old.get("inputs"), list)

    old = read_note(path, fits, f"an object of {', '.join(made)}; --overwrite begins anew", line)
    inputs = old.pop("inputs")
    return all(entry in made["inputs"] for entry in inputs) and all(old[name] == made[name] for name in old)
