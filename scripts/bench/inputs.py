"""Random inputs of scripts/bench/measurements.py, the same in every run. s: the sizes of scripts/benchmark.py."""

import os

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch.nn.functional import normalize

from data import pad
from lib.constants import N_CELLS, N_REGIONS, N_SLOTS
from lib.files import write_lines
from position import position_grid
from train import get_parser
from vocab import SPECIAL, Vocabulary


def flags(s, cross_attn="t2i", **changes):
    """The flags of the published Flickr30K run, as train.py parses them, at the sizes s."""
    smooth = {"t2i": "9", "i2t": "4"}[cross_attn]
    words = f"--max_violation --bi_gru --agg_func Mean --cross_attn {cross_attn} --lambda_softmax {smooth}".split()
    opt = get_parser().parse_args([*words, "--device", s.device])
    sizes = {name: getattr(s, name) for name in ("embed_size", "img_dim", "word_dim", "vocab_size", "batch_size")}
    vars(opt).update(sizes, **changes)
    return opt


def caption_lengths(rng, n):
    """Words of n captions with <start> and <end>, spread like 500 Flickr30K captions: mean 15.3, from 6 to 43."""
    return np.exp(rng.normal(2.68, 0.31, n)).round().clip(6, 43).astype(int).tolist()


def embeddings(s, n_images):
    """Images (n, R, D), packed words (ΣW, D), lengths: each word a noisy copy of a region of its caption's image.

    Regions are noisy copies of one of n concepts, so that images are alike and recall is neither 0 nor 100.
    """
    torch.manual_seed(0)
    size = s.embed_size
    lens = caption_lengths(np.random.default_rng(0), n_images * s.per_image)
    concepts = normalize(torch.randn(n_images, size), dim=-1)
    images, words, ends = torch.empty(n_images, N_REGIONS, size), torch.empty(sum(lens), size), np.cumsum([0, *lens])
    for i in range(n_images):
        regions = concepts[torch.randint(n_images, (N_REGIONS,))]
        images[i] = normalize(regions + normalize(torch.randn(N_REGIONS, size), dim=-1), dim=-1)
        block = words[ends[i * s.per_image] : ends[(i + 1) * s.per_image]]
        noise = normalize(torch.randn(block.shape), dim=-1)
        block[:] = normalize(s.signal * images[i][torch.randint(N_REGIONS, (len(block),))] + noise, dim=-1)
    return images, words, lens


def random_boxes(rng, n):
    """Boxes (n, R, 4) in pixels, heights and widths (n, 2)."""
    sizes = rng.integers(300, 500, (n, 2)).astype(float)
    corners = np.sort(rng.random((n, N_REGIONS, 2, 2)), axis=2) * sizes[:, None, None, ::-1]
    return corners.reshape(n, N_REGIONS, 4), sizes


def random_batch(s, n):
    """A batch as collate_fn gives it."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    lens = sorted(caption_lengths(rng, n), reverse=True)
    grids = torch.from_numpy(position_grid(*random_boxes(rng, n)))
    captions = [torch.randint(s.vocab_size, (length,)) for length in lens]
    return torch.rand(n, N_REGIONS, s.img_dim), grids, pad(captions), lens


def make_split(s, folder, split, n_images, sparse=False):
    """Write a split of a data set; sparse: all features and grids are 0, in files that take no space."""
    os.makedirs(folder, exist_ok=True)
    rng, prefix = np.random.default_rng(0), os.path.join(folder, split)
    images = open_memmap(prefix + "_ims.npy", "w+", np.float32, (n_images, N_REGIONS, s.img_dim))
    boxes = open_memmap(prefix + "_boxes.npy", "w+", np.float32, (n_images, N_REGIONS, 2 * N_SLOTS))
    for start in range(0, 0 if sparse else n_images, 64):
        block = slice(start, start + 64)
        images[block] = rng.random(images[block].shape, dtype=np.float32)
        boxes[block, :, :N_SLOTS] = rng.integers(0, N_CELLS, boxes[block, :, :N_SLOTS].shape)
        boxes[block, :, N_SLOTS:] = 1 / N_SLOTS
    lens = caption_lengths(rng, n_images * s.per_image)
    words = (rng.integers(s.vocab_size - len(SPECIAL), size=length - 2) for length in lens)
    write_lines(prefix + "_caps.txt", (" ".join(f"w{i}" for i in caption) for caption in words))


def make_vocab(s):
    """A vocabulary of s.vocab_size words, the special ones first."""
    vocab = Vocabulary()
    for word in (*SPECIAL, *(f"w{i}" for i in range(s.vocab_size - len(SPECIAL)))):
        vocab.add_word(word)
    return vocab
