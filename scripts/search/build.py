"""Make a collection's files, block by block. A stopped build goes on where it was when it is started again."""

import os

import faiss
import numpy as np
import torch
from tqdm import tqdm

from data import pad
from lib.datasets.arrays import ArrayWriter
from lib.errors import InputError
from lib.files import open_npy, replace
from scripts.search.store import (
    FILES,
    N_CENTROIDS,
    collection_folder,
    fingerprint,
    open_collection,
    other_input,
    read_centroids,
    read_json,
    roles,
    write_json,
)

SAMPLES_PER_CENTROID = 64  # words or regions that train a centroid, at most
SYNC_EVERY = 16  # batches between two notes of how far a build is
TABLE_BLOCK = 1024  # images or captions whose rows of the table are made at once
NEAREST_BLOCK = 16384  # words or regions whose nearest centroids are found at once
TRANSPOSE_BYTES = 256 << 20  # of the table that is transposed at once
SAMPLE_SEED = 0


class Files:
    """The files of a collection in the making, and a note of how far each is."""

    def __init__(self, folder, made_from):
        os.makedirs(folder, exist_ok=True)
        self.folder, self.made_from = folder, made_from
        self.note = self.path("progress.json")
        before = read_json(self.note, expected="how far a stopped run was; delete it to begin anew") or {}
        self.done = before.get("done", {}) if before.get("made_from") == made_from else {}

    def path(self, name):
        return os.path.join(self.folder, name)

    def is_done(self, name):
        return self.done.get(name) == "all" and os.path.isfile(self.path(name))

    def keep(self, name, steps):
        """Note that so many steps of a file are on disk; "all": the file is whole."""
        self.done[name] = steps
        write_json(self.note, {"made_from": self.made_from, "done": self.done})

    def fill(self, name, shape, blocks, make, dtype=np.float16):
        """Write an array of a shape as the file name. make(block) → first row and rows, for a slice of blocks."""
        if self.is_done(name):
            return
        file = ArrayWriter(self.path(name), shape, dtype, resume=name in self.done)
        done = self.done.get(name, 0) if file.resumed else 0
        with tqdm(desc=name, initial=done, total=len(blocks), unit="batch", leave=False, disable=None) as bar:
            for step, block in enumerate(blocks[done:], done + 1):
                file.write(*make(block))
                bar.update()
                if step % SYNC_EVERY == 0:
                    file.sync()
                    self.keep(name, step)
        file.commit()
        self.keep(name, "all")


def cut(n, size):
    """Slices of size, the last one shorter, that cover n."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


# ---------------------------------------------------------------- steps of a build


def build(folder, made_from, model, loader, n_centroids):
    """Make the collection of a loader's data set in folder, or go on making it."""
    files = Files(folder, made_from)
    lens = fill_embeddings(files, model, loader)
    images, words = (open_npy(files.path(name)) for name in ("images.npy", "words.npy"))
    (queries, _), contexts = roles(model.opt.cross_attn, images, words, lens)
    # without captions a t2i collection has no words: regions, which lie in the same space, give the centroids
    centroids = make_centroids(files, queries if len(queries) else contexts[0], n_centroids)
    fill_nearest(files, queries, centroids)
    fill_table(files, *contexts, torch.from_numpy(centroids.reconstruct_n(0, centroids.ntotal)))
    write_json(files.path("collection.json"), made_from)
    for leftover in ("by_item.npy", "progress.json"):
        os.remove(files.path(leftover))


@torch.no_grad()
def fill_embeddings(files, model, loader):
    """Write images.npy, words.npy and lens.npy; returns lens (captions,)."""
    dataset, batch, size = loader.dataset, model.opt.batch_size, model.opt.embed_size
    model.val_start()
    targets = [dataset.encode_caption(i) for i in range(len(dataset.captions))]
    lens = np.array([len(target) for target in targets], dtype=np.int32)
    starts = np.concatenate([[0], lens.cumsum(dtype=np.int64)])
    replace(files.path("lens.npy"), lambda file: np.save(file, lens))

    def images(block):
        return block.start, model.encode_images(*dataset.features(range(block.start, block.stop)))[0].cpu().numpy()

    def words(block):
        block_lens = lens[block].tolist()
        padded = model.encode_captions(pad(targets[block]), block_lens)[0].cpu()
        rows = torch.cat([row[:n_words] for row, n_words in zip(padded, block_lens, strict=True)])
        return int(starts[block.start]), rows.numpy()

    shape = dataset.n_images, dataset.images.shape[1], size
    files.fill("images.npy", shape, cut(dataset.n_images, batch), images)
    files.fill("words.npy", (int(starts[-1]), size), cut(len(targets), batch), words)
    return lens


def make_centroids(files, elements, n_centroids):
    """The collection's centroids, a faiss index; found by k-means in elements (n, D) unless that has been done."""
    path = files.path("anchors.faiss")
    if not files.is_done("anchors.faiss"):
        index = find_centroids(elements, n_centroids)
        replace(path, lambda file: file.write(faiss.serialize_index(index).tobytes()))
        files.keep("anchors.faiss", "all")
    return read_centroids(path)


def find_centroids(elements, n_centroids):
    """A faiss index of the k-means centroids, of unit length, of elements (n, D): n_centroids, n / 4 at most."""
    k = max(1, min(n_centroids, len(elements) // 4))
    chosen = np.random.default_rng(SAMPLE_SEED).permutation(len(elements))[: k * SAMPLES_PER_CENTROID]
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": SAMPLES_PER_CENTROID}
    kmeans = faiss.Kmeans(elements.shape[1], k, niter=10, seed=1, spherical=True, **limits)
    kmeans.train(np.asarray(elements[np.sort(chosen)], dtype=np.float32))
    index = faiss.IndexFlatIP(elements.shape[1])
    index.add(kmeans.centroids)
    return index


def fill_nearest(files, queries, centroids):
    """Write nearest.npy: the index of the nearest centroid of each query element (ΣQ, D)."""

    def nearest(block):
        return block.start, centroids.search(queries[block].astype(np.float32), 1)[1][:, 0]

    files.fill("nearest.npy", (len(queries),), cut(len(queries), NEAREST_BLOCK), nearest, np.uint16)


def fill_table(files, elements, starts, centroids):
    """Write table.npy (K, contexts) by way of by_item.npy, its transpose, which is filled a context a row.

    A search reads only the rows of its words' centroids. elements (ΣL, D), starts (contexts + 1,), centroids (K, D).
    """
    n, k = len(starts) - 1, len(centroids)

    def rows(block):
        return block.start, largest_products(elements, starts[block.start : block.stop + 1], centroids)

    def columns(block):
        return block.start, by_item[:, block].T

    files.fill("by_item.npy", (n, k), cut(n, TABLE_BLOCK), rows)
    by_item = open_npy(files.path("by_item.npy"))
    files.fill("table.npy", (k, n), cut(k, max(1, TRANSPOSE_BYTES // (2 * max(1, n)))), columns)


def largest_products(elements, starts, centroids):
    """The largest dot product of each centroid (K, D) with each context's elements (ΣL, D): (contexts, K)."""
    largest = []
    for block in cut(len(starts) - 1, 32):
        bounds = starts[block.start : block.stop + 1]
        products = torch.from_numpy(elements[bounds[0] : bounds[-1]].astype(np.float32)) @ centroids.T
        largest.append(np.maximum.reduceat(products.numpy(), bounds[:-1] - bounds[0], axis=0))
    return np.concatenate(largest)


# ---------------------------------------------------------------- open or build


def open_or_build(model_path, model, loader, split, folder=None, n_centroids=None, overwrite=False):
    """The collection of a checkpoint and a loader's split; made where it is not there yet.

    n_centroids: what it must have been made with; where None, any number, or N_CENTROIDS if it is made now.
    Raises InputError where folder holds other files, or a collection made from other inputs, without overwrite.
    """
    folder = folder or collection_folder(model_path, model.opt.data_name, split)
    note = os.path.join(folder, "collection.json")
    before = None if overwrite else read_json(note)
    n_centroids = n_centroids or (before or {}).get("anchors", N_CENTROIDS)
    made_from = fingerprint(model_path, loader.dataset, n_centroids)
    if before is not None and (found := other_input(before, made_from)):
        raise InputError(f"{folder}: made from other {found}, --overwrite of build_index.py makes it anew")
    if before is None:
        check_folder(folder)
        if os.path.exists(note):
            os.remove(note)
        print(f"making {folder}", flush=True)
        build(folder, made_from, model, loader, n_centroids)
    return open_collection(folder, model, loader.dataset.vocab)


def check_folder(folder):
    """Raise InputError where a folder holds files that are no collection's."""
    if os.path.isdir(folder) and not {*os.listdir(folder)} <= FILES | {name + ".part" for name in FILES}:
        raise InputError(f"{folder}: holds files that are no collection's, choose another --out")
