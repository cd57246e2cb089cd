"""Put a scoring server under load and compare every answer with the one that the same request got alone.

Without --port it makes a model of random weights and starts servers of its own on this machine: once without an
embedding cache, so that every image is new to the server, and once with the default one, where every image has been
seen before. The clients run on the same cores, and so does whatever else the machine does: plan with the CPU time that
the server took.

--hostile measures each row three times alone and three times beside 200 clients that mean harm: 100 send their headers
a byte at a time, 60 a body at 2 KB a second, 20 break off half-way, 10 send nonsense, 10 announce 100 GB. Each connects
again a second after its connection has ended.
"""

import argparse
import asyncio
import base64
import http.client
import json
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from statistics import median

import numpy as np

if not __package__:
    import _root  # noqa: F401

from lib.checkpoint import save_checkpoint
from lib.constants import SPECIAL
from lib.errors import InputError, run
from Tencent_PFAN import train_whole
from Tencent_PFAN.model_whole import SCAN
from test_server.test import PATH, Server, explain

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE_MB = {"new": 0, "seen": 256}  # none, and the server's default
DISTINCT = 40  # requests that differ
LEAST_SHARE = 0.5  # of the calm rate that good clients must keep beside hostile ones
ROUNDS = 3  # of calm and hostile, in turns: what else runs on the machine changes
WARM_UP = 5  # seconds until all hostile clients are at work
TOLERANCE = 1e-5  # between the scores of a request alone and among others
ATTEMPTS = 20  # of a request that is answered 429, a second apart
FAILURES = (OSError, http.client.HTTPException, RuntimeError)  # of Load.ask

# ---------------------------------------------------------------- a server of random weights, and requests for it

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


# ---------------------------------------------------------------- clients that mean harm

PAUSE = 1.0  # seconds between a connection and the next; 0.1 makes the broken-off bodies a flood of 340 MB a second
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
BODY = HEAD + b"Content-Length: 3400000\r\n\r\n"  # that of eight images
HUGE = HEAD + b"Content-Length: 100000000000\r\n\r\n"
# what is sent first, and again and again; seconds between; how many clients
HOSTILE = (
    (HEAD + b"X-Slow: ", b"x", 0.1, 100),  # a header that never ends
    (BODY, b" " * 512, 0.25, 60),
    (BODY + b" " * 1_700_000, b"", 0, 20),  # half a body, and the connection's end
    (random.randbytes(2500) + b"\r\n\r\n", b"", 0, 10),  # not HTTP
    (HUGE, b" " * (1 << 16), 0, 10),  # as fast as the server takes it
)


async def connect_for_ever(port, first, more, pause):
    await asyncio.sleep(random.uniform(0, PAUSE))
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with closing(writer):
                writer.write(first)
                await writer.drain()
                while more and not reader.at_eof():
                    await asyncio.sleep(pause)
                    writer.write(more)
                    await writer.drain()
        await asyncio.sleep(PAUSE)


def run_hostile_clients(port):
    async def run_all():
        await asyncio.gather(*(connect_for_ever(port, *kind) for *kind, count in HOSTILE for _ in range(count)))

    asyncio.run(run_all())


# ---------------------------------------------------------------- good clients


class Load:
    """Requests to a server, each answer compared with what the same request got alone.

    bodies: the requests (bytes). ok: whether every request so far got its scores.
    """

    def __init__(self, port, bodies):
        self.server, self.bodies, self.ok = Server(port=port, timeout=120), bodies, True
        self.expected = [self.ask(body) for body in bodies]  # which also fills the cache, where there is one

    def ask(self, body):
        """Scores (2, P), t2i and i2t. RuntimeError where the server answers that there are none."""
        for _ in range(ATTEMPTS):
            status, _, answer = self.server.send(body)
            if status != 429:
                break
            time.sleep(1)
        if status != 200:
            raise RuntimeError(f"{status} {explain(answer)}")
        return np.array([*json.loads(answer).values()])

    def metric(self, name):
        """A number of the server's /metrics, NaN where it does not have it."""
        text = self.server.send(path="/metrics", method="GET")[2].decode()
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else float("nan")

    def measure(self, number):
        """Seconds that a request took, and what was wrong with its answer: a text, empty where nothing was."""
        number, started = number % len(self.bodies), time.perf_counter()
        try:
            difference = np.abs(self.ask(self.bodies[number]) - self.expected[number]).max()
        except FAILURES as error:
            return time.perf_counter() - started, f"{type(error).__name__} {error}"
        return time.perf_counter() - started, "" if difference <= TOLERANCE else f"scores differ by {difference:g}"

    def run(self, n_clients, n_requests):
        """Send requests from so many clients at a time; prints. Returns requests a second."""
        cpu_before, started = self.metric("process_cpu_seconds_total"), time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            times, wrong = zip(*pool.map(self.measure, range(n_requests)), strict=True)
        rate = n_requests / (time.perf_counter() - started)
        cpu = (self.metric("process_cpu_seconds_total") - cpu_before) / n_requests
        middle, late = np.percentile(times, [50, 95]) * 1000
        wrong = list(filter(None, wrong))
        self.ok &= not wrong
        print(
            f"{n_clients:3d} clients: {rate:6.1f} requests/s, median {middle:.0f} ms, 95% {late:.0f} ms, server's CPU "
            f"a request {1000 * cpu:.1f} ms, memory {self.metric('process_resident_memory_bytes') / 2**20:.0f} MB, "
            f"{len(wrong)} of {n_requests} without their scores",
            *wrong[:3],
            sep="\n  ",
            flush=True,
        )
        return rate

    def run_hostile(self, n_clients, n_requests):
        """The load alone and beside hostile clients, in turns; prints. ok becomes False where too little was kept."""
        calm, hostile, spawn = [], [], multiprocessing.get_context("spawn")
        for _ in range(ROUNDS):
            print("alone:")
            calm.append(self.run(n_clients, n_requests))
            print("beside hostile clients:")
            process = spawn.Process(target=run_hostile_clients, args=(self.server.port,), daemon=True)
            process.start()
            time.sleep(WARM_UP)
            hostile.append(self.run(n_clients, n_requests))
            process.kill()
            process.join()
        kept = median(hostile) / median(calm)
        print(f"medians {median(calm):.1f} and {median(hostile):.1f} requests/s, {kept:.0%} kept", flush=True)
        self.ok &= kept >= LEAST_SHARE


def measure(port, bodies, opt):
    """Run the load of every number of clients; prints. Returns whether all went well."""
    try:
        load = Load(port, bodies)
    except FAILURES as error:
        raise InputError(f"--port {port}: {error}, expected scores") from None
    if not opt.hostile:
        load.run(1, min(opt.requests, 200))
    for clients in opt.clients:
        (load.run_hostile if opt.hostile else load.run)(clients, opt.requests)
    return load.ok


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
    add("--images", type=int, default=8, help="a request (default: %(default)s)")
    add("--embed_size", type=int, default=512, help="of the own model (default: %(default)s)")
    add("--img_dim", type=int, default=2048, help="of the features (default: %(default)s)")
    add("--hostile", action="store_true", help="measure each row alone and beside 200 clients that mean harm, in turns")
    opt = parser.parse_args()
    if min(opt.requests, opt.images, *opt.clients) < 1:
        parser.error("expected numbers of at least 1")
    rng, ok = np.random.default_rng(0), True
    bodies = [json.dumps(make_request(rng, opt.images, opt.img_dim)).encode() for _ in range(DISTINCT)]
    print(f"{DISTINCT} different requests, {opt.images} images and {len(bodies[0]) / 1e6:.2f} MB each")
    if opt.port:
        sys.exit(0 if measure(opt.port, bodies, opt) else 1)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(folder, opt.embed_size, opt.img_dim)
        for case, size in CACHE_MB.items():
            with running_server(model, "--cache_mb", str(size)) as port:
                print(f"embed_size {opt.embed_size}, every image {case}:", flush=True)
                ok &= measure(port, bodies, opt)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    run(main)
