"""How much of an exhaustive ranking the two-stage search finds, and how long a query takes, by size of the collection.

python scripts/benchmark_search.py --model_path M --data_path D --split test --sizes 1000 10000 --out search.png

A size is that many of the split's first pictures; --drawn FOLDER searches among pictures drawn as the demo's instead.
Writes a figure and the rows behind it as JSON. A JSON that is there is added to: recall does not mind what else
the machine does and times do, so they can be measured one after the other with --parts.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable

import faiss
import numpy as np
import torch
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from evaluation import load_split
from lib.errors import InputError, run
from lib.files import read_lines, replace, write_lines
from scripts.demo import make_demo_data
from scripts.search.build import TABLE_BLOCK, open_or_build
from scripts.search.collection import Collection
from scripts.search.first_stage import FirstStage
from scripts.search.store import digest, fingerprint, read_json

TOP = 10
CANDIDATES = (50, 100, 200, 500, 1000, 2000, 4000, 10_000, 20_000, 50_000)
TIMED_UP_TO = 4000  # candidates of which the time is measured, beside all
KEY = ("cross_attn", "pictures", "stage", "candidates")
DRAWN_SEED = 1  # the demo's own pictures are of seed 0


def draw_pictures(folder, n):
    """A split train of n pictures in folder, drawn as the demo's, with a caption each; where it is not there yet."""
    done = os.path.join(folder, "demo_precomp", "train_ids.txt")  # written last
    if os.path.isfile(done):
        return
    options = make_demo_data.parse(["--data_path", folder, "--seed", str(DRAWN_SEED)])
    options.train = n
    with multiprocessing.Pool(options.workers) as pool:
        make_demo_data.write_split(pool, options, "train")
    captions = os.path.join(folder, "demo_precomp", "train_caps.txt")
    write_lines(captions, read_lines(captions)[:: make_demo_data.N_CAPTIONS])


@dataclasses.dataclass
class Stage:
    images: Callable


class MeanRegion:
    """The usual first stage, to compare with: a faiss index of the mean region of each picture, and the mean word."""

    def __init__(self, images):
        self.means = np.empty((len(images), images.shape[2]), dtype=np.float32)
        for start in range(0, len(images), TABLE_BLOCK):
            block = slice(start, start + TABLE_BLOCK)
            self.means[block] = images[block].astype(np.float32).mean(1)

    def first(self, n):
        index = faiss.IndexFlatIP(self.means.shape[1])
        index.add(self.means[:n])
        return Stage(lambda words, count: np.sort(index.search(words.mean(0, keepdim=True).numpy(), count)[1][0]))


def cut_stage(stage, n):
    """A FirstStage of the collection's first n pictures."""
    if stage.t2i:
        return FirstStage(True, stage.centroids, stage.nearest, stage.starts, stage.table[:, :n])
    return FirstStage(False, stage.centroids, stage.nearest[: stage.starts[n]], stage.starts[: n + 1], stage.table)


def cut_collection(collection, n, stage):
    """The collection of the first n pictures, with another first stage."""
    return Collection(collection.model, collection.vocab, collection.images[:n], [], [], stage)


def measure_recall(collection, queries, stages, sizes):
    """Rows {KEY…, "recall", "queries"}: the share of the exhaustive top 10 that is among a first stage's candidates.

    What is among them is found, because they are ranked by the same exact scores.
    """
    words = [collection.embed(query) for query in queries]
    exact = [collection.score_images(x) for x in tqdm(words, desc="exhaustive", leave=False, disable=None)]
    for n in sizes:
        best = [np.argsort(-scores[:n], kind="stable")[:TOP] for scores in exact]
        for name, make in stages.items():
            stage = make(n)
            for count in (c for c in CANDIDATES if c < n):
                found = [np.isin(top, stage.images(x, count)).mean() for x, top in zip(words, best, strict=True)]
                yield {
                    "pictures": n,
                    "stage": name,
                    "candidates": count,
                    "recall": round(float(np.mean(found)), 4),
                    "worst_recall": float(min(found)),
                    "queries": len(found),
                }


def measure_times(collection, queries, stages, sizes, exhaustive):
    """Rows {KEY…, "median_ms", "p95_ms", "timed"} of whole queries: sentence in, ten pictures out."""
    for n in sizes:
        for name, make in {"exhaustive": lambda n: None, **stages}.items():
            part, exact = cut_collection(collection, n, make(n)), name == "exhaustive"
            for count in [n] if exact else [c for c in CANDIDATES if c < n and c <= TIMED_UP_TO]:
                timed = queries[:exhaustive] if exact else queries
                part.search(queries[-1], TOP, count)  # what only a first query pays
                times = [1000 * seconds(part.search, query, TOP, count) for query in timed]
                median, p95 = (round(float(np.percentile(times, share)), 1) for share in (50, 95))
                yield {
                    "pictures": n,
                    "stage": name,
                    "candidates": count,
                    "median_ms": median,
                    "p95_ms": p95,
                    "timed": len(times),
                }


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@torch.no_grad()
def measure(opt, before, path):
    """Rows of what opt.parts names, as measure_recall and measure_times give them, with cross_attn and made_from.

    before: the rows in the file path, to which these will be added.
    """
    if opt.drawn:
        draw_pictures(opt.drawn, max(opt.sizes))
        opt.data_path, opt.split = opt.drawn, "train"
    model, loader = load_split(opt.model_path, opt.data_path, opt.vocab_path, opt.split, device="cpu")
    dataset, sizes = loader.dataset, sorted(opt.sizes)
    if sizes[-1] > dataset.n_images:
        way_out = "choose another --drawn" if opt.drawn else "--drawn FOLDER draws as many as are wanted"
        raise InputError(f"--sizes {sizes[-1]}: the split {opt.split} has {dataset.n_images} pictures; {way_out}")
    made_from = digest(json.dumps(fingerprint(opt.model_path, dataset, 0)).encode())[:12]
    check_rows(before, path, model.opt.cross_attn, made_from)
    collection = open_or_build(opt.model_path, model, loader, opt.split, opt.collection, opt.anchors)
    # captions of the smallest size's pictures, so that each has its own picture among the first n
    known = sizes[0] * len(dataset.captions) // dataset.n_images
    chosen = np.random.default_rng(1).permutation(known)[: opt.queries]
    queries = [dataset.captions[i] for i in chosen]
    stage, means = collection.first_stage, MeanRegion(collection.images[: sizes[-1]])
    stages = {"anchors": lambda n: cut_stage(stage, n), "mean region": means.first}
    rows = []
    if "recall" in opt.parts:
        rows.append(measure_recall(collection, queries, stages, sizes))
    if "times" in opt.parts:
        for row in stage.table:  # into the machine's memory, as after some queries; the regions are there for the means
            row.view(np.int16).max()
        rows.append(measure_times(collection, queries, stages, sizes, opt.exhaustive))
    for row in itertools.chain(*rows):
        yield {"cross_attn": model.opt.cross_attn, "made_from": made_from, **row}


def check_rows(rows, path, cross_attn, made_from):
    """Raise InputError where rows of this direction, in a file, were measured on other inputs."""
    if any(row["cross_attn"] == cross_attn and row.get("made_from", made_from) != made_from for row in rows):
        raise InputError(f"{path}: {cross_attn} rows of another checkpoint or other data, choose another --out")


def is_measured(rows):
    return isinstance(rows, list) and all(isinstance(row, dict) and {*KEY} <= {*row} for row in rows)


def merge(rows, found):
    """Rows with those found added; a row of the same key is updated."""
    known = {tuple(row[name] for name in KEY): row for row in rows}
    for row in found:
        known.setdefault(tuple(row[name] for name in KEY), {}).update(row)
    return [known[key] for key in sorted(known)]


def draw(rows, path):
    """Recall, and milliseconds of a query, against the candidates: a line for each size, a row for each direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = sorted({row["cross_attn"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(len(ways), 2, figsize=(10, 3.9 * len(ways)), squeeze=False, layout="constrained")
    for (recalls, times), way in zip(axes, ways, strict=True):
        draw_direction(recalls, times, [row for row in rows if row["cross_attn"] == way])
        recalls.set(title=f"{way}: share of the exhaustive top {TOP} that is found, percent", ylim=(0, 102))
        times.set(title=f"{way}: median milliseconds of a query (star: all pictures)", yscale="log")
        for axis in (recalls, times):
            axis.set(xlabel="pictures that are scored exactly", xscale="log")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=7)
    replace(path, lambda file: figure.savefig(file, format="png", dpi=100))


def draw_direction(recalls, times, rows):
    """The lines of one direction's rows in an axis of recalls and one of times."""
    for i, n in enumerate(sorted({row["pictures"] for row in rows})):
        style, by_stage = {"color": f"C{i}", "ms": 4}, {}
        for row in rows:
            if row["pictures"] == n:
                by_stage.setdefault(row["stage"], []).append(row)
        for stage, line in (("anchors", "o-"), ("mean region", "x:")):
            points = [(row["candidates"], 100 * row["recall"]) for row in by_stage.get(stage, ()) if "recall" in row]
            if points:
                recalls.plot(*zip(*points, strict=True), line, label=f"{n:,} pictures, {stage}", **style)
        for stage, line in (("anchors", "o-"), ("exhaustive", "*")):
            points = [(row["candidates"], row["median_ms"]) for row in by_stage.get(stage, ()) if "median_ms" in row]
            if points:
                label = f"{n:,} pictures" if stage == "anchors" else None
                times.plot(*zip(*points, strict=True), line, label=label, **{**style, "ms": 9 if line == "*" else 4})


def get_parser():
    parser = argparse.ArgumentParser(
        description="Recall and time of the two-stage search against scoring every picture.",
        epilog="example: python scripts/benchmark_search.py --model_path runs/demo/attention_seed0/model_best.pth.tar "
        "--drawn data/large --sizes 1000 10000 --out search.png",
    )
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint")
    add("--data_path", help="folder of the data sets (default: the checkpoint's)")
    add("--vocab_path", help="folder of the vocabularies (default: the checkpoint's)")
    add("--split", default="test", help="dev, test, … (default: %(default)s)")
    add("--drawn", metavar="DIR", help="among pictures drawn as the demo's, made in DIR where they are missing")
    add("--collection", metavar="DIR", help="the collection's folder (default: beside the checkpoint)")
    add("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="pictures (default: %(default)s)")
    add("--queries", type=int, default=50, help="captions that search (default: %(default)s)")
    add("--exhaustive", type=int, default=5, help="how many of these time a ranking of all (default: %(default)s)")
    add("--anchors", type=int, help="centroids of the collection (default: what it has)")
    add("--parts", nargs="+", choices=("recall", "times"), default=["recall", "times"], help="what is measured")
    add("--threads", type=int, default=os.cpu_count(), help="of the computations (default: %(default)s)")
    add("--out", default="search.png", help="the figure; the rows go to the same name with .json")
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if min(*opt.sizes, opt.queries, opt.exhaustive, opt.anchors or 1, opt.threads) < 1 or min(opt.sizes) < TOP:
        parser.error(f"expected --sizes of {TOP} or more; --queries, --exhaustive, --anchors, --threads of 1 or more")
    if not os.path.isdir(os.path.dirname(opt.out) or "."):
        raise InputError(f"{opt.out}: no such folder")
    torch.set_num_threads(opt.threads)
    faiss.omp_set_num_threads(opt.threads)
    results, found = os.path.splitext(opt.out)[0] + ".json", []
    rows = read_json(results, is_measured, "the rows of an earlier run; delete it to begin anew") or []
    for row in measure(opt, rows, results):
        found.append(row)
        print(json.dumps(row), flush=True)
    rows = merge(rows, found)
    replace(results, lambda file: file.write(json.dumps(rows, indent=1).encode()))
    draw(rows, opt.out)
    print(f"{opt.out}, {results}")


if __name__ == "__main__":
    run(main)
