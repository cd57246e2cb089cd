"""A collection's files: what they are made from, and how they are opened.

images.npy (n, R, D) and words.npy (ΣW, D), float16, memory-mapped by the search; lens.npy (captions,)
anchors.faiss   a faiss index of K directions, the k-means centroids of the queries' elements: words (t2i) or
                regions (i2t, and t2i without captions)
nearest.npy     uint16: the nearest centroid of each query element, words (ΣW,) or regions (nR,)
table.npy       float16: the largest dot product of a centroid with each image's regions (K, n), in i2t with each
                caption's words (K, captions)
collection.json what it was made from; written last
"""

import hashlib
import json
import os

import faiss
import numpy as np

from lib.datasets import json_files
from lib.errors import InputError
from lib.files import digest_lines, open_npy, replace
from scripts.search.collection import Collection
from scripts.search.first_stage import FirstStage

N_CENTROIDS = 4096
ADDED = ("vocabulary", "grids")  # to the notes of what a collection was made from
FILES = {
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


def collection_folder(model_path, data_name, split):
    """Where the collection of a checkpoint and a split lies by default."""
    return f"{model_path.removesuffix('.pth.tar')}_{data_name}_{split}_collection"


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


def other_input(before, made_from):
    """The name of an input from which a collection with the note before was not made; None where there is none.

    Notes of older collections have no vocabulary and no grids.
    """
    if set(before) - set(made_from):
        return "things"
    known = [name for name in made_from if name in before or name not in ADDED]
    return next((name for name in known if before.get(name) != made_from[name]), None)


# ---------------------------------------------------------------- notes


def is_note(note):
    """Whether note is of the form of a collection's collection.json or progress.json."""
    if not isinstance(note, dict) or not isinstance(note.get("done", {}), dict):
        return False
    steps = [step for step in note.get("done", {}).values() if step != "all"]
    return all(type(n) is int and n >= 1 for n in (*steps, note.get("anchors", N_CENTROIDS)))


def read_json(path, fits=is_note, expected="the notes of a collection; --overwrite makes it anew"):
    """The JSON in a file, None where there is none. Raises InputError where fits(it) is False."""
    return json_files.read_json(path, fits, expected) if os.path.isfile(path) else None


def write_json(path, value):
    replace(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


# ---------------------------------------------------------------- arrays


def read_centroids(path):
    """The faiss index of the centroids. Raises InputError where the file is missing or is none."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file, make the collection anew with --overwrite")
    try:
        return faiss.read_index(path)
    except RuntimeError as error:
        raise InputError(f"{path}: not a faiss index ({str(error).splitlines()[0][:80]})") from None


def roles(cross_attn, images, words, lens):
    """What attends and what is attended to, each as elements (ΣE, D) and where each item's begin (items + 1,).

    images (n, R, D), words (ΣW, D), lens (captions,). Returns (captions, images) in t2i, (images, captions) in i2t.
    """
    pictures = images.reshape(-1, images.shape[2]), np.arange(len(images) + 1) * images.shape[1]
    captions = words, np.concatenate([[0], lens.cumsum(dtype=np.int64)])
    return (captions, pictures) if cross_attn == "t2i" else (pictures, captions)


def open_collection(folder, model, vocab):
    """The Collection in folder, its arrays memory-mapped. Raises InputError where files are missing or do not fit."""
    names = ("images", "words", "lens", "table", "nearest")
    images, words, lens, table, nearest = (open_npy(os.path.join(folder, f"{name}.npy")) for name in names)
    centroids = read_centroids(os.path.join(folder, "anchors.faiss"))
    mismatch = InputError(f"{folder}: its files do not fit together, make it anew with --overwrite")
    fit = (images.ndim, words.ndim, lens.ndim) == (3, 2, 1) and {lens.dtype.kind, nearest.dtype.kind} <= {*"iu"}
    fit = fit and images.size and (lens > 0).all() and lens.sum() == len(words)
    if not fit or {images.shape[2], words.shape[1], centroids.d} != {model.opt.embed_size}:
        raise mismatch
    (queries, starts), (_, context_starts) = roles(model.opt.cross_attn, images, words, lens)
    if len(nearest) and nearest.max() >= centroids.ntotal:
        raise mismatch
    if table.shape != (centroids.ntotal, len(context_starts) - 1) or nearest.shape != queries.shape[:1]:
        raise mismatch
    first_stage = FirstStage(model.opt.cross_attn == "t2i", centroids, nearest, starts, table)
    return Collection(model, vocab, images, words, lens, first_stage)
