"""What model.attend takes: images and captions in blocks, the captions of equal length, or padded and masked.

Sizes in the docstrings: I images of R regions, C captions of W words, D embed_size, P pairs; N contexts of L elements,
M queries of K elements.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lib.tensors import norm, to_device

BLOCK_WORDS = 512  # words of equally long captions that are scored at once
BLOCK_ELEMENTS = 2**22  # of S at once on CPUs: larger temporaries are fresh memory each time
VECTOR = 16  # captions in a block are a multiple of this, where there are enough: others do not vectorise
PADDED_LENGTHS = 3  # that captions are padded to: each more launches 30 to 90 kernels a step, each less pads more


class Block(NamedTuple):
    """The tensors that model.attend takes."""

    S: Tensor  # (N, L, K, M)
    gram: Tensor  # (N, L, L)
    query_norms: Tensor  # (K, M), or (N, K, M)
    query_mask: Tensor | None = None  # (N or 1, K, M) bool
    context_mask: Tensor | None = None  # (N, L) bool


class Words(NamedTuple):
    """Captions of a block: words (c, W, D) and mask (c, W) bool, False behind a caption's end; None without padding."""

    words: Tensor
    mask: Tensor | None = None


def blocks(
    images: Tensor, captions: Tensor, lens: Sequence[int] | Tensor, t2i: bool, pairs: Tensor | None, padded: bool
) -> tuple[Iterator[Block], Tensor]:
    """Blocks that hold all pairs of images (I, R, D) and captions (C, W, D), or the pairs (P, 2) only.

    lens: C ints. pairs: an image's and a caption's index in each row. padded: few blocks, with masks, so that a GPU
    launches few kernels and the host does not wait; else many, without padding. Returns the blocks, and where each
    caption, or pair, is among the captions of the blocks, one after the other: (C,) or (P,), on the images' device.
    """
    lens = torch.as_tensor(lens, dtype=torch.int64).cpu()
    if pairs is None:
        if padded:
            groups, places = padded_groups(captions, lens)
        else:
            fit = min(BLOCK_WORDS, BLOCK_ELEMENTS // (images.shape[0] * images.shape[1]))
            groups, places = equal_length_groups(captions, lens, block_words=fit)
        return all_pairs(images, groups, t2i), places
    rows, columns = to_device(pairs, images.device).unbind(1)
    if padded:
        mask = torch.arange(captions.shape[1], device=images.device) < to_device(lens, images.device)[columns, None]
        groups, places = [Words(captions.index_select(0, columns), mask)], torch.arange(len(rows), device=images.device)
    else:
        groups, places = equal_length_groups(captions, lens, columns.cpu())
        rows = rows[places.argsort()]
    regions = images.index_select(0, rows).split([len(group.words) for group in groups])
    return each_pair(regions, groups, t2i), places


def all_pairs(images: Tensor, groups: Sequence[Words], t2i: bool) -> Iterator[Block]:
    """A Block of all pairs for each group of captions. Queries come last: reductions over outer axes vectorise."""
    if t2i:
        gram = images @ images.mT
        for words, mask in groups:
            queries = words.transpose(0, 1).contiguous()
            yield Block(products(images, queries), gram, norm(queries, 2), None if mask is None else mask.T[None])
    else:
        queries = images.transpose(0, 1).contiguous()
        query_norms = norm(queries, 2)
        for words, mask in groups:
            yield Block(products(words, queries), words @ words.mT, query_norms, None, mask)


def products(contexts: Tensor, queries: Tensor) -> Tensor:
    """contexts (N, L, D), queries (K, M, D) → S (N, L, K, M)."""
    S = contexts.flatten(0, 1) @ queries.flatten(0, 1).T
    return S.view(*contexts.shape[:2], *queries.shape[:2])


def each_pair(regions: Sequence[Tensor], groups: Sequence[Words], t2i: bool) -> Iterator[Block]:
    """A Block of n contexts with a query each for each group of n captions and the regions (n, R, D) of its images."""
    for images, (words, mask) in zip(regions, groups, strict=True):
        contexts, queries = (images, words) if t2i else (words, images)
        masks = (None if mask is None else mask[..., None], None) if t2i else (None, mask)
        S = (contexts @ queries.mT)[..., None]
        yield Block(S, contexts @ contexts.mT, norm(queries, 2)[..., None], *masks)


# ---------------------------------------------------------------- groups of captions


def equal_length_groups(
    captions: Tensor, lens: Tensor, chosen: Tensor | None = None, block_words: int = BLOCK_WORDS
) -> tuple[list[Words], Tensor]:
    """Groups of equally long captions (C, W, D), so that none holds padding, the shortest first.

    lens (C,). chosen (P,): indices of captions, repeats allowed; all where None. block_words: of a group at most.
    Returns the groups, and where each of the chosen captions is among theirs.
    """
    chosen = torch.arange(len(lens)) if chosen is None else chosen
    order = lens[chosen].argsort(stable=True)
    lens, starts = lens[chosen][order], chosen[order] * captions.shape[1]
    ends = lens.cumsum(0)
    rows = (starts - ends + lens).repeat_interleave(lens) + torch.arange(int(ends[-1]))
    words = captions.flatten(0, 1).index_select(0, to_device(rows, captions.device))  # at once: so is its gradient
    shapes = []
    for length, count in zip(*(x.tolist() for x in lens.unique_consecutive(return_counts=True)), strict=True):
        most = max(1, block_words // length)
        most = most // VECTOR * VECTOR or most
        shapes += [(min(most, count - done), length) for done in range(0, count, most)]
    parts = words.split([count * length for count, length in shapes])
    groups = [Words(part.view(*shape, -1)) for part, shape in zip(parts, shapes, strict=True)]
    return groups, order.argsort().to(captions.device)


def padded_groups(captions: Tensor, lens: Tensor) -> tuple[list[Words], Tensor]:
    """Groups of captions (C, W, D) of similar length, padded to the longest. Returns as equal_length_groups."""
    order = lens.argsort(stable=True)
    chosen, lens_there, places = to_device(torch.cat([order, lens[order], order.argsort()]), captions.device).chunk(3)
    groups, start = [], 0
    for part in lens[order].chunk(PADDED_LENGTHS):
        stop, longest = start + len(part), int(part[-1])
        mask = torch.arange(longest, device=captions.device) < lens_there[start:stop, None]
        groups.append(Words(captions[:, :longest].index_select(0, chosen[start:stop]), mask))
        start = stop
    return groups, places
