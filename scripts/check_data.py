"""Read a dataset folder and say what is there, and what would go wrong in training.

Exit status 0: it trains (notes may be worth reading); 1: something would go wrong; 2: there is nothing to check.
"""

import argparse
import os
import sys

import numpy as np
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.constants import N_CELLS, N_SLOTS
from lib.datasets.arrays import ArrayReader
from lib.datasets.ids import SPLITS, canonical_id
from lib.errors import InputError, run
from lib.files import read_lines
from vocab import deserialize_vocab, tokenize

BLOCK_BYTES = 1 << 24  # read at a time
LONG_CAPTION = 60  # words
MANY_UNKNOWN = 0.05
OFF_SUM = "weights of a region that do not sum to 1"
NEEDED = ("train", "dev")  # a training run reads these


class Report:
    """Lines of the table, faults (training would stop or learn nonsense) and notes (worth knowing)."""

    def __init__(self):
        self.table, self.faults, self.notes = [], [], []

    def row(self, *cells):
        self.table.append([str(cell) for cell in cells])

    def print(self):
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        for cells in self.table:
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        for title, lines in (("note", self.notes), ("WRONG", self.faults)):
            for line in lines:
                print(f"{title}: {line}")


def blocks(reader):
    """Yield (start, rows as float32) of an array, about BLOCK_BYTES at a time."""
    size = max(1, BLOCK_BYTES // max(1, reader.row_bytes))
    with tqdm(total=len(reader), desc=os.path.basename(reader.path), unit="row", leave=False, disable=None) as bar:
        for start in range(0, len(reader), size):
            rows = reader.read(start, size)
            yield start, rows.astype(np.float32, copy=False)
            bar.update(len(rows))


def check_features(reader, report):
    """NaN or infinite values, zero rows, repeats. Returns how often each row stands in a row (1: never)."""
    low, high, bad, zero, starts, last = np.inf, -np.inf, [], 0, [0], None
    for start, rows in blocks(reader):
        flat = rows.reshape(len(rows), -1)
        finite = np.isfinite(flat).all(1)
        bad += (start + np.flatnonzero(~finite)).tolist()
        if finite.any():
            low, high = min(low, flat[finite].min()), max(high, flat[finite].max())
        zero += int((rows == 0).all(-1).sum())
        before = np.concatenate([flat[:1] if last is None else last, flat[:-1]])
        new = (flat != before).any(1)
        starts += [i for i in (start + np.flatnonzero(new)).tolist() if i > 0]
        last = flat[-1:].copy()
    report.row(os.path.basename(reader.path), reader.shape, reader.dtype, f"{low:.4g} to {high:.4g}")
    if bad:
        report.faults.append(f"{reader.path}: NaN or infinite features in {len(bad)} images, the first is {bad[0]}")
    rows = int(np.prod(reader.shape[:-1]))
    if zero == rows:
        report.faults.append(f"{reader.path}: all of the {rows} rows are zero, expected features")
    elif zero:
        report.notes.append(f"{reader.path}: {zero} of {rows} rows are all zero (padding)")
    return int(np.gcd.reduce(np.diff([*starts, len(reader)])))


def check_boxes(reader, report):
    """Cell indices, weights and their sums of position grids."""
    bad = {"cell indices outside 0 to 256": [], "weights outside 0 to 1": [], OFF_SUM: []}
    empty, no_cell = 0, 0
    for start, rows in blocks(reader):
        cells, weights = rows[..., :N_SLOTS], rows[..., N_SLOTS : 2 * N_SLOTS]
        total = weights.sum(-1)
        wrong = (
            ~((cells >= 0) & (cells <= N_CELLS) & (cells == np.floor(cells))).all((1, 2)),
            ~((weights >= 0) & (weights <= 1.001)).all((1, 2)),  # the tolerance is for float16
            ((np.abs(total - 1) > 1e-3) & (total != 0)).any(1),
        )
        for name, images in zip(bad, wrong, strict=True):
            bad[name] += (start + np.flatnonzero(images)).tolist()
        empty += int((total == 0).sum())
        no_cell += int((cells == N_CELLS).sum())
    regions = int(np.prod(reader.shape[:2]))
    report.row(
        os.path.basename(reader.path),
        reader.shape,
        reader.dtype,
        f"{empty / regions:.1%} regions without area, {no_cell / regions / N_SLOTS:.1%} slots without a cell",
    )
    for name, images in bad.items():
        if images:
            lines = report.notes if name == OFF_SUM else report.faults
            lines.append(f"{reader.path}: {name} in {len(images)} images, the first is {images[0]}")


def check_captions(path, vocab, report, allow_empty):
    """Count captions, words and unknown words. Returns the number of captions."""
    try:
        captions = read_lines(path)
    except InputError as error:
        report.faults.append(str(error))
        return 0
    empty = [number for number, caption in enumerate(captions, 1) if not caption]
    if empty and not allow_empty:
        report.faults.append(f"{path}: {len(empty)} empty lines, the first is {empty[0]} (--allow_empty_captions)")
    if not captions:
        report.faults.append(f"{path}: no captions")
        return 0
    lengths, unknown = np.zeros(len(captions), dtype=np.int64), 0
    for i, caption in enumerate(tqdm(captions, desc=os.path.basename(path), unit="caption", leave=False, disable=None)):
        words = tokenize(caption)
        lengths[i] = len(words)
        if vocab:
            unknown += sum(word not in vocab.word2idx for word in words)
    rate = unknown / max(1, lengths.sum())
    text = f"{lengths.min()} to {lengths.max()} words, mean {lengths.mean():.1f}"
    report.row(os.path.basename(path), (len(captions),), "", text + (f", {rate:.2%} unknown" if vocab else ""))
    if lengths.max() > LONG_CAPTION:
        number = int(lengths.argmax()) + 1
        report.notes.append(f"{path}, line {number}: {lengths.max()} words; a batch is padded to its longest caption")
    if rate > MANY_UNKNOWN:
        report.notes.append(f"{path}: {rate:.1%} of the words are not in the vocabulary")
    return len(captions)


def open_array(path, dimensions, report):
    """An ArrayReader, or None and a fault."""
    try:
        reader = ArrayReader(path)
    except InputError as error:
        report.faults.append(str(error))
        return None
    if len(reader.shape) != len(dimensions) or 0 in reader.shape:
        report.faults.append(f"{path}: found {reader.shape}, expected ({', '.join(dimensions)})")
        return None
    return reader


def check_counts(prefix, rows, repeats, captions, boxes, report):
    """Whether the numbers of images, captions and boxes fit together."""
    if max(rows, captions) % min(rows, captions):
        report.faults.append(
            f"{prefix}: {rows} images and {captions} captions, expected one to be a multiple of the other"
        )
    if rows != captions:
        repeats = 1
    images = rows // repeats
    if boxes is not None and boxes not in (rows, images):
        report.faults.append(f"{prefix}_boxes.npy: {boxes} images, but {rows} in {prefix}_ims.npy")
    if repeats > 1:
        report.notes.append(f"{prefix}: every image stands {repeats} times in a row, and is used once")
    share = f"{captions / images:g} captions an image"
    report.row("", f"{images} images", "", share)


def check_split(prefix, opt, vocab, report):
    """Check the files of one split. Returns {"img_dim", "ids"} of what was found."""
    found = {"img_dim": None, "ids": set()}
    images = open_array(prefix + "_ims.npy", ("images", "regions", "img_dim"), report)
    repeats = check_features(images, report) if images else 1
    boxes = None
    if opt.position != "none":
        boxes = open_array(prefix + "_boxes.npy", ("images", "regions", "30 or 31"), report)
    if boxes and boxes.shape[2] not in (2 * N_SLOTS, 2 * N_SLOTS + 1):
        report.faults.append(f"{boxes.path}: found {boxes.shape}, expected the last to be 30 or 31 (position.py)")
    elif boxes:
        check_boxes(boxes, report)
        if images and boxes.shape[1] != images.shape[1]:
            report.faults.append(f"{boxes.path}: {boxes.shape[1]} regions, but {images.shape[1]} in {images.path}")
    if opt.whole or os.path.exists(prefix + "_who_ims.npy"):
        whole = open_array(prefix + "_who_ims.npy", ("images", "img_dim"), report)
        if whole:
            check_features(whole, report)
            if images and (whole.shape[1] != images.shape[2] or len(whole) != len(images)):
                report.faults.append(f"{whole.path}: found {whole.shape}, expected ({len(images)}, {images.shape[2]})")
    captions = prefix + ("_sent_caps.txt" if os.path.exists(prefix + "_sent_caps.txt") else "_caps.txt")
    n_captions = check_captions(captions, vocab, report, opt.allow_empty_captions)
    if images:
        found["img_dim"] = images.shape[2]
        if n_captions:
            check_counts(prefix, len(images), repeats, n_captions, len(boxes) if boxes else None, report)
    if os.path.exists(prefix + "_ids.txt"):
        found["ids"] = check_ids(prefix + "_ids.txt", images, n_captions, report)
    return found


def check_ids(path, images, n_captions, report):
    """Count the ids; training reads none, so what is wrong with them is a note. Returns the set of their keys."""
    try:
        ids = read_lines(path)
    except InputError as error:
        report.notes.append(str(error))
        return set()
    different = set(map(canonical_id, ids))
    report.row(os.path.basename(path), (len(ids),), "", f"{len(different)} different")
    if images and len(ids) not in (len(images), n_captions):
        report.notes.append(f"{path}: {len(ids)} ids for {len(images)} images")
    return different


def check_folder(folder, opt):
    """The Report of a dataset folder."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    report = Report()
    report.row("file", "shape", "type", "contents")
    vocab_path = os.path.join(opt.vocab_path, os.path.basename(os.path.normpath(folder)) + "_vocab.json")
    vocab = None
    try:
        vocab = deserialize_vocab(vocab_path)
        report.row(vocab_path, (len(vocab),), "", "words")
    except InputError as error:
        report.faults.append(str(error))
    kinds = ("ims.npy", "boxes.npy", "caps.txt", "ids.txt")
    there = [s for s in SPLITS if any(os.path.exists(os.path.join(folder, f"{s}_{kind}")) for kind in kinds)]
    if not there:
        raise InputError(f"{folder}: no files of the splits {', '.join(SPLITS)}")
    found = {split: check_split(os.path.join(folder, split), opt, vocab, report) for split in there}
    for split in NEEDED:
        if split not in there:
            report.faults.append(f"{folder}: no {split} split, expected {split}_ims.npy, _boxes.npy and _caps.txt")
    sizes = {split: f["img_dim"] for split, f in found.items() if f["img_dim"]}
    if len(set(sizes.values())) > 1:
        report.faults.append(f"{folder}: features of different sizes: {sizes}")
    elif sizes and set(sizes.values()) != {2048}:
        report.notes.append(f"{folder}: train.py needs --img_dim {next(iter(sizes.values()))}")
    for split in there:
        shared = found["train"]["ids"] & found[split]["ids"] if "train" in found and split != "train" else ()
        if shared:
            report.notes.append(f"{folder}: {len(shared)} pictures of {split} are in train as well")
    return report


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/check_data.py data/f30k_precomp --vocab_path vocab",
    )
    parser.add_argument("folder", help="DATA_PATH/DATA_NAME")
    parser.add_argument("--vocab_path", default="./vocab/", help="where NAME_vocab.json lies (default: %(default)s)")
    parser.add_argument("--position", choices=("attention", "area", "none"), default="attention", help="as in train.py")
    parser.add_argument("--whole", action="store_true", help="SPLIT_who_ims.npy are needed (Tencent_PFAN)")
    parser.add_argument("--allow_empty_captions", action="store_true", help="as in train.py")
    opt = parser.parse_args()
    report = check_folder(opt.folder, opt)
    report.print()
    n = len(report.faults)
    print(f"{opt.folder}: " + (f"{n} thing{'s' * (n > 1)} would go wrong" if n else "ready to train"))
    sys.exit(1 if n else 0)


if __name__ == "__main__":
    run(main)
