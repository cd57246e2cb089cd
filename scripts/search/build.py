"""Make and open the files of a collection.

images.npy (n, R, D) and words.npy (ΣW, D), float16, memory-mapped by the search; lens.npy (captions,)
centroids.npy   K directions (K, D), the k-means centroids of the queries' elements: words (t2i) or regions (i2t, and
                t2i without captions)
nearest.npy     uint16: the nearest centroid of each query element, words (ΣW,) or regions (nR,)
table.npy       float16: the largest dot product of a centroid with each image's regions (K, n), in i2t with each
                caption's words (K, captions)
collection.json what they are made from; written first, table.npy last
"""

import hashlib
import json
import os

import faiss
import numpy as np
import torch
from tqdm import tqdm

from data import pad
from lib.datasets.arrays import npy_header
from lib.datasets.json_files import read_object
from lib.errors import InputError
from lib.files import digest_lines, make_folder, open_npy, replace, write_lines
from scripts.search.collection import Collection
from scripts.search.first_stage import FirstStage

ARRAYS = ("images", "words", "lens", "centroids", "nearest", "table")
FINISHED = {"collection.json", *(f"{name}.npy" for name in ARRAYS)}
FILES = FINISHED | {"progress.json", "anchors.faiss"}  # of older versions
N_CENTROIDS = 4096
SAMPLES_PER_CENTROID = 64  # words or regions that train a centroid, at most
TABLE_BLOCK = 4096  # images or captions whose columns of the table are made at once
CONTEXT_BLOCK = 32  # of these, that are multiplied at once
NEAREST_BLOCK = 4096  # words or regions whose nearest centroids are found at once


def collection_folder(model_path, data_name, split):
    """Where the collection of a checkpoint and a split lies by default."""
    return f"{model_path.removesuffix('.pth.tar')}_{data_name}_{split}_collection"


def open_or_build(model_path, model, loader, split, folder=None, n_centroids=None, overwrite=False):
    """The Collection of a checkpoint and a loader's split, its arrays memory-mapped; made where it is not there yet.

    n_centroids: what it must have been made with; where None, any number, or N_CENTROIDS if it is made now.
    Raises InputError where folder holds other files, or a collection that is damaged or was made from other inputs,
    without overwrite.
    """
    folder, before = folder or collection_folder(model_path, model.opt.data_name, split), {}
    note = os.path.join(folder, "collection.json")
    if os.path.isfile(note) and not overwrite:
        expected = "the notes of a collection; --overwrite makes it anew"
        before = read_object(note, expected)
    made_from = fingerprint(model_path, loader.dataset, n_centroids or before.get("anchors", N_CENTROIDS))
    other = [name for name in made_from if made_from[name] != before.get(name)]
    is_finished = before and os.path.isfile(os.path.join(folder, "table.npy"))
    if is_finished and other:
        raise InputError(f"{folder}: made from other {other[0]}, --overwrite of build_index.py makes it anew")
    if other:
        clear(folder)
        write_lines(note, [json.dumps(made_from)])
    if not is_finished:
        build(folder, made_from["anchors"], model, loader)
    return open_collection(folder, model, loader.dataset.vocab)


def fingerprint(model_path, dataset, n_centroids):
    """What a collection is made from, as a dict that collection.json keeps."""
    with open(model_path, "rb") as file:
        checkpoint = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "checkpoint": checkpoint,
        "captions": digest_lines(dataset.captions),
        "features": [*dataset.images.shape, sample_digest(dataset.images, 8)],
        "anchors": n_centroids,
        "vocabulary": digest_lines([json.dumps(sorted(dataset.vocab.word2idx.items()))]),
        "grids": sample_digest(dataset.boxes, 1024) if dataset.need_boxes else None,
    }


def sample_digest(array, count):
    """SHA-256 of count rows at most, spread over an array."""
    return hashlib.sha256(np.ascontiguousarray(array[:: len(array) // count + 1])).hexdigest()


def open_collection(folder, model, vocab):
    """The Collection in folder. Raises InputError where files are missing or do not fit together."""
    if not {*os.listdir(folder)} >= FINISHED:
        raise unfit(folder)
    images, words, lens, centroids, nearest, table = (open_npy(os.path.join(folder, f"{name}.npy")) for name in ARRAYS)
    shapes = [array.ndim for array in (images, words, lens, centroids)] == [3, 2, 1, 2]
    if not shapes or not {lens.dtype.kind, nearest.dtype.kind} <= {*"iu"} or not images.size:
        raise unfit(folder)
    (queries, starts), (_, context_starts) = roles(model.opt.cross_attn, images, words, lens)
    if (
        {array.shape[-1] for array in (images, words, centroids)} != {model.opt.embed_size}
        or (lens < 1).any()
        or lens.sum() != len(words)
        or nearest.shape != queries.shape[:1]
        or nearest.max(initial=0) >= len(centroids)
        or table.shape != (len(centroids), len(context_starts) - 1)
    ):
        raise unfit(folder)
    first_stage = FirstStage(model.opt.cross_attn == "t2i", np.array(centroids), nearest, starts, table)
    return Collection(model, vocab, images, words, lens, first_stage)


def unfit(folder):
    return InputError(f"{folder}: its files do not fit together, --overwrite of build_index.py makes it anew")


def roles(cross_attn, images, words, lens):
    """What attends and what is attended to, each as elements (ΣE, D) and where each item's begin (items + 1,).

    images (n, R, D), words (ΣW, D), lens (captions,). Returns (captions, images) in t2i, (images, captions) in i2t.
    """
    regions = images.reshape(-1, images.shape[2]), np.arange(len(images) + 1) * images.shape[1]
    captions = words, np.cumsum([0, *lens])
    return (captions, regions) if cross_attn == "t2i" else (regions, captions)


# ---------------------------------------------------------------- steps of a build


def clear(folder):
    """Make folder, or remove a collection from it. Raises InputError where it holds other files."""
    make_folder(folder)
    found = {*os.listdir(folder)}
    if not found <= FILES | {name + ".part" for name in FILES}:
        raise InputError(f"{folder}: holds files that are no collection's, choose another --out")
    for name in sorted(found, key=lambda name: name != "collection.json"):  # without which the rest counts for nothing
        os.remove(os.path.join(folder, name))


@torch.no_grad()
def build(folder, n_centroids, model, loader):
    """Make the arrays of the collection of a loader's data set in folder, except those that are there."""
    print(f"making {folder}", flush=True)
    dataset, batch, size = loader.dataset, model.opt.batch_size, model.opt.embed_size

    def fill(name, shape, blocks, make, dtype=np.float16, write=write_rows):
        path = os.path.join(folder, f"{name}.npy")
        if not os.path.isfile(path):
            blocks = map(make, tqdm(blocks, name, unit="batch", leave=False, disable=None))
            replace(path, lambda file: write(file, shape, np.dtype(dtype), blocks))
        return open_npy(path)

    def encode_images(block):
        return model.encode_images(*dataset.features(range(block.start, block.stop)))[0].cpu()

    def encode_words(block):
        words, lens = model.encode_captions(pad(targets[block]), [len(target) for target in targets[block]])[:2]
        return torch.cat([row[:n_words] for row, n_words in zip(words.cpu(), lens, strict=True)])

    def find_nearest(block):
        return (queries[block].astype(np.float32) @ centroids.T).argmax(1)

    def compare(block):
        return largest_products(contexts, starts[block.start : block.stop + 1], torch.from_numpy(np.array(centroids)))

    model.val_start()
    targets = [dataset.encode_caption(i) for i in range(len(dataset.captions))]
    lens = fill("lens", (len(targets),), [targets], lambda block: [len(target) for target in block], np.int32)
    shape = dataset.n_images, dataset.images.shape[1], size
    images = fill("images", shape, cut(dataset.n_images, batch), encode_images)
    words = fill("words", (int(lens.sum()), size), cut(len(targets), batch), encode_words)
    (queries, _), (contexts, starts) = roles(model.opt.cross_attn, images, words, lens)
    # without captions a t2i collection has no words: regions, which lie in the same space, give the centroids
    elements = queries if len(queries) else contexts
    k = max(1, min(n_centroids, len(elements) // 4))
    centroids = fill("centroids", (k, size), [elements], lambda elements: find_centroids(elements, k), np.float32)
    fill("nearest", (len(queries),), cut(len(queries), NEAREST_BLOCK), find_nearest, np.uint16)
    n_contexts = len(starts) - 1
    fill("table", (k, n_contexts), cut(n_contexts, TABLE_BLOCK), compare, write=write_columns)


def cut(n, size):
    """Slices of size, the last one shorter, that cover n."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def write_rows(file, shape, dtype, blocks):
    """Write an array in .npy format, of which blocks gives some rows at a time."""
    file.write(npy_header(shape, dtype))
    for rows in blocks:
        file.write(np.asarray(rows, dtype).tobytes())


def write_columns(file, shape, dtype, blocks):
    """The same of blocks (n, K) of columns: a search reads few of the table's rows, so these are written as rows."""
    file.write(npy_header(shape, dtype))
    start, column = file.tell(), 0
    for columns in blocks:
        for number, part in enumerate(columns.T.astype(dtype)):
            file.seek(start + dtype.itemsize * (number * shape[1] + column))
            file.write(part.tobytes())
        column += len(columns)


def find_centroids(elements, k):
    """The k k-means centroids (k, D), of unit length, of elements (n, D)."""
    chosen = np.random.default_rng(0).permutation(len(elements))[: k * SAMPLES_PER_CENTROID]
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": SAMPLES_PER_CENTROID}
    kmeans = faiss.Kmeans(elements.shape[1], k, niter=10, seed=1, spherical=True, **limits)
    kmeans.train(np.asarray(elements[np.sort(chosen)], dtype=np.float32))
    return kmeans.centroids


def largest_products(elements, starts, centroids):
    """The largest dot product of each centroid (K, D) with each context's elements (ΣL, D): (contexts, K)."""
    largest = []
    for block in cut(len(starts) - 1, CONTEXT_BLOCK):
        bounds = starts[block.start : block.stop + 1]
        products = torch.from_numpy(elements[bounds[0] : bounds[-1]].astype(np.float32)) @ centroids.T
        largest.append(np.maximum.reduceat(products.numpy(), bounds[:-1] - bounds[0], axis=0))
    return np.concatenate(largest)
