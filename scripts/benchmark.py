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
from statistics import median

if not __package__:
    import _root  # noqa: F401

from lib.errors import run

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
    "plain_images": 128,
    "plain_captions": 256,  # the part of it that the published way scores
    "batch_size": 128,
    "plain_batches": 3,  # and the part that it encodes
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
PRECISIONS = ("highest", "high", "medium")  # --matmul_precision, the default first


def measure(name, sizes, arguments):
    """One measurement in a process of its own."""
    job = json.dumps({"name": name, "sizes": {**sizes, "started": time.time()}, "arguments": arguments})
    command = [sys.executable, os.path.join(ROOT, "scripts", "bench", "measurements.py"), job]
    environment = {**os.environ, "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{name} {arguments}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def plan(s):
    """All measurements: name in the results → (function of measurements.py, its arguments)."""
    jobs = {"machine": ("prepare", {}), "products": ("products", {})}
    for way in ("t2i", "i2t"):
        for precision in PRECISIONS:
            jobs[f"score {way} {precision}"] = ("score", {"cross_attn": way, "precision": precision})
        jobs[f"score {way} published"] = ("score_published", {"cross_attn": way})
        jobs[f"train {way}"] = ("train", {"cross_attn": way})
        jobs[f"train {way} amp"] = ("train", {"cross_attn": way, "amp": True})
        jobs[f"train {way} published"] = ("train_published", {"cross_attn": way})
    jobs["encode"], jobs["encode published"] = ("encode", {}), ("encode_published", {})
    jobs["grids"], jobs["grids published"] = ("grids", {}), ("grids_published", {})
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


# ---------------------------------------------------------------- table and plot


def rows(s, r):
    """The table: (work, published, ours, seconds of ours' own matrix products or None, largest difference or None)."""
    score = f"score and rank {s['images']:,} × {s['images'] * s['per_image']:,}"
    rate = max(r["products"]["gflops"].values()) * 1e9
    table = []
    for way in ("t2i", "i2t"):
        published = r[f"score {way} published"]
        for name in PRECISIONS:
            first = name == PRECISIONS[0]
            work = f"{score}, {way}" if first else f"the same, `--matmul_precision {name}`"
            products = r["products"]["seconds"][0] if first else None
            table.append((work, published, r[f"score {way} {name}"], products, published["differences"][name]))
    for way in ("t2i", "i2t"):
        published, ours, amp = r[f"train {way} published"], r[f"train {way}"], r[f"train {way} amp"]
        work = f"training step, batch {s['batch_size']}, {way}"
        table.append((work, published, ours, ours["flops"] / rate, published["difference"]))
        table.append(("the same, `--amp`", published, amp, None, None))
    published, ours = r["encode published"], r["encode"]
    work = f"encode {s['images']:,} images, {s['images'] * s['per_image']:,} captions"
    table.append((work, published, ours, ours["flops"] / rate, published["difference"]))
    published, ours = r["grids published"], r["grids"]
    table.append((f"position grids of {s['images']:,} images", published, ours, None, published["difference"]))
    return table


def seconds(result):
    value = median(result["seconds"])
    if value >= 1000:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def memory(result):
    return f"{result.get('device_gb') or result['peak_gb']:.2f} GB"


def report(s, r):
    """The results as Markdown."""
    lines = [
        "| work | published way | this code | faster | of its products' time | memory, published | here | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for work, published, ours, products, difference in rows(s, r):
        cells = [
            work,
            seconds(published),
            seconds(ours),
            f"{median(published['seconds']) / median(ours['seconds']):.3g}×",
            f"{median(ours['seconds']) / products:.2f}×" if products else "",
            ("≥ " if "part" in published else "") + memory(published),
            memory(ours),
            f"{difference:.0e}" if difference is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Fastest float32 product: {r['products']['best']}, {max(r['products']['gflops'].values()):.0f} GFLOP/s.",
    ]
    for way in ("t2i", "i2t"):
        exact, *others = (r[f"score {way} {name}"]["recalls"] for name in PRECISIONS)
        gaps = [max(abs(a - b) for a, b in zip(exact, other, strict=True)) for other in others]
        away = ", ".join(f"with {name} at most {gap:.2f} away" for name, gap in zip(PRECISIONS[1:], gaps, strict=True))
        recalls = " ".join(f"{x:.1f}" for x in exact)
        lines.append(f"Recalls {way}: {recalls} (i2t, t2i R@1 5 10); {away}.")
    lines.append(f"Position grids of {s['all_grids']:,} images: {seconds(r['all grids'])}.")
    for n in s["train_images"]:
        start = r[f"start {n}"]
        own = ", ".join(f"{x:.2f}" for x in start["own_gb"])
        lines.append(
            f"Training on {start['file_gb']:.2f} GB of features: first batch after {median(start['seconds']):.1f} s; "
            f"own memory then and after each of two steps {own} GB."
        )
    n = s["growth"][-1]
    for way in ("t2i", "i2t"):
        scored = r[f"growth {way} {n}"]
        lines.append(
            f"Scoring {n:,} × {n * s['per_image']:,}, {way}: {memory(scored)}; {seconds(scored)}, "
            f"one block of {scored['every']} computed."
        )
    per_pair = ", ".join(f"{n:,}: {1e6 * x:.2f}" for n, x in time_per_pair(s, r).items())
    lines.append(f"µs a pair by images, t2i: {per_pair}.")
    steps = ", ".join(f"{n}: {x:.3g} s" for n, x in step_times(s, r).items())
    lines.append(f"Training step by batch size, t2i: {steps}.")
    return "\n".join(lines)


def time_per_pair(s, r):
    """Seconds of a pair, t2i, by number of images."""
    results = {n: r["score t2i highest" if n == s["images"] else f"growth t2i {n}"] for n in s["growth"]}
    return {n: median(result["seconds"]) / result["pairs"] for n, result in results.items()}


def step_times(s, r):
    """Seconds of a training step, t2i, by batch size."""
    return {n: median(r["train t2i" if n == s["batch_size"] else f"batch {n}"]["seconds"]) for n in s["batches"]}


def plot(s, r, path):
    """How time grows: scoring a pair by the number of images, a training step by the size of its batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    pairs = time_per_pair(s, r)
    middle = median(pairs.values()) * 1e6
    left.axhspan(0.85 * middle, 1.15 * middle, color="0.92", label="median ± 15 %")
    left.plot(list(pairs), [1e6 * x for x in pairs.values()], "o-")
    left.set(
        xscale="log", xlabel=f"images ({s['per_image']} captions each)", ylabel="µs a pair", ylim=(0, 1.6 * middle)
    )
    left.set_title("score and rank, t2i", fontsize=10)
    left.set_xticks(list(pairs), [f"{n:,}" for n in pairs])
    left.minorticks_off()
    left.legend(frameon=False)
    right.plot(s["batches"], list(step_times(s, r).values()), "o-")
    right.set(xlabel="pairs in the batch", ylabel="seconds", ylim=(0, None), xticks=s["batches"])
    right.set_title("training step, t2i", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=120)


def save(path, contents):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(contents, file, indent=1, ensure_ascii=False)
    os.replace(path + ".part", path)


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
    s = {**SIZES, **(QUICK if opt.quick else {}), **opt.sizes}
    results = {"sizes": s, "measurements": {}}
    r = results["measurements"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = {**s, "folder": folder, "device": opt.device, "precisions": PRECISIONS}
        jobs = plan(s)
        for i, (name, (function, arguments)) in enumerate(jobs.items(), 1):
            start = time.time()
            r[name] = measure(function, sizes, arguments)
            took = seconds(r[name]) if "seconds" in r[name] else ""
            print(f"[{i}/{len(jobs)}] {name:24} {took:>9}  ({time.time() - start:.0f} s)", flush=True)
            save(opt.out, results)
    print("\n" + report(s, r))
    if opt.plot:
        plot(s, r, opt.plot)
    print(f"\nresults  {opt.out}" + f"\nplots    {opt.plot}" * bool(opt.plot))


if __name__ == "__main__":
    run(main)
