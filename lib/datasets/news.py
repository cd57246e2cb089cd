"""Readers of Tencent-News' test files (a tencent_data_meta folder): test list, ids, region and whole-image features.

test_list.json    a line each `{"Tag": [...], "Content": [...], "Img_urls": [...], "Img_flags": [0 or 1, ...]}`
img_id.txt        `url<TAB>id`
test_own.tsv.0    tab-separated image_id, image_w, image_h, num_boxes, boxes, features; the last two in base64
test_features.json   a line each `[url, [floats]]`; the id is the integer in the base name up to its first dot
"""

import array
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from lib.errors import InputError

FILES = ("img_id.txt", "test_own.tsv.0", "test_features.json")  # of a tencent_data_meta folder
FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")  # of a row of test_own.tsv.0
Place = tuple[int, int]  # of a line in a file: offset, length in bytes


def read_json_lines(path: str, expected: str, parse: Callable[[Any], Any]) -> list:
    """parse(object) of every line of a file with one JSON object a line, as a list. Raises InputError as _scan."""
    return [parsed for _, parsed in _scan(path, expected, lambda line: parse(json.loads(line)))]


def read_words(path: str, kind: str) -> list[tuple[list[str], list[str]]]:
    """[(words, urls)] of a test list: the item's Tag words for kind "tag", its Content words for any other."""
    key = "Tag" if kind == "tag" else "Content"

    def parse(item):
        for strings in (item[key], item["Img_urls"]):
            if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
                raise ValueError
        return item[key], item["Img_urls"]

    return read_json_lines(path, f'{{"{key}": [word, ...], "Img_urls": [url, ...]}}', parse)


def read_flags(path: str) -> list[list[tuple[str, int]]]:
    """A test list's items, each a list of (url, flag): 1 where the image is correct for the item, else 0."""

    def parse(item):
        urls, flags = item["Img_urls"], item["Img_flags"]
        if not all(isinstance(url, str) for url in urls) or not all(flag in (0, 1) for flag in flags):
            raise ValueError
        return list(zip(urls, map(int, flags), strict=True))

    return read_json_lines(path, '{"Img_urls": [url, ...], "Img_flags": [0 or 1, ...]}, equally many of both', parse)


def load_img_url_to_id(img_id_file: str) -> dict[str, int]:
    """{url: id} of a file with `url<TAB>id` lines. Raises InputError for another line, or a url with two ids."""

    def parse(line):
        url, id_text = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
        return url, _integer(id_text)

    ids = {}
    lines = _scan(img_id_file, "url<TAB>id, the id an integer", parse)
    for number, (_, (url, image_id)) in enumerate(lines, 1):
        if ids.setdefault(url, image_id) != image_id:
            found = f"id {image_id} for a url that has id {ids[url]} already"
            raise InputError(f"{img_id_file}:{number}: {found}: {url[:60]}")
    return ids


class Rows(Sequence):
    """The first topn rows of a region TSV, dicts that are read from disk when asked for.

    ids: each row's image_id. Rows without an integer id are skipped. Raises InputError for any other row that is not
    of the form above.
    """

    def __init__(self, tsv_file: str, topn: int = 1000000):
        self.path = tsv_file
        expected = "image_id, image_w, image_h, num_boxes (integers), boxes, features (base64) with tabs between"
        rows = ((image_id, place) for place, image_id in _scan(tsv_file, expected, self._parse) if image_id is not None)
        self.ids, self.places = [], []
        for image_id, place in itertools.islice(rows, topn):
            self.ids.append(image_id)
            self.places.append(place)

    @staticmethod
    def _parse(line):
        """A row's image_id, None where it is no integer."""
        first, *numbers = line.split(b"\t", 4)[:4]
        try:
            image_id = _integer(first.decode("utf-8-sig"))
        except ValueError:
            return None
        if line.count(b"\t") + 1 != len(FIELDS) or not all(n.isdigit() and len(n) < 10 for n in numbers):
            raise ValueError
        return image_id

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = _read_line(self.path, self.places[index]).decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
        return dict(zip(FIELDS, [*map(int, row[:4]), *row[4:]], strict=True))


class Wholes(Mapping):
    """{id: whole-image feature} of a file of `[url, [floats]]` lines, read from disk when asked for.

    The last line of an id counts. Raises InputError for a line that is not of this form.
    """

    def __init__(self, json_file: str):
        self.path = json_file
        expected = "[url, [numbers]], the base name of the url an integer up to its first dot"
        self.places = {image_id: place for place, image_id in _scan(json_file, expected, self._parse)}

    @staticmethod
    def _parse(line):
        """The id of a line's image."""
        url, feature = json.loads(line)
        array.array("d", feature)  # raises for what is no list of numbers
        return _integer(url.rsplit("/", 1)[-1].split(".", 1)[0])

    def __len__(self):
        return len(self.places)

    def __iter__(self):
        return iter(self.places)

    def __getitem__(self, image_id):
        return json.loads(_read_line(self.path, self.places[image_id]))[1]


process_tsv_file, process_json_file = Rows, Wholes  # the published names


class Images:
    """The features of images by their url, of what load_img_url_to_id, process_tsv_file, process_json_file return."""

    def __init__(self, ids: Mapping[str, int], rows: Rows, wholes: Wholes):
        self.ids, self.rows, self.wholes = ids, rows, wholes
        self.regions = {image_id: index for index, image_id in enumerate(rows.ids)}  # the last row of an id counts

    def missing(self, url: str) -> str | None:
        """Why an image cannot be scored, or None where it can."""
        if url not in self.ids:
            return "image without an id in img_id.txt"
        if self.ids[url] not in self.regions:
            return "image without region features in test_own.tsv.0"
        if self.ids[url] not in self.wholes:
            return "image without a whole-image feature in test_features.json"
        return None

    def read(self, url: str) -> tuple[dict, list[float]]:
        """One entry of a request's "boxes" and one of its "whole_items"."""
        return self.rows[self.regions[self.ids[url]]], self.wholes[self.ids[url]]


def _integer(text):
    """The int of decimal digits. Raises ValueError for all else: int() reads "2018_1" as 20181."""
    if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
        raise ValueError
    return int(text)


def _scan(path: str, expected: str, parse: Callable[[bytes], Any]) -> Iterator[tuple[Place, Any]]:
    """Yield the place of each line of a file and parse(line), one line in memory at a time, under a progress bar.

    Where parse raises an error, which it does for a line that does not fit, that becomes an InputError naming the file,
    the line and what was expected.
    """
    size, name = os.path.getsize(path), os.path.basename(path)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=name, leave=False, disable=None)
    with open(path, "rb", buffering=1 << 20) as file, bar:
        offset = 0
        for number, line in enumerate(file, 1):
            try:
                parsed = parse(line)
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
                raise InputError(f"{path}:{number}: expected {expected}, found {line[:60]!r}") from None
            yield (offset, len(line)), parsed
            offset += len(line)
            bar.update(len(line))


def _read_line(path, place):
    """The bytes of a line. Threads read at once, so each opens the file for itself."""
    with open(path, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])
