"""PFAN: image encoder with position attention, bi-GRU text encoder, hinge loss, the model.

Formulas: SCAN is Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018; PFAN is Wang et al.,
Position Focused Attention Network for Image-Text Matching, IJCAI 2019. Sizes in the docstrings: B a batch,
R regions (36), W words, D embed_size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lib import distributed
from lib.checkpoint import load_checkpoint
from lib.constants import N_CELLS, N_SLOTS
from lib.cross_attention import (  # noqa: F401 (l1norm and the two scores have their place here in SCAN)
    AGG_FUNC,
    RAW_FEATURE_NORM,
    XATTN_SCORE,
    l1norm,
    l2norm,
    xattn_pairs,
    xattn_score_i2t,
    xattn_score_t2i,
)
from lib.errors import InputError
from lib.kernels.gru import packed_gru
from lib.options import CHOICES, OPTIONS, check_options, option

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


def plain_linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


LINEAR = {"basic": plain_linear, "weight_norm": WeightNormLinear}


def full(x: Tensor) -> Tensor:
    """x in full precision: float32 where it is bfloat16, as it is where it is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
            weights = weights * full(torch.tanh(logits.gather(2, cells))).softmax(2)
            weights = weights.softmax(2)
        return cells, weights

    def forward(self, images, boxes):
        """images (B, R, img_dim), boxes (B, R, 30 | 31; not read with position none) → (B, R, D)."""
        if self.position != "none":
            images = torch.cat([images, self.position_feature(images, boxes)], 2)
        features = full(self.fc(images))
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
        packed, _ = self.run_gru(captions, lengths)
        return pad_packed_sequence(packed, batch_first=True)[0]

    def run_gru(self, captions, lengths):
        """The word embeddings as a PackedSequence, and the GRU's final states (layers · directions, B, D)."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        packed = pack_padded_sequence(self.embed(captions), lengths, batch_first=True, enforce_sorted=False)
        plain_cpu = packed.data.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        packed, state = packed_gru(self.rnn, packed) if plain_cpu else self.rnn(packed)
        words = full(packed.data)
        if self.use_bi_gru:
            words = (words[:, : self.embed_size] + words[:, self.embed_size :]) / 2
        if not self.no_txtnorm:
            words = l2norm(words, dim=1)
        return PackedSequence(words, *packed[1:]), state


# ---------------------------------------------------------------- loss and model


class ContrastiveLoss(nn.Module):
    """Hinge loss over a batch's score matrix, both directions, summed.

    With max_violation only the hardest negative of each row and column counts. Then the loss depends on 3B scores at
    most: the matrix is scored without gradient, the pairs that matter once more with it. Same loss, same gradient.
    """

    image_parts = 1  # how many of the embeddings are the images'; the captions' follow

    def __init__(self, opt, margin=0, max_violation=False):
        super().__init__()
        self.opt, self.margin, self.max_violation = opt, margin, max_violation

    def score(self, im, s, s_l, pairs=None):
        """Scores (B, B) of a batch's embeddings, or (P,) of some pairs (P, 2) only; what a variant replaces."""
        if pairs is not None:
            return xattn_pairs(im, s, s_l, pairs, self.opt)
        return XATTN_SCORE[self.opt.cross_attn](im, s, s_l, self.opt)

    def forward(self, *embeddings):
        """embeddings: im (B, R, D), s (B, W, D), s_l (B ints), row i of each belonging together → scalar.

        Of several processes each has its own pairs, scores its images against all captions, and gets the whole
        batch's loss, with the gradient of its part of the sum.
        """
        batch = distributed.Batch(len(embeddings[0]))
        images, captions = embeddings[: self.image_parts], embeddings[self.image_parts :]
        embeddings = (*images, *batch.gather_captions(*captions))
        return distributed.sum_over_processes(
            (self.hardest_negatives if self.max_violation else self.negatives)(batch, embeddings)
        )

    def negatives(self, batch, embeddings):
        scores = self.score(*embeddings)  # (n, B): this process's images, all captions; their own begin at batch.first
        right = scores.diagonal(batch.first)
        cost_s = (self.margin + scores - right[:, None]).clamp(min=0)
        cost_im = (self.margin + scores - batch.gather(right)[None, :]).clamp(min=0)
        others = torch.ones_like(scores, dtype=torch.bool)
        others.diagonal(batch.first).fill_(False)
        return ((cost_s + cost_im) * others).sum()

    def hardest_negatives(self, batch, embeddings):
        with torch.no_grad():
            scores = self.score(*embeddings)
            right = scores.diagonal(batch.first).clone()
            scores.diagonal(batch.first).fill_(-torch.inf)
            caption_score, caption = scores.max(1)  # the hardest caption of each image
            image_score, image = batch.hardest(scores)  # the hardest image of each caption, in the whole batch
            own = torch.arange(len(right), device=scores.device)
            costs = ~(self.margin + caption_score - right <= 0)  # NaN counts
            of_images = torch.stack([own, caption], 1)[costs]
            costs = ~(self.margin + image_score - batch.gather(right) <= 0)
            row = image - batch.first
            costs &= (row >= 0) & (row < len(own))  # each pair is scored where its image is
            of_captions = torch.stack([row, torch.arange(len(row), device=row.device)], 1)[costs]
            anchors = torch.cat([of_images[:, 0] + batch.first, of_captions[:, 1]])
            pairs = torch.cat([torch.stack([own, own + batch.first], 1), of_images, of_captions]).cpu()
        scores = self.score(*embeddings, pairs=pairs)
        right, wrong = scores[: len(own)], scores[len(own) :]
        return (self.margin + wrong - batch.gather(right)[anchors]).clamp(min=0).sum()


class SCAN:
    """Both encoders, the loss and the optimizer. opt: any object with the flags as attributes, and vocab_size."""

    text_encoder, loss = EncoderText, ContrastiveLoss  # with make_img_enc, what a variant replaces

    def __init__(self, opt):
        check_options(opt, CHOICES)
        self.opt = opt
        torch.set_float32_matmul_precision(option(opt, "matmul_precision"))
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
            return self.img_enc(images.to(self.device), None if boxes is None else boxes.to(self.device))

    def encode_captions(self, captions, lengths):
        """captions (B, W) ids, lengths (B ints) → word embeddings (B, W, D)."""
        with self.autocast():
            return self.txt_enc(captions.to(self.device), lengths)

    def forward_emb(self, images, boxes, captions, lengths, volatile=False):
        """A batch as collate_fn gives it → img_emb (B, R, D), cap_emb (B, W, D), cap_lens. volatile: no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile):
            img_emb = self.encode_images(images, boxes)
            cap_emb = self.encode_captions(captions, lengths)
        return img_emb, cap_emb, lengths

    def forward_loss(self, img_emb, *embeddings, **kwargs):
        """The loss of a batch's embeddings as forward_emb gives them (img_emb, cap_emb, cap_lens), logged as Le."""
        loss = self.criterion(img_emb, *embeddings)
        if self.logger is not None:
            self.logger.update("Le", loss.item(), img_emb.size(0))
        return loss

    def train_emb(self, images, boxes, captions, lengths, ids=None, *args):
        """One training step on a batch as collate_fn gives it. Returns the loss."""
        return self.step(images, boxes, captions, lengths)

    def step(self, *batch):
        """One training step on what forward_emb takes. Returns the loss.

        Where several processes train, all call this for every batch, each with its own pairs; without arguments one
        that has none. Raises FloatingPointError, the parameters untouched, for a loss or gradient that is no number.
        """
        self.Eiters += 1
        if self.logger is not None:
            self.logger.update("Eit", self.Eiters)
            self.logger.update("lr", self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad()
        if batch:
            loss = self.forward_loss(*self.forward_emb(*batch))
            loss.backward()
        else:
            distributed.Batch(0)
            loss = distributed.sum_over_processes(self.params[0].new_zeros(()))
        distributed.all_reduce_gradients(self.params)
        norm = nn.utils.clip_grad_norm_(self.params, self.grad_clip or torch.inf)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the loss is {loss.item()}, its gradient's norm {norm.item()}")
        self.optimizer.step()
        return loss.detach()


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
    except (InputError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    model.val_start()
    return model
