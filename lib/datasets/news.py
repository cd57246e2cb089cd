"""Readers of Tencent-News' test files (a tencent_data_meta folder): test list, ids, region and whole-image features.

test_list.json    a line each `{"Tag": [...], "Content": [...], "Img_urls": [...], "Img_flags": [0 or 1, ...]}`
img_id.txt        `url<TAB>id`
test_own.tsv.0    tab-separated image_id, image_w, image_h, num_boxes, boxes, features; the last two in base64
test_features.json   a line each `[url, [floats]]`; the id is the integer in the base name up to its first dot
"""

import array
import json
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

from tqdm import tqdm

from lib.errors import InputError

FILES = ("img_id.txt", "test_own.tsv.0", "test_features.json")  # of a tencent_data_meta folder


def read_json_lines(path: str, expected: str, parse: Callable[[Any], Any]) -> list:
    """parse(object) of every line of a file with one JSON object a line, as a list.

    parse raises KeyError, TypeError or ValueError for an object that does not fit; that, or a line that is not
    JSON, becomes an InputError naming the file, the line and what was expected.
    """
    parsed = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                parsed.append(parse(json.loads(line)))
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
                raise InputError(f"{path}:{number}: expected {expected}, found {line[:60]!r}") from None
    return parsed


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
    """A test list's items, each a list of (url, flag): 1 where the picture is a right one for the item, else 0."""

    def parse(item):
        urls, flags = item["Img_urls"], item["Img_flags"]
        if not all(isinstance(url, str) for url in urls) or not all(flag in (0, 1) for flag in flags):
            raise ValueError
        return list(zip(urls, map(int, flags), strict=True))

    return read_json_lines(path, '{"Img_urls": [url, ...], "Img_flags": [0 or 1, ...]}, equally many of both', parse)


def read_news_ids(path: str) -> dict[str, int]:
    """{url: id} of a file with `url<TAB>id` lines."""
    ids = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                url, id_text = line.decode().rstrip("\r\n").split("\t")
                image_id = int(id_text)
            except ValueError:
                raise InputError(
                    f"{path}:{number}: expected url<TAB>id, the id an integer, found {line[:60]!r}"
                ) from None
            if ids.setdefault(url, image_id) != image_id:
                raise InputError(f"{path}:{number}: id {image_id} for a url that has id {ids[url]} already: {url[:60]}")
    return ids


def scan(path: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number, byte offset, line) of a large file, one line in memory at a time, under a progress bar."""
    bar = tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc=os.path.basename(path), disable=None)
    with open(path, "rb", buffering=1 << 20) as file, bar:
        offset = 0
        for number, line in enumerate(file, 1):
            yield number, offset, line
            offset += len(line)
            bar.update(len(line))


def index_regions(path: str, wanted: Collection[int]) -> tuple[dict[int, tuple[int, int]], int, int]:
    """Where the wanted ids' rows lie in a region TSV: {id: (offset, length)} in bytes, the last row of an id.

    Also how many rows have no integer id, which are skipped, and how many repeat a wanted id.
    """
    places, skipped, repeated = {}, 0, 0
    for number, offset, line in scan(path):
        first, *numbers = line.split(b"\t", 4)[:4]
        try:
            image_id = int(first)
        except ValueError:
            skipped += 1
            continue
        fields = line.count(b"\t") + 1
        if fields != 6 or not line.isascii() or not all(n.isdigit() and len(n) < 10 for n in numbers):
            raise InputError(
                f"{path}:{number}: expected image_id, image_w, image_h, num_boxes (integers), boxes, features (base64) "
                f"with tabs between, found {fields} fields, {line[:60]!r}"
            )
        if image_id in wanted:
            repeated += image_id in places
            places[image_id] = offset, len(line)
    return places, skipped, repeated


def index_wholes(path: str, wanted: Collection[int]) -> tuple[dict[int, tuple[int, int]], int]:
    """Where the wanted ids' rows lie in a file of `[url, [floats]]` lines: {id: (offset, length)} in bytes.

    The last row of an id counts. Also how many repeat a wanted id.
    """
    places, repeated = {}, 0
    for number, offset, line in scan(path):
        try:
            url, feature = json.loads(line)
            image_id = int(url.rsplit("/", 1)[-1].split(".", 1)[0])
            array.array("d", feature)
        except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
            raise InputError(
                f"{path}:{number}: expected [url, [numbers]], the base name of the url starting with an integer and "
                f"a dot, found {line[:60]!r}"
            ) from None
        if image_id in wanted:
            repeated += image_id in places
            places[image_id] = offset, len(line)
    return places, repeated


class Pictures:
    """The pictures' features, left on disk: where each row lies is known, and it is read when asked for."""

    def __init__(self, folder, urls):
        """folder holds img_id.txt, test_own.tsv.0 and test_features.json; urls are those that will be asked for."""
        ids, self.region_file, self.whole_file = (os.path.join(folder, name) for name in FILES)
        self.ids = {url: i for url, i in read_news_ids(ids).items() if url in urls}
        wanted = set(self.ids.values())
        self.regions, self.rows_without_id, repeated = index_regions(self.region_file, wanted)
        self.wholes, repeated_wholes = index_wholes(self.whole_file, wanted)
        self.repeated = dict(zip(FILES[1:], (repeated, repeated_wholes), strict=True))

    def missing(self, url):
        """Why a picture cannot be scored, or None where it can."""
        if url not in self.ids:
            return "picture without an id in img_id.txt"
        if self.ids[url] not in self.regions:
            return "picture without region features in test_own.tsv.0"
        if self.ids[url] not in self.wholes:
            return "picture without a whole-image feature in test_features.json"
        return None

    def read(self, url):
        """One entry of a request's "boxes" and one of its "whole_items"."""
        row = _read_line(self.region_file, *self.regions[self.ids[url]]).decode().rstrip("\r\n").split("\t")
        box = dict(zip(("image_id", "image_w", "image_h", "num_boxes"), map(int, row[:4]), strict=True))
        whole = json.loads(_read_line(self.whole_file, *self.wholes[self.ids[url]]))[1]
        return {**box, "boxes": row[4], "features": row[5]}, whole


def _read_line(path, offset, length):
    """The bytes of a line. Threads read at once, so each opens the file for itself."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)
