"""Stacked cross attention: from region and word embeddings to the scores of image–caption pairs.

Formulas: SCAN is Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018; the attention term is
PFAN's. Sizes in the docstrings: I images of R regions, C captions of W words, D embed_size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.options import option

EPS = 1e-8
BLOCK_WORDS = 512  # words of equally long captions that are scored at once, and in tiles:
TILE_WORDS = 1024
BLOCK_ELEMENTS = 128 * 36 * BLOCK_WORDS  # of S at once on CPUs, where larger temporaries are fresh memory each time
LEAK = 0.1  # slope of the clipped norms below 0
KERNEL_FROM = 2**20  # elements of S from which the compiled form is used: compiling it takes a second
TILES_FROM = 2**25  # elements of S from which its products are compiled as well: that takes seconds


def l1norm(X: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """X divided by the sum of its absolute values along dim."""
    return X / (X.abs().sum(dim, keepdim=True) + eps)


def l2norm(X: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """X divided by its Euclidean length along dim."""
    return X / (length(X, dim, keepdim=True) + eps)


def length(X: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Euclidean length of X along dim. Only vector_norm has a finite gradient at 0; the plain form is faster."""
    if X.requires_grad:
        return torch.linalg.vector_norm(X, dim=dim, keepdim=keepdim)
    return X.square().sum(dim, keepdim=keepdim).sqrt_()


def leaky(S: Tensor) -> Tensor:
    return F.leaky_relu(S, LEAK)


def largest(X: Tensor, dim: int) -> Tensor:
    """The maximum along dim. amax is faster; only max gives the gradient to one element where several are equal."""
    return X.max(dim).values if X.requires_grad else X.amax(dim)


def times(X: Tensor, Y: Tensor) -> Tensor:
    """X · Y, in X's own memory where no gradient needs X: half the traffic."""
    return X * Y if X.requires_grad else X.mul_(Y)


# How raw similarities (…, K, M) are normalised, over the K elements that attend (words in t2i, regions in i2t).
RAW_FEATURE_NORM = {
    "softmax": lambda S: S.softmax(-2),
    "l2norm": lambda S: l2norm(S, -2),
    "clipped_l2norm": lambda S: l2norm(leaky(S), -2),
    "l1norm": lambda S: l1norm(S, -2),
    "clipped_l1norm": lambda S: l1norm(leaky(S), -2),
    "clipped": leaky,
    "no_norm": torch.clone,
}

# How the relevance (…, K, M) of the K attending elements becomes one score.
AGG_FUNC = {
    "LogSumExp": lambda r, opt: torch.logsumexp(r * opt.lambda_lse, -2) / opt.lambda_lse,
    "Mean": lambda r, opt: r.mean(-2),
    "Max": lambda r, opt: largest(r, -2),
    "Sum": lambda r, opt: r.sum(-2),
}


def attention_of(S: Tensor, opt: Any) -> Tensor:
    """A = softmax over the contexts' elements of λ·normalised S, for S (N, L, K, M) as attend takes it."""
    return times(RAW_FEATURE_NORM[opt.raw_feature_norm](S), opt.lambda_softmax).softmax(1)


def pair_attention(image: Tensor, words: Tensor, opt: Any, t2i: bool) -> Tensor:
    """What attends to what in one pair: image (R, D), words (W, D) → (W, R) with t2i, else (R, W); rows sum to 1."""
    context, query = (image, words) if t2i else (words, image)
    return attention_of((context @ query.mT)[None, ..., None], opt)[0, ..., 0].mT


def attend(S: Tensor, gram: Tensor, query_norms: Tensor, opt: Any, attention_term: bool) -> Tensor:
    """Stacked cross attention from raw similarities, without ever building an attended context.

    S (N, L, K, M): dot products of the L elements of each of N contexts with the K elements of each of M queries; M
    stands last because reductions are fastest over axes that are not. gram (N, L, L): dot products of a context's
    elements with each other. query_norms (K, M), or (N, K, M).
    Returns scores (N, M). With A = softmax over the context's elements of λ·normalised S, the attended context of
    a query element q is Σ A v, so their cosine is Σ A S / (‖q‖ √(A gram Aᵀ)). attention_term adds PFAN's
    0.5 · agg(max over the context's elements of A). S may be overwritten where no gradient needs it.
    """
    if has_kernel(S, opt) and S.numel() >= KERNEL_FROM and S.is_contiguous() and query_norms.dim() == 2:
        from lib.kernels import attention_kernel  # here, because numba takes half a second to import

        return attention_kernel.attend(S, gram, query_norms, *kernel_options(opt, attention_term))
    attention = attention_of(S, opt)
    squares = times((gram @ attention.flatten(2)).view_as(attention), attention).sum(1)
    strongest = largest(attention, 1) if attention_term else None
    dots = times(attention, S).sum(1)
    norms = squares.clamp(min=EPS**3).sqrt()  # the floor keeps the gradient finite at a context of zeros
    aggregate = AGG_FUNC[opt.agg_func]
    scores = aggregate(dots / (query_norms * norms).clamp(min=EPS), opt)
    return scores + 0.5 * aggregate(strongest, opt) if attention_term else scores


def has_kernel(X: Tensor, opt: Any) -> bool:
    """Whether attention_kernel can do this: no gradient, float32 on the CPU, an L2 norm, exponents in range."""
    return (
        X.device.type == "cpu"
        and X.dtype == torch.float32
        and not X.requires_grad
        and opt.raw_feature_norm in ("l2norm", "clipped_l2norm")
        and 0 <= opt.lambda_softmax <= 20
        and (opt.agg_func != "LogSumExp" or 0 < opt.lambda_lse <= 80)
    )


def kernel_options(opt: Any, attention_term: bool) -> tuple:
    """attention_kernel.attend's options."""
    slope = LEAK if opt.raw_feature_norm == "clipped_l2norm" else 1
    lse = opt.lambda_lse if opt.agg_func == "LogSumExp" else 0
    return slope, opt.lambda_softmax, EPS, opt.agg_func, lse, 0.5 * attention_term


def has_attention_term(opt: Any, t2i: bool) -> bool:
    """Whether PFAN's 0.5 · max-attention term is part of the score: in t2i, but not in plain SCAN."""
    return t2i and option(opt, "position") != "none"


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
        most = most // 16 * 16 or most  # what vectorises well
        shapes += [(min(most, count - done), length) for done in range(0, count, most)]
    blocks = words.split([count * length for count, length in shapes])
    return order, [block.view(*shape, -1) for block, shape in zip(blocks, shapes, strict=True)]


def xattn_score(
    images: Tensor,
    captions: Tensor,
    cap_lens: Sequence[int] | Tensor,
    opt: Any,
    t2i: bool,
    attention_term: bool | None = None,
) -> Tensor:
    """Scores (I, C) of all images (I, R, D) with all captions, padded or packed as equal_length_blocks takes them.

    attention_term: has_attention_term(opt, t2i) where None.
    """
    options = opt, has_attention_term(opt, t2i) if attention_term is None else attention_term
    n_words = int(torch.as_tensor(cap_lens).sum())
    tiles = has_tiles(images, captions, n_words, opt)
    most = BLOCK_ELEMENTS // max(1, images.shape[1] * min(n_words, BLOCK_WORDS)) or 1  # images
    if not tiles and len(images) > most and images.device.type == "cpu" and not torch.is_grad_enabled():
        return torch.cat([xattn_score(part, captions, cap_lens, opt, t2i, options[1]) for part in images.split(most)])
    order, blocks = equal_length_blocks(captions, cap_lens, block_words=TILE_WORDS if tiles else BLOCK_WORDS)
    if tiles:
        from lib.kernels import attention_kernel

        sides = ([images], blocks) if t2i else (blocks, [images])
        norms = [length(query, 2) for query in sides[1]]
        scores = attention_kernel.attend_products(*sides, norms, *kernel_options(*options))
        scores = scores if t2i else scores.T
    else:
        scores = torch.cat([x if t2i else x.T for x in matrix_scores(images, blocks, t2i, *options)], 1)
    return scores[:, order.argsort().to(images.device)]


def matrix_scores(images: Tensor, blocks: list[Tensor], t2i: bool, opt: Any, attention_term: bool) -> Iterator:
    """Scores of images (I, R, D) with each block of words (C, W, D), by one matrix product each."""
    if t2i:
        gram = images @ images.mT
        for words in blocks:
            query = words.transpose(0, 1).contiguous()
            yield attend(dot_products(images, query), gram, length(query, 2), opt, attention_term)
    else:
        regions = images.transpose(0, 1).contiguous()
        norms = length(regions, 2)
        for words in blocks:
            yield attend(dot_products(words, regions), words @ words.mT, norms, opt, attention_term)


def has_tiles(images: Tensor, captions: Tensor, n_words: int, opt: Any) -> bool:
    """Whether attention_kernel.attend_products can do this, and pays: the processor has tiles, and there is enough."""
    n_regions = images.shape[0] * images.shape[1]
    if n_regions * n_words < TILES_FROM or not (has_kernel(images, opt) and has_kernel(captions, opt)):
        return False
    from lib.kernels import attention_kernel  # here, because numba takes half a second to import

    return captions.shape[-1] == images.shape[2] and attention_kernel.has_tiles(n_regions, n_words, images.shape[2])


def dot_products(contexts: Tensor, queries: Tensor) -> Tensor:
    """contexts (N, L, D), queries (K, M, D) → S (N, L, K, M), one matrix product."""
    S = contexts.flatten(0, 1) @ queries.flatten(0, 1).T
    return S.view(*contexts.shape[:2], *queries.shape[:2])


def xattn_score_t2i(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Words attend to regions: scores (n_image, n_caption) of images (I, R, D), captions (C, W, D), cap_lens (C)."""
    return xattn_score(images, captions, cap_lens, opt, t2i=True)


def xattn_score_i2t(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Regions attend to words: scores (n_image, n_caption) of images (I, R, D), captions (C, W, D), cap_lens (C)."""
    return xattn_score(images, captions, cap_lens, opt, t2i=False)


XATTN_SCORE = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}


def xattn_pairs(
    images: Tensor,
    captions: Tensor,
    cap_lens: Sequence[int] | Tensor,
    pairs: Tensor,
    opt: Any,
    attention_term: bool | None = None,
) -> Tensor:
    """Scores (P,) of P pairs only: pairs (P, 2) int64 on the CPU, an image's and a caption's index in each row."""
    t2i = opt.cross_attn == "t2i"
    attention_term = has_attention_term(opt, t2i) if attention_term is None else attention_term
    order, blocks = equal_length_blocks(captions, cap_lens, pairs[:, 1])
    regions = images.index_select(0, pairs[order, 0].to(images.device)).split([len(words) for words in blocks])
    scores = []
    for own, words in zip(regions, blocks, strict=True):
        context, query = (own, words) if t2i else (words, own)
        S = (context @ query.mT)[..., None]
        norms = length(query, 2)[..., None]
        scores.append(attend(S, context @ context.mT, norms, opt, attention_term)[:, 0])
    return torch.cat(scores)[order.argsort().to(images.device)]
