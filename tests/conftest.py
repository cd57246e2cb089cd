"""What the tests share: the published numbers, the folder of real data, SCAN's flags, settings of hypothesis."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# The tests' matrices are small: a second thread waits more than it computes, 50 times longer where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and published checkpoints beside the checkout; without it the test is skipped."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no ../shared/golden beside this checkout: real data and published checkpoints are not at hand")
    return SHARED


def golden(name):
    """The arrays of golden/NAME.npz: what the published code gave on seeded inputs."""
    import numpy as np  # which reads the number of threads when it is imported

    with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def make_opt(**changes):
    """The published flags that a model needs, at the small sizes of golden/pfan.npz. No newer flag is set."""
    flags = {
        "margin": 0.2,
        "max_violation": True,
        "cross_attn": "t2i",
        "raw_feature_norm": "clipped_l2norm",
        "agg_func": "Mean",
        "lambda_softmax": 9.0,
        "lambda_lse": 6.0,
        "precomp_enc_type": "basic",
        "bi_gru": True,
        "num_layers": 1,
        "img_dim": 64,
        "embed_size": 32,
        "word_dim": 16,
        "vocab_size": 50,
        "no_imgnorm": False,
        "no_txtnorm": False,
        "learning_rate": 2e-4,
        "grad_clip": 2.0,
    }
    return Namespace(**{**flags, **changes})
