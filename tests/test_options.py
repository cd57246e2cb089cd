"""The table of flags: what the parsers, the checks and older checkpoints take from it."""

import argparse
from pathlib import Path

import numpy as np
import pytest

import model
import train
from lib.errors import InputError
from lib.options import CHOICES, OPTIONS, REQUIRED, check_options, option, to_namespace
from Tencent_PFAN import train_whole

# The published train.py's flags; only these must be in every checkpoint.
PUBLISHED = {
    "data_path": "./data/",
    "data_name": "precomp",
    "vocab_path": "./vocab/",
    "margin": 0.2,
    "num_epochs": 30,
    "batch_size": 128,
    "word_dim": 300,
    "embed_size": 1024,
    "grad_clip": 2.0,
    "num_layers": 1,
    "learning_rate": 0.0002,
    "lr_update": 15,
    "workers": 10,
    "log_step": 10,
    "val_step": 500,
    "logger_name": "./runs/runX/log",
    "model_name": "./runs/runX/checkpoint",
    "resume": "",
    "max_violation": False,
    "img_dim": 2048,
    "no_imgnorm": False,
    "no_txtnorm": False,
    "raw_feature_norm": "clipped_l2norm",
    "agg_func": "LogSumExp",
    "cross_attn": "t2i",
    "precomp_enc_type": "basic",
    "bi_gru": False,
    "lambda_lse": 6.0,
    "lambda_softmax": 9.0,
}
WHOLE_IMAGE = {
    "embed_size": 512,
    "position": "area",
    "need_box_whole": False,
    "lambda_whole": 1.0,
    "embed_path": "./vocab/embedding.npy",
}


@pytest.mark.parametrize(
    ("trainer", "more"), [(train, {"position": "attention"}), (train_whole, WHOLE_IMAGE)], ids=["root", "whole image"]
)
def test_every_flag_has_its_published_default_which_is_allowed_and_in_the_help(trainer, more):
    parser = trainer.get_parser()
    opt = parser.parse_args([])
    assert {**vars(opt), **PUBLISHED, **more} == vars(opt)
    check_options(opt)
    assert set(vars(opt)) <= set(OPTIONS)
    text = " ".join(parser.format_help().split())
    for name, value in vars(opt).items():
        assert f"--{name}" in text
        assert isinstance(value, bool) or value == "" or f"(default: {value})" in text, name


def test_the_choices_are_those_that_the_model_has():
    tables = {
        "raw_feature_norm": model.RAW_FEATURE_NORM,
        "agg_func": model.AGG_FUNC,
        "cross_attn": ("t2i", "i2t"),
        "precomp_enc_type": model.ENCODERS,
    }
    assert set(CHOICES) == {*tables, "position", "matmul_precision"}
    for name, table in tables.items():
        assert set(OPTIONS[name].allowed) == set(table), name


def test_an_option_that_is_missing_means_its_default_unless_every_checkpoint_has_it():
    older = argparse.Namespace(margin=0.1)
    assert option(older, "margin") == 0.1 and option(older, "position") == "attention"
    for name in set(OPTIONS) - REQUIRED:
        assert option(older, name) == OPTIONS[name].default
    for name in REQUIRED - {"margin"}:
        with pytest.raises(AttributeError):
            option(older, name)


@pytest.mark.parametrize("name", ["mean_warmup_epochs", "mean_warmup_steps"])
def test_a_warm_up_without_max_violation_is_refused(name):
    with pytest.raises(InputError, match=f"--{name} 2: .*without --max_violation"):
        train.check(train.get_parser().parse_args([f"--{name}", "2"]))


def test_any_object_becomes_options_that_a_checkpoint_can_hold():
    class Settings:
        margin = np.float64(0.1)

        def __init__(self):
            self.data_path, self.batch_size, self.note = Path("data"), np.int64(8), "more"

    opt = vars(to_namespace(Settings()))
    for name, value in dict(data_path="data", batch_size=8, note="more", margin=0.1, save_step=0).items():
        assert (opt[name], type(opt[name])) == (value, type(value)), name
    assert opt["agg_func"] == "LogSumExp"
