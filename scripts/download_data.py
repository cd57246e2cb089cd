"""Fetch the public data, unpack it into the folders that training and scoring read, check every file.

Without an ITEM nothing is fetched: a table shows what is there and how to get the rest.

  f30k      region positions for Flickr30K      → data/pfan/f30k_precomp/SPLIT_boxes.npy
  coco      region positions for MS-COCO        → data/pfan/coco_precomp/SPLIT_boxes.npy
  scan      SCAN's features, captions and vocabularies of both; needs a Kaggle login: the kaggle command is used
            where it is set up, else you are told what to fetch by hand (tens of GB)
                                                → data/*_precomp/SPLIT_{ims.npy,caps.txt}, vocab/
  tencent   Tencent-News, training and test     → data/tencent_data/, data/tencent_data_meta/
  models    trained Tencent-News models         → runs/{sentence,tag}_t2i.pth.tar
  all       all of these

Positions list the pictures in another order than SCAN's features. Where both are there, align.py puts the positions
in the features' order, data/*_precomp/SPLIT_boxes.npy, and proves each pair by captions, ids or regions.
So to train on Flickr30K get f30k and scan, on MS-COCO coco and scan, on Tencent-News tencent.

Archives are kept in data/downloads/ until you delete them; a broken-off transfer goes on where it stopped when the
same command runs again. Files that are in place are neither fetched nor overwritten.
PFAN_DRIVE_URL names a mirror: a file is asked for as $PFAN_DRIVE_URL?id=…&export=download&confirm=t
Exit status: 0 if everything asked for is there, else 2 with one line on stderr for each part that is not.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, run
from scripts.download.archives import unpack
from scripts.download.inventory import ITEMS, PARTS, Folders, print_table
from scripts.download.transfer import fetch_drive, fetch_kaggle

DRIVE_IDS = {
    "f30k": "1ZiF1IoeExPcn9V9L78X6jEYuMxR96OLO",
    "coco": "1DaCZxeXOCm05u-Gf-_MG_zSNKO1UxBat",
    "tencent_train": "1WKq05mhSMc2u0SLtCWkUzgmqTLx95kXR",
    "tencent_test": "1dPyo2EBHQoHkqx-Dl4R7ISb8t-rVG_KK",
    "models": "1SA2J8-m6w6HvbXyDkOtjLcD7Tw4A9hPn",
}
ALIGN = Path(__file__).with_name("align.py")


def get_part(part: str, folders: Folders) -> None:
    """Fetch a part's archive unless it is there, unpack it and put its files in place."""
    if not folders.missing(part):
        return
    archive = folders.data / "downloads" / part
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        if part == "scan":
            fetch_kaggle(part, archive)
        else:
            fetch_drive(part, DRIVE_IDS[part], archive)
    unpacked = Path(f"{archive}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        unpack(archive, unpacked)
    except BaseException:
        shutil.rmtree(unpacked, ignore_errors=True)
        raise
    put_in_place(part, unpacked, folders)
    if missing := folders.missing(part):
        by_hand = f"; move what stands for them by hand out of {unpacked}" if unpacked.exists() else ""
        raise InputError(f"{part}: {archive} has no {', '.join(missing)}{by_hand}")


def put_in_place(part: str, unpacked: Path, folders: Folders) -> None:
    """Move the unpacked files whose place is certain, and list all of them with where they are now."""
    files = sorted(path for path in unpacked.rglob("*") if path.is_file())
    places = {path: folders.place(part, path.relative_to(unpacked)) for path in files}
    claims = Counter(places.values())
    for path, target in places.items():
        name = f"{part}: {path.relative_to(unpacked)}"
        if target is None:
            print(f"{name}: left in {unpacked}")
        elif claims[target] > 1:
            print(f"{name}: left in {unpacked}, because {claims[target]} files would be {target}")
        elif target.exists():
            print(f"{name}: left in {unpacked}, because {target} is there already")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
            print(f"{name} → {target}")
    for path in [*sorted(unpacked.rglob("*"), reverse=True), unpacked]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def align(name: str, folders: Folders) -> None:
    """Put PFAN's positions of a data set in the order of SCAN's features, where both are there.

    Raises InputError where the order cannot be proved, or boxes of unknown order lie beside the features.
    """
    positions, features = folders.data / "pfan" / name, folders.data / name
    splits = [path.name.removesuffix("_boxes.npy") for path in sorted(positions.glob("*_boxes.npy"))]
    if splits and all((positions / f"{split}_{kind}").exists() for split in splits for kind in ("ims.npy", "caps.txt")):
        print(f"{positions}: features, captions and positions, which train as they are: --data_path {positions.parent}")
    splits = [split for split in splits if (features / f"{split}_ims.npy").exists()]
    todo = [split for split in splits if not is_aligned(features / split)]
    if not todo:
        return
    command = [sys.executable, str(ALIGN), "--reference", str(features), "--source", str(positions)]
    command += ["--out", str(features), "--splits", *todo]
    print("+", " ".join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"align.py ended with status {done.returncode}"]
        print(*lines[:-1], sep="\n", end="\n" * (len(lines) > 1))
        reason = lines[-1].removeprefix("error: ")
        raise InputError(f"{positions}: not put beside the features of {features}: {reason}")


def is_aligned(prefix: Path) -> bool:
    """Whether align.py has put the boxes of a split there. Raises InputError where somebody else has."""
    boxes, made = Path(f"{prefix}_boxes.npy"), Path(f"{prefix}_made.json")
    if not boxes.exists():
        return False
    try:
        if json.loads(made.read_bytes())["settings"]["tool"] == "align":
            return True
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{boxes}: not put there by align.py, its order is unknown; move it away and run this again")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/download_data.py f30k scan",
    )
    parser.add_argument("item", nargs="*", metavar="ITEM", help="f30k, coco, scan, tencent, models or all")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="(default: ./data/)")
    parser.add_argument("--vocab_path", type=Path, default=Path("vocab"), help="(default: ./vocab/)")
    parser.add_argument("--model_path", type=Path, default=Path("runs"), help="(default: ./runs/)")
    opt = parser.parse_args()
    for item in opt.item:
        if item not in (*ITEMS, "all"):
            raise InputError(f"{item}: expected {', '.join(ITEMS)}, all or an option (see --help)")
    items = list(ITEMS) if "all" in opt.item else opt.item
    parts = [part for item in items for part in ITEMS[item]]
    folders = Folders(opt.data_path, opt.vocab_path, opt.model_path)
    steps = [(get_part, part) for part in parts]
    steps += [(align, f"{name}_precomp") for name in ("f30k", "coco") if name in parts or "scan" in parts]
    failed = False
    for step, name in steps:
        try:
            step(name, folders)
        except InputError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr, flush=True)
    sound = print_table(parts or list(PARTS), folders)
    sys.exit(0 if not opt.item or (sound and not failed) else 2)


if __name__ == "__main__":
    run(main)
