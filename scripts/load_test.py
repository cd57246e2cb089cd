"""Put a scoring server under load and compare every answer with the one that the same request got alone.

Without --port it makes a model of random weights and starts servers of its own on this machine: once without an
embedding cache, so that every image is new to the server, and once with the default one, where every image has been
seen before. The clients run on the same cores, and so does whatever else the machine does: what each took is printed.

--hostile measures each row three times alone and three times beside 200 clients that mean harm: 100 send their headers
a byte at a time, 60 a body at 2 KB a second, 20 break off half-way, 10 send nonsense, 10 announce 100 GB. Each connects
again a second after its connection has ended.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from statistics import median

import numpy as np

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, run
from scripts.load.hostile import hostile_clients
from scripts.load.measurement import FAILURES, Load
from scripts.load.server import Client, make_model, make_request, running_server

CACHE_MB = {"new": 0, "seen": 256}  # none, and the server's default
DISTINCT = 40  # requests that differ
LEAST_SHARE = 0.5  # of the calm rate that good clients must keep beside hostile ones
ROUNDS = 3  # of calm and hostile, in turns: what else runs on the machine changes
WARM_UP = 5  # seconds until all hostile clients are at work


def measure(port, bodies, opt):
    """Serial answers first, then the load; prints. Returns whether all went well."""
    client = Client(port)
    try:
        expected = [client.score(body) for body in bodies]  # which also fills the cache, where there is one
    except FAILURES as error:
        raise InputError(f"--port {port}: {error}, expected scores") from None
    load, ok = Load(port, bodies, expected), True
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
            with hostile_clients(load.port, load.bodies[0]) if case != "alone" else nullcontext():
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
