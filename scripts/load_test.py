"""Put a scoring server under load and compare every answer with the one that the same request got alone.

Without --port it makes a model of random weights and starts servers of its own on this machine: once with an embedding
cache that is too small for the pictures, so that every one is new to the server, and once with the default cache,
where every one has been seen before. The clients run on the same cores, and so does whatever else the machine does:
the table says what each took.

--hostile measures each row three times alone and three times beside 200 clients that mean harm: 100 send their headers
a byte at a time, 60 a body at 2 KB a second, 20 break off half-way, 10 send nonsense, 10 announce 100 GB. Each connects
again a second after its connection has ended.
"""

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from statistics import median

import numpy as np

if not __package__:
    import _root  # noqa: F401

from lib.errors import run
from scripts.load.hostile import hostile_clients
from scripts.load.measurement import Load
from scripts.load.server import Client, Server, make_model, make_request

CACHE_MB = {"new": 2, "seen": 256}  # room for the pictures of 3 requests of 8, and the server's default
LEAST_SHARE = 0.5  # of the calm rate that good clients must keep beside hostile ones
ROUNDS = 3  # of calm and hostile, in turns: what else runs on the machine changes
WARM_UP = 5  # seconds until all hostile clients are at work


def measure(port, bodies, opt, title, pid=None):
    """Serial answers first, then the load; prints. Returns whether all went well."""
    print(title, flush=True)
    client = Client(port)
    expected = [client.score(body) for body in bodies]  # which also fills the cache, where there is one
    load = Load(port, bodies, expected, pid)
    if opt.hostile:
        return all([measure_hostile(load, clients, opt.requests) for clients in opt.clients])
    ok = True
    for clients in (1, *opt.clients):
        print(load.run(clients, min(opt.requests, 200) if clients == 1 else opt.requests), flush=True)
        ok &= load.fine()
    return ok


def measure_hostile(load, clients, n_requests):
    """A load alone and beside hostile clients, in turns; prints. Returns whether enough of its rate was kept."""
    rates, ok = {"alone": [], "beside hostile clients": []}, True
    for _ in range(ROUNDS):
        for case, found in rates.items():
            with hostile_clients(load.port, load.bodies[0]) if case != "alone" else nullcontext():
                time.sleep(0 if case == "alone" else WARM_UP)
                print(f"{case}:\n{load.run(clients, n_requests)}", flush=True)
            found.append(load.rate)
            ok &= load.fine()
    calm, hostile = map(median, rates.values())
    print(
        f"{clients:3d} clients: medians {calm:.1f} and {hostile:.1f} requests/s, {hostile / calm:.0%} kept", flush=True
    )
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
    add("--hostile", action="store_true", help="measure each row alone and beside 200 clients that mean harm, in turns")
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
