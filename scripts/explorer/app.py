"""The explorer's HTTP side: the page, and the answers as JSON under /api."""

import functools
import os

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from lib.web import REFUSALS, Answer, Refused, guard
from scripts.explorer import hard_cases

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "page")
MAX_RESULTS = 100


def make_app(explorer):
    """The FastAPI app of an Explorer."""
    app = FastAPI(title="PFAN explorer", docs_url=None, redoc_url=None, openapi_url=None, exception_handlers=REFUSALS)
    guard(app, explorer.opt.host, explorer.opt.allowed_hosts)
    count = Query(ge=1, le=MAX_RESULTS)
    comparison = functools.cache(lambda: hard_cases.start(explorer))  # once, when it is first asked for

    def existing(number):
        """An image's index (int) from the text in an address."""
        if not (number.isdecimal() and len(number) < 10 and int(number) < explorer.n_images):
            raise Refused(404, f"There is no image {number[:20]}: expected 0 to {explorer.n_images - 1}.")
        return int(number)

    def locked(answer, *args):
        with explorer.lock:
            return Answer(answer(*args))

    @app.get("/api/about")
    def about():
        return Answer(explorer.about())

    @app.get("/api/search")
    def search(sentence: str, k: int = count):
        return locked(explorer.search, sentence, k)

    @app.get("/api/hard")
    def hard():
        return Answer(comparison().result() if comparison().done() else None)

    @app.get("/api/images/{number}")
    def describe(number: str, k: int = count):
        return locked(explorer.image, existing(number), k)

    @app.get("/api/images/{number}/attention")
    def attention(number: str, sentence: str):
        return locked(explorer.attention, existing(number), sentence)

    @app.get("/images/{number}")
    def image(number: str):
        path = explorer.images.files.get(explorer.images.ids[existing(number)])
        if path is None:
            raise Refused(404, f"Image {number} has no file in {explorer.images.folder}.")
        return FileResponse(path)

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app
