"""Make the demo data, train on it with train.py, rank its test images with evalrank; run by scripts/demo.sh."""

import argparse
import json
import os
import shlex
import subprocess
import sys

if not __package__:
    import _root  # noqa: F401

from evaluation import evalrank, load_split
from lib.errors import run
from lib.files import read_lines, replace
from scripts.search.collection import Collection

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.chdir(ROOT)

MODELS = {"attention": "PFAN-A", "area": "PFAN-P", "none": "SCAN"}
NAME = "demo_precomp"
TRAIN_FLAGS = (
    "--img_dim 128 --embed_size 128 --word_dim 64 --max_violation --bi_gru --agg_func Mean --cross_attn t2i "
    "--lambda_softmax 9 --batch_size 128 --learning_rate .001 --num_epochs 4 --lr_update 3 "
    "--val_step 2000000 --log_step 20 --workers 1"
)


def command(*words):
    """Show a Python command line and run it; leave as it does where it fails."""
    print("+ python " + shlex.join(words), flush=True)
    status = subprocess.run([sys.executable, *words]).returncode
    if status:
        sys.exit(status)


def train_and_rank(position, opt):
    """Train a model with this position and rank the test split.

    Returns the checkpoint and {"i2t": [R@1, R@5, R@10], "t2i": […], "rsum": …}.
    """
    folder = os.path.join(opt.out, f"{position}_seed{opt.seed}")
    paths = ("--data_path", opt.data_path, "--data_name", NAME, "--vocab_path", opt.vocab_path)
    outputs = ("--logger_name", folder, "--model_name", folder)
    flags = shlex.split(f"{TRAIN_FLAGS} {opt.train_flags}")
    command("train.py", *paths, *outputs, "--position", position, "--seed", str(opt.seed), *flags, "--overwrite")
    best = os.path.join(folder, "model_best.pth.tar")
    print(f'+ evaluation.evalrank("{best}", "{opt.data_path}", split="test")', flush=True)
    result = evalrank(best, opt.data_path, split="test")
    return best, {"i2t": list(result["i2t"][:3]), "t2i": list(result["t2i"][:3]), "rsum": result["rsum"]}


def table(results):
    """Recalls side by side, a line a model."""
    lines = [
        "",
        f"{'':16}{'image to text':^21}   {'text to image':^21}",
        f"{'':16}" + "    R@1    R@5   R@10   " * 2 + "  rsum",
    ]
    for name, r in results.items():
        cells = ["".join(f"{value:7.1f}" for value in r[way]) for way in ("i2t", "t2i")]
        lines.append(f"{name:16}{cells[0]}   {cells[1]}   {r['rsum']:6.1f}")
    return "\n".join(lines)


def search(model_path, data_path, n=3):
    """Print what the first captions of n images, spread over the test split, find among all its images."""
    model, loader = load_split(model_path, data_path, None, "test")
    collection, dataset = Collection.encode(model, loader), loader.dataset
    ids = read_lines(dataset.prefix + "_ids.txt")
    for image in range(0, dataset.n_images, dataset.n_images // n)[:n]:
        caption = dataset.captions[image * dataset.im_div]
        print(f"\n“{caption}”")
        for found, score in zip(*collection.search(caption, 3), strict=True):
            mark = "← its image" if found == image else ""
            print(f"  {score:.3f}  {dataset.prefix}_images/{ids[found]}.png {mark}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: sh scripts/demo.sh --ablation --seed 1")
    add = parser.add_argument
    add("--ablation", action="store_true", help="train PFAN-A, PFAN-P and SCAN, print them side by side")
    add("--seed", type=int, default=0, help="of the start values and the data order (default: 0)")
    add("--out", default="runs/demo", help="folder of models and results (default: %(default)s)")
    add("--data_path", default="data", help="folder of the demo data (default: %(default)s)")
    add("--vocab_path", default="vocab", help="folder of its vocabulary (default: %(default)s)")
    add("--data_flags", default="", help="further flags of make_demo_data.py, in one string")
    add("--train_flags", default="", help="further flags of train.py, in one string")
    opt = parser.parse_args()
    paths = ("--data_path", opt.data_path, "--data_name", NAME)
    command("scripts/demo/make_demo_data.py", *paths, *shlex.split(opt.data_flags))
    command("vocab.py", *paths, "--vocab_path", opt.vocab_path, "--overwrite")
    results, models = {}, {}
    for position, name in MODELS.items() if opt.ablation else [("attention", "PFAN-A")]:
        models[name], results[name] = train_and_rank(position, opt)
    path = os.path.join(opt.out, "results.json")
    replace(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
    search(models["PFAN-A"], opt.data_path)
    print(table(results))
    print(f"\nresults  {path}\nmodels   {', '.join(models.values())}")
    print(f"images   {os.path.join(opt.data_path, NAME, 'test_images')}")
    words = ("--model_path", *models.values(), "--data_path", opt.data_path, "--vocab_path", opt.vocab_path)
    python = sys.executable.removeprefix(os.getcwd() + os.sep)  # .venv/bin/python, after demo.sh
    print(f"\nlook at what they find: {shlex.join([python, 'scripts/explore.py', *words])}")


if __name__ == "__main__":
    run(main)
