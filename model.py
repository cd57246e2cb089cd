"""PFAN: image and text encoders, cross attention, hinge loss, the model; in the order and under the names of SCAN.

SCAN is Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018; PFAN is Wang et al., Position Focused
Attention Network for Image-Text Matching, IJCAI 2019. Sizes in the docstrings: B a batch, I images of R regions (36), C
captions of W words, D embed_size; N contexts of L elements, M queries of K elements, P pairs.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from data import PrecompDataset
from lib import distributed
from lib.checkpoint import check_kind, check_state, load_checkpoint, warn_of_variant
from lib.constants import LEAK, N_SLOTS
from lib.errors import InputError
from lib.kernels import gru, pieces
from lib.kernels.blocks import blocks
from lib.layers import WeightNormLinear, linear
from lib.options import CHOICES, OPTIONS, check_options, option
from lib.tensors import EPS, Lens, Mask, PackedOrder, at_least_float32, filled, max_along, mul_, norm, to_device
from vocab import Vocabulary

# ---------------------------------------------------------------- norms


def l1norm(X: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """X divided by the sum of its absolute values along dim."""
    return X / (X.abs().sum(dim, keepdim=True) + eps)


def l2norm(X: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """X divided by its Euclidean norm along dim."""
    return X / (norm(X, dim, keepdim=True) + eps)


def leaky(X: Tensor) -> Tensor:
    """X where it is positive, a tenth of X elsewhere."""
    return F.leaky_relu(X, LEAK)


# ---------------------------------------------------------------- encoders


def EncoderImage(
    data_name: str,
    img_dim: int,
    embed_size: int,
    precomp_enc_type: str = "basic",
    no_imgnorm: bool = False,
    **more: Any,
) -> nn.Module:
    """The image encoder of --precomp_enc_type; data_name is not read. more: other arguments of the encoders."""
    OPTIONS["precomp_enc_type"].check(precomp_enc_type)
    return ENCODERS[precomp_enc_type](img_dim, embed_size, no_imgnorm, **more)


class EncoderImagePrecomp(nn.Module):
    """Region features v and position grids → region embeddings: l2norm(fc([v; p])).

    position: attention is PFAN-A, area PFAN-P, none plain SCAN, whose regions have no p. Cells are split_size², and
    one more index is "no cell"; each has an embedding of position_embed_size, which starts with a standard deviation of
    position_init.
    """

    linear = staticmethod(linear)

    def __init__(
        self,
        img_dim,
        embed_size,
        no_imgnorm=False,
        split_size=16,
        position_embed_size=200,
        position="attention",
        position_init=1.0,
    ):
        super().__init__()
        self.embed_size, self.no_imgnorm, self.position = embed_size, no_imgnorm, position
        self.fc = self.linear(img_dim + (position_embed_size if position != "none" else 0), embed_size)
        if position == "attention":
            self.fc_att = nn.Linear(img_dim, position_embed_size)
        if position != "none":
            self.position_embedding = nn.Embedding(split_size**2 + 1, position_embed_size)
            self.position_embedding.weight.data *= position_init

    def position_feature(self, images, boxes):
        """p of every region: (B, R, img_dim) and (B, R, 30 | 31) → (B, R, position_embed_size).

        area: p = Σ_j a_j e_j. attention: p = Σ_j β_j e_j.
        """
        cells, weights = self.cell_weights(images, boxes)
        table = self.position_embedding.weight
        p = F.embedding_bag(cells.flatten(0, 1), table, mode="sum", per_sample_weights=weights.flatten(0, 1))
        return p.view(*cells.shape[:2], -1)

    def cell_weights(self, images, boxes):
        """Each region's cells (B, R, 15) and what weighs them (B, R, 15).

        area: a_j. attention: α = softmax_j(tanh(fc_att(v)·e_j)), β = softmax_j(a_j α_j).
        """
        cells = boxes[..., :N_SLOTS].long()
        weights = boxes[..., N_SLOTS : 2 * N_SLOTS]
        if self.position == "attention":
            # all cells in one product, then the 15 of each region
            logits = self.fc_att(images) @ self.position_embedding.weight.T
            # float32, because the gradient of gather is a sum
            weights = weights * torch.tanh(at_least_float32(logits).gather(2, cells)).softmax(2)
            weights = weights.softmax(2)
        return cells, weights

    def forward(self, images, boxes=None):
        """images (B, R, img_dim) of any float type, boxes (B, R, 30 | 31; not read with position none) → (B, R, D)."""
        images = at_least_float32(images)
        if self.position != "none":
            images = torch.cat([images, self.position_feature(images, boxes)], 2)
        features = at_least_float32(self.fc(images))
        return features if self.no_imgnorm else l2norm(features, dim=2)


class EncoderImageWeightNormPrecomp(EncoderImagePrecomp):
    """EncoderImagePrecomp with a weight-normalised fc."""

    linear = WeightNormLinear


ENCODERS = {"basic": EncoderImagePrecomp, "weight_norm": EncoderImageWeightNormPrecomp}


class EncoderText(nn.Module):
    """Word ids → word embeddings, the two directions of a GRU averaged."""

    def __init__(self, vocab_size, word_dim, embed_size, num_layers, use_bi_gru=False, no_txtnorm=False):
        super().__init__()
        self.embed_size, self.use_bi_gru, self.no_txtnorm = embed_size, use_bi_gru, no_txtnorm
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.rnn = nn.GRU(word_dim, embed_size, num_layers, batch_first=True, bidirectional=use_bi_gru)

    def forward(self, x, lengths):
        """x (B, W) word ids, lengths (B ints) → words (B, W, D), zero behind a caption's end, and lengths."""
        return self.run_gru(x, lengths)[0], lengths

    def run_gru(self, x, lengths):
        """Word embeddings (B, W, D), zero behind a caption's end, and final states (layers · directions, B, D)."""
        order = PackedOrder.of(lengths, x.device)
        packed = PackedSequence(self.embed(order.pack(x)), order.batch_sizes, order.sorted, order.unsorted)
        device = x.device.type
        half = device == "cpu" and torch.is_autocast_enabled("cpu")  # on a GPU cuDNN would take float16, not bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=half):
            packed, state = gru.packed_gru(self.rnn, packed) if gru.applies(self.rnn, packed) else self.rnn(packed)
        words, state = at_least_float32(packed.data), at_least_float32(state)
        if self.use_bi_gru:
            words = (words[:, : self.embed_size] + words[:, self.embed_size :]) / 2
        if not self.no_txtnorm:
            words = l2norm(words, dim=1)
        return order.pad(words), state


# ---------------------------------------------------------------- cross attention

# How raw similarities S are normalised along dim, over the elements that attend (words in t2i, regions in i2t). With a
# mask, S is 0 where it is False. A row without the parameter `mask` is only given captions of equal length.
RAW_FEATURE_NORM: dict[str, Callable] = {
    "softmax": lambda S, dim, mask=None: filled(S, mask, -torch.inf).softmax(dim),
    "l2norm": lambda S, dim, mask=None: l2norm(S, dim),
    "clipped_l2norm": lambda S, dim, mask=None: l2norm(leaky(S), dim),
    "l1norm": lambda S, dim, mask=None: l1norm(S, dim),
    "clipped_l1norm": lambda S, dim, mask=None: l1norm(leaky(S), dim),
    "clipped": lambda S, dim, mask=None: leaky(S),
    "no_norm": lambda S, dim, mask=None: S,
}

# How the relevance r of the attending elements, along dim, becomes one score. lse: --lambda_lse.
AGG_FUNC: dict[str, Callable] = {
    "LogSumExp": lambda r, dim, lse, mask=None: torch.logsumexp(filled(r * lse, mask, -torch.inf), dim) / lse,
    "Mean": lambda r, dim, lse, mask=None: r.mean(dim) if mask is None else filled(r, mask, 0).sum(dim) / mask.sum(dim),
    "Max": lambda r, dim, lse, mask=None: max_along(filled(r, mask, -torch.inf), dim),
    "Sum": lambda r, dim, lse, mask=None: filled(r, mask, 0).sum(dim),
}


class ScoreConfig(NamedTuple):
    """What a score reads besides embeddings. t2i: words attend to regions, else regions to words. max_term: whether
    PFAN's 0.5 · aggregated largest attention is added."""

    raw_feature_norm: str
    agg_func: str
    lambda_softmax: float
    lambda_lse: float
    t2i: bool
    max_term: bool

    @classmethod
    def of(cls, opt: Any, cross_attn: str | None = None, max_term: bool | None = None) -> "ScoreConfig":
        """Of the options. cross_attn: opt's where None. max_term: where None, True in t2i with positions."""
        t2i = (cross_attn or opt.cross_attn) == "t2i"
        max_term = t2i and option(opt, "position") != "none" if max_term is None else max_term
        return cls(opt.raw_feature_norm, opt.agg_func, opt.lambda_softmax, opt.lambda_lse, t2i, max_term)


def attention_weights(
    S: Tensor, raw_feature_norm: str, smooth: float, query_mask: Mask = None, context_mask: Mask = None
) -> Tensor:
    """How each query element attends to the context: softmax over the context's elements of λ · normalised S.

    S (N, L, K, …): dot products of the contexts' and the queries' elements. smooth: λ, the inverse temperature. Masks
    as attend takes them. Returns (N, L, K, …), whose sums over L are 1. SCAN, equations 2 and 7.
    """
    normalise = RAW_FEATURE_NORM[raw_feature_norm]
    A = normalise(S, 2) if query_mask is None else normalise(S, 2, query_mask[:, None])
    A = A * smooth if A is S else mul_(A, smooth)
    if context_mask is not None:
        A = filled(A, context_mask[:, :, None, None], -torch.inf)
    return A.softmax(1)


def attend(
    S: Tensor, gram: Tensor, query_norms: Tensor, query_mask: Mask, context_mask: Mask, config: ScoreConfig
) -> Tensor:
    """Stacked cross attention of N contexts × M queries: scores (N, M).

    S (N, L, K, M): dot products of the contexts' elements v and the queries' q.
    gram (N, L, L): dot products of a context's elements with each other. query_norms (K, M) or (N, K, M): ‖q‖. Masks,
    bool, False for padding, whose vectors are 0, or None: of the queries (N or 1, K, M), of the contexts (N, L).
    SCAN, equations 1 to 8: the relevance of q is its cosine with what it attends to, Σ A v, that is
    Σ A S / (‖q‖ √(A gram Aᵀ)): no attended vector is ever built. PFAN adds half of the aggregated largest attention.
    """
    A = attention_weights(S, config.raw_feature_norm, config.lambda_softmax, query_mask, context_mask)
    squares = mul_((gram @ A.flatten(2)).view_as(A), A).sum(1)
    largest = max_along(A, 1) if config.max_term else None
    dots = mul_(A, S).sum(1)
    norms = squares.clamp(min=EPS**3).sqrt()  # the floor keeps the gradient finite at a context of zeros
    scores = aggregate(dots / (query_norms * norms).clamp(min=EPS), query_mask, config)
    return scores if largest is None else scores + 0.5 * aggregate(largest, query_mask, config)


def aggregate(r: Tensor, query_mask: Mask, config: ScoreConfig) -> Tensor:
    """Scores (N, M) of the relevance r (N, K, M) of the queries' elements."""
    masks = () if query_mask is None else (query_mask,)
    return AGG_FUNC[config.agg_func](r, 1, config.lambda_lse, *masks)


def func_attention(query: Tensor, context: Tensor, opt: Any, smooth: float, eps: float = EPS) -> tuple:
    """What each query element attends to, and how: the attention of attend in SCAN's form.

    query (n, queryL, d), context (n, sourceL, d); opt: only its raw_feature_norm is read; smooth: the inverse
    temperature; eps is not read. Returns the attended contexts (n, queryL, d), the attention (n, sourceL, queryL) and
    each query element's largest attention (n, queryL).
    """
    A = attention_weights(context @ query.mT, opt.raw_feature_norm, smooth)
    return A.mT @ context, A, max_along(A, 1)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = EPS) -> Tensor:
    """Cosine of x1 and x2 along dim, squeezed."""
    return ((x1 * x2).sum(dim) / (norm(x1, dim) * norm(x2, dim)).clamp(min=eps)).squeeze()


def xattn_score_t2i(images: Tensor, captions: Tensor, cap_lens: Lens, opt: Any) -> Tensor:
    """Words attend to regions: scores (n_image, n_caption) of images (I, R, D), captions (C, W, D), cap_lens (C)."""
    return xattn_score(images, captions, cap_lens, ScoreConfig.of(opt, "t2i"))


def xattn_score_i2t(images: Tensor, captions: Tensor, cap_lens: Lens, opt: Any) -> Tensor:
    """Regions attend to words: scores (n_image, n_caption) of images (I, R, D), captions (C, W, D), cap_lens (C)."""
    return xattn_score(images, captions, cap_lens, ScoreConfig.of(opt, "i2t"))


def xattn_score(
    images: Tensor, captions: Tensor, cap_lens: Lens, config: ScoreConfig, pairs: Tensor | None = None
) -> Tensor:
    """Scores (I, C) of images (I, R, D) with captions (C, W, D) of cap_lens words, or (P,) of the pairs (P, 2) only.

    pairs: the indices of an image and a caption in each row. In evaluation a CPU scores all pairs by attend's
    compiled form, where it applies and gives attend's numbers; all else by attend.
    """
    if pairs is None and pieces.applies(images, captions, cap_lens, config):
        rows = RAW_FEATURE_NORM[config.raw_feature_norm], AGG_FUNC[config.agg_func]
        if pieces_agree(config, attend, attention_weights, aggregate, l2norm, leaky, *rows):
            return pieces.scores(images, captions, cap_lens, config)
    return formula_scores(images, captions, cap_lens, config, pairs)


def formula_scores(
    images: Tensor, captions: Tensor, cap_lens: Lens, config: ScoreConfig, pairs: Tensor | None = None
) -> Tensor:
    """xattn_score by attend."""
    rows = RAW_FEATURE_NORM[config.raw_feature_norm], AGG_FUNC[config.agg_func]
    padded = images.device.type != "cpu" and all("mask" in inspect.signature(row).parameters for row in rows)
    parts, places = blocks(images, captions, cap_lens, config.t2i, pairs, padded)
    scores = []
    for part in parts:
        block = attend(*part, config)
        scores.append(block.T if pairs is None and config.t2i else block)
    scores = torch.cat(scores).index_select(0, places)
    return scores.T if pairs is None else scores[:, 0]


@cache
def pieces_agree(config: ScoreConfig, *formula: Callable) -> bool:
    """Whether pieces.scores gives the scores of attend on a sample; asked once for each formula.

    formula: the functions that attend is made of now. Logs a warning where the two differ.
    """
    return pieces.agree(formula_scores, config)


# ---------------------------------------------------------------- loss


def hardest_negatives(scores: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Each image's hardest caption and each caption's hardest image, by image, as far as they cost something.

    scores (B, B), whose diagonal are the positives; overwritten. Returns pairs (P, 2), an image's and a caption's
    index, and the index of the positive (P,) that each is compared with. A GPU keeps all 2B, costly or not: to
    select them, the host would have to wait for it.
    """
    numbers = torch.arange(len(scores), device=scores.device)
    positives = scores.diagonal().clone()
    scores.fill_diagonal_(-torch.inf)
    (caption_scores, captions), (image_scores, images) = scores.max(1), scores.max(0)
    pairs = torch.stack([torch.cat([numbers, images]), torch.cat([captions, numbers])], 1)
    anchors = numbers.repeat(2)
    chosen = pairs[:, 0].argsort(stable=True)
    if scores.is_cpu or len(scores) == 1:
        costs = ~(margin + torch.cat([caption_scores, image_scores]) - positives[anchors] <= 0)  # NaN costs as well
        chosen = chosen[costs[chosen]]
    return pairs[chosen], anchors[chosen]


class ContrastiveLoss(nn.Module):
    """SCAN's hinge loss over a batch's score matrix, both directions, summed.

    score(*embeddings, pairs=None): a function that returns scores; None: xattn_score_t2i or _i2t, as opt says.
    With max_violation only the hardest negative of each row and column counts, so that the loss depends on 3B scores at
    most: the matrix is scored without gradient, those pairs once more with it. Same loss, same gradient.
    """

    def __init__(self, opt, margin=0, max_violation=False, score=None):
        super().__init__()
        self.opt, self.margin, self.max_violation = opt, margin, max_violation
        self.score = score or self.xattn_score

    def xattn_score(self, im, s, s_l, pairs=None):
        return xattn_score(im, s, s_l, ScoreConfig.of(self.opt), pairs)

    def forward(self, *embeddings):
        """embeddings: im (B, R, D), s (B, W, D), s_l (B ints), as forward_emb returns them; row i of each belong
        together → scalar.

        Each of several processes has its share of the batch, scores its images with all captions, and returns the
        whole batch's loss, with the gradient of its scores.
        """
        n = len(embeddings[0])
        embeddings = distributed.gather_captions(embeddings)
        if not self.max_violation:
            return self.all_negatives(distributed.gather(self.score(*embeddings)))
        with torch.no_grad():
            pairs, anchors = hardest_negatives(distributed.gather(self.score(*embeddings)), self.margin)
        positives, negatives = distributed.local_pairs(n, pairs)
        scores = self.score(*embeddings, pairs=torch.cat([positives, negatives]))
        positives, negatives = (distributed.gather(x) for x in (scores[:n], scores[n:]))
        return (self.margin + negatives - positives[anchors]).clamp(min=0).sum()

    def all_negatives(self, scores):
        """The loss of scores (B, B), whose diagonal are the positives."""
        positives = scores.diagonal()
        cost_s = (self.margin + scores - positives[:, None]).clamp(min=0)
        cost_im = (self.margin + scores - positives).clamp(min=0)
        return (cost_s + cost_im).masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), 0).sum()


# ---------------------------------------------------------------- the model


class SCAN:
    """Both encoders, the loss and the optimizer. opt: any object with the flags as attributes, and vocab_size.

    A variant is a subclass: what it encodes (make_img_enc, text_encoder, encode_images, forward_emb, train_emb), how it
    scores (score), which data and vocabulary it reads (dataset, vocabulary).
    """

    dataset, vocabulary, text_encoder, whole_image = PrecompDataset, Vocabulary, EncoderText, False

    def __init__(self, opt):
        check_options(opt, CHOICES)
        self.opt = opt
        torch.set_float32_matmul_precision(option(opt, "matmul_precision"))
        torch.backends.cudnn.allow_tf32 = option(opt, "matmul_precision") != "highest"  # in the GRU
        self.device = distributed.pick_device(option(opt, "device"))
        self.img_enc = self.make_img_enc(opt).to(self.device)
        sizes = opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers
        self.txt_enc = self.text_encoder(*sizes, opt.bi_gru, opt.no_txtnorm).to(self.device)
        self.criterion = ContrastiveLoss(opt, opt.margin, opt.max_violation, self.score)
        self.params = [*self.txt_enc.parameters(), *self.img_enc.parameters()]
        decay = option(opt, "weight_decay")
        adam = torch.optim.AdamW if decay else torch.optim.Adam
        self.optimizer = adam(self.params, lr=opt.learning_rate, weight_decay=decay, fused=True)
        self.grad_clip, self.Eiters = opt.grad_clip, 0
        self.logger = None  # a LogCollector while training

    def make_img_enc(self, opt):
        flags = {name: option(opt, name) for name in ("position", "position_init")}
        return EncoderImage("", opt.img_dim, opt.embed_size, opt.precomp_enc_type, opt.no_imgnorm, **flags)

    def state_dict(self):
        return [self.img_enc.state_dict(), self.txt_enc.state_dict()]

    def load_state_dict(self, state_dict):
        """Load [img_enc state, txt_enc state]. Unknown keys are ignored; missing or misshapen ones raise InputError."""
        for encoder, name, state in zip((self.img_enc, self.txt_enc), ("image", "text"), state_dict, strict=True):
            check_state(name, encoder.state_dict(), state)
            encoder.load_state_dict(state, strict=False)

    def train_start(self):
        self.img_enc.train()
        self.txt_enc.train()

    def val_start(self):
        self.img_enc.eval()
        self.txt_enc.eval()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=option(self.opt, "amp"))

    def encode_images(self, images, boxes):
        """images (B, R, img_dim), boxes (B, R, 30 | 31) → a tuple of embeddings, the first of which is (B, R, D)."""
        with self.autocast():
            return (self.img_enc(to_device(images, self.device), to_device(boxes, self.device)),)

    def encode_captions(self, captions, lengths):
        """captions (B, W) ids, lengths (B ints) → cap_emb (B, W, D), lengths, and further embeddings (B, …)."""
        with self.autocast():
            return self.txt_enc(to_device(captions, self.device), lengths)

    def forward_emb(self, images, boxes, captions, lengths, volatile=False):
        """A batch as collate_fn gives it → img_emb (B, R, D), cap_emb (B, W, D), cap_lens. volatile: no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile):
            return *self.encode_images(images, boxes), *self.encode_captions(captions, lengths)

    def score(self, img_emb, cap_emb, cap_lens, pairs=None, cross_attn=None):
        """Scores (I, C) of what forward_emb returns, or (P,) of the pairs (P, 2) only. cross_attn: opt's where None."""
        return xattn_score(img_emb, cap_emb, cap_lens, ScoreConfig.of(self.opt, cross_attn), pairs)

    def forward_loss(self, img_emb, *embeddings, **kwargs):
        """The loss of a batch's embeddings (img_emb, cap_emb, cap_lens), as forward_emb returns them."""
        return self.criterion(img_emb, *embeddings)

    def train_emb(self, images, boxes, captions, lengths, ids=None, *args):
        """One training step on a batch as collate_fn gives it. Returns the loss."""
        return self.step((images, boxes, captions, lengths), ids)

    def step(self, batch, ids=None):
        """One training step on what forward_emb takes. Returns the loss.

        Several processes take every step together, each with its share of the batch. ids: the shares' item indices; a
        batch with fewer pairs than processes comes whole to each. Raises FloatingPointError, the parameters untouched,
        where the loss or its gradient is NaN or infinite.
        """
        self.Eiters += 1
        self.optimizer.zero_grad()
        repeated = ids is not None and distributed.same_in_all_processes(ids)  # or this is the only process
        with distributed.alone() if repeated else nullcontext():
            loss = self.forward_loss(*self.forward_emb(*batch))
            loss.backward()
        distributed.all_reduce_gradients(self.params, mean=repeated)
        gradient_norm = nn.utils.clip_grad_norm_(self.params, self.grad_clip or torch.inf)
        result = torch.stack([loss.detach(), gradient_norm]).cpu()  # the only place where the host waits for a GPU
        if not torch.isfinite(result).all():
            raise FloatingPointError("the loss is {}, the norm of its gradient {}".format(*result.tolist()))
        self.optimizer.step()
        if self.logger is not None:
            self.logger.update("Eit", self.Eiters)
            self.logger.update("lr", self.optimizer.param_groups[0]["lr"])
            self.logger.update("Le", result[0].item(), len(batch[0]))
        return result[0]


def load_model(
    path: str, vocab_size: int | None = None, make_model: Any = SCAN, checkpoint: dict | None = None, **overrides: Any
) -> Any:
    """The model of a checkpoint, ready to evaluate; its opt is the checkpoint's.

    vocab_size: where given, must be the checkpoint's. make_model: SCAN or a subclass. checkpoint: the contents of path
    where they have been read. overrides: options to set. Raises InputError naming path.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    check_kind(path, checkpoint, make_model.whole_image)
    warn_of_variant(path, checkpoint, make_model)
    opt = checkpoint["opt"]
    vars(opt).update({"device": OPTIONS["device"].default, **overrides})  # not the device it was trained on
    opt.vocab_size = len(checkpoint["model"][1]["embed.weight"])
    if vocab_size not in (None, opt.vocab_size):
        raise InputError(f"{path}: made with a vocabulary of {opt.vocab_size} words, found one of {vocab_size}")
    try:
        model = make_model(opt)
        model.load_state_dict(checkpoint["model"])
    except (InputError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    model.val_start()
    return model
