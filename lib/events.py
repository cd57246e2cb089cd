"""What a training reports: TensorBoard's event files, and the same numbers in metrics.csv beside them."""

import logging
import os
import sys
from contextlib import suppress
from typing import Any

from lib.files import name_in_errors

log = logging.getLogger(__name__)

METRICS = "metrics.csv"  # of a run that was resumed, the last line of a step and name counts
COLUMNS = ("run", "step", "name", "value")
writers: dict = {}  # what log_value writes to, after `configure`, by the path that errors name


def configure(folder: str, run: str = "") -> None:
    """From now on log_value writes to a folder; before, and after `close`, nowhere. run: the run's mark."""
    close()
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, METRICS)
    try:
        with name_in_errors(folder):  # both write at once
            writers[path] = Table(path, run)
            writers[folder] = open_events(folder)
    except TypeError as error:  # of its generated code
        log.warning("no TensorBoard events, only %s: %s", METRICS, str(error).splitlines()[0])


def close() -> None:
    while writers:
        with suppress(OSError):  # of a full disk, which writing has named
            writers.popitem()[1].close()


def log_value(name: str, value: float, step: int) -> None:
    for path, writer in writers.items():
        with name_in_errors(path):
            writer.log_value(name, value, step)


class Table:
    """The rows of a CSV file."""

    def __init__(self, path, run):
        self.run = run
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (`close` does)
        if not self.file.tell():
            print(*COLUMNS, sep=",", file=self.file)

    def log_value(self, name, value, step):
        print(self.run, step, name, value, sep=",", file=self.file)

    def close(self):
        self.file.close()


def open_events(folder: str) -> Any:
    """tensorboard_logger's Logger in a folder.

    Raises TypeError where protobuf has been loaded in a form that tensorboard_logger's code does not work with.
    """
    if "google.protobuf" not in sys.modules:
        os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
    import tensorboard_logger

    class Events(tensorboard_logger.Logger):
        def close(self):
            with suppress(OSError):  # of a full disk: Python would print it where it removes the object
                super().__del__()

        __del__ = close

    return Events(folder)
