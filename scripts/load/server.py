"""What load_test.py asks and what it asks it of: requests, and a server of random weights."""

import base64
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import numpy as np

from lib.checkpoint import save_checkpoint
from lib.errors import InputError
from Tencent_PFAN import train_whole
from Tencent_PFAN.model_whole import SCAN
from test_server.test import Server
from vocab import SPECIAL, Vocabulary, serialize_vocab

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORDS = "上海 新闻 足球 天气 股市 红色 汽车 iphone news".split()
HEIGHT, WIDTH = 100, 200  # of the images


def make_model(folder, embed_size, img_dim, **options):
    """A whole-image checkpoint of random weights and its vocabulary of WORDS. Returns its path."""
    vocab = Vocabulary()
    for word in (*SPECIAL, *WORDS):
        vocab.add_word(word)
    serialize_vocab(vocab, os.path.join(folder, "load_sent_vocab.json"))
    published = "--max_violation --bi_gru --agg_func Mean --lambda_whole 2 --data_name load --device cpu".split()
    opt = train_whole.get_parser().parse_args(published)
    sizes = {"embed_size": embed_size, "img_dim": img_dim, "vocab_size": len(vocab)}
    vars(opt).update(vocab_path=folder, **sizes, **options)
    state = {"epoch": 1, "model": SCAN(opt).state_dict(), "best_rsum": 0.0, "opt": opt, "Eiters": 0}
    save_checkpoint(state, False, "model.pth.tar", folder)
    return os.path.join(folder, "model.pth.tar")


def encode(array):
    """base64 of float32, as a request has arrays."""
    return base64.b64encode(np.asarray(array, "<f4").tobytes()).decode()


def make_boxes(rng):
    """36 random boxes (36, 4) of an image, in pixels."""
    corners = np.sort(rng.random((36, 2, 2)) * 0.8, axis=1) + [[0], [0.1]]
    return (corners * (WIDTH, HEIGHT)).reshape(36, 4)


def make_request(rng, n_images, img_dim):
    """A request (dict) of 4 to 20 words and n_images images of random features and boxes."""
    features = np.maximum(rng.standard_normal((n_images, 37, img_dim)), 0)
    size = {"image_h": HEIGHT, "image_w": WIDTH, "num_boxes": 36}
    return {
        "sentence": rng.choice(WORDS, rng.integers(4, 21)).tolist(),
        "boxes": [
            {"image_id": i, **size, "boxes": encode(make_boxes(rng)), "features": encode(features[i, :36])}
            for i in range(n_images)
        ],
        "whole_items": features[:, 36].tolist(),
    }


@contextmanager
def running_server(model, *flags):
    """A server process on a free port of 127.0.0.1, which is yielded. It ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "Tencent_PFAN.scan_server_whole", model, str(port), *flags]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                with suppress(OSError):
                    Server(port=port).send(path="/health", method="GET")
                    break
                time.sleep(0.25)
            else:
                raise InputError("the server ended before it answered")
            yield port
        finally:
            process.terminate()
