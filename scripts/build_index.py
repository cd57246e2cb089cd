"""Encode a split once into a collection on disk, for search among more images than can be scored for each sentence.

example: python scripts/build_index.py --model_path runs/demo/attention_seed0/model_best.pth.tar \\
    --data_path data --split test --query "a red ring at the top"

The collection's folder lies beside the checkpoint, unless --out says otherwise; scripts/search/build.py lists its
files. The same command, run again without --overwrite, keeps the files that a stopped run had finished.
"""

import argparse
import os

if not __package__:
    import _root  # noqa: F401

from evaluation import load_split
from lib.errors import run
from lib.options import add_options
from scripts.search.build import N_CENTROIDS, collection_folder, open_or_build
from scripts.search.collection import check_query

MAX_CENTROIDS = 1 << 16  # indices of a uint16


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint")
    add_options(parser, ("data_path", "vocab_path", "device"), data_path=None, vocab_path=None)
    add("--split", default="test", help="dev, test, testall or one of your own (default: %(default)s)")
    add("--out", metavar="DIR", help="the collection's folder (default: beside the checkpoint)")
    add("--anchors", type=int, help=f"centroids of words (t2i) or regions (i2t) (default: {N_CENTROIDS})")
    add("--overwrite", action="store_true", help="make anew what is there already")
    add("--query", metavar="SENTENCE", help="then print the best ten images for a sentence")
    add("--candidates", type=int, default=1000, help="images that --query scores exactly (default: %(default)s)")
    return parser


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if opt.candidates < 1 or (opt.anchors is not None and not 1 <= opt.anchors <= MAX_CENTROIDS):
        parser.error(f"expected --candidates of 1 or more and --anchors of 1 to {MAX_CENTROIDS}")
    model, loader = load_split(
        opt.model_path, opt.data_path, opt.vocab_path, opt.split, captions_optional=True, device=opt.device
    )
    if opt.query is not None:
        check_query(loader.dataset.vocab, opt.query, "--query")
    collection = open_or_build(opt.model_path, model, loader, opt.split, opt.out, opt.anchors, opt.overwrite)
    folder = opt.out or collection_folder(opt.model_path, model.opt.data_name, opt.split)
    size = sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6
    print(f"{folder}: {len(collection.images)} images, {len(collection.lens)} captions, {size:.1f} MB")
    if opt.query is not None:
        for image, score in zip(*collection.search(opt.query, 10, opt.candidates), strict=True):
            print(f"  {score:.3f}  image {image}")


if __name__ == "__main__":
    run(main)
