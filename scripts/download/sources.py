"""The archives: where they are fetched, what they bring and where their files belong."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lib.datasets.news import FILES

KNOWN = re.compile(r"(train|dev|test|testall)_((ims|boxes|who_ims)\.npy|(caps|sent_caps|ids)\.txt)")  # in a data set
PUBLIC = "train dev test"


def files(folder, splits, kinds):
    return [f"{folder}/{split}_{kind}" for split in splits.split() for kind in kinds.split()]


class Source(NamedTuple):
    """One archive. item: what a user asks for. drive_id: Google Drive's; None where it comes from Kaggle.

    wanted: the files that it must bring, as FOLDER/FILE. The folder models is --model_path, the others lie under
    --data_path. Where the archive does not say which data set a file is of, it belongs to the only folder.
    """

    item: str
    drive_id: str | None
    wanted: list[str]


SCAN = files("f30k_precomp", PUBLIC, "ims.npy caps.txt")
SCAN += files("coco_precomp", PUBLIC + " testall", "ims.npy caps.txt")
TENCENT_TRAIN = files("tencent_data", "train dev", "ims.npy boxes.npy who_ims.npy caps.txt")
TENCENT_TEST = [f"tencent_data_meta/{name}" for name in (*FILES, "test_list.json")]
MODELS = ["models/sentence_t2i.pth.tar", "models/tag_t2i.pth.tar"]
# Positions stand apart from SCAN's features: they list the images in another order, see put_beside in download_data.py.
SOURCES = {
    "f30k": Source("f30k", "1ZiF1IoeExPcn9V9L78X6jEYuMxR96OLO", files("pfan/f30k_precomp", PUBLIC, "boxes.npy")),
    "coco": Source("coco", "1DaCZxeXOCm05u-Gf-_MG_zSNKO1UxBat", files("pfan/coco_precomp", PUBLIC, "boxes.npy")),
    "scan": Source("scan", None, SCAN),
    "tencent_train": Source("tencent", "1WKq05mhSMc2u0SLtCWkUzgmqTLx95kXR", TENCENT_TRAIN),
    "tencent_test": Source("tencent", "1dPyo2EBHQoHkqx-Dl4R7ISb8t-rVG_KK", TENCENT_TEST),
    "models": Source("models", "1SA2J8-m6w6HvbXyDkOtjLcD7Tw4A9hPn", MODELS),
}
ITEMS = list(dict.fromkeys(source.item for source in SOURCES.values()))
POSITIONS = ("f30k", "coco")  # the items whose positions are put beside SCAN's features


class Folders(NamedTuple):
    """Where files go: --data_path, --vocab_path, --model_path."""

    data: Path
    vocab: Path
    models: Path

    def find(self, file):
        """The path of a FOLDER/FILE, or under which it will lie (the captions of Tencent-News have two names)."""
        folder, _, name = file.rpartition("/")
        parent = self.models if folder == "models" else self.data / folder
        sent = parent / name.replace("_caps.txt", "_sent_caps.txt")
        return sent if folder == "tencent_data" and not (parent / name).exists() else parent / name

    def missing(self, source):
        return [file for file in source.wanted if not self.find(file).exists()]

    def place(self, source, path):
        """Where an unpacked file belongs, or None. It is known by its name and a data set's name above it."""
        if path.name.endswith("_vocab.json"):
            return self.vocab / path.name
        folders = {file.rpartition("/")[0] for file in source.wanted}
        named = {folder for folder in folders if folder.rpartition("/")[2] in path.parts} or folders
        file = f"{min(named)}/{path.name}"
        if len(named) > 1 or not (file in source.wanted or KNOWN.fullmatch(path.name)):
            return None
        return self.models / path.name if file.startswith("models/") else self.data / file


def print_table(names: list[str], folders: Folders) -> None:
    """Print which files of these SOURCES are there, and how to get the others."""
    items = {file: SOURCES[name].item for name in names for file in SOURCES[name].wanted}
    for name in POSITIONS:
        if name in names or "scan" in names:
            items |= dict.fromkeys(files(f"{name}_precomp", PUBLIC, "boxes.npy"), f"{name} scan")
    missing = Counter[str]()
    for file, item in items.items():
        path = folders.find(file)
        missing[item] += not path.exists()
        print(f"{path!s:<48} " + (f"{path.stat().st_size / 1e6:,.1f} MB" if path.exists() else "missing"))
    for item, count in missing.items():
        login = " (needs a Kaggle login)" if "scan" in item else ""
        if count:
            print(f"{count} missing: sh scripts/download_data.sh {item}{login}")
