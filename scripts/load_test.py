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
import http.client
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from statistics import median

import numpy as np

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, run
from scripts.load.hostile import hostile_clients
from scripts.load.server import make_model, make_request, running_server
from test_server.test import Server, explain

CACHE_MB = {"new": 0, "seen": 256}  # none, and the server's default
DISTINCT = 40  # requests that differ
LEAST_SHARE = 0.5  # of the calm rate that good clients must keep beside hostile ones
ROUNDS = 3  # of calm and hostile, in turns: what else runs on the machine changes
WARM_UP = 5  # seconds until all hostile clients are at work
TOLERANCE = 1e-5  # between the scores of a request alone and among others
ATTEMPTS = 20  # of a request that is answered 429, a second apart
FAILURES = (OSError, http.client.HTTPException, RuntimeError)  # of ask


def read_metrics(server):
    """{name: value} of a server's /metrics, a name with its labels."""
    text = server.send(path="/metrics", method="GET")[2].decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:{.*})?) (\S+)$", text, re.M)}


def ask(server, body):
    """Scores (2, P), t2i and i2t, and how often the server was busy before. RuntimeError where there are none."""
    for refusals in range(ATTEMPTS):
        status, _, answer = server.send(body)
        if status == 200:
            return np.array([*json.loads(answer).values()]), refusals
        if status != 429:
            break
        time.sleep(1)
    raise RuntimeError(f"{status} {explain(answer)}")


class Load:
    """Requests from so many clients at a time, each answer compared with the expected scores."""

    def __init__(self, server, bodies, expected):
        self.server, self.bodies, self.expected = server, bodies, expected

    def counts(self):
        """Images found in the cache and not, CPU seconds of the server and of this process, so far."""
        found = read_metrics(self.server)
        images = (found.get(f'pfan_pictures_total{{source="{source}"}}', 0) for source in ("cache", "new"))
        return np.array([*images, found.get("process_cpu_seconds_total", 0), time.process_time()])

    def run(self, n_clients, n_requests):
        self.n_clients, self.n_requests = n_clients, n_requests
        self.times, self.refusals, self.wrong, self.failed, self.memory = [], [], [], [], []
        before, started = self.counts(), time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            list(pool.map(self.measure, range(n_requests)))
        self.rate = len(self.times) / (time.perf_counter() - started)
        self.used = self.counts() - before
        return self

    def measure(self, number):
        """Send one request and note what comes."""
        if number % max(1, self.n_requests // 10) == 0:
            self.memory.append(read_metrics(self.server).get("process_resident_memory_bytes", 0) / 2**20)
        number, started = number % len(self.bodies), time.perf_counter()
        try:
            scores, refusals = ask(self.server, self.bodies[number])
        except FAILURES as error:
            return self.failed.append(f"{type(error).__name__} {error}")
        self.times.append(time.perf_counter() - started)
        self.refusals += [refusals] * bool(refusals)
        difference = np.abs(scores - self.expected[number]).max()
        if not difference <= TOLERANCE:
            self.wrong.append(difference)

    def fine(self):
        """Whether every request got its scores."""
        return not self.failed and not self.wrong

    def __str__(self):
        middle, late = np.percentile(self.times, [50, 95]) * 1000 if self.times else (float("nan"),) * 2
        hits, new, *seconds = self.used
        server, client = (1000 * used / self.n_requests for used in seconds)
        lines = [
            f"{self.n_clients:3d} clients: {self.rate:6.1f} requests/s, median {middle:.0f} ms, 95% {late:.0f} ms, "
            f"{len(self.failed)} of {self.n_requests} failed, {len(self.wrong)} wrong, "
            f"{len(self.refusals)} refused first, at most {max(self.refusals, default=0)} times, "
            f"{hits / max(1, hits + new):.0%} of the images from the cache",
            f"             CPU a request: server {server:.1f} ms, client {client:.1f} ms; "
            f"memory {self.memory[0]:.0f} -> {self.memory[-1]:.0f} MB, most {max(self.memory):.0f}",
        ]
        return "\n".join([*lines, *(f"  failed: {problem}" for problem in self.failed[:3])])


def measure(port, bodies, opt):
    """Serial answers first, then the load; prints. Returns whether all went well."""
    server = Server(port=port, timeout=120)
    try:
        expected = [ask(server, body)[0] for body in bodies]  # which also fills the cache, where there is one
    except FAILURES as error:
        raise InputError(f"--port {port}: {error}, expected scores") from None
    load, ok = Load(server, bodies, expected), True
    for clients in opt.clients if opt.hostile else (1, *opt.clients):
        if opt.hostile:
            ok &= measure_hostile(load, clients, opt.requests)
        else:
            print(load.run(clients, min(opt.requests, 200) if clients == 1 else opt.requests), flush=True)
            ok &= load.fine()
    return ok


def measure_hostile(load, clients, n_requests):
    """A load alone and beside hostile clients, in turns; prints. Returns whether enough of its rate was kept."""
    rates, ok = {"alone": [], "beside hostile clients": []}, True
    for _ in range(ROUNDS):
        for case, found in rates.items():
            with hostile_clients(load.server.port, load.bodies[0]) if case != "alone" else nullcontext():
                time.sleep(0 if case == "alone" else WARM_UP)
                print(f"{case}:\n{load.run(clients, n_requests)}", flush=True)
            found.append(load.rate)
            ok &= load.fine()
    calm, hostile = map(median, rates.values())
    kept = f"medians {calm:.1f} and {hostile:.1f} requests/s, {hostile / calm:.0%} kept"
    print(f"{clients:3d} clients: {kept}", flush=True)
    return ok and hostile >= LEAST_SHARE * calm


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
