"""Archives: fetched from Google Drive, a mirror of it or Kaggle, and unpacked into a folder and nowhere else."""

import http.client
import os
import shutil
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
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
NESTED = (".zip", ".tar", ".tgz", ".tar.gz")  # endings of archives in archives


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
        reason = f"the transfer broke off, run this again to go on with {part}"
    except (urllib.error.URLError, InputError) as error:
        reason = str(error)
    page = DRIVE_PAGE.format(file_id)
    raise InputError(f"{name}: {reason}; or fetch {page} in a browser, save it as {archive} and run this again")


def _transfer(url, part):
    """Append to part what it lacks of the file at url. Returns whether it is whole; False: the connection broke off.

    Raises InputError where a web page is sent, and urllib's errors.
    """
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            block = answer.read(BLOCK)
            if answer.headers.get_content_type() == "text/html" or block.lstrip(b"\0 \t\r\n").startswith(b"<"):
                raise InputError("got a web page, such as 'download quota exceeded' or a login, instead of the file")
            if answer.status != 206:  # the server sends the whole file
                start = 0
            total = start + int(answer.headers.get("Content-Length", 0))
            bar = tqdm(initial=start, total=total, desc=part.stem, unit="B", unit_scale=True, disable=None)
            with open(part, "ab" if start else "wb") as file, bar:
                while block:
                    bar.update(file.write(block))
                    block = answer.read(BLOCK)
    except (http.client.HTTPException, ConnectionError, TimeoutError):
        return False
    return part.stat().st_size >= total


def fetch_kaggle(name: str, archive: Path) -> None:
    """Fetch SCAN's data to archive with the kaggle command. Raises InputError with the way to fetch it by hand."""
    by_hand = f"log in at {KAGGLE_PAGE}, download the archive, save it as {archive} and run this again"
    if not shutil.which("kaggle"):
        raise InputError(f"{name}: the kaggle command is not installed; {by_hand}")
    command = ["kaggle", "datasets", "download", "-d", KAGGLE_NAME, "-p", str(archive.parent)]
    print(f"{name}: {' '.join(command)}", flush=True)
    fetched = archive.with_name("scan-features.zip")
    if subprocess.run(command).returncode or not fetched.exists():
        raise InputError(f"{name}: kaggle failed; set up its login (https://www.kaggle.com/docs/api) or {by_hand}")
    os.replace(fetched, archive)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive (known by its content, not its name), and archives inside it, into folder.

    Raises InputError for anything else, for a damaged archive, and for a member that would land outside folder or is
    neither file nor folder (links, devices).
    """
    try:
        if tarfile.is_tarfile(archive):  # first, for a tar that ends in a stored zip looks like a zip too
            with tarfile.open(archive) as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
                for member in tar:
                    _check_member(archive, member.name, member.isfile() or member.isdir())
                    tar.extract(member, folder, set_attrs=False)
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as source:
                for name in source.namelist():
                    _check_member(archive, name)
                    source.extract(name, folder)
        else:
            raise InputError(f"{archive}: no whole zip or tar archive; delete it and run this again")
    except InputError:
        raise
    except Exception as error:  # tarfile, zipfile and the decompressors have many kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error)[:200].split()) or type(error).__name__
        raise InputError(
            f"{archive}: cannot be unpacked ({reason}); if damaged, delete it and run this again"
        ) from error
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(NESTED) and not path.name.endswith(".pth.tar") and path.is_file():
            unpack(path, path.with_name(path.name + ".unpacked"))
            path.unlink()


def _check_member(archive, name, is_plain=True):
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not is_plain:
        raise InputError(f"{archive}: refused: its member {brief(name)} is a link or would land outside its folder")
