"""The scoring server: how well images fit a sentence, by a whole-image model.

python -m Tencent_PFAN.scan_server_whole ./runs/sentence_t2i.pth.tar 5091

A request is refused before its body is read, or read; a body that is there takes a place in the queue and is parsed in
a thread. Whatever waits is scored as one batch while the next requests are read. Nothing is written to disk.
"""

import argparse
import asyncio
import hmac
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
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
from lib.web import Answer, Refused
from Tencent_PFAN.bodies import Bodies, unpack, unpacked_size
from Tencent_PFAN.demo_page import add_demo
from Tencent_PFAN.scoring import Scorer
from Tencent_PFAN.web import PATH, RESPONSES, Counting, request_body

BATCH_IMAGES = 256  # of the requests that are scored together; a single request may have more
HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------- the service


class Service:
    """Admission, queue, batches and counts of one scorer. opt: the command line's options."""

    def __init__(self, scorer, opt):
        self.scorer, self.opt = scorer, opt
        self.bodies = Bodies(opt)
        self.waiting, self.waiting_bytes = 0, 0  # requests whose bodies are there and that are not answered
        self.scoring_since = None  # when the batch under way began (the loop's time)
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

    def start(self):
        """Score what comes, until stop(). Called in the loop that answers the requests."""
        self.queue, self.task = asyncio.Queue(), asyncio.create_task(self.score_batches())

    def stop(self):
        self.task.cancel()
        self.parsers.shutdown()
        self.model_thread.shutdown(wait=False)  # a batch that hangs would be waited for without end

    def check_health(self):
        """Raises Refused where nothing is scored any more, though requests are taken."""
        if self.task.done():
            raise Refused(503, f"scoring has ended, restart the server ({self.task.exception()!r})")
        if self.scoring_since and asyncio.get_running_loop().time() - self.scoring_since > self.opt.timeout:
            raise Refused(503, f"a batch has been scored for over {self.opt.timeout:g} seconds (--timeout)")

    def unanswered(self):
        return len(self.bodies) + self.waiting

    async def score(self, request):
        """A request's answer. Raises Refused."""
        packed = check_content(request.headers)
        announced = int(request.headers.get("content-length", 0))
        self.bodies.check_size(announced)
        self.check_queue(announced)
        body = await self.bodies.read(request)
        unpacked = unpacked_size(body) if packed else 0
        self.bodies.check_size(unpacked)
        with self.place_in_queue(len(body) + unpacked):
            try:
                async with asyncio.timeout(self.opt.timeout):
                    return await self.score_body(body, unpacked)
            except TimeoutError:
                raise Refused(503, f"not scored within {self.opt.timeout:g} seconds", Retry_After="1") from None

    def check_queue(self, size):
        """Raises Refused where a body of so many bytes has no place in the queue."""
        if self.waiting >= self.opt.queue or (self.waiting and self.waiting_bytes + size > self.opt.queue_mb << 20):
            raise Refused(429, f"{self.waiting} requests wait, come back later", Retry_After="1")

    @contextmanager
    def place_in_queue(self, size):
        """Inside, a body of so many bytes waits. Raises Refused as check_queue."""
        self.check_queue(size)
        self.waiting += 1
        self.waiting_bytes += size
        try:
            yield
        finally:
            self.waiting -= 1
            self.waiting_bytes -= size

    async def score_body(self, body, unpacked):
        """The answer to a body that is there; unpacked: size of what is in it where it is gzip, else 0."""
        loop = asyncio.get_running_loop()
        if unpacked:
            body = await loop.run_in_executor(self.parsers, unpack, body, unpacked)
        job = await loop.run_in_executor(self.parsers, self.scorer.read, body)
        self.images.labels("cache").inc(len(job.embeddings))
        self.images.labels("new").inc(len(job.new))
        future = loop.create_future()
        await self.queue.put((job, future))
        return Answer(await future, headers={"X-Model": self.scorer.digest})

    async def score_batches(self):
        """Take what waits, score it as one batch, hand out the results; forever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            while not self.queue.empty() and sum(len(job.keys) for job, _ in batch) < BATCH_IMAGES:
                batch.append(self.queue.get_nowait())
            batch = [(job, future) for job, future in batch if not future.done()]  # done: nobody waits any more
            if not batch:
                continue
            self.batch_requests.observe(len(batch))
            self.batch_images.observe(sum(len(job.keys) for job, _ in batch))
            jobs, futures = zip(*batch, strict=True)
            self.scoring_since = loop.time()
            results = await loop.run_in_executor(self.model_thread, self.score_jobs, jobs)
            self.scoring_since = None
            for future, result in zip(futures, results, strict=True):
                if not future.done():
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


def make_app(scorer, opt):
    """The FastAPI app of a Scorer. opt: the command line's options."""
    service = Service(scorer, opt)

    @asynccontextmanager
    async def lifespan(app):
        service.start()
        yield
        service.stop()  # uvicorn comes here when every request has been answered

    async def check_key(key=Security(APIKeyHeader(name="X-API-Key", auto_error=False))):  # noqa: B008
        if opt.api_key and not hmac.compare_digest((key or "").encode(), opt.api_key.encode()):
            raise Refused(401, "X-API-Key: missing or wrong")

    app = FastAPIOffline(
        title="PFAN scoring server",
        version="1",
        description="How well images fit a sentence, words to regions (t2i) and regions to words (i2t).",
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers=web.REFUSALS,
    )
    app.state.service = service
    app.add_middleware(Counting, service=service)
    web.guard(app, opt.host, opt.allowed_hosts)
    keyed = [Depends(check_key)]

    document = {"openapi_extra": {"requestBody": request_body(scorer.img_dim)}, "responses": RESPONSES}

    @app.post(PATH, dependencies=keyed, **document)
    async def score(request: Request) -> Response:
        """Scores of every image with the sentence, both ways; with `sentences`, a list for each of them."""
        return await service.score(request)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        service.check_health()
        return {"status": "ok", "waiting": service.unanswered()}

    @app.get("/metrics", dependencies=keyed, response_class=PlainTextResponse)
    async def metrics():
        return Response(prometheus.generate_latest(service.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(os.path.join(HERE, "page.html"))

    if opt.demo_path:
        add_demo(app, opt.demo_path, keyed)
    return app


def at_least(least, kind=int):
    """For argparse: a finite number that is not smaller."""

    def parse(text):
        number = kind(text)
        if not least <= number < math.inf:
            raise argparse.ArgumentTypeError(f"{text}, expected at least {least}")
        return number

    parse.__name__ = kind.__name__
    return parse


def get_parser():
    parser = argparse.ArgumentParser(
        description="Score images against sentences over HTTP.",
        epilog="example: python -m Tencent_PFAN.scan_server_whole ./runs/sentence_t2i.pth.tar 5091",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="checkpoint of train_whole.py")
    add("port", type=int, help="to listen on, 1 to 65535")
    add("--host", default="127.0.0.1", help="to listen on; 0.0.0.0 for every network this machine is in")
    add("--vocab_path", help="folder of DATA_NAME_sent_vocab.json; the checkpoint's where not given")
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME", help="further names it answers to on 127.0.0.1")
    add("--api_key", help="what X-API-Key must be; better in PFAN_API_KEY: others can read command lines")
    add("--timeout", type=at_least(0.1, float), default=60, help="seconds for a body to arrive, and for its scores")
    add("--max_body_mb", type=at_least(1), default=256, help="largest body; 8 images have about 3.5 MB")
    add("--bodies", type=at_least(1), default=128, help="bodies that may arrive at a time, before the slowest ends")
    add("--bodies_mb", type=at_least(1), default=512, help="size of what has arrived of them")
    add("--min_rate", type=at_least(0, float), default=8, help="KB a second at which a body must arrive, 0 for any")
    add("--queue", type=at_least(1), default=64, help="requests with their bodies there that may wait; more get 429")
    add("--queue_mb", type=at_least(1), default=1024, help="size of the bodies of the requests that wait")
    add("--cache_mb", type=at_least(0), default=256, help="memory for embeddings of images that come again, 0: none")
    add("--threads", type=at_least(1), default=os.cpu_count(), help="of the matrix products")
    add("--demo_path", help="a tencent_data_meta folder whose items the page at / offers")
    add("--device", default="auto", help="auto, cpu, cuda, …")
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if not 0 < opt.port < 65536:
        parser.error(f"port: {opt.port}, expected 1 to 65535")
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
