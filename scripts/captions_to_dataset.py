"""Captions → SPLIT_caps.txt and SPLIT_ids.txt, the same number for each image (five on the public sets).

  --karpathy FILE   Karpathy's dataset_coco.json, dataset_flickr30k.json and others of that form, with their splits:
                    restval belongs to train; MS-COCO's 5,000 test images are testall, the first 1,000 of them test
  --coco FILE …     the official captions_*.json of MS-COCO; --ids or --split says what goes where
  --tsv FILE        a caption a line: file name, tab, caption (NAME.jpg#2, as in the token files of Flickr8k and
                    Flickr30K, is NAME.jpg; so is NAME.jpg#zhc#2), or a table whose first line names its columns:
                    Kaggle's results.csv (image_name| comment_number| comment) and captions.txt (image,caption)

An image with more captions keeps its first ones, one with fewer is left out; both are reported.

example: python scripts/captions_to_dataset.py --karpathy dataset_coco.json --out data/coco_precomp
example: python scripts/captions_to_dataset.py --tsv captions.tsv --sizes dev=50 test=100 --out data/mine
"""

import argparse
import os
import random
from collections import Counter

if not __package__:
    import _root  # noqa: F401

from lib.datasets.caption_files import read_coco, read_karpathy, read_text
from lib.datasets.ids import SPLITS, canonical_id, split_ids
from lib.datasets.problems import Problems
from lib.errors import InputError, run
from lib.files import make_folder, read_lines, write_lines

COCO_TEST = 1000  # of the 5,000
DEV_IN_TRAIN = 100


def sizes_of(texts):
    """["dev=50", "test=100"] → {"dev": 50, "test": 100}."""
    sizes = {}
    for text in texts:
        split, _, count = text.partition("=")
        if split not in SPLITS or not count.isdecimal() or not int(count):
            raise InputError(f"--sizes {text}: expected SPLIT=COUNT, SPLIT one of {', '.join(SPLITS)}")
        sizes[split] = int(count)
    return sizes


def draw(names, sizes, seed):
    """Draw images at random: {split: names in their old order}; train is the rest where it has no size."""
    sizes = {"train": len(names) - sum(sizes.values()), **sizes}
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(names):
        asked = ", ".join(f"{split} {size}" for split, size in sizes.items())
        raise InputError(f"--sizes: {len(names)} images do not give {asked}")
    order, splits = list(names), {}
    random.Random(seed).shuffle(order)
    for split, size in sizes.items():
        drawn, order = set(order[:size]), order[size:]
        splits[split] = [name for name in names if name in drawn]
    return splits


def splits_of_source(captions, good, test_images):
    """{split: names} as the source says; {} where it does not say for every image."""
    splits = {}
    for name in good:
        splits.setdefault(captions.splits[name], []).append(name)
    if "testall" in splits:
        splits["test"] = splits["testall"][:test_images]
    return {} if None in splits else splits


def assign(captions, good, opt):
    """{split: list of ids} as the flags or the source ask. good: names of images with enough captions, in order."""
    splits = {opt.split: list(good)} if opt.split else splits_of_source(captions, good, opt.test_images)
    if opt.sizes:
        sizes = sizes_of(opt.sizes)
        if there := [split for split in sizes if split in splits]:
            raise InputError(f"--sizes: the source says which images are {there[0]}, expected splits that it lacks")
        splits |= draw(splits.get("train", []) if splits else list(good), sizes, opt.seed)
        if "dev" not in splits:
            splits["dev"] = splits["train"][:DEV_IN_TRAIN]
            print(f"dev: the first {len(splits['dev'])} images of train; --sizes dev=COUNT holds some out instead")
    elif not splits:
        raise InputError("the captions do not say which split they are of: --ids, --sizes or --split does")
    elif "train" in splits and "dev" not in splits and not opt.split:
        print("note: no dev split in the source, and training needs one: --sizes dev=COUNT cuts it from train")
    return {split: [captions.ids[name] for name in names] for split, names in splits.items()}


def select(captions, good, opt, problems):
    """{split: list of ids} of the id lists. Ids without enough captions go to problems and are left out."""
    splits = split_ids(opt.out, opt.ids, problems)
    for split, ids in splits.items():
        for image_id in ids:
            name = canonical_id(image_id)
            if name not in good:
                found = f"{len(captions.texts.get(name, ()))} of {opt.captions_per_image}"
                problems.add("without captions", f"{split}, id {image_id}", found)
        splits[split] = [image_id for image_id in ids if canonical_id(image_id) in good]
    return splits


def check_order(folder, split, ids):
    """Raises InputError where features of the split lie there, or are being written, in another order than ids."""
    prefix = os.path.join(folder, split)
    ids_path, features = prefix + "_ids.txt", ("_ims.npy", "_boxes.npy", "_state.part")
    there = [prefix + name for name in features if os.path.exists(prefix + name)]
    old = read_lines(ids_path) if os.path.isfile(ids_path) else None
    if there and [canonical_id(i) for i in old or ()] != [canonical_id(i) for i in ids]:
        how = f"--ids {split}={ids_path} keeps their order" if old else "--overwrite writes them all the same"
        raise InputError(f"{there[0]}: there already, and not known to be in the order of these captions; {how}")


def first_captions(captions, opt, problems):
    """{name: its first captions} of the images that have enough. Raises InputError where none has."""
    k = opt.captions_per_image
    good = {name: texts[:k] for name, texts in captions.texts.items() if len(texts) >= k}
    if not good:
        usual = Counter(map(len, captions.texts.values())).most_common(1)
        found = f"most have {usual[0][0]} (--captions_per_image)" if usual else "there are none at all"
        found += f"; {problems} (listed in {problems.path})" if problems.total else ""
        source = opt.karpathy or opt.tsv or ", ".join(opt.coco)
        raise InputError(f"{source}: no image has {k} captions, {found}")
    return good


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--karpathy", metavar="FILE")
    source.add_argument("--coco", metavar="FILE", nargs="+")
    source.add_argument("--tsv", metavar="FILE")
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the dataset folder")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--ids", nargs="+", metavar="SPLIT=FILE", help="which images, in which order: id lists")
    help_sizes = (
        "images drawn for dev and test (and train); from train alone, where the source has splits but not these"
    )
    order.add_argument("--sizes", nargs="+", metavar="SPLIT=COUNT", help=help_sizes)
    order.add_argument("--split", choices=SPLITS, help="all images go to this split")
    add("--captions_per_image", type=int, default=5, metavar="K", help="(default: %(default)s)")
    add("--test_images", type=int, default=COCO_TEST, help="of MS-COCO's testall that make test (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the drawing with --sizes (default: %(default)s)")
    add("--skip_bad", action="store_true", help="leave out malformed lines and listed images without captions")
    add("--overwrite", action="store_true", help="also where features lie there in another order")
    return parser


def main():
    opt = get_parser().parse_args()
    for name in ("captions_per_image", "test_images"):
        if getattr(opt, name) < 1:
            raise InputError(f"--{name} {getattr(opt, name)}: expected at least 1")
    problems = Problems(os.path.join(opt.out, "caption_problems.txt"))
    if opt.tsv:
        captions = read_text(opt.tsv, problems)
    else:
        captions = read_karpathy(opt.karpathy, problems) if opt.karpathy else read_coco(opt.coco, problems)
    k = opt.captions_per_image
    good = first_captions(captions, opt, problems)
    splits = select(captions, good, opt, problems) if opt.ids else assign(captions, good, opt)
    if problems.total and not opt.skip_bad:
        raise InputError(f"{problems} (listed in {problems.path}); --skip_bad goes on without them")
    listed = {canonical_id(image_id) for ids in splits.values() for image_id in ids} if opt.ids else captions.texts
    for name, texts in captions.texts.items():
        if name in listed and len(texts) > k:
            problems.add(f"with more than {k} captions", captions.ids[name], f"the first {k} of {len(texts)} are kept")
        elif name in listed and len(texts) < k:
            problems.add(f"with fewer than {k} captions", captions.ids[name], f"{len(texts)}; left out")
    if problems.total:
        print(f"{problems} (listed in {problems.path})")
    for split, ids in splits.items():  # all of them before the first is written
        if not ids:
            raise InputError(f"{split}: none of its images has {k} captions")
        if not opt.overwrite:
            check_order(opt.out, split, ids)
    make_folder(opt.out)
    for split, ids in splits.items():
        prefix = os.path.join(opt.out, split)
        captions = [text for image_id in ids for text in good[canonical_id(image_id)]]
        write_lines(prefix + "_caps.txt", captions)
        write_lines(prefix + "_ids.txt", ids)
        print(f"{split}: {len(ids)} images, {len(captions)} captions in {prefix}_caps.txt and _ids.txt")


if __name__ == "__main__":
    run(main)
