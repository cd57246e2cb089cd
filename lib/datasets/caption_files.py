"""Caption files in other people's forms: Karpathy's JSON, MS-COCO's, and text files with a caption a line."""

import contextlib
import csv
import io
import re

import msgspec

from lib.datasets.ids import canonical_id
from lib.datasets.json_files import HALF, json_items
from lib.datasets.problems import Problems
from lib.errors import InputError, brief
from lib.files import read_lines

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test", "dev": "dev", "valid": "dev"}
SURROGATE = re.compile("[\ud800-\udfff]")
LINE_END = re.compile(r"\s*[\r\n\t\v\f\x1c-\x1e\x85\u2028\u2029]+\s*")
IMAGE_COLUMNS = {"image", "image_name", "image_id", "filename", "file_name"}
CAPTION_COLUMNS = {"caption", "comment", "sentence", "text"}
PAIR_FORM = "file name, tab, caption"
SEPARATORS = {"\t": "tabs", "|": '"|"', ",": "commas"}
CAPTION_NUMBER = re.compile(r"((?<=\.jpg)#\w+)?#\d+$", re.IGNORECASE)  # NAME.jpg#0; NAME.jpg#zhc#0 in Flickr8k-CN
NUMBERED_NAME = re.compile(r"(\S+#\d+)\s+(.*)")
ONE_PIPE_LOST = re.compile(r"([^|]+)\|\s*(\d+)\s+([^|]+)")  # Kaggle's results.csv has a line "NAME.jpg| 4   A dog …"


class Captions:
    """Captions by image, in the order of the source: ids, texts and splits are {canonical id: …}."""

    def __init__(self, problems: Problems):
        self.problems = problems
        self.ids, self.texts, self.splits = {}, {}, {}

    def add(self, where: str, image_id: str | int, captions: list[str], split: str | None = None) -> None:
        """Append captions of an image, without empty ones. where: the place in the source. Problems are reported.

        Raises InputError where two images would be one.
        """
        name, image_id = canonical_id(image_id), str(image_id)
        if self.ids.setdefault(name, image_id) != image_id:
            both = f"{brief(self.ids[name])} and {brief(image_id)}"
            raise InputError(f"{where}: {both} have the same id {brief(name)}, expected names that differ otherwise")
        if self.splits.setdefault(name, split) != split:
            raise InputError(f"{where}: {brief(image_id)} stands in {self.splits[name]} and in {split}")
        texts = self.texts.setdefault(name, [])
        for text in captions:
            if HALF in text:
                self.problems.add("malformed", where, "a caption with half of a character (a surrogate), left out")
            elif text := LINE_END.sub(" ", text).strip():
                texts.append(text)


class Sentence(msgspec.Struct):
    raw: str


class KarpathyImage(msgspec.Struct):
    filename: str
    sentences: list[Sentence]
    split: str | None = None
    cocoid: int | None = None


def read_karpathy(path: str, problems: Problems) -> Captions:
    """Karpathy's dataset_NAME.json, and JSON of that form: images with filename, sentences with raw, and mostly split.

    MS-COCO's test images (those with a cocoid) are testall. Raises InputError naming the image that lacks a field.
    """
    captions = Captions(problems)
    for number, image in enumerate(json_items(path, "images", KarpathyImage)):
        where = f"{path}: images {number}"
        split = KARPATHY_SPLITS.get(image.split)
        if split is None and image.split is not None:
            raise InputError(f"{where}: split {brief(image.split)}, expected {', '.join(KARPATHY_SPLITS)}")
        split = "testall" if split == "test" and image.cocoid is not None else split
        image_id = image.filename if image.cocoid is None else image.cocoid
        captions.add(where, image_id, [sentence.raw for sentence in image.sentences], split)
    return captions


def read_coco(paths: list[str], problems: Problems) -> Captions:
    """MS-COCO's captions_*.json. Images and their captions are in the order of their ids; no split is known."""
    from pycocotools.coco import COCO

    captions = Captions(problems)
    for path in paths:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the library prints what it does
                coco = COCO(path)
            for image_id in sorted(coco.imgs):
                annotations = sorted(coco.imgToAnns[image_id], key=lambda annotation: annotation["id"])
                texts = [SURROGATE.sub(HALF, annotation["caption"]) for annotation in annotations]
                captions.add(f"{path}: image {image_id}", image_id, texts)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            reason = f"{type(error).__name__}: {brief(str(error))}"
            raise InputError(f"{path}: not an official captions file ({reason})") from None
    return captions


def read_text(path: str, problems: Problems) -> Captions:
    """Captions of a text file with a caption a line. Prints the form that was found.

    A first line with names of columns (image and caption, image_name and comment …) makes it a table, separated by
    tabs, by "|" (Kaggle's results.csv) or by commas with quotes (Kaggle's captions.txt). Without one, a line is a file
    name, a tab and a caption; after NAME.jpg#0 or NAME.jpg#zhc#0 a space may stand for the tab.
    Lines of another form are reported to problems.
    """
    lines = read_lines(path)
    delimiter, columns = _find_table(lines[0]) if lines else ("", [])
    form = f"{', '.join(columns)} separated by {SEPARATORS[delimiter]}" if columns else PAIR_FORM
    print(f"{path}: {form}")
    captions = Captions(problems)
    for number, line in enumerate(lines[bool(columns) :], 1 + bool(columns)):
        name, text = _parse_row(line, delimiter, columns) if columns else _parse_pair(line)
        if name and text:
            captions.add(f"{path}, line {number}", CAPTION_NUMBER.sub("", name), [text])
        elif line:
            problems.add("malformed", f"{path}, line {number}", f"expected: {form}")
    return captions


def _parse_pair(line):
    name, tab, text = line.partition("\t")
    if not tab and (numbered := NUMBERED_NAME.fullmatch(line)):
        name, text = numbered.groups()
    return name.strip(), text.strip()


def _find_table(line):
    """(delimiter, names of the columns) that the first line of a file announces; ("", []) where it announces none."""
    for delimiter in SEPARATORS:
        columns = [name.strip().strip('"') for name in line.split(delimiter)]
        if None not in (_column(columns, IMAGE_COLUMNS), _column(columns, CAPTION_COLUMNS)):
            return delimiter, columns
    return "", []


def _column(columns, known):
    """The index of the first column whose name is known, or None."""
    return next((i for i, name in enumerate(columns) if name.lower() in known), None)


def _parse_row(line, delimiter, columns):
    """(file name, caption) of a line of a table; both empty where it is malformed."""
    n, image, caption = len(columns), _column(columns, IMAGE_COLUMNS), _column(columns, CAPTION_COLUMNS)
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    try:
        cells = next(csv.reader([line], delimiter=delimiter, quoting=quoting, strict=True), [])
    except csv.Error:
        return "", ""
    if delimiter == "|" and n == 3 and (repaired := ONE_PIPE_LOST.fullmatch(line)):
        cells = list(repaired.groups())
    if caption == n - 1:  # a separator within the caption
        cells[n - 1 :] = [delimiter.join(cells[n - 1 :])]
    return (cells[image].strip(), cells[caption].strip()) if len(cells) == n else ("", "")
