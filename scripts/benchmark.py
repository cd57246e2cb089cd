"""Measure this code beside the published way of computing, and the two-stage search beside an exhaustive one.

python scripts/benchmark.py                 the table on this machine
python scripts/benchmark.py --quick         the same at smaller sizes
python scripts/benchmark.py --only score    these sections
python scripts/benchmark.py --only search --model_path M --data_path data --split test --sizes 1000 10000

Each measurement is a process of its own (scripts/bench/measurements.py), so that its peak memory is its own; its
seconds are the median of several runs after a warm-up. The published way is scripts/bench/published_way.py. Rows are
printed as they are measured, and everything measured is written as JSON. docs/benchmark.md explains the columns.
"""

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from statistics import median
from typing import NamedTuple

if not __package__:
    import _root  # noqa: F401

from lib.errors import run
from lib.files import check_output, make_folder, replace
from lib.options import add_options
from scripts.bench.measurements import TOP, run_measurement

SECTIONS = ("search", "score", "train", "encode", "grids", "start", "growth")
FORMS = {"highest": "", "medium": ", `--matmul_precision medium`", "formula": ", by `model.attend` alone"}
HEAD = """\
| work | reference | this code | faster | of its products' time | memory, reference | here | difference |
|---|---|---|---|---|---|---|---|"""

SIZES = {
    "repeats": 3,
    "embed_size": 1024,
    "img_dim": 2048,
    "word_dim": 300,
    "vocab_size": 8500,
    "images": 1000,
    "per_image": 5,  # a test split of 1,000 × 5,000
    "plain_images": 128,  # the published way scores a part of the pairs
    "plain_captions": 256,
    "batch_size": 128,
    "plain_batches": 3,  # and encodes a part of the split
    "plain_grids": 50,
    "all_grids": 123287,  # images of MS-COCO
    "growth": [250, 500, 1000, 2000],
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
    "batches": [16, 32],
}


class Row(NamedTuple):
    """A row of the table. here, reference: a function of measurements.py and its arguments; no reference where None."""

    section: str
    work: str
    here: tuple[str, dict]
    reference: tuple[str, dict] | None = None


def rows(s, bfloat16):
    """All rows of the table for sizes s (dict). bfloat16: whether the machine multiplies such numbers fast."""
    n, per_image, batch = s["images"], s["per_image"], s["batch_size"]
    for size in s["sizes"]:
        for count in (count for count in s["candidates"] if count < size):
            work = f"best {TOP} of {size:,} images for a sentence, {count:,} scored exactly"
            yield Row("search", work, ("search", {"n": size, "candidates": count}), ("search", {"n": size}))
    for way in ("t2i", "i2t"):
        for form, text in FORMS.items():
            work = f"score and rank {n:,} × {n * per_image:,}, {way}{text}"
            if form != "medium" or bfloat16:
                here = "score", {"way": way, "form": form, "n": n}
                yield Row("score", work, here, ("score_published", {"way": way}))
    for way in ("t2i", "i2t"):
        for form, text in (("highest", ""), ("amp", ", `--amp`"))[: 1 + bfloat16]:
            here = "train", {"way": way, "form": form, "batch": batch}
            yield Row("train", f"training step, batch {batch}, {way}{text}", here, ("train_published", {"way": way}))
    yield Row("encode", f"encode {n:,} images, {n * per_image:,} captions", ("encode", {}), ("encode_published", {}))
    yield Row("grids", f"position grids of {n:,} images", ("grids", {"n": n}), ("grids_published", {}))
    yield Row("grids", f"position grids of {s['all_grids']:,} images", ("grids", {"n": s["all_grids"]}))
    for images in s["train_images"]:
        yield Row("start", f"from the command to the first batch of {images:,} images", ("start", {"n": images}))
    for images in s["growth"]:
        work = f"score and rank {images:,} × {images * per_image:,}, t2i"
        yield Row("growth", work, ("score", {"way": "t2i", "form": "highest", "n": images}))
    for pairs in s["batches"]:
        here = "train", {"way": "t2i", "form": "highest", "batch": pairs}
        yield Row("growth", f"training step, batch {pairs}, t2i", here)


def measure(name, sizes, **arguments):
    """The result (dict) of one function of measurements.py, in a process of its own, which Ctrl-C ends in silence."""
    at_start = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **at_start) as pool:
        return pool.submit(run_measurement, name, {**sizes, "started": time.time()}, arguments).result()


# ---------------------------------------------------------------- the table


def machine_line(machine):
    cores, threads, instructions = machine["cores"], machine["threads"], ", ".join(machine["instructions"])
    device = "" if machine["device"] == "cpu" else f" and {machine['device']}"
    rate = f"fastest float32 product {max(machine['gflops'].values()):.0f} GFLOP/s"
    return f"{cores} cores of {machine['processor']} ({instructions}){device}, {threads} threads, {rate}"


def table_row(row, here, reference, machine):
    """A row of the table as Markdown. here, reference: results of measurements, reference {} where there is none."""
    rate = max(machine["gflops"].values()) * 1e9
    difference = here.get("difference", reference.get("differences", {}).get(row.here[1].get("form", "highest")))
    cells = [
        row.work,
        time_text(reference),
        time_text(here),
        f"{median(reference['seconds']) / median(here['seconds']):.3g}×" if reference else "",
        f"{median(here['seconds']) * rate / here['flops']:.2f}×" if "flops" in here else "",
        memory_text(reference),
        memory_text(here),
        "" if difference is None else f"{difference:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def time_text(result):
    if not result:
        return ""
    value = median(result["seconds"])
    if value >= 1000:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def memory_text(result):
    """Peak memory; ≥ where only a part of the work was done."""
    if not result:
        return ""
    return "≥ " * ("part" in result) + f"{result.get('device_gb') or result['peak_gb']:.2f} GB"


# ---------------------------------------------------------------- command line


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"some of {', '.join(SECTIONS)}")
    add("--quick", action="store_true", help="smaller sizes")
    add_options(parser, ("device",))
    add("--out", default="runs/benchmark.json", help="everything measured, as JSON (default: %(default)s)")
    group = parser.add_argument_group("search")
    add_options(group, ("data_path", "vocab_path"), data_path=None, vocab_path=None)
    search = group.add_argument
    search("--model_path", help="checkpoint")
    search("--split", default="test", help="dev, test, … (default: %(default)s)")
    search("--collection", metavar="DIR", help="the collection's folder, made if missing (default: as build_index.py)")
    search("--sizes", type=int, nargs="+", default=[1000], help="first images of the split (default: %(default)s)")
    search("--candidates", type=int, nargs="+", default=[100, 200, 500, 1000, 2000], help="(default: %(default)s)")
    search("--queries", type=int, default=50, help="captions that search (default: %(default)s)")
    return parser


def main(measure=measure):
    parser = get_parser()
    opt = parser.parse_args()
    sections = opt.only or SECTIONS[not opt.model_path :]  # without a checkpoint all except search
    if min(*opt.sizes, *opt.candidates) < TOP or opt.queries < 1:
        parser.error(f"expected --sizes and --candidates of {TOP} or more, --queries of 1 or more")
    if "search" in sections and not opt.model_path:
        parser.error("--only search: expected --model_path, a checkpoint")
    make_folder(os.path.dirname(opt.out) or ".")
    check_output(opt.out)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sizes = {**SIZES, **(QUICK if opt.quick else {}), **vars(opt)}
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        sizes["folder"] = folder

        @cache
        def result(name, *arguments):
            return measure(name, sizes, **dict(arguments))

        def result_of(job):
            return result(job[0], *job[1].items()) if job else {}

        machine = result("prepare")
        print(f"{machine_line(machine)}\n\n{HEAD}", flush=True)
        for row in rows(sizes, "bfloat16" in machine["instructions"]):
            if row.section in sections and row.work not in (other["work"] for other in measured):
                here, reference = result_of(row.here), result_of(row.reference)
                measured.append({"work": row.work, "here": here, "reference": reference})
                results = json.dumps({"sizes": sizes, "machine": machine, "rows": measured}, indent=1)
                replace(opt.out, lambda file, results=results: file.write(results.encode()))
                print(table_row(row, here, reference, machine), flush=True)
    print(f"\neverything measured: {opt.out}")


if __name__ == "__main__":
    run(main)
