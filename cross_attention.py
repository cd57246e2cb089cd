"""Stacked cross attention: from region and word embeddings to the scores of image–caption pairs.

Formulas: SCAN is Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018; the attention term is
PFAN's. Sizes in the docstrings: I images of R regions, C captions of W words, D embed_size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import flag

EPS = 1e-8
BLOCK_WORDS = 512  # words of equally long captions that are scored at once
LEAK = 0.1  # slope of the clipped norms below 0
KERNEL_FROM = 2**20  # elements of S from which the compiled form is used: compiling it takes a second


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


def attention_sums(S: Tensor, gram: Tensor, opt: Any, attention_term: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """What stacked cross attention needs of raw similarities, without ever building an attended context.

    S (N, L, K, M): dot products of the L elements of each of N contexts with the K elements of each of M queries; M
    stands last because reductions are fastest over axes that are not. gram (N, L, L): dot products of a context's
    elements with each other. With A = softmax over the context's elements of λ·normalised S, the attended context of a
    query element is c = Σ A v. Returns ‖c‖² = A gram Aᵀ, its dot product with the query element Σ A S, and the largest
    A (possibly None without attention_term), (N, K, M) each. S may be overwritten where no gradient needs it.
    """
    if has_kernel(S, opt) and S.is_contiguous() and S.numel() >= KERNEL_FROM:
        import attention_kernel  # here, because numba takes half a second to import

        squares, dots, strongest = attention_kernel.attend(S, gram, *kernel_options(opt))
    else:
        attention = attention_of(S, opt)
        squares = times((gram @ attention.flatten(2)).view_as(attention), attention).sum(1)
        strongest = largest(attention, 1) if attention_term else None
        dots = times(attention, S).sum(1)
    return squares, dots, strongest


def aggregate(sums: Any, query_norms: Tensor, opt: Any, attention_term: bool) -> Tensor:
    """Scores (N, M) from what attention_sums returns and ‖query elements‖, (K, M) or (N, K, M).

    The cosine of a query element q and its context is Σ A S / (‖q‖ √(A gram Aᵀ)). attention_term adds PFAN's
    0.5 · agg(max over the context's elements of A).
    """
    squares, dots, strongest = sums
    norms = squares.clamp(min=EPS**3).sqrt()  # the floor keeps the gradient finite at a context of zeros
    agg_func = AGG_FUNC[opt.agg_func]
    scores = agg_func(dots / (query_norms * norms).clamp(min=EPS), opt)
    return scores + 0.5 * agg_func(strongest, opt) if attention_term else scores


def has_kernel(X: Tensor, opt: Any) -> bool:
    """Whether attention_kernel can do this: no gradient, float32 on the CPU, an L2 norm."""
    return (
        X.device.type == "cpu"
        and X.dtype == torch.float32
        and not X.requires_grad
        and opt.raw_feature_norm in ("l2norm", "clipped_l2norm")
        and 0 <= opt.lambda_softmax <= 20
    )


def kernel_options(opt: Any) -> tuple[float, float, float]:
    """Slope below 0, λ and the number that is added to norms."""
    return LEAK if opt.raw_feature_norm == "clipped_l2norm" else 1, opt.lambda_softmax, EPS


def has_attention_term(opt: Any, t2i: bool) -> bool:
    """Whether PFAN's 0.5 · max-attention term is part of the score: in t2i, but not in plain SCAN."""
    return t2i and flag(opt, "position") != "none"


def equal_length_blocks(
    captions: Tensor, cap_lens: Sequence[int] | Tensor, chosen: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Sort captions by length and cut them into blocks of equally long ones, so that no block holds padding.

    captions: (C, W, D) padded, or packed as (ΣW_i, D), the captions' words one after the other. cap_lens: C ints.
    chosen: (P,) indices of captions, repeats allowed; all C where None. Returns order (P,), the positions in chosen
    that the blocks' captions came from, and the blocks, a list of (captions, words, D) tensors.
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
        most = max(1, BLOCK_WORDS // length)
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
    attention_term = has_attention_term(opt, t2i) if attention_term is None else attention_term
    order, blocks = equal_length_blocks(captions, cap_lens)
    sums = tile_sums(images, blocks, opt, t2i) or matrix_sums(images, opt, t2i, attention_term)
    region_norms = None if t2i else length(images, 2).T
    scores = []
    for words in blocks:
        norms = length(words, 2).T if region_norms is None else region_norms
        block = aggregate(sums(words), norms, opt, attention_term)
        scores.append(block if t2i else block.T)
    return torch.cat(scores, 1)[:, order.argsort().to(images.device)]


def matrix_sums(images: Tensor, opt: Any, t2i: bool, attention_term: bool) -> Callable:
    """A function of words (C, W, D) that gives their attention_sums with images (I, R, D), by one matrix product."""
    options = opt, attention_term
    if t2i:
        gram = images @ images.mT
        return lambda words: attention_sums(dot_products(images, words.transpose(0, 1)), gram, *options)
    regions = images.transpose(0, 1).contiguous()
    return lambda words: attention_sums(dot_products(words, regions), words @ words.mT, *options)


def tile_sums(images: Tensor, blocks: list[Tensor], opt: Any, t2i: bool) -> Callable | None:
    """matrix_sums where the processor has something faster and there is enough to do, else None."""
    n_regions, n_words = (sum(X.shape[0] * X.shape[1] for X in side) for side in ([images], blocks))
    if not has_kernel(images, opt) or blocks[0].requires_grad or n_regions * n_words < KERNEL_FROM:
        return None
    import attention_kernel  # here, because numba takes half a second to import

    if not attention_kernel.has_tiles(n_regions, n_words, images.shape[2]):
        return None
    kernel, options, (n_images, R, _) = attention_kernel, kernel_options(opt), images.shape
    if t2i:
        left, gram = kernel.left_side(images), kernel.doubled(images @ images.mT)
        return lambda words: kernel.attend_products(
            left, kernel.right_side(words), (n_images, R, words.shape[1], len(words)), gram, *options
        )
    right = kernel.right_side(images)
    return lambda words: kernel.attend_products(
        kernel.left_side(words), right, (*words.shape[:2], R, n_images), kernel.doubled(words @ words.mT), *options
    )


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
        sums = attention_sums(S, context @ context.mT, opt, attention_term)
        scores.append(aggregate(sums, norms, opt, attention_term)[:, 0])
    return torch.cat(scores)[order.argsort().to(images.device)]
