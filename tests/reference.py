"""The model's formulas in float64, one region, one image and one caption at a time: slow, and apart from model.py.

Cross attention, its normalisations and aggregations, and the loss: Lee et al., Stacked Cross Attention for
Image-Text Matching, ECCV 2018. Position features and the 0.5 · max-attention term: Wang et al., Position Focused
Attention Network for Image-Text Matching, IJCAI 2019. GRU: Cho et al., EMNLP 2014. Sums over the 15 cells of a region
include the unused ones; 1e-8 is added to norms and is the floor of the cosine's denominator.
"""

import numpy as np
import torch

EPS = 1e-8


def length(x):
    """Euclidean length of a vector; its gradient at the zero vector is zero."""
    return torch.linalg.vector_norm(x)


def unit(x):
    return x / (length(x) + EPS)


def cosine(x, y):
    return (x * y).sum() / (length(x) * length(y)).clamp(min=EPS)


# ---------------------------------------------------------------- encoders


def position_feature(state, feature, box, position):
    """p (200,) of one region: feature (img_dim,), box (30 | 31,), state the image encoder's parameters."""
    table = state["position_embedding.weight"]
    query = state["fc_att.weight"] @ feature + state["fc_att.bias"] if position == "attention" else None
    cells = [table[int(cell)] for cell in box[:15]]
    weights = box[15:30]
    if position == "attention":
        alpha = softmax(torch.stack([torch.tanh(query @ cell) for cell in cells]))
        weights = softmax(weights * alpha)
    return sum(weight * cell for weight, cell in zip(weights, cells, strict=True))


def region_embedding(state, feature, box, position="attention", norm=True):
    """One region: feature (img_dim,), box (30 | 31,) → (D,)."""
    joined = feature if position == "none" else torch.cat([feature, position_feature(state, feature, box, position)])
    if "fc.weight" in state:
        weight = state["fc.weight"]
    else:  # weight_norm: one length for the whole matrix
        weight = state["fc.weight_g"] * state["fc.weight_v"] / length(state["fc.weight_v"].flatten())
    embedding = weight @ joined + state["fc.bias"]
    return unit(embedding) if norm else embedding


def image_embedding(state, features, boxes, position="attention", norm=True):
    """One image: features (R, img_dim), boxes (R, 30 | 31) → (R, D)."""
    pairs = zip(features, boxes, strict=True)
    return torch.stack([region_embedding(state, feature, box, position, norm) for feature, box in pairs])


def gru_states(state, inputs, suffix):
    """Hidden states (D,), in the order of inputs, of one direction of one layer."""
    w_ih, w_hh, b_ih, b_hh = (
        state[f"rnn.{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden, states = torch.zeros(w_hh.shape[1], dtype=w_hh.dtype), []
    for x in inputs:
        (r_x, z_x, n_x), (r_h, z_h, n_h) = (w_ih @ x + b_ih).chunk(3), (w_hh @ hidden + b_hh).chunk(3)
        reset, update = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        hidden = (1 - update) * torch.tanh(n_x + reset * n_h) + update * hidden
        states.append(hidden)
    return states


def caption_embedding(state, ids, num_layers=1, bi_gru=True, norm=True):
    """One caption: ids (W,) → (W, D)."""
    inputs = [state["embed.weight"][int(word)] for word in ids]
    for layer in range(num_layers):
        forward = gru_states(state, inputs, f"l{layer}")
        backward = gru_states(state, inputs[::-1], f"l{layer}_reverse")[::-1] if bi_gru else []
        inputs = [torch.cat(pair) for pair in zip(forward, backward, strict=True)] if bi_gru else forward
    words = [(f + b) / 2 for f, b in zip(forward, backward, strict=True)] if bi_gru else forward
    return torch.stack([unit(word) for word in words] if norm else words)


# ---------------------------------------------------------------- cross attention


def softmax(x):
    e = torch.exp(x - x.max().detach())
    return e / e.sum()


def leaky(x):
    return torch.where(x > 0, x, 0.1 * x)


NORMALISE = {
    "softmax": softmax,
    "l2norm": unit,
    "clipped_l2norm": lambda x: unit(leaky(x)),
    "l1norm": lambda x: x / (x.abs().sum() + EPS),
    "clipped_l1norm": lambda x: leaky(x) / (leaky(x).abs().sum() + EPS),
    "clipped": leaky,
    "no_norm": lambda x: x,
}


def aggregate(values, opt):
    values = torch.stack(values)
    if opt.agg_func == "LogSumExp":
        return torch.log(torch.exp(opt.lambda_lse * values).sum()) / opt.lambda_lse
    return {"Mean": values.mean(), "Sum": values.sum(), "Max": values.max()}[opt.agg_func]


def relevance(queries, context, opt):
    """Each query (of K) attends to the context's L elements: K cosines with its attended context, K attentions (L,)."""
    normalise = NORMALISE[opt.raw_feature_norm]
    normalised = torch.stack([normalise(torch.stack([query @ element for query in queries])) for element in context])
    attentions = [softmax(opt.lambda_softmax * column) for column in normalised.T]
    attended = [sum(a * element for a, element in zip(row, context, strict=True)) for row in attentions]
    return [cosine(query, vector) for query, vector in zip(queries, attended, strict=True)], attentions


def score_t2i(regions, words, opt, attention_term=True):
    """Words attend to regions: one image (R, D), one caption (W, D)."""
    cosines, attentions = relevance(words, regions, opt)
    score = aggregate(cosines, opt)
    return score + 0.5 * aggregate([a.max() for a in attentions], opt) if attention_term else score


def score_i2t(regions, words, opt):
    """Regions attend to words: one image (R, D), one caption (W, D)."""
    return aggregate(relevance(regions, words, opt)[0], opt)


def scores(images, captions, lens, opt, attention_term=True):
    """All pairs: images (I, R, D), captions (C, W, D) padded → (I, C)."""
    words = [caption[:n] for caption, n in zip(captions, lens, strict=True)]
    if opt.cross_attn == "t2i":
        rows = [[score_t2i(image, caption, opt, attention_term) for caption in words] for image in images]
    else:
        rows = [[score_i2t(image, caption, opt) for caption in words] for image in images]
    return torch.stack([torch.stack(row) for row in rows])


def loss(scores, margin, max_violation):
    """Hinge loss of a square score matrix, pair by pair."""
    total = scores.sum() * 0
    for i in range(len(scores)):
        others = [j for j in range(len(scores)) if j != i]
        for wrong in ([scores[i, j] for j in others], [scores[j, i] for j in others]):
            costs = [(margin + score - scores[i, i]).clamp(min=0) for score in wrong]
            total = total + (max(costs) if max_violation and costs else sum(costs))
    return total


# ---------------------------------------------------------------- grids and ranks


def cell_areas(box, height, width, n=16):
    """Pixels (n·n,) of each cell, column·n + row, that a box x1, y1, x2, y2 covers."""
    x1, y1, x2, y2 = box
    areas = [
        max(0.0, min(x2, (column + 1) * width / n) - max(x1, column * width / n))
        * max(0.0, min(y2, (row + 1) * height / n) - max(y1, row * height / n))
        for column in range(n)
        for row in range(n)
    ]
    return np.array(areas)


def ranks(sims):
    """i2t ranks, from 0: the place of a row's first right column, wrong columns of the same score before right ones."""
    n, m = sims.shape
    right = [set(range(i * m // n, (i + 1) * m // n)) if m >= n else {i * m // n} for i in range(n)]
    found = []
    for row, group in zip(sims, right, strict=True):
        order = sorted(range(m), key=lambda j: (-row[j], j in group))
        found.append(next(place for place, j in enumerate(order) if j in group))
    return np.array(found)


def recalls(ranks):
    """(R@1, R@5, R@10, median rank, mean rank) of ranks from 0: recalls in percent, the median rounded down."""
    hits = [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]
    middle = sorted(ranks)
    median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
    return (*hits, int(median) + 1, sum(ranks) / len(ranks) + 1)
