"""Random inputs of scripts/measurements.py, the same in every run. s: the sizes at the top of scripts/benchmark.py."""

import os

import numpy as np

REGIONS, CELL_SLOTS = 36, 15


def flags(s, cross_attn="t2i", **changes):
    """The flags of the published Flickr30K run, as train.py parses them, at the sizes s."""
    from train import get_parser

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
    import torch

    torch.manual_seed(0)
    rng, size = np.random.default_rng(0), s.embed_size
    lens = caption_lengths(rng, n_images * s.per_image)
    concepts = unit(torch.randn(n_images, size))
    images, words = torch.empty(n_images, REGIONS, size), torch.empty(sum(lens), size)
    at = 0
    for i in range(n_images):
        own = concepts[torch.randint(n_images, (REGIONS,))]
        images[i] = unit(own + unit(torch.randn(REGIONS, size)))
        n_words = sum(lens[i * s.per_image : (i + 1) * s.per_image])
        noise = unit(torch.randn(n_words, size))
        words[at : at + n_words] = unit(s.signal * images[i][torch.randint(REGIONS, (n_words,))] + noise)
        at += n_words
    return images, words, lens


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def random_boxes(rng, n):
    """Boxes (n, R, 4) in pixels, heights and widths (n, 2)."""
    sizes = rng.integers(300, 500, (n, 2)).astype(float)
    corners = np.sort(rng.random((n, REGIONS, 2, 2)), axis=2) * sizes[:, None, None, ::-1]
    return corners.reshape(n, REGIONS, 4), sizes


def random_batch(s, n):
    """A batch as collate_fn gives it."""
    import torch

    from data import pad
    from position import position_grid

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    lens = sorted(caption_lengths(rng, n), reverse=True)
    grids = torch.from_numpy(position_grid(*random_boxes(rng, n)))
    captions = [torch.randint(s.vocab_size, (length,)) for length in lens]
    return torch.rand(n, REGIONS, s.img_dim), grids, pad(captions), lens


def make_split(s, folder, split, n_images, sparse=False):
    from numpy.lib.format import open_memmap

    os.makedirs(folder, exist_ok=True)
    rng, prefix = np.random.default_rng(0), os.path.join(folder, split)
    images = open_memmap(prefix + "_ims.npy", "w+", np.float32, (n_images, REGIONS, s.img_dim))
    boxes = open_memmap(prefix + "_boxes.npy", "w+", np.float32, (n_images, REGIONS, 2 * CELL_SLOTS))
    for start in range(0, 0 if sparse else n_images, 64):
        part = slice(start, start + 64)
        images[part] = rng.random(images[part].shape, dtype=np.float32)
        boxes[part, :, :CELL_SLOTS] = rng.integers(0, 256, boxes[part, :, :CELL_SLOTS].shape)
        boxes[part, :, CELL_SLOTS:] = 1 / CELL_SLOTS
    with open(prefix + "_caps.txt", "w") as file:
        for length in caption_lengths(rng, n_images * s.per_image):
            file.write(" ".join(f"w{i}" for i in rng.integers(s.vocab_size - 4, size=length - 2)) + "\n")


def make_vocab(s):
    from vocab import SPECIAL, Vocabulary

    vocab = Vocabulary()
    for word in (*SPECIAL, *(f"w{i}" for i in range(s.vocab_size - len(SPECIAL)))):
        vocab.add_word(word)
    return vocab
