"""Whether a difference of two models sits in the captions that speak of place.

python scripts/features/place_words.py data/flickr8k/test_caps.txt runs/A/test_ranks.pth.tar runs/B/test_ranks.pth.tar

The captions are split by their words. For each part: its share, the t2i recalls of both models and their paired
difference with 95 % intervals, bootstrap over images. Ranks are those of evaluation.py --save_ranks.
"""

import argparse

import numpy as np
import torch

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, run
from lib.intervals import RECALL_AT, bootstrap
from vocab import read_captions, tokenize

PLACE_WORDS = frozenset(
    "left right above below under underneath beneath behind beside next between front top bottom middle center centre "
    "background foreground near corner side edge over atop".split()
)


def speaks_of_place(captions):
    """Which of captions (list of str) hold one of PLACE_WORDS: (n,) bool."""
    return np.array([not PLACE_WORDS.isdisjoint(tokenize(caption)) for caption in captions])


def t2i_ranks(path, n):
    """The ranks (n,) of n captions in a file of evaluation.py --save_ranks."""
    try:
        ranks = torch.load(path, map_location="cpu", weights_only=True)["rti"][0].numpy()  # noqa: TID251
    except Exception as error:  # torch and pickle have many
        raise InputError(f"{path}: not ranks of evaluation.py --save_ranks ({type(error).__name__})") from None
    if ranks.shape != (n,):
        raise InputError(f"{path}: ranks {ranks.shape}, expected those of {n} captions")
    return ranks


def recalls(ranks, chosen, n_images):
    """Of the chosen captions (n,) of each image the hits at 1, 5, 10 (n_images, 3) and the number (n_images, 1)."""
    hits = np.stack([(ranks < k) & chosen for k in RECALL_AT], 1).reshape(n_images, -1, len(RECALL_AT)).sum(1)
    return hits, chosen.reshape(n_images, -1).sum(1)[:, None]


def compare(first, second, chosen, n_images):
    """Recalls of two models on the chosen captions and their difference, each (3,), and its interval (low, high)."""
    (hits, counts), (others, _) = (recalls(ranks, chosen, n_images) for ranks in (first, second))
    share = counts / counts.mean()  # images weigh as many captions as they have in this part
    difference = 100 * (hits - others) / counts.mean()
    mean = difference.mean(0)
    low, high = bootstrap(difference - share * mean)  # the ratio of two means, to first order
    return 100 * hits.sum(0) / counts.sum(), 100 * others.sum(0) / counts.sum(), mean, mean + low, mean + high


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", help="SPLIT_caps.txt")
    parser.add_argument("first", help="ranks of a model")
    parser.add_argument("second", help="ranks of the model to compare with")
    parser.add_argument("--captions_per_image", type=int, default=5, metavar="K", help="(default: %(default)s)")
    opt = parser.parse_args()
    captions = read_captions(opt.captions)
    n_images, rest = divmod(len(captions), max(1, opt.captions_per_image))
    if rest or opt.captions_per_image < 1:
        raise InputError(f"{opt.captions}: {len(captions)} captions, expected a multiple of {opt.captions_per_image}")
    first, second = (t2i_ranks(path, len(captions)) for path in (opt.first, opt.second))
    place = speaks_of_place(captions)
    for name, chosen in (("with a word of place", place), ("without", ~place), ("all", np.ones_like(place))):
        print(f"captions {name}: {chosen.sum()} of {len(captions)}")
        columns = zip(RECALL_AT, *compare(first, second, chosen, n_images), strict=True)
        for k, a, b, mean, low, high in columns:
            print(f"  t2i R@{k}: {a:.1f}, {b:.1f}, difference {mean:+.1f} [{low:+.1f}, {high:+.1f}]")


if __name__ == "__main__":
    run(main)
