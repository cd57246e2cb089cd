"""The scoring server: how well pictures fit a sentence, by a whole-image model.

python -m Tencent_PFAN.scan_server_whole ./runs/sentence_t2i.pth.tar 5091

A request is admitted (or refused before its body is read), read, parsed in a thread, and queued. Whatever waits in the
queue is scored as one batch while the next requests are read. Nothing is written to disk.
"""

import argparse
import asyncio
import hmac
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

import orjson
import prometheus_client as prometheus
import uvicorn
from fastapi import Depends, Request, Security
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from errors import InputError, run
from Tencent_PFAN.scoring import N_REGIONS, BadRequest, Scorer

PATH = "/scan_sentence_image_score"
BATCH_PICTURES = 256  # of the requests that are scored together; a single request may have more
LINGER_SECONDS, LINGER_BYTES = 2, 64 << 20  # how long a refused request is still read, so that its client hears why
HERE = os.path.dirname(os.path.abspath(__file__))

# ---------------------------------------------------------------- what the document at /docs says

_words = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_base64 = {"type": "string", "contentEncoding": "base64"}


def request_schema(img_dim):
    """JSON schema of a request's body."""
    picture = {
        "image_id": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "image_h": {"type": "number", "minimum": 1, "maximum": 1e6},
        "image_w": {"type": "number", "minimum": 1, "maximum": 1e6},
        "num_boxes": {"const": N_REGIONS},
        "boxes": {**_base64, "description": f"float32, {N_REGIONS} x 4: x1, y1, x2, y2 in pixels"},
        "features": {**_base64, "description": f"float32, {N_REGIONS} x {img_dim}"},
    }
    whole = {"type": "array", "items": {"type": "number"}, "minItems": img_dim, "maxItems": img_dim}
    properties = {
        "sentence": {**_words, "description": "words, or a plain string, cut into words where it is Chinese"},
        "sentences": {"type": "array", "items": _words, "minItems": 1, "description": "several, instead of sentence"},
        "boxes": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "properties": picture, "required": list(picture)},
        },
        "whole_items": {"type": "array", "items": whole, "minItems": 1, "description": "one for each of boxes"},
    }
    return {"type": "object", "properties": properties, "required": ["boxes", "whole_items"]}


def json_of(schema):
    return {"content": {"application/json": {"schema": schema}}}


_scores = {"anyOf": [{"type": "array", "items": {"type": "number"}},
                     {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}]}  # fmt: skip
SCORES = json_of({
    "type": "object",
    "properties": {"sim_t2i": _scores, "sim_i2t": _scores},
    "required": ["sim_t2i", "sim_i2t"],
})  # fmt: skip
ERROR = json_of({"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]})
REASONS = {
    400: "cannot be scored; the reason names the field and the index",
    401: "no or a wrong X-API-Key",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "not application/json",
    429: "too many requests wait; Retry-After says when to come back",
    503: "not scored in time",
}

# ---------------------------------------------------------------- answers


class Answer(Response):
    media_type = "application/json"

    def render(self, content):
        return orjson.dumps(content)


class Refusal(Answer):
    """{"error": reason}. What the client still sends is read and dropped, within bounds: closing at once would reset
    the connection, and many clients would then see that instead of the reason."""

    def __init__(self, reason, status, headers=None):
        super().__init__({"error": reason}, status, headers)

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                left = 0 if scope.get("body_read") else LINGER_BYTES
                while left > 0 and (message := await receive()).get("more_body"):
                    left -= len(message["body"])
        await send({"type": "http.response.body", "body": b""})


class Refused(HTTPException):
    def __init__(self, status, reason, **headers):
        super().__init__(status, reason, {name.replace("_", "-"): value for name, value in headers.items()})


async def refuse(request, error):
    return Refusal(str(error.detail), error.status_code, error.headers)


async def refuse_parameters(request, error):
    return Refusal("; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors()), 400)


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
            prometheus.Histogram(f"pfan_batch_{what}", f"{what.capitalize()} scored as one batch", registry=registry,
                                 buckets=[2**i for i in range(11)])
            for what in ("requests", "pictures")
        )  # fmt: skip
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
        ):  # fmt: skip
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
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > admitted[0]:  # sent in chunks, without a Content-Length
                self.waiting_bytes += len(body) - admitted[0]
                admitted[0] = len(body)
                self.check_size(len(body))
                if self.waiting > 1 and self.waiting_bytes > self.opt.queue_mb << 20:
                    raise Refused(429, f"{self.waiting} requests wait, come back later", Retry_After="1")
        request.scope["body_read"] = True
        return body

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


class Counting:
    """ASGI layer that counts the scoring requests by status, and how long their answers took."""

    def __init__(self, app, service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != PATH:
            return await self.app(scope, receive, send)
        started = time.perf_counter()

        async def counting_send(message):
            if message["type"] == "http.response.start":
                self.service.requests.labels(message["status"]).inc()
                self.service.latency.observe(time.perf_counter() - started)
                if message["status"] >= 400:
                    self.service.errors.inc()
            await send(message)

        await self.app(scope, receive, counting_send)


class Protocol(HttpToolsProtocol):
    """uvicorn's, with a limit on the time from a connection's start to the end of its first request's headers."""

    HEADER_SECONDS = 10

    def connection_made(self, transport):
        super().connection_made(transport)
        self.header_timer = self.loop.call_later(self.HEADER_SECONDS, self.timeout_keep_alive_handler)

    def on_headers_complete(self):
        self.header_timer.cancel()
        super().on_headers_complete()

    def connection_lost(self, error):
        self.header_timer.cancel()
        super().connection_lost(error)
