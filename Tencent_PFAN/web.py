"""The server's side of HTTP: the document at /docs, answers and refusals, counts, a limit on slow connections."""

import asyncio
import time
from contextlib import suppress

import orjson
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lib.constants import N_REGIONS

PATH = "/scan_sentence_image_score"
LINGER_SECONDS, LINGER_BYTES = 2, 64 << 20  # how long a refused request is still read, so that its client hears why

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


_scores = {
    "anyOf": [
        {"type": "array", "items": {"type": "number"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    ]
}
SCORES = json_of(
    {
        "type": "object",
        "properties": {"sim_t2i": _scores, "sim_i2t": _scores},
        "required": ["sim_t2i", "sim_i2t"],
    }
)
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

RESPONSES = {
    200: {"description": "a number for each picture", **SCORES},
    **{status: {"description": why, **ERROR} for status, why in REASONS.items()},
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


async def refuse_unexpected(request, error):
    return Refusal("internal error", 500)  # uvicorn prints the traceback


async def refuse_parameters(request, error):
    return Refusal("; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors()), 400)


# ---------------------------------------------------------------- connections


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
