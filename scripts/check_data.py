"""Read a dataset folder and say what is there, and what would go wrong in training.

Files are checked each, and against each other: whether the boxes belong to the features, the whole-image features to
the regions', each image's captions to one image, the vocabulary to the captions, and test to testall.
Exit status 0: it trains (notes may be worth reading); 1: something would go wrong; 2: there is nothing to check.
"""

import argparse
import os
import sys
from typing import NamedTuple

if not __package__:
    import _root  # noqa: F401

from lib.constants import N_SLOTS
from lib.datasets.checks import rows_per_image, unequal_repeats
from lib.datasets.ids import SPLITS
from lib.errors import InputError, run
from scripts.check.arrays import check_features, check_grids, compare_boxes, compare_whole
from scripts.check.report import Report, open_array
from scripts.check.texts import check_captions, check_groups, check_ids, compare_splits
from vocab import Vocabulary, deserialize_vocab

NEEDED = ("train", "dev")  # a training run reads these


class Found(NamedTuple):
    """What a split holds: the size of its features (None without features) and its canonical ids."""

    img_dim: int | None
    ids: set[str]


def check_split(prefix, opt, vocab, report):
    """Check the files of one split. Returns what was Found."""
    images = open_array(prefix + "_ims.npy", ("images", "regions", "img_dim"), report)
    same = check_features(images, report) if images is not None else None
    captions_path = prefix + ("_sent_caps.txt" if os.path.exists(prefix + "_sent_caps.txt") else "_caps.txt")
    captions = check_captions(captions_path, vocab, report, opt.allow_empty_captions)
    n_images = 0
    if images is not None:
        n_images = count_images(prefix, same, len(captions), report)
        if n_images and len(captions) % n_images == 0:
            check_groups(captions_path, captions, len(captions) // n_images, report)
    if opt.position != "none":
        check_boxes(prefix, images, n_images, report)
    if opt.whole or os.path.exists(prefix + "_who_ims.npy"):
        check_whole(prefix, images, report)
    ids = set()
    if os.path.exists(prefix + "_ids.txt"):
        ids = check_ids(prefix + "_ids.txt", 0 if images is None else len(images), len(captions), report)
    return Found(None if images is None else images.shape[2], ids)


def count_images(prefix, same, n_captions, report):
    """How many images there are, if their number and that of the captions fit together, else 0.

    same: which rows of the features equal the row before (n - 1,).
    """
    rows = len(same) + 1
    if not n_captions:
        return rows
    if max(rows, n_captions) % min(rows, n_captions):
        report.faults.append(
            f"{prefix}: {rows} images and {n_captions} captions, expected one to be a multiple of the other"
        )
        return 0
    repeats = 1
    if fault := unequal_repeats(same):
        (report.faults if rows == n_captions else report.notes).append(f"{prefix}_ims.npy: {fault}")
    elif rows == n_captions:
        repeats = rows_per_image(same)
    images = rows // repeats
    if repeats > 1:
        report.notes.append(f"{prefix}: every image stands {repeats} times in a row, and is used once")
    report.row("", f"{images} images", "", f"{n_captions / images:g} captions an image")
    return images


def check_boxes(prefix, images, n_images, report):
    """Check SPLIT_boxes.npy, and whether it belongs to the features (a mapped array, or None)."""
    boxes = open_array(prefix + "_boxes.npy", ("images", "regions", "30 or 31"), report)
    if boxes is None:
        return
    if boxes.shape[2] not in (2 * N_SLOTS, 2 * N_SLOTS + 1):
        report.faults.append(f"{boxes.filename}: found {boxes.shape}, expected the last to be 30 or 31 (position.py)")
        return
    check_grids(boxes, report)
    if images is None:
        return
    if boxes.shape[1] != images.shape[1]:
        report.faults.append(f"{boxes.filename}: {boxes.shape[1]} regions, but {images.shape[1]} in {images.filename}")
    elif n_images and len(boxes) not in (len(images), n_images):
        report.faults.append(f"{boxes.filename}: {len(boxes)} images, but {len(images)} in {images.filename}")
    elif n_images:
        compare_boxes(images, boxes, n_images, report)


def check_whole(prefix, images, report):
    """Check SPLIT_who_ims.npy, and whether it belongs to the features (a mapped array, or None)."""
    whole = open_array(prefix + "_who_ims.npy", ("images", "img_dim"), report)
    if whole is None:
        return
    check_features(whole, report)
    if images is None:
        return
    if whole.shape[1] != images.shape[2] or len(whole) != len(images):
        report.faults.append(f"{whole.filename}: found {whole.shape}, expected ({len(images)}, {images.shape[2]})")
    else:
        compare_whole(images, whole, report)


def check_folder(folder, opt):
    """The Report of a dataset folder."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    report = Report()
    report.row("file", "shape", "type", "contents")
    vocab_path = os.path.join(opt.vocab_path, os.path.basename(os.path.normpath(folder)) + Vocabulary.suffix)
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
    check_between_splits(folder, found, report)
    return report


def check_between_splits(folder, found, report):
    """What the splits have in common. found: {split: Found}."""
    sizes = {split: f.img_dim for split, f in found.items() if f.img_dim}
    if len(set(sizes.values())) > 1:
        report.faults.append(f"{folder}: features of different sizes: {sizes}")
    elif sizes and set(sizes.values()) != {2048}:
        report.notes.append(f"{folder}: train.py needs --img_dim {next(iter(sizes.values()))}")
    for split in found:
        shared = found["train"].ids & found[split].ids if "train" in found and split != "train" else ()
        if shared:
            report.notes.append(f"{folder}: {len(shared)} images of {split} are in train as well")
    if "test" in found and "testall" in found:
        compare_splits(folder, "test", "testall", report)


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
