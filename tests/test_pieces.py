"""Scoring on CPUs without AMX: products a piece at a time, in float32 or bfloat16, against the form in model.py."""

import _thread
import os
import select
import signal
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from evaluation import i2t, t2i
from lib import kernels
from lib.kernels import amx, attention_kernel, blocks, pieces
from model import Attention, xattn_score
from scripts.bench import inputs

needs_bfloat16 = pytest.mark.skipif(not pieces.has_bfloat16(), reason="this processor has no bfloat16 products")


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    """The processor has no AMX, few pairs are enough; a test's precision and number of threads end with it."""
    monkeypatch.setattr(amx, "available", lambda: False)
    monkeypatch.setattr(kernels, "COMPILED_FROM", 0)
    monkeypatch.delenv("PFAN_KERNELS", raising=False)
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    seen, form = [], pieces.attend_products
    monkeypatch.setattr(pieces, "attend_products", lambda *args: seen.append(1) or form(*args))
    return seen


def cross_attention(way="t2i", **changes):
    opt = {"raw_feature_norm": "clipped_l2norm", "lambda_softmax": 9.0, "agg_func": "Mean", "lambda_lse": 6.0}
    return Attention(Namespace(**{**opt, **changes}), way == "t2i", way == "t2i")


def embeddings(images=40, lens=None, R=36, D=64, seed=0):
    """images (I, R, D), packed words (ΣW_i, D), both float32 of unit length, and the lengths of 150 captions."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(3, 20, 150).tolist() if lens is None else lens
    X, words = (torch.from_numpy(rng.standard_normal(shape, np.float32)) for shape in ((images, R, D), (sum(lens), D)))
    return normalize(X, dim=-1), normalize(words, dim=-1), lens


def same(a, b):
    """True for scores that differ in the last bits at most, which torch's Gram matrices may in another memory."""
    return torch.allclose(a, b, rtol=0, atol=3e-7)


def exact(images, words, lens, attention):
    return xattn_score(images.double(), words.double(), lens, attention)


@pytest.mark.parametrize("way", ["t2i", "i2t"])
@pytest.mark.parametrize(
    "images, R, D, lens",
    [
        (40, 36, 64, None),
        (17, 36, 1024, None),
        (9, 36, 37, None),
        (60, 36, 64, [600, 5, 1500, 3, 3]),
        (1, 700, 64, [290]),
        (60, 5, 64, [7] * 80),
        (301, 1, 8, [1] * 1033),
        (13, 23, 1, [40, 1, 300]),
    ],
)
def test_pieces_of_all_sizes_agree_with_the_formula(way, images, R, D, lens, calls):
    split = embeddings(images, lens, R, D)
    attention = cross_attention(way)
    scores = xattn_score(*split, attention)
    assert calls == [1]
    np.testing.assert_allclose(scores, exact(*split, attention), rtol=0, atol=4e-6)


@pytest.mark.parametrize("agg_func", ["LogSumExp", "Max", "Sum"])
@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_every_aggregation_and_norm(agg_func, way, calls):
    attention, split = cross_attention(way, agg_func=agg_func, raw_feature_norm="l2norm"), embeddings()
    np.testing.assert_allclose(xattn_score(*split, attention), exact(*split, attention), rtol=0, atol=1e-5)
    assert calls


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_all_ways_that_PFAN_KERNELS_names_give_the_same_scores(way, calls, monkeypatch):
    attention, split, used = cross_attention(way), embeddings(), []
    for name in kernels.WAYS:
        monkeypatch.setenv("PFAN_KERNELS", name)
        np.testing.assert_allclose(xattn_score(*split, attention), exact(*split, attention), rtol=0, atol=4e-6)
        used.append(len(calls))
    assert used == [0, 0, 1, 2]


def test_NaN_and_zeros_stay_with_their_image(calls):
    images, words, lens = embeddings()
    images[3], words[0], images[5, 7, 9] = 0, 0, float("nan")
    scores = xattn_score(images, words, lens, cross_attention())
    assert scores[5].isnan().all() and torch.isfinite(scores[torch.arange(40) != 5]).all()
    assert calls


def test_gradients_other_norms_and_few_pairs_go_another_way(calls, monkeypatch):
    images, words, lens = embeddings()
    xattn_score(images.clone().requires_grad_(), words, lens, cross_attention()).sum().backward()
    xattn_score(images, words, lens, cross_attention(raw_feature_norm="softmax"))
    xattn_score(images[:2], words, lens, cross_attention())
    with torch.autocast("cpu", torch.bfloat16):
        xattn_score(images, words, lens, cross_attention())
    monkeypatch.setattr(kernels, "COMPILED_FROM", 2**30)
    xattn_score(images, words, lens, cross_attention())
    assert not calls


# ---------------------------------------------------------------- precision


def ranks(scores):
    sims = scores.numpy()
    return np.array(i2t(None, None, None, sims)[:3] + t2i(None, None, None, sims)[:3])


@needs_bfloat16
@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_medium_multiplies_in_bfloat16_and_keeps_scores_and_recalls(way, calls):
    split = inputs.embeddings(Namespace(per_image=5, embed_size=1024, signal=0.1), 60)
    scores = xattn_score(*split, cross_attention(way))
    torch.set_float32_matmul_precision("medium")
    medium = xattn_score(*split, cross_attention(way))
    assert len(calls) == 2 and medium.dtype == torch.float32
    assert 1e-6 < (medium - scores).abs().max() < 2e-3
    one = np.repeat([100 / 60, 100 / 300], 3) + 1e-9  # a single image or caption
    assert (abs(ranks(medium) - ranks(scores)) <= one).all()
    assert ranks(scores).min() < 90


@pytest.mark.parametrize("D", [1, 2, 37, 1024])
def test_products_in_bfloat16_are_within_its_precision(D):
    X, words, _ = embeddings(D=D)
    left, right = X.flatten(0, 1)[:50], words[:70]
    S = pieces.multiply(pieces.factor(left, True), pieces.factor(right, True))
    assert S.dtype == torch.float32
    np.testing.assert_allclose(S, left.double() @ right.double().T, rtol=0, atol=2**-7)


def test_high_and_processors_without_bfloat16_stay_in_float32(monkeypatch, calls):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    split = embeddings()
    scores = {}
    for name in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(name)
        scores[name] = xattn_score(*split, cross_attention())
    assert len(calls) == 3
    for name in ("high", "medium"):
        np.testing.assert_allclose(scores[name], scores["highest"], rtol=0, atol=1e-6)


def test_high_is_float32_where_there_is_bfloat16(monkeypatch):
    rounded, factor = [], pieces.factor
    monkeypatch.setattr(pieces, "factor", lambda X, bfloat16: rounded.append(bfloat16) or factor(X, bfloat16))
    monkeypatch.setattr(pieces, "has_bfloat16", lambda: True)
    for name, expected in (("highest", {False}), ("high", {False}), ("medium", {True})):
        rounded.clear()
        torch.set_float32_matmul_precision(name)
        xattn_score(*embeddings(), cross_attention())
        assert set(rounded) == expected


def test_without_oneDNN_torch_multiplies(monkeypatch):
    attention, split = cross_attention(), embeddings()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    np.testing.assert_allclose(xattn_score(*split, attention), exact(*split, attention), rtol=0, atol=4e-6)


# ---------------------------------------------------------------- threads


def number_of_threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as new:
        return new.submit(torch.get_num_threads).result()


def test_torch_keeps_its_number_of_threads_in_old_and_new_threads():
    with ThreadPoolExecutor(1) as old:
        old.submit(torch.get_num_threads).result()  # only then does the thread keep the number that is set next
        old.submit(torch.set_num_threads, 5).result()  # of that thread and of those to come
        torch.set_num_threads(3)  # of this one and of those to come
        scores = xattn_score(*embeddings(), cross_attention())
        assert (torch.get_num_threads(), old.submit(torch.get_num_threads).result()) == (3, 5)
        assert number_of_threads_of_a_new_thread() == 3
        assert set(amx.pool(3).map(lambda _: torch.get_num_threads(), range(20))) == {1}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert same(xattn_score(*embeddings(), cross_attention()), scores)


def test_several_threads_score_at_once():
    splits = [embeddings(seed=seed) for seed in range(6)]
    alone = [xattn_score(*split, cross_attention()) for split in splits]
    with ThreadPoolExecutor(6) as clients:
        together = list(clients.map(lambda split: xattn_score(*split, cross_attention()), splits * 3))
    assert all(map(same, together, alone * 3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_after_scoring_scores_in_one_thread():
    torch.set_num_threads(2)
    split = embeddings()
    expected = xattn_score(*split, cross_attention())
    read, write = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover
        torch.set_num_threads(1)  # as in the workers of a DataLoader: torch's other threads stay with the parent
        os.write(write, b"1" if same(xattn_score(*split, cross_attention()), expected) else b"0")
        os._exit(0)
    ready, _, _ = select.select([read], [], [], 120)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready and os.read(read, 1) == b"1"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_or_error_ends_scoring_and_the_next_one_is_right(error, monkeypatch):
    torch.set_num_threads(2)
    split, product = embeddings(), pieces.multiply
    expected = xattn_score(*split, cross_attention())

    def stop(left, right):
        if error is ZeroDivisionError:
            raise error
        if threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main()
        return product(left, right)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        monkeypatch.setattr(pieces, "multiply", stop)
        with pytest.raises(error):
            xattn_score(*split, cross_attention())
    finally:
        signal.signal(signal.SIGINT, handler)
        monkeypatch.setattr(pieces, "multiply", product)
    assert same(xattn_score(*split, cross_attention()), expected)


# ---------------------------------------------------------------- without the compiled form


def test_captions_are_sorted_once_for_all_chunks_of_images(monkeypatch):
    monkeypatch.setenv("PFAN_KERNELS", "torch")
    sorts, form = [], blocks.equal_length_blocks
    monkeypatch.setattr(blocks, "equal_length_blocks", lambda *args, **more: sorts.append(1) or form(*args, **more))
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", attention_kernel.ROWS * blocks.BLOCK_WORDS)  # 8 images of 36 regions
    split, attention = embeddings(), cross_attention()
    with torch.no_grad():
        scores = xattn_score(*split, attention)
    assert len(sorts) == 1
    np.testing.assert_allclose(scores, exact(*split, attention), rtol=0, atol=4e-6)
