"""The compiled attention against the plain torch form of the same function, in float64."""

from argparse import Namespace

import numpy as np
import pytest
import torch

import cross_attention
from cross_attention import attend, xattn_score


def options(norm="clipped_l2norm", **kwargs):
    return Namespace(raw_feature_norm=norm, lambda_softmax=9.0, agg_func="Mean", lambda_lse=6.0, **kwargs)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(cross_attention, "KERNEL_FROM", 0)


@pytest.fixture
def calls(monkeypatch):
    import attention_kernel

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
    opt = options(norm)
    opt.lambda_softmax = smooth
    S, gram, norms = parts(np.random.default_rng(0), *shape)
    plain = attend(S.clone(), gram, norms, opt, True)
    assert not calls  # float64 has no compiled form
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = attend(S.float(), gram.float(), norms.float(), opt, True)
    finally:
        torch.set_num_threads(before)
    assert calls
    np.testing.assert_allclose(scores, plain, rtol=0, atol=2e-6)


def test_zeros_and_nan_go_through(calls):
    S, gram, norms = (x.float() for x in parts(np.random.default_rng(0), 3, 6, 4, 20))
    S[0], gram[0] = 0, 0
    S[2, 3, 1, 5] = float("nan")
    scores = attend(S, gram, norms, options(), True)
    assert torch.isfinite(scores[:2]).all()
    assert scores[2].isnan().nonzero().flatten().tolist() == [5]
    assert calls


@pytest.mark.parametrize("t2i", [True, False])
def test_scores_of_both_ways(t2i, calls):
    rng = np.random.default_rng(1)
    images, captions = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((9, 36, 24), (20, 12, 24)))
    lens = rng.integers(1, 13, 20).tolist()
    opt = options(position="attention", cross_attn="")
    plain = xattn_score(images, captions, lens, opt, t2i)
    np.testing.assert_allclose(xattn_score(images.float(), captions.float(), lens, opt, t2i), plain, rtol=0, atol=2e-6)
    assert calls


def test_training_and_other_norms_take_the_torch_form(calls):
    S, gram, norms = (x.float() for x in parts(np.random.default_rng(0), 2, 3, 4, 5))
    attend(S.clone().requires_grad_(), gram, norms, options(), True).sum().backward()
    for norm in ("softmax", "l1norm", "clipped_l1norm", "clipped", "no_norm"):
        attend(S.clone(), gram, norms, options(norm), True)
    assert not calls
