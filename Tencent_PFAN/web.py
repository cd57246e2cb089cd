"""The scoring service's document at /docs, and counts of its requests."""

import time

import msgspec
from pydantic import BaseModel

from Tencent_PFAN.scoring import Body

PATH = "/scan_sentence_image_score"


class Scores(BaseModel):
    """An answer: a number for each image; with sentences, a list of these for each of them."""

    sim_t2i: list[float | list[float]]
    sim_i2t: list[float | list[float]]


class Error(BaseModel):
    error: str


RESPONSES = {
    200: {"description": "a number for each image", "model": Scores},
    **{status: {"model": Error} for status in (400, 401, 408, 413, 415, 429, 503)},
}


def request_body(img_dim):
    """What OpenAPI calls requestBody, with features of img_dim values."""
    _, parts = msgspec.json.schema_components([Body])
    schema = parts["Body"]
    schema["properties"]["boxes"]["items"] = parts["Image"]
    schema["properties"]["whole_items"]["items"].update(minItems=img_dim, maxItems=img_dim)
    return {"required": True, "content": {"application/json": {"schema": schema}}}


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
