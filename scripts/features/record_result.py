"""Rank the test split with a model (or an ensemble) and add a row of recalls to a table of results.

python scripts/features/record_result.py runs/flickr8k/t2i_attention_seed0 --features boxes --out docs/results.csv

A row of the same model, features, cross_attn, seed, embed_size, epochs, mean_warmup_epochs and amp is replaced.
"""

import argparse
import csv
import os

if not __package__:
    import _root  # noqa: F401

from evaluation import evalrank
from lib.checkpoint import BEST, load_checkpoint
from lib.errors import InputError, run
from lib.files import replace
from lib.options import option

MODEL_NAMES = {"attention": "PFAN-A", "area": "PFAN-P", "none": "SCAN"}
KEY = ("model", "features", "cross_attn", "seed", "embed_size", "epochs", "mean_warmup_epochs", "amp")
RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
COLUMNS = (*KEY, *RECALLS, "rsum", "rsum_low", "rsum_high", "dev_rsum", "minutes")


def read_table(path):
    """The rows (dicts of str) of the table at path, none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise InputError(f"{path}: columns {table.fieldnames}, expected {', '.join(COLUMNS)}")
        return list(table)


def write_table(path, rows):
    """Write rows (dicts of str), sorted by their keys."""
    rows = sorted(rows, key=lambda row: [row[name] for name in KEY])
    lines = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
    replace(path, lambda file: file.writelines((",".join(line) + "\n").encode() for line in lines))


def describe(checkpoints, features):
    """The key columns of a model, or of an ensemble, from the options of its checkpoints."""
    opts = [checkpoint["opt"] for checkpoint in checkpoints]

    def joined(name):
        return "+".join(dict.fromkeys(str(option(opt, name)) for opt in opts))

    model = "+".join(dict.fromkeys(MODEL_NAMES[option(opt, "position")] for opt in opts))
    return {
        "model": model,
        "features": features,
        "epochs": joined("num_epochs"),
        **{name: joined(name) for name in ("cross_attn", "seed", "embed_size", "mean_warmup_epochs", "amp")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of runs with a model_best.pth.tar; several are an ensemble")
    add("--features", required=True, help="what the regions are, for the table: boxes, windows")
    add("--out", required=True, metavar="FILE", help="the table, .csv")
    add("--data_path", help="folder of the data sets (default: the checkpoint's)")
    add("--vocab_path", help="folder of the vocabularies (default: the checkpoint's)")
    add("--minutes", default="", help="how long training took")
    opt = parser.parse_args()
    rows = read_table(opt.out)
    models = [os.path.join(path, BEST) for path in opt.runs]
    checkpoints = [load_checkpoint(path) for path in models]
    files = {"data_path": opt.data_path, "vocab_path": opt.vocab_path}
    if len(models) == 1:
        dev_rsum = float(checkpoints[0]["best_rsum"])
    else:
        dev_rsum = evalrank(models, split="dev", **files)["rsum"]
    ranks = os.path.join(opt.runs[0], "test_ranks.pth.tar") if len(models) == 1 else None
    result = evalrank(models, split="test", intervals=True, save_ranks=ranks, **files)
    numbers = [*result["i2t"][:3], *result["t2i"][:3], *result["intervals"]["rsum"], dev_rsum]
    row = describe(checkpoints, opt.features)
    row.update(zip(COLUMNS[len(KEY) :], [f"{number:.1f}" for number in numbers], strict=False), minutes=opt.minutes)
    others = [each for each in rows if any(each[name] != row[name] for name in KEY)]
    write_table(opt.out, [*others, row])
    print(f"{opt.out}: {len(others) + 1} rows")


if __name__ == "__main__":
    run(main)
