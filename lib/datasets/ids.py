"""Ids of pictures: what two names of one picture have in common, id lists, and the id lists of a folder's splits."""

import itertools
import os
import re

from lib.datasets.problems import Problems
from lib.errors import InputError
from lib.files import read_lines

SPLITS = ("train", "dev", "test", "testall")
PICTURE_SUFFIX = re.compile(r"\.(jpe?g|png|bmp|gif|webp|tiff?|ppm|pgm)$", re.IGNORECASE)


def canonical_id(image_id: str | int) -> str:
    """The one id of a picture under all its names: "7" for "7", "007.jpg" and "COCO_val2014_000000000007.jpg"."""
    name = PICTURE_SUFFIX.sub("", str(image_id).strip())
    name = re.sub(r"^(.*/)?COCO_(train|val|test)\d{4}_(?=\d+$)", "", name)
    return (name.lstrip("0") or "0") if name.isdecimal() else name


def read_ids(path: str, problems: Problems) -> list[str]:
    """The ids of an id list, one a line. Empty and doubled lines are reported to problems and left out.

    A list that repeats every id k times in a row (once per caption) counts as one id per k lines.
    Raises InputError where there is no id in it.
    """
    lines = read_lines(path)
    starts = [i for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]
    runs = {end - start for start, end in itertools.pairwise([*starts, len(lines)])}
    if len(runs) == 1 and runs != {1} and len(set(lines)) == len(starts) > 1:
        return [lines[i] for i in starts]
    ids, seen = [], {}
    for number, line in enumerate(lines, 1):
        name = canonical_id(line)
        if not line:
            problems.add("malformed", f"{path}, line {number}", "an empty line, expected an id")
        elif name in seen:
            problems.add("doubled", f"{path}, line {number}", f"id {line} stands in line {seen[name]} already")
        else:
            seen[name] = number
            ids.append(line)
    if not ids:
        raise InputError(f"{path}: no ids, expected one a line")
    return ids


def split_ids(folder: str, id_files: list[str] | None, problems: Problems) -> dict[str, list[str]]:
    """The pictures of each split, in order: {split: ids}.

    id_files: strings SPLIT=FILE. Where there are none, the SPLIT_ids.txt in folder are read.
    Raises InputError where there are neither.
    """
    files = {}
    for text in id_files or ():
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
