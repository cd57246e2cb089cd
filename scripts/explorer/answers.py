"""What the explorer's page asks for, as lists and dicts: searches, attention and position grids of its models."""

import threading

import numpy as np
import torch

from evaluation import load_split
from lib.errors import InputError
from lib.options import option
from lib.web import Refused
from scripts.explorer.groups import Groups
from scripts.explorer.names import name_models
from scripts.explorer.pictures import Pictures
from scripts.search.build import open_or_build
from scripts.search.collection import Collection
from scripts.search.queries import knows_a_word, words_of
from vocab import tokenize

MAX_CHARACTERS, MAX_WORDS = 500, 100  # of a sentence
N_EXAMPLES = 12  # captions that the page offers


class Explorer:
    """Models, each with its embeddings of one split.

    opt: explore.py's flags. Raises InputError where a checkpoint, the split or the images cannot be read, or where
    the models' splits are not of the same images, regions and captions.
    """

    def __init__(self, opt):
        self.opt = opt
        self.collections, self.datasets = [], []
        for path in opt.model_path:
            self._add_model(path)
        self.names = name_models(opt.model_path, [collection.model.opt for collection in self.collections])
        self.captions, self.n_images = self.datasets[0].captions, self.datasets[0].n_images
        self.groups = Groups(self.n_images, len(self.captions))
        self.by_text = {}
        for index, caption in enumerate(self.captions):
            self.by_text.setdefault(normalize(caption), []).append(index)
        self.lock = threading.Lock()  # one computation at a time; the rest waits

    def _add_model(self, path):
        opt = self.opt
        model, loader = load_split(
            path, opt.data_path, opt.vocab_path, opt.split, captions_optional=True, device=opt.device
        )
        if not self.collections:
            self.data_name = model.opt.data_name
            self.pictures = Pictures(loader.dataset, opt.images)
        elif fault := mismatch(self.datasets[0], self.pictures, loader.dataset, opt.images):
            raise InputError(f"{path}: its {opt.split} split has {fault} that of {opt.model_path[0]}")
        self.datasets.append(loader.dataset)
        if loader.dataset.n_images > opt.index_above:
            collection = open_or_build(path, model, loader, opt.split)
        else:
            collection = Collection.encode(model, loader)
        self.collections.append(collection)
        print(f"{path}: {loader.dataset.n_images} pictures, {len(loader.dataset.captions)} captions", flush=True)

    def about(self):
        """The models, the split and some of its captions."""
        step = max(1, len(self.captions) // N_EXAMPLES)
        return {
            "models": [
                {
                    "name": name,
                    "path": path,
                    "position": option(collection.model.opt, "position"),
                    "cross_attn": collection.model.opt.cross_attn,
                    "indexed": collection.first_stage is not None,
                }
                for name, path, collection in zip(self.names, self.opt.model_path, self.collections, strict=True)
            ],
            "data": self.data_name,
            "split": self.opt.split,
            "pictures": self.n_images,
            "captions": len(self.captions),
            "files": len(self.pictures.files),
            "candidates": self.opt.candidates,
            "examples": self.captions[::step][:N_EXAMPLES],
        }

    # ---- sentence → images

    def search(self, sentence, k):
        """The k images that each model finds for a sentence; the right ones are marked where it is a caption.

        Raises Refused.
        """
        self._check_sentence(sentence)
        groups = {self.groups.of_caption(i) for i in self.by_text.get(normalize(sentence), ())}
        right = {image for group in groups for image in self.groups.images(group)}
        found = [self._search_one(collection, sentence, k, right) for collection in self.collections]
        return {"sentence": sentence, "right": sorted(right), "models": found}

    def _check_sentence(self, sentence):
        """Raise Refused for a sentence that is empty, too long, or of words that no model knows."""
        if not sentence.strip():
            raise Refused(400, "Type a sentence first.")
        if len(sentence) > MAX_CHARACTERS:
            raise Refused(400, f"The sentence has {len(sentence):,} characters: shorten it to {MAX_CHARACTERS}.")
        if len(tokenize(sentence)) > MAX_WORDS:
            raise Refused(400, f"The sentence has over {MAX_WORDS} words: shorten it.")
        vocabs = [collection.vocab for collection in self.collections]
        if not any(knows_a_word(vocab, sentence) for vocab in vocabs):
            words = ", ".join(dict.fromkeys(words_of(vocabs[0], sentence)))
            who = "The model knows none" if len(vocabs) == 1 else "The models know none"
            raise Refused(400, f"{who} of these words: {words}." if words else "Type a word first.")

    def _search_one(self, collection, sentence, k, right):
        tokens = read_tokens(collection, sentence)
        if not knows_a_word(collection.vocab, sentence):
            return {"tokens": tokens, "results": [], "rank": None, "scored": 0}
        # a rank counts what was scored exactly: all images, or the first stage's candidates
        images, scores = collection.search(sentence, None, self.opt.candidates)
        cards = [self._card(int(i), float(s), int(i) in right) for i, s in zip(images[:k], scores[:k], strict=True)]
        rank = first_rank(images, right)
        return {"tokens": tokens, "results": cards, "rank": rank, "scored": len(scores)}

    def _card(self, image, score, right):
        captions = self._captions_of(image)
        caption = self.captions[captions[0]] if captions else ""
        return {"image": image, "score": score, "right": right, "caption": caption, **self.look(image)}

    # ---- one image

    def look(self, image):
        """What it takes to draw an image: {"id", "file": whether there is one, "aspect", "boxes"}."""
        width, height = self.pictures.size(image)
        boxes = self.pictures.boxes(image)
        return {
            "id": self.pictures.ids[image],
            "file": self.pictures.ids[image] in self.pictures.files,
            "aspect": width / height if width > 0 < height else 4 / 3,
            "boxes": None if boxes is None else np.round(boxes, 4).tolist(),
        }

    def picture(self, image):
        """An image with the grids of its regions: area weights, and each model's learned weights."""
        grid = self.pictures.grid(image)
        return {
            **self.look(image),
            "image": image,
            "captions": [self.captions[i] for i in self._captions_of(image)],
            "cells": None if grid is None else grid[0].tolist(),
            "area": None if grid is None else np.round(grid[1], 4).tolist(),
            "learned": [self._learned_weights(i, image) for i in range(len(self.collections))],
        }

    def _captions_of(self, image):
        return self.groups.captions(self.groups.of_image(image))

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
        return {"image": image, "sentence": sentence, "models": answer}

    # ---- image → captions

    def captions_for(self, image, k):
        """Per model: the best k captions for an image, the image's captions marked."""
        right, answer = set(self._captions_of(image)), []
        for collection in self.collections:
            order, scores = collection.search_captions(collection.image(image), None, self.opt.candidates)
            results = [
                {"text": self.captions[i], "score": float(score), "right": i in right}
                for i, score in zip(order[:k].tolist(), scores, strict=False)
            ]
            answer.append({"results": results, "rank": first_rank(order, right), "scored": len(order)})
        return {"image": image, "models": answer}


def mismatch(dataset, pictures, other, folder):
    """Why another split is not of the first one's images, regions and captions; "" where it is."""
    if other.prefix == dataset.prefix:
        return ""
    if other.captions != dataset.captions:
        return "other captions than"
    shown = Pictures(other, folder)
    if other.n_images != dataset.n_images or shown.ids != pictures.ids:
        return "other images than"
    if not (other.captions or (pictures.has_ids and shown.has_ids)):
        return "neither captions nor ids to compare with"
    pairs = [(pictures.boxes(i), shown.boxes(i)) for i in pictures.sample]
    same = all(a is None or b is None or (a.shape == b.shape and np.allclose(a, b, atol=0.1)) for a, b in pairs)
    return "" if same else "other regions than"


def read_tokens(collection, sentence):
    """[{"text", "known"}] of the tokens that a model reads, <start> and <end> included."""
    words = [{"text": word, "known": word in collection.vocab.word2idx} for word in collection.vocab.tokenize(sentence)]
    return [{"text": "<start>", "known": True}, *words, {"text": "<end>", "known": True}]


def first_rank(order, right):
    """The rank, from 1, of the first index in order that is among right; None where none is."""
    places = np.flatnonzero(np.isin(order, list(right)))
    return int(places[0]) + 1 if len(places) else None


def normalize(sentence):
    """A sentence in the form in which it is compared with the captions: its tokens."""
    return " ".join(tokenize(sentence.strip()))
