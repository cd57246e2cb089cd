"""What the tests of the dataset tools share: running a command, and images with boxes and features."""

import base64
import contextlib
import importlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from unittest import mock

import numpy as np
import processes
import pytest
from conftest import ROOT

from lib import errors

R, D = 36, 8


def command(name, *args):
    """A command run as a user types it."""
    return processes.run([sys.executable, script(name), *map(str, args)], cwd=ROOT)


def script(name):
    return str(ROOT / (f"{name}.py" if (ROOT / f"{name}.py").exists() else f"scripts/{name}.py"))


def tool(name, *args):
    """The same in this process, which saves a start of 2 s. Returns a CompletedProcess."""
    module = importlib.import_module(name if (ROOT / f"{name}.py").exists() else f"scripts.{name}")
    with contextlib.chdir(ROOT):
        return call(module.main, script(name), *args)


def call(main, *argv):
    """A command's main() called in this process with sys.argv: a CompletedProcess."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    argv = list(map(str, argv))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), no_log_handlers():
        with mock.patch.object(sys, "argv", argv):
            try:
                errors.run(main)
            except SystemExit as end:
                status = end.code or 0
            except Exception:
                status = 1
                traceback.print_exc()
    return subprocess.CompletedProcess(argv, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def no_log_handlers():
    """Inside, messages go to stderr as in a new process, not to pytest."""
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        yield
    finally:
        root.handlers = before


def ok(name, *args):
    done = tool(name, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(name, *args):
    """What a tool that stops with one line says."""
    done = tool(name, *args)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def detected(rng, n=R, width=500, height=375):
    """Boxes (n, 4) in an image of that size, and features (n, D)."""
    low = rng.random((n, 2)) * [width * 0.6, height * 0.6]
    boxes = np.concatenate([low, low + 10 + rng.random((n, 2)) * [width * 0.3, height * 0.3]], 1)
    return boxes.astype("<f4"), rng.standard_normal((n, D)).astype("<f4")


def base64_of(array, kind="<f4"):
    return base64.b64encode(np.ascontiguousarray(array, kind)).decode()


def tsv_line(image_id, boxes, features, width=500, height=375, *more):
    data = [base64_of(x) for x in (boxes, features, *more)]
    return "\t".join(map(str, (image_id, width, height, len(boxes), *data)))


def lxmert_line(image_id, boxes, features, scores):
    n = len(boxes)
    detected = [base64_of(np.arange(n), "<i8"), base64_of(scores), base64_of(np.arange(n), "<i8"), base64_of(scores)]
    return "\t".join(map(str, (image_id, 375, 500, *detected, n, base64_of(boxes), base64_of(features))))


def vinvl_line(image_id, boxes, features, scores):
    objects = [
        {"class": "dog", "conf": float(score), "rect": box.tolist(), "feature": base64_of(feature)}
        for box, feature, score in zip(boxes, features, scores, strict=True)
    ]
    return f"{image_id}\t" + json.dumps({"image_h": 375, "image_w": 500, "objects": objects})


def coco(path, boxes, sizes, ids=None):
    """COCO JSON of boxes (n, R, 4), x1, y1, x2, y2, in images of sizes (n, 2) with ids, else 0, 1, …"""
    ids = list(ids or range(len(boxes)))
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": int(height), "width": int(width)}
        for i, (height, width) in zip(ids, sizes, strict=True)
    ]
    found = [
        {"image_id": i, "bbox": [x, y, right - x, bottom - y]}
        for i, each in zip(ids, np.asarray(boxes).tolist(), strict=True)
        for x, y, right, bottom in each
    ]
    path.write_text(json.dumps({"info": {"x": [1]}, "annotations": found, "images": images}))
    return path


class Calls:
    """Unpickled freely, it calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def no_leftovers(folder):
    return not [path.name for path in folder.iterdir() if path.name.endswith(".part")]


@contextlib.contextmanager
def full_disk(size):
    """Inside, no file grows beyond size bytes. The error is that of a full disk, except for its number."""
    resource = pytest.importorskip("resource", reason="limits on file sizes need a Unix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


DIES = """
import importlib, os, sys
from lib import errors
from lib.datasets import writer
name, rows = sys.argv.pop(1), int(sys.argv.pop(1))
write = writer.SplitWriter.write
def dying(self, row, **values):
    write(self, row, **values)
    if self.done.sum() == rows:
        os.kill(os.getpid(), 9)
writer.SplitWriter.write, writer.SYNC_SECONDS = dying, 0
errors.run(importlib.import_module("scripts." + name).main)
"""


def run_killed(name, rows, *args):
    """Run a tool that is killed when it has written so many rows."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DIES, name, str(rows), *map(str, args)], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
