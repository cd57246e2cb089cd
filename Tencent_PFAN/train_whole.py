"""Train the whole-image variant with the root's training loop.

python Tencent_PFAN/train_whole.py --data_path ./data --data_name tencent_data --max_violation --bi_gru --agg_func Mean
"""

import logging

if not __package__:
    import _root  # noqa: F401

import train as root
from lib.errors import run
from lib.options import NEW_OPTIONS
from Tencent_PFAN.data_whole import get_loaders
from Tencent_PFAN.evaluation_whole import SHARD_SIZE, encode_data, shard_xattn
from Tencent_PFAN.model_whole import SCAN
from Tencent_PFAN.vocab import read_vocab


def get_parser():
    """The root's flags with the whole-image variant's defaults, and its own."""
    parser = root.get_parser()
    parser.description = "Train the whole-image Position Focused Attention Network for image-text matching."
    parser.epilog = (
        "example: python Tencent_PFAN/train_whole.py --data_path ./data --data_name tencent_data --max_violation "
        "--bi_gru --agg_func Mean --lambda_whole 2 --logger_name runs/tencent_data --model_name runs/tencent_data"
    )
    add = parser.add_argument
    add("--need_box_whole", action="store_true", help="the last region of _ims.npy is the whole image")
    add("--lambda_whole", default=NEW_OPTIONS["lambda_whole"], type=float, help="weight of the whole-image cosine")
    add("--embed_path", default="./vocab/embedding.npy", help="accepted and unused, as in the published code")
    parser.set_defaults(embed_size=512, position="area")
    return parser


def validation(opt, val_loader, model, tb):
    """Rank the dev split both ways, log the recalls, return their sum."""
    return root.log_recalls(shard_xattn(*encode_data(model, val_loader, packed=True), opt, SHARD_SIZE), model, tb)


def main():
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    opt = get_parser().parse_args()
    root.fit(opt, SCAN, get_loaders, read_vocab(opt), validation)


if __name__ == "__main__":
    run(main)
