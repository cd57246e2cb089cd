"""Files: written whole or not at all; read with an error that names the file and what is wrong with it."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from lib.errors import InputError

PIECES, PIECE_BYTES = 64, 4096  # of a file, that its digest covers


def make_folder(path: str | os.PathLike) -> None:
    """Make the folder path where there is none. Raises InputError where it cannot be, or files in it cannot."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"{path}: is no folder, expected one or a free name")
    os.makedirs(path, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written to, expected a folder for files")


@contextlib.contextmanager
def name_in_errors(path: str | os.PathLike) -> Iterator[None]:
    """Have an OSError name path where it names no file, as that of a full disk, or path.part, which is written."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, os.path.realpath(path) + ".part"):
            error.filename = os.fspath(path)
        raise


def replace(path: str | os.PathLike, write: Callable) -> None:
    """Write a file whole or not at all: write(file) fills path.part, which is synced to disk and then renamed to path.

    Where path is a link, the file that it points to is replaced. Raises InputError or OSError naming path where it
    cannot be written; what was there before stays.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is no file, expected one or a free name")
    target = os.path.realpath(path)
    part = target + ".part"
    try:
        with name_in_errors(path), open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        if os.path.exists(part):
            os.remove(part)


def lock(file: BinaryIO, taken: str) -> None:
    """Hold an open file until it is closed or this process ends. Raises InputError(taken) where another process does.

    Processes that this one starts do not inherit the lock. On Windows nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # others: a file system without locks, which is told as it is
        raise InputError(taken) from None


def save_tensors(value: object, file: BinaryIO) -> None:
    """torch.save(value, file), through memory: torch hides the file's own OSError, such as that of a full disk."""
    import torch  # here, because commands that handle text only need not load it

    buffer = io.BytesIO()
    torch.save(value, buffer)
    file.write(buffer.getbuffer())


def check_output(path: str | os.PathLike, *others: str | os.PathLike | None) -> None:
    """Raise InputError or OSError, before the work begins, where replace(path, …) could not write.

    others: files that are read or written as well, which path must not be.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is no file, expected one or a free name")
    if os.path.realpath(path) in (os.path.realpath(other) for other in others if other):
        raise InputError(f"{path}: is read or written as well, expected another file")
    part = os.path.realpath(path) + ".part"
    is_new = not os.path.exists(part)
    with name_in_errors(path):
        open(part, "ab").close()
    if is_new:
        os.remove(part)


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Write lines (str, without line ends) as UTF-8, whole or not at all."""
    replace(path, lambda file: file.writelines(line.encode() + b"\n" for line in lines))


def read_lines(path: str | os.PathLike) -> list[str]:
    """Lines (list of str) of a UTF-8 file, which end at \\n only, without the blanks around them.

    Raises InputError where there is no such file, or naming the line that is not UTF-8.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    lines = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
            except UnicodeDecodeError:
                raise InputError(f"{path}, line {number}: not UTF-8") from None
    return lines


def digest_lines(lines: Iterable[str]) -> str:
    """SHA-256 of lines (str, without line ends), in hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sample_digest(path: str | os.PathLike) -> str:
    """SHA-256, in hexadecimal digits, of pieces spread over a file, its first and last bytes among them."""
    size = os.path.getsize(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in range(PIECES):
            file.seek(piece * max(0, size - PIECE_BYTES) // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def open_npy(path: str | os.PathLike) -> np.ndarray:
    """Memory-map an .npy file. Raises InputError where it is missing, truncated or not an array of numbers."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # noqa: TID251
    except Exception as error:  # a broken header makes NumPy raise SyntaxError, tokenize's errors and more
        reason = str(error).partition("\n")[0].partition(". If you trust")[0][:200]
        raise InputError(f"{path}: truncated or not an .npy array of numbers ({reason})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise InputError(f"{path}: expected an .npy array of numbers")
    return array


def read_ahead(array: Any, rows: Iterable[int]) -> None:
    """Have the system read rows of a memory-mapped file, all at once, while the caller goes on.

    A shuffled file larger than memory is then read at 2 to 4 times the speed, measured: otherwise each row is waited
    for, and pages around it are read that nobody needs.
    """
    path = getattr(array, "filename", None)
    if not path or not array.flags.c_contiguous or not hasattr(os, "posix_fadvise"):
        return
    size = array[0].nbytes
    with contextlib.suppress(OSError), open(path, "rb") as file:  # a file that was removed is still mapped
        for row in rows:
            os.posix_fadvise(file.fileno(), array.offset + row * size, size, os.POSIX_FADV_WILLNEED)
