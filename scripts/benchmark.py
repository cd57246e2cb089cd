"""Measure this code against the published way of computing, and against the machine's own limit.

python scripts/benchmark.py            the whole table on this machine, and docs/growth.png
python scripts/benchmark.py --quick    the same at smaller sizes, three minutes

Each measurement is a process of its own (scripts/bench/measurements.py), so that its peak memory is its own; its
seconds are the median of several runs after a warm-up. The published way is scripts/bench/published_way.py. The
results are written as JSON after each measurement. docs/benchmark.md says what the columns mean.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, run
from lib.files import replace
from scripts.bench.table import PRECISIONS, plot, report, time_text

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SIZES = {
    "repeats": 3,
    "embed_size": 1024,
    "img_dim": 2048,
    "word_dim": 300,
    "vocab_size": 8500,
    "images": 1000,
    "per_image": 5,  # a test split of 1,000 × 5,000
    "signal": 0.1,  # how much of a region is in a word
    "plain_images": 128,  # the published way scores a part of the pairs
    "plain_captions": 256,
    "batch_size": 128,
    "plain_batches": 3,  # and encodes a part of the split
    "plain_grids": 50,
    "all_grids": 123287,  # images of MS-COCO
    "growth": [250, 500, 1000, 2500, 5000],
    "growth_pairs": 2_500_000,  # of more pairs than that a sample is scored
    "batches": [16, 32, 64, 128, 256],
    "train_images": [2900, 29000],  # 0.86 and 8.6 GB of features
}
QUICK = {
    "repeats": 2,
    "images": 160,
    "plain_images": 32,
    "plain_captions": 64,
    "batch_size": 32,
    "plain_batches": 2,
    "plain_grids": 10,
    "all_grids": 5000,
    "growth": [80, 160, 240],
    "growth_pairs": 100_000,
    "batches": [16, 32],
}


def plan(s):
    """All measurements: {name in the results: (function of measurements.py, its arguments)}."""
    jobs = {"machine": ("prepare", {}), "products": ("products", {})}
    for way in ("t2i", "i2t"):
        for precision in PRECISIONS:
            jobs[f"score {way} {precision}"] = ("score", {"cross_attn": way, "precision": precision})
        jobs[f"score {way} published"] = ("score_published", {"cross_attn": way})
        jobs[f"train {way}"] = ("train", {"cross_attn": way})
        jobs[f"train {way} amp"] = ("train", {"cross_attn": way, "amp": True})
        jobs[f"train {way} published"] = ("train_published", {"cross_attn": way})
    jobs |= {name: (name.replace(" ", "_"), {}) for name in ("encode", "encode published", "grids", "grids published")}
    jobs["all grids"] = ("grids", {"n_images": s["all_grids"]})
    for n in s["train_images"]:
        jobs[f"start {n}"] = ("start_training", {"n_images": n})
    for n in s["growth"]:
        for way in ("t2i", "i2t") if n == s["growth"][-1] else ("t2i",):
            every = max(1, n * n * s["per_image"] // s["growth_pairs"]) if n > s["images"] else 1
            if n != s["images"]:  # else measured above
                jobs[f"growth {way} {n}"] = ("score", {"cross_attn": way, "n_images": n, "every": every})
    for n in s["batches"]:
        if n != s["batch_size"]:
            jobs[f"batch {n}"] = ("train", {"batch": n})
    return jobs


def measure(name, sizes, arguments):
    """The result (dict) of one function of measurements.py in a process of its own."""
    job = json.dumps({"name": name, "sizes": {**sizes, "started": time.time()}, "arguments": arguments})
    command = [sys.executable, os.path.join(ROOT, "scripts", "bench", "measurements.py"), job]
    environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} {arguments}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def get_parser():
    parser = argparse.ArgumentParser(
        description="Measure this code against the published way of computing, side by side.",
        epilog="example: python scripts/benchmark.py --quick",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller sizes: three minutes")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: CUDA if there, else the CPU)")
    add("--out", default="runs/benchmark.json", help="results (default: %(default)s)")
    add("--plot", default="docs/growth.png", help="growth plots; '' draws none (default: %(default)s)")
    add("--sizes", default="{}", type=json.loads, metavar="JSON", help="other sizes, e.g. '{\"images\": 500}'")
    return parser


def main(measure=measure):
    opt = get_parser().parse_args()
    if unknown := sorted(set(opt.sizes) - set(SIZES)):
        raise InputError(f"--sizes: {', '.join(unknown)}, expected some of {', '.join(SIZES)}")
    s = {**SIZES, **(QUICK if opt.quick else {}), **opt.sizes}
    r, jobs = {}, plan(s)
    os.makedirs(os.path.dirname(opt.out) or ".", exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {**s, "folder": folder, "device": opt.device, "precisions": PRECISIONS}
        for i, (name, (function, arguments)) in enumerate(jobs.items(), 1):
            start = time.time()
            r[name] = measure(function, sizes, arguments)
            took = time_text(r[name]) if "seconds" in r[name] else ""
            print(f"[{i}/{len(jobs)}] {name:24} {took:>9}  ({time.time() - start:.0f} s)", flush=True)
            results = json.dumps({"sizes": s, "measurements": r}, indent=1, ensure_ascii=False)
            replace(opt.out, lambda file, results=results: file.write(results.encode()))
    print("\n" + report(s, r))
    if opt.plot:
        plot(s, r, opt.plot)
    print(f"\nresults  {opt.out}" + f"\nplots    {opt.plot}" * bool(opt.plot))


if __name__ == "__main__":
    run(main)
