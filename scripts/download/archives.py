"""Zip and tar archives of unknown make, unpacked into a folder and nowhere else."""

import errno
import shutil
import tarfile
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath

from lib.errors import InputError, brief

NESTED = (".zip", ".tar", ".tgz", ".tar.gz")  # endings of archives in archives
FILES_ERRORS = (None, errno.EINVAL, errno.ENAMETOOLONG)  # of an OSError that a damaged archive leads to


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive (known by its content, not its name), and archives inside it, into folder.

    Raises InputError for anything else, for a damaged archive, for too little disk space, and for a member that would
    land outside folder or is neither file nor folder (links, devices).
    """
    try:
        for name, is_file, is_folder, open_member in _members(archive):
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or not (is_file or is_folder):
                what = f"its member {brief(name)} is a link or would land outside {folder}"
                raise InputError(f"{archive}: refused: {what}")
            if is_file:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with open_member() as source, open(target, "wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
                if target.name.endswith(NESTED) and not target.name.endswith(".pth.tar"):
                    unpack(target, target.with_name(target.name + ".unpacked"))
                    target.unlink()
    except InputError:
        raise
    except Exception as error:  # tarfile, zipfile and the decompressors have many kinds
        if isinstance(error, OSError) and error.errno not in FILES_ERRORS:
            error.filename = error.filename or str(archive)  # a full disk does not say of which file
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error)[:200].split()) or type(error).__name__
        raise InputError(f"{archive}: cannot be unpacked ({reason}); delete it and run this again") from error


def _members(archive):
    """Yield name, whether it is a file, whether it is a folder, and a function that opens it, of each member."""
    if tarfile.is_tarfile(archive):  # first, for a tar that ends in a stored zip looks like a zip too
        with tarfile.open(archive) as source:
            for member in source:
                yield member.name, member.isfile(), member.isdir(), partial(source.extractfile, member)
        return
    with open(archive, "rb") as file:
        start = file.read(8)
    if start[:2] != b"PK":
        raise InputError(f"{archive}: neither a zip nor a tar archive (it begins with {start}); unpack it by hand")
    with zipfile.ZipFile(archive) as source:
        free = shutil.disk_usage(archive.parent).free
        needed = sum(member.file_size for member in source.infolist())
        if needed > free:
            raise InputError(f"{archive}: unpacks to {needed:,} bytes, the disk has {free:,} left")
        for member in source.infolist():
            yield member.filename, not member.is_dir(), member.is_dir(), partial(source.open, member)
