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
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lib.errors import InputError

WAY_OUT = "--workers 0 loads without processes; in a container --shm-size makes it larger"


@contextmanager
def way_out() -> Iterator[None]:
    """Inside, an OSError (/dev/shm is absent or read-only, or memory short) is an InputError that names --workers 0."""
    try:
        yield
    except OSError as error:
        raise InputError(f"loading processes cannot be started ({error}); {WAY_OUT}") from None


class Loader(DataLoader):
    """torch's DataLoader with loading processes, at most one a core.

    processes: those. watched: its value, in memory that they share, is 1 inside `watched`.
    """

    def __init__(self, dataset: Any, workers: int, **more: Any):
        workers = min(workers, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.processes, self.watched = [], SimpleNamespace()
        if workers:
            with way_out():
                self.watched = multiprocessing.RawValue("b", 0)
            more |= {"worker_init_fn": partial(start_worker, self.watched), "persistent_workers": True}
        # a generator of its own, so that loading leaves the random state of training alone
        super().__init__(dataset, num_workers=workers, generator=torch.Generator(), **more)

    def __iter__(self) -> Any:
        others = multiprocessing.active_children()
        with way_out():
            batches = super().__iter__()
        self.processes += [child for child in multiprocessing.active_children() if child not in others]
        loaders.add(self)
        for batch in batches:
            if isinstance(batch, InputError):  # of a loading process; raised there, it would arrive with a traceback
                raise batch
            yield batch

    def has_died(self) -> bool:
        """Whether a loading process has ended: PyTorch then raises a RuntimeError, from a signal, so in any line."""
        return any(child.exitcode is not None for child in self.processes)


loaders: WeakSet[Loader] = WeakSet()  # those that have loading processes
is_loading = False  # whether this is a loading process of a Loader


def have_died() -> bool:
    """Whether a loading process of any Loader has ended."""
    return any(loader.has_died() for loader in loaders)


def start_worker(watched: Any, number: int) -> None:
    """Leave signals to the process that trains: Ctrl-C, and SIGTERM while it is inside `watched`."""
    global is_loading
    is_loading = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if watched.value else os._exit(0))
    sys.excepthook = print_error


def print_error(kind: type, error: BaseException, traceback: Any) -> None:
    """sys.excepthook of a loading process: the process that trains may end while a thread here hands it a batch."""
    if not isinstance(error, ConnectionError):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def watched(loader: Any) -> Iterator[None]:
    """Inside, loading processes leave SIGTERM to this one, and the death of one is an InputError. loader: a Loader."""
    flag = getattr(loader, "watched", SimpleNamespace())
    flag.value = 1
    try:
        yield
    except RuntimeError as error:
        if not getattr(loader, "has_died", bool)():  # also of a Loader in a FeaturesOnGPU
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
