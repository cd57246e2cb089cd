"""The same ranks whatever the batch size, the loading processes, the shard size and the threads.

Ranks may differ only by pairs whose scores lie within 1e-6 of the right one's. test_distributed.py has the same for
several processes, bit for bit.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_opt
from folders import make_folder

from data import get_test_loader
from evaluation import encode_data, evalrank, i2t, shard_xattn, t2i
from lib.checkpoint import save_checkpoint
from model import SCAN, load_model
from vocab import deserialize_vocab

NAME = "toy_precomp"
CLOSE = 1e-6


@pytest.fixture(scope="module", params=["t2i", "i2t"])
def place(request, tmp_path_factory):
    """A checkpoint and the test split it is for: 60 images with 3 captions each."""
    root = tmp_path_factory.mktemp("same")
    data_path, vocab_path = make_folder(str(root), NAME, {"train": 2, "dev": 2, "test": 60}, 3, n_regions=8, img_dim=16)
    vocab = deserialize_vocab(f"{vocab_path}/{NAME}_vocab.json")
    torch.manual_seed(0)
    opt = make_opt(
        cross_attn=request.param,
        data_path=data_path,
        data_name=NAME,
        vocab_path=vocab_path,
        batch_size=128,
        vocab_size=len(vocab),
        img_dim=16,
        embed_size=24,
        word_dim=8,
    )
    model = SCAN(opt)
    state = {"epoch": 1, "model": model.state_dict(), "best_rsum": 0.0, "opt": opt, "Eiters": 1}
    save_checkpoint(state, False, "model.pth.tar", str(root))
    return str(root / "model.pth.tar"), opt, vocab


def score(place, batch_size=128, workers=0, shard_size=128, threads=1):
    path, opt, vocab = place
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loader = get_test_loader("test", NAME, vocab, batch_size, workers, opt)
        return shard_xattn(*encode_data(load_model(path), loader, packed=True), opt, shard_size)
    finally:
        torch.set_num_threads(before)


def bounds(sims):
    """For each row the least and the largest rank that its right columns can have if scores move by CLOSE."""
    groups = min(sims.shape)
    row, column = np.arange(sims.shape[0]) * groups // sims.shape[0], np.arange(sims.shape[1]) * groups // sims.shape[1]
    right = row[:, None] == column
    best = np.where(right, sims, -np.inf).max(1, keepdims=True)
    return [(~right & (sims > best + CLOSE * sign)).sum(1) for sign in (1, -1)]


SETTINGS = [
    dict(zip(("batch_size", "workers", "shard_size", "threads"), values, strict=True))
    for values in (
        *itertools.product((1, 7, 200), (0,), (7, 500), (1,)),
        (7, 2, 16, 1),
        (128, 0, 128, 2),
        (128, 0, 1, 1),
    )
]


def test_ranks_are_the_same_for_any_batch_size_workers_shard_size_and_threads(place):
    reference = score(place)
    for settings in SETTINGS:
        sims = score(place, **settings)
        np.testing.assert_allclose(sims, reference, rtol=0, atol=1e-5, err_msg=str(settings))
        for rank, matrix in ((i2t, reference), (t2i, reference.T)):
            _, (ranks, _) = rank(None, None, None, sims, return_ranks=True)
            least, most = bounds(matrix)
            assert ((least <= ranks) & (ranks <= most)).all(), settings


def test_hardly_any_pair_is_that_close(place):
    """Else the test above would say nothing."""
    for matrix in (reference := score(place), reference.T):
        least, most = bounds(matrix)
        assert (least == most).mean() > 0.98 and most.max() > 10


def test_evalrank_gives_the_same_recalls_for_any_batch_size(place, tmp_path):
    results = [evalrank(place[0], split="test", batch_size=size) for size in (1, 10, 1000)]
    assert results[0] == results[1] == results[2]
