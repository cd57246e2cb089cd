"""What load_test.py asks and what it asks it of: a server of random weights, requests for it, a connection."""

import base64
import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np

from lib.checkpoint import save_checkpoint
from lib.errors import InputError
from Tencent_PFAN import train_whole
from Tencent_PFAN.model_whole import SCAN
from vocab import SPECIAL, Vocabulary, serialize_vocab

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PATH = "/scan_sentence_image_score"
HEADERS = {"Content-Type": "application/json"}
WORDS = ["".join(pair) for pair in itertools.product("天地人和山水火木金土日月星云风雨春夏秋冬", repeat=2)]


def make_model(folder, embed_size, img_dim):
    """A whole-image checkpoint of random weights, the published flags, and its vocabulary. Returns its path."""
    vocab = Vocabulary()
    for word in (*SPECIAL, *WORDS):
        vocab.add_word(word)
    serialize_vocab(vocab, os.path.join(folder, "load_sent_vocab.json"))
    published = "--max_violation --bi_gru --agg_func Mean --lambda_whole 2 --data_name load --device cpu".split()
    opt = train_whole.get_parser().parse_args(published)
    vars(opt).update(embed_size=embed_size, img_dim=img_dim, vocab_path=folder, vocab_size=len(vocab))
    state = {"epoch": 1, "model": SCAN(opt).state_dict(), "best_rsum": 0.0, "opt": opt, "Eiters": 0}
    save_checkpoint(state, False, "model.pth.tar", folder)
    return os.path.join(folder, "model.pth.tar")


def make_request(rng, n_pictures, img_dim):
    """The body of a request: a sentence of 4 to 20 words, n_pictures pictures of random features and boxes."""

    def base64_of(array):
        return base64.b64encode(array.astype("<f4").tobytes()).decode()

    boxes = []
    for i in range(n_pictures):
        corners = np.sort(rng.random((36, 2, 2)), axis=1) * (560, 400)
        corners[:, 1] += 20
        features = np.maximum(rng.standard_normal((36, img_dim)), 0)
        picture = {"image_id": i, "image_h": 420, "image_w": 580, "num_boxes": 36}
        boxes.append({**picture, "boxes": base64_of(corners.reshape(36, 4)), "features": base64_of(features)})
    wholes = np.maximum(rng.standard_normal((n_pictures, img_dim)), 0).tolist()
    words = rng.choice(WORDS, rng.integers(4, 21)).tolist()
    return json.dumps({"sentence": words, "boxes": boxes, "whole_items": wholes}).encode()


class Busy(RuntimeError):
    """The server wants the request again later."""


class Client:
    """One connection that is kept open."""

    def __init__(self, port, timeout=120):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def get(self, path):
        self.connection.request("GET", path)
        return self.connection.getresponse().read().decode()

    def score(self, body):
        """(2, P) scores, t2i and i2t. Busy for a 429, RuntimeError for any other answer but 200."""
        self.connection.request("POST", PATH, body, HEADERS)
        response = self.connection.getresponse()
        text = response.read()
        if response.status != 200:
            kind = Busy if response.status == 429 else RuntimeError
            raise kind(f"{response.status} {text.decode(errors='replace')[:100]}")
        answer = json.loads(text)
        return np.array([answer["sim_t2i"], answer["sim_i2t"]])


class Server:
    """A server process on a free port of 127.0.0.1, as a context; it ends with it."""

    def __init__(self, model, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "Tencent_PFAN.scan_server_whole", model, str(self.port), *flags]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def __enter__(self):
        for _ in range(240):
            if self.process.poll() is not None:
                raise InputError(f"the server ended with status {self.process.returncode}")
            try:
                Client(self.port).get("/health")
                return self
            except OSError:
                time.sleep(0.25)
        self.__exit__()
        raise InputError("the server did not answer within a minute")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
