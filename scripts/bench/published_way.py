"""The published way of computing PFAN, which scripts/benchmark.py measures this project's code against.

One caption at a time, expanded to every image, with contexts of D dimensions; every image encoded once per caption;
float64 embeddings at evaluation; the loss computed for each encoded batch and the loader read twice; the whole B × B
loss with autograd; a scalar loop over the cells of each box. Formulas: Lee et al., Stacked Cross Attention for
Image-Text Matching, ECCV 2018; Wang et al., Position Focused Attention Network for Image-Text Matching, IJCAI 2019.
Position attention, clipped_l2norm and a bi-GRU only. Sizes in the docstrings: I images of R regions, D embed_size.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from data import collate_fn

EPS = 1e-8


def position_grid(box, height, width, n=16, top_n=15):
    """One box x1, y1, x2, y2 in pixels → a list of top_n cells, top_n weights and the box's share of the image."""
    x1, y1, x2, y2 = box
    cell_width, cell_height = width / n, height / n
    areas = []
    for column in range(n):
        for row in range(n):
            w = min(x2, (column + 1) * cell_width) - max(x1, column * cell_width)
            h = min(y2, (row + 1) * cell_height) - max(y1, row * cell_height)
            if w > 0 and h > 0:
                areas.append((w * h, column * n + row))
    areas = sorted(areas, reverse=True)[:top_n]
    total = sum(area for area, _ in areas)
    unused = top_n - len(areas)
    cells = [cell for _, cell in areas] + [n * n] * unused
    weights = [area / total for area, _ in areas] + [0.0] * unused
    return cells + weights + [(x2 - x1) * (y2 - y1) / (width * height)]


def position_grids(boxes, sizes):
    """Boxes (n, R, 4), heights and widths (n, 2) → (n, R, 31)."""
    pairs = zip(boxes.tolist(), sizes.tolist(), strict=True)
    return np.array([[position_grid(box, *size) for box in image] for image, size in pairs], dtype=np.float32)


def l2norm(X, dim):
    return X / (torch.pow(X, 2).sum(dim=dim, keepdim=True).sqrt() + EPS)


class EncoderImage(nn.Module):
    """Region features and position grids → region embeddings, with the parameters of model.EncoderImage."""

    def __init__(self, img_dim, embed_size, position_dim=200):
        super().__init__()
        self.fc = nn.Linear(img_dim + position_dim, embed_size)
        self.fc_att = nn.Linear(img_dim, position_dim)
        self.position_embedding = nn.Embedding(257, position_dim)

    def forward(self, images, boxes):
        cells = self.position_embedding(boxes[:, :, :15].long())  # (B, R, 15, 200)
        query = self.fc_att(images).unsqueeze(2).expand_as(cells)
        attention = torch.softmax(torch.tanh((query * cells).sum(3)), 2)
        weights = torch.softmax(boxes[:, :, 15:30] * attention, 2)
        position = (weights.unsqueeze(3).expand_as(cells) * cells).sum(2)
        return l2norm(self.fc(torch.cat([images, position], 2)), 2)


class EncoderText(nn.Module):
    """Word ids → word embeddings, with the parameters of model.EncoderText."""

    def __init__(self, vocab_size, word_dim, embed_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)
        self.rnn = nn.GRU(word_dim, embed_size, batch_first=True, bidirectional=True)

    def forward(self, captions, lengths):
        packed = pack_padded_sequence(self.embed(captions), lengths, batch_first=True)
        words, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        half = words.size(2) // 2
        return l2norm((words[:, :, :half] + words[:, :, half:]) / 2, 2)


def func_attention(query, context, smooth):
    """query (I, K, D), context (I, L, D) → attended contexts (I, K, D), attention (I, K, L)."""
    attention = torch.bmm(context, query.transpose(1, 2))
    attention = l2norm(nn.functional.leaky_relu(attention, 0.1), 2)
    attention = torch.softmax(attention.transpose(1, 2).contiguous() * smooth, 2)
    attended = torch.bmm(context.transpose(1, 2), attention.transpose(1, 2).contiguous())
    return attended.transpose(1, 2), attention


def aggregate(r, opt):
    if opt.agg_func == "LogSumExp":
        return torch.log(torch.exp(r * opt.lambda_lse).sum(1, keepdim=True)) / opt.lambda_lse
    return r.mean(1, keepdim=True)


def xattn_score(images, captions, cap_lens, opt):
    """Scores (I, C) of images (I, R, D) with padded captions (C, W, D), a caption at a time."""
    scores = []
    for caption, n_words in zip(captions, cap_lens, strict=True):
        words = caption[:n_words].unsqueeze(0).repeat(len(images), 1, 1)
        query, context = (words, images) if opt.cross_attn == "t2i" else (images, words)
        attended, attention = func_attention(query, context, opt.lambda_softmax)
        w1, w2 = query.norm(2, 2), attended.norm(2, 2)
        score = aggregate((query * attended).sum(2) / (w1 * w2).clamp(min=EPS), opt)
        if opt.cross_attn == "t2i":
            score = score + 0.5 * aggregate(attention.max(2)[0], opt)
        scores.append(score)
    return torch.cat(scores, 1)


def contrastive_loss(images, captions, cap_lens, opt):
    """Hinge loss of all B × B pairs."""
    scores = xattn_score(images, captions, cap_lens, opt)
    right = scores.diag().view(-1, 1)
    cost_s = (opt.margin + scores - right.expand_as(scores)).clamp(min=0)
    cost_im = (opt.margin + scores - right.t().expand_as(scores)).clamp(min=0)
    diagonal = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    cost_s, cost_im = cost_s.masked_fill(diagonal, 0), cost_im.masked_fill(diagonal, 0)
    if opt.max_violation:
        cost_s, cost_im = cost_s.max(1)[0], cost_im.max(0)[0]
    return cost_s.sum() + cost_im.sum()


class Model:
    """Both encoders and the optimizer; takes model.SCAN's state_dict."""

    def __init__(self, opt, device="cpu"):
        self.opt, self.device = opt, device
        self.img_enc = EncoderImage(opt.img_dim, opt.embed_size).to(device)
        self.txt_enc = EncoderText(opt.vocab_size, opt.word_dim, opt.embed_size).to(device)
        self.params = [*self.txt_enc.parameters(), *self.img_enc.parameters()]
        self.optimizer = torch.optim.Adam(self.params, lr=opt.learning_rate, foreach=False)

    def load_state_dict(self, state):
        self.img_enc.load_state_dict(state[0])
        self.txt_enc.load_state_dict(state[1])

    def forward_emb(self, images, boxes, captions, lengths):
        images = self.img_enc(images.to(self.device), boxes.to(self.device))
        return images, self.txt_enc(captions.to(self.device), lengths), lengths

    def train_emb(self, images, boxes, captions, lengths):
        """One training step; returns the loss."""
        self.optimizer.zero_grad()
        loss = contrastive_loss(*self.forward_emb(images, boxes, captions, lengths), self.opt)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, self.opt.grad_clip)
        self.optimizer.step()
        return loss.item()


class Pairs(torch.utils.data.Dataset):
    """One item per caption; all features read into memory."""

    def __init__(self, prefix, vocab, n_pairs):
        self.vocab, self.n_pairs = vocab, n_pairs
        self.images, self.boxes = (
            np.load(f"{prefix}_{name}.npy", allow_pickle=False)  # noqa: TID251
            for name in ("ims", "boxes")
        )
        with open(f"{prefix}_caps.txt", encoding="utf-8") as file:
            self.captions = [line.strip() for line in file]
        self.im_div = len(self.captions) // len(self.images)

    def __getitem__(self, index):
        image, box = (torch.tensor(x[index // self.im_div]) for x in (self.images, self.boxes))
        return image, box, torch.tensor(self.vocab.encode(self.captions[index])), index, index // self.im_div

    def __len__(self):
        return self.n_pairs


def get_loader(prefix, vocab, batch_size, n_pairs):
    """Loader of the first n_pairs pairs of a split, in order."""
    return torch.utils.data.DataLoader(Pairs(prefix, vocab, n_pairs), batch_size, collate_fn=collate_fn)


@torch.no_grad()
def encode_data(model, loader):
    """Image embeddings (n_pairs, R, D) and caption embeddings (n_pairs, W, D), float64 numpy; lengths (list)."""
    n, max_words, img_embs = len(loader.dataset), 0, None
    for _, _, _, lengths, _ in loader:
        max_words = max(max_words, max(lengths))
    cap_lens = [0] * n
    for images, boxes, captions, lengths, ids in loader:
        img_emb, cap_emb, _ = model.forward_emb(images, boxes, captions, lengths)
        if img_embs is None:
            img_embs = np.zeros((n, img_emb.size(1), img_emb.size(2)))
            cap_embs = np.zeros((n, max_words, cap_emb.size(2)))
        img_embs[list(ids)] = img_emb.cpu().numpy()
        cap_embs[list(ids), : max(lengths)] = cap_emb.cpu().numpy()
        for index, length in zip(ids, lengths, strict=True):
            cap_lens[index] = length
        contrastive_loss(img_emb, cap_emb, lengths, model.opt).item()
    return img_embs, cap_embs, cap_lens


@torch.no_grad()
def shard_xattn(images, captions, cap_lens, opt, shard_size=128, device="cpu"):
    """Scores (I, C) float64 of float64 embeddings, a shard of images × a shard of captions at a time."""
    sims = np.zeros((len(images), len(captions)))
    for i in range(0, len(images), shard_size):
        for c in range(0, len(captions), shard_size):
            rows, columns = slice(i, i + shard_size), slice(c, c + shard_size)
            im, s = torch.from_numpy(images[rows]).to(device), torch.from_numpy(captions[columns]).to(device)
            sims[rows, columns] = xattn_score(im, s, cap_lens[columns], opt).cpu().numpy()
    return sims


def ranks(sims, per_image):
    """i2t ranks (I,) and t2i ranks (C,), from 0, of scores (I, C) by sorting each row and each column."""
    i2t, t2i = np.zeros(len(sims)), np.zeros(sims.shape[1])
    for image, row in enumerate(sims):
        order = np.argsort(row)[::-1]
        right = range(per_image * image, per_image * (image + 1))
        i2t[image] = min(np.where(order == caption)[0][0] for caption in right)
    for caption, column in enumerate(sims.T):
        order = np.argsort(column)[::-1]
        t2i[caption] = np.where(order == caption // per_image)[0][0]
    return i2t, t2i
