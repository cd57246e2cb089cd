"""A local web page to see what one or more models find in a split, and why.

example: python scripts/explore.py --model_path runs/demo/attention_seed0/model_best.pth.tar \\
    runs/demo/none_seed0/model_best.pth.tar --data_path data --split test
"""

import argparse
import functools
import os

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

if not __package__:
    import _root  # noqa: F401

from lib.errors import run
from lib.options import add_options
from lib.web import REFUSALS, Answer, Refused, guard, in_brackets, listen, serve
from scripts.explorer import hard_cases
from scripts.explorer.answers import Explorer

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "explorer", "page")
MAX_MODELS, MAX_RESULTS = 4, 100


def make_app(explorer):
    """The FastAPI app of an Explorer: the page, and the answers as JSON under /api."""
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


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_path", nargs="+", required=True, help=f"checkpoints of train.py, side by side; at most {MAX_MODELS}")
    add_options(parser, ("data_path", "vocab_path", "device"), data_path=None, vocab_path=None)
    add("--split", default="test", help="dev, test, testall or one of your own (default: %(default)s)")
    add("--images", metavar="DIR", help="image files named by id (default: SPLIT_images beside the data, if there)")
    two_stages = "search splits of more images in two stages, with an index made once (default: %(default)s)"
    add("--index_above", type=int, default=5000, metavar="N", help=two_stages)
    add("--candidates", type=int, default=1000, help="results that the second stage scores (default: %(default)s)")
    add("--host", default="127.0.0.1", help="to listen on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8765, help="to listen on (default: %(default)s)")
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME", help="further names it answers to on 127.0.0.1")
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if len(opt.model_path) > MAX_MODELS:
        parser.error(f"--model_path: {len(opt.model_path)} checkpoints, expected at most {MAX_MODELS}")
    if opt.candidates < 1 or not 0 < opt.port < 65536:
        parser.error("expected --candidates of 1 or more and --port 1 to 65535")
    with listen(opt.host, opt.port) as listening:  # before the models are read, which takes a while
        app = make_app(Explorer(opt))
        print(f"open http://{in_brackets(opt.host)}:{opt.port} in a browser; Ctrl-C ends it", flush=True)
        serve(app, listening, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    run(main)
