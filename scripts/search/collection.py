"""Sentence → images and image → captions in an encoded split, exactly or in two stages.

Sizes in the docstrings: n images of R regions, W words, D embed_size.
"""

import numpy as np
import torch

from evaluation import embed_captions, embed_images
from lib.errors import InputError
from lib.gpu import resident
from lib.tensors import pad_rows
from model import func_attention

IMAGE_BLOCK = 1024  # images that are scored at once, at most
CAPTION_BLOCK = 4096  # captions that are scored at once


class Collection:
    """One model's embeddings of a split, and the search in them.

    model, vocab: encode sentences. images (n, R, D); words (ΣW_i, D), the captions' words one after the other; lens
    (n_captions,): tensors or memory-mapped arrays, of any float type. first_stage: a FirstStage, or None to score
    everything exactly.
    """

    def __init__(self, model, vocab, images, words, lens, first_stage=None):
        self.model, self.vocab, self.first_stage = model, vocab, first_stage
        self.images, self.words = (resident(x, model.device) for x in (images, words))
        self.lens = np.asarray(lens)
        self.starts = np.cumsum([0, *self.lens])

    @classmethod
    def encode(cls, model, loader):
        """The collection of a loader's data set, in memory."""
        return cls(model, loader.dataset.vocab, *embed_images(model, loader), *embed_captions(model, loader))

    @torch.no_grad()
    def embed(self, sentence):
        """Word embeddings (W, D) of a sentence (str), <start> and <end> included."""
        ids = torch.tensor([self.vocab.encode(sentence)])
        return self.model.encode_captions(ids, [ids.shape[1]])[0][0]

    def words_of(self, captions):
        """Word embeddings (ΣW_i, D) of the captions of these ascending indices, one after the other."""
        rows = slice(self.starts[captions[0]], self.starts[captions[-1] + 1])  # which copies nothing
        if captions[-1] - captions[0] + 1 != len(captions):
            rows = np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in captions])
        return self.tensor(self.words[rows])

    def image(self, index):
        """Region embeddings (R, D) of an image."""
        return self.tensor(self.images[index])

    def tensor(self, rows):
        rows = rows if isinstance(rows, torch.Tensor) else torch.from_numpy(np.array(rows))
        return rows.to(self.model.device, torch.float32)

    def score(self, images, words, lens):
        """Exact scores (images, captions) of regions (n, R, D) and words (ΣW_i, D), numpy."""
        return self.model.score(images, pad_rows(words, torch.as_tensor(lens)), lens).cpu().numpy()

    @torch.no_grad()
    def score_images(self, words, rows=None):
        """Exact scores float32 of a sentence's words (W, D) with all images (n,), or with rows (len(rows),)."""
        scores = []
        for start in range(0, len(self.images) if rows is None else len(rows), IMAGE_BLOCK):
            block = slice(start, start + IMAGE_BLOCK)
            images = self.tensor(self.images[block if rows is None else rows[block]])
            scores.append(self.score(images, words, [len(words)])[:, 0])
        return np.concatenate(scores)

    @torch.no_grad()
    def score_captions(self, image, rows=None):
        """Exact scores float32 of an image's regions (R, D) with all captions (n_captions,), or with rows."""
        rows = np.arange(len(self.lens)) if rows is None else rows
        scores = [np.zeros(0, np.float32)]
        for start in range(0, len(rows), CAPTION_BLOCK):
            block = rows[start : start + CAPTION_BLOCK]
            scores.append(self.score(image[None], self.words_of(block), self.lens[block])[0])
        return np.concatenate(scores)

    def search(self, sentence, k=10, candidates=1000):
        """The best k images for a sentence: their indices (k,) and scores (k,), best first; k None: all.

        With a first stage, only its candidates are scored exactly.
        """
        words = self.embed(sentence)
        rows = None if self.first_stage is None else self.first_stage.images(words, candidates)
        return best(self.score_images(words, rows), rows, k)

    def search_captions(self, image, k=10, candidates=1000):
        """The best k captions for an image's regions (R, D): their indices (k,) and scores (k,), best first."""
        rows = None if self.first_stage is None else self.first_stage.captions(image, candidates)
        return best(self.score_captions(image, rows), rows, k)

    @torch.no_grad()
    def attention(self, image, words):
        """Attention between an image's regions (R, D) and a sentence's words (W, D), numpy.

        Returns t2i (W, R) and i2t (R, W), each row with the sum 1.
        """
        opt = self.model.opt
        sides = (words, image), (image, words)
        both = [func_attention(query[None], context[None], opt, opt.lambda_softmax)[1][0].T for query, context in sides]
        return [attention.cpu().numpy() for attention in both]


def best(scores: np.ndarray, rows: np.ndarray | None, k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices (k,) and scores (k,) of the k largest scores (n,), best first; k None: all. rows: the scores' indices."""
    order = np.argsort(-scores, kind="stable")[:k]
    return order if rows is None else rows[order], scores[order]


# ---------------------------------------------------------------- the words of a sentence


def known_words(vocab, sentence):
    """The different tokens of a sentence that have a letter or a digit, in their order: {word: whether known}."""
    words = [token for token in vocab.tokenize(sentence) if any(map(str.isalnum, token))]
    return {word: word in vocab.word2idx for word in words}


def check_query(vocab, sentence, flag):
    """Print the words of a sentence that are not in the vocabulary.

    Raises InputError, naming the flag, where the sentence has no word or none that the vocabulary has.
    """
    words = known_words(vocab, sentence)
    if not any(words.values()):
        found = ", ".join(words)[:200] or "no word"
        raise InputError(f"{flag}: found {found}, expected at least one word of the vocabulary")
    if unknown := [word for word, known in words.items() if not known]:
        print(f"not in the vocabulary, read as <unk>: {', '.join(unknown)}")
