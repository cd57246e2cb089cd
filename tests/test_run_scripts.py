"""run_train.sh, the whole-image variant's as well, and run_eval.sh: the commands that they run."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


@pytest.fixture
def script(tmp_path):
    """script(path, *words) runs a copy of a script with a python that prints its words.

    Returns exit status, the commands that were run, other lines of stdout, and those of stderr but for the trace.
    """
    for folder in ("scripts", "Tencent_PFAN", "bin"):
        (tmp_path / folder).mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "ran: $*"\n')
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def run(path, *words):
        shutil.copy(ROOT / path, tmp_path / path)
        done = subprocess.run(["sh", tmp_path / path, *words], env=env, capture_output=True, text=True)
        lines = done.stdout.splitlines()
        ran = [line.removeprefix("ran: ") for line in lines if line.startswith("ran: ")]
        rest = [line for line in lines if not line.startswith("ran: ")]
        return done.returncode, ran, rest, [line for line in done.stderr.splitlines() if not line.startswith("+ ")]

    return run


@pytest.fixture
def trained(tmp_path):
    def make(data, position="attention", ways=("t2i", "i2t")):
        for cross_attn in ways:
            folder = tmp_path / f"runs/{data}_precomp/{cross_attn}_{position}"
            folder.mkdir(parents=True)
            (folder / "model_best.pth.tar").touch()

    return make


@pytest.mark.parametrize("small", ["", "small"])
def test_flickr30k_is_ranked_once_with_both_models(script, trained, small):
    name = "attention_small" if small else "attention"
    trained("f30k", name)
    status, ran, rest, errors = script("scripts/run_eval.sh", *small.split(), "--intervals")
    assert (status, len(ran), rest, errors) == (0, 1, [], [])
    assert f"runs/f30k_precomp/t2i_{name}/model_best.pth.tar runs/f30k_precomp/i2t_{name}/model_best" in ran[0]
    assert ran[0].endswith("--split test --intervals")


def test_coco_ranks_test_first_and_says_what_testall_needs(script, trained, tmp_path):
    trained("coco", "area")
    status, ran, rest, errors = script("scripts/run_eval.sh", "coco", "area")
    assert (status, len(ran), errors) == (0, 1, []) and ran[0].endswith("--split test")
    assert "testall_boxes.npy is missing" in rest[0] and "tsv_to_dataset.py" in "".join(rest)
    (tmp_path / "data/coco_precomp").mkdir(parents=True)
    (tmp_path / "data/coco_precomp/testall_boxes.npy").touch()
    status, ran, rest, errors = script("scripts/run_eval.sh", "coco", "area")
    assert [line.partition("--split ")[2] for line in ran] == ["test", "testall --fold5", "testall"]
    assert (status, rest, errors) == (0, [], [])


def test_a_training_that_is_missing_is_named_with_its_command(script, trained):
    trained("coco", ways=["t2i"])
    status, ran, _, errors = script("scripts/run_eval.sh", "coco")
    assert (status, ran) == (2, []) and len(errors) == 1
    assert "i2t_attention/model_best.pth.tar: no such file; sh scripts/run_train.sh coco i2t attention" in errors[0]


OF_ALL = "--max_violation --bi_gru --agg_func=Mean --num_epochs=30 --lr_update=15 --batch_size=128 --val_step=2000000"


@pytest.mark.parametrize(
    ("path", "words", "flags"),
    [
        ("scripts", "", "--cross_attn=t2i --lambda_softmax=9 --learning_rate=.0002 --position=attention"),
        ("scripts", "coco i2t area", "--cross_attn=i2t --lambda_softmax=4 --learning_rate=.0005 --position=area"),
        ("Tencent_PFAN", "", "--cross_attn=t2i --lambda_softmax=9 --learning_rate=.0002 --lambda_whole=2"),
        ("Tencent_PFAN", "i2t", "--cross_attn=i2t --lambda_softmax=4 --embed_size=512 --lambda_whole=2"),
        ("scripts", "f30k small", "--position_init=0.02 --model_name ./runs/f30k_precomp/t2i_attention_small/"),
    ],
)
def test_the_published_runs(script, path, words, flags):
    status, [command], _, errors = script(f"{path}/run_train.sh", *words.split(), "--seed", "3")
    assert (status, errors) == (0, [])
    assert {*OF_ALL.split(), *flags.split()} <= set(command.split()) and command.endswith("--seed 3")
