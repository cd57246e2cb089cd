"""Archives: fetched from Google Drive, a mirror of it or Kaggle, and unpacked into a folder and nowhere else."""

import errno
import http.client
import os
import re
import shutil
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from lib.errors import InputError, brief

DRIVE_URL = "https://drive.usercontent.google.com/download"  # PFAN_DRIVE_URL names a mirror
DRIVE_PAGE = "https://drive.google.com/file/d/{}/view"
KAGGLE_NAME = "kuanghueilee/scan-features"
KAGGLE_PAGE = "https://www.kaggle.com/datasets/" + KAGGLE_NAME
ATTEMPTS = 3
TIMEOUT = 60  # seconds without a byte
BLOCK = 1 << 20  # bytes
CANNOT_GO_ON = "the server cannot go on where the last transfer stopped (without the .part file it begins anew)"
PAGES = (  # signs of what is sent instead of a file
    (r"ServiceLogin|accounts\.google\.com/", "a login page, the file is not public"),
    ("quota|too many users", "Google's web page 'download quota exceeded'"),
    ("", "a web page instead of the file"),
)
NESTED = (".zip", ".tar", ".tgz", ".tar.gz")  # endings of archives in archives
FILES_ERRORS = (None, errno.EINVAL, errno.ENAMETOOLONG)  # of an OSError that a damaged archive leads to


def fetch_drive(name: str, file_id: str, archive: Path) -> None:
    """Fetch a file of Google Drive to archive, through archive.part; a part that is there is continued.

    Raises InputError where it cannot be had, with the way to fetch it by hand.
    """
    # confirm=t: yes, although it is too large for a virus scan
    url = f"{os.environ.get('PFAN_DRIVE_URL') or DRIVE_URL}?id={file_id}&export=download&confirm=t"
    part = Path(f"{archive}.part")
    print(f"{name}: {url} → {archive}", flush=True)
    try:
        for attempt in range(ATTEMPTS):
            time.sleep(attempt)
            if _transfer(url, part):
                os.replace(part, archive)
                return
    except urllib.error.HTTPError as error:
        reason = CANNOT_GO_ON if error.code == 416 else f"got HTTP status {error.code}"
    except urllib.error.URLError as error:
        reason = f"cannot reach {url.partition('?')[0]} ({error.reason})"
    except InputError as error:
        reason = str(error)
    else:
        raise InputError(f"{name}: the transfer broke off, {_size(part)} bytes are in {part}; run this again to go on")
    page = DRIVE_PAGE.format(file_id)
    raise InputError(f"{name}: {reason}; fetch {page} in a browser, save it as {archive} and run this again")


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _transfer(url, part):
    """Append to part what it lacks of the file at url. Returns whether it is whole; False: the connection broke off.

    Raises InputError where something else is sent, and urllib's errors.
    """
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            block = answer.read(BLOCK)
            if answer.headers.get_content_type() == "text/html" or block.lstrip(b"\0 \t\r\n").startswith(b"<"):
                text = answer.url + block.decode(errors="replace")
                raise InputError("got " + next(page for sign, page in PAGES if re.search(sign, text, re.IGNORECASE)))
            if start and answer.status != 206:
                raise InputError(CANNOT_GO_ON)
            total = start + int(answer.headers.get("Content-Length", 0))
            bar = tqdm(initial=start, total=total, desc=part.stem, unit="B", unit_scale=True, disable=None)
            with open(part, "ab") as file, bar:
                while block:
                    bar.update(file.write(block))
                    block = answer.read(BLOCK)
    except (http.client.HTTPException, ConnectionError, TimeoutError):
        return False
    return _size(part) >= total


def fetch_kaggle(name: str, archive: Path) -> None:
    """Fetch SCAN's data to archive with the kaggle command. Raises InputError with the way to fetch it by hand."""
    by_hand = f"log in at {KAGGLE_PAGE}, download the archive, save it as {archive} and run this again"
    if not shutil.which("kaggle"):
        raise InputError(f"{name}: the kaggle command is not installed; {by_hand}")
    folder = Path(f"{archive}.kaggle")
    command = ["kaggle", "datasets", "download", "-d", KAGGLE_NAME, "-p", str(folder)]
    print(f"{name}: {' '.join(command)}", flush=True)
    done = subprocess.run(command)
    archives = list(folder.glob("*.zip"))
    if done.returncode or not archives:
        raise InputError(f"{name}: kaggle failed; set up its login (https://www.kaggle.com/docs/api) or {by_hand}")
    os.replace(archives[0], archive)
    folder.rmdir()


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
                    shutil.copyfileobj(source, copy, BLOCK)
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
        needed, free = sum(member.file_size for member in source.infolist()), shutil.disk_usage(archive.parent).free
        if needed > free:
            raise InputError(f"{archive}: unpacks to {needed:,} bytes, the disk has {free:,} left")
        for member in source.infolist():
            yield member.filename, not member.is_dir(), member.is_dir(), partial(source.open, member)
