"""A local web page to see what one or more models find in a split, and why.

python scripts/explore.py --model_path runs/demo/attention_seed0/model_best.pth.tar --data_path data --split test
"""

import argparse
import math
import os
import signal
import socket
import threading

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

if not __package__:
    import _root  # noqa: F401

from evaluation import load_split, rank_both, shard_xattn
from lib.errors import InputError, run
from lib.options import option
from scripts.build_index import open_or_build
from scripts.explorer.pictures import Pictures
from scripts.search.collection import Collection
from Tencent_PFAN.web import Answer, Protocol, Refused, refuse, refuse_parameters, refuse_unexpected
from vocab import tokenize

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "explorer")
LABELS = {"attention": "PFAN-A", "area": "PFAN-P", "none": "SCAN"}
LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_CHARACTERS, MAX_WORDS, MAX_RESULTS, MAX_MODELS = 500, 100, 100, 4
HARD_PICTURES, HARD_CASES, HARD_STEP = 1000, 30, 64  # compared, shown of each way, and captions scored at once


class Explorer:
    """Models, each with its embeddings of one split; everything that the page asks for, as plain lists and dicts."""

    def __init__(self, opt):
        self.opt = opt
        self.models = []
        for path in opt.model_path:
            model, loader = load_split(path, opt.data_path, opt.vocab_path, opt.split, device=opt.device)
            if self.models and loader.dataset.captions != self.dataset.captions:
                raise InputError(f"{path}: its {opt.split} split is not that of {opt.model_path[0]}")
            if not self.models:
                self.dataset, self.name = loader.dataset, model.opt.data_name
                self.pictures = Pictures(self.dataset, opt.images)
            if loader.dataset.n_images > opt.index_above:
                collection = open_or_build(path, model, loader, opt.split)
            else:
                collection = Collection.encode(model, loader)
            self.models.append(collection)
            print(f"{path}: {self.dataset.n_images} pictures, {len(self.dataset.captions)} captions", flush=True)
        self.names = name_models(opt.model_path, [collection.model.opt for collection in self.models])
        self.captions = self.dataset.captions
        self.groups = min(self.dataset.n_images, len(self.captions))
        self.by_text = {}
        for number, caption in enumerate(self.captions):
            self.by_text.setdefault(normal(caption), []).append(number)
        self.lock = threading.Lock()  # one computation at a time; the rest waits
        self.hard = {"state": "new", "share": 0.0, "cases": []}

    # ---- which pictures and captions belong together

    def group_of_image(self, number):
        return number * self.groups // self.dataset.n_images

    def group_of_caption(self, number):
        return number * self.groups // len(self.captions)

    def members(self, group, count):
        """The pictures (count n_images) or captions (count n_captions) of a group."""
        return list(range(group * count // self.groups, (group + 1) * count // self.groups))

    def own_captions(self, number):
        return self.members(self.group_of_image(number), len(self.captions))

    # ---- answers

    def about(self):
        step = max(1, len(self.captions) // 12)
        return {
            "models": [
                {
                    "name": name,
                    "path": path,
                    "position": option(collection.model.opt, "position"),
                    "cross_attn": collection.model.opt.cross_attn,
                    "indexed": collection.first_stage is not None,
                }
                for name, path, collection in zip(self.names, self.opt.model_path, self.models, strict=True)
            ],
            "data": self.name,
            "split": self.opt.split,
            "pictures": self.dataset.n_images,
            "captions": len(self.captions),
            "files": len(self.pictures.files),
            "candidates": self.opt.candidates,
            "examples": self.captions[::step][:12],
        }

    def tokens(self, collection, sentence):
        """[{"text", "known"}] of what the model reads, <start> and <end> included."""
        words = tokenize(sentence)
        return [
            {"text": "<start>", "known": True},
            *({"text": word, "known": word in collection.vocab.word2idx} for word in words),
            {"text": "<end>", "known": True},
        ]

    def checked(self, sentence):
        if not sentence.strip():
            raise Refused(400, "Type a sentence first.")
        if len(sentence) > MAX_CHARACTERS:
            raise Refused(400, f"The sentence has {len(sentence):,} characters: shorten it to {MAX_CHARACTERS}.")
        if len(tokenize(sentence)) > MAX_WORDS:
            raise Refused(400, f"The sentence has over {MAX_WORDS} words: shorten it.")
        return sentence

    def search(self, sentence, k):
        """What each model finds for a sentence, with the right pictures marked where it is a caption of the split."""
        self.checked(sentence)
        right = {self.group_of_caption(i) for i in self.by_text.get(normal(sentence), ())}
        right = {image for group in right for image in self.members(group, self.dataset.n_images)}
        found = [self.search_one(collection, sentence, k, right) for collection in self.models]
        return {"sentence": sentence, "right": sorted(right), "models": found}

    def search_one(self, collection, sentence, k, right):
        # ranks are counted among what was scored exactly: all pictures, or the first stage's candidates
        wanted = self.dataset.n_images if collection.first_stage is None else self.opt.candidates
        images, scores = collection.search(sentence, wanted, self.opt.candidates)
        results = [self.card(int(i), float(s), int(i) in right) for i, s in zip(images[:k], scores[:k], strict=True)]
        rank = first_rank(images, right)
        return {"tokens": self.tokens(collection, sentence), "results": results, "rank": rank, "scored": len(scores)}

    def card(self, number, score, right):
        caption = self.captions[self.own_captions(number)[0]]
        return {"image": number, "score": score, "right": right, "caption": caption, **self.look(number)}

    def look(self, number):
        """What it takes to draw a picture: {"file": whether there is one, "aspect", "boxes"}."""
        width, height = self.pictures.size(number)
        file = self.pictures.ids[number] in self.pictures.files
        boxes = self.pictures.boxes(number)
        return {
            "id": self.pictures.ids[number],
            "file": file,
            "aspect": width / height if width > 0 < height else 4 / 3,
            "boxes": None if boxes is None else np.round(boxes, 4).tolist(),
        }

    def picture(self, number):
        """One picture with the grids of its regions: area weights, and each model's learned weights."""
        grid = self.pictures.grid(number)
        learned = [self.learned(collection, number) for collection in self.models]
        return {
            **self.look(number),
            "image": number,
            "captions": [self.captions[i] for i in self.own_captions(number)],
            "cells": None if grid is None else grid[0].tolist(),
            "area": None if grid is None else np.round(grid[1], 4).tolist(),
            "learned": learned,
        }

    @torch.no_grad()
    def learned(self, collection, number):
        """Weights (R, 15) that position attention gives the cells of a picture's regions; None without it."""
        model = collection.model
        if option(model.opt, "position") != "attention":
            return None
        grids = self.pictures.row(self.pictures.grids, number)
        features = self.dataset.read_features(self.dataset.images, "_ims.npy", number, number + 1)
        weights = model.img_enc.cell_weights(features.to(model.device), torch.tensor(grids, device=model.device)[None])
        return np.round(weights[1][0].float().cpu().numpy(), 5).tolist()

    def attention(self, number, sentence):
        """Per model: score, and who attends to what between a picture's regions and a sentence's words."""
        self.checked(sentence)
        answer = []
        for collection in self.models:
            words = collection.embed(sentence)
            t2i, i2t = collection.attention(collection.image(number), words)
            score = float(collection.score_images(words, np.array([number]))[0])
            answer.append(
                {
                    "tokens": self.tokens(collection, sentence),
                    "score": score,
                    "t2i": np.round(t2i, 4).tolist(),
                    "i2t": np.round(i2t, 4).tolist(),
                }
            )
        return {"image": number, "sentence": sentence, "models": answer}

    def captions_for(self, number, k):
        """Per model: the best k captions for a picture, its own ones marked."""
        own, answer = set(self.own_captions(number)), []
        for collection in self.models:
            wanted = len(self.captions) if collection.first_stage is None else self.opt.candidates
            order, scores = collection.search_captions(collection.image(number), wanted, self.opt.candidates)
            results = [
                {"text": self.captions[i], "score": float(score), "right": i in own}
                for i, score in zip(order[:k].tolist(), scores, strict=False)
            ]
            answer.append({"results": results, "rank": first_rank(order, own), "scored": len(order)})
        return {"image": number, "models": answer}

    # ---- where the models differ

    def hard_cases(self):
        """{"state": new, running, done or the reason of a failure, "share": done, "cases"}; starts the comparison."""
        with self.lock:
            if self.hard["state"] == "new" and len(self.models) > 1:
                self.hard["state"] = "running"
                threading.Thread(target=self.compare, daemon=True).start()
        return self.hard

    def compare(self):
        try:
            groups = np.unique(np.linspace(0, self.groups - 1, min(self.groups, HARD_PICTURES)).astype(int)).tolist()
            images = [i for group in groups for i in self.members(group, self.dataset.n_images)]
            captions = [i for group in groups for i in self.members(group, len(self.captions))]
            ranks = []
            for collection in self.models:
                sims = np.empty((len(images), len(captions)), dtype=np.float32)
                regions = collection.tensor(collection.images[images])
                for at in range(0, len(captions), HARD_STEP):
                    some = captions[at : at + HARD_STEP]
                    words = torch.cat([collection.caption(i) for i in some])
                    sims[:, at : at + HARD_STEP] = shard_xattn(
                        regions, words, collection.lens[some], collection.model.opt
                    )
                    done = len(ranks) + (at + len(some)) / len(captions)
                    self.hard = {**self.hard, "share": done / len(self.models)}
                ranks.append({way: found[0] + 1 for way, found in rank_both(sims)[1].items()})
            self.hard = {
                "state": "done",
                "share": 1.0,
                "cases": self.sort_cases(ranks, images, captions),
                "pictures": len(images),
                "captions": len(captions),
            }
        except Exception as error:  # a thread has nobody else to tell
            self.hard = {**self.hard, "state": f"The comparison failed: {error}"}

    def sort_cases(self, ranks, images, captions):
        """Sentences, then pictures, whose right answers are at the most different ranks: 1 to 10 is like 10 to 100."""
        cases = []
        for way, numbers in (("rti", captions), ("rt", images)):
            own = np.stack([found[way] for found in ranks])  # models × queries
            spread = np.log(own.max(0)) - np.log(own.min(0))
            for place in np.argsort(-spread, kind="stable")[:HARD_CASES]:
                if spread[place] > 0:
                    cases.append(self.case(spread[place], way, numbers[place], own[:, place].astype(int).tolist()))
        return cases

    def case(self, spread, way, number, ranks):
        image = number if way == "rt" else self.members(self.group_of_caption(number), self.dataset.n_images)[0]
        text = self.captions[number] if way == "rti" else None
        return {"sentence": text, "image": image, "ranks": ranks, "ratio": math.exp(spread), **self.look(image)}


def first_rank(order, right):
    """The rank, from 1, of the first number in order that is among right; None where none is."""
    places = np.flatnonzero(np.isin(order, list(right)))
    return int(places[0]) + 1 if len(places) else None


def normal(sentence):
    """A sentence as it is compared with the captions: their tokens."""
    return " ".join(tokenize(sentence.strip()))


def name_models(paths, options):
    """A short name for each model: its kind, with the folder where two are of one kind."""
    names = [f"{LABELS[option(opt, 'position')]} {opt.cross_attn}" for opt in options]
    if len(set(names)) < len(names):
        folders = [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in paths]
        names = [f"{name} · {folder}" for name, folder in zip(names, folders, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} · {os.path.basename(path)}" for name, path in zip(names, paths, strict=True)]
    return names


# ---------------------------------------------------------------- the app


def make_app(explorer):
    """The FastAPI app: the page, and the explorer's answers as JSON under /api."""
    app = FastAPI(title="PFAN explorer", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse_parameters)
    app.add_exception_handler(Exception, refuse_unexpected)
    if explorer.opt.host in LOCAL:  # a page elsewhere cannot reach this one under a name of its own
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"])
    a_count = Query(ge=1, le=MAX_RESULTS)

    def existing(number):
        """The number of a picture as an int, from the text in an address."""
        if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) < explorer.dataset.n_images):
            raise Refused(404, f"There is no picture {number[:20]}: expected 0 to {explorer.dataset.n_images - 1}.")
        return int(number)

    def locked(answer, *args):
        with explorer.lock:
            return Answer(answer(*args))

    @app.get("/api/about")
    def about():
        return Answer(explorer.about())

    @app.get("/api/search")
    def search(sentence: str, k: int = a_count):
        return locked(explorer.search, sentence, k)

    @app.get("/api/hard")
    def hard():
        return Answer(explorer.hard_cases())

    @app.get("/api/pictures/{number}")
    def picture(number: str):
        return locked(explorer.picture, existing(number))

    @app.get("/api/pictures/{number}/captions")
    def captions(number: str, k: int = a_count):
        return locked(explorer.captions_for, existing(number), k)

    @app.get("/api/pictures/{number}/attention")
    def attention(number: str, sentence: str):
        return locked(explorer.attention, existing(number), sentence)

    @app.get("/images/{number}")
    def image(number: str):
        path = explorer.pictures.files.get(explorer.pictures.ids[existing(number)])
        if path is None:
            raise Refused(404, f"Picture {number} has no file in {explorer.pictures.folder}.")
        return FileResponse(path)

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def get_parser():
    parser = argparse.ArgumentParser(
        description="A local web page to see what models find in a split, and why.",
        epilog="example: python scripts/explore.py --model_path runs/demo/attention_seed0/model_best.pth.tar "
        "runs/demo/none_seed0/model_best.pth.tar --data_path data --split test",
    )
    add = parser.add_argument
    add("--model_path", nargs="+", required=True, help=f"checkpoints, side by side; at most {MAX_MODELS}")
    add("--data_path", help="folder of the data sets (default: the checkpoint's)")
    add("--vocab_path", help="folder of the vocabularies (default: the checkpoint's)")
    add("--split", default="test", help="dev, test, testall or one of your own (default: %(default)s)")
    add("--images", metavar="DIR", help="picture files named by id (default: SPLIT_images beside the data, if there)")
    two_stages = "search splits of more pictures in two stages, with an index made once (default: %(default)s)"
    add("--index_above", type=int, default=5000, metavar="N", help=two_stages)
    add("--candidates", type=int, default=1000, help="results that the second stage scores (default: %(default)s)")
    add("--host", default="127.0.0.1", help="to listen on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8765, help="to listen on (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: CUDA if there, else CPU)")
    return parser


def listen(host, port):
    """A socket that listens on a host (str) and port. Raises InputError where that cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = error.strerror.split(" (")[0].lower()  # create_server appends the address
        raise InputError(f"--host {host} --port {port}: {why}, expected this machine's and a free one") from None


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if len(opt.model_path) > MAX_MODELS:
        parser.error(f"--model_path: {len(opt.model_path)} checkpoints, expected at most {MAX_MODELS}")
    if opt.candidates < 1 or not 0 < opt.port < 65536:
        parser.error("expected --candidates of 1 or more and --port 1 to 65535")
    with listen(opt.host, opt.port) as listening:  # before the models are read, which takes a while
        config = uvicorn.Config(
            make_app(Explorer(opt)), http=Protocol, log_level="warning", timeout_graceful_shutdown=2
        )
        host = f"[{opt.host}]" if ":" in opt.host else opt.host
        print(f"open http://{host}:{opt.port} in a browser; Ctrl-C ends it", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn raises what ended it once more, after a graceful end
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    run(main)
