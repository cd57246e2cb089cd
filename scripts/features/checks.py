"""What check_data.py found, and its checks: of arrays, captions and ids, each and against each other."""

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from tqdm import tqdm

from lib.constants import N_CELLS, N_SLOTS
from lib.datasets.arrays import read_rows
from lib.datasets.ids import canonical_id
from lib.datasets.region_match import judge
from lib.errors import InputError
from lib.files import open_npy, read_lines
from vocab import Vocabulary, tokenize, unknown_words_message

BLOCK_BYTES = 1 << 24  # read at a time
SAMPLE = 100  # images whose boxes are compared with their features
FEWEST_GROUPS = 10  # images, of which captions are compared
LONG_CAPTION = 60  # words
MANY_UNKNOWN = 0.05
BETTER = 1.5  # times the words in common that tell one image's captions from two images'


class Report:
    """Lines of the table, faults (training would stop or learn nonsense) and notes (worth knowing)."""

    def __init__(self):
        self.table, self.faults, self.notes = [], [], []

    def row(self, *cells):
        self.table.append([str(cell) for cell in cells])

    def attempt(self, function, *args):
        """function(*args), or None and a fault where it raises InputError; of several that are alike, one fault."""
        try:
            return function(*args)
        except InputError as error:
            if str(error) not in self.faults:
                self.faults.append(str(error))
            return None

    def print(self):
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        for cells in self.table:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        for title, lines in (("note", self.notes), ("WRONG", self.faults)):
            for line in lines:
                print(f"{title}: {line}")


def blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (start, rows as float32) of a mapped array, about BLOCK_BYTES at a time."""
    size = max(1, BLOCK_BYTES // array[0].nbytes)
    name = os.path.basename(array.filename)
    with tqdm(total=len(array), desc=name, unit="row", leave=False, disable=None) as bar:
        for start in range(0, len(array), size):
            rows = read_rows(array, start, size)
            yield start, rows.astype(np.float32, copy=False)
            bar.update(len(rows))


def check_features(path: str, report: Report) -> None:
    """NaN or infinite values, and rows that are all zero, of a file of features, where there is one."""
    array = report.attempt(open_npy, path) if os.path.isfile(path) else None
    if array is None or 0 in (array.shape or (0,)):
        return  # opening the data set names what is wrong
    low, high, bad, zero = np.inf, -np.inf, [], 0
    for start, rows in blocks(array):
        finite = np.isfinite(rows.reshape(len(rows), -1)).all(1)
        bad += (start + np.flatnonzero(~finite)).tolist()
        if finite.any():
            low, high = min(low, rows[finite].min()), max(high, rows[finite].max())
        zero += int((rows == 0).all(-1).sum())
    report.row(os.path.basename(path), array.shape, array.dtype, f"{low:.4g} to {high:.4g}")
    if bad:
        report.faults.append(f"{path}: NaN or infinite features in {len(bad)} images, the first is {bad[0]}")
    rows = int(np.prod(array.shape[:-1]))
    if zero == rows:
        report.faults.append(f"{path}: all of the {rows} rows are zero, expected features")
    elif zero:
        report.notes.append(f"{path}: {zero} of {rows} rows are all zero (padding)")


def describe_grids(array: np.ndarray, report: Report) -> None:
    """How many regions and slots of position grids are empty, and where weights do not sum to 1."""
    off_sum, empty, no_cell = [], 0, 0
    for start, grids in blocks(array):
        total = grids[..., N_SLOTS : 2 * N_SLOTS].sum(-1)
        off_sum += (start + np.flatnonzero(((np.abs(total - 1) > 1e-3) & (total != 0)).any(1))).tolist()
        empty += int((total == 0).sum())
        no_cell += int((grids[..., :N_SLOTS] == N_CELLS).sum())
    regions = int(np.prod(array.shape[:2]))
    shares = f"{empty / regions:.1%} regions without area, {no_cell / regions / N_SLOTS:.1%} slots without a cell"
    report.row(os.path.basename(array.filename), array.shape, array.dtype, shares)
    if off_sum:
        what = f"weights of a region that do not sum to 1 in {len(off_sum)} images, the first is {off_sum[0]}"
        report.notes.append(f"{array.filename}: {what}")


def compare_boxes(dataset: Any, report: Report) -> None:
    """Whether the boxes of a sample of a data set's images belong to their features."""
    images = np.unique(np.linspace(0, dataset.n_images - 1, SAMPLE).astype(int))
    judgement = judge(dataset.images[images * dataset.repeats], dataset.read_grids(images).numpy())
    path = dataset.prefix + "_boxes.npy"
    if judgement.wrong:
        wrong = f"of other images or regions than {dataset.prefix}_ims.npy: {judgement}"
        report.faults.append(f"{path}: {wrong}; scripts/align.py puts them in order")
    elif judgement.wrong is None:
        report.notes.append(f"{path}: {judgement}")
    else:
        report.row("", f"{judgement.n_images} images", "", str(judgement))


def check_whole(path: str, images: np.ndarray, report: Report) -> None:
    """Whole-image features, and whether there is one for each of images (n, R, D)."""
    check_features(path, report)
    whole = report.attempt(open_npy, path)
    if whole is not None and whole.shape != (len(images), images.shape[2]):
        report.faults.append(f"{path}: found {whole.shape}, expected ({len(images)}, {images.shape[2]})")


# ---------------------------------------------------------------- captions and ids


def check_captions(path: str, captions: list[str], vocab: Vocabulary | None, report: Report) -> None:
    """Count the words and unknown words of the captions of the file at path."""
    lengths, unknown = np.zeros(len(captions), dtype=np.int64), 0
    split = vocab.tokenize if vocab else tokenize
    for i, caption in enumerate(tqdm(captions, desc=os.path.basename(path), unit="caption", leave=False, disable=None)):
        words = split(caption)
        lengths[i] = len(words)
        if vocab:
            unknown += sum(word not in vocab.word2idx for word in words)
    rate = unknown / max(1, lengths.sum())
    text = f"{lengths.min()} to {lengths.max()} words, mean {lengths.mean():.1f}"
    report.row(os.path.basename(path), (len(captions),), "", text + (f", {rate:.2%} unknown" if vocab else ""))
    if lengths.max() > LONG_CAPTION:
        number = int(lengths.argmax()) + 1
        report.notes.append(f"{path}, line {number}: {lengths.max()} words; a batch is padded to its longest caption")
    if fault := unknown_words_message(path, unknown, int(lengths.sum())):
        report.faults.append(fault)
    elif rate > MANY_UNKNOWN:
        report.notes.append(f"{path}: {rate:.1%} of the words are not in the vocabulary")


def check_groups(path: str, captions: Sequence[str], per_image: int, report: Report) -> None:
    """Whether captions that stand together are of one image: they share more words than those of neighbours."""
    n = len(captions) // per_image
    if n < FEWEST_GROUPS:
        return
    words = [set(caption.lower().split()) for caption in captions]

    def shared(pairs):
        """The share of its words that each pair of lines has in common."""
        return [len(first & other) / max(1, len(first | other)) for first, other in pairs]

    # Line 0 of an image shares least with the line before, which is another image's.
    neighbours = shared(pairwise(words[per_image - 1 : n * per_image]))
    before = np.reshape(neighbours, (n - 1, per_image)).mean(0)
    start, apart = int(before.argmin()), np.mean(shared(zip(words[: n - 1], words[n:], strict=False)))
    found = ""
    if before[0] > BETTER * before[start]:
        found = f"the first image's from line {start + 1}"
    elif apart > BETTER * before[1:].mean():
        found = "first one caption of every image, then the next"
    if found:
        report.faults.append(f"{path}: expected {per_image} captions of each image in a row, found {found}")


def check_ids(path: str, n_images: int, n_captions: int, report: Report) -> set[str]:
    """Count the ids; training reads none, so what is wrong with them is a note. Returns the canonical ids."""
    try:
        ids = [canonical_id(name) for name in read_lines(path)]
    except InputError as error:
        report.notes.append(str(error))
        return set()
    report.row(os.path.basename(path), (len(ids),), "", f"{len(set(ids))} different")
    if len(ids) not in (n_images, n_captions):
        report.notes.append(f"{path}: {len(ids)} ids for {n_images} images")
    return set(ids)
