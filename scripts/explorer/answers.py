"""What the explorer's page asks for, as lists and dicts: searches, attention and position grids of its models."""

import threading

import numpy as np
import torch

from evaluation import load_split
from lib.errors import InputError
from lib.options import option
from lib.report import check_same_split
from lib.web import Refused
from scripts.explorer.images import SplitImages, partners
from scripts.explorer.names import name_models
from scripts.search.build import open_or_build
from scripts.search.collection import Collection, known_words
from vocab import tokenize

MAX_CHARACTERS, MAX_WORDS = 500, 100  # of a sentence
N_EXAMPLES = 12  # captions that the page offers


class Explorer:
    """Models, each with its embeddings of one split.

    opt: explore.py's flags. Raises InputError where a checkpoint, the split or the images cannot be read, or where
    the models' splits are not of the same images, regions and captions.
    """

    def __init__(self, opt):
        self.opt, self.collections, self.datasets = opt, [], []
        for path in opt.model_path:
            self._add_model(path)
        self.captions, self.n_images = self.datasets[0].captions, self.datasets[0].n_images
        self.captions_of_text = {}
        for index, caption in enumerate(self.captions):
            self.captions_of_text.setdefault(normalize(caption), []).append(index)
        self.lock = threading.Lock()  # one computation at a time; the rest waits

    def _add_model(self, path):
        opt = self.opt
        model, loader = load_split(
            path, opt.data_path, opt.vocab_path, opt.split, captions_optional=True, device=opt.device
        )
        dataset = loader.dataset
        if not self.datasets:
            self.images = SplitImages(dataset, opt.images)
        elif dataset.prefix != self.images.prefix:
            check_same_split(path, dataset, self.datasets[0], eccv=False)
            check_same_images(path, dataset, self.images, opt.images)
        self.datasets.append(dataset)
        if dataset.n_images > opt.index_above:
            collection = open_or_build(path, model, loader, opt.split)
        else:
            collection = Collection.encode(model, loader)
        self.collections.append(collection)
        print(f"{path}: {dataset.n_images} images, {len(dataset.captions)} captions", flush=True)

    def about(self):
        """The models, the split and some of its captions."""
        options = [collection.model.opt for collection in self.collections]
        names = name_models(self.opt.model_path, options)
        return {
            "models": [
                {"name": name, "position": option(opt, "position"), "cross_attn": opt.cross_attn}
                for name, opt in zip(names, options, strict=True)
            ],
            "indexed": self.n_images > self.opt.index_above,
            "data": options[0].data_name,
            "split": self.opt.split,
            "images": self.n_images,
            "captions": len(self.captions),
            "files": len(self.images.files),
            "candidates": self.opt.candidates,
            "examples": self.captions[:: max(1, len(self.captions) // N_EXAMPLES)][:N_EXAMPLES],
        }

    # ---- sentence → images

    def search(self, sentence, k):
        """The k images that each model finds for a sentence; where it is a caption, its images are marked.

        Raises Refused.
        """
        self._check_sentence(sentence)
        captions = self.captions_of_text.get(normalize(sentence), ())
        positives = {image for i in captions for image in partners(i, len(self.captions), self.n_images)}

        def describe(image):
            return {"caption": [*self._captions_of(image), ""][0]} | self.look(image)

        models = []
        for collection in self.collections:
            found = np.zeros(0, int), np.zeros(0)
            if any(known_words(collection.vocab, sentence).values()):
                found = collection.search(sentence, None, self.opt.candidates)
            models.append({"tokens": read_tokens(collection, sentence)} | best_of(*found, k, positives, describe))
        return {"sentence": sentence, "positives": sorted(positives), "models": models}

    def _check_sentence(self, sentence):
        """Raise Refused for a sentence that is empty, too long, or of words that no model knows."""
        if len(sentence) > MAX_CHARACTERS or len(tokenize(sentence)) > MAX_WORDS:
            limits = f"{MAX_CHARACTERS} characters and {MAX_WORDS} words"
            raise Refused(400, f"The sentence is too long: shorten it to {limits}.")
        words = [known_words(collection.vocab, sentence) for collection in self.collections]
        if not words[0]:
            raise Refused(400, "Type a sentence first.")
        if not any(known for found in words for known in found.values()):
            raise Refused(400, f"No model knows any of these words: {', '.join(words[0])}.")

    # ---- one image

    def look(self, image):
        """What it takes to draw an image: {"image", "id", "file": whether there is one, "aspect", "boxes"}."""
        width, height = self.images.size(image)
        boxes = self.images.boxes(image)
        return {
            "image": image,
            "id": self.images.ids[image],
            "file": self.images.ids[image] in self.images.files,
            "aspect": width / height if width > 0 < height else 4 / 3,
            "boxes": None if boxes is None else np.round(boxes, 4).tolist(),
        }

    def image(self, image, k):
        """An image, the grids of its regions (area weights, and each model's learned ones), and what captions_for says.

        k: how many captions of each model.
        """
        cells, area = self.images.grid(image) or (None, None)
        return {
            **self.look(image),
            "captions": self._captions_of(image),
            "cells": None if cells is None else cells.tolist(),
            "area": None if area is None else np.round(area, 4).tolist(),
            "learned": [self._learned_weights(i, image) for i in range(len(self.collections))],
            "models": self.captions_for(image, k),
        }

    def _captions_of(self, image):
        return [self.captions[i] for i in partners(image, self.n_images, len(self.captions))]

    @torch.no_grad()
    def _learned_weights(self, number, image):
        """Weights (R, 15) that a model's position attention gives the cells of an image's regions; None without it."""
        model = self.collections[number].model
        if option(model.opt, "position") != "attention":
            return None
        features, grids = (x.to(model.device, torch.float32) for x in self.datasets[number].features([image]))
        weights = model.img_enc.cell_weights(features, grids)
        return np.round(weights[1][0].float().cpu().numpy(), 5).tolist()

    def attention(self, image, sentence):
        """Per model: the score, and the attention between an image's regions and a sentence's words.

        Raises Refused.
        """
        self._check_sentence(sentence)
        answer = []
        for collection in self.collections:
            words = collection.embed(sentence)
            t2i, i2t = collection.attention(collection.image(image), words)
            answer.append(
                {
                    "tokens": read_tokens(collection, sentence),
                    "score": float(collection.score_images(words, np.array([image]))[0]),
                    "t2i": np.round(t2i, 4).tolist(),
                    "i2t": np.round(i2t, 4).tolist(),
                }
            )
        return {"models": answer}

    # ---- image → captions

    def captions_for(self, image, k):
        """Per model: the best k captions for an image, the image's captions marked."""
        positives = set(partners(image, self.n_images, len(self.captions)))
        models = []
        for collection in self.collections:
            found = collection.search_captions(collection.image(image), None, self.opt.candidates)
            models.append(best_of(*found, k, positives, lambda i: {"text": self.captions[i]}))
        return models


def check_same_images(path, dataset, first, folder):
    """Raise InputError where a model's data set is not of the images and regions of the first one's SplitImages."""
    images = SplitImages(dataset, folder)
    if not (dataset.captions or (first.has_ids and images.has_ids)):
        raise InputError(f"{path}: {images.prefix} has neither captions nor ids to compare with {first.prefix}")
    pairs = [(first.boxes(i), images.boxes(i)) for i in first.sample]
    if any(a is not None and b is not None and (a.shape != b.shape or abs(a - b).max() > 0.1) for a, b in pairs):
        raise InputError(f"{path}: {images.prefix} has other regions than {first.prefix}")


def read_tokens(collection, sentence):
    """[{"text", "known"}] of the tokens that a model reads, <start> and <end> included."""
    words = [{"text": word, "known": word in collection.vocab.word2idx} for word in collection.vocab.tokenize(sentence)]
    return [{"text": "<start>", "known": True}, *words, {"text": "<end>", "known": True}]


def best_of(order, scores, k, positives, describe):
    """{"results", "rank", "scored"} of indices order (n,), best first, and their scores (n,).

    results: the first k, each with its score, whether it is among positives, and the fields of describe(index). rank:
    of the first positive, from 1, or None. scored: n, all images or captions, or the first stage's candidates.
    """
    results = [
        {"score": score, "positive": index in positives} | describe(index)
        for index, score in zip(order[:k].tolist(), scores[:k].tolist(), strict=True)
    ]
    places = np.flatnonzero(np.isin(order, list(positives)))
    rank = int(places[0]) + 1 if len(places) else None
    return {"results": results, "rank": rank, "scored": len(order)}


def normalize(sentence):
    """A sentence in the form in which it is compared with the captions: its tokens."""
    return " ".join(tokenize(sentence.strip()))
