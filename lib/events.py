"""What a training reports: TensorBoard's event files, and the same numbers in metrics.csv beside them."""

import csv
import logging
import os
import sys
from contextlib import suppress
from typing import Any

from lib.files import name_in_errors

log = logging.getLogger(__name__)

METRICS = "metrics.csv"  # of a run that was resumed, the last line of a step and name counts
COLUMNS = ("run", "step", "name", "value")
writers: list = []  # where log_value writes, after `configure`


def configure(folder: str, run: str = "") -> None:
    """From now on log_value writes to a folder; before, and after `close`, nowhere. run: the run's mark."""
    close()
    os.makedirs(folder, exist_ok=True)
    writers.append(Table(os.path.join(folder, METRICS), run))
    try:
        writers.append(open_events(folder))
    except TypeError as error:  # of its generated code
        log.warning("no TensorBoard events, only %s: %s", METRICS, str(error).splitlines()[0])


def close() -> None:
    while writers:
        writers.pop().close()


def log_value(name: str, value: float, step: int) -> None:
    for writer in writers:
        writer.log_value(name, value, step)


class Table:
    """The rows of a CSV file. An error in writing names it."""

    def __init__(self, path, run):
        self.path, self.run, is_new = path, run, not os.path.exists(path)
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (`close` does)
        self.rows = csv.writer(self.file)
        if is_new:
            self.rows.writerow(COLUMNS)

    def log_value(self, name, value, step):
        with name_in_errors(self.path):
            self.rows.writerow((self.run, step, name, value))
            self.file.flush()

    def close(self):
        with suppress(OSError):  # of the same full disk
            self.file.close()


def open_events(folder: str) -> Any:
    """tensorboard_logger's Logger in a folder, whose errors in writing name the folder.

    Raises TypeError where protobuf has been loaded in a form that tensorboard_logger's code does not work with.
    """
    if "google.protobuf" not in sys.modules:
        os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
    import tensorboard_logger

    class Events(tensorboard_logger.Logger):
        def log_value(self, name, value, step):
            with name_in_errors(folder):
                super().log_value(name, value, step)

        def close(self):
            with suppress(OSError):  # of the same full disk
                super().__del__()

        __del__ = close

    with name_in_errors(folder):  # it writes at once
        return Events(folder)
