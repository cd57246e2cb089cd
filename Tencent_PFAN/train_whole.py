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
from Tencent_PFAN.model_whole import SCAN
from train import adjust_learning_rate, save_checkpoint, train, validate  # noqa: F401 (SCAN's names)


def get_parser():
    """The root's flags with the whole-image variant's defaults, and its own."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]    (--help lists them)",
        description="Train the whole-image Position Focused Attention Network for image-text matching.",
        epilog="example: python Tencent_PFAN/train_whole.py --data_path ./data --data_name tencent_data "
        "--max_violation --bi_gru --agg_func Mean --lambda_whole 2 "
        "--logger_name runs/tencent_data --model_name runs/tencent_data",
    )
    add_options(parser, TRAIN_WHOLE, embed_size=512, position="area")
    return parser


def fit(opt, make_model=SCAN):
    """The root's fit with the whole-image model."""
    return root.fit(opt, make_model)


def main():
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    fit(get_parser().parse_args())


if __name__ == "__main__":
    run(main)
