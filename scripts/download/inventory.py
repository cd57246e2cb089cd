"""What each archive brings, where its files belong, and whether they are sound."""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.constants import N_REGIONS, N_SLOTS
from lib.datasets.ids import SPLITS
from lib.errors import InputError

SHAPES = {  # dimensions after the number of images
    "ims.npy": [(N_REGIONS, 2048)],
    "boxes.npy": [(N_REGIONS, 2 * N_SLOTS), (N_REGIONS, 2 * N_SLOTS + 1)],
    "who_ims.npy": [(2048,)],
}


def _files(folder, splits, kinds):
    return [f"{folder}/{split}_{kind}" for split in splits.split() for kind in kinds.split()]


class Part(NamedTuple):
    """One archive. wanted: the files that it must bring, as FOLDER/FILE. welcome: those that it may bring.

    The folders models and vocab are --model_path and --vocab_path, the others lie under --data_path. Where the archive
    does not say which data set a file is of, it belongs to the folder of the first wanted file.
    """

    wanted: list[str]
    welcome: list[str] = []


# Positions stand apart from SCAN's features: they list the pictures in another order, see align.
PARTS = {
    "f30k": Part(
        _files("pfan/f30k_precomp", "train dev test", "boxes.npy"),
        _files("pfan/f30k_precomp", "train dev test", "ims.npy caps.txt ids.txt"),
    ),
    "coco": Part(
        _files("pfan/coco_precomp", "train dev test", "boxes.npy"),
        _files("pfan/coco_precomp", "train dev test testall", "boxes.npy ims.npy caps.txt ids.txt"),
    ),
    "scan": Part(
        _files("f30k_precomp", "train dev test", "ims.npy caps.txt")
        + _files("coco_precomp", "train dev test testall", "ims.npy caps.txt"),
        _files("f30k_precomp", "train dev test", "ids.txt")
        + _files("coco_precomp", "train dev test testall", "ids.txt"),
    ),
    "tencent_train": Part(_files("tencent_data", "train dev", "ims.npy boxes.npy who_ims.npy caps.txt")),
    "tencent_test": Part(
        [f"tencent_data_meta/{name}" for name in "test_own.tsv.0 test_features.json img_id.txt test_list.json".split()]
    ),
    "models": Part(["models/sentence_t2i.pth.tar", "models/tag_t2i.pth.tar"]),
}
ITEMS = {  # what a user asks for
    "f30k": ["f30k"],
    "coco": ["coco"],
    "scan": ["scan"],
    "tencent": ["tencent_train", "tencent_test"],
    "models": ["models"],
}


def _order(file):
    """Sorts files by folder, then by split."""
    folder, _, name = file.rpartition("/")
    split = name.partition("_")[0]
    return folder, SPLITS.index(split) if split in SPLITS else 0, name


# Each file and the items that bring it, "" where it may lack. Boxes beside SCAN's features come by both, see align.
ITEM_OF = {file: item for item, parts in ITEMS.items() for part in parts for file in PARTS[part].wanted}
for name in ("f30k", "coco"):
    ITEM_OF |= dict.fromkeys(_files(f"{name}_precomp", "train dev test", "boxes.npy"), f"{name} scan")
ITEM_OF = {**dict.fromkeys([file for part in PARTS.values() for file in part.welcome], ""), **ITEM_OF}
ITEM_OF = dict(sorted(ITEM_OF.items(), key=lambda entry: _order(entry[0])))


class Folders(NamedTuple):
    """Where files go: --data_path, --vocab_path, --model_path."""

    data: Path
    vocab: Path
    models: Path

    def candidates(self, wanted):
        """The paths under which a FOLDER/FILE may lie (the captions of Tencent-News have two names)."""
        folder, _, name = wanted.rpartition("/")
        names = [name]
        if folder == "tencent_data" and name.endswith("_caps.txt"):
            names = [name.replace("_caps.txt", "_sent_caps.txt"), name]
        parent = self.models if folder == "models" else self.data / folder
        return [parent / name for name in names]

    def find(self, wanted):
        """The path of a FOLDER/FILE: the one that exists, else the first that it may have."""
        return min(self.candidates(wanted), key=lambda path: not path.exists())

    def missing(self, part):
        return [wanted for wanted in PARTS[part].wanted if not self.find(wanted).exists()]

    def place(self, part, path):
        """Where an unpacked file belongs, or None. It is known by its name and a data set's name above it."""
        if path.name.endswith("_vocab.json"):
            return self.vocab / path.name
        files = [*PARTS[part].wanted, *PARTS[part].welcome]
        folders = list(dict.fromkeys(file.rpartition("/")[0] for file in files))
        named = [folder for folder in folders if folder.rpartition("/")[2] in path.parts]
        if not named and len(folders) > 1:
            return None
        folder = (named or folders)[0]
        paths = [path for file in files if file.rpartition("/")[0] == folder for path in self.candidates(file)]
        return next((target for target in paths if target.name == path.name), None)


def describe(path: Path) -> str:
    """What a file holds, in a few words, without reading arrays. Raises InputError if it is not what its name says."""
    kind = path.name.split("_", 1)[-1]
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path}: empty; delete it and run this again")
    if kind in SHAPES:
        return _describe_array(path, SHAPES[kind], size)
    if kind.endswith(".txt"):
        with open(path, "rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            file.seek(-1, 2)
            lines += file.read(1) != b"\n"
        return f"{lines} lines"
    return f"{size / 1e6:,.1f} MB"


def _describe_array(path, shapes, size):
    expected = " or ".join(str(("n", *shape)).replace("'", "") for shape in shapes)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # noqa: TID251
    except (ValueError, EOFError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path}: no complete .npy file ({size:,} bytes; {problem}), expected {expected}") from None
    if not isinstance(array, np.memmap):
        raise InputError(f"{path}: not a single .npy array, expected {expected}")
    if array.offset + array.nbytes != size:
        raise InputError(f"{path}: {size:,} bytes, its header promises {array.offset + array.nbytes:,}")
    if array.dtype.kind != "f" or array.shape[1:] not in shapes:
        raise InputError(f"{path}: {array.dtype} {array.shape}, expected floats {expected}")
    return "×".join(map(str, array.shape))


def print_table(parts: list[str], folders: Folders) -> bool:
    """Print what is there of the data sets that these parts are of. Returns whether no file is faulty."""
    sound = True
    data_sets = {_data_set(file) for part in parts for file in PARTS[part].wanted}
    missing: Counter[str] = Counter()
    for file, item in ITEM_OF.items():
        path = folders.find(file)
        if _data_set(file) not in data_sets or not (item or path.exists()):
            continue
        state = "missing"
        try:
            if path.exists():
                state = describe(path)
        except InputError as error:
            state, sound = "faulty", False
            print(f"error: {error}", file=sys.stderr)
        missing[item] += state == "missing"
        print(f"{path!s:<48} {state}")
    for item, count in missing.items():
        login = " (needs a Kaggle login)" if "scan" in item else ""
        if count:
            print(f"{count} missing: sh scripts/download_data.sh {item}{login}")
    return sound


def _data_set(file):
    return file.split("/")[-2]
