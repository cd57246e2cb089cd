"""Captions → SPLIT_caps.txt and SPLIT_ids.txt, the same number for each picture (five on the public sets).

  --karpathy FILE   Karpathy's dataset_coco.json or dataset_flickr30k.json, with his splits: restval belongs to train;
                    MS-COCO's 5,000 test pictures are testall, the first 1,000 of them test
  --coco FILE …     the official captions_*.json of MS-COCO; --ids or --split says what goes where
  --tsv FILE        your own: file name, tab, caption; a line each ("NAME#2", as in Flickr30K's token file, is NAME)

A picture with more captions keeps its first ones, one with fewer is left out; both are reported.
"""

import argparse
import contextlib
import io
import os
import random
import re
from collections import Counter

from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets.ids import SPLITS, canonical_id, split_ids
from lib.datasets.json_files import json_items
from lib.datasets.problems import Problems
from lib.errors import InputError, brief, run
from lib.files import make_folder, name_in_errors, read_lines, write_lines

KARPATHY = {"train": "train", "restval": "train", "val": "dev", "test": "test"}
COCO_TEST = 1000  # of the 5,000
DEV_IN_TRAIN = 100
LINE_END = re.compile(r"\s*[\r\n\t\v\f\x1c-\x1e\x85\u2028\u2029]+\s*")


class Pictures:
    """Captions by picture, in the order of the source: ids, texts and splits (each {key: …})."""

    def __init__(self):
        self.ids, self.texts, self.splits = {}, {}, {}

    def add(self, image_id, captions, split=None):
        if not isinstance(image_id, (int, str)):
            raise TypeError(f"{image_id} is no name")
        name = canonical_id(image_id)
        self.ids.setdefault(name, str(image_id))
        self.splits.setdefault(name, split)
        self.texts.setdefault(name, []).extend(LINE_END.sub(" ", text).strip() for text in captions)


def read_karpathy(path):
    pictures = Pictures()
    for number, item in enumerate(json_items(path, "images"), 1):
        try:
            split = KARPATHY.get(item["split"])
            if split is None:
                expected = ", ".join(KARPATHY)
                raise InputError(f"{path}: picture {number}: split {brief(item['split'])}, expected {expected}")
            image_id, captions = item.get("cocoid", item["filename"]), [s["raw"] for s in item["sentences"]]
            pictures.add(image_id, captions, "testall" if split == "test" and "cocoid" in item else split)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: picture {number} lacks filename, split or sentences ({error})") from None
    return pictures


def read_coco(paths):
    from pycocotools.coco import COCO

    pictures = Pictures()
    for path in paths:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it reports what it does
                coco = COCO(path)
            for image_id in tqdm(sorted(coco.imgs), desc=os.path.basename(path), leave=False, disable=None):
                annotations = sorted(coco.imgToAnns[image_id], key=lambda annotation: annotation["id"])
                pictures.add(image_id, [annotation["caption"] for annotation in annotations])
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
            raise InputError(f"{path}: not an official captions file ({type(error).__name__}: {error})") from None
    return pictures


def read_tsv(path, problems):
    pictures = Pictures()
    for number, line in enumerate(tqdm(read_lines(path), os.path.basename(path), leave=False, disable=None), 1):
        name, tab, caption = line.partition("\t")
        if tab and name.strip() and caption.strip():
            pictures.add(re.sub(r"#\d+$", "", name.strip()), [caption])
        elif line:
            problems.add("malformed", f"{path}, line {number}", "expected: file name, tab, caption")
    return pictures


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
    """Deal the pictures out at random: {split: names in their old order}; train is the rest where it has no size."""
    order = list(names)
    random.Random(seed).shuffle(order)
    sizes = {"train": len(order) - sum(sizes.values()), **sizes}
    if min(sizes.values()) < 1 or sum(sizes.values()) > len(order):
        raise InputError(f"{len(order)} pictures with captions do not give {sizes}")
    splits, position = {}, {name: i for i, name in enumerate(names)}
    for split, size in sizes.items():
        splits[split], order = sorted(order[:size], key=position.get), order[size:]
    if "dev" not in splits:
        splits["dev"] = splits["train"][:DEV_IN_TRAIN]
        print(f"dev: the first {len(splits['dev'])} pictures of train; --sizes dev=COUNT holds some out instead")
    return splits


def deal(pictures, good, opt, problems):
    """{split: list of ids} as the flags ask. good: keys of pictures with enough captions, in order."""
    if opt.ids:
        splits = split_ids(opt.out, opt.ids, problems)
        for split, ids in splits.items():
            for image_id in ids:
                if canonical_id(image_id) not in good:
                    n = sum(map(bool, pictures.texts.get(canonical_id(image_id), ())))
                    problems.add("without captions", f"{split}, id {image_id}", f"{n} of {opt.captions_per_image}")
            splits[split] = [image_id for image_id in ids if canonical_id(image_id) in good]
        return splits
    if opt.sizes:
        splits = draw(list(good), sizes_of(opt.sizes), opt.seed)
    elif opt.split:
        splits = {opt.split: list(good)}
    else:
        splits = {}
        for name in good:
            splits.setdefault(pictures.splits[name], []).append(name)
        if None in splits:
            raise InputError("the captions do not say which split they are of: --ids, --sizes or --split does")
        if "testall" in splits:
            splits["test"] = splits["testall"][: opt.test_images]
    return {split: [pictures.ids[name] for name in names] for split, names in splits.items()}


def check_order(folder, split, ids):
    """Raises InputError where features of the split lie there, in another order than ids."""
    prefix = os.path.join(folder, split)
    ids_path, features = prefix + "_ids.txt", [prefix + "_ims.npy", prefix + "_boxes.npy"]
    there = [path for path in features if os.path.exists(path)]
    old = read_lines(ids_path) if os.path.isfile(ids_path) else None
    if there and [canonical_id(i) for i in old or ()] != [canonical_id(i) for i in ids]:
        how = f"--ids {split}={ids_path} keeps their order" if old else "--overwrite writes them all the same"
        raise InputError(f"{there[0]}: there already, and not known to be in the order of these captions; {how}")


def write_split(folder, split, ids, captions):
    """Write SPLIT_caps.txt and SPLIT_ids.txt."""
    prefix = os.path.join(folder, split)
    for path, lines in ((prefix + "_caps.txt", captions), (prefix + "_ids.txt", ids)):
        with name_in_errors(path):
            write_lines(path, lines)
    print(f"{split}: {len(ids)} pictures, {len(captions)} captions in {prefix}_caps.txt and _ids.txt")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/captions_to_dataset.py --karpathy dataset_coco.json --out data/coco_precomp\n"
        "example: python scripts/captions_to_dataset.py --tsv captions.tsv --sizes dev=50 test=100 --out data/mine",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--karpathy", metavar="FILE")
    source.add_argument("--coco", metavar="FILE", nargs="+")
    source.add_argument("--tsv", metavar="FILE")
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="the dataset folder")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--ids", nargs="+", metavar="SPLIT=FILE", help="which pictures, in which order: id lists")
    order.add_argument("--sizes", nargs="+", metavar="SPLIT=COUNT", help="pictures drawn for dev and test (and train)")
    order.add_argument("--split", choices=SPLITS, help="all pictures go to this split")
    add("--captions_per_image", type=int, default=5, metavar="K", help="(default: %(default)s)")
    add("--test_images", type=int, default=COCO_TEST, help="of MS-COCO's testall that make test (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the drawing with --sizes (default: %(default)s)")
    add("--skip_bad", action="store_true", help="leave out malformed lines and listed pictures without captions")
    add("--overwrite", action="store_true", help="also where features lie there in another order")
    opt = parser.parse_args()
    for name in ("captions_per_image", "test_images"):
        if getattr(opt, name) < 1:
            raise InputError(f"--{name} {getattr(opt, name)}: expected at least 1")
    make_folder(opt.out)
    problems = Problems(os.path.join(opt.out, "caption_problems.txt"))
    if opt.karpathy:
        pictures = read_karpathy(opt.karpathy)
    elif opt.coco:
        pictures = read_coco(opt.coco)
    else:
        pictures = read_tsv(opt.tsv, problems)
    k = opt.captions_per_image
    counts = {name: sum(map(bool, texts)) for name, texts in pictures.texts.items()}
    good = {name: [text for text in pictures.texts[name] if text][:k] for name in counts if counts[name] >= k}
    if not good:
        usual = Counter(counts.values()).most_common(1)
        found = f"most have {usual[0][0]} (--captions_per_image)" if usual else "there are none at all"
        source = opt.karpathy or opt.tsv or ", ".join(opt.coco)
        raise InputError(f"{source}: no picture has {k} captions, {found}")
    splits = deal(pictures, good, opt, problems)
    if problems.total and not opt.skip_bad:
        raise InputError(f"{problems} (listed in {problems.path}); --skip_bad goes on without them")
    listed = {canonical_id(image_id) for ids in splits.values() for image_id in ids} if opt.ids else counts
    for name, count in counts.items():
        if name in listed and count > k:
            problems.add(f"with more than {k} captions", pictures.ids[name], f"the first {k} of {count} are kept")
        elif name in listed and count < k:
            problems.add(f"with fewer than {k} captions", pictures.ids[name], f"{count}; left out")
    if problems.total:
        print(f"{problems} (listed in {problems.path})")
    for split, ids in splits.items():  # all of them before the first is written
        if not ids:
            raise InputError(f"{split}: none of its pictures has {k} captions")
        if not opt.overwrite:
            check_order(opt.out, split, ids)
    for split, ids in splits.items():
        captions = [text for image_id in ids for text in good[canonical_id(image_id)]]
        write_split(opt.out, split, ids, captions)


if __name__ == "__main__":
    run(main)
