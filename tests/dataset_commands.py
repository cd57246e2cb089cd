"""What the tests of the dataset tools share: running a command, and pictures with boxes and features."""

import base64
import resource
import subprocess
import sys

import numpy as np
from conftest import ROOT

R, D = 36, 8


def tool(name, *args, **more):
    path = ROOT / (f"{name}.py" if name in ("position", "vocab") else f"scripts/{name}.py")
    return subprocess.run(
        [sys.executable, path, *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT, **more
    )


def ok(name, *args):
    done = tool(name, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(name, *args, **more):
    """What a tool that stops with one line says."""
    done = tool(name, *args, **more)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def picture(rng, n=R, width=500, height=375):
    """Boxes (n, 4) in a picture of that size, and features (n, D)."""
    low = rng.random((n, 2)) * [width * 0.6, height * 0.6]
    boxes = np.concatenate([low, low + 10 + rng.random((n, 2)) * [width * 0.3, height * 0.3]], 1)
    return boxes.astype("<f4"), rng.standard_normal((n, D)).astype("<f4")


def tsv_line(image_id, boxes, features, width=500, height=375, *more):
    data = [base64.b64encode(np.ascontiguousarray(x, "<f4")).decode() for x in (boxes, features, *more)]
    return "\t".join(map(str, (image_id, width, height, len(boxes), *data)))


def no_leftovers(folder):
    return not [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def no_file_grows():
    """For preexec_fn: no file grows beyond 4 KB. The error is that of a full disk, except for its number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
