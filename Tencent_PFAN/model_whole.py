"""The whole-image model: PFAN-P (area-weighted positions) and a branch that compares whole image and sentence.

score = the root's cross attention, with the 0.5 · max-attention term in t2i and i2t alike,
        + λ_whole · cos(fc_whole(whole image), mean of the two final GRU states).
Sizes in the docstrings: B a batch, R regions (36), W words, D embed_size, I images and C captions, P pairs.
"""

import torch

import model
from lib.errors import InputError
from lib.options import option
from lib.tensors import EPS, at_least_float32, send
from model import LINEAR, Attention, l1norm, l2norm, xattn_score  # noqa: F401 (l1norm: one of SCAN's names)


class EncoderImage(model.EncoderImage):
    """Region features and position grids → region embeddings; whole-image features → whole-image embeddings.

    With need_box_whole the last region is the whole image: its position feature is the mean of all 257 cells'.
    """

    def __init__(self, img_dim, embed_size, precomp_enc_type="basic", no_imgnorm=False, need_box_whole=False):
        super().__init__(img_dim, embed_size, precomp_enc_type, no_imgnorm, position="area")
        self.fc_whole = LINEAR[precomp_enc_type](img_dim, embed_size)
        self.need_box_whole = need_box_whole

    def position_feature(self, images, boxes):
        """p of every region: (B, R, img_dim) and (B, R or with need_box_whole R - 1, 30 | 31) → (B, R, 200)."""
        p = super().position_feature(images, boxes)
        if not self.need_box_whole:
            return p
        everywhere = self.position_embedding.weight.mean(0).expand(len(p), 1, -1)
        return torch.cat([p[:, : images.shape[1] - 1], everywhere], 1)

    def forward(self, images, whole_images, boxes):
        """images (B, R, img_dim), whole_images (B, img_dim), boxes (B, R, 30 | 31) → (B, R, D), (B, D)."""
        whole = at_least_float32(self.fc_whole(at_least_float32(whole_images)))
        return super().forward(images, boxes), whole if self.no_imgnorm else l2norm(whole, dim=1)


class EncoderText(model.EncoderText):
    """Word ids → word embeddings, and the sentence embedding: the mean of the last layer's final GRU states."""

    def forward(self, captions, lengths):
        """captions (B, W) ids, lengths (B ints) → (B, W, D), zero behind a caption's end, and (B, D)."""
        words, state = self.run_gru(captions, lengths)
        final = at_least_float32(state[-2:]).mean(0) if self.use_bi_gru else at_least_float32(state[-1])
        return words, final if self.no_txtnorm else l2norm(final, dim=1)


# ---------------------------------------------------------------- scores


def cosine(x, y, pairs=None):
    """Cosines of the rows of x (I, D) and y (C, D): all (I, C), or those of the pairs (P, 2) only, (P,)."""
    x_norm, y_norm = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(y, dim=1)
    if pairs is None:
        return x @ y.T / (x_norm[:, None] * y_norm).clamp(min=EPS)
    i, c = pairs.T
    return (x[i] * y[c]).sum(1) / (x_norm[i] * y_norm[c]).clamp(min=EPS)


def split_box_whole(images, opt, t2i):
    """Regions that take part in attention, and the whole image's (I, D) that does not: need_box_whole's, in t2i."""
    return (images[:, :-1], images[:, -1]) if t2i and option(opt, "need_box_whole") else (images, None)


def region_score(images, captions, cap_lens, opt, t2i, pairs=None):
    """Cross attention of regions and words: all scores (I, C), or those of the pairs only, (P,)."""
    regions, _ = split_box_whole(images, opt, t2i)
    return xattn_score(regions, captions, cap_lens, Attention(opt, t2i, max_term=True), pairs)


def whole_score(images, whole_images, final_captions, opt, t2i, pairs=None):
    """λ_whole · cos(whole image, sentence), in t2i with need_box_whole also 0.5 · cos(last region, sentence)."""
    scores = option(opt, "lambda_whole") * cosine(whole_images, final_captions, pairs)
    _, box_whole = split_box_whole(images, opt, t2i)
    return scores if box_whole is None else scores + 0.5 * cosine(box_whole, final_captions, pairs)


def score(images, whole_images, captions, cap_lens, final_captions, opt, t2i, pairs=None):
    """Scores (I, C), or (P,) of the pairs (P, 2) only.

    images (I, R, D), whole_images (I, D), captions (C, W, D), cap_lens (C ints), final_captions (C, D).
    """
    regions = region_score(images, captions, cap_lens, opt, t2i, pairs)
    return regions + whole_score(images, whole_images, final_captions, opt, t2i, pairs)


def xattn_score_t2i(images, whole_images, captions, cap_lens, final_captions, opt):
    """Words attend to regions: scores (n_image, n_caption) of what score takes."""
    return score(images, whole_images, captions, cap_lens, final_captions, opt, t2i=True)


def xattn_score_i2t(images, whole_images, captions, cap_lens, final_captions, opt):
    """Regions attend to words: scores (n_image, n_caption) of what score takes."""
    return score(images, whole_images, captions, cap_lens, final_captions, opt, t2i=False)


XATTN_SCORE = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}


class ContrastiveLoss(model.ContrastiveLoss):
    """The root's hinge loss over the whole-image scores; its arguments are what forward_emb returns."""

    n_image_embeddings = 2

    def score(self, im, whole_im, s, s_l, final_s, pairs=None):
        return score(im, whole_im, s, s_l, final_s, self.opt, self.opt.cross_attn == "t2i", pairs)


# ---------------------------------------------------------------- the model


class SCAN(model.SCAN):
    """The root's model with the whole-image branch."""

    text_encoder, loss = EncoderText, ContrastiveLoss

    def make_img_enc(self, opt):
        if getattr(opt, "position", "area") != "area":
            raise InputError(f"--position {opt.position}: expected area, the whole-image model's only one")
        return EncoderImage(
            opt.img_dim, opt.embed_size, opt.precomp_enc_type, opt.no_imgnorm, option(opt, "need_box_whole")
        )

    def encode_images(self, images, whole_images, boxes):
        """images (B, R, img_dim), whole_images (B, img_dim), boxes (B, R, 30 | 31) → (B, R, D), (B, D)."""
        with self.autocast():
            return self.img_enc(*(send(x, self.device) for x in (images, whole_images, boxes)))

    def forward_emb(self, images, whole_images, boxes, captions, lengths, volatile=False):
        """A batch as collate_fn gives it → img_emb (B, R, D), whole_img_emb (B, D), cap_emb (B, W, D), cap_lens,
        final_cap_emb (B, D). volatile: no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not volatile):
            img_emb, whole_img_emb = self.encode_images(images, whole_images, boxes)
            cap_emb, final_cap_emb = self.encode_captions(captions, lengths)
        return img_emb, whole_img_emb, cap_emb, lengths, final_cap_emb

    def train_emb(self, images, whole_images, boxes, captions, lengths, ids=None, *args):
        """One training step on a batch as collate_fn gives it. Returns the loss."""
        return self.step(images, whole_images, boxes, captions, lengths)


def load_model(path, vocab_size=None, **overrides):
    """The whole-image model of a checkpoint, ready to evaluate; see the root's load_model."""
    return model.load_model(path, vocab_size, SCAN, **overrides)
