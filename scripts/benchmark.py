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
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from statistics import median

if not __package__:
    import _root  # noqa: F401

from lib.errors import run
from lib.files import check_output, make_folder, replace
from lib.options import add_options
from scripts.bench import measurements

SECTIONS = ("search", "score", "train", "encode", "grids")
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
    "splits": [250, 500],  # further numbers of images and pairs, of this code only
    "batches": [16, 32, 64, 256],
}
QUICK = {
    "images": 160,
    "plain_images": 32,
    "plain_captions": 64,
    "batch_size": 32,
    "splits": [80],
    "batches": [16],
}


def rows(s, bfloat16):
    """The rows of the table: section, work, and the measurements of this code and of the reference, or None.

    A measurement is the name of a function of measurements.py and its arguments. bfloat16: whether the machine
    multiplies such numbers fast.
    """
    for size in s.sizes:
        for count in (count for count in s.candidates if count < size):
            work = f"best {measurements.TOP} of {size:,} images for a sentence, {count:,} scored exactly"
            yield "search", work, ("search", size, count), ("search", size, None)
    n_captions = s.images * s.per_image
    for way in ("t2i", "i2t"):
        work, published = f"score and rank {s.images:,} × {n_captions:,}, {way}", ("score_published", way)
        yield "score", work, ("score", way, "highest", s.images), published
        if bfloat16:
            yield "score", f"{work}, `--matmul_precision medium`", ("score", way, "medium", s.images), published
        yield "score", f"{work}, by `model.attend` alone", ("score", way, "formula", s.images), published
    for n in s.splits:
        yield "score", f"score and rank {n:,} × {n * s.per_image:,}, t2i", ("score", "t2i", "highest", n), None
    for way in ("t2i", "i2t"):
        work, published = f"training step, batch {s.batch_size}, {way}", ("train_published", way)
        yield "train", work, ("train", way, s.batch_size, False), published
        if bfloat16:
            yield "train", f"{work}, `--amp`", ("train", way, s.batch_size, True), published
    for n_pairs in s.batches:
        yield "train", f"training step, batch {n_pairs}, t2i", ("train", "t2i", n_pairs, False), None
    yield "encode", f"encode {s.images:,} images, {n_captions:,} captions", ("encode",), ("encode_published",)
    yield "grids", f"position grids of {s.images:,} images", ("grids",), None


def measure(s, name, *arguments):
    """The result (dict) of a function of measurements.py, in a process of its own, which Ctrl-C ends in silence."""
    at_start = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **at_start) as pool:
        return pool.submit(getattr(measurements, name), s, *arguments).result()


# ---------------------------------------------------------------- the table


def machine_line(machine):
    processor = f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['threads']} threads"
    return f"{processor}, device {machine['device']}, float32 products at {machine['flops'] / 1e9:.0f} GFLOP/s"


def table_row(work, here, reference, machine):
    """A row of the table as Markdown. here, reference: results of measurements; reference {} where there is none."""
    seconds, difference = median(here["seconds"]), here.get("difference")
    cells = [
        work,
        time_text(reference),
        time_text(here),
        f"{median(reference['seconds']) / seconds:.3g}×" if reference else "",
        f"{seconds * machine['flops'] / here['flops']:.2f}×" if "flops" in here else "",
        memory_text(reference),
        memory_text(here),
        "" if difference is None else f"{difference:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def time_text(result):
    return f"{median(result['seconds']):,.4g} s" if result else ""


def memory_text(result):
    """Peak memory; ≥ where only a part of the work was done."""
    return "≥ " * ("part" in result) + f"{result['memory_gb']:.2f} GB" if result else ""


# ---------------------------------------------------------------- command line


def main():
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
    opt = parser.parse_args()
    sections = opt.only or SECTIONS[not opt.model_path :]  # without a checkpoint all except search
    if min(*opt.sizes, *opt.candidates) < measurements.TOP or opt.queries < 1:
        parser.error(f"expected --sizes and --candidates of {measurements.TOP} or more, --queries of 1 or more")
    if "search" in sections and not opt.model_path:
        parser.error("--only search: expected --model_path, a checkpoint")
    make_folder(os.path.dirname(opt.out) or ".")
    check_output(opt.out)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    s = argparse.Namespace(**{**SIZES, **(QUICK if opt.quick else {}), **vars(opt)})

    @cache
    def result_of(job):
        return measure(s, *job) if job else {}

    machine, measured = result_of(("machine",)), []
    print(f"{machine_line(machine)}\n\n{HEAD}", flush=True)
    for section, work, *jobs in rows(s, "bfloat16" in machine["instructions"]):
        if section in sections:
            here, reference = map(result_of, jobs)
            measured.append({"work": work, "here": here, "reference": reference})
            results = json.dumps({"sizes": vars(s), "machine": machine, "rows": measured}, indent=1)
            replace(opt.out, lambda file, results=results: file.write(results.encode()))
            print(table_row(work, here, reference, machine), flush=True)
    print(f"\neverything measured: {opt.out}")


if __name__ == "__main__":
    run(main)
