"""Encode a split with whole-image features, score all pairs, rank, recall@K.

python Tencent_PFAN/evaluation_whole.py --model_path runs/tencent_data/t2i/model_best.pth.tar [MORE …] --split test
"""

if not __package__:
    import _root  # noqa: F401

from functools import partial

import numpy as np
import torch

import evaluation as root
from evaluation import AverageMeter, LogCollector, encode_data, softmax  # noqa: F401 (SCAN's names)
from lib.distributed import pick_device
from lib.errors import InputError, run
from lib.options import option
from Tencent_PFAN.model_whole import SCAN, score


def shard_xattn(images, whole_images, captions, caplens, final_captions, opt, shard_size=128, cross_attn=None):
    """Scores (n_images, n_captions) float32 numpy, a shard at a time.

    images (n_images, R, D), whole_images (n_images, D), captions (n_captions, W, D), caplens (n_captions),
    final_captions (n_captions, D); numpy or tensors. For the rest see the root's shard_xattn.
    """
    embeddings = images, whole_images, captions, final_captions
    images, whole_images, captions, finals = (torch.as_tensor(x, dtype=torch.float32) for x in embeddings)

    def score_shard(*shard):
        return score(*shard, opt, cross_attn)

    device = pick_device(option(opt, "device"))
    return root.score_shards((images, whole_images), (captions, caplens, finals), score_shard, device, shard_size)


shard_xattn_t2i = partial(shard_xattn, cross_attn="t2i")  # words attend to regions
shard_xattn_i2t = partial(shard_xattn, cross_attn="i2t")  # regions attend to words


def square(sims):
    """sims, where caption i can belong to image i."""
    sims = np.asarray(sims)
    if sims.ndim != 2 or sims.shape[0] != sims.shape[1]:
        raise InputError(f"similarities {sims.shape}: expected as many captions as images")
    return sims


def i2t(images, captions, sims, npts=None, return_ranks=False):
    """Images find their caption, caption i being image i's: sims (n, n); see the root's i2t."""
    return root.i2t(images, captions, None, square(sims), npts, return_ranks)


def t2i(images, captions, sims, npts=None, return_ranks=False):
    """Captions find their image, caption i being image i's: sims (n, n); see the root's t2i."""
    return root.t2i(images, captions, None, square(sims), npts, return_ranks)


def evalrank(model_path, data_path=None, split="dev", fold5=False, vocab_path=None, make_model=SCAN, **options):
    """Rank a split both ways and print SCAN's lines; see the root's evalrank for arguments and result."""
    return root.evalrank(model_path, data_path, split, fold5, vocab_path, make_model, **options)


main = partial(root.main, SCAN)

if __name__ == "__main__":
    run(main)
