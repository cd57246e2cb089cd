"""Loading processes: batches in shared memory; an error or the death of such a process in one line."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lib.errors import InputError

WAY_OUT = "--workers 0 loads without processes; in a container --shm-size makes it larger"


class Loader(DataLoader):
    """torch's DataLoader with loading processes, at most one a core.

    watched: its value, in memory that loading processes share, is 1 inside `watched`.
    """

    def __init__(self, dataset: Any, workers: int, **more: Any):
        workers = min(workers, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.watched: Any = SimpleNamespace()
        if workers:
            self.watched = multiprocessing.RawValue("b", 0)
            more |= {"worker_init_fn": partial(start_worker, self.watched), "persistent_workers": True}
        # a generator of its own, so that loading leaves the random state of training alone
        super().__init__(dataset, num_workers=workers, generator=torch.Generator(), **more)

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
        except InputError as error:  # that of a loading process comes with a traceback before the message
            raise InputError(str(error).rpartition("InputError: ")[2].strip()) from None


def start_worker(watched: Any, number: int) -> None:
    """Leave signals to the process that trains: Ctrl-C, and SIGTERM while it is inside `watched`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if watched.value else os._exit(0))
    sys.excepthook = print_error


def print_error(kind: type, error: BaseException, traceback: Any) -> None:
    """sys.excepthook of a loading process: the process that trains may end while a thread here hands it a batch."""
    if not isinstance(error, ConnectionError):
        sys.__excepthook__(kind, error, traceback)


def is_death(error: Exception) -> bool:
    """Whether an error says that a loading process has died. PyTorch raises it from a signal, so in any line."""
    return str(error).startswith("DataLoader worker")


@contextmanager
def watched(loader: Any) -> Iterator[None]:
    """Inside, loading processes leave SIGTERM to this one, and the death of one is an InputError. loader: a Loader."""
    flag = getattr(loader, "watched", SimpleNamespace())
    flag.value = 1
    try:
        yield
    except RuntimeError as error:
        if not is_death(error):
            raise
        prefix, reason = getattr(loader.dataset, "prefix", "the data set"), str(error).splitlines()[0].strip()
        raise InputError(f"{prefix}: a loading process died, as when a file shrinks or memory ends: {reason}") from None
    finally:
        flag.value = 0


def share(x: Tensor) -> Tensor:
    """x, in a loading process moved into shared memory. Raises InputError where that is full."""
    try:
        return x if get_worker_info() is None else x.share_memory_()
    except RuntimeError as error:
        raise InputError(f"/dev/shm: no space for what loading processes share ({error}); {WAY_OUT}") from None
