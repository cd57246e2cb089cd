"""Put a scoring server under load and compare every answer with the one that the same request got alone.

Without --port it makes a model of random weights and starts servers of its own on this machine: once with an embedding
cache that is too small for the pictures, so that every one is new to the server, and once with the default cache,
where every one has been seen before. The clients run on the same cores, and so does whatever else the machine does:
the table says what each took.
"""

import argparse
import base64
import http.client
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

if not __package__:
    import _root  # noqa: F401

from lib.checkpoint import save_checkpoint
from lib.errors import InputError, run
from Tencent_PFAN import train_whole
from Tencent_PFAN.model_whole import SCAN
from vocab import SPECIAL, Vocabulary, serialize_vocab

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PATH = "/scan_sentence_image_score"
HEADERS = {"Content-Type": "application/json"}
CACHE_MB = {"new": 2, "seen": 256}  # room for the pictures of 3 requests of 8, and the server's default
TOLERANCE = 1e-5  # between the scores of a request alone and among others
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


class Client:
    """One connection that is kept open."""

    def __init__(self, port, timeout=120):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def get(self, path):
        self.connection.request("GET", path)
        return self.connection.getresponse().read().decode()

    def score(self, body):
        """(2, P) scores, t2i and i2t. RuntimeError for any answer but 200."""
        self.connection.request("POST", PATH, body, HEADERS)
        response = self.connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {text.decode(errors='replace')[:100]}")
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


def memory_mb(pid):
    """Resident memory of a process. Linux only, as cpu_seconds."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_seconds(pid):
    """CPU time so far of a process, of this one, and of the whole machine."""
    ticks = os.sysconf("SC_CLK_TCK")
    with open(f"/proc/{pid}/stat") as file:
        server = sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, *interrupts = map(int, file.readline().split()[1:8])
    return np.array([server / ticks, time.process_time(), (user + nice + system + sum(interrupts)) / ticks])


def cache_counts(port):
    """Pictures so far that the server found in its cache, and that it did not."""
    text = Client(port).get("/metrics")
    found = {m[1]: float(m[2]) for m in re.finditer(r'^pfan_pictures_total{source="(\w+)"} (\S+)$', text, re.M)}
    return np.array([found.get("cache", 0), found.get("new", 0)])


def load(port, bodies, expected, clients, n_requests, pid=None):
    """n_requests requests from so many clients at a time. Returns the line of the table, and whether all went well."""
    numbers = iter(range(n_requests))
    lock = threading.Lock()
    times, wrong, failed, memory = [], [], [], []
    pid = pid if os.path.exists("/proc/stat") else None
    before, cpu = cache_counts(port), cpu_seconds(pid) if pid else None

    def work():
        client = Client(port)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            if pid and number % max(1, n_requests // 10) == 0:
                memory.append(memory_mb(pid))
            started = time.perf_counter()
            try:
                scores = client.score(bodies[number % len(bodies)])
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                failed.append(f"{type(error).__name__} {error}")
                client = Client(port)
                continue
            times.append(time.perf_counter() - started)
            difference = np.abs(scores - expected[number % len(bodies)]).max()
            if not difference <= TOLERANCE:
                wrong.append(difference)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    hits, new = cache_counts(port) - before
    middle, late = np.percentile(times, [50, 95]) * 1000 if times else (float("nan"),) * 2
    for problem in failed[:3]:
        print(f"  failed: {problem}", file=sys.stderr)
    line = (
        f"{clients:3d} clients: {len(times) / seconds:6.1f} requests/s, median {middle:.0f} ms, 95% {late:.0f} ms, "
        f"{len(failed)} of {n_requests} failed, {len(wrong)} wrong, {hits / max(1, hits + new):.0%} of the pictures "
        f"from the cache"
    )
    if pid:
        server, own, machine = cpu_seconds(pid) - cpu
        others = max(0, machine - server - own) / (seconds * os.cpu_count())
        line += (
            f"\n             CPU a request: server {1000 * server / n_requests:.1f} ms, client "
            f"{1000 * own / n_requests:.1f} ms; other programs took {others:.0%} of the machine; "
            f"memory {memory[0]:.0f} -> {memory[-1]:.0f} MB, most {max(memory):.0f}"
        )
    return line, not failed and not wrong


def measure(port, bodies, opt, title, pid=None):
    """Serial answers first, then the load; prints. Returns whether all went well."""
    print(title, flush=True)
    client = Client(port)
    expected = [client.score(body) for body in bodies]  # which also fills the cache, where there is one
    ok = True
    for clients in (1, *opt.clients):
        n_requests = min(opt.requests, 200) if clients == 1 else opt.requests
        line, fine = load(port, bodies, expected, clients, n_requests, pid)
        print(line, flush=True)
        ok &= fine
    return ok


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python scripts/load_test.py --clients 8 32 --requests 1000",
    )
    add = parser.add_argument
    add("--port", type=int, help="of a running server on this machine; else own ones are started")
    add("--clients", type=int, nargs="+", default=[8, 32], help="at a time (default: 8 32)")
    add("--requests", type=int, default=400, help="for each number of clients (default: %(default)s)")
    add("--distinct", type=int, default=40, help="different requests among them (default: %(default)s)")
    add("--pictures", type=int, default=8, help="a request (default: %(default)s)")
    add("--embed_size", type=int, default=512, help="of the own model (default: %(default)s)")
    add("--img_dim", type=int, default=2048, help="of the features (default: %(default)s)")
    add(
        "--cases",
        nargs="+",
        choices=list(CACHE_MB),
        default=list(CACHE_MB),
        help="pictures that own servers have not seen before, or have (default: both)",
    )
    add("--server_flags", default="", help="further flags of the own servers, in one string")
    opt = parser.parse_args()
    if min(opt.requests, opt.distinct, opt.pictures, *opt.clients) < 1:
        parser.error("expected numbers of at least 1")
    rng = np.random.default_rng(0)
    bodies = [make_request(rng, opt.pictures, opt.img_dim) for _ in range(opt.distinct)]
    print(f"{opt.distinct} different requests, {opt.pictures} pictures and {len(bodies[0]) / 1e6:.2f} MB each")
    if opt.port:
        ok = measure(opt.port, bodies, opt, f"the server on port {opt.port}")
    else:
        ok = True
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(folder, opt.embed_size, opt.img_dim)
            for case in opt.cases:
                flags = ["--cache_mb", str(CACHE_MB[case]), *opt.server_flags.split()]
                with Server(model, *flags) as server:
                    title = f"embed_size {opt.embed_size}, every picture {case}: {' '.join(flags)}"
                    ok &= measure(server.port, bodies, opt, title, server.process.pid)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    run(main)
