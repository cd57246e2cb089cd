"""scripts/benchmark.py: the plain published way agrees with this code, and a tiny run gives its results."""

import json
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

from data import PrecompDataset, get_precomp_loader, pad
from evaluation import encode_data, rank_rows
from lib.errors import InputError
from model import SCAN, xattn_score_i2t, xattn_score_t2i
from position import position_grid
from scripts import benchmark
from scripts.bench import (
    inputs,
    measurements,
    published_way,
)

XATTN_SCORE = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}


TINY = {
    "repeats": 1,
    "embed_size": 32,
    "img_dim": 24,
    "word_dim": 16,
    "vocab_size": 50,
    "images": 12,
    "plain_images": 8,
    "plain_captions": 12,
    "batch_size": 8,
    "plain_batches": 2,
    "plain_grids": 2,
    "all_grids": 10,
    "growth": [6, 12, 24],
    "growth_pairs": 1000,
    "batches": [4, 8],
    "train_images": [20, 40],
}


@pytest.fixture
def s(tmp_path):
    return Namespace(**{**benchmark.SIZES, **TINY, "folder": str(tmp_path), "device": "cpu", "started": time.time()})


def both_models(s, cross_attn):
    torch.manual_seed(1)
    opt = inputs.flags(s, cross_attn)
    ours = SCAN(opt)
    plain = published_way.Model(opt)
    plain.load_state_dict(ours.state_dict())
    return opt, ours, plain


@pytest.mark.parametrize("cross_attn", ["t2i", "i2t"])
def test_the_published_way_gives_the_same_embeddings_scores_and_training_steps(s, cross_attn):
    opt, ours, plain = both_models(s, cross_attn)
    batch = inputs.random_batch(s, 8)
    with torch.no_grad():
        mine, theirs = ours.forward_emb(*batch), plain.forward_emb(*batch)
        torch.testing.assert_close(mine[:2], theirs[:2], rtol=0, atol=1e-5)
        scores = XATTN_SCORE[cross_attn](*mine, opt)
        images, captions = (x.double().numpy() for x in mine[:2])
        sims = published_way.shard_xattn(images, captions, mine[2], opt, shard_size=3)
        np.testing.assert_allclose(scores, sims, rtol=0, atol=1e-5)
    steps = [(ours.train_emb(*batch).item(), plain.train_emb(*batch)) for _ in range(3)]
    assert [a for a, _ in steps] == pytest.approx([b for _, b in steps], rel=1e-4)


def test_the_published_way_encodes_a_split_and_ranks_it_alike(s):
    inputs.make_split(s, s.folder, "test", s.images)
    _, ours, plain = both_models(s, "t2i")
    vocab, n = inputs.make_vocab(s), s.images * s.per_image
    images, words, lens = encode_data(ours, get_precomp_loader(PrecompDataset(s.folder, "test", vocab), 8, 0))
    loader = published_way.get_loader(f"{s.folder}/test", vocab, 8, n)
    plain_images, plain_words, plain_lens = published_way.encode_data(plain, loader)
    assert plain_images.dtype == plain_words.dtype == np.float64
    np.testing.assert_allclose(images, plain_images[:: s.per_image], rtol=0, atol=1e-5)
    assert lens == plain_lens
    mask = np.arange(words.shape[1])[None, :, None] < np.array(lens)[:, None, None]
    np.testing.assert_allclose(words, plain_words * mask, rtol=0, atol=1e-5)
    sims = np.random.default_rng(0).random((s.images, n))
    for mine, theirs in zip((rank_rows(sims)[0], rank_rows(sims.T)[0]), published_way.ranks(sims, 5), strict=True):
        assert (mine == theirs).all()


def test_the_published_way_gives_the_same_position_weights():
    boxes, sizes = inputs.random_boxes(np.random.default_rng(0), 4)
    plain, ours = published_way.position_grids(boxes, sizes), position_grid(boxes, sizes)
    np.testing.assert_allclose(plain[..., 15:], ours[..., 15:], rtol=0, atol=1e-6)
    assert ((plain[..., :15] < 256) == (ours[..., :15] < 256)).all()


def test_recalls_of_the_random_embeddings_are_neither_0_nor_100(s):
    images, words, lens = inputs.embeddings(s, s.images)
    assert images.shape == (12, 36, 32) and words.shape == (sum(lens), 32) and len(lens) == 60
    captions = pad(words.split(lens))
    assert XATTN_SCORE["t2i"](images, captions, lens, inputs.flags(s)).shape == (12, 60)
    recalls = measurements.score(s)["recalls"]
    assert all(0 < x for x in recalls) and recalls[0] < 100


def test_a_sampled_score_times_every_nth_block_and_fills_the_others(s):
    sampled = measurements.Sampled(lambda images, words, lens, opt: torch.ones(len(images), len(lens)), every=2)
    blocks = [sampled(torch.zeros(3, 36, 8), torch.zeros(5, 8), torch.tensor([2, 3]), None) for _ in range(4)]
    assert [block.sum() for block in blocks] == [6, 0, 6, 0]
    assert sampled.all == 2 * sampled.computed


def test_a_tiny_run_prints_the_table_and_writes_results_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lib.kernels.TILES_FROM", 0)  # a measurement sets it, in a process of its own
    out, plot = tmp_path / "out" / "benchmark.json", tmp_path / "growth.png"
    words = ["--quick", "--device", "cpu", "--sizes", json.dumps(TINY), "--out", str(out), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])

    def in_this_process(name, sizes, arguments):
        return json.loads(json.dumps(measurements.run_measurement(name, {**sizes, "started": time.time()}, arguments)))

    benchmark.main(measure=in_this_process)
    results = json.loads(out.read_text())["measurements"]
    for name, result in results.items():
        assert name == "machine" or min(result.get("seconds") or result["gflops"].values()) > 0
        assert result["peak_gb"] > 0
        assert name.endswith("published") == ("differences" in result)
        for row, difference in result.get("differences", {}).items():
            assert difference < 1e-5 or row.endswith(("high", "medium"))
    assert results["machine"]["cores"] and results["growth t2i 24"]["pairs"] == 24 * 120
    printed = capsys.readouterr().out
    assert results["machine"]["processor"] in printed.split("| work |")[0]
    for line in (
        "score and rank 12 × 60, t2i",
        "training step, batch 8, i2t",
        "encode 12 images",
        "position grids of 12",
    ):
        assert line in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_sizes_that_no_measurement_has_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--sizes", '{"image": 500}'])
    with pytest.raises(InputError, match="--sizes: image, expected some of repeats, "):
        benchmark.main(measure=lambda *args: pytest.fail("measured"))


def test_a_measurement_runs_in_a_process_of_its_own(s):
    result = benchmark.measure("grids", {**vars(s)}, {"n_images": 3})
    assert len(result["seconds"]) == 1 and 0 < result["peak_gb"] < 2
