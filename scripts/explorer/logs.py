"""The scalars of training runs, as lib/events.py writes them: [{name: {step: value}}], the oldest run first."""

import csv
import os
import struct
import sys

from lib.errors import InputError, brief
from lib.events import COLUMNS

EVENT_LIMIT = 1 << 24  # bytes of one event; a scalar's has some tens


def read_metrics(path):
    """The runs in a metrics.csv, without the line that a killed run left half-written."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.endswith("\n")]
    runs = {}
    for number, row in enumerate(csv.reader(lines), 1):
        try:
            if tuple(row) != COLUMNS:
                run, step, name, value = row
                runs.setdefault(run, {}).setdefault(name, {})[int(step)] = float(value)
        except ValueError:
            raise InputError(f"{path}, line {number}: {brief(row)}, expected {','.join(COLUMNS)}") from None
    return list(runs.values())


def read_events(paths):
    """The runs in TensorBoard files. A step that falls back to a run's first one, or below, begins another run."""
    runs, first, latest = [], 0, 0
    for path in paths:
        for step, name, value in read_scalars(path):
            if not runs or step <= first and step < latest:
                runs.append({})
                first = step
            latest = step
            runs[-1].setdefault(name, {})[step] = value
    return runs


def read_scalars(path):
    """(step, name, value) of each scalar in a TensorBoard file, without what a killed run left half-written."""
    if "google.protobuf" not in sys.modules:
        os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # which tensorboard_logger's code needs
    from tensorboard_logger.tf_protobuf.event_pb2 import Event

    with open(path, "rb") as file:
        while len(header := file.read(12)) == 12:  # length (8 bytes), its checksum
            (length,) = struct.unpack("<Q", header[:8])
            if length > EVENT_LIMIT:
                raise InputError(f"{path}: not a TensorBoard file (an event of {length} bytes)")
            data = file.read(length + 4)  # and its checksum
            if len(data) < length + 4:
                break
            try:
                event = Event.FromString(data[:length])
            except Exception:  # protobuf's decoder meets foreign bytes with several exception types
                raise InputError(f"{path}: not a TensorBoard file") from None
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
