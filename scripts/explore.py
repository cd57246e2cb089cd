"""A local web page to see what one or more models find in a split, and why.

example: python scripts/explore.py --model_path runs/demo/attention_seed0/model_best.pth.tar \\
    runs/demo/none_seed0/model_best.pth.tar --data_path data --split test
"""

import argparse

if not __package__:
    import _root  # noqa: F401

from lib.errors import run
from lib.options import add_options
from lib.web import in_brackets, listen, serve
from scripts.explorer.answers import Explorer
from scripts.explorer.app import make_app

MAX_MODELS = 4


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
