"""The scoring server: how well pictures fit a sentence, by a whole-image model.

python -m Tencent_PFAN.scan_server_whole ./runs/sentence_t2i.pth.tar 5091

A request is admitted (or refused before its body is read), read, parsed in a thread, and queued. Whatever waits in the
queue is scored as one batch while the next requests are read. Nothing is written to disk.
"""

import argparse
import asyncio
import hmac
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import prometheus_client as prometheus
import torch
from fastapi import Depends, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from starlette.requests import ClientDisconnect

if not __package__:
    import _root  # noqa: F401

from lib import web
from lib.errors import run
from lib.web import Answer, Refused
from Tencent_PFAN.demo_page import add_demo
from Tencent_PFAN.scoring import BadRequest, Scorer
from Tencent_PFAN.web import PATH, Counting, json_of, request_schema, responses

BATCH_PICTURES = 256  # of the requests that are scored together; a single request may have more
HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------- the service


class Service:
    """Admission, queue, batches and counts of one scorer. opt: the command line's options."""

    def __init__(self, scorer, opt):
        self.scorer, self.opt = scorer, opt
        self.waiting, self.waiting_bytes = 0, 0  # requests admitted and not answered, and their bodies
        self.parsers = ThreadPoolExecutor(os.cpu_count(), "parse")
        self.model_thread = ThreadPoolExecutor(1, "model")
        self.registry = registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter("pfan_requests", "Scoring requests", ["status"], registry=registry)
        self.errors = prometheus.Counter("pfan_errors", "Scoring requests answered with 4xx or 5xx", registry=registry)
        self.latency = prometheus.Histogram(
            "pfan_latency_seconds", "From a request's headers to its answer", registry=registry
        )
        self.batch_requests, self.batch_pictures = (
            prometheus.Histogram(
                f"pfan_batch_{what}",
                f"{what.capitalize()} scored as one batch",
                registry=registry,
                buckets=[2**i for i in range(11)],
            )
            for what in ("requests", "pictures")
        )
        self.pictures = prometheus.Counter("pfan_pictures", "Pictures, by where from", ["source"], registry=registry)
        prometheus.Gauge("pfan_waiting", "Requests not answered yet", registry=registry).set_function(
            lambda: self.waiting
        )

    async def score(self, request):
        """A request's answer. Raises Refused."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type: expected application/json")
        announced = int(request.headers.get("content-length", 0))
        self.check_size(announced)
        if self.waiting >= self.opt.queue or (
            self.waiting and self.waiting_bytes + announced > self.opt.queue_mb << 20
        ):
            raise Refused(429, f"{self.waiting} requests wait, come back later", Retry_After="1")
        self.waiting += 1
        admitted = [announced]  # bytes that this request is counted with
        self.waiting_bytes += announced
        try:
            async with asyncio.timeout(self.opt.timeout):
                body = await self.read_body(request, admitted)
            async with asyncio.timeout(self.opt.timeout):
                return await self.score_body(body)
        except TimeoutError:
            if request.scope.get("body_read"):
                raise Refused(503, f"not scored within {self.opt.timeout:g} seconds", Retry_After="1") from None
            reason = f"body: not complete after {self.opt.timeout:g} seconds"
            raise Refused(408, reason, Connection="close") from None
        except ClientDisconnect:
            raise Refused(400, "body: the connection ended before it was complete") from None
        finally:
            self.waiting -= 1
            self.waiting_bytes -= admitted[0]

    def check_size(self, size):
        if size > self.opt.max_body_mb << 20:
            raise Refused(413, f"body: over {self.opt.max_body_mb} MB (--max_body_mb)", Connection="close")

    async def read_body(self, request, admitted):
        chunks, size = [], 0  # a growing bytearray would be copied again and again
        async for chunk in request.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size > admitted[0]:  # sent in chunks, without a Content-Length
                self.waiting_bytes += size - admitted[0]
                admitted[0] = size
                self.check_size(size)
                if self.waiting > 1 and self.waiting_bytes > self.opt.queue_mb << 20:
                    raise Refused(429, f"{self.waiting} requests wait, come back later", Retry_After="1")
        request.scope["body_read"] = True
        return b"".join(chunks)

    async def score_body(self, body):
        loop = asyncio.get_running_loop()
        try:
            job = await loop.run_in_executor(self.parsers, self.scorer.read, body)
            self.pictures.labels("cache").inc(len(job.embeddings))
            self.pictures.labels("new").inc(len(job.new))
            future = loop.create_future()
            await self.queue.put((job, future))
            return Answer(await future)
        except BadRequest as error:
            raise Refused(400, str(error)) from None

    async def score_batches(self):
        """Take what waits, score it as one batch, hand out the results; forever."""
        loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        while True:
            batch = [await self.queue.get()]
            while not self.queue.empty() and sum(len(job.keys) for job, _ in batch) < BATCH_PICTURES:
                batch.append(self.queue.get_nowait())
            batch = [(job, future) for job, future in batch if not future.done()]  # done: nobody waits any more
            if not batch:
                continue
            self.batch_requests.observe(len(batch))
            self.batch_pictures.observe(sum(len(job.keys) for job, _ in batch))
            jobs, futures = zip(*batch, strict=True)
            for future, result in zip(
                futures, await loop.run_in_executor(self.model_thread, self.score_jobs, jobs), strict=True
            ):
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


# ---------------------------------------------------------------- the app


def make_app(scorer, opt):
    """The FastAPI app of a Scorer. opt: queue, queue_mb, max_body_mb, timeout, api_key, demo_path."""
    service = Service(scorer, opt)

    @asynccontextmanager
    async def lifespan(app):
        task = asyncio.create_task(service.score_batches())
        yield
        task.cancel()  # uvicorn comes here when every request has been answered
        service.parsers.shutdown()
        service.model_thread.shutdown()

    async def check_key(key=Security(APIKeyHeader(name="X-API-Key", auto_error=False))):  # noqa: B008
        if opt.api_key and not hmac.compare_digest((key or "").encode(), opt.api_key.encode()):
            raise Refused(401, "X-API-Key: missing or wrong")

    app = FastAPIOffline(
        title="PFAN scoring server",
        version="1",
        description="How well pictures fit a sentence, words to regions (t2i) and regions to words (i2t).",
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={**web.REFUSALS, RequestValidationError: web.refuse_parameters},
    )
    app.state.service = service
    app.add_middleware(Counting, service=service)
    keyed = [Depends(check_key)]

    @app.post(
        PATH,
        dependencies=keyed,
        openapi_extra={"requestBody": {"required": True, **json_of(request_schema(scorer.img_dim))}},
        responses=responses(),
    )
    async def score(request: Request) -> Response:
        """Scores of every picture with the sentence, both ways; with `sentences`, a list for each of them."""
        return await service.score(request)

    @app.get("/health")
    async def health():
        return {"status": "ok", "waiting": service.waiting}

    @app.get("/metrics", dependencies=keyed, response_class=PlainTextResponse)
    async def metrics():
        return Response(prometheus.generate_latest(service.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(os.path.join(HERE, "page.html"))

    add_demo(app, opt.demo_path, keyed)
    return app


def get_parser():
    parser = argparse.ArgumentParser(
        description="Score pictures against sentences over HTTP.",
        epilog="example: python -m Tencent_PFAN.scan_server_whole ./runs/sentence_t2i.pth.tar 5091",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="checkpoint of train_whole.py")
    add("port", type=int, help="to listen on, 1 to 65535")
    add("--host", default="127.0.0.1", help="to listen on; 0.0.0.0 for every network this machine is in")
    add("--vocab_path", help="folder of DATA_NAME_sent_vocab.json; the checkpoint's where not given")
    add("--api_key", help="what X-API-Key must be; better in PFAN_API_KEY, as others can read command lines")
    add("--timeout", type=float, default=60, help="seconds for a body to arrive, and again for its scores")
    add("--max_body_mb", type=int, default=256, help="largest body; 8 pictures have about 3.5 MB")
    add("--queue", type=int, default=64, help="requests that may wait; a further one gets 429")
    add("--queue_mb", type=int, default=1024, help="size of the bodies of the requests that wait")
    add("--cache_mb", type=int, default=256, help="memory for embeddings of pictures that may come again, 0 for none")
    add("--threads", type=int, default=os.cpu_count(), help="of the matrix products")
    add("--demo_path", help="a tencent_data_meta folder whose items the page at / offers")
    add("--device", default="auto", help="auto, cpu, cuda, …")
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    opt.api_key = opt.api_key or os.environ.get("PFAN_API_KEY")
    if min(opt.queue, opt.max_body_mb, opt.queue_mb, opt.threads) < 1 or opt.cache_mb < 0 or not opt.timeout > 0:
        parser.error("expected --queue, --max_body_mb, --queue_mb, --threads, --timeout above 0, --cache_mb 0 or more")
    if not 0 < opt.port < 65536:
        parser.error(f"port: {opt.port}, expected 1 to 65535")
    torch.set_num_threads(opt.threads)
    with web.listen(opt.host, opt.port) as listening:  # before the model is read, which takes a while
        scorer = Scorer(opt.model, opt.vocab_path, opt.cache_mb << 20, device=opt.device)
        print(f"{opt.model}: http://{opt.host}:{opt.port}", flush=True)
        web.serve(
            make_app(scorer, opt),
            listening,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(2 * opt.timeout) + 1,  # to read what has begun to arrive, and to score it
        )


if __name__ == "__main__":
    run(main)
