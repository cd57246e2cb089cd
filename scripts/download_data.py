"""The part of download_data.sh that looks into files: unpacks an archive, puts its files in place, checks them.

python scripts/download_data.py has PART             status 0 if all files of the part are in place, else 1
python scripts/download_data.py unpack PART ARCHIVE  unpack, put in place, check; status 2 if something is missing
python scripts/download_data.py table [PART …]       what is there, what is missing and how to get it
"""

import argparse
import errno
import lzma
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, brief, run

# what damaged archives make tarfile, zipfile and the decompressors raise, beside an OSError of no number
UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
    MemoryError,
)
SPLITS = {
    "f30k_precomp": ("train", "dev", "test"),
    "coco_precomp": ("train", "dev", "test", "testall"),
    "tencent_data": ("train", "dev"),
}
SHAPES = {  # dimensions after the number of images
    "ims.npy": [(36, 2048)],
    "boxes.npy": [(36, 30), (36, 31)],
    "who_ims.npy": [(2048,)],
}


def files(folder, *kinds):
    return [f"{folder}/{split}_{kind}" for split in SPLITS[folder] for kind in kinds]


# What each part brings, as FOLDER/FILE. The folders models and vocab are --model_path and --vocab_path, the others
# lie under --data_path. Where the archive does not say which data set a file is of, it belongs to the first folder.
PARTS = {
    "f30k": files("f30k_precomp", "boxes.npy"),
    "coco": files("coco_precomp", "boxes.npy"),
    "scan": files("f30k_precomp", "ims.npy", "caps.txt") + files("coco_precomp", "ims.npy", "caps.txt"),
    "tencent_train": files("tencent_data", "ims.npy", "boxes.npy", "who_ims.npy", "caps.txt"),
    "tencent_test": [
        f"tencent_data_meta/{name}" for name in ("test_own.tsv.0", "test_features.json", "img_id.txt", "test_list.json")
    ],
    "models": ["models/sentence_t2i.pth.tar", "models/tag_t2i.pth.tar"],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/download_data.py table f30k scan",
    )
    parser.add_argument("command", choices=["has", "unpack", "table"])
    parser.add_argument("part", nargs="*")
    parser.add_argument("--data_path", type=Path, default=Path("data"))
    parser.add_argument("--vocab_path", type=Path, default=Path("vocab"))
    parser.add_argument("--model_path", type=Path, default=Path("runs"))
    opt = parser.parse_args()
    if opt.command == "table":
        sys.exit(0 if print_table(opt.part or list(PARTS), opt) else 2)
    part = opt.part[0]
    if opt.command == "has":
        sys.exit(0 if all(found(wanted, opt)[0].exists() for wanted in PARTS[part]) else 1)
    archive = Path(opt.part[1])
    folder = Path(f"{archive}.unpacked")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        unpack(archive, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    put_in_place(part, folder, opt)
    missing = [wanted for wanted in PARTS[part] if not found(wanted, opt)[0].exists()]
    if missing:
        raise InputError(
            f"{part}: {archive} has no {', '.join(missing)}"
            + (f"; move what stands for them by hand out of {folder}" if folder.exists() else "")
        )


def unpack(archive, folder):
    """Unpack a zip or tar archive (known by its content, not its name), and archives inside it, into folder.

    Raises InputError for anything else, for a damaged archive, for too little disk space, and for a member that would
    land outside folder or is neither file nor folder (links, devices).
    """
    try:
        if tarfile.is_tarfile(archive):  # first, for a tar that ends in a stored zip looks like a zip too
            with tarfile.open(archive) as source:
                members = ((m.name, m.isfile() if m.isfile() or m.isdir() else None, m) for m in source)
                extract(archive, folder, members, source.extractfile)
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as source:
                free = shutil.disk_usage(archive.parent).free
                needed = sum(m.file_size for m in source.infolist())
                if needed > free:
                    raise InputError(f"{archive}: unpacks to {needed:,} bytes, the disk has {free:,} left")
                members = ((m.filename, not m.is_dir(), m) for m in source.infolist())
                extract(archive, folder, members, source.open)
        else:
            with open(archive, "rb") as file:
                start = file.read(8)
            if start[:2] == b"PK":
                raise zipfile.BadZipFile("the end of a zip archive is missing")
            raise InputError(f"{archive}: neither a zip nor a tar archive (it begins with {start}); unpack it by hand")
    except InputError:
        raise
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENAMETOOLONG):
            error.filename = error.filename or str(archive)  # a full disk does not say of which file
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error)[:200].split()) or type(error).__name__
        raise InputError(f"{archive}: cannot be unpacked ({reason}); delete it and run this again") from error


def extract(archive, folder, members, open_member):
    """members: (name, is it a file; None if neither file nor folder, member)."""
    for name, is_file, member in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or is_file is None:
            raise InputError(f"{archive}: refused: its member {brief(name)} is a link or would land outside {folder}")
        if not is_file:
            continue
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_member(member) as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        if target.name.endswith((".zip", ".tar", ".tgz", ".tar.gz")) and not target.name.endswith(".pth.tar"):
            unpack(target, target.with_name(target.name + ".unpacked"))
            target.unlink()


def put_in_place(part, folder, opt):
    """Move the unpacked files whose place is certain, and list all of them with where they are now."""
    unpacked = sorted(path for path in folder.rglob("*") if path.is_file())
    places = {path: place(part, path.relative_to(folder), opt) for path in unpacked}
    claims = Counter(places.values())
    for path, target in places.items():
        name = f"{part}: {path.relative_to(folder)}"
        if target is None:
            print(f"{name}: left in {folder}")
        elif claims[target] > 1:
            print(f"{name}: left in {folder}, because {claims[target]} files would be {target}")
        elif target.exists():
            print(f"{name}: left in {folder}, because {target} is there already")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
            print(f"{name} → {target}")
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def place(part, path, opt):
    """Where an unpacked file belongs, or None. It is known by its own name and a data set's name above it."""
    if path.name.endswith("_vocab.json"):
        return opt.vocab_path / path.name
    folders = list(dict.fromkeys(wanted.split("/")[0] for wanted in PARTS[part]))
    named = [folder for folder in folders if folder in path.parts]
    if not named and len(folders) > 1:
        return None
    folder = (named or folders)[0]
    for wanted in PARTS[part]:
        if wanted.startswith(folder + "/"):
            for target in found(wanted, opt, all_names=True):
                if target.name == path.name:
                    return target
    return None


def found(wanted, opt, all_names=False):
    """The paths under which a wanted FOLDER/FILE may lie, the one that exists first (Tencent-News has two names)."""
    folder, name = wanted.split("/")
    folder = opt.model_path if folder == "models" else opt.data_path / folder
    names = [name]
    if folder.name == "tencent_data" and name.endswith("_caps.txt"):
        names = [name.replace("_caps.txt", "_sent_caps.txt"), name]
    paths = [folder / name for name in names]
    return paths if all_names else sorted(paths, key=lambda path: not path.exists())


def describe(path):
    """What a file holds, in a few words, without reading arrays. Raises InputError if it is not what its name says."""
    kind = path.name.split("_", 1)[-1]
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path}: empty; delete it and run this again")
    if kind in SHAPES:
        return describe_array(path, SHAPES[kind], size)
    if kind.endswith("caps.txt"):
        with open(path, "rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
            file.seek(-1, 2)
            lines += file.read(1) != b"\n"
        return f"{lines} lines"
    return f"{size / 1e6:,.1f} MB"


def describe_array(path, shapes, size):
    import numpy as np  # here, so that the other commands start at once

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


def print_table(parts, opt):
    """Print what is there of the folders that the parts fill. Returns whether all files of these parts are sound."""
    sound = True
    folders = dict.fromkeys(wanted.split("/")[0] for part in parts for wanted in PARTS[part])
    states, missing = {}, Counter()
    owner = {wanted: part for part, wanted_files in PARTS.items() for wanted in wanted_files}
    for wanted, source in owner.items():
        if wanted.split("/")[0] not in folders:
            continue
        path = found(wanted, opt)[0]
        try:
            states[wanted] = describe(path) if path.exists() else "missing"
        except InputError as error:
            states[wanted] = "faulty"
            sound = sound and source not in parts
            print(f"error: {error}", file=sys.stderr)
        missing[source.split("_")[0]] += states[wanted] == "missing"
    for folder in folders:
        wanted_files = [wanted for wanted in states if wanted.startswith(folder + "/")]
        print(f"\n{found(wanted_files[0], opt)[0].parent}/")
        if folder not in SPLITS:
            for wanted in wanted_files:
                print(f"  {wanted.split('/')[1]:<22}{states[wanted]}")
            continue
        kinds = [kind for kind in (*SHAPES, "caps.txt") if f"{folder}/train_{kind}" in states]
        print("  SPLIT   " + "".join(f"_{kind:<19}" for kind in kinds).rstrip())
        for split in SPLITS[folder]:
            print(f"  {split:<8}" + "".join(f"{states[f'{folder}/{split}_{kind}']:<20}" for kind in kinds).rstrip())
    print()
    for item, count in missing.items():
        if count:
            login = " (needs a Kaggle login)" if item == "scan" else ""
            print(f"{count} missing: sh scripts/download_data.sh {item}{login}")
    return sound


if __name__ == "__main__":
    run(main)
