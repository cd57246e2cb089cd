"""A scoring server with a small random model, in a thread, and requests for it."""

import base64
import contextlib
import http.client
import json
import os

import numpy as np
import torch
from processes import LIMIT, serve_app

from lib.checkpoint import save_checkpoint
from Tencent_PFAN import train_whole
from Tencent_PFAN.model_whole import SCAN
from Tencent_PFAN.scan_server_whole import get_parser, make_app
from Tencent_PFAN.scoring import Scorer
from vocab import SPECIAL, Vocabulary, serialize_vocab

PATH = "/scan_sentence_image_score"
IMG_DIM = 8
WORDS = "上海 新闻 足球 天气 股市 红色 汽车 iphone news".split()


def make_model(folder, **options):
    """folder/model.pth.tar and folder/vocab/small_sent_vocab.json of a random model."""
    vocab = Vocabulary()
    for word in (*SPECIAL, *WORDS):
        vocab.add_word(word)
    os.makedirs(os.path.join(folder, "vocab"), exist_ok=True)
    vocab_path = os.path.join(folder, "vocab")
    serialize_vocab(vocab, os.path.join(vocab_path, "small_sent_vocab.json"))
    torch.manual_seed(0)
    sizes = {"img_dim": IMG_DIM, "embed_size": 6, "word_dim": 5, "vocab_size": len(vocab), "lambda_whole": 2.0}
    opt = train_whole.get_parser().parse_args(["--max_violation", "--bi_gru", "--agg_func", "Mean"])
    vars(opt).update(**sizes, data_name="small", vocab_path=vocab_path, device="cpu", **options)
    state = {"epoch": 1, "model": SCAN(opt).state_dict(), "best_rsum": 0.0, "opt": opt, "Eiters": 0}
    save_checkpoint(state, False, "model.pth.tar", folder)
    return os.path.join(folder, "model.pth.tar")


def make_options(*flags):
    return get_parser().parse_args(["model", "1", *flags])


@contextlib.contextmanager
def serve(scorer, *flags):
    """A server of scorer on a free port, which is yielded."""
    with serve_app(make_app(scorer, make_options(*flags))) as port:
        yield port


def scorer_of(folder, **options):
    return Scorer(make_model(folder, **options))


def encode(array):
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()


def make_boxes(rng, height=100, width=200):
    corners = np.sort(rng.random((36, 2, 2)) * 0.8, axis=1) + [[0], [0.1]]
    return (corners * (width, height)).reshape(36, 4)


def make_request(n_pictures=2, seed=0, sentence=("上海", "新闻"), img_dim=IMG_DIM):
    """A request of n_pictures random pictures, as a dict."""
    rng = np.random.default_rng(seed)
    boxes = [
        {
            "image_id": i,
            "image_h": 100,
            "image_w": 200,
            "num_boxes": 36,
            "boxes": encode(make_boxes(rng)),
            "features": encode(rng.standard_normal((36, img_dim))),
        }
        for i in range(n_pictures)
    ]
    wholes = rng.standard_normal((n_pictures, img_dim)).tolist()
    return {"sentence": list(sentence), "boxes": boxes, "whole_items": wholes}


def post(port, body, headers=None, path=PATH):
    """(status, object, headers) of a POST; body: bytes, or an object that is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    try:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def get(port, path, headers=None):
    """(status, text) of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
