"""How much of an exhaustive ranking the two-stage search finds, and how long a query takes, by size of the collection.

python scripts/benchmark_search.py --model_path M --data_path D --split test --sizes 1000 10000 100000 200000

Sizes above the split's are filled up with pictures mixed from it: each region is that of one of two random pictures.
Writes a figure and the numbers behind it as JSON.
"""

import argparse
import json
import os
import sys
import time

import faiss
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

from build_index import ANCHORS, TABLE_BLOCK, directions, find_anchors, strongest

from checkpoint import replace
from errors import InputError, run
from evaluation import load_split
from search import Collection, FirstStage

TOP = 10
ANCHOR_CAPTIONS = 20_000  # captions whose words the anchors are made from
CANDIDATES = (50, 100, 200, 500, 1000, 2000, 4000)


def encode_images(model, dataset, n, batch=1024):
    """Regions (n, R, D) float16 of the split's pictures, filled up with mixtures of them."""
    real = min(n, dataset.n_images)
    images = np.empty((n, dataset.images.shape[1], model.opt.embed_size), dtype=np.float16)
    for at in tqdm(range(0, real, batch), desc="pictures", unit="batch", leave=False, disable=None):
        stop = min(at + batch, real)
        images[at:stop] = model.encode_images(*dataset.read_images(at, stop)).cpu().numpy()
    rng = np.random.default_rng(0)
    for at in range(real, n, batch):
        size = min(batch, n - at)
        first, second = rng.integers(0, real, (2, size))
        own = rng.random((size, images.shape[1], 1)) < 0.5
        images[at : at + size] = np.where(own, images[first], images[second])
    return images


def encode_words(model, dataset, captions, batch=256):
    """The words (W_i, D) of some captions, a list of tensors on the CPU."""
    words = []
    for at in range(0, len(captions), batch):
        targets = [dataset.encode_caption(i) for i in captions[at : at + batch]]
        lens = [len(target) for target in targets]
        block = model.encode_captions(torch.nn.utils.rnn.pad_sequence(targets, batch_first=True), lens).cpu()
        words += [row[:w] for row, w in zip(block, lens, strict=True)]
    return words


def pooled(images):
    """A faiss index of the mean region of each picture, the plain first stage to compare with."""
    index = faiss.IndexFlatIP(images.shape[2])
    for at in range(0, len(images), TABLE_BLOCK):
        index.add(images[at : at + TABLE_BLOCK].astype(np.float32).mean(1))
    return lambda words, count: np.sort(index.search(words.mean(0, keepdim=True).numpy(), count)[1][0])


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@torch.no_grad()
def measure(opt):
    """A list of rows {"pictures", "stage", "candidates", "recall", "median_ms"}; exhaustive has recall 1."""
    model, loader = load_split(opt.model_path, opt.data_path, opt.vocab_path, opt.split, device="cpu")
    dataset, largest = loader.dataset, max(opt.sizes)
    captions = np.random.default_rng(1).permutation(len(dataset.captions)).tolist()
    queries = encode_words(model, dataset, captions[: opt.queries])
    anchor_words = torch.cat(encode_words(model, dataset, captions[opt.queries :][:ANCHOR_CAPTIONS])).numpy()
    images = encode_images(model, dataset, largest)
    index = find_anchors(anchor_words, opt.anchors)
    anchors, table = directions(index), np.empty((index.ntotal, largest), dtype=np.float16)
    for at in tqdm(range(0, largest, TABLE_BLOCK), desc="table", unit="batch", leave=False, disable=None):
        regions = torch.from_numpy(images[at : at + TABLE_BLOCK].astype(np.float32))
        table[:, at : at + TABLE_BLOCK] = strongest(regions, anchors).T
    whole = Collection(model, dataset.vocab, images, anchor_words, [])
    exact = [whole.score_images(words) for words in tqdm(queries, desc="exhaustive", leave=False, disable=None)]
    rows = []
    for n in sorted(opt.sizes):
        part = Collection(model, dataset.vocab, images[:n], anchor_words, [])
        best = [set(np.argsort(-scores[:n], kind="stable")[:TOP].tolist()) for scores in exact]
        times = [seconds(part.score_images, words) for words in queries[:5]]
        rows.append({"pictures": n, "stage": "exhaustive", "candidates": n, "recall": 1.0, "median_ms": ms(times)})
        stages = {"anchors": FirstStage(index, np.ascontiguousarray(table[:, :n])), "mean region": pooled(images[:n])}
        for name, stage in stages.items():
            for count in (c for c in CANDIDATES if c < n):
                found, times = [], []
                for words, right in zip(queries, best, strict=True):
                    start = time.perf_counter()
                    chosen = stage(words, count)
                    again = part.score_images(words, chosen)
                    top = chosen[np.argsort(-again, kind="stable")[:TOP]]
                    times.append(time.perf_counter() - start)
                    found.append(len(right & set(top.tolist())) / TOP)
                rows.append({"pictures": n, "stage": name, "candidates": count,
                             "recall": float(np.mean(found)), "median_ms": ms(times)})  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def ms(times):
    return round(1000 * float(np.median(times)), 1)


def draw(rows, path):
    """Recall, and milliseconds of a query, against the candidates, a line for each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, n in enumerate(sorted({row["pictures"] for row in rows})):
        for stage, style in (("anchors", "o-"), ("mean region", "x:")):
            some = [row for row in rows if row["pictures"] == n and row["stage"] == stage]
            counts, label = [row["candidates"] for row in some], f"{n:,} pictures, {stage}"
            left.plot(counts, [100 * row["recall"] for row in some], style, color=f"C{i}", label=label)
            if stage == "anchors":
                right.plot(counts, [row["median_ms"] for row in some], style, color=f"C{i}", label=f"{n:,} pictures")
        whole = next(row for row in rows if row["pictures"] == n and row["stage"] == "exhaustive")
        right.axhline(whole["median_ms"], color=f"C{i}", ls="--", lw=0.8)
    left.set(title=f"share of the exhaustive top {TOP} that is found, percent", ylim=(0, 102))
    right.set(title="median milliseconds of a query (dashed: exhaustive)", yscale="log")
    for axis in (left, right):
        axis.set(xlabel="candidates that are scored exactly", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    with open(path + ".part", "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    os.replace(path + ".part", path)


def get_parser():
    parser = argparse.ArgumentParser(
        description="Recall and time of the two-stage search against scoring every picture.",
        epilog="example: python scripts/benchmark_search.py --model_path runs/demo/attention_seed0/model_best.pth.tar "
        "--data_path data --split test --sizes 1000 10000 --out search.png",
    )
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint")
    add("--data_path", help="folder of the data sets (default: the checkpoint's)")
    add("--vocab_path", help="folder of the vocabularies (default: the checkpoint's)")
    add("--split", default="test", help="dev, test, … (default: %(default)s)")
    add("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="pictures (default: %(default)s)")
    add("--queries", type=int, default=24, help="captions that search (default: %(default)s)")
    add("--anchors", type=int, default=ANCHORS, help="directions that stand for words (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="of the computations (default: %(default)s)")
    add("--out", default="search.png", help="the figure; the numbers go to the same name with .json")
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if min(*opt.sizes, opt.queries, opt.anchors, opt.threads) < 1 or min(opt.sizes) < TOP:
        parser.error(f"expected --sizes of {TOP} or more, and --queries, --anchors, --threads of 1 or more")
    if not os.path.isdir(os.path.dirname(opt.out) or "."):
        raise InputError(f"{opt.out}: no such folder")
    torch.set_num_threads(opt.threads)
    faiss.omp_set_num_threads(opt.threads)
    rows = measure(opt)
    numbers = os.path.splitext(opt.out)[0] + ".json"
    replace(numbers, lambda file: file.write(json.dumps(rows, indent=1).encode()))
    draw(rows, opt.out)
    print(f"{opt.out}, {numbers}")


if __name__ == "__main__":
    run(main)
