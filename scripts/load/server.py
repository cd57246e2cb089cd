"""What load_test.py asks and what it asks it of: requests, and a server of random weights."""

import base64
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import numpy as np

from lib.checkpoint import save_checkpoint
from lib.constants import SPECIAL
from lib.errors import InputError
from Tencent_PFAN import train_whole
from Tencent_PFAN.model_whole import SCAN

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WORDS = "上海 新闻 足球 天气 股市 红色 汽车 iphone news".split()
HEIGHT, WIDTH = 100, 200  # of the images


def make_model(folder, embed_size, img_dim, **options):
    """A whole-image checkpoint of random weights, whose vocabulary is WORDS. Returns its path."""
    words = [*SPECIAL, *WORDS]
    published = "--max_violation --bi_gru --agg_func Mean --lambda_whole 2 --device cpu".split()
    opt = train_whole.get_parser().parse_args([*published, "--vocab_path", str(folder)])
    vars(opt).update(embed_size=embed_size, img_dim=img_dim, vocab_size=len(words), **options)
    state = {"epoch": 1, "model": SCAN(opt).state_dict(), "best_rsum": 0.0, "opt": opt, "Eiters": 0, "words": words}
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
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        try:
            if not process.stdout.readline():  # its address, as soon as it answers
                raise InputError("the server ended before it answered")
            yield port
        finally:
            process.terminate()
