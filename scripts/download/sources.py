"""The archives: where they are fetched, what they bring and where their files belong."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lib.datasets.news import FILES

KNOWN = re.compile(r"(train|dev|test|testall)_((ims|boxes|who_ims)\.npy|(caps|sent_caps|ids)\.txt)")  # in a data set
PUBLIC = ("train", "dev", "test")
ITEMS = ("f30k", "coco", "scan", "tencent", "models")
POSITIONS = ("f30k", "coco")  # the items whose positions are put beside SCAN's features


class Source(NamedTuple):
    """One archive. item: what a user asks for. drive_id: Google Drive's; None where it comes from Kaggle.

    wanted: the files that it must bring. Where the archive does not say which data set a file is of, it belongs to the
    only folder of these.
    """

    item: str
    drive_id: str | None
    wanted: list[Path]

    def missing(self) -> list[Path]:
        return [path for path in self.wanted if not found_as(path).exists()]

    def place(self, path: Path, vocab_path: Path) -> Path | None:
        """Where an unpacked file belongs. It is known by its name and a data set's name among its folders."""
        if path.name.endswith("_vocab.json"):
            return vocab_path / path.name
        folders = {wanted.parent for wanted in self.wanted}
        named = {folder for folder in folders if folder.name in path.parts} or folders
        target = min(named) / path.name
        is_known = target in self.wanted or KNOWN.fullmatch(path.name)
        return target if is_known and len(named) == 1 else None


def found_as(path: Path) -> Path:
    """The path of a wanted file, or the other name of Tencent-News' captions where only that exists."""
    other = path.with_name(path.name.replace("_caps.txt", "_sent_caps.txt"))
    return other if other.exists() and not path.exists() else path


def split_files(folder: Path, splits: tuple, *kinds: str) -> list[Path]:
    return [folder / f"{split}_{kind}" for split in splits for kind in kinds]


def make_sources(data: Path, models: Path) -> dict[str, Source]:
    """The archives by name, with files under data (--data_path) and models (--model_path)."""
    # Positions stand apart from SCAN's features: they list the images in another order, see put_beside of
    # download_data.py.
    f30k, coco = (split_files(data / "pfan" / f"{name}_precomp", PUBLIC, "boxes.npy") for name in POSITIONS)
    scan = split_files(data / "f30k_precomp", PUBLIC, "ims.npy", "caps.txt")
    scan += split_files(data / "coco_precomp", (*PUBLIC, "testall"), "ims.npy", "caps.txt")
    train = split_files(data / "tencent_data", ("train", "dev"), "ims.npy", "boxes.npy", "who_ims.npy", "caps.txt")
    test = [data / "tencent_data_meta" / name for name in (*FILES, "test_list.json")]
    trained = [models / f"{name}_t2i.pth.tar" for name in ("sentence", "tag")]
    return {
        "f30k": Source("f30k", "1ZiF1IoeExPcn9V9L78X6jEYuMxR96OLO", f30k),
        "coco": Source("coco", "1DaCZxeXOCm05u-Gf-_MG_zSNKO1UxBat", coco),
        "scan": Source("scan", None, scan),
        "tencent_train": Source("tencent", "1WKq05mhSMc2u0SLtCWkUzgmqTLx95kXR", train),
        "tencent_test": Source("tencent", "1dPyo2EBHQoHkqx-Dl4R7ISb8t-rVG_KK", test),
        "models": Source("models", "1SA2J8-m6w6HvbXyDkOtjLcD7Tw4A9hPn", trained),
    }


def print_table(items: dict[Path, str]) -> None:
    """Print which files are there, and how to get the others. items: what brings each file."""
    missing = Counter[str]()
    for path, item in items.items():
        path = found_as(path)
        missing[item] += not path.exists()
        print(f"{path!s:<48} " + (f"{path.stat().st_size / 1e6:,.1f} MB" if path.exists() else "missing"))
    for item, count in missing.items():
        login = " (needs a Kaggle login)" if "scan" in item else ""
        if count:
            print(f"{count} missing: sh scripts/download_data.sh {item}{login}")
