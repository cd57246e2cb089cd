"""Fetch the public data and unpack it into the folders that training and scoring read.

Without an ITEM nothing is fetched: a table shows what is there and how to get the rest.

  f30k      region positions for Flickr30K      → data/pfan/f30k_precomp/SPLIT_boxes.npy
  coco      region positions for MS-COCO        → data/pfan/coco_precomp/SPLIT_boxes.npy
  scan      SCAN's features, captions and vocabularies of both; needs a Kaggle login: the kaggle command is used
            where it is set up, else you are told what to fetch by hand (tens of GB)
                                                → data/*_precomp/SPLIT_{ims.npy,caps.txt}, vocab/
  tencent   Tencent-News, training and test     → data/tencent_data/, data/tencent_data_meta/
  models    trained Tencent-News models         → runs/{sentence,tag}_t2i.pth.tar
  all       all of these

Positions list the images in another order than SCAN's features. Where both are there, align.py puts the positions
in the features' order, data/*_precomp/SPLIT_boxes.npy, and proves each pair by captions, ids or regions.
So to train on Flickr30K get f30k and scan, on MS-COCO coco and scan, on Tencent-News tencent; check_data.py checks the
files.

Archives are kept in data/downloads/ until you delete them; a broken-off transfer goes on where it stopped when the
same command runs again. Files that are in place are neither fetched nor overwritten.
PFAN_DRIVE_URL names a mirror: a file is asked for as $PFAN_DRIVE_URL?id=…&export=download&confirm=t
Exit status: 0 if everything asked for is there, else 2 with one line on stderr for each part that is not.

example: python scripts/download_data.py f30k scan
"""

import argparse
import contextlib
import shutil
import sys
from collections import Counter
from pathlib import Path

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, run
from scripts.download.archives import fetch_drive, fetch_kaggle, unpack
from scripts.download.sources import ITEMS, POSITIONS, PUBLIC, Source, make_sources, print_table, split_files


def get(name: str, source: Source, opt: argparse.Namespace) -> None:
    """Fetch an archive unless it is there, unpack it and put its files in place."""
    if not source.missing():
        return
    archive = opt.data_path / "downloads" / name
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        if source.drive_id:
            fetch_drive(name, source.drive_id, archive)
        else:
            fetch_kaggle(name, archive)
    unpacked = Path(f"{archive}.unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        unpack(archive, unpacked)
    except BaseException:
        shutil.rmtree(unpacked, ignore_errors=True)
        raise
    put_in_place(name, source, unpacked, opt.vocab_path)
    if missing := source.missing():
        by_hand = f"; move what stands for them by hand out of {unpacked}" if unpacked.exists() else ""
        raise InputError(f"{name}: {archive} has no {', '.join(map(str, missing))}{by_hand}")


def put_in_place(name: str, source: Source, unpacked: Path, vocab_path: Path) -> None:
    """Move the unpacked files whose place is certain, and list all of them with where they are now."""
    files = sorted(path for path in unpacked.rglob("*") if path.is_file())
    places = {path: source.place(path.relative_to(unpacked), vocab_path) for path in files}
    claims = Counter(places.values())
    for path, target in places.items():
        where = f"left in {unpacked}"
        if target and claims[target] == 1 and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
            where = f"now {target}"
        print(f"{name}: {path.relative_to(unpacked)}: {where}")
    if not any(path.is_file() for path in unpacked.rglob("*")):
        shutil.rmtree(unpacked)


def put_beside(name: str, data_path: Path) -> None:
    """Put PFAN's positions of f30k or coco in the order of SCAN's features, where both are there.

    Raises InputError where the order cannot be proved, or boxes of unknown order lie beside the features.
    """
    features, positions = data_path / f"{name}_precomp", data_path / "pfan" / f"{name}_precomp"
    todo = []
    for path in sorted(positions.glob("*_boxes.npy")):
        split = path.name.removesuffix("_boxes.npy")
        # a record tells boxes that align.py has put there, which refuses to replace any other ones
        ims, *aligned = (features / f"{split}_{kind}" for kind in ("ims.npy", "boxes.npy", "made.json"))
        if ims.exists() and not all(made.exists() for made in aligned):
            todo.append(split)
    if todo:
        words = ["--reference", features, "--source", positions, "--out", features, "--splits", *todo]
        print("+ scripts/align.py", *words, flush=True)
        from scripts.align import align, get_parser  # here, for it imports PyTorch

        try:
            with contextlib.redirect_stderr(sys.stdout):  # its list of problems; the error comes below
                align(get_parser().parse_args(list(map(str, words))))
        except InputError as error:
            raise InputError(f"{positions}: not put beside the features of {features}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", nargs="*", metavar="ITEM", help=f"{', '.join(ITEMS)} or all")
    parser.add_argument("--data_path", type=Path, default=Path("data"), help="(default: ./data/)")
    parser.add_argument("--vocab_path", type=Path, default=Path("vocab"), help="(default: ./vocab/)")
    parser.add_argument("--model_path", type=Path, default=Path("runs"), help="(default: ./runs/)")
    opt = parser.parse_args()
    if strange := {*opt.item} - {*ITEMS, "all"}:
        raise InputError(f"{min(strange)}: expected {', '.join(ITEMS)}, all or an option (see --help)")
    asked = ITEMS if not opt.item or "all" in opt.item else opt.item
    sources = make_sources(opt.data_path, opt.model_path)
    sources = {name: source for name, source in sources.items() if source.item in asked}
    paired = [name for name in POSITIONS if name in asked or "scan" in asked]
    steps = [(get, name, source, opt) for name, source in sources.items()]
    steps += [(put_beside, name, opt.data_path) for name in paired]
    failed = False
    for step, *arguments in steps if opt.item else ():
        try:
            step(*arguments)
        except InputError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr, flush=True)
    items = {path: source.item for source in sources.values() for path in source.wanted}
    for name in paired:
        items |= dict.fromkeys(split_files(opt.data_path / f"{name}_precomp", PUBLIC, "boxes.npy"), f"{name} scan")
    print_table(items)
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    run(main)
