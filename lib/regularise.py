"""What training leaves out of a batch: some of its regions and words (--region_dropout, --word_dropout)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.constants import SPECIAL
from lib.options import option
from lib.tensors import to_device

KEPT = [SPECIAL.index(word) for word in ("<pad>", "<start>", "<end>")]  # never dropped


def regularise(batch: Sequence, opt: Any, epoch: int, unknown: int) -> Sequence:
    """A batch as collate_fn gives it, with a part of each image's regions left out and of its words unknown.

    Of R regions R - round(region_dropout · R) stay, other ones for each pair, the same for features and grids; with
    need_box_whole the last one always stays. A word becomes the word of id `unknown` with the probability word_dropout,
    but <start> and <end>. Drawn for each pair from opt.seed, the epoch and the pair's number, so that a resumed run and
    several processes draw the same.
    """
    regions_dropped, words_dropped = option(opt, "region_dropout"), option(opt, "word_dropout")
    if not (regions_dropped or words_dropped):
        return batch
    images, *more, boxes, captions, lengths, ids = batch
    n_regions = images.shape[1]
    numbers = torch.stack([draw(opt, epoch, pair, n_regions + captions.shape[1]) for pair in ids])
    if n_dropped := round(regions_dropped * n_regions):
        numbers[:, n_regions - 1] += option(opt, "need_box_whole")  # so it is among the largest
        kept = numbers[:, :n_regions].topk(n_regions - n_dropped, 1).indices.sort(1).values
        images, boxes = pick(images, kept), pick(boxes, kept[:, : boxes.shape[1] - n_dropped])
    dropped = to_device(numbers[:, n_regions:] < words_dropped, captions.device)
    dropped &= ~torch.isin(captions, torch.tensor(KEPT, device=captions.device))
    return images, *more, boxes, captions.masked_fill(dropped, unknown), lengths, ids


def draw(opt: Any, epoch: int, pair: int, n: int) -> Tensor:
    """n random numbers from 0 to 1 of a pair in an epoch."""
    return torch.from_numpy(np.random.default_rng([option(opt, "seed"), epoch, pair]).random(n, np.float32))


def pick(x: Tensor, kept: Tensor) -> Tensor:
    """Regions kept (B, K) of x (B, R, …): (B, K, …)."""
    index = to_device(kept, x.device)[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, index)
