"""A load on a scoring server, measured: rate, latency, refusals, wrong answers, CPU time and memory."""

import http.client
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from scripts.load.server import Client

TOLERANCE = 1e-5  # between the scores of a request alone and among others
FAILURES = (OSError, http.client.HTTPException, RuntimeError)  # of Client.score


def read_metrics(port):
    """{name: value} of a server's /metrics, a name with its labels."""
    text = Client(port).ask("GET", "/metrics")[1].decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:{.*})?) (\S+)$", text, re.M)}


def machine_seconds():
    """CPU time so far of all programs on this machine, on Linux; else 0."""
    if not os.path.exists("/proc/stat"):
        return 0
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, *interrupts = map(int, file.readline().split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


class Load:
    """Requests from so many clients at a time, each answer compared with the expected scores."""

    def __init__(self, port, bodies, expected):
        self.port, self.bodies, self.expected = port, bodies, expected

    def counts(self):
        """Images found in the cache and not, and CPU seconds of the server, this process and the machine, so far."""
        found = read_metrics(self.port)
        images = (found.get(f'pfan_pictures_total{{source="{source}"}}', 0) for source in ("cache", "new"))
        return np.array([*images, found.get("process_cpu_seconds_total", 0), time.process_time(), machine_seconds()])

    def run(self, n_clients, n_requests):
        self.n_clients, self.n_requests = n_clients, n_requests
        self.times, self.wrong, self.failed, self.memory = [], [], [], []
        clients, numbers = [Client(self.port) for _ in range(n_clients)], iter(range(n_requests))
        before, started = self.counts(), time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            list(pool.map(lambda client: self.ask(client, numbers), clients))
        self.seconds = time.perf_counter() - started
        self.rate, self.used = len(self.times) / self.seconds, self.counts() - before
        self.refusals = [count for client in clients for count in client.refusals if count]
        return self

    def ask(self, client, numbers):
        """Send the requests of these numbers, which other clients draw from as well, and note what comes."""
        for number in numbers:
            if number % max(1, self.n_requests // 10) == 0:
                self.memory.append(read_metrics(self.port).get("process_resident_memory_bytes", 0) / 2**20)
            number, started = number % len(self.bodies), time.perf_counter()
            try:
                scores = client.score(self.bodies[number])
            except FAILURES as error:
                self.failed.append(f"{type(error).__name__} {error}")
                continue
            self.times.append(time.perf_counter() - started)
            difference = np.abs(scores - self.expected[number]).max()
            if not difference <= TOLERANCE:
                self.wrong.append(difference)

    def fine(self):
        """Whether every request got its scores."""
        return not self.failed and not self.wrong

    def __str__(self):
        middle, late = np.percentile(self.times, [50, 95]) * 1000 if self.times else (float("nan"),) * 2
        hits, new, server, client, machine = self.used
        others = max(0, machine - server - client) / (self.seconds * os.cpu_count())
        lines = [
            f"{self.n_clients:3d} clients: {self.rate:6.1f} requests/s, median {middle:.0f} ms, 95% {late:.0f} ms, "
            f"{len(self.failed)} of {self.n_requests} failed, {len(self.wrong)} wrong, "
            f"{len(self.refusals)} refused first, at most {max(self.refusals, default=0)} times, "
            f"{hits / max(1, hits + new):.0%} of the images from the cache",
            f"             CPU a request: server {1000 * server / self.n_requests:.1f} ms, client "
            f"{1000 * client / self.n_requests:.1f} ms; other programs took {others:.0%} of the machine; "
            f"memory {self.memory[0]:.0f} -> {self.memory[-1]:.0f} MB, most {max(self.memory):.0f}",
        ]
        return "\n".join([*lines, *(f"  failed: {problem}" for problem in self.failed[:3])])
