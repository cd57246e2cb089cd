"""Random inputs of scripts/bench/measurements.py, the same in every run. s: the sizes of scripts/benchmark.py."""

import os

import numpy as np
import torch
from torch.nn.functional import normalize

from data import pad
from lib.constants import N_REGIONS, SPECIAL
from lib.files import write_lines
from position import position_grid
from train import get_parser
from vocab import Vocabulary


def flags(s, way="t2i", **changes):
    """The flags of the published Flickr30K run, as train.py parses them, at the sizes s."""
    words = f"--max_violation --bi_gru --agg_func Mean --cross_attn {way} --lambda_softmax {9 if way == 't2i' else 4}"
    opt = get_parser().parse_args([*words.split(), "--device", s.device])
    sizes = {name: getattr(s, name) for name in ("embed_size", "img_dim", "word_dim", "vocab_size", "batch_size")}
    vars(opt).update(sizes, **changes)
    return opt


def caption_lengths(rng, n):
    """Words of n captions with <start> and <end>, spread like 500 Flickr30K captions: mean 15.3, from 6 to 43."""
    return np.exp(rng.normal(2.68, 0.31, n)).round().clip(6, 43).astype(int).tolist()


def embeddings(s, n_images):
    """Random images (n, R, D), words (ΣW, D), lengths."""
    torch.manual_seed(0)
    lens = caption_lengths(np.random.default_rng(0), n_images * s.per_image)
    images, words = torch.randn(n_images, N_REGIONS, s.embed_size), torch.randn(sum(lens), s.embed_size)
    return normalize(images, dim=2, out=images), normalize(words, dim=1, out=words), lens


def random_boxes(n):
    """Boxes (n, R, 4) in pixels, heights and widths (n, 2)."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(300, 500, (n, 2)).astype(float)
    corners = np.sort(rng.random((n, N_REGIONS, 2, 2)), axis=2) * sizes[:, None, None, ::-1]
    return corners.reshape(n, N_REGIONS, 4), sizes


def random_batch(s, n):
    """A batch as collate_fn gives it."""
    torch.manual_seed(0)
    lens = sorted(caption_lengths(np.random.default_rng(0), n), reverse=True)
    captions = [torch.randint(s.vocab_size, (length,)) for length in lens]
    return torch.rand(n, N_REGIONS, s.img_dim), torch.from_numpy(position_grid(*random_boxes(n))), pad(captions), lens


def make_split(s, folder, split):
    """Write a split of a data set of s.images images to folder; returns its vocabulary, of s.vocab_size words."""
    rng, prefix = np.random.default_rng(0), os.path.join(folder, split)
    np.save(prefix + "_ims.npy", rng.random((s.images, N_REGIONS, s.img_dim), np.float32))
    np.save(prefix + "_boxes.npy", position_grid(*random_boxes(s.images)))
    vocab = [f"w{i}" for i in range(s.vocab_size - len(SPECIAL))]
    lens = caption_lengths(rng, s.images * s.per_image)
    write_lines(prefix + "_caps.txt", (" ".join(rng.choice(vocab, length - 2)) for length in lens))
    return Vocabulary.from_words([*SPECIAL, *vocab])
