"""Two models, each trained with one seed or several: is one better, and does that sit in captions that speak of place?

python scripts/features/compare_runs.py data/flickr8k/test_caps.txt --first runs/A*/test_ranks.pth.tar \\
    --second runs/B*/test_ranks.pth.tar

The ranks are those of evaluation.py --save_ranks. A recall is the mean over a model's seeds. Its difference has two
95 % intervals: over images, a paired bootstrap with these seeds, and over seeds, Student's t with these images, the
i-th run of one model beside the i-th of the other. Then the same for text to image, of the captions with a word of
place and of the others.

python scripts/features/compare_runs.py record runs/flickr8k/t2i_attention_seed0 --features boxes --out docs/results.csv

ranks the test split with a model (or an ensemble), writes its test_ranks.pth.tar and adds a row to a table of results,
where it replaces one of the same model, features and options.
"""

import argparse
import csv
import os
import sys

import numpy as np
import torch

if not __package__:
    import _root  # noqa: F401

from evaluation import evalrank
from lib.checkpoint import BEST, load_checkpoint
from lib.errors import InputError, run
from lib.files import check_output, digest_lines, write_lines
from lib.intervals import MEASURES, RECALL_AT, bootstrap, group_hits
from lib.options import add_options, option
from vocab import from_txt, tokenize

PLACE_WORDS = frozenset(
    "left right above below under underneath beneath behind beside next between front top bottom middle center centre "
    "background foreground near corner side edge over atop".split()
)
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, of 1 degree of freedom and more
MODEL_NAMES = {"attention": "PFAN-A", "area": "PFAN-P", "none": "SCAN"}
KEY = ("model", "features", "cross_attn", "seed", "embed_size", "epochs", "mean_warmup_epochs", "position_init", "amp")
FLAGS = {"model": "position", "epochs": "num_epochs"}  # of columns with another name
RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
COLUMNS = (*KEY, *RECALLS, "rsum", "rsum_low", "rsum_high", "dev_rsum", "minutes")


# ---------------------------------------------------------------- two models


def read_ranks(path, captions, n_images):
    """The i2t ranks (n_images,) and t2i ranks (n_captions,) in a file of evaluation.py --save_ranks.

    Raises InputError for ranks of another split: of other captions, or where the file does not say, of other numbers.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
        ranks = [saved[name][0].numpy() for name in ("rt", "rti")]
    except Exception as error:  # torch and pickle have many
        raise InputError(f"{path}: not ranks of evaluation.py --save_ranks ({type(error).__name__})") from None
    if [len(each) for each in ranks] != [n_images, len(captions)]:
        found = " and ".join(str(len(each)) for each in ranks)
        raise InputError(f"{path}: ranks of {found}, expected those of {n_images} images and {len(captions)} captions")
    if saved.get("captions") not in (None, digest_lines(captions)):
        raise InputError(f"{path}: ranks of as many, but other captions; evaluation.py --save_ranks makes them anew")
    return ranks


def chosen_hits(ranks, chosen, counts):
    """Text-to-image recalls of each image in percent, whose mean is that of the chosen captions: (seeds, images, 3).

    ranks: (seeds, captions). chosen: which captions, (captions,) bool. counts: how many of each image, (images,).
    """
    hits = [((ranks < k) * chosen).reshape(len(ranks), len(counts), -1).sum(2) for k in RECALL_AT]
    return 100 * np.stack(hits, 2) / counts.mean()


def print_differences(measures, first, second, weights):
    """Print the recalls (seeds, images, K) of two models in K measures, in percent, and their difference.

    weights: what each image counts, (images,), 1 on average.
    """
    differences, n = first - second, len(first)
    mean = differences.mean((0, 1))
    low, high = mean + bootstrap(differences.mean(0) - weights[:, None] * mean)  # a ratio of two means, to first order
    has_margin = 2 <= n <= len(STUDENT_T) + 1
    margin = STUDENT_T[n - 2] * differences.mean(1).std(0, ddof=1) / np.sqrt(n) if has_margin else None
    for k, name in enumerate(measures):
        line = f"  {name}: {first[..., k].mean():.1f}, {second[..., k].mean():.1f}, difference {mean[k]:+.1f}"
        line += f", over images [{low[k]:+.1f}, {high[k]:+.1f}]"
        if has_margin:
            line += f", over seeds [{mean[k] - margin[k]:+.1f}, {mean[k] + margin[k]:+.1f}]"
        print(line)


def compare(opt):
    """Print the recalls of two models and their difference."""
    captions = from_txt(opt.captions)
    n_images, rest = divmod(len(captions), max(1, opt.captions_per_image))
    if rest or opt.captions_per_image < 1:
        raise InputError(f"{opt.captions}: {len(captions)} captions, expected a multiple of {opt.captions_per_image}")
    if len(opt.first) != len(opt.second):
        raise InputError(f"--first: {len(opt.first)} files, expected as many as --second has: {len(opt.second)}")
    models = [[read_ranks(path, captions, n_images) for path in paths] for paths in (opt.first, opt.second)]
    print(f"{len(captions)} captions, {len(opt.first)} seeds")
    hits = [np.stack([group_hits(*ranks) for ranks in seeds]) for seeds in models]
    print_differences(MEASURES, *hits, np.ones(n_images))
    place = np.array([not PLACE_WORDS.isdisjoint(tokenize(caption)) for caption in captions])
    for name, chosen in (("with a word of place", place), ("without", ~place)):
        print(f"captions {name}: {chosen.sum()} of {len(captions)}")
        if chosen.any():
            counts = chosen.reshape(n_images, -1).sum(1)
            hits = [chosen_hits(np.stack([t2i for _, t2i in seeds]), chosen, counts) for seeds in models]
            print_differences([f"t2i R@{k}" for k in RECALL_AT], *hits, counts / counts.mean())


# ---------------------------------------------------------------- a table of results


def read_table(path):
    """The rows (dicts of str) of the table at path, none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise InputError(f"{path}: columns {table.fieldnames}, expected {', '.join(COLUMNS)}")
        return list(table)


def describe(checkpoints, features):
    """The key columns of a model, or of an ensemble, from the options of its checkpoints."""
    row = {"features": features}
    for column in set(KEY) - {"features"}:
        values = [option(checkpoint["opt"], FLAGS.get(column, column)) for checkpoint in checkpoints]
        row[column] = "+".join(dict.fromkeys(str(MODEL_NAMES.get(value, value)) for value in values))
    return row


def record(opt):
    """Rank the test split and add a row to the table opt.out."""
    check_output(opt.out)
    rows = read_table(opt.out)
    models = [os.path.join(path, BEST) for path in opt.runs]
    checkpoints = [load_checkpoint(path) for path in models]
    files = {"data_path": opt.data_path, "vocab_path": opt.vocab_path}
    dev = evalrank(models, split="dev", **files)
    ranks = os.path.join(opt.runs[0], "test_ranks.pth.tar") if len(models) == 1 else None
    result = evalrank(models, split="test", intervals=True, save_ranks=ranks, **files)
    numbers = [*result["i2t"][:3], *result["t2i"][:3], *result["intervals"]["rsum"], dev["rsum"]]
    row = describe(checkpoints, opt.features)
    row.update(zip(COLUMNS[len(KEY) :], [f"{number:.1f}" for number in numbers], strict=False), minutes=opt.minutes)
    table = {tuple(each[name] for name in KEY): each for each in [*rows, row]}
    lines = [COLUMNS, *([table[key][name] for name in COLUMNS] for key in sorted(table))]
    write_lines(opt.out, map(",".join, lines))
    print(f"{opt.out}: {len(table)} rows")


def main():
    is_record = sys.argv[1:2] == ["record"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    if is_record:
        add("runs", nargs="+", metavar="RUN", help="folders of runs with a model_best.pth.tar; several are an ensemble")
        add("--features", required=True, help="what the regions are, for the table: boxes, windows")
        add("--out", required=True, metavar="FILE", help="the table, .csv")
        add_options(parser, ("data_path", "vocab_path"), data_path=None, vocab_path=None)
        add("--minutes", default="", help="how long training took")
        return record(parser.parse_args(sys.argv[2:]))
    add("captions", help="SPLIT_caps.txt")
    add("--first", nargs="+", required=True, metavar="RANKS", help="ranks of a model, a file a seed")
    add("--second", nargs="+", required=True, metavar="RANKS", help="of the model to compare with")
    add("--captions_per_image", type=int, default=5, metavar="K", help="(default: %(default)s)")
    return compare(parser.parse_args())


if __name__ == "__main__":
    run(main)
