"""The score and the loss: model.attend against reference.py, and the compiled form that stands in for it on CPUs."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import torch
from conftest import make_opt
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import model
from evaluation import i2t, t2i
from lib.kernels import pieces
from lib.kernels.blocks import blocks
from model import AGG_FUNC, RAW_FEATURE_NORM, ContrastiveLoss, ScoreConfig, l2norm, xattn_score
from scripts.bench.measurements import caption_lengths

WAYS = "t2i", "i2t"
XATTN_SCORE = {"t2i": model.xattn_score_t2i, "i2t": model.xattn_score_i2t}

every_row = pytest.mark.parametrize(
    ("norm", "agg", "way"), [(norm, agg, way) for norm in RAW_FEATURE_NORM for agg in AGG_FUNC for way in WAYS]
)
both_forms = pytest.mark.parametrize("padded", [False, True], ids=["equal length", "padded"])
shapes = st.fixed_dictionaries(
    {
        "n_images": st.integers(1, 4),
        "n_regions": st.integers(1, 5),
        "lens": st.lists(st.integers(1, 6), min_size=1, max_size=4),
        "seed": st.integers(0, 2**20),
    }
)


@contextlib.contextmanager
def captions_in(padded):
    """Inside, captions are in blocks of equal length, as on CPUs, or padded and masked, as on GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "blocks", lambda *args: blocks(*args[:-1], padded=padded))
        yield


def embeddings(n_images, n_regions, lens, seed, dim=8, dtype=torch.float64):
    """Unit region and word vectors (I, R, D) and (C, W, D), zero behind a caption's end; W is more than the longest."""
    rng = torch.Generator().manual_seed(seed)
    images = l2norm(torch.randn(n_images, n_regions, dim, generator=rng, dtype=torch.float64), 2)
    captions = l2norm(torch.randn(len(lens), max(lens) + 1, dim, generator=rng, dtype=torch.float64), 2)
    for caption, n in zip(captions, lens, strict=True):
        caption[n:] = 0
    return images.to(dtype), captions.to(dtype)


def close(ours, expected, atol):
    np.testing.assert_allclose(ours.detach(), expected.detach(), rtol=0, atol=atol)


def check_loss(opt, images, captions, lens, bound=1e-10):
    """Value and gradients of the loss against autograd through the reference."""
    ours, theirs = ([x.detach().clone().requires_grad_() for x in (images, captions)] for _ in range(2))
    loss = ContrastiveLoss(opt, opt.margin, opt.max_violation)(*ours, lens)
    expected = reference.loss(reference.scores(*theirs, lens, opt), opt.margin, opt.max_violation)
    close(loss, expected, bound)
    loss.backward()
    expected.backward()
    for mine, exact in zip(ours, theirs, strict=True):
        for vector, right in zip(mine.grad.flatten(0, 1), exact.grad.flatten(0, 1), strict=True):
            # at a zero vector the gradient is large: the floor is 1e-8
            close(vector, right, bound * max(right.abs().max().item(), 1))


# ---------------------------------------------------------------- the formulas


@both_forms
@every_row
@settings(max_examples=2)
@given(shape=shapes)
@example(shape={"n_images": 1, "n_regions": 1, "lens": [1], "seed": 0})
@example(shape={"n_images": 4, "n_regions": 5, "lens": [6, 1, 3, 1], "seed": 1})
@example(shape={"n_images": 4, "n_regions": 1, "lens": [2], "seed": 2})
def test_scores_losses_and_gradients_follow_the_formulas(padded, norm, agg, way, shape):
    """In float64 within 1e-10, in float32 within 1e-4; all pairs at once or some of them."""
    opt = make_opt(raw_feature_norm=norm, agg_func=agg, cross_attn=way)
    images, captions = embeddings(**shape)
    lens, n = shape["lens"], min(len(images), len(captions))
    expected = reference.scores(images, captions, lens, opt)
    pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(lens))).flip(0)
    with captions_in(padded):
        for form in (lens, torch.tensor(lens)):
            ours = XATTN_SCORE[way](images, captions, form, opt)
            assert ours.shape == expected.shape
            close(ours, expected, 1e-10)
        close(XATTN_SCORE[way](images.float(), captions.float(), lens, opt), expected, 1e-4)
        ours = xattn_score(images, captions, lens, ScoreConfig.of(opt, way), pairs)
        close(ours, expected[pairs[:, 0], pairs[:, 1]], 1e-10)
        for opt.max_violation in (True, False):
            check_loss(opt, images[:n], captions[:n], lens[:n])


@both_forms
def test_scores_of_more_captions_than_fit_a_block_keep_their_order(padded):
    lens = [3, 5] * 150
    images, captions = embeddings(2, 3, lens, 3)
    with captions_in(padded):
        scores = XATTN_SCORE["t2i"](images, captions, lens, make_opt())
    for i in (0, 1, 170, 299):
        close(scores[:, i : i + 1], reference.scores(images, captions[i : i + 1], lens[i : i + 1], make_opt()), 1e-10)


@pytest.mark.parametrize("position", ["attention", "area", "none"])
def test_only_plain_scan_lacks_the_attention_term(position):
    images, captions = embeddings(2, 3, [4, 2], 0)
    expected = reference.scores(images, captions, [4, 2], make_opt(), position != "none")
    close(XATTN_SCORE["t2i"](images, captions, [4, 2], make_opt(position=position)), expected, 1e-10)


@both_forms
@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm", RAW_FEATURE_NORM)
def test_gradients_stay_finite_at_zero_vectors(padded, norm, way, max_violation):
    images, captions = embeddings(3, 4, [5, 3, 1], 7, dtype=torch.float32)
    images[0, 2:] = 0  # padded regions
    images[1] = 0  # an image without any
    captions[1, 1] = 0
    opt = make_opt(raw_feature_norm=norm, cross_attn=way, max_violation=max_violation)
    images.requires_grad_(), captions.requires_grad_()
    with captions_in(padded):
        ContrastiveLoss(opt, opt.margin, max_violation)(images, captions, [5, 3, 1]).backward()
    assert torch.isfinite(images.grad).all() and torch.isfinite(captions.grad).all()


@both_forms
@pytest.mark.parametrize("way", WAYS)
def test_padded_regions_get_the_gradients_of_the_formulas(padded, way):
    images, captions = embeddings(3, 4, [5, 3, 1], 8)
    images[0, 3] = 0  # one: of two equal attentions either may count as the largest
    with captions_in(padded):
        check_loss(make_opt(cross_attn=way, raw_feature_norm="no_norm"), images, captions, [5, 3, 1], 1e-7)


def test_pairs_apart_by_more_than_the_margin_cost_nothing():
    images = torch.eye(4)[:, None].requires_grad_()
    captions = torch.eye(4)[:, None].requires_grad_()
    for max_violation in (True, False):
        loss = ContrastiveLoss(make_opt(), 0.2, max_violation)(images, captions, [1] * 4)
        loss.backward()
        assert loss.item() == 0 and not images.grad.any() and not captions.grad.any()


# ---------------------------------------------------------------- the compiled form


@pytest.fixture
def calls(monkeypatch):
    """The compiled form is used for few pairs too; its calls. Precision and number of threads end with the test."""
    precision, threads, seen, form = torch.get_float32_matmul_precision(), torch.get_num_threads(), [], pieces.scores
    monkeypatch.setattr(pieces, "LEAST_ELEMENTS", 0)
    sample = len(pieces.sample()[2])
    monkeypatch.setattr(pieces, "scores", lambda *args: len(args[1]) > sample and seen.append(1) or form(*args))
    yield seen
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


def config_of(way="t2i", **changes):
    return ScoreConfig.of(make_opt(**changes), way)


def split(images=40, lens=None, R=36, D=64, seed=0):
    """images (I, R, D), captions (C, W, D), both float32 of unit length, and the lengths of 150 captions."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(3, 20, 150).tolist() if lens is None else lens
    X, captions = (rng.standard_normal(shape, np.float32) for shape in ((images, R, D), (len(lens), max(lens), D)))
    captions *= (np.arange(max(lens)) < np.array(lens)[:, None])[..., None]
    return *(normalize(torch.from_numpy(x), dim=-1) for x in (X, captions)), lens


def exact(images, captions, lens, config):
    return xattn_score(images.double(), captions.double(), lens, config)


def same(a, b):
    """True for scores that differ in the last bits at most, which torch's Gram matrices may in another memory."""
    return torch.allclose(a, b, rtol=0, atol=3e-7)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "images, R, D, lens",
    [
        (17, 36, 1024, None),
        (60, 36, 64, [600, 5, 1500, 3, 3, 1]),
        (1, 700, 64, [290, 1, 1, 1, 1, 1]),
        (13, 23, 1, [40, 1, 300, 7, 7, 7]),
    ],
)
def test_the_compiled_form_of_all_sizes_agrees_with_the_formula(way, images, R, D, lens, calls):
    some = split(images, lens, R, D)
    close(xattn_score(*some, config_of(way)), exact(*some, config_of(way)), 4e-6)
    assert calls == [1]


@pytest.mark.parametrize("norm", ["l2norm", "clipped_l2norm"])
@pytest.mark.parametrize(("agg", "smooth"), [("LogSumExp", 9), ("Mean", 0), ("Max", 20), ("Sum", 4)])
@pytest.mark.parametrize("way", WAYS)
def test_the_compiled_form_knows_every_aggregation_and_inverse_temperature(agg, smooth, norm, way, calls):
    config, some = config_of(way, agg_func=agg, raw_feature_norm=norm, lambda_softmax=smooth), split()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        close(xattn_score(*some, config), exact(*some, config), 1e-5)
    assert len(calls) == 2


def test_NaN_and_zeros_stay_with_their_image_and_vectors_that_cancel_give_finite_scores(calls):
    images, captions, lens = split()
    images[3], captions[0, 0], images[5, 7, 9] = 0, 0, float("nan")
    scores = xattn_score(images, captions, lens, config_of())
    assert scores[5].isnan().all() and torch.isfinite(scores[torch.arange(40) != 5]).all()
    half = 100 * images[:, :18].nan_to_num()
    cancel = config_of(lambda_softmax=0.0, agg_func="LogSumExp")  # the mean of v and -v is nearly zero
    assert torch.isfinite(xattn_score(torch.cat([half, -half], 1), captions, lens, cancel)).all()
    assert calls == [1, 1]


def test_gradients_other_norms_types_and_few_pairs_take_the_formula(calls, monkeypatch):
    images, captions, lens = split()
    xattn_score(images.clone().requires_grad_(), captions, lens, config_of()).sum().backward()
    xattn_score(images.double(), captions.double(), lens, config_of())
    for norm in set(RAW_FEATURE_NORM) - {"l2norm", "clipped_l2norm"}:
        xattn_score(images, captions, lens, config_of(raw_feature_norm=norm))
    xattn_score(images, captions, lens, config_of(lambda_softmax=30.0))
    xattn_score(images, captions, lens, config_of(), torch.zeros(300, 2, dtype=torch.int64))
    with torch.autocast("cpu", torch.bfloat16):
        xattn_score(images, captions, lens, config_of())
    monkeypatch.undo()  # a query should not wait for the compiler
    monkeypatch.setattr(pieces, "scores", lambda *args: pytest.fail("compiled"))
    xattn_score(images, captions[:9], lens[:9], config_of())
    assert not calls


# ---------------------------------------------------------------- precision


def ranks(scores):
    sims = scores.numpy()
    return np.array(i2t(None, None, None, sims)[:3] + t2i(None, None, None, sims)[:3])


@pytest.mark.parametrize("way", WAYS)
def test_medium_multiplies_in_bfloat16_and_keeps_scores_and_recalls(way, calls, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})  # torch computes it on any
    torch.manual_seed(0)
    lens = caption_lengths(np.random.default_rng(0), 300)
    images, captions = embeddings(60, 36, lens, 0, dim=1024, dtype=torch.float32)
    concepts = l2norm(torch.randn(60, 1024), 1)  # images share them
    images = l2norm(images + concepts[torch.randint(60, (60, 36))], 2)
    for i, (caption, n) in enumerate(zip(captions, lens, strict=True)):
        caption[:n] = l2norm(caption[:n] + 0.1 * images[i // 5, torch.randint(36, (n,))], 1)
    scores = xattn_score(images, captions, lens, config_of(way))
    torch.set_float32_matmul_precision("medium")
    medium = xattn_score(images, captions, lens, config_of(way))
    assert len(calls) == 2 and medium.dtype == torch.float32
    assert 1e-6 < (medium - scores).abs().max() < 2e-3
    one = np.repeat([100 / 60, 100 / 300], 3) + 1e-9  # a single image or caption
    assert (abs(ranks(medium) - ranks(scores)) <= one).all()
    assert ranks(scores).min() < 90


def test_high_and_processors_without_bfloat16_or_oneDNN_stay_in_float32(monkeypatch, calls):
    rounded, factor, some = [], pieces.factor, split()
    monkeypatch.setattr(pieces, "factor", lambda X, bfloat16: rounded.append(bfloat16) or factor(X, bfloat16))
    for processor in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=processor: {"avx512_bf16": has})
        for name in ("highest", "high", "medium"):
            rounded.clear()
            torch.set_float32_matmul_precision(name)
            xattn_score(*some, config_of())
            assert set(rounded) == {processor and name == "medium"}
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    close(xattn_score(*some, config_of()), exact(*some, config_of()), 4e-6)
    assert len(calls) == 7


# ---------------------------------------------------------------- threads


def number_of_threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as new:
        return new.submit(torch.get_num_threads).result()


def test_torch_keeps_its_number_of_threads_in_old_and_new_threads(calls):
    with ThreadPoolExecutor(1) as old:
        old.submit(torch.get_num_threads).result()  # only then does the thread keep the number that is set next
        old.submit(torch.set_num_threads, 5).result()  # of that thread and of those to come
        torch.set_num_threads(3)  # of this one and of those to come
        scores = xattn_score(*split(), config_of())
        assert (torch.get_num_threads(), old.submit(torch.get_num_threads).result()) == (3, 5)
        assert number_of_threads_of_a_new_thread() == 3
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert same(xattn_score(*split(), config_of()), scores)


def test_several_threads_score_at_once(calls):
    torch.set_num_threads(2)
    splits = [split(seed=seed) for seed in range(6)]
    alone = [xattn_score(*some, config_of()) for some in splits]
    with ThreadPoolExecutor(6) as clients:
        together = list(clients.map(lambda some: xattn_score(*some, config_of()), splits * 3))
    assert all(map(same, together, alone * 3))
