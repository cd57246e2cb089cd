"""Loading processes: batches in shared memory, and the death of a process reported with the item that it read."""

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from lib.errors import InputError

PREFETCH = 2  # batches that each loading process keeps ready
SHARED_MEMORY = "/dev/shm"  # Linux keeps there what processes share; a container has 64 MB by default
WAY_OUT = "--workers 0 loads without processes; in a container --shm-size makes it larger"


class WorkerLog:
    """What loading processes note, in memory that they share with the process that trains.

    pids, items (workers,): each one's process id, and the index of the item that it reads. watched (): 1 inside
    `watched`.
    """

    def __init__(self, workers: int):
        self.pids, self.items = (move(torch.zeros(workers, dtype=torch.int64)) for _ in range(2))
        self.watched = move(torch.zeros((), dtype=torch.int64))

    def start_worker(self, number: int) -> None:
        """Set up loading process `number`: note its id and leave signals to the process that trains.

        Ctrl-C is ignored; SIGTERM is ignored while the process that trains is inside `watched`.
        """
        global item
        item = self.items[number]
        self.pids[number] = os.getpid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: None if self.watched else os._exit(0))
        sys.excepthook = print_error


def print_error(kind: type, error: BaseException, traceback: Any) -> None:
    """sys.excepthook of a loading process: the process that trains may end while a thread here hands it a batch."""
    if not isinstance(error, ConnectionError):
        sys.__excepthook__(kind, error, traceback)


item: Tensor | None = None  # in a loading process: where it notes the item that it reads


def note_item(index: int) -> None:
    """In a loading process: it reads item index now."""
    if item is not None:
        item.fill_(index)


def is_loading() -> bool:
    """Whether this is a loading process that a Loader started."""
    return item is not None


class Loader(DataLoader):
    """torch's DataLoader with loading processes, at most one a core, whose deaths `watched` reports."""

    def __init__(self, dataset: Any, workers: int, **more: Any):
        workers = min(workers, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.log, self.processes = WorkerLog(workers) if workers else None, []
        if self.log:
            more |= {"worker_init_fn": self.log.start_worker, "prefetch_factor": PREFETCH, "persistent_workers": True}
        # a generator of its own, so that loading leaves the random state of training alone
        super().__init__(dataset, num_workers=workers, generator=torch.Generator(), **more)
        if workers and "batch_sampler" in more:  # a loader to train with; others may never be asked for batches
            self.check_shared_memory()

    def __iter__(self) -> Any:
        start = self.log and not self.processes
        others = multiprocessing.active_children()
        batches = super().__iter__()
        if start:
            self.processes = [child for child in multiprocessing.active_children() if child not in others]
            loading.add(self)
        for batch in batches:
            if isinstance(batch, InputError):  # of a loading process; raised there, it would arrive with a traceback
                raise batch
            yield batch

    def dead(self) -> list:
        """The loading processes that have ended."""
        return [child for child in self.processes if child.exitcode is not None]

    def check_shared_memory(self) -> None:
        """Raise InputError where the batches that wait for training do not fit into what is free of /dev/shm."""
        if not os.path.isdir(SHARED_MEMORY):
            return
        batch_size = min(self.batch_size or getattr(self.batch_sampler, "batch_size", 1), len(self.dataset))
        n_batches = min(PREFETCH * self.num_workers + 1, len(self))  # and the one that is trained on
        item_bytes = sum(x.nbytes for x in self.dataset[0] if isinstance(x, Tensor))
        free, needed = shutil.disk_usage(SHARED_MEMORY).free, item_bytes * batch_size * n_batches
        if needed > free:
            sizes = f"{free / 1e6:.0f} MB free, {n_batches} batches that wait for training need {needed / 1e6:.0f} MB"
            raise InputError(f"{SHARED_MEMORY}: {sizes}; {WAY_OUT}")


loading: WeakSet[Loader] = WeakSet()  # loaders with loading processes


def have_died() -> bool:
    """Whether a loading process has ended: PyTorch then raises a RuntimeError, from a signal, so in any line."""
    return any(loader.dead() for loader in loading)


@contextmanager
def watched(loader: Any) -> Iterator[None]:
    """Inside, the death of a loading process is an InputError that names the item which that process read.

    loader: a Loader, whose data set has prefix and describe_item(index) → str; others are not watched.
    """
    log = getattr(loader, "log", None)
    if not log:
        yield
        return
    log.watched.fill_(1)
    try:
        yield
    except RuntimeError:
        for child in loader.dead():
            place = f"{loader.dataset.prefix}: a loading process died with exit code {child.exitcode}"
            for index in log.items[log.pids == child.pid].tolist():  # none, where it died before it noted its id
                place += f" when it read {loader.dataset.describe_item(index)}"
            raise InputError(place) from None
        raise
    finally:
        log.watched.fill_(0)


# ---------------------------------------------------------------- shared memory


def share(x: Tensor) -> Tensor:
    """x, in a loading process moved into shared memory. Raises InputError where that is full."""
    return x if get_worker_info() is None else move(x)


def move(x: Tensor) -> Tensor:
    """x, moved into shared memory. Raises InputError where that is full."""
    try:
        return x.share_memory_()
    except RuntimeError as error:
        raise InputError(f"{SHARED_MEMORY}: no space for what loading processes share ({error}); {WAY_OUT}") from None


def stack(rows: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape, stacked; in a loading process in shared memory. Raises as `share`."""
    return share(torch.stack(rows))
