"""Encode a split with whole-image features, score all pairs, rank, recall@K.

python Tencent_PFAN/evaluation_whole.py --model_path runs/tencent_data/t2i/model_best.pth.tar [MORE …] --split test
"""

if not __package__:
    import _root  # noqa: F401

from functools import partial

import numpy as np
import torch

import evaluation as root
from data import pad
from evaluation import (  # noqa: F401 (SCAN's names)
    SHARD_SIZE,
    AverageMeter,
    LogCollector,
    cut_folds,
    embed_captions,
    embed_images,
)
from lib.errors import InputError, run
from Tencent_PFAN.data_whole import get_test_loader
from Tencent_PFAN.model_whole import SCAN, region_score, whole_score
from Tencent_PFAN.vocab import read_vocab


@torch.no_grad()
def encode_data(model, data_loader, log_step=10, logging=print, packed=False):
    """Embed every image and every caption of a loader's data set once.

    Returns img_embs (n, R, D), whole_img_embs (n, D), cap_embs (n, W, D) padded with 0, cap_lens (list of n int),
    final_cap_embs (n, D), float32 tensors on the CPU; with packed, cap_embs is (ΣW_i, D), the captions' words one
    after the other. log_step and logging are SCAN's; a progress bar shows instead.
    """
    model.val_start()
    words, cap_lens, final_cap_embs = embed_captions(model, data_loader, n_more=1)
    img_embs, whole_img_embs = embed_images(model, data_loader, n_more=1)
    return img_embs, whole_img_embs, words if packed else pad(words.split(cap_lens)), cap_lens, final_cap_embs


@torch.no_grad()
def shard_xattn(images, whole_images, captions, caplens, final_captions, opt, shard_size=128, cross_attn=None):
    """Scores (n_images, n_captions) float32 numpy, a shard at a time.

    images (n_images, R, D), whole_images (n_images, D), captions (n_captions, W, D) padded or (ΣW_i, D) packed,
    caplens (n_captions), final_captions (n_captions, D); numpy or tensors. For the rest see the root's shard_xattn.
    """
    cross_attn = cross_attn or opt.cross_attn
    t2i = cross_attn == "t2i"
    images, whole_images, final_captions = (
        torch.as_tensor(x, dtype=torch.float32) for x in (images, whole_images, final_captions)
    )
    sims = root.shard_xattn(
        images, captions, caplens, opt, shard_size, cross_attn, lambda *args: region_score(*args, t2i=t2i)
    )
    for at in range(0, len(images), shard_size):
        part = slice(at, at + shard_size)
        sims[part] += whole_score(images[part], whole_images[part], final_captions, opt, t2i).numpy()
    return sims


def shard_xattn_t2i(images, whole_images, captions, caplens, final_captions, opt, shard_size=128):
    """shard_xattn where words attend to regions."""
    return shard_xattn(images, whole_images, captions, caplens, final_captions, opt, shard_size, "t2i")


def shard_xattn_i2t(images, whole_images, captions, caplens, final_captions, opt, shard_size=128):
    """shard_xattn where regions attend to words."""
    return shard_xattn(images, whole_images, captions, caplens, final_captions, opt, shard_size, "i2t")


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


load_split = partial(root.load_split, make_model=SCAN, read_vocab=read_vocab, get_test_loader=get_test_loader)
score_split = partial(root.score_split, load_split=load_split, encode_data=encode_data, shard_xattn=shard_xattn)


def evalrank(model_path, data_path=None, split="dev", fold5=False, vocab_path=None, save_ranks=None, **overrides):
    """Rank a split both ways and print SCAN's lines; see the root's evalrank for arguments and result."""
    return root.evalrank(model_path, data_path, split, fold5, vocab_path, save_ranks, score_split, **overrides)


def main():
    parser = root.get_parser()
    parser.description = "Rank a split of whole-image data with one checkpoint, or the mean similarities of several."
    parser.epilog = (
        "example: python Tencent_PFAN/evaluation_whole.py --model_path runs/tencent_data/t2i/model_best.pth.tar "
        "--data_path ./data --split test"
    )
    root.main(parser, evalrank)


if __name__ == "__main__":
    run(main)
