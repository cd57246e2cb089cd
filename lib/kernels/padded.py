"""Stacked cross attention on GPUs: captions padded to a few lengths, so that few kernels are launched and none waits.

Equal-length blocks launch kernels for every length that occurs, and what they are is known on the host only. Sizes in
the docstrings as in blocks.py; attention is a model.Attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.kernels.blocks import Padding, attend, dot_products
from lib.tensors import norm, pad_rows, send

LENGTHS = 3  # that captions are padded to: each more costs 30 to 90 launches a step, each less more padding
NORMS = {"softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "no_norm"}
AGGREGATIONS = {"LogSumExp", "Mean", "Max", "Sum"}


def applies(attention: Any) -> bool:
    """True for the normalisations and aggregations whose results padding and masks leave as they are."""
    return attention.opt.raw_feature_norm in NORMS and attention.opt.agg_func in AGGREGATIONS


def score_all(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, attention: Any) -> Tensor:
    """Scores (I, C) of all images (I, R, D) with all captions, padded (C, W, D) or packed (ΣW_i, D)."""
    lens = torch.as_tensor(cap_lens).cpu()
    words = pad_rows(captions, lens) if captions.dim() == 2 else captions
    order = lens.argsort(stable=True)
    sent = send(torch.cat([order, lens[order], order.argsort()]), images.device)
    all_order, all_lens, inverse = sent.split(len(lens))
    if attention.t2i:
        gram = images @ images.mT
    else:
        regions = images.transpose(0, 1).contiguous()
        region_norms = norm(regions, 2)
    scores, start = [], 0
    for longest, count in ((int(part[-1]), len(part)) for part in lens[order].chunk(LENGTHS)):
        block = words[:, :longest].index_select(0, all_order[start : start + count])
        block_lens = all_lens[start : start + count]
        there = torch.arange(longest, device=images.device) < block_lens[:, None]  # (count, longest)
        if attention.t2i:
            query = block.transpose(0, 1).contiguous()
            padding = Padding(queries=there.T[None], counts=block_lens)
            scores.append(attend(dot_products(images, query), gram, norm(query, 2), attention, padding))
        else:
            S, padding = dot_products(block, regions), Padding(contexts=there)
            scores.append(attend(S, block @ block.mT, region_norms, attention, padding).T)
        start += count
    return torch.cat(scores, 1).index_select(1, inverse)


def score_pairs(
    images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, pairs: Tensor, attention: Any
) -> Tensor:
    """Scores (P,) of the pairs (P, 2) only, an image's and a caption's index in each row, on the GPU or not."""
    lens = torch.as_tensor(cap_lens).cpu()
    words = pad_rows(captions, lens) if captions.dim() == 2 else captions
    image, caption = send(pairs, images.device).unbind(1)
    regions, words = images.index_select(0, image), words.index_select(0, caption)
    counts = send(lens, images.device).index_select(0, caption)
    there = torch.arange(words.shape[1], device=images.device) < counts[:, None]  # (P, W)
    context, query = (regions, words) if attention.t2i else (words, regions)
    if attention.t2i:
        padding = Padding(queries=there[..., None], counts=counts[:, None])
    else:
        padding = Padding(contexts=there)
    S = (context @ query.mT)[..., None]
    return attend(S, context @ context.mT, norm(query, 2)[..., None], attention, padding)[:, 0]
