"""Stacked cross attention of many images with many captions: blocks of equally long captions, a matrix product each.

Sizes in the docstrings: I images of R regions, C captions of W words, D embed_size; N contexts of L elements, M queries
of K elements. attention is a model.Attention.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib import kernels
from lib.tensors import EPS, max_along, norm

BLOCK_WORDS = 512  # words of equally long captions that are scored at once
PIECE_WORDS = 1024  # the same where a piece of S is attended to as soon as it is multiplied
BLOCK_ELEMENTS = 128 * 36 * BLOCK_WORDS  # of S at once on CPUs, where larger temporaries are fresh memory each time


def mul_(X: Tensor, Y: Any) -> Tensor:
    """X · Y, in X's own memory where no gradient needs X: half the traffic."""
    return X * Y if X.requires_grad else X.mul_(Y)


class Padding(NamedTuple):
    """What is no padding, where contexts or queries are filled up with zero vectors.

    queries (N or 1, K, M), bool, and counts, how many of the K, broadcast to (N, M); or contexts (N, L), bool.
    """

    queries: Tensor | None = None
    counts: Tensor | None = None
    contexts: Tensor | None = None


NO_PADDING = Padding()


def attend(S: Tensor, gram: Tensor, query_norms: Tensor, attention: Any, padding: Padding = NO_PADDING) -> Tensor:
    """model.attend of N contexts × M queries from raw similarities, without ever building an attended context.

    S (N, L, K, M): dot products of the contexts' and the queries' elements; it may be overwritten where no gradient
    needs it. Queries come last: reducing an outer axis vectorises. gram (N, L, L): dot products of a context's elements
    with each other. query_norms (K, M), or (N, K, M). Returns scores (N, M).
    The attended context of a query element q is Σ A v, so their cosine is Σ A S / (‖q‖ √(A gram Aᵀ)).
    """
    if kernels.allowed("numba") and has_compiled_form(S, attention.opt) and S.numel() >= kernels.COMPILED_FROM:
        if S.is_contiguous() and query_norms.dim() == 2:
            from lib.kernels import attention_kernel  # here, because numba takes half a second to import

            return attention_kernel.attend(S, gram, query_norms, attention)
    A = normalise(S, attention, padding)
    A = A * attention.smooth if A is S else mul_(A, attention.smooth)
    if padding.contexts is not None:
        A = A.masked_fill(~padding.contexts[:, :, None, None], -torch.inf)
    A = A.softmax(1)
    squares = mul_((gram @ A.flatten(2)).view_as(A), A).sum(1)
    strongest = max_along(A, 1) if attention.max_term else None
    dots = mul_(A, S).sum(1)
    norms = squares.clamp(min=EPS**3).sqrt()  # the floor keeps the gradient finite at a context of zeros
    scores = aggregate(dots / (query_norms * norms).clamp(min=EPS), attention, padding)
    return scores if strongest is None else scores + 0.5 * aggregate(strongest, attention, padding)


def normalise(S: Tensor, attention: Any, padding: Padding) -> Tensor:
    """S normalised over the queries' elements. Zeros change no sum of squares or absolute values."""
    if padding.queries is not None and attention.opt.raw_feature_norm == "softmax":
        S = S.masked_fill(~padding.queries[:, None], -torch.inf)
    return attention.normalise(S, -2)


def aggregate(r: Tensor, attention: Any, padding: Padding) -> Tensor:
    """Scores (N, M) of the relevance r (N, K, M) of the queries' elements."""
    if padding.queries is None:
        return attention.aggregate(r, -2)
    if attention.opt.agg_func in ("Mean", "Sum"):
        total = (r * padding.queries).sum(-2)
        return total / padding.counts if attention.opt.agg_func == "Mean" else total
    return attention.aggregate(r.masked_fill(~padding.queries, -torch.inf), -2)


def has_compiled_form(X: Tensor, opt: Any) -> bool:
    """True where attention_kernel can do this: no gradient, float32 on the CPU, an L2 norm, exponents in range."""
    return (
        X.device.type == "cpu"
        and X.dtype == torch.float32
        and not X.requires_grad
        and opt.raw_feature_norm in ("l2norm", "clipped_l2norm")
        and 0 <= opt.lambda_softmax <= 20
        and (opt.agg_func != "LogSumExp" or 0 < opt.lambda_lse <= 80)
    )


def form_with_products(images: Tensor, captions: Tensor, n_words: int, opt: Any) -> Any:
    """The module whose attend_products can do this, and pays: attention_kernel with AMX's tiles, pieces, or None."""
    n_regions, D = images.shape[0] * images.shape[1], images.shape[2]
    if n_regions * n_words < kernels.COMPILED_FROM or not kernels.allowed("numba") or captions.shape[-1] != D:
        return None
    if not (has_compiled_form(images, opt) and has_compiled_form(captions, opt)) or torch.is_autocast_enabled("cpu"):
        return None
    from lib.kernels import amx, attention_kernel, pieces  # here, because numba takes half a second to import

    if min(n_regions, n_words) < attention_kernel.ROWS:
        return None
    if kernels.allowed("amx") and amx.available():
        return attention_kernel if n_regions * n_words >= kernels.TILES_FROM and D % amx.STEP == 0 else None
    return pieces


# ---------------------------------------------------------------- captions of equal length


def equal_length_blocks(
    captions: Tensor, cap_lens: Sequence[int] | Tensor, chosen: Tensor | None = None, block_words: int = BLOCK_WORDS
) -> tuple[Tensor, list[Tensor]]:
    """Sort captions by length and cut them into blocks of equally long ones, so that no block holds padding.

    captions: (C, W, D) padded, or packed as (ΣW_i, D), the captions' words one after the other. cap_lens: C ints.
    chosen: (P,) indices of captions, repeats allowed; all C where None. block_words: a block's, at most. Returns
    order (P,), the positions in chosen that the blocks' captions came from, and the blocks, a list of
    (captions, words, D) tensors.
    """
    lens = torch.as_tensor(cap_lens).cpu()
    starts = torch.arange(len(lens)) * captions.shape[1] if captions.dim() == 3 else lens.cumsum(0) - lens
    if chosen is not None:
        lens, starts = lens[chosen], starts[chosen]
    order = lens.argsort(stable=True)
    lens, starts = lens[order], starts[order]
    ends = lens.cumsum(0)
    rows = (starts - ends + lens).repeat_interleave(lens) + torch.arange(int(ends[-1]))
    words = captions.reshape(-1, captions.shape[-1])
    if not torch.equal(rows, torch.arange(len(words))):
        words = words.index_select(0, rows.to(words.device))
    shapes = []
    for length, count in zip(*(x.tolist() for x in lens.unique_consecutive(return_counts=True)), strict=True):
        most = max(1, block_words // length)
        most = most // 16 * 16 or most  # multiples of 16 vectorise
        shapes += [(min(most, count - done), length) for done in range(0, count, most)]
    blocks = words.split([count * length for count, length in shapes])
    return order, [block.view(*shape, -1) for block, shape in zip(blocks, shapes, strict=True)]


# ---------------------------------------------------------------- scores


def score_all(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, attention: Any) -> Tensor:
    """Scores (I, C) of all images with all captions, padded or packed as equal_length_blocks takes them."""
    n_words = int(torch.as_tensor(cap_lens).sum())
    form = form_with_products(images, captions, n_words, attention.opt)
    order, blocks = equal_length_blocks(captions, cap_lens, block_words=PIECE_WORDS if form else BLOCK_WORDS)
    if form:
        contexts, queries = ([images], blocks) if attention.t2i else (blocks, [images])
        scores = form.attend_products(contexts, queries, attention)
        scores = scores if attention.t2i else scores.T
    else:
        most = max(1, len(images))
        if images.device.type == "cpu" and not torch.is_grad_enabled():
            most = BLOCK_ELEMENTS // max(1, images.shape[1] * min(n_words, BLOCK_WORDS)) or 1
        chunks = images.split(most)
        scores = torch.cat([torch.cat(list(score_blocks(chunk, blocks, attention)), 1) for chunk in chunks])
    return scores[:, order.argsort().to(images.device)]


def score_blocks(images: Tensor, blocks: list[Tensor], attention: Any) -> Iterator[Tensor]:
    """Scores (I, C) of images (I, R, D) with each block of captions (C, W, D), by one matrix product each."""
    if attention.t2i:
        gram = images @ images.mT
        for words in blocks:
            query = words.transpose(0, 1).contiguous()
            yield attend(dot_products(images, query), gram, norm(query, 2), attention)
    else:
        query = images.transpose(0, 1).contiguous()
        query_norms = norm(query, 2)
        for words in blocks:
            yield attend(dot_products(words, query), words @ words.mT, query_norms, attention).T


def dot_products(contexts: Tensor, queries: Tensor) -> Tensor:
    """contexts (N, L, D), queries (K, M, D) → S (N, L, K, M), one matrix product."""
    S = contexts.flatten(0, 1) @ queries.flatten(0, 1).T
    return S.view(*contexts.shape[:2], *queries.shape[:2])


def score_pairs(
    images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, pairs: Tensor, attention: Any
) -> Tensor:
    """Scores (P,) of the pairs (P, 2) only, an image's and a caption's index in each row."""
    pairs = pairs.cpu()
    order, blocks = equal_length_blocks(captions, cap_lens, pairs[:, 1])
    regions = images.index_select(0, pairs[order, 0].to(images.device)).split([len(words) for words in blocks])
    scores = []
    for pair_regions, words in zip(regions, blocks, strict=True):
        context, query = (pair_regions, words) if attention.t2i else (words, pair_regions)
        S = (context @ query.mT)[..., None]
        scores.append(attend(S, context @ context.mT, norm(query, 2)[..., None], attention)[:, 0])
    return torch.cat(scores)[order.argsort().to(images.device)]
