"""The folder of a run's checkpoints, which belongs to one run: its lock, its checkpoints, what is removed."""

import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.checkpoint import BEST, load_checkpoint, load_plain, save_checkpoint
from lib.errors import InputError
from lib.events import METRICS
from lib.files import lock, make_folder

log = logging.getLogger(__name__)

LAST, LOCK = "checkpoint_last.pth.tar", "run.lock"  # saved within an epoch; held while a run trains
EPOCH = re.compile(r"checkpoint_(\d+)\.pth\.tar")  # saved after an epoch
WAYS_OUT = "--resume auto continues the latest, --overwrite removes it, another --model_name leaves it there"


def progress(checkpoint: dict) -> tuple[int, int]:
    """Finished epochs, and steps of the epoch after them."""
    return checkpoint["epoch"], checkpoint.get("step", 0)


class RunFolder:
    """A folder of checkpoints. run: the mark of the run that it belongs to, "" for one of an older version. others:
    paths of what `claim` found that is not its own."""

    def __init__(self, path: str):
        self.path, self.run, self.others = path, uuid.uuid4().hex, []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process trains in this folder. Raises InputError where one does.

        The lock ends with the process, and is not inherited by loading processes.
        """
        made = [parent for parent in Path(self.path).parents if not parent.exists()]
        is_new = not os.path.isdir(self.path)
        make_folder(self.path)
        try:
            with open(os.path.join(self.path, LOCK), "ab") as file:
                lock(file, f"--model_name {self.path}: another process trains there, name another")
                yield
        finally:
            if is_new and os.listdir(self.path) == [LOCK]:  # nothing was trained
                shutil.rmtree(self.path)
                with suppress(OSError):  # something else has come into it
                    for parent in made:
                        parent.rmdir()

    def epochs(self) -> list[str]:
        """Paths of the checkpoints that epochs left, the latest first."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        found = [(int(match[1]), match[0]) for match in map(EPOCH.fullmatch, names) if match]
        return [os.path.join(self.path, name) for _, name in sorted(found, reverse=True)]

    def checkpoints(self) -> list[str]:
        """Paths of all checkpoints."""
        there = [os.path.join(self.path, name) for name in (LAST, BEST)]
        return [*filter(os.path.isfile, there), *self.epochs()]

    def last(self) -> tuple[str, dict | None]:
        """Path of the checkpoint that holds the most training, and its contents; "", None where there is none.

        One that cannot be read is passed over with a warning. The best one is only taken where there is no other.
        """
        found = []
        for paths in ([os.path.join(self.path, LAST)], self.epochs(), [os.path.join(self.path, BEST)]):
            for path in filter(os.path.isfile, paths):
                if found and path.endswith(BEST):
                    break
                try:
                    found.append((path, load_checkpoint(path)))
                    break
                except InputError as error:
                    log.warning("passed over: %s", error)
        return max(found, key=lambda one: progress(one[1]), default=("", None))

    def claim(self, resumed: dict | None, overwrite: bool) -> None:
        """Take the folder for a run that starts, or goes on from a checkpoint.

        Raises InputError, without overwrite, where it holds checkpoints of other runs, or of this one that are later
        than the resumed one. `clear` removes them.
        """
        self.run = self.run if resumed is None else resumed.get("run", "")
        self.others = [path for path in self.checkpoints() if resumed is None or not self.has_led_to(resumed, path)]
        if self.others and not overwrite:
            what = "another run's checkpoint" if resumed is None else "another run's, or later than the one resumed"
            raise InputError(f"{self.others[0]}: {what}; {WAYS_OUT}")

    def clear(self, resumed: dict | None, logger_name: str) -> None:
        """Remove the checkpoints that `claim` found, and for a run that starts also the events below this folder."""
        for path in self.others:
            os.remove(path)
        inside = os.path.commonpath([os.path.realpath(self.path), os.path.realpath(logger_name)])
        if self.others and resumed is None and inside == os.path.realpath(self.path) and os.path.isdir(logger_name):
            for name in os.listdir(logger_name):
                if name == METRICS or ".tfevents." in name:
                    os.remove(os.path.join(logger_name, name))

    def has_led_to(self, resumed: dict, path: str) -> bool:
        """Whether the checkpoint at path is of the resumed one's run, and not later. One that cannot be read is.

        The best one may be an epoch later: a run can end when it has that one and not yet the epoch's.
        """
        checkpoint, (epoch, step) = self.read(path), progress(resumed)
        if checkpoint is None:
            return True
        latest = (epoch + 1, 0) if path.endswith(BEST) else (epoch, step)
        return checkpoint.get("run", "") == self.run and progress(checkpoint) <= latest

    def read(self, path: str) -> dict | None:
        """What a checkpoint holds, its tensors mapped, not read; None where that cannot be."""
        with suppress(Exception):
            checkpoint = load_plain(path, mmap=True)
            progress(checkpoint)
            return checkpoint
        return None

    def save(self, state: dict, is_best: bool, name: str) -> None:
        save_checkpoint({**state, "run": self.run}, is_best, name, self.path)

    def remove_older(self, keep: int) -> None:
        """Remove what a newly saved epoch makes superfluous: LAST, and this run's checkpoints of epochs but the latest
        keep ones (none of these with keep 0). The best one stays."""
        own = [path for path in self.epochs() if (self.read(path) or {}).get("run") == self.run] if keep else []
        for path in [os.path.join(self.path, LAST), *own[keep:]]:
            if os.path.isfile(path):
                os.remove(path)
