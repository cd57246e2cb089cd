"""Read a dataset folder and say what is there, and what would go wrong in training.

Each split is opened as training opens it, and read whole. Then its files are compared: whether the boxes belong to the
features, each image's captions to one image, the vocabulary to the captions.
Exit status 0: it trains (notes may be worth reading); 1: something would go wrong; 2: there is nothing to check.

example: python scripts/check_data.py data/f30k_precomp --vocab_path vocab
"""

import argparse
import glob
import logging
import os
import sys

if not __package__:
    import _root  # noqa: F401

import data
from lib.constants import SPECIAL
from lib.datasets.ids import SPLITS
from lib.errors import InputError, run
from scripts.features.checks import (
    Report,
    check_captions,
    check_features,
    check_groups,
    check_ids,
    check_whole,
    compare_boxes,
    describe_grids,
)
from vocab import Vocabulary, deserialize_vocab

NEEDED = ("train", "dev")  # a training run reads these


class Dataset(data.PrecompDataset):
    """The data set of a training run, with Tencent-News' captions where there are some."""

    def caption_path(self):
        path = self.prefix + "_sent_caps.txt"
        return path if os.path.exists(path) else super().caption_path()


def check_split(folder, split, opt, vocab, report):
    """Check the files of one split. Returns its Dataset, None where training would not open it, and its ids."""
    prefix = os.path.join(folder, split)
    check_features(prefix + "_ims.npy", report)
    dataset = report.attempt(Dataset, folder, split, vocab or Vocabulary.from_words(SPECIAL), opt)
    if dataset is None:
        return None, set()
    if dataset.repeats > 1:
        report.notes.append(f"{prefix}: every image stands {dataset.repeats} times in a row, and is used once")
    per_image = len(dataset.captions) / dataset.n_images
    report.row("", f"{dataset.n_images} images", "", f"{per_image:g} captions an image")
    check_captions(dataset.caption_path(), dataset.captions, vocab, report)
    if per_image >= 2:
        check_groups(dataset.caption_path(), dataset.captions, int(per_image), report)
    if dataset.need_boxes:
        describe_grids(dataset.boxes, report)
        compare_boxes(dataset, report)
    if opt.whole or os.path.exists(prefix + "_who_ims.npy"):
        check_whole(prefix + "_who_ims.npy", dataset.images, report)
    if not os.path.exists(prefix + "_ids.txt"):
        return dataset, set()
    return dataset, check_ids(prefix + "_ids.txt", len(dataset.images), len(dataset.captions), report)


def check_folder(folder, opt):
    """The Report of a dataset folder."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    there = [split for split in SPLITS if glob.glob(os.path.join(glob.escape(folder), f"{split}_*.*"))]
    if not there:
        raise InputError(f"{folder}: no files of the splits {', '.join(SPLITS)}")
    report = Report()
    report.row("file", "shape", "type", "contents")
    vocab_path = Vocabulary.file(opt.vocab_path, os.path.basename(os.path.normpath(folder)))
    vocab = report.attempt(deserialize_vocab, vocab_path)
    if vocab:
        report.row(vocab_path, (len(vocab),), "", "words")
    found = {split: check_split(folder, split, opt, vocab, report) for split in dict.fromkeys((*NEEDED, *there))}
    check_between_splits(folder, found, report)
    return report


def check_between_splits(folder, found, report):
    """What the splits have in common. found: {split: (Dataset or None, ids)}, train among them."""
    sizes = {split: dataset.images.shape[2] for split, (dataset, _) in found.items() if dataset}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{split} {size}" for split, size in sizes.items())
        report.faults.append(f"{folder}: features of different sizes: {listed}")
    elif sizes and set(sizes.values()) != {2048}:
        report.notes.append(f"{folder}: train.py needs --img_dim {next(iter(sizes.values()))}")
    for split, (_, ids) in found.items():
        if split != "train" and (shared := ids & found["train"][1]):
            report.notes.append(f"{folder}: {len(shared)} images of {split} are in train as well")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="DATA_PATH/DATA_NAME")
    parser.add_argument("--vocab_path", default="./vocab/", help="where NAME_vocab.json lies (default: %(default)s)")
    parser.add_argument("--position", choices=("attention", "area", "none"), default="attention", help="as in train.py")
    parser.add_argument("--whole", action="store_true", help="SPLIT_who_ims.npy are needed (Tencent_PFAN)")
    parser.add_argument("--allow_empty_captions", action="store_true", help="as in train.py")
    opt = parser.parse_args()
    logging.disable(logging.WARNING)  # what training warns of is a fault here
    try:
        report = check_folder(opt.folder, opt)
    finally:
        logging.disable(logging.NOTSET)
    report.print()
    n = len(report.faults)
    print(f"{opt.folder}: " + (f"{n} thing{'s' * (n > 1)} would go wrong" if n else "ready to train"))
    sys.exit(1 if n else 0)


if __name__ == "__main__":
    run(main)
