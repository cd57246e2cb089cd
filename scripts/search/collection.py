"""Sentence → pictures and picture → captions in an encoded split: all of it, or the best of a first stage exactly.

Sizes in the docstrings: n pictures of R regions, W words, D embed_size.
"""

import numpy as np
import torch

from evaluation import encode_data
from lib.cross_attention import KERNEL_FROM, XATTN_SCORE, pair_attention

BLOCK = 1024  # pictures that are scored at once, at most
CAPTION_BLOCK = 4096  # captions that are scored at once


class FirstStage:
    """The most promising pictures for a sentence, and captions for a picture.

    What attends (words in t2i, regions in i2t) stands for its nearest anchor. A pair is worth the mean over these of
    how much of the anchor is in the best of what is attended to (regions in t2i, words in i2t).

    anchors: a faiss index of K directions (K, D). nearest (ΣQ,): the anchors of all that attends in the collection,
    starts (captions + 1,) in t2i, (pictures + 1,) in i2t: where each one's begin. table (K, n): the largest dot product
    of an anchor with the regions of each of n pictures in t2i, the words of each of n captions in i2t.
    """

    def __init__(self, t2i, anchors, nearest, starts, table):
        self.t2i, self.anchors, self.nearest, self.starts, self.table = t2i, anchors, nearest, starts, table

    def images(self, words, count):
        """The numbers of the best count pictures for words (W, D), in ascending order."""
        return self.attended(words, count) if self.t2i else self.attending(words, count)

    def captions(self, regions, count):
        """The numbers of the best count captions for regions (R, D), in ascending order."""
        return self.attending(regions, count) if self.t2i else self.attended(regions, count)

    def attended(self, elements, count):
        """Of what the table holds, the best for elements (E, D) that attend: E of its rows are read."""
        _, nearest = self.anchors.search(elements.cpu().numpy(), 1)
        sums = np.zeros(self.table.shape[1], dtype=np.float32)
        for anchor in nearest[:, 0]:
            sums += self.table[anchor]
        return largest(sums, count)

    def attending(self, elements, count):
        """Of what attends, the best for elements (E, D) that are attended to."""
        anchors = self.anchors.reconstruct_n(0, self.anchors.ntotal)
        strengths = (anchors @ elements.cpu().numpy().T).max(1)
        sums = np.add.reduceat(strengths[self.nearest], self.starts[:-1])
        return largest(sums / np.diff(self.starts), count)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The indices of the largest count values (n,), in ascending order."""
    count = min(count, len(values))
    return np.sort(np.argpartition(-values, count - 1)[:count])


def best_of(scores: np.ndarray, rows: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of scores (n,) of all rows, or of some, the best k: their numbers and scores, best first."""
    best = np.argsort(-scores, kind="stable")[:k]
    return best if rows is None else rows[best], scores[best]


class Collection:
    """The embeddings that one model gives a split, and the search in them.

    model, vocab: what encodes sentences. images (n, R, D), words (ΣW_i, D), the captions' words one after the other,
    lens (n_captions,): tensors or memory-mapped arrays, of any float type. first_stage: a FirstStage, or None to score
    all.
    """

    def __init__(self, model, vocab, images, words, lens, first_stage=None):
        self.model, self.vocab, self.first_stage = model, vocab, first_stage
        self.images, self.words, self.lens = images, words, np.asarray(lens)
        self.starts = np.cumsum([0, *self.lens])

    @classmethod
    def encode(cls, model, loader):
        """The collection of a loader's data set, in memory."""
        return cls(model, loader.dataset.vocab, *encode_data(model, loader, packed=True))

    @torch.no_grad()
    def embed(self, sentence):
        """The words (W, D) of a sentence (str), with those of <start> and <end>."""
        ids = torch.tensor([self.vocab.encode(sentence)])
        return self.model.encode_captions(ids, [ids.shape[1]])[0]

    def caption(self, number):
        """The words (W, D) of one of the collection's captions."""
        return self.tensor(self.words[self.starts[number] : self.starts[number + 1]])

    def image(self, number):
        """The regions (R, D) of a picture."""
        return self.tensor(self.images[number])

    def tensor(self, rows):
        rows = rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.array(rows))
        return rows.to(self.model.device, torch.float32)

    @torch.no_grad()
    def score_images(self, words, rows=None):
        """Exact scores (n,) float32 numpy of a sentence's words (W, D) with all pictures, or (len(rows),) with some."""
        score, opt, n = XATTN_SCORE[self.model.opt.cross_attn], self.model.opt, len(self.images)
        rows = range(n) if rows is None else rows
        # below the compiled attention's size: for a single sentence it is slower, and compiling it takes a second
        step = max(1, min(BLOCK, (KERNEL_FROM - 1) // (self.images.shape[1] * len(words))))
        scores = np.empty(len(rows), dtype=np.float32)
        for at in range(0, len(rows), step):
            some = rows[at : at + step]
            block = self.tensor(self.images[some.start : some.stop] if isinstance(some, range) else self.images[some])
            scores[at : at + step] = score(block, words, [len(words)], opt)[:, 0].cpu()
        return scores

    @torch.no_grad()
    def score_captions(self, image, rows=None):
        """Exact scores (n_captions,) float32 numpy of a picture's regions (R, D) with all captions, or with some."""
        score, opt = XATTN_SCORE[self.model.opt.cross_attn], self.model.opt
        rows = np.arange(len(self.lens)) if rows is None else rows
        scores = np.empty(len(rows), dtype=np.float32)
        for at in range(0, len(rows), CAPTION_BLOCK):
            some = rows[at : at + CAPTION_BLOCK]
            if some[-1] - some[0] == len(some) - 1:
                words = self.words[self.starts[some[0]] : self.starts[some[-1] + 1]]
            else:
                words = np.concatenate([self.words[self.starts[i] : self.starts[i + 1]] for i in some])
            scores[at : at + CAPTION_BLOCK] = score(image[None], self.tensor(words), self.lens[some], opt)[0].cpu()
        return scores

    def search(self, sentence, k=10, candidates=1000):
        """The best k pictures for a sentence: their numbers (k,) and scores (k,), best first.

        With a first stage, only that many candidates are scored exactly; without, all pictures.
        """
        words = self.embed(sentence)
        rows = None if self.first_stage is None else self.first_stage.images(words, candidates)
        return best_of(self.score_images(words, rows), rows, k)

    def search_captions(self, image, k=10, candidates=1000):
        """The best k captions for a picture's regions (R, D), as search gives pictures for a sentence."""
        rows = None if self.first_stage is None else self.first_stage.captions(image, candidates)
        return best_of(self.score_captions(image, rows), rows, k)

    @torch.no_grad()
    def attention(self, image, words):
        """Of a picture's regions (R, D) and a sentence's words (W, D): t2i (W, R) and i2t (R, W), rows sum to 1."""
        return [pair_attention(image, words, self.model.opt, t2i).cpu().numpy() for t2i in (True, False)]
