"""Zip and tar archives of unknown make, unpacked into a folder and nowhere else."""

import errno
import lzma
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from lib.errors import InputError, brief

# What damaged archives make tarfile, zipfile and the decompressors raise, beside an OSError without a number.
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


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive (known by its content, not its name), and archives inside it, into folder.

    Raises InputError for anything else, for a damaged archive, for too little disk space, and for a member that would
    land outside folder or is neither file nor folder (links, devices).
    """
    try:
        if tarfile.is_tarfile(archive):  # first, for a tar that ends in a stored zip looks like a zip too
            with tarfile.open(archive) as source:
                members = ((m.name, m.isfile() if m.isfile() or m.isdir() else None, m) for m in source)
                _extract(archive, folder, members, source.extractfile)
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as source:
                free = shutil.disk_usage(archive.parent).free
                needed = sum(m.file_size for m in source.infolist())
                if needed > free:
                    raise InputError(f"{archive}: unpacks to {needed:,} bytes, the disk has {free:,} left")
                members = ((m.filename, not m.is_dir(), m) for m in source.infolist())
                _extract(archive, folder, members, source.open)
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


def _extract(archive, folder, members, open_member):
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
