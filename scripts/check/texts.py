"""Checks of captions and ids."""

import os
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from lib.datasets.ids import canonical_id
from lib.datasets.pairing import Split, by_captions, by_ids
from lib.errors import InputError
from lib.files import read_lines
from scripts.check.report import Report
from vocab import Vocabulary, tokenize, unknown_words_message

LONG_CAPTION = 60  # words
MANY_UNKNOWN = 0.05
SAMPLE = 1000  # groups of captions, and images of two splits, that are compared
BETTER = 1.5  # times the words in common that tell one image's captions from two images'
CLOSE = 1e-3  # relative difference of features that are the same; float16 rounds by 5e-4


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
    if len(captions) < 10 * per_image:
        return
    n = len(captions) // per_image
    words = [set(caption.lower().split()) for caption in captions]
    images = np.unique(np.linspace(1, n - 1, SAMPLE).astype(int))

    def shared(line, other):
        """Share of the words that two lines have in common, given by an image's number; the mean."""
        pairs = [(words[line(i)], words[other(i)]) for i in images]
        return np.mean([len(a & b) / max(1, len(a | b)) for a, b in pairs])

    # Line 0 of an image shares least with the line before, which is another image's.
    before = [shared(lambda i, j=j: i * per_image + j - 1, lambda i, j=j: i * per_image + j) for j in range(per_image)]
    start = int(np.argmin(before))
    apart = shared(lambda i: i - 1, lambda i: i - 1 + n)
    found = ""
    if before[0] > BETTER * before[start]:
        found = (
            f"the first image's from line {start + 1}: lines before and after share {before[start]:.2f} of the words"
        )
        found += f" there, {before[0]:.2f} at the others"
    elif apart > BETTER * np.mean(before[1:]):
        found = f"first one caption of every image, then the next: lines {n} apart share {apart:.2f} of the words"
        found += f", neighbours {np.mean(before[1:]):.2f}"
    if found:
        report.faults.append(f"{path}: expected {per_image} captions of each image in a row, found {found}")


def check_ids(path: str, n_images: int, n_captions: int, report: Report) -> set[str]:
    """Count the ids; training reads none, so what is wrong with them is a note. Returns the canonical ids."""
    try:
        ids = read_lines(path)
    except InputError as error:
        report.notes.append(str(error))
        return set()
    names = [canonical_id(name) for name in ids]
    report.row(os.path.basename(path), (len(ids),), "", f"{len(set(names))} different")
    if n_images and len(ids) not in (n_images, n_captions):
        report.notes.append(f"{path}: {len(ids)} ids for {n_images} images")
    elif again := sum(a != b for a, b in zip(names, names[1:], strict=False)) + 1 - len(set(names)):
        report.notes.append(f"{path}: {again} ids stand again after others; two images have one id")
    return set(names)


def compare_splits(folder: str, small: str, large: str, report: Report) -> None:
    """Whether images of one split that stand in a larger one (test in testall) have its captions and features there."""
    try:
        a, b = Split(folder, small), Split(folder, large)
    except InputError:
        return  # reported with the files
    for by, finder in (("ids", by_ids), ("captions", by_captions)):
        if not all(getattr(split, {"ids": "ids", "captions": "digests"}[by]) for split in (a, b)):
            continue
        pairs = [(row, hits[0]) for row, hits in enumerate(finder([b])(a)) if len(hits) == 1]
        for what, differ in (("captions", _captions_differ), ("features", _features_differ)):
            wrong = sum(differ(a, row, partner) for row, partner in pairs[:: len(pairs) // SAMPLE + 1])
            if wrong:
                report.faults.append(
                    f"{b.prefix}: {wrong} images have other {what} than the same images in {a.prefix}, by their {by}"
                )


def _captions_differ(split, row, partner):
    if not (split.digests and partner.split.digests):
        return False
    return not set(split.digests[row]) & set(partner.split.digests[partner.row])


def _features_differ(split, row, partner):
    if not ("ims" in split.arrays and "ims" in partner.split.arrays):
        return False
    a, b = (x.astype(np.float32) for x in (split.read("ims", row)[0], partner.read("ims")))
    return a.shape == b.shape and np.abs(a - b).max() > CLOSE * max(np.abs(a).max(), 1)
