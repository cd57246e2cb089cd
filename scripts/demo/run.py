"""Make the demo data, train on it with train.py, rank its test images with evalrank; run by scripts/demo.sh."""

import argparse
import os
import shlex
import subprocess
import sys

if not __package__:
    import _root  # noqa: F401

from evaluation import evalrank
from lib.errors import run
from lib.intervals import MEASURES
from scripts.explorer.names import LABELS

DATA = ("--data_path", "data", "--data_name", "demo_precomp")
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: sh scripts/demo.sh --ablation --seed 1")
    parser.add_argument(
        "--ablation", action="store_true", help="train PFAN-A, PFAN-P and SCAN, print them side by side"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the start values and the data order (default: 0)")
    opt, further = parser.parse_known_args()  # further flags are train.py's
    command("scripts/demo/make_demo_data.py", *DATA)
    command("vocab.py", *DATA, "--overwrite")
    results, models = {}, []
    for position in LABELS if opt.ablation else ["attention"]:
        folder = f"runs/demo/{position}_seed{opt.seed}"
        flags = ("--logger_name", folder, "--model_name", folder, "--position", position, "--seed", str(opt.seed))
        command("train.py", *DATA, *flags, *TRAIN_FLAGS.split(), "--overwrite", *further)
        models.append(f"{folder}/model_best.pth.tar")
        print(f'+ evaluation.evalrank("{models[-1]}", split="test")', flush=True)
        found = evalrank(models[-1], split="test")
        results[LABELS[position]] = [*found["i2t"][:3], *found["t2i"][:3], found["rsum"]]
    print("\n" + " " * 8 + "".join(f"{measure:>10}" for measure in MEASURES))
    for name, recalls in results.items():
        print(f"{name:8}" + "".join(f"{recall:10.1f}" for recall in recalls))
    python = sys.executable.removeprefix(os.getcwd() + os.sep)  # .venv/bin/python, after demo.sh
    words = (python, "scripts/explore.py", "--model_path", *models, "--data_path", "data", "--split", "test")
    print(f"\nlook at what they find: {shlex.join(words)}")


if __name__ == "__main__":
    run(main)
