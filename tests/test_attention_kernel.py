"""The compiled attention, with and without the product in tiles, against the plain torch form in float64."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from lib import kernels
from lib.errors import InputError
from lib.kernels import amx, attention_kernel
from lib.kernels.blocks import attend
from model import Attention, xattn_score


def cross_attention(t2i=True, max_term=True, **changes):
    """A model.Attention; changes: options that differ from the published ones."""
    opt = {"raw_feature_norm": "clipped_l2norm", "lambda_softmax": 9.0, "agg_func": "Mean", "lambda_lse": 6.0}
    return Attention(Namespace(**{**opt, **changes}), t2i, max_term)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(kernels, "COMPILED_FROM", 0)
    monkeypatch.setattr(kernels, "TILES_FROM", 0)


@pytest.fixture
def calls(monkeypatch):
    seen, kernel = [], attention_kernel.attend
    monkeypatch.setattr(attention_kernel, "attend", lambda *args: seen.append(1) or kernel(*args))
    return seen


def parts(rng, N, L, K, M, D=24):
    contexts, queries = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((N, L, D), (K, M, D)))
    S = torch.einsum("nld,kmd->nlkm", contexts, queries)
    return S, contexts @ contexts.mT, queries.norm(dim=-1)


@pytest.mark.parametrize("norm", ["l2norm", "clipped_l2norm"])
@pytest.mark.parametrize("smooth", [0.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(5, 36, 7, 3), (1, 1, 1, 1), (3, 4, 2, 700), (4, 37, 80, 6)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_agrees_with_the_torch_form(norm, smooth, shape, threads, calls):
    attention = cross_attention(raw_feature_norm=norm, lambda_softmax=smooth)
    S, gram, norms = parts(np.random.default_rng(0), *shape)
    plain = attend(S.clone(), gram, norms, attention)
    assert not calls  # float64 has no compiled form
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = attend(S.float(), gram.float(), norms.float(), attention)
    finally:
        torch.set_num_threads(before)
    assert calls
    np.testing.assert_allclose(scores, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("agg_func", ["LogSumExp", "Mean", "Max", "Sum"])
@pytest.mark.parametrize("attention_term", [True, False])
def test_every_agg_func(agg_func, attention_term, calls):
    attention = cross_attention(agg_func=agg_func, max_term=attention_term)
    S, gram, norms = parts(np.random.default_rng(7), 4, 5, 6, 33)
    plain = attend(S.clone(), gram, norms, attention)
    scores = attend(S.float(), gram.float(), norms.float(), attention)
    np.testing.assert_allclose(scores, plain, rtol=0, atol=4e-6)
    assert calls
    S[1, 2, 3, 4] = float("nan")
    scores = attend(S.float(), gram.float(), norms.float(), attention)
    assert scores.isnan().nonzero().tolist() == [[1, 4]]


def test_zeros_and_nan_go_through(calls):
    S, gram, norms = (x.float() for x in parts(np.random.default_rng(0), 3, 6, 4, 20))
    S[0], gram[0] = 0, 0
    S[2, 3, 1, 5] = float("nan")
    scores = attend(S, gram, norms, cross_attention())
    assert torch.isfinite(scores[:2]).all()
    assert scores[2].isnan().nonzero().flatten().tolist() == [5]
    assert calls


@pytest.mark.parametrize("t2i", [True, False])
def test_scores_of_both_ways(t2i, calls):
    rng = np.random.default_rng(1)
    images, captions = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((9, 36, 24), (20, 12, 24)))
    lens = rng.integers(1, 13, 20).tolist()
    attention = cross_attention(t2i, max_term=t2i)
    plain = xattn_score(images, captions, lens, attention)
    np.testing.assert_allclose(xattn_score(images.float(), captions.float(), lens, attention), plain, rtol=0, atol=2e-6)
    assert calls


def test_the_environment_can_leave_the_compiled_form_out(calls, monkeypatch):
    S, gram, norms = (x.float() for x in parts(np.random.default_rng(0), 2, 3, 4, 5))
    for way, used in (("none", 0), ("torch", 0), ("numba", 1), ("amx", 2)):
        monkeypatch.setenv("PFAN_KERNELS", way)
        attend(S.clone(), gram, norms, cross_attention())
        assert len(calls) == used
    monkeypatch.setenv("PFAN_KERNELS", "fast")
    with pytest.raises(InputError, match="PFAN_KERNELS=fast: expected one of none, torch, numba, amx"):
        kernels.allowed("torch")


def test_training_and_other_norms_take_the_torch_form(calls):
    S, gram, norms = (x.float() for x in parts(np.random.default_rng(0), 2, 3, 4, 5))
    attend(S.clone().requires_grad_(), gram, norms, cross_attention()).sum().backward()
    for norm in ("softmax", "l1norm", "clipped_l1norm", "clipped", "no_norm"):
        attend(S.clone(), gram, norms, cross_attention(raw_feature_norm=norm))
    assert not calls


# ---------------------------------------------------------------- with the product in tiles

needs_amx = pytest.mark.skipif(not amx.available(), reason="this processor has no AMX tiles")
ACCURACY = {"highest": 2e-6, "high": 2e-5, "medium": 2e-2}


@pytest.fixture
def precision():
    """torch.set_float32_matmul_precision for one test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def unit(rng, *shape):
    return torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal(shape)), dim=-1)


def embeddings(rng, images=40, captions=150, D=64, longest=20):
    """images (I, 36, D), packed words (ΣW_i, D) and caption lengths, in float64."""
    lens = rng.integers(3, longest, captions).tolist()  # with one or two words bfloat16 turns whole attentions over
    return unit(rng, images, 36, D), unit(rng, sum(lens), D), lens


@pytest.fixture
def tiles(monkeypatch):
    """Counts the calls of the form that multiplies in tiles."""
    seen, kernel = [], attention_kernel.attend_products
    monkeypatch.setattr(attention_kernel, "attend_products", lambda *args: seen.append(1) or kernel(*args))
    return seen


@needs_amx
@pytest.mark.parametrize("t2i", [True, False])
@pytest.mark.parametrize("name", ACCURACY)
@pytest.mark.parametrize("images, D", [(40, 64), (17, 1024), (9, 160)])
def test_tiles_agree_with_the_torch_form(t2i, name, images, D, tiles, precision):
    regions, words, lens = embeddings(np.random.default_rng(2), images, D=D)
    attention = cross_attention(t2i, max_term=t2i)
    plain = xattn_score(regions, words, lens, attention)
    assert not tiles
    precision(name)
    scores = xattn_score(regions.float(), words.float(), lens, attention)
    assert tiles
    np.testing.assert_allclose(scores, plain, rtol=0, atol=ACCURACY[name])


@needs_amx
@pytest.mark.parametrize("t2i", [True, False])
def test_tiles_give_a_pair_the_same_score_in_any_company_and_thread_count(t2i, tiles):
    regions, words, lens = embeddings(np.random.default_rng(3))
    regions, words, attention = regions.float(), words.float(), cross_attention(t2i, max_term=False)
    scores = xattn_score(regions, words, lens, attention)
    first = xattn_score(regions[:11], words[: sum(lens[:70])], lens[:70], attention)
    np.testing.assert_allclose(first, scores[:11, :70], rtol=0, atol=3e-7)  # the products are the same bits
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(xattn_score(regions, words, lens, attention), scores)
    finally:
        torch.set_num_threads(before)
    assert len(tiles) > 2


@needs_amx
def test_nan_and_zeros_go_through_the_tiles(tiles):
    regions, words, lens = embeddings(np.random.default_rng(4))
    regions, words = regions.float(), words.float()
    regions[3], words[0] = 0, 0
    regions[5, 7, 9] = float("nan")
    scores = xattn_score(regions, words, lens, cross_attention())
    assert scores[5].isnan().all() and torch.isfinite(scores[torch.arange(40) != 5]).all()
    assert tiles


def test_without_tiles_or_for_other_sizes_the_product_is_a_matrix(tiles, monkeypatch):
    regions, words, lens = embeddings(np.random.default_rng(5), D=40)  # no multiple of 32
    attention = cross_attention()
    xattn_score(regions.float(), words.float(), lens, attention)
    monkeypatch.setattr(amx, "available", lambda: False)
    regions, words, lens = embeddings(np.random.default_rng(5))
    xattn_score(regions.float(), words.float(), lens, attention)
    assert not tiles


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("name, error", [("highest", 2**-23), ("high", 2**-16), ("medium", 2**-8)])
def test_the_parts_of_a_number_add_up_to_it(right, name, error):
    X = torch.from_numpy(np.random.default_rng(6).standard_normal((50, 96), dtype=np.float32))
    index = np.concatenate([np.arange(50)[::-1], np.full(14, -1)])
    blocks = amx.side([(X, index[:32]), (X, index[32:])], amx.PARTS[name], right)
    assert blocks.data_ptr() % 64 == 0
    pairs = blocks.mT if right else blocks  # parts, blocks, steps, halves, lines, pairs
    pairs = pairs.permute(0, 1, 3, 4, 2, 5).contiguous().view(torch.bfloat16)
    rows = pairs.double().sum(0).reshape(64, 96)
    assert (rows[50:] == 0).all()
    np.testing.assert_allclose(rows[:50], X.double().flip(0), rtol=error)


@needs_amx
@pytest.mark.parametrize("t2i", [True, False])
@pytest.mark.parametrize("R, lens", [(36, [600, 5, 1500, 3, 3]), (700, [290]), (5, [7] * 80)])
def test_long_captions_and_other_numbers_of_regions(t2i, R, lens, tiles):
    rng = np.random.default_rng(8)
    regions, words = unit(rng, 60 if R < 700 else 1, R, 64), unit(rng, sum(lens), 64)
    attention = cross_attention(t2i, max_term=t2i)
    plain = xattn_score(regions, words, lens, attention)
    scores = xattn_score(regions.float(), words.float(), lens, attention)
    assert tiles
    np.testing.assert_allclose(scores, plain, rtol=0, atol=4e-6)


@pytest.mark.parametrize("in_tiles", [pytest.param(True, marks=needs_amx), False])
def test_contexts_that_cancel_give_finite_scores(in_tiles, tiles, monkeypatch):
    monkeypatch.setattr(amx, "available", lambda: in_tiles)
    rng = np.random.default_rng(9)
    half = torch.from_numpy(rng.standard_normal((40, 18, 64), dtype=np.float32)) * 100
    words, lens = torch.from_numpy(rng.standard_normal((600, 64), dtype=np.float32)), [12] * 50
    attention = cross_attention(lambda_softmax=0.0, agg_func="LogSumExp")  # the mean of v and -v is nearly zero
    assert torch.isfinite(xattn_score(torch.cat([half, -half], 1), words, lens, attention)).all()
    assert bool(tiles) == in_tiles
