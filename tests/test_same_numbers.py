"""The same ranks whatever the batch size, the loading processes, the shard size and the threads.

Ranks may differ only by pairs whose scores lie within 1e-6 of the right one's. test_distributed.py has the same for
several processes, bit for bit.
"""

import itertools

import numpy as np
import pytest
import torch
from folders import make_folder, save_model

from data import get_test_loader
from evaluation import encode_data, evalrank, i2t, shard_xattn, t2i
from model import load_model
from vocab import deserialize_vocab

NAME = "toy_precomp"
CLOSE = 1e-6


@pytest.fixture(scope="module", params=["t2i", "i2t"])
def place(request, tmp_path_factory):
    """A checkpoint, its options, and the vocabulary; its test split has 60 images with 3 captions each."""
    root = tmp_path_factory.mktemp("same")
    where = make_folder(str(root), NAME, {"train": 2, "dev": 2, "test": 60}, 3, n_regions=8)
    path = str(root / "model.pth.tar")
    opt = save_model(path, *where, cross_attn=request.param, embed_size=24).opt
    return path, opt, deserialize_vocab(f"{where[1]}/{NAME}_vocab.json")


def score(place, batch_size=128, workers=0, shard_size=128, threads=1):
    path, opt, vocab = place
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loader = get_test_loader("test", NAME, vocab, batch_size, workers, opt)
        return shard_xattn(*encode_data(load_model(path, batch_size=batch_size), loader), opt, shard_size)
    finally:
        torch.set_num_threads(before)


def bounds(sims):
    """For each row the least and the largest rank that its right columns can have if scores move by CLOSE."""
    groups = min(sims.shape)
    row, column = np.arange(sims.shape[0]) * groups // sims.shape[0], np.arange(sims.shape[1]) * groups // sims.shape[1]
    right = row[:, None] == column
    best = np.where(right, sims, -np.inf).max(1, keepdims=True)
    return [(~right & (sims > best + CLOSE * sign)).sum(1) for sign in (1, -1)]


def test_ranks_are_the_same_for_any_batch_size_workers_shard_size_and_threads(place):
    reference = score(place)
    for matrix in (reference, reference.T):
        least, most = bounds(matrix)
        assert (least == most).mean() > 0.98 and most.max() > 10, "hardly any pair is that close"
    some = *itertools.product((1, 7, 200), (0,), (7, 500), (1,)), (7, 2, 16, 1), (128, 0, 128, 2), (128, 0, 1, 1)
    for values in some:
        sims = score(place, *values)
        np.testing.assert_allclose(sims, reference, rtol=0, atol=1e-5, err_msg=str(values))
        for rank, matrix in ((i2t, reference), (t2i, reference.T)):
            _, (ranks, _) = rank(None, None, None, sims, return_ranks=True)
            least, most = bounds(matrix)
            assert ((least <= ranks) & (ranks <= most)).all(), values
    results = [evalrank(place[0], split="test", batch_size=size) for size in (1, 10, 1000)]
    assert results[0] == results[1] == results[2]
