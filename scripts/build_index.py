"""Encode a split once into a collection on disk, for search among more pictures than can be scored for each sentence.

python scripts/build_index.py --model_path runs/demo/attention_seed0/model_best.pth.tar --data_path data --split test

In the collection's folder (beside the checkpoint, unless --out says otherwise):
  images.npy (n, R, D) and words.npy (ΣW, D), float16, memory-mapped by the search; lens.npy (captions,)
  anchors.faiss   a faiss index of K directions, k-means centres of what attends: words (t2i) or regions (i2t)
  nearest.npy     uint16: the nearest anchor of each word of the captions (ΣW,), or region of the pictures (nR,)
  table.npy       float16: how much of each anchor there is in each picture's regions at most (K, n), or in each
                  caption's words (K, captions)
  collection.json what it was made from; written last
A stopped run goes on where it was when the same command runs again.
"""

import argparse
import hashlib
import json
import os

import faiss
import numpy as np
import torch
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from data import pad
from evaluation import load_split
from lib.datasets import json_files
from lib.datasets.arrays import ArrayWriter
from lib.errors import InputError, run
from lib.files import open_npy, replace
from scripts.search.collection import Collection, FirstStage

ANCHORS = 4096
SAMPLE_PER_ANCHOR = 64  # words or regions that train an anchor, at most
SYNC_EVERY = 16  # batches between two notes of how far a build is
TABLE_BLOCK = 1024  # pictures or captions of which the table is made at once
NEAREST_BLOCK = 16384  # words or regions whose anchors are found at once
MOST_ANCHORS = 1 << 16  # numbers of a uint16
SAMPLE_SEED = 0


def collection_folder(model_path, data_name, split):
    """Where the collection of a checkpoint and a split lies unless one says otherwise."""
    return f"{model_path.removesuffix('.pth.tar')}_{data_name}_{split}_collection"


def fingerprint(model_path, dataset, n_anchors):
    """What a collection is made from, as a dict that collection.json keeps."""
    with open(model_path, "rb") as file:
        checkpoint = hashlib.file_digest(file, "sha256").hexdigest()
    some = np.ascontiguousarray(dataset.images[:: len(dataset.images) // 8 + 1])
    return {
        "checkpoint": checkpoint,
        "captions": hashlib.sha256("\n".join(dataset.captions).encode()).hexdigest(),
        "features": [*dataset.images.shape, hashlib.sha256(some).hexdigest()],
        "anchors": n_anchors,
    }


def is_note(note):
    """Whether note is of the form of a collection's collection.json or progress.json."""
    if not isinstance(note, dict) or not isinstance(note.get("done", {}), dict):
        return False
    steps = [step for step in note.get("done", {}).values() if step != "all"]
    return all(type(n) is int and n >= 1 for n in (*steps, note.get("anchors", ANCHORS)))


def read_json(path, fits=is_note, expected="the notes of a collection; --overwrite makes it anew"):
    """The JSON in a file, None where there is none. Raises InputError where it is not what fits."""
    return json_files.read_json(path, fits, expected) if os.path.isfile(path) else None


def write_json(path, value):
    replace(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


class Build:
    """One collection in the making: files that are filled block by block, and a note of how far each is."""

    def __init__(self, folder, made_from):
        os.makedirs(folder, exist_ok=True)
        self.folder, self.made_from = folder, made_from
        self.note = os.path.join(folder, "progress.json")
        before = read_json(self.note, expected="how far a stopped run was; delete it to begin anew") or {}
        self.done = before.get("done", {}) if before.get("made_from") == made_from else {}

    def path(self, name):
        return os.path.join(self.folder, name)

    def fill(self, name, n, row_shape, blocks, dtype=np.float16):
        """Write name, (n, *row_shape), from blocks(start): pairs of a first row and the rows from there on.

        start: how many steps of blocks an earlier run has done.
        """
        if self.done.get(name) == "all" and os.path.isfile(self.path(name)):
            return
        file = ArrayWriter(self.path(name), n, row_shape, dtype, resume=name in self.done)
        start = self.done.get(name, 0) if file.resumed else 0
        for step, (row, rows) in enumerate(blocks(start), start + 1):
            file.write(row, rows)
            if step % SYNC_EVERY == 0:
                file.sync()
                self.keep(name, step)
        file.commit()
        self.keep(name, "all")

    def keep(self, name, steps):
        self.done[name] = steps
        write_json(self.note, {"made_from": self.made_from, "done": self.done})


def progress(steps, start, name):
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, unit="batch", leave=False, disable=None)


@torch.no_grad()
def build(folder, made_from, model, loader, n_anchors):
    """Make the collection of a loader's data set in folder, or go on making it."""
    dataset, batch, job = loader.dataset, loader.batch_size, Build(folder, made_from)
    model.val_start()
    n, n_captions, size = dataset.n_images, len(dataset.captions), model.opt.embed_size
    targets = [dataset.encode_caption(i) for i in tqdm(range(n_captions), desc="words", leave=False, disable=None)]
    lens = np.array([len(target) for target in targets], dtype=np.int32)
    starts = np.concatenate([[0], lens.cumsum(dtype=np.int64)])
    replace(job.path("lens.npy"), lambda file: np.save(file, lens))

    def images(start):
        for step in progress(-(-n // batch), start, "pictures"):
            at = step * batch
            yield at, model.encode_images(*dataset.read_images(at, min(at + batch, n))).cpu().numpy()

    def words(start):
        for step in progress(-(-n_captions // batch), start, "captions"):
            some, own = (x[step * batch : (step + 1) * batch] for x in (targets, lens.tolist()))
            block = model.encode_captions(pad(some), own).cpu()
            yield int(starts[step * batch]), torch.cat([row[:w] for row, w in zip(block, own, strict=True)]).numpy()

    job.fill("images.npy", n, (dataset.images.shape[1], size), images)
    job.fill("words.npy", int(starts[-1]), (size,), words)
    words_of, regions_of = sides(*(open_npy(job.path(f"{name}.npy")) for name in ("images", "words")), lens)
    attending, attended = (words_of, regions_of) if model.opt.cross_attn == "t2i" else (regions_of, words_of)
    index = make_anchors(job, attending[0], n_anchors)
    anchors, count = directions(index), len(attended[1]) - 1

    def nearest(start):
        for step in progress(-(-len(attending[0]) // NEAREST_BLOCK), start, "anchors"):
            some = attending[0][step * NEAREST_BLOCK : (step + 1) * NEAREST_BLOCK].astype(np.float32)
            yield step * NEAREST_BLOCK, index.search(some, 1)[1][:, 0]

    def table(start):
        for step in progress(-(-count // TABLE_BLOCK), start, "table"):
            yield step * TABLE_BLOCK, strongest(*attended, step * TABLE_BLOCK, TABLE_BLOCK, anchors)

    job.fill("nearest.npy", len(attending[0]), (), nearest, np.uint16)
    # filled a picture (caption) a row, then turned: a query reads the few rows of its anchors only
    job.fill("by_item.npy", count, (len(anchors),), table)
    turn(job, len(anchors), count)
    write_json(job.path("collection.json"), made_from)
    for leftover in ("by_item.npy", "progress.json"):
        if os.path.exists(job.path(leftover)):
            os.remove(job.path(leftover))


def sides(images, words, lens):
    """The captions' words (ΣW, D) and where each caption's begin, the pictures' regions (nR, D) and the same."""
    regions = np.arange(0, images.shape[0] * images.shape[1] + 1, images.shape[1])
    return (words, np.concatenate([[0], lens.cumsum(dtype=np.int64)])), (images.reshape(-1, images.shape[2]), regions)


def make_anchors(job, elements, n_anchors):
    """The collection's anchors, a faiss index made of what attends where that has not been done."""
    path = job.path("anchors.faiss")
    if job.done.get("anchors.faiss") != "all" or not os.path.isfile(path):
        index = find_anchors(elements, n_anchors)
        replace(path, lambda file: file.write(faiss.serialize_index(index).tobytes()))
        job.keep("anchors.faiss", "all")
    return read_anchors(path)


def find_anchors(elements, n_anchors):
    """A faiss index of the k-means centres of elements (n, D), of unit length: n_anchors, fewer where they are few."""
    k = max(1, min(n_anchors, len(elements) // 4))
    chosen = np.random.default_rng(SAMPLE_SEED).permutation(len(elements))[: k * SAMPLE_PER_ANCHOR]
    sample = np.asarray(elements[np.sort(chosen)], dtype=np.float32)
    kmeans = faiss.Kmeans(
        elements.shape[1],
        k,
        niter=10,
        seed=1,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=SAMPLE_PER_ANCHOR,
    )
    kmeans.train(sample)
    index = faiss.IndexFlatIP(elements.shape[1])
    index.add(kmeans.centroids)
    return index


def directions(index):
    return torch.from_numpy(index.reconstruct_n(0, index.ntotal))


def strongest(elements, starts, first, count, anchors):
    """The largest dot product of each anchor (K, D) with the elements (…, D) of count items from first on, (…, K)."""
    largest = []
    for at in range(first, min(first + count, len(starts) - 1), 32):
        own = starts[at : at + 33]
        products = torch.from_numpy(elements[own[0] : own[-1]].astype(np.float32)) @ anchors.T
        largest.append(np.maximum.reduceat(products.numpy(), own[:-1] - own[0], axis=0))
    return np.concatenate(largest)


def turn(job, k, n):
    """table.npy (K, n) from by_item.npy (n, K), a few anchors at a time."""
    source = open_npy(job.path("by_item.npy"))
    file = ArrayWriter(job.path("table.npy"), k, (n,), np.float16)
    some = max(1, (256 << 20) // (2 * n))
    for at in range(0, k, some):
        file.write(at, np.ascontiguousarray(source[:, at : at + some].T))
    file.commit()


def read_anchors(path):
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, make the collection anew with --overwrite")
    try:
        return faiss.read_index(path)
    except RuntimeError as error:
        raise InputError(f"{path}: not a faiss index ({str(error).splitlines()[0][:80]})") from None


def open_collection(folder, model, vocab):
    """The Collection in folder, its arrays memory-mapped. Raises InputError where files are missing or do not fit."""
    images, words, lens, table, nearest = (
        open_npy(os.path.join(folder, f"{x}.npy")) for x in ("images", "words", "lens", "table", "nearest")
    )
    anchors = read_anchors(os.path.join(folder, "anchors.faiss"))
    fit = (images.ndim, words.ndim, lens.ndim) == (3, 2, 1) and {lens.dtype.kind, nearest.dtype.kind} <= {*"iu"}
    fit = fit and images.size and lens.size and lens.min() > 0 and lens.sum() == len(words)
    if not fit or {images.shape[2], words.shape[1], anchors.d} != {model.opt.embed_size}:
        raise InputError(f"{folder}: its files do not fit together, make it anew with --overwrite")
    t2i, both = model.opt.cross_attn == "t2i", sides(images, words, lens)
    (attending, starts), (_, others) = both if t2i else both[::-1]
    if table.shape != (anchors.ntotal, len(others) - 1) or nearest.shape != attending.shape[:1]:
        raise InputError(f"{folder}: its files do not fit together, make it anew with --overwrite")
    return Collection(model, vocab, images, words, lens, FirstStage(t2i, anchors, nearest, starts, table))


def open_or_build(model_path, model, loader, split, folder=None, n_anchors=None, overwrite=False):
    """The collection of a checkpoint and a loader's split; made where it is not there yet.

    n_anchors: what it must have been made with; where None, anything, or ANCHORS if it is made now.
    """
    folder = folder or collection_folder(model_path, model.opt.data_name, split)
    try:
        before = read_json(os.path.join(folder, "collection.json"))
    except InputError:
        if not overwrite:
            raise
        before = {}
    n_anchors = n_anchors or (before or {}).get("anchors", ANCHORS)
    made_from = fingerprint(model_path, loader.dataset, n_anchors)
    if before is not None and not overwrite and before != made_from:
        found = next((name for name in made_from if before.get(name) != made_from[name]), "things")
        raise InputError(f"{folder}: made from other {found}, --overwrite of build_index.py makes it anew")
    if before is None or overwrite:
        if os.path.isdir(folder) and not {*os.listdir(folder)} <= OWN | {name + ".part" for name in OWN}:
            raise InputError(f"{folder}: holds files that are no collection's, choose another --out")
        if before is not None:
            os.remove(os.path.join(folder, "collection.json"))
        print(f"making {folder}", flush=True)
        build(folder, made_from, model, loader, n_anchors)
    return open_collection(folder, model, loader.dataset.vocab)


OWN = {
    "images.npy",
    "words.npy",
    "lens.npy",
    "anchors.faiss",
    "nearest.npy",
    "by_item.npy",
    "table.npy",
    "progress.json",
    "collection.json",
}


def get_parser():
    parser = argparse.ArgumentParser(
        description="Encode a split once into a collection on disk, with an index for its search.",
        epilog="example: python scripts/build_index.py --model_path runs/demo/attention_seed0/model_best.pth.tar "
        '--data_path data --split test --query "a red ring at the top"',
    )
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint")
    add("--data_path", help="folder of the data sets (default: the checkpoint's)")
    add("--vocab_path", help="folder of the vocabularies (default: the checkpoint's)")
    add("--split", default="test", help="dev, test, testall or one of your own (default: %(default)s)")
    add("--out", metavar="DIR", help="the collection's folder (default: beside the checkpoint)")
    add("--anchors", type=int, help=f"directions that stand for words (default: {ANCHORS})")
    add("--overwrite", action="store_true", help="make anew what is there already")
    add("--query", metavar="SENTENCE", help="then print the best ten pictures for a sentence")
    add("--candidates", type=int, default=1000, help="pictures that --query scores exactly (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: CUDA if there, else CPU)")
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if opt.candidates < 1 or (opt.anchors is not None and not 1 <= opt.anchors <= MOST_ANCHORS):
        parser.error(f"expected --candidates of 1 or more and --anchors of 1 to {MOST_ANCHORS}")
    model, loader = load_split(opt.model_path, opt.data_path, opt.vocab_path, opt.split, device=opt.device)
    collection = open_or_build(opt.model_path, model, loader, opt.split, opt.out, opt.anchors, opt.overwrite)
    folder = opt.out or collection_folder(opt.model_path, model.opt.data_name, opt.split)
    size = sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6
    print(f"{folder}: {len(collection.images)} pictures, {len(collection.lens)} captions, {size:.1f} MB")
    if opt.query:
        for image, score in zip(*collection.search(opt.query, 10, opt.candidates), strict=True):
            print(f"  {score:.3f}  picture {image}")


if __name__ == "__main__":
    run(main)
