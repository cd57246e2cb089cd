"""The scalars of training runs, as lib/events.py writes them: [{name: {step: value}}]."""

import csv
import os
import struct
import sys

from lib.errors import InputError, brief
from lib.events import COLUMNS


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


def read_events(path):
    """The run in a TensorBoard file, without what a killed run left half-written."""
    if "google.protobuf" not in sys.modules:
        os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # which tensorboard_logger's code needs
    from tensorboard_logger.tf_protobuf.event_pb2 import Event

    with open(path, "rb") as file:
        data = file.read()
    run, start = {}, 12  # an event follows its length (8 bytes) and a checksum (4), another one follows it
    while start <= len(data) and (end := start + struct.unpack_from("<Q", data, start - 12)[0]) + 4 <= len(data):
        try:
            event = Event.FromString(data[start:end])
        except Exception:  # protobuf's decoder meets foreign bytes with several exception types
            raise InputError(f"{path}: not a TensorBoard file") from None
        for value in event.summary.value:
            run.setdefault(value.tag, {})[event.step] = value.simple_value
        start = end + 16
    return run
