"""Train the whole-image variant with the root's training loop.

python Tencent_PFAN/train_whole.py --data_path ./data --data_name tencent_data --max_violation --bi_gru --agg_func Mean
"""

import argparse
import logging

if not __package__:
    import _root  # noqa: F401

import train as root
from lib.errors import run
from lib.options import TRAIN_WHOLE, add_options
from Tencent_PFAN.data_whole import get_loaders
from Tencent_PFAN.evaluation_whole import SHARD_SIZE, encode_data, shard_xattn
from Tencent_PFAN.model_whole import SCAN
from Tencent_PFAN.vocab import read_vocab


def get_parser():
    """The root's flags with the whole-image variant's defaults, and its own."""
    parser = argparse.ArgumentParser(
        description="Train the whole-image Position Focused Attention Network for image-text matching.",
        epilog="example: python Tencent_PFAN/train_whole.py --data_path ./data --data_name tencent_data "
        "--max_violation --bi_gru --agg_func Mean --lambda_whole 2 "
        "--logger_name runs/tencent_data --model_name runs/tencent_data",
    )
    add_options(parser, TRAIN_WHOLE, embed_size=512, position="area")
    return parser


def rank_dev(opt, val_loader, model, tb):
    """Rank the dev split both ways, log the recalls, return their sum."""
    return root.log_recalls(shard_xattn(*encode_data(model, val_loader, packed=True), opt, SHARD_SIZE), model, tb)


def main():
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    opt = get_parser().parse_args()
    root.fit(opt, SCAN, get_loaders, read_vocab, rank_dev)


if __name__ == "__main__":
    run(main)
