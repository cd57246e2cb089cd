"""Files from Google Drive, a mirror of it, or Kaggle → data/downloads/."""

import http.client
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from lib.errors import InputError

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
                    file.write(block)
                    bar.update(len(block))
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
