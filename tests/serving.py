"""A scoring server with a small random model, in a thread, and requests for it."""

import contextlib
import http.client
import json
import re

import numpy as np
import torch
from processes import LIMIT, serve_app

from scripts import load_test
from scripts.load_test import encode, make_boxes  # noqa: F401
from Tencent_PFAN.scan_server_whole import get_parser, make_app
from Tencent_PFAN.scoring import Scorer
from test_server.test import PATH

IMG_DIM = 8


def make_model(folder, **options):
    """folder/model.pth.tar of a random model, and its vocabulary."""
    torch.manual_seed(0)
    return load_test.make_model(folder, embed_size=6, img_dim=IMG_DIM, word_dim=5, **options)


@contextlib.contextmanager
def serve(scorer, *flags):
    """A server of scorer on a free port, which is yielded."""
    with serve_app(make_app(scorer, get_parser().parse_args(["model", "1", *flags]))) as port:
        yield port


def scorer_of(folder, **options):
    return Scorer(make_model(folder, **options))


def make_request(n_images=2, seed=0, sentence=("上海", "新闻")):
    """A request of n_images random images, as a dict."""
    return {**load_test.make_request(np.random.default_rng(seed), n_images, IMG_DIM), "sentence": list(sentence)}


def request(host, port, *words):
    """(status, text, headers) of the answer to a request, words being http.client's method, path, body, headers."""
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=LIMIT)) as connection:
        connection.request(*words)
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers


def post(port, body, headers=None):
    """(status, object, headers) of a scoring request; body: bytes, or an object that is sent as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    status, text, headers = request("127.0.0.1", port, "POST", PATH, body, headers)
    return status, json.loads(text), headers


def get(port, path, headers=None, host="127.0.0.1", method="GET"):
    """(status, text) of a GET."""
    return request(host, port, method, path, None, headers or {})[:2]


def metric(port, name):
    """A number of /metrics; name: with its labels."""
    return float(re.search(rf"^{re.escape(name)} (\S+)$", get(port, "/metrics")[1], re.MULTILINE)[1])
