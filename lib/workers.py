"""Loading processes: which item each one reads, so that the death of one can be reported with the item."""

import multiprocessing.queues
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import get_worker_info

from lib.errors import InputError

SHARED_MEMORY = "/dev/shm"  # Linux keeps there what processes share; a container has 64 MB by default
WAY_OUT = "--workers 0 loads without processes; in a container --shm-size makes it larger"


def check_shared_memory(batch_bytes: int, n_batches: int) -> None:
    """Raise InputError where the batches that wait for training do not fit into what is free of /dev/shm.

    batch_bytes: size of a batch. n_batches: how many there may be at a time, in all processes of this machine.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, batch_bytes * n_batches
    if needed > free:
        sizes = f"{free / 1e6:.0f} MB free, {n_batches} batches that wait for training need {needed / 1e6:.0f} MB"
        raise InputError(f"{SHARED_MEMORY}: {sizes}; {WAY_OUT}")


class WorkerLog:
    """What the loading processes of one data set do, in memory that they share with the process that trains.

    pids (workers,): each one's process id. items (workers,): the index of the item that it reads.
    watched (): 1 while the process that trains is inside watched_workers. unsent (): 1 where a batch could not be sent.
    """

    def __init__(self, workers: int):
        self.pids = torch.zeros(workers, dtype=torch.int64).share_memory_()
        self.items = torch.zeros(workers, dtype=torch.int64).share_memory_()
        self.watched = torch.zeros((), dtype=torch.int64).share_memory_()
        self.unsent = torch.zeros((), dtype=torch.int64).share_memory_()

    def note_item(self, index: int) -> None:
        """In a loading process: it reads item index now."""
        if worker := get_worker_info():
            self.items[worker.id] = index


def start_worker(number: int) -> None:
    """Set up loading process `number`: note its process id and leave signals to the process that trains.

    Ctrl-C is ignored; SIGTERM is ignored while the process that trains is inside watched_workers. A batch that cannot
    be sent ends the process: multiprocessing would print a traceback and leave the process that trains waiting for it.
    """

    def end(error, batch):
        worker_log.unsent.fill_(1)
        os._exit(1)

    worker_log = get_worker_info().dataset.worker_log
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if worker_log.watched else os._exit(0))
    queue: Any = multiprocessing.queues.Queue
    queue._on_queue_feeder_error = staticmethod(end)
    worker_log.pids[number] = os.getpid()


@contextmanager
def watched_workers(dataset: Any) -> Iterator[None]:
    """Inside, the death of a loading process is an InputError that names the item which that process read.

    dataset: has worker_log, a WorkerLog (None without loading processes), prefix, and describe_item(index) → str.
    """
    worker_log = dataset.worker_log or WorkerLog(0)
    worker_log.watched.fill_(1)
    try:
        yield
    except RuntimeError as error:
        if worker_log.unsent or "unable to allocate shared memory" in str(error):
            raise InputError(f"{SHARED_MEMORY}: no space for the batches that wait for training; {WAY_OUT}") from None
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        dead = set(map(int, found[1].split(","))) if found else ()
        for pid, index in zip(worker_log.pids.tolist(), worker_log.items.tolist(), strict=True):
            if pid in dead:
                raise InputError(
                    f"{dataset.prefix}: a loading process died when it read {dataset.describe_item(index)} "
                    f"({str(error).strip().splitlines()[0]})"
                ) from None
        raise
    finally:
        worker_log.watched.fill_(0)
