"""A small random data folder with its vocabulary, in the published layout; models of it; random batches and boxes."""

import os

import numpy as np
import torch
from conftest import make_opt

import model
from lib.checkpoint import save_checkpoint
from position import position_grid
from vocab import build_vocab, deserialize_vocab, serialize_vocab

WORDS = "a man woman dog child runs sits jumps holds red blue ball grass water street near with in the two".split()


def random_boxes(rng, n, n_regions=36, width=31):
    """Position grids (n, n_regions, width): 15 different cells, 15 descending weights of sum 1, the area share."""
    cells = rng.random((n, n_regions, 256)).argsort(-1)[..., :15]
    weights = np.sort(rng.random((n, n_regions, 15)) + 0.1, axis=-1)[..., ::-1]
    weights = weights / weights.sum(-1, keepdims=True)
    share = rng.random((n, n_regions, 1))
    return np.concatenate([cells, weights, share], axis=-1)[..., :width].astype(np.float32)


def boxes_with_features(n, n_regions=36, img_dim=256, seed=0):
    """Position grids (n, n_regions, 31), and features (n, n_regions, img_dim) float32.

    An image's cells have random features; a region's are the mean of its cells', and noise: regions that overlap look
    alike, as those of photographs do.
    """
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 320, (n, n_regions, 2, 2)), axis=2).reshape(n, n_regions, 4)
    grids = position_grid(corners, np.full((n, 2), 320))
    area = np.zeros((n, n_regions, 257), np.float32)
    np.put_along_axis(area, grids[..., :15].astype(int), grids[..., 15:30], 2)
    features = area[..., :256] @ rng.standard_normal((n, 256, img_dim))
    return grids, (features + 0.1 * rng.standard_normal(features.shape)).astype(np.float32)


def random_captions(rng, n):
    return [" ".join(rng.choice(WORDS, rng.integers(4, 12))) + " ." for _ in range(n)]


def make_folder(
    root,
    data_name="toy_precomp",
    splits=None,
    captions_per_image=5,
    n_regions=36,
    img_dim=16,
    box_width=31,
    seed=0,
):
    """Write root/data/data_name (ims, boxes, caps, ids of each split) and root/vocab/data_name_vocab.json.

    splits: name → number of images, {"train": 12, "dev": 6, "test": 6} where None. The vocabulary holds every word
    of the train and dev captions (of all splits, where one of these is missing). Returns (data_path, vocab_path), str.
    """
    splits = {"train": 12, "dev": 6, "test": 6} if splits is None else splits
    rng = np.random.default_rng(seed)
    data_path, vocab_path = os.path.join(root, "data"), os.path.join(root, "vocab")
    folder = os.path.join(data_path, data_name)
    os.makedirs(folder, exist_ok=True)
    os.makedirs(vocab_path, exist_ok=True)
    for split, n in splits.items():
        prefix = os.path.join(folder, split)
        np.save(prefix + "_ims.npy", rng.standard_normal((n, n_regions, img_dim)).astype(np.float32))
        np.save(prefix + "_boxes.npy", random_boxes(rng, n, n_regions, box_width))
        write_lines(prefix + "_caps.txt", random_captions(rng, n * captions_per_image))
        write_lines(prefix + "_ids.txt", range(n))
    files = None if {"train", "dev"} <= set(splits) else [f"{split}_caps.txt" for split in splits]
    vocab = build_vocab(data_path, data_name, caption_file=files, threshold=1)
    serialize_vocab(vocab, os.path.join(vocab_path, f"{data_name}_vocab.json"))
    return data_path, vocab_path


def make_whole_folder(root, n_regions=4, box_width=31, sizes=(12, 6, 6)):
    """A folder `toy` in Tencent-News's layout: one caption an image, whole-image features, names with _sent."""
    splits = dict(zip(("train", "dev", "test"), sizes, strict=True))
    shape = {"captions_per_image": 1, "n_regions": n_regions, "img_dim": 8, "box_width": box_width}
    data_path, vocab_path = make_folder(str(root), "toy", splits, **shape)
    rng = np.random.default_rng(1)
    for split, n in splits.items():
        prefix = os.path.join(data_path, "toy", split)
        os.rename(prefix + "_caps.txt", prefix + "_sent_caps.txt")
        np.save(prefix + "_who_ims.npy", rng.standard_normal((n, 8)).astype(np.float32))
    os.rename(os.path.join(vocab_path, "toy_vocab.json"), os.path.join(vocab_path, "toy_sent_vocab.json"))
    return data_path, vocab_path


def save_model(path, data_path, vocab_path, seed=0, data_name="toy_precomp", make_model=model.SCAN, **flags):
    """Write a checkpoint of an untrained model for a folder of make_folder; returns the model."""
    vocab = deserialize_vocab(os.path.join(vocab_path, data_name + make_model.vocabulary.suffix))
    sizes = {"img_dim": 16, "embed_size": 16, "word_dim": 8, "batch_size": 4, "vocab_size": len(vocab)}
    where = {"data_path": data_path, "vocab_path": vocab_path, "data_name": data_name}
    opt = make_opt(**{**sizes, **where, **flags})
    torch.manual_seed(seed)
    untrained = make_model(opt)
    state = {"epoch": 1, "model": untrained.state_dict(), "best_rsum": 0.0, "opt": opt, "Eiters": 0}
    save_checkpoint(state, False, os.path.basename(path), os.path.dirname(path))
    return untrained


def random_batch(lens=(6, 4, 1), n_regions=4, img_dim=64, box_width=31, whole=False, n_boxes=None, seed=0):
    """images, (whole images,) boxes, captions, lengths, a pair for each of lens, the longest first.

    The last region of an image has no box, the first one has 9 cells.
    """
    rng, n = np.random.default_rng(seed), len(lens)
    boxes = random_boxes(rng, n, n_boxes or n_regions, box_width)
    boxes[:, -1, :15], boxes[:, -1, 15:30] = 256, 0
    boxes[:, 0, 9:15], boxes[:, 0, 24:30] = 256, 0
    captions = rng.integers(1, 50, (n, max(lens))) * (np.arange(max(lens)) < np.array(lens)[:, None])
    images = [rng.standard_normal((n, *shape), np.float32) for shape in ((n_regions, img_dim), (img_dim,))]
    return *map(torch.tensor, (*images[: 1 + whole], boxes, captions)), list(lens)


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(f"{line}\n" for line in lines)
