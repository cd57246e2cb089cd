"""Kill training at random moments and go on with --resume auto, over and over; what test_sudden_end.py runs.

kill_training.py KILLS FOLDER FLAGS…      FLAGS are train.py's without the places of logs and checkpoints

Each training is a fork of this process, which has imported everything, and gets SIGKILL after a random time. After
each kill every checkpoint in the folder must load, and none that was there may have gone backwards. A training that
gets to its end is compared with one that nobody disturbed. A line of JSON after each training sums up.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import _root  # noqa: F401
from training import assert_same, last_checkpoint

import train
from lib.checkpoint import load_checkpoint


def start(folder, flags):
    """Fork a training; returns the child's id and a pipe that says when its first step begins."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        return pid, reading
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.argv = ["train.py", *flags, "--model_name", str(folder), "--logger_name", str(folder / "log")]
    epoch = train.train
    train.train = lambda *args: (os.write(writing, b"."), epoch(*args))
    try:
        train.main()
    except BaseException:
        os._exit(1)
    os._exit(0)


def end(pid, reading, seconds=None):
    """Wait for the child; where seconds is given, kill it that long after its first step began. Its status."""
    if seconds is not None:
        os.read(reading, 1)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    return os.waitpid(pid, 0)[1]


def check(folder, before):
    """How far the checkpoints of folder are, (epoch, step); each must load and be at least as far as before."""
    for path in folder.glob("*.pth.tar"):
        load_checkpoint(str(path))
    path, checkpoint = last_checkpoint(folder)
    reached = (checkpoint["epoch"], checkpoint["step"]) if path else (-1, 0)
    assert reached >= before, f"at {before} before, {reached} now"
    assert reached[0] < 1 or (folder / "model_best.pth.tar").exists(), "no best checkpoint after an epoch"
    return reached


def main():
    kills, folder, *flags = sys.argv[1:]
    folder = Path(folder)
    undisturbed = folder / "undisturbed"
    pid, reading = start(undisturbed, flags)
    os.read(reading, 1)
    began = time.monotonic()
    assert end(pid, reading) == 0
    longest = (time.monotonic() - began) / 2
    (final,) = undisturbed.glob("checkpoint_*")
    expected = {name: load_checkpoint(str(undisturbed / name)) for name in (final.name, "model_best.pth.tar")}
    moments, counts = random.Random(0), {"kills": 0, "inside saves": 0, "within epochs": 0, "finished runs": 0}
    run, reached = folder / "killed", (-1, 0)
    while counts["kills"] < int(kills) or reached != (-1, 0) or not counts["finished runs"]:
        seconds = moments.uniform(0, longest) if counts["kills"] < int(kills) else None
        status = end(*start(run, [*flags, "--resume", "auto"]), seconds)
        assert status in (0, signal.SIGKILL), f"training ended with status {status}"
        counts["kills"] += status == signal.SIGKILL
        counts["inside saves"] += bool(list(run.glob("*.part")))
        reached = check(run, reached)
        counts["within epochs"] += reached[1] > 0
        if status == 0:
            for name, checkpoint in expected.items():
                assert_same(load_checkpoint(str(run / name)), checkpoint)
            shutil.rmtree(run)
            reached = (-1, 0)
            counts["finished runs"] += 1
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
