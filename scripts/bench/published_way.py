"""The published way of computing PFAN, which scripts/benchmark.py measures this project's code against.

One caption at a time, expanded to every image, with contexts of D dimensions; every image encoded once per caption;
float64 embeddings at evaluation; the loss computed for each encoded batch and the loader read twice; the whole B × B
loss with autograd. Formulas: Lee et al., Stacked Cross Attention for Image-Text Matching, ECCV 2018; Wang et al.,
Position Focused Attention Network for Image-Text Matching, IJCAI 2019. The benchmark's flags only: PFAN-A,
clipped_l2norm, Mean, bi-GRU. Sizes in the docstrings: I images of R regions, C captions, D embed_size.
"""

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import model


class EncoderImage(model.EncoderImagePrecomp):
    def position_feature(self, images, boxes):
        cells = self.position_embedding(boxes[:, :, :15].long())  # (B, R, 15, 200)
        query = self.fc_att(images).unsqueeze(2).expand_as(cells)
        attention = torch.softmax(torch.tanh((query * cells).sum(3)), 2)
        weights = torch.softmax(boxes[:, :, 15:30] * attention, 2)
        return (weights.unsqueeze(3).expand_as(cells) * cells).sum(2)


class EncoderText(model.EncoderText):
    def run_gru(self, x, lengths):
        outputs, state = self.rnn(pack_padded_sequence(self.embed(x), lengths, batch_first=True))
        words, _ = pad_packed_sequence(outputs, batch_first=True)
        half = words.size(2) // 2
        return model.l2norm((words[:, :, :half] + words[:, :, half:]) / 2, 2), state


def xattn_score(images, captions, cap_lens, opt):
    """Scores (I, C) of images (I, R, D) with padded captions (C, W, D), a caption at a time."""
    scores = []
    for caption, n_words in zip(captions, cap_lens, strict=True):
        words = caption[:n_words].unsqueeze(0).repeat(len(images), 1, 1)
        query, context = (words, images) if opt.cross_attn == "t2i" else (images, words)
        attended, _, largest = model.func_attention(query, context, opt, opt.lambda_softmax)
        score = model.cosine_similarity(query, attended, 2).mean(1, keepdim=True)
        if opt.cross_attn == "t2i":
            score = score + 0.5 * largest.mean(1, keepdim=True)
        scores.append(score)
    return torch.cat(scores, 1)


class Published(model.SCAN):
    """model.SCAN that encodes, scores and trains in the published way."""

    text_encoder = EncoderText

    def __init__(self, opt):
        super().__init__(opt)
        self.optimizer = torch.optim.Adam(self.params, lr=opt.learning_rate, foreach=False)

    def make_img_enc(self, opt):
        return EncoderImage(opt.img_dim, opt.embed_size)

    def score(self, img_emb, cap_emb, cap_lens):
        return xattn_score(img_emb, cap_emb, cap_lens, self.opt)

    def forward_loss(self, *embeddings):
        """Hinge loss of all B × B pairs, of which the hardest of each row and column count."""
        scores = self.score(*embeddings)
        diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        cost_s = (self.opt.margin + scores - scores.diag()[:, None]).clamp(min=0).masked_fill(diagonal, 0)
        cost_im = (self.opt.margin + scores - scores.diag()).clamp(min=0).masked_fill(diagonal, 0)
        return cost_s.max(1)[0].sum() + cost_im.max(0)[0].sum()


@torch.no_grad()
def encode_data(model, loader):
    """Image embeddings (n_pairs, R, D) and caption embeddings (n_pairs, W, D), float64 numpy; lengths (list)."""
    n, max_words, img_embs = len(loader.dataset), 0, None
    for _, _, _, lengths, _ in loader:
        max_words = max(max_words, max(lengths))
    cap_lens = [0] * n
    for *batch, ids in loader:
        img_emb, cap_emb, lengths = embeddings = model.forward_emb(*batch)
        if img_embs is None:
            img_embs = np.zeros((n, img_emb.size(1), img_emb.size(2)))
            cap_embs = np.zeros((n, max_words, cap_emb.size(2)))
        img_embs[list(ids)] = img_emb.cpu().numpy()
        cap_embs[list(ids), : max(lengths)] = cap_emb.cpu().numpy()
        for index, length in zip(ids, lengths, strict=True):
            cap_lens[index] = length
        model.forward_loss(*embeddings).item()
    return img_embs, cap_embs, cap_lens
