"""PFAN: image encoder with position attention, bi-GRU text encoder, cross attention, hinge loss, the model.

Formulas: SCAN is Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018; PFAN is Wang et al.,
Position Focused Attention Network for Image-Text Matching, IJCAI 2019. Sizes in the docstrings: B a batch, I images of
R regions (36), C captions of W words, D embed_size; N contexts of L elements, queries of K elements, P pairs.
lib/kernels has faster ways to compute the scores and the GRU; without them everything works as it stands here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lib import distributed, kernels
from lib.checkpoint import load_checkpoint
from lib.constants import LEAK, N_CELLS, N_SLOTS
from lib.errors import InputError
from lib.options import CHOICES, OPTIONS, check_options, option
from lib.tensors import EPS, PackedOrder, at_least_float32, max_along, norm, send

POSITION_DIM = 200  # size of a cell's embedding

# ---------------------------------------------------------------- encoders


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is weight_g · weight_v / ‖weight_v‖, one length for the whole matrix."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight_v = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out_features, in_features)))
        self.weight_g = nn.Parameter(self.weight_v.detach().norm())
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm()), self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "weight_g" in state_dict:  # PyTorch 0.3 stored the length as one element, not as a scalar
            state_dict[prefix + "weight_g"] = state_dict[prefix + "weight_g"].reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args)


def linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


LINEAR = {"basic": linear, "weight_norm": WeightNormLinear}


class EncoderImage(nn.Module):
    """Region features and position grids → region embeddings."""

    def __init__(self, img_dim, embed_size, precomp_enc_type="basic", no_imgnorm=False, position="attention"):
        super().__init__()
        self.no_imgnorm, self.position = no_imgnorm, position
        joined = img_dim + (POSITION_DIM if position != "none" else 0)
        self.fc = LINEAR[precomp_enc_type](joined, embed_size)
        if position == "attention":
            self.fc_att = nn.Linear(img_dim, POSITION_DIM)
        if position != "none":
            self.position_embedding = nn.Embedding(N_CELLS + 1, POSITION_DIM)

    def position_feature(self, images, boxes):
        """p of every region: (B, R, img_dim) and (B, R, 30 | 31) → (B, R, 200).

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
            # all 257 cells in one product, then the 15 of each region
            logits = self.fc_att(images) @ self.position_embedding.weight.T
            # float32, because the gradient of gather is a sum
            weights = weights * torch.tanh(at_least_float32(logits).gather(2, cells)).softmax(2)
            weights = weights.softmax(2)
        return cells, weights

    def forward(self, images, boxes):
        """images (B, R, img_dim) of any float type, boxes (B, R, 30 | 31; not read with position none) → (B, R, D)."""
        images = at_least_float32(images)
        if self.position != "none":
            images = torch.cat([images, self.position_feature(images, boxes)], 2)
        features = at_least_float32(self.fc(images))
        return features if self.no_imgnorm else l2norm(features, dim=2)


class EncoderText(nn.Module):
    """Word ids → word embeddings, the two directions of a GRU averaged."""

    def __init__(self, vocab_size, word_dim, embed_size, num_layers, use_bi_gru=False, no_txtnorm=False):
        super().__init__()
        self.embed_size, self.use_bi_gru, self.no_txtnorm = embed_size, use_bi_gru, no_txtnorm
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.rnn = nn.GRU(word_dim, embed_size, num_layers, batch_first=True, bidirectional=use_bi_gru)

    def forward(self, captions, lengths):
        """captions (B, W) ids, lengths (B ints) → (B, W, D), zero behind a caption's end."""
        return self.run_gru(captions, lengths)[0]

    def run_gru(self, captions, lengths):
        """Word embeddings (B, W, D), zero behind a caption's end, and final states (layers · directions, B, D)."""
        order = PackedOrder.of(lengths, captions.device)
        packed = PackedSequence(self.embed(order.pack(captions)), order.batch_sizes, order.sorted, order.unsorted)
        device = captions.device.type
        half = device == "cpu" and torch.is_autocast_enabled("cpu")  # on a GPU cuDNN would take float16, not bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=half):
            packed, state = kernels.packed_gru(self.rnn, packed) or self.rnn(packed)
        words, state = at_least_float32(packed.data), at_least_float32(state)
        if self.use_bi_gru:
            words = (words[:, : self.embed_size] + words[:, self.embed_size :]) / 2
        if not self.no_txtnorm:
            words = l2norm(words, dim=1)
        return order.pad(words), state


# ---------------------------------------------------------------- cross attention


def l1norm(X: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """X divided by the sum of its absolute values along dim."""
    return X / (X.abs().sum(dim, keepdim=True) + eps)


def l2norm(X: Tensor, dim: int, eps: float = EPS) -> Tensor:
    """X divided by its Euclidean norm along dim."""
    return X / (norm(X, dim, keepdim=True) + eps)


def leaky(S: Tensor) -> Tensor:
    """S where it is positive, a tenth of S elsewhere."""
    return F.leaky_relu(S, LEAK)


# How raw similarities S are normalised along dim, over the elements that attend (words in t2i, regions in i2t).
RAW_FEATURE_NORM = {
    "softmax": lambda S, dim: S.softmax(dim),
    "l2norm": lambda S, dim: l2norm(S, dim),
    "clipped_l2norm": lambda S, dim: l2norm(leaky(S), dim),
    "l1norm": lambda S, dim: l1norm(S, dim),
    "clipped_l1norm": lambda S, dim: l1norm(leaky(S), dim),
    "clipped": lambda S, dim: leaky(S),
    "no_norm": lambda S, dim: S,
}

# How the relevance r of the attending elements, along dim, becomes one score. lse: --lambda_lse.
AGG_FUNC = {
    "LogSumExp": lambda r, dim, lse: torch.logsumexp(r * lse, dim) / lse,
    "Mean": lambda r, dim, lse: r.mean(dim),
    "Max": lambda r, dim, lse: max_along(r, dim),
    "Sum": lambda r, dim, lse: r.sum(dim),
}


class Attention(NamedTuple):
    """The kind of cross attention: words attend to regions with t2i, regions to words without.

    opt: options of the run. max_term: whether the score has PFAN's 0.5 · aggregated largest attention.
    """

    opt: Any
    t2i: bool
    max_term: bool

    @classmethod
    def of(cls, opt: Any, t2i: bool) -> "Attention":
        """The root model's: t2i has PFAN's term, i2t and plain SCAN (position none) have not."""
        return cls(opt, t2i, t2i and option(opt, "position") != "none")

    @property
    def smooth(self) -> float:
        """λ, the factor of the softmax's exponents."""
        return self.opt.lambda_softmax

    def normalise(self, S: Tensor, dim: int) -> Tensor:
        """S normalised along dim, over the attending elements."""
        return RAW_FEATURE_NORM[self.opt.raw_feature_norm](S, dim)

    def aggregate(self, r: Tensor, dim: int) -> Tensor:
        """One score of the attending elements' relevance r, which runs along dim."""
        return AGG_FUNC[self.opt.agg_func](r, dim, self.opt.lambda_lse)


def attention_weights(context: Tensor, query: Tensor, attention: Attention) -> Tensor:
    """A (N, K, L): context (N, L, D), query (N, K, D) → how each query element attends; rows sum to 1."""
    S = query @ context.mT
    return (attention.smooth * attention.normalise(S, 1)).softmax(2)


def attend(context: Tensor, query: Tensor, attention: Attention) -> Tensor:
    """Stacked cross attention: N contexts (N, L, D), a query for each (N, K, D) → scores (N,).

    SCAN, equations 1 to 8: each query element attends to all elements of the context, its relevance is its cosine with
    what it attends to. PFAN adds half of the aggregated largest attention.
    """
    A = attention_weights(context, query, attention)
    attended = A @ context
    cosines = (query * attended).sum(2) / (norm(query, 2) * norm(attended, 2)).clamp(min=EPS)
    scores = attention.aggregate(cosines, 1)
    return scores + 0.5 * attention.aggregate(max_along(A, 2), 1) if attention.max_term else scores


def xattn_score(
    images: Tensor,
    captions: Tensor,
    cap_lens: Sequence[int] | Tensor,
    attention: Attention,
    pairs: Tensor | None = None,
) -> Tensor:
    """Scores (I, C) of images (I, R, D) with captions (C, W, D), or (P,) of the pairs (P, 2) only.

    captions may be packed as (ΣW_i, D), the captions' words one after the other. cap_lens: C ints. pairs: the indices
    of an image and a caption in each row.
    """
    scores = kernels.scores(images, captions, cap_lens, pairs, attention)
    if scores is not None:
        return scores
    lens = torch.as_tensor(cap_lens).tolist()
    rows = [x[:n] for x, n in zip(captions, lens, strict=True)] if captions.dim() == 3 else captions.split(lens)
    if pairs is None:
        sides = [(images, words.expand(len(images), -1, -1)) for words in rows]
    else:
        sides = [(images[i, None], rows[c][None]) for i, c in pairs.tolist()]
    scores = [attend(*(side if attention.t2i else side[::-1]), attention) for side in sides]
    return torch.stack(scores, 1) if pairs is None else torch.cat(scores)


def xattn_score_t2i(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Words attend to regions: scores (n_image, n_caption) of images (I, R, D), captions (C, W, D), cap_lens (C)."""
    return xattn_score(images, captions, cap_lens, Attention.of(opt, t2i=True))


def xattn_score_i2t(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Regions attend to words: scores (n_image, n_caption) of images (I, R, D), captions (C, W, D), cap_lens (C)."""
    return xattn_score(images, captions, cap_lens, Attention.of(opt, t2i=False))


XATTN_SCORE = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}


def pair_attention(image: Tensor, words: Tensor, opt: Any, t2i: bool) -> Tensor:
    """Attention in one pair: image (R, D), words (W, D) → (W, R) with t2i, else (R, W); rows sum to 1."""
    context, query = (image, words) if t2i else (words, image)
    return attention_weights(context[None], query[None], Attention.of(opt, t2i))[0]


# ---------------------------------------------------------------- loss


def hardest_pairs(scores: Tensor, margin: float, batch: distributed.Batch) -> tuple[Tensor, Tensor]:
    """The pairs on which the hinge loss with hardest negatives depends.

    scores (n, B), overwritten: this process's n images with the batch's B captions, image i's own in column
    batch.first + i. Returns pairs (n + P, 2), an image's and a caption's index: the n right pairs, then, for each image
    its hardest caption and for each caption its hardest image, the P pairs that cost something (with one GPU all of
    them); and anchors (P,), the index in the batch of the right pair that each of these is compared with.
    """
    rows, columns = (torch.arange(n, device=scores.device) for n in scores.shape)
    right_scores = batch.gather(scores.diagonal(batch.first).clone())
    scores.diagonal(batch.first).fill_(-torch.inf)
    caption_scores, captions = scores.max(1)
    image_scores, images = batch.hardest(scores)
    right = torch.stack([rows, rows + batch.first], 1)
    wrong = torch.stack([torch.cat([rows, images - batch.first]), torch.cat([captions, columns])], 1)
    anchors = torch.cat([rows + batch.first, columns])
    if scores.is_cpu or batch.shared or len(columns) == 1:  # else a GPU counts them for less than the host waits
        costs = ~(margin + torch.cat([caption_scores, image_scores]) - right_scores[anchors] <= 0)  # NaN costs as well
        costs &= (wrong[:, 0] >= 0) & (wrong[:, 0] < len(rows))  # each pair is scored where its image is
        chosen = costs.nonzero()[:, 0]
        wrong, anchors = wrong[chosen], anchors[chosen]
    return torch.cat([right, wrong]), anchors


class ContrastiveLoss(nn.Module):
    """SCAN's hinge loss over a batch's score matrix, both directions, summed.

    With max_violation only the hardest negative of each row and column counts, so that the loss depends on 3B scores at
    most: the matrix is scored without gradient, those pairs once more with it. Same loss, same gradient.
    """

    n_image_embeddings = 1  # of forward's arguments; the captions' follow

    def __init__(self, opt, margin=0, max_violation=False):
        super().__init__()
        self.opt, self.margin, self.max_violation = opt, margin, max_violation

    def score(self, im, s, s_l, pairs=None):
        """Scores (B, B) of a batch's embeddings, or (P,) of the pairs (P, 2) only; a variant replaces this."""
        return xattn_score(im, s, s_l, Attention.of(self.opt, self.opt.cross_attn == "t2i"), pairs)

    def forward(self, *embeddings):
        """embeddings: im (B, R, D), s (B, W, D), s_l (B ints), row i of each belonging together → scalar.

        Each of several processes has its own pairs, scores its images against all captions, and returns the whole
        batch's loss, with the gradient of its share of the sum.
        """
        batch = distributed.Batch(len(embeddings[0]))
        images, captions = embeddings[: self.n_image_embeddings], embeddings[self.n_image_embeddings :]
        embeddings = (*images, *batch.gather_captions(*captions))
        loss = self.hardest_negatives if self.max_violation else self.all_negatives
        return distributed.sum_over_processes(loss(batch, embeddings))

    def all_negatives(self, batch, embeddings):
        scores = self.score(*embeddings)  # (n, B): column batch.first + i belongs to row i
        right = scores.diagonal(batch.first)
        cost_s = (self.margin + scores - right[:, None]).clamp(min=0)
        cost_im = (self.margin + scores - batch.gather(right)).clamp(min=0)
        negatives = torch.ones_like(scores)
        negatives.diagonal(batch.first).zero_()
        return ((cost_s + cost_im) * negatives).sum()

    def hardest_negatives(self, batch, embeddings):
        with torch.no_grad():
            pairs, anchors = hardest_pairs(self.score(*embeddings), self.margin, batch)
        n = len(embeddings[0])
        scores = self.score(*embeddings, pairs=pairs)
        right, wrong = batch.gather(scores[:n]), scores[n:]
        return (self.margin + wrong - right[anchors]).clamp(min=0).sum()


# ---------------------------------------------------------------- the model


class SCAN:
    """Both encoders, the loss and the optimizer. opt: any object with the flags as attributes, and vocab_size."""

    text_encoder, loss = EncoderText, ContrastiveLoss  # with make_img_enc, what a variant replaces

    def __init__(self, opt):
        check_options(opt, CHOICES)
        self.opt = opt
        torch.set_float32_matmul_precision(option(opt, "matmul_precision"))
        torch.backends.cudnn.allow_tf32 = option(opt, "matmul_precision") != "highest"  # in the GRU
        self.device = distributed.pick_device(option(opt, "device"))
        self.amp = option(opt, "amp")
        self.img_enc = self.make_img_enc(opt).to(self.device)
        self.txt_enc = self.text_encoder(
            opt.vocab_size, opt.word_dim, opt.embed_size, opt.num_layers, opt.bi_gru, opt.no_txtnorm
        ).to(self.device)
        self.criterion = self.loss(opt, opt.margin, opt.max_violation)
        self.params = [*self.txt_enc.parameters(), *self.img_enc.parameters()]
        self.optimizer = torch.optim.Adam(self.params, lr=opt.learning_rate, fused=True)
        self.grad_clip = opt.grad_clip
        self.Eiters = 0
        self.logger = None  # a LogCollector while training

    def make_img_enc(self, opt):
        return EncoderImage(opt.img_dim, opt.embed_size, opt.precomp_enc_type, opt.no_imgnorm, option(opt, "position"))

    def state_dict(self):
        return [self.img_enc.state_dict(), self.txt_enc.state_dict()]

    def load_state_dict(self, state_dict):
        """Load [img_enc state, txt_enc state]. Unknown keys are ignored; missing or misshapen ones raise InputError."""
        for encoder, name, state in zip((self.img_enc, self.txt_enc), ("image", "text"), state_dict, strict=True):
            try:
                missing = encoder.load_state_dict(state, strict=False).missing_keys
            except RuntimeError as error:
                raise InputError(f"{name} encoder: {str(error).splitlines()[-1].strip()}") from None
            if missing:
                raise InputError(f"{name} encoder: no {', '.join(missing)} in the checkpoint")

    def train_start(self):
        self.img_enc.train()
        self.txt_enc.train()

    def val_start(self):
        self.img_enc.eval()
        self.txt_enc.eval()

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def encode_images(self, images, boxes):
        """images (B, R, img_dim), boxes (B, R, 30 | 31; None will do with position none) → embeddings (B, R, D)."""
        with self.autocast():
            return self.img_enc(send(images, self.device), None if boxes is None else send(boxes, self.device))

    def encode_captions(self, captions, lengths):
        """captions (B, W) ids, lengths (B ints) → word embeddings (B, W, D)."""
        with self.autocast():
            return self.txt_enc(send(captions, self.device), lengths)

    def forward_emb(self, images, boxes, captions, lengths, volatile=False):
        """A batch as collate_fn gives it → img_emb (B, R, D), cap_emb (B, W, D), cap_lens. volatile: no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile):
            img_emb = self.encode_images(images, boxes)
            cap_emb = self.encode_captions(captions, lengths)
        return img_emb, cap_emb, lengths

    def forward_loss(self, img_emb, *embeddings, **kwargs):
        """The loss of a batch's embeddings (img_emb, cap_emb, cap_lens), as forward_emb returns them."""
        return self.criterion(img_emb, *embeddings)

    def train_emb(self, images, boxes, captions, lengths, ids=None, *args):
        """One training step on a batch as collate_fn gives it. Returns the loss."""
        return self.step(images, boxes, captions, lengths)

    def step(self, *batch):
        """One training step on what forward_emb takes. Returns the loss.

        Where several processes train, all take every step together, each with its own pairs, one that has none with
        step_without_pairs. Raises FloatingPointError, the parameters untouched, where the loss or its gradient is NaN
        or infinite.
        """
        self.start_step()
        loss = self.forward_loss(*self.forward_emb(*batch))
        loss.backward()
        return self.update(loss, len(batch[0]))

    def step_without_pairs(self):
        """The step of one of several processes that has no pair of the batch. Returns the loss."""
        self.start_step()
        distributed.Batch(0)
        return self.update(distributed.sum_over_processes(self.params[0].new_zeros(())), 0)

    def start_step(self):
        self.Eiters += 1
        if self.logger is not None:
            self.logger.update("Eit", self.Eiters)
            self.logger.update("lr", self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()

    def update(self, loss, n_pairs):
        """Step of the optimizer with all processes' gradients; logs the loss as Le. Returns the loss on the CPU."""
        distributed.all_reduce_gradients(self.params)
        gradient_norm = nn.utils.clip_grad_norm_(self.params, self.grad_clip or torch.inf)
        finite = torch.isfinite(loss) & torch.isfinite(gradient_norm)
        self.optimizer.found_inf = (~finite).float()  # where it is 1, fused Adam leaves all as it is
        self.optimizer.step()
        result = torch.stack([loss.detach(), gradient_norm]).cpu()  # the only place where the host waits for a GPU
        loss, gradient_norm = result.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        if not math.isfinite(gradient_norm):
            raise FloatingPointError(f"the loss is {loss}, its gradient's norm {gradient_norm}")
        if self.logger is not None and n_pairs:
            self.logger.update("Le", loss, n_pairs)
        return result[0]


def load_model(path: str, vocab_size: int | None = None, make_model: Callable = SCAN, **overrides: Any) -> Any:
    """The model of a checkpoint, ready to evaluate; its opt is the checkpoint's.

    vocab_size: where given, must be the checkpoint's. make_model: the class of the model. overrides: options to set.
    Raises InputError naming path.
    """
    checkpoint = load_checkpoint(path)
    opt = checkpoint["opt"]
    vars(opt).update({"device": OPTIONS["device"].default, **overrides})  # not the device it was trained on
    opt.vocab_size = len(checkpoint["model"][1]["embed.weight"])
    if vocab_size not in (None, opt.vocab_size):
        raise InputError(f"{path}: made with a vocabulary of {opt.vocab_size} words, found one of {vocab_size}")
    try:
        model = make_model(opt)
        model.load_state_dict(checkpoint["model"])
        if "fc_whole.bias" in checkpoint["model"][0] and not hasattr(model.img_enc, "fc_whole"):
            raise InputError("a whole-image model, expected to be evaluated by Tencent_PFAN/evaluation_whole.py")
    except (InputError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    model.val_start()
    return model
