"""The whole-image model: PFAN-P (area-weighted positions) and a branch that compares whole image and sentence.

score = the root's cross attention, with the 0.5 · max-attention term in t2i and i2t alike,
        + λ_whole · cos(fc_whole(whole image), mean of the two final GRU states).
Sizes in the docstrings: B a batch, R regions (36), W words, D embed_size, I images and C captions, P pairs.
"""

from functools import partial

import torch

import model
from lib.constants import SPLIT_SIZE
from lib.errors import InputError
from lib.options import OPTIONS, option
from lib.tensors import EPS, at_least_float32, norm, to_device
from model import (  # noqa: F401 (SCAN's names)
    ScoreConfig,
    cosine_similarity,
    func_attention,
    l1norm,
    l2norm,
    xattn_score,
)
from Tencent_PFAN.data_whole import PrecompDataset
from Tencent_PFAN.vocab import Vocabulary


def EncoderImage(
    data_name, img_dim, embed_size, precomp_enc_type="basic", no_imgnorm=False, need_box_whole=False, **more
):
    """The image encoder of --precomp_enc_type; data_name is not read. more: other arguments of the encoders."""
    OPTIONS["precomp_enc_type"].check(precomp_enc_type)
    return ENCODERS[precomp_enc_type](img_dim, embed_size, no_imgnorm, need_box_whole, **more)


class EncoderImagePrecomp(model.EncoderImagePrecomp):
    """Region features and position grids → region embeddings; whole-image features → whole-image embeddings.

    With need_box_whole the last region is the whole image: its position feature is the mean of all cells'.
    """

    def __init__(
        self,
        img_dim,
        embed_size,
        no_imgnorm=False,
        need_box_whole=False,
        split_size=SPLIT_SIZE,
        position_embed_size=200,
        position_init=1.0,
    ):
        super().__init__(img_dim, embed_size, no_imgnorm, split_size, position_embed_size, "area", position_init)
        self.fc_whole = self.linear(img_dim, embed_size)
        self.need_box_whole = need_box_whole

    def position_feature(self, images, boxes):
        """p of every region: (B, R, img_dim) and (B, R or with need_box_whole R - 1, 30 | 31) → (B, R, 200)."""
        p = super().position_feature(images, boxes)
        if not self.need_box_whole:
            return p
        everywhere = self.position_embedding.weight.mean(0).expand(len(p), 1, -1)
        return torch.cat([p[:, : images.shape[1] - 1], everywhere], 1)

    def forward(self, images, whole_images, boxes=None):
        """images (B, R, img_dim), whole_images (B, img_dim), boxes (B, R, 30 | 31) → (B, R, D), (B, D)."""
        whole = at_least_float32(self.fc_whole(at_least_float32(whole_images)))
        return super().forward(images, boxes), whole if self.no_imgnorm else l2norm(whole, dim=1)


class EncoderImageWeightNormPrecomp(EncoderImagePrecomp):
    """EncoderImagePrecomp with a weight-normalised fc and fc_whole."""

    linear = model.EncoderImageWeightNormPrecomp.linear


ENCODERS = {"basic": EncoderImagePrecomp, "weight_norm": EncoderImageWeightNormPrecomp}


class EncoderText(model.EncoderText):
    """Word ids → word embeddings, and the sentence embedding: the mean of the last layer's final GRU states."""

    def forward(self, x, lengths):
        """x (B, W) word ids, lengths (B ints) → words (B, W, D), zero behind a caption's end, lengths, and (B, D)."""
        words, state = self.run_gru(x, lengths)
        final = at_least_float32(state[-2:]).mean(0) if self.use_bi_gru else at_least_float32(state[-1])
        return words, lengths, final if self.no_txtnorm else l2norm(final, dim=1)


# ---------------------------------------------------------------- scores


def cosine(x, y, pairs=None):
    """Cosines of the rows of x (I, D) and y (C, D): all (I, C), or those of the pairs (P, 2) only, (P,)."""
    if pairs is None:
        return x @ y.T / (norm(x, 1)[:, None] * norm(y, 1)).clamp(min=EPS)
    return cosine_similarity(x[pairs[:, 0]], y[pairs[:, 1]]).reshape(len(pairs))


def score(images, whole_images, captions, cap_lens, final_captions, opt, cross_attn=None, pairs=None):
    """Scores (I, C), or (P,) of the pairs (P, 2) only.

    images (I, R, D), whole_images (I, D), captions (C, W, D), cap_lens (C ints), final_captions (C, D). cross_attn:
    opt's where None. In t2i with need_box_whole the last region takes no part in the attention;
    0.5 · cos(last region, sentence) is added instead.
    """
    config = ScoreConfig.of(opt, cross_attn, max_term=True)
    whole = option(opt, "lambda_whole") * cosine(whole_images, final_captions, pairs)
    if config.t2i and option(opt, "need_box_whole"):
        whole = whole + 0.5 * cosine(images[:, -1], final_captions, pairs)
        images = images[:, :-1]
    return xattn_score(images, captions, cap_lens, config, pairs) + whole


xattn_score_t2i = partial(score, cross_attn="t2i")  # words attend to regions
xattn_score_i2t = partial(score, cross_attn="i2t")  # regions attend to words


class ContrastiveLoss(model.ContrastiveLoss):
    """The root's hinge loss; its arguments are what forward_emb returns."""

    def xattn_score(self, im, whole_im, s, s_l, final_s, pairs=None):
        return score(im, whole_im, s, s_l, final_s, self.opt, pairs=pairs)


# ---------------------------------------------------------------- the model


class SCAN(model.SCAN):
    """The root's model with the whole-image branch."""

    dataset, vocabulary, text_encoder, whole_image = PrecompDataset, Vocabulary, EncoderText, True

    def make_img_enc(self, opt):
        if getattr(opt, "position", "area") != "area":
            raise InputError(f"--position {opt.position}: expected area, the whole-image model's only one")
        flags = {name: option(opt, name) for name in ("need_box_whole", "position_init")}
        return EncoderImage("", opt.img_dim, opt.embed_size, opt.precomp_enc_type, opt.no_imgnorm, **flags)

    def encode_images(self, images, whole_images, boxes):
        """images (B, R, img_dim), whole_images (B, img_dim), boxes (B, R, 30 | 31) → (B, R, D), (B, D)."""
        with self.autocast():
            return self.img_enc(*(to_device(x, self.device) for x in (images, whole_images, boxes)))

    def forward_emb(self, images, whole_images, boxes, captions, lengths, volatile=False):
        """A batch as collate_fn gives it → img_emb (B, R, D), whole_img_emb (B, D), cap_emb (B, W, D), cap_lens,
        final_cap_emb (B, D). volatile: no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile):
            return *self.encode_images(images, whole_images, boxes), *self.encode_captions(captions, lengths)

    def score(self, img_emb, whole_img_emb, cap_emb, cap_lens, final_cap_emb, pairs=None, cross_attn=None):
        """Scores (I, C) of what forward_emb returns, or (P,) of the pairs (P, 2) only. cross_attn: opt's where None."""
        return score(img_emb, whole_img_emb, cap_emb, cap_lens, final_cap_emb, self.opt, cross_attn, pairs)

    def train_emb(self, images, whole_images, boxes, captions, lengths, ids=None, *args):
        """One training step on a batch as collate_fn gives it. Returns the loss."""
        return self.step((images, whole_images, boxes, captions, lengths), ids)


def load_model(path, vocab_size=None, **overrides):
    """The whole-image model of a checkpoint, ready to evaluate; see the root's load_model."""
    return model.load_model(path, vocab_size, SCAN, **overrides)
