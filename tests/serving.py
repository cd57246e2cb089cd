"""A scoring server with a small random model, in a thread, and requests for it."""

import contextlib
import http.client
import json

import numpy as np
import torch
from processes import LIMIT, serve_app

from scripts.load import server
from scripts.load.server import encode, make_boxes  # noqa: F401
from Tencent_PFAN.scan_server_whole import get_parser, make_app
from Tencent_PFAN.scoring import Scorer
from test_server.test import PATH

IMG_DIM = 8


def make_model(folder, **options):
    """folder/model.pth.tar of a random model, and its vocabulary."""
    torch.manual_seed(0)
    return server.make_model(folder, embed_size=6, img_dim=IMG_DIM, word_dim=5, **options)


def make_options(*flags):
    return get_parser().parse_args(["model", "1", *flags])


@contextlib.contextmanager
def serve(scorer, *flags):
    """A server of scorer on a free port, which is yielded."""
    with serve_app(make_app(scorer, make_options(*flags))) as port:
        yield port


def scorer_of(folder, **options):
    return Scorer(make_model(folder, **options))


def make_request(n_images=2, seed=0, sentence=("上海", "新闻")):
    """A request of n_images random images, as a dict."""
    return {**server.make_request(np.random.default_rng(seed), n_images, IMG_DIM), "sentence": list(sentence)}


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


def get(port, path, headers=None, host="127.0.0.1", method="GET"):
    """(status, text) of a GET."""
    connection = http.client.HTTPConnection(host, port, timeout=LIMIT)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
