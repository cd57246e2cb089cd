"""A load on a scoring server, measured: rate, latency, refusals, wrong answers, CPU time and memory."""

import http.client
import os
import re
import threading
import time

import numpy as np

from scripts.load.server import Busy, Client

TOLERANCE = 1e-5  # between the scores of a request alone and among others
ATTEMPTS = 20  # of a request that is answered 429, a second apart


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


class Load:
    """n_requests requests from so many clients at a time, each answer compared with the expected scores.

    pid: the server's process, to measure its CPU time and memory where the system is Linux; None else.
    """

    def __init__(self, port, bodies, expected, pid=None):
        self.port, self.bodies, self.expected = port, bodies, expected
        self.pid = pid if os.path.exists("/proc/stat") else None

    def run(self, clients, n_requests):
        self.clients, self.n_requests = clients, n_requests
        self.numbers, self.lock = iter(range(n_requests)), threading.Lock()
        self.times, self.refusals, self.wrong, self.failed, self.memory = [], [], [], [], []
        before, cpu = cache_counts(self.port), cpu_seconds(self.pid) if self.pid else None
        threads = [threading.Thread(target=self.work) for _ in range(clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = time.perf_counter() - started
        self.rate = len(self.times) / self.seconds
        self.cpu = cpu_seconds(self.pid) - cpu if self.pid else None
        hits, new = cache_counts(self.port) - before
        self.from_cache = hits / max(1, hits + new)
        return self

    def work(self):
        client = Client(self.port)
        while True:
            with self.lock:
                number = next(self.numbers, None)
            if number is None:
                return
            if self.pid and number % max(1, self.n_requests // 10) == 0:
                self.memory.append(memory_mb(self.pid))
            number %= len(self.bodies)
            started = time.perf_counter()
            try:
                scores = self.ask(client, self.bodies[number])
            except (OSError, http.client.HTTPException, RuntimeError) as error:
                self.failed.append(f"{type(error).__name__} {error}")
                client = Client(self.port)
                continue
            self.times.append(time.perf_counter() - started)
            difference = np.abs(scores - self.expected[number]).max()
            if not difference <= TOLERANCE:
                self.wrong.append(difference)

    def ask(self, client, body):
        """The scores of a request, sent again where the server is busy."""
        for attempt in range(ATTEMPTS):
            try:
                scores = client.score(body)
            except Busy as busy:
                reason = busy
                time.sleep(1)
            else:
                if attempt:
                    self.refusals.append(attempt)
                return scores
        raise reason

    def fine(self):
        """Whether every request got its scores."""
        return not self.failed and not self.wrong

    def __str__(self):
        middle, late = np.percentile(self.times, [50, 95]) * 1000 if self.times else (float("nan"),) * 2
        line = (
            f"{self.clients:3d} clients: {self.rate:6.1f} requests/s, median {middle:.0f} ms, 95% {late:.0f} ms, "
            f"{len(self.failed)} of {self.n_requests} failed, {len(self.wrong)} wrong, "
            f"{len(self.refusals)} refused first, at most {max(self.refusals, default=0)} times, "
            f"{self.from_cache:.0%} of the pictures from the cache"
        )
        if self.pid:
            server, client, machine = self.cpu
            others = max(0, machine - server - client) / (self.seconds * os.cpu_count())
            line += (
                f"\n             CPU a request: server {1000 * server / self.n_requests:.1f} ms, client "
                f"{1000 * client / self.n_requests:.1f} ms; other programs took {others:.0%} of the machine; "
                f"memory {self.memory[0]:.0f} -> {self.memory[-1]:.0f} MB, most {max(self.memory):.0f}"
            )
        return "\n".join([line, *(f"  failed: {problem}" for problem in self.failed[:3])])
