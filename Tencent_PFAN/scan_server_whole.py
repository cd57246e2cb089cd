"""The scoring server: how well images fit a sentence, by a whole-image model.

python -m Tencent_PFAN.scan_server_whole ./runs/sentence_t2i.pth.tar 5091

A request is refused before its body is read, or read; a body that is there takes a place in the queue and is parsed in
a thread. Whatever waits is scored as one batch while the next requests are read. Nothing is written to disk.
"""

import argparse
import asyncio
import hmac
import os
import re
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import prometheus_client as prometheus
import torch
from fastapi import Depends, Request, Security
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline

if not __package__:
    import _root  # noqa: F401

from lib import web
from lib.errors import run
from lib.options import COUNT, NOT_NEGATIVE, Option, add_options
from lib.web import COME_BACK, Answer, Refused
from Tencent_PFAN.bodies import Bodies, unpack, unpacked_size
from Tencent_PFAN.demo_page import add_demo
from Tencent_PFAN.scoring import Scorer, request_body

PATH = "/scan_sentence_image_score"
BATCH_IMAGES = 256  # of the requests that are scored together; a single request may have more
HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------- the service


class Service:
    """Admission, queue, batches and counts of one scorer. opt: the command line's options."""

    def __init__(self, scorer, opt):
        self.scorer, self.opt = scorer, opt
        self.bodies = Bodies(opt)
        self.waiting = []  # sizes of the bodies that are there and whose requests are not answered
        self.jobs = deque()  # (job, future of its result), not scored yet
        self.scoring_since = None  # when the batch under way began, of time.monotonic()
        self.parsers = ThreadPoolExecutor(os.cpu_count(), "parse")
        self.model_thread = ThreadPoolExecutor(1, "model")
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        kinds = prometheus.Counter, prometheus.Histogram, prometheus.Gauge
        counter, histogram, gauge = (partial(kind, registry=self.registry) for kind in kinds)
        self.requests = counter("pfan_requests", "Scoring requests", ["status"])
        self.errors = counter("pfan_errors", "Scoring requests answered with 4xx or 5xx")
        self.latency = histogram("pfan_latency_seconds", "From a request's headers to its answer")
        powers = [2**i for i in range(11)]
        self.batch_requests = histogram("pfan_batch_requests", "Requests scored as one batch", buckets=powers)
        self.batch_images = histogram("pfan_batch_pictures", "Images scored as one batch", buckets=powers)
        self.images = counter("pfan_pictures", "Images, by where from", ["source"])
        gauge("pfan_waiting", "Requests not answered yet").set_function(self.unanswered)
        gauge("pfan_bodies", "Bodies that arrive").set_function(self.bodies.__len__)

    def check_health(self):
        """Raises Refused where nothing is scored any more, though requests are taken."""
        since = self.scoring_since
        if since and time.monotonic() - since > self.opt.timeout:
            raise Refused(503, f"a batch has been scored for over {self.opt.timeout:g} seconds (--timeout)")

    def unanswered(self):
        return len(self.bodies) + len(self.waiting)

    async def count(self):
        """A dependency that counts a scoring request by its status, and how long its answer took."""
        started, status = time.perf_counter(), 500
        try:
            yield
            status = 200
        except Refused as error:
            status = error.status_code
            raise
        finally:
            self.errors.inc(status >= 400)
            self.requests.labels(status).inc()
            self.latency.observe(time.perf_counter() - started)

    async def score(self, request):
        """A request's answer. Raises Refused."""
        packed = check_content(request.headers)
        announced = int(request.headers.get("content-length", 0))
        self.bodies.check_size(announced)
        self.check_queue(announced)
        body = await self.bodies.read(request)
        unpacked = unpacked_size(body) if packed else 0
        self.bodies.check_size(unpacked)
        size = len(body) + unpacked
        self.check_queue(size)
        self.waiting.append(size)
        try:
            async with asyncio.timeout(self.opt.timeout):
                return Answer(await self.result(body, unpacked), headers={"X-Model": self.scorer.digest})
        except TimeoutError:
            raise Refused(503, f"not scored within {self.opt.timeout:g} seconds", COME_BACK) from None
        finally:
            self.waiting.remove(size)

    def check_queue(self, size):
        """Raises Refused where a body of so many bytes has no place in the queue."""
        full = len(self.waiting) >= self.opt.queue
        if full or (self.waiting and sum(self.waiting) + size > self.opt.queue_mb << 20):
            raise Refused(429, f"{len(self.waiting)} requests wait, come back later", COME_BACK)

    async def result(self, body, unpacked):
        """The scores that a body asks for; unpacked: size of what is in it where it is gzip, else 0."""
        loop = asyncio.get_running_loop()
        if unpacked:
            body = await loop.run_in_executor(self.parsers, unpack, body, unpacked)
        job = await loop.run_in_executor(self.parsers, self.scorer.read, body)
        self.images.labels("cache").inc(len(job.embeddings))
        self.images.labels("new").inc(len(job.new))
        future = Future()
        self.jobs.append((job, future))
        self.model_thread.submit(self.score_batch)
        return await asyncio.wrap_future(future)

    def score_batch(self):
        """Score what waits as one batch, in the model's thread. Called for each job, so that none is left."""
        batch, n_images = [], 0
        while self.jobs and n_images < BATCH_IMAGES:
            job, future = self.jobs.popleft()
            if future.set_running_or_notify_cancel():  # else nobody waits any more
                batch.append((job, future))
                n_images += len(job.keys)
        if not batch:
            return
        self.batch_requests.observe(len(batch))
        self.batch_images.observe(n_images)
        jobs, futures = zip(*batch, strict=True)
        self.scoring_since = time.monotonic()
        results = self.score_jobs(jobs)
        self.scoring_since = None
        for future, result in zip(futures, results, strict=True):
            (future.set_exception if isinstance(result, Exception) else future.set_result)(result)

    def score_jobs(self, jobs):
        """Results of jobs as one batch. Where that fails, each alone: an exception for those at fault."""
        try:
            return self.scorer.score(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [error]
        return [self.score_jobs([job])[0] for job in jobs]


def check_content(headers):
    """Whether a request's headers say that its body is gzip. Raises Refused where it is not JSON."""
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Content-Type: expected application/json")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise Refused(415, f"Content-Encoding: {encoding[:40]}, expected gzip or none")
    return encoding != "identity"


# ---------------------------------------------------------------- the app


@dataclass
class Scores:
    """An answer: a number for each image; with sentences, a list of these for each of them."""

    sim_t2i: list[float | list[float]]
    sim_i2t: list[float | list[float]]


@dataclass
class Error:
    error: str


RESPONSES = {200: {"model": Scores}, **{status: {"model": Error} for status in (400, 401, 408, 413, 415, 429, 503)}}


def make_app(scorer, opt):
    """The FastAPI app of a Scorer. opt: the command line's options."""
    service = Service(scorer, opt)

    async def check_key(key=Security(APIKeyHeader(name="X-API-Key", auto_error=False))):  # noqa: B008
        if opt.api_key and not hmac.compare_digest((key or "").encode(), opt.api_key.encode()):
            raise Refused(401, "X-API-Key: missing or wrong")

    app = FastAPIOffline(
        title="PFAN scoring server",
        version="1",
        description="How well images fit a sentence, words to regions (t2i) and regions to words (i2t).",
        redoc_url=None,
        exception_handlers=web.REFUSALS,
    )
    app.state.service = service
    web.guard(app, opt.host, opt.allowed_hosts)
    keyed, counted = Depends(check_key), Depends(service.count, scope="function")
    document = {"openapi_extra": {"requestBody": request_body(scorer.img_dim)}, "responses": RESPONSES}

    @app.post(PATH, dependencies=[counted, keyed], **document)
    async def score(request: Request) -> Response:
        """Scores of every image with the sentence, both ways; with `sentences`, a list for each of them."""
        return await service.score(request)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        service.check_health()
        return {"status": "ok", "waiting": service.unanswered()}

    @app.get("/metrics", dependencies=[keyed], response_class=PlainTextResponse)
    async def metrics():
        return Response(prometheus.generate_latest(service.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(os.path.join(HERE, "page.html"))

    if opt.demo_path:
        add_demo(app, opt.demo_path, [keyed])
    return app


LIMITS = (
    Option("timeout", 60.0, "seconds for a body to arrive, and for its scores", (0.1, 2**31)),
    Option("max_body_mb", 256, "largest body; 8 images have about 3.5 MB", COUNT),
    Option("bodies", 128, "bodies that may arrive at a time, before the slowest ends", COUNT),
    Option("bodies_mb", 512, "size of what has arrived of them", COUNT),
    Option("min_rate", 8.0, "KB a second at which a body must arrive, 0 for any", NOT_NEGATIVE),
    Option("queue", 64, "requests with their bodies there that may wait; more get 429", COUNT),
    Option("queue_mb", 1024, "size of the bodies of the requests that wait", COUNT),
    Option("cache_mb", 256, "memory for embeddings of images that come again, 0: none", NOT_NEGATIVE),
    Option("threads", os.cpu_count() or 1, "of the matrix products", COUNT),
)


def get_parser():
    parser = argparse.ArgumentParser(
        description="Score images against sentences over HTTP.",
        epilog="example: python -m Tencent_PFAN.scan_server_whole ./runs/sentence_t2i.pth.tar 5091",
    )
    add = parser.add_argument
    add("model", help="checkpoint of train_whole.py")
    add("port", type=int, help="to listen on, 1 to 65535")
    everywhere = "0.0.0.0 for every network this machine is in"
    add("--host", default="127.0.0.1", help=f"to listen on; {everywhere} (default: %(default)s)")
    add("--vocab_path", help="folder of DATA_NAME_sent_vocab.json (default: the checkpoint's)")
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME", help="further names it answers to on 127.0.0.1")
    add("--api_key", help="what X-API-Key must be; better in PFAN_API_KEY: others can read command lines")
    add("--demo_path", help="a tencent_data_meta folder whose items the page at / offers")
    add_options(parser, (*LIMITS, "device"))
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if not 0 < opt.port < 65536:
        parser.error(f"port: {opt.port}, expected 1 to 65535")
    for row in LIMITS:
        row.check(getattr(opt, row.name))
    if opt.api_key is None:
        opt.api_key = os.environ.get("PFAN_API_KEY") or None
    if opt.api_key is not None and not re.fullmatch("[!-~]([ -~]*[!-~])?", opt.api_key):
        parser.error("--api_key or PFAN_API_KEY: expected printable ASCII characters, no blanks around them")
    with web.listen(opt.host, opt.port) as listening:  # before the model is read, which takes a while
        torch.set_num_threads(opt.threads)
        scorer = Scorer(opt.model, opt.vocab_path, opt.cache_mb << 20, device=opt.device)
        app = make_app(scorer, opt)
        print(f"{opt.model}: http://{web.in_brackets(opt.host)}:{opt.port}", flush=True)
        # as long as it takes to read what has begun to arrive, and to score it
        web.serve(app, listening, timeout_keep_alive=30, timeout_graceful_shutdown=int(2 * opt.timeout) + 1)
    if app.state.service.scoring_since:
        print("error: a batch was still being scored", file=sys.stderr)
        os._exit(1)  # Python's own end waits for its thread


if __name__ == "__main__":
    run(main)
