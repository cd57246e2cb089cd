"""Ids of images: what two names of one image have in common, id lists, and the id lists of a folder's splits."""

import codecs
import os
import re
from collections.abc import Iterator

import msgspec

from lib.datasets.json_files import json_items
from lib.datasets.problems import Problems
from lib.errors import InputError, brief
from lib.files import read_lines

SPLITS = ("train", "dev", "test", "testall")
IMAGE_SUFFIX = re.compile(r"\.(jpe?g|jfif|png|bmp|gif|webp|avif|tiff?|ppm|pgm)$", re.IGNORECASE)


def canonical_id(image_id: str | int) -> str:
    """The one id of an image under all its names: "7" for "7", "007.jpg" and "COCO_val2014_000000000007.jpg"."""
    name = IMAGE_SUFFIX.sub("", str(image_id).strip())
    name = re.sub(r"^(.*/)?COCO_(train|val|test)\d{4}_(?=\d+$)", "", name)
    return (name.lstrip("0") or "0") if name.isdecimal() else name


def read_ids(path: str, problems: Problems | None = None) -> list[str]:
    """The ids of an id list, one a line. Empty and doubled lines are reported to problems and left out.

    A list that repeats every id k times in a row (once per caption) counts as one id per k lines.
    Raises InputError where there is no id in it, and without problems for the first of these lines.
    """
    lines = read_lines(path)
    different = list(dict.fromkeys(lines))
    if len(different) > 1 and lines == [line for line in different for _ in range(len(lines) // len(different))]:
        lines = different
    ids, seen = [], {}
    for number, line in enumerate(lines, 1):
        name = canonical_id(line)
        if line and name not in seen:
            seen[name] = number
            ids.append(line)
            continue
        kind, what = "malformed", "an empty line, expected an id"
        if line:
            kind, what = "doubled", f"id {line} stands in line {seen[name]} already"
        if problems is None:
            raise InputError(f"{path}, line {number}: {what}")
        problems.add(kind, f"{path}, line {number}", what)
    if not ids:
        raise InputError(f"{path}: no ids, expected one a line")
    return ids


def split_ids(folder: str, id_files: list[str] | None, problems: Problems) -> dict[str, list[str]]:
    """The images of each split, in order: {split: ids}.

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


class ImageName(msgspec.Struct):
    filename: str
    filepath: str = ""
    cocoid: int | str | None = None
    imgid: int | str | None = None


def read_file_names(path: str) -> dict[str, str]:
    """The file names of images, {id: name}, of an id_mapping.json or of Karpathy's dataset_NAME.json.

    id_mapping.json, which vse_infty's data has, is such an object itself. In Karpathy's file the id is the cocoid, or
    where there is none the imgid; a filepath goes before the name. Raises InputError for a file of another form.
    """
    with open(path, "rb") as file:
        text = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        return msgspec.json.decode(text, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    names = {}
    for image in json_items(path, "images", ImageName):
        image_id = image.imgid if image.cocoid is None else image.cocoid
        if image_id is None:
            raise InputError(f"{path}: image {brief(image.filename)}: expected cocoid or imgid")
        names[str(image_id)] = os.path.join(image.filepath, image.filename)
    return names


def walk(folder: str, suffix: re.Pattern[str], problems: Problems) -> Iterator[str]:
    """Yield the paths of the files in folder and below it whose names end in suffix, in the order of the names.

    Links to folders are followed; a folder that several lead to is entered once. A name that is not UTF-8, which no
    id list can hold, goes to problems.
    """
    entered = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders.sort()
        for path in (os.path.join(root, name) for name in sorted(names) if suffix.search(name)):
            try:
                os.path.relpath(path, folder).encode()
                yield path
            except UnicodeEncodeError:
                problems.add("unreadable", path, "the name is not UTF-8; skipped")
