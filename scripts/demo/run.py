"""Make the demo data, train on it with train.py, rank its test pictures with evalrank; run by scripts/demo.sh."""

import argparse
import json
import os
import shlex
import subprocess
import sys

if not __package__:
    import _root  # noqa: F401

from data import get_test_loader
from evaluation import SHARD_SIZE, encode_data, evalrank, read_vocab, shard_xattn
from lib.errors import run
from model import load_model

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


def train_and_rank(position, seed, data_path, vocab_path, out, flags):
    """One model: train it, rank the test split. Returns {"i2t": [R@1, R@5, R@10], "t2i": […], "rsum": …}."""
    folder = os.path.join(out, f"{position}_seed{seed}")
    command(
        "train.py",
        "--data_path",
        data_path,
        "--data_name",
        NAME,
        "--vocab_path",
        vocab_path,
        "--logger_name",
        folder,
        "--model_name",
        folder,
        "--position",
        position,
        "--seed",
        str(seed),
        *shlex.split(flags),
    )
    best = os.path.join(folder, "model_best.pth.tar")
    print(f'+ evaluation.evalrank("{best}", "{data_path}", split="test")', flush=True)
    result = evalrank(best, data_path, split="test")
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
    """Print what the first captions of n pictures, spread over the test split, find among all its pictures."""
    model = load_model(model_path)
    vars(model.opt).update(data_path=data_path)
    loader = get_test_loader("test", NAME, read_vocab(model.opt), 128, 0, model.opt)
    images, words, lens = encode_data(model, loader, packed=True)
    dataset = loader.dataset
    with open(dataset.prefix + "_ids.txt") as file:
        ids = file.read().split()
    starts = [sum(lens[:i]) for i in range(len(lens))]
    for image in range(0, dataset.n_images, dataset.n_images // n)[:n]:
        i = image * dataset.im_div
        scores = shard_xattn(images, words[starts[i] : starts[i] + lens[i]], lens[i : i + 1], model.opt, SHARD_SIZE)[
            :, 0
        ]
        best = scores.argsort()[::-1][:3]
        print(f"\n“{dataset.captions[i]}”")
        for k in best:
            mark = "← its picture" if k == image else ""
            print(f"  {scores[k]:.3f}  {dataset.prefix}_images/{ids[k]}.png {mark}")


def main():
    parser = argparse.ArgumentParser(
        description="Train PFAN on drawn pictures and rank the test ones.",
        epilog="example: sh scripts/demo.sh --ablation --seed 1",
    )
    parser.add_argument(
        "--ablation", action="store_true", help="train PFAN-A, PFAN-P and SCAN, print them side by side"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the start values and the data order (default: 0)")
    parser.add_argument("--out", default="runs/demo", help="folder of models and results (default: %(default)s)")
    parser.add_argument("--data_path", default="data", help="folder of the demo data (default: %(default)s)")
    parser.add_argument("--vocab_path", default="vocab", help="folder of its vocabulary (default: %(default)s)")
    parser.add_argument("--data_flags", default="", help="further flags of make_demo_data.py, in one string")
    parser.add_argument("--train_flags", default="", help="further flags of train.py, in one string")
    opt = parser.parse_args()
    paths = ("--data_path", opt.data_path, "--data_name", NAME)
    command("scripts/demo/make_demo_data.py", *paths, *shlex.split(opt.data_flags))
    command("vocab.py", *paths, "--vocab_path", opt.vocab_path)
    results, models = {}, {}
    for position, name in MODELS.items() if opt.ablation else [("attention", "PFAN-A")]:
        models[name], results[name] = train_and_rank(
            position, opt.seed, opt.data_path, opt.vocab_path, opt.out, f"{TRAIN_FLAGS} {opt.train_flags}"
        )
    path = os.path.join(opt.out, "results.json")
    with open(path + ".part", "w") as file:
        json.dump(results, file, indent=1)
    os.replace(path + ".part", path)
    search(models["PFAN-A"], opt.data_path)
    print(table(results))
    print(f"\nresults  {path}\nmodels   {', '.join(models.values())}")
    print(f"pictures {os.path.join(opt.data_path, NAME, 'test_images')}")
    words = ("--model_path", *models.values(), "--data_path", opt.data_path, "--vocab_path", opt.vocab_path)
    python = sys.executable.removeprefix(os.getcwd() + os.sep)  # .venv/bin/python, after demo.sh
    print(f"\nlook at what they find: {shlex.join([python, 'scripts/explore.py', *words])}")


if __name__ == "__main__":
    run(main)
