"""Encoders, cross attention, loss and training step against the formulas in reference.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import make_opt
from folders import random_boxes
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import model as model_module
from evaluation import LogCollector
from lib.errors import InputError
from lib.kernels import pieces
from lib.kernels.blocks import blocks
from model import (
    AGG_FUNC,
    RAW_FEATURE_NORM,
    SCAN,
    ContrastiveLoss,
    ScoreConfig,
    l1norm,
    l2norm,
    xattn_score,
    xattn_score_i2t,
    xattn_score_t2i,
)

XATTN_SCORE = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}

every_form = pytest.mark.parametrize(
    ("norm", "agg", "way"), [(n, a, w) for n in RAW_FEATURE_NORM for a in AGG_FUNC for w in ("t2i", "i2t")]
)
shapes = st.fixed_dictionaries(
    {
        "n_images": st.integers(1, 4),
        "n_regions": st.integers(1, 5),
        "lens": st.lists(st.integers(1, 6), min_size=1, max_size=4),
        "seed": st.integers(0, 2**20),
    }
)


@pytest.fixture(scope="module", params=["equal length", "padded", "compiled"], autouse=True)
def ways(request):
    """Every test runs with captions in blocks of equal length, as on CPUs, with padded ones, as on GPUs, and with the
    compiled form of as many scores as it can compute."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "padded":
            patch.setattr(model_module, "blocks", lambda *args: blocks(*args[:-1], padded=True))
        if request.param == "compiled":
            patch.setattr(pieces, "LEAST_ELEMENTS", 0)
            patch.setattr(pieces, "ROWS", 1)
        yield


def embeddings(n_images, n_regions, lens, seed, dim=8):
    """Unit region and word vectors, float32: (I, R, D) and (C, W, D), zero behind a caption's end."""
    rng = torch.Generator().manual_seed(seed)
    images = l2norm(torch.randn(n_images, n_regions, dim, generator=rng), 2)
    captions = l2norm(torch.randn(len(lens), max(lens), dim, generator=rng), 2)
    for caption, n in zip(captions, lens, strict=True):
        caption[n:] = 0
    return images, captions


def assume_no_sign_is_a_matter_of_rounding(images, captions):
    """With one attending element the normalised S is S / (|S| + 1e-8): float32 cannot know it where S is nearly 0."""
    products = images.flatten(0, 1) @ captions.flatten(0, 1).T
    assume(not ((products != 0) & (products.abs() < 1e-4)).any())


def close(ours, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(ours.detach().numpy(), expected.detach().numpy(), rtol=rtol, atol=atol)


def test_the_names_that_scan_code_imports_are_there():
    names = "SCAN EncoderImage EncoderText ContrastiveLoss xattn_score_t2i xattn_score_i2t l1norm l2norm"
    assert [name for name in names.split() if not hasattr(model_module, name)] == []


# ---------------------------------------------------------------- cross attention


def test_every_published_normalisation_and_aggregation_is_there():
    norms = "softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "no_norm"
    assert set(RAW_FEATURE_NORM) >= set(norms) and set(AGG_FUNC) >= {"LogSumExp", "Mean", "Max", "Sum"}


@every_form
@settings(max_examples=5)
@given(shape=shapes)
@example(shape={"n_images": 1, "n_regions": 1, "lens": [1], "seed": 0})
@example(shape={"n_images": 1, "n_regions": 5, "lens": [6, 1, 3, 1], "seed": 1})
@example(shape={"n_images": 4, "n_regions": 1, "lens": [2], "seed": 2})
def test_scores_follow_the_formulas(norm, agg, way, shape):
    opt = make_opt(raw_feature_norm=norm, agg_func=agg, cross_attn=way)
    images, captions = embeddings(**shape)
    assume_no_sign_is_a_matter_of_rounding(images, captions)
    expected = reference.scores(images.double(), captions.double(), shape["lens"], opt)
    ours = XATTN_SCORE[way](images, captions, shape["lens"], opt)
    assert ours.shape == (shape["n_images"], len(shape["lens"]))
    close(ours, expected)
    close(XATTN_SCORE[way](images, captions, torch.tensor(shape["lens"]), opt), expected)
    pairs = torch.cartesian_prod(torch.arange(shape["n_images"]), torch.arange(len(shape["lens"]))).flip(0)
    ours = xattn_score(images, captions, shape["lens"], ScoreConfig.of(opt, way), pairs)
    close(ours, expected[pairs[:, 0], pairs[:, 1]])


def test_scores_without_normalised_embeddings_follow_the_formulas():
    opt = make_opt(raw_feature_norm="l2norm", agg_func="LogSumExp")
    images, captions = embeddings(3, 4, [5, 2, 7], 0)
    images, captions = images * 3, captions * 0.2
    close(
        XATTN_SCORE["t2i"](images, captions, [5, 2, 7], opt),
        reference.scores(images.double(), captions.double(), [5, 2, 7], opt),
    )


def test_scores_of_more_captions_than_fit_a_block_keep_their_order():
    opt = make_opt()
    lens = [3, 5] * 150
    images, captions = embeddings(2, 3, lens, 3)
    scores = XATTN_SCORE["t2i"](images, captions, lens, opt)
    for i in (0, 1, 170, 299):
        close(scores[:, i : i + 1], XATTN_SCORE["t2i"](images, captions[i : i + 1], lens[i : i + 1], opt))


@pytest.mark.parametrize("position", ["attention", "area", "none"])
def test_only_plain_scan_lacks_the_attention_term(position):
    images, captions = embeddings(2, 3, [4, 2], 0)
    expected = reference.scores(images.double(), captions.double(), [4, 2], make_opt(), position != "none")
    close(XATTN_SCORE["t2i"](images, captions, [4, 2], make_opt(position=position)), expected)


def test_l1norm_and_l2norm_divide_by_sum_and_length():
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    close(l1norm(x, 1), torch.tensor([[3 / 7, -4 / 7], [0, 0]]))
    close(l2norm(x, 1), torch.tensor([[0.6, -0.8], [0, 0]]))


# ---------------------------------------------------------------- loss


def check_loss(opt, images, captions, lens):
    """Value and gradients of the loss in float32 against autograd through the reference in float64."""
    ours, theirs = (
        [x.detach().to(dtype, copy=True).requires_grad_() for x in (images, captions)]
        for dtype in (torch.float32, torch.double)
    )
    loss = ContrastiveLoss(opt, opt.margin, opt.max_violation)(*ours, lens)
    expected = reference.loss(reference.scores(*theirs, lens, opt), opt.margin, opt.max_violation)
    close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    expected.backward()
    for mine, exact in zip(ours, theirs, strict=True):
        for vector, right in zip(mine.grad.flatten(0, 1), exact.grad.flatten(0, 1), strict=True):
            scale = max(right.abs().max().item(), 1.0)  # at a zero vector the gradient is large: the floor is 1e-8
            close(vector, right, rtol=0, atol=2e-3 * scale)


@every_form
@pytest.mark.parametrize("max_violation", [True, False])
@settings(max_examples=2)
@given(shape=shapes)
def test_loss_and_its_gradients_follow_the_formulas(norm, agg, way, max_violation, shape):
    opt = make_opt(raw_feature_norm=norm, agg_func=agg, cross_attn=way, max_violation=max_violation)
    images, captions = embeddings(**{**shape, "n_images": len(shape["lens"])})
    assume_no_sign_is_a_matter_of_rounding(images, captions)
    check_loss(opt, images, captions, shape["lens"])


@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("way", ["t2i", "i2t"])
@pytest.mark.parametrize("norm", RAW_FEATURE_NORM)
def test_gradients_stay_finite_at_zero_vectors(norm, way, max_violation):
    images, captions = embeddings(3, 4, [5, 3, 1], 7)
    images[0, 2:] = 0  # padded regions
    images[1] = 0  # an image without any
    captions[1, 1] = 0
    opt = make_opt(raw_feature_norm=norm, cross_attn=way, max_violation=max_violation)
    images.requires_grad_(), captions.requires_grad_()
    ContrastiveLoss(opt, opt.margin, max_violation)(images, captions, [5, 3, 1]).backward()
    assert torch.isfinite(images.grad).all() and torch.isfinite(captions.grad).all()


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_padded_regions_get_the_gradients_of_the_formulas(way):
    images, captions = embeddings(3, 4, [5, 3, 1], 8)
    images[0, 3] = 0  # one: of two equal attentions either may count as the largest
    check_loss(make_opt(cross_attn=way, raw_feature_norm="no_norm"), images, captions, [5, 3, 1])


def test_pairs_apart_by_more_than_the_margin_cost_nothing():
    images = torch.eye(4)[:, None].requires_grad_()
    captions = torch.eye(4)[:, None].requires_grad_()
    for max_violation in (True, False):
        loss = ContrastiveLoss(make_opt(), 0.2, max_violation)(images, captions, [1] * 4)
        loss.backward()
        assert loss.item() == 0 and not images.grad.any() and not captions.grad.any()


# ---------------------------------------------------------------- encoders


def random_batch(n=3, n_regions=4, lens=(6, 4, 1), img_dim=64, box_width=31, seed=0):
    """images, boxes, captions, lengths; the last region has no box, the first few slots only."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, n, n_regions, box_width)
    boxes[:, -1, :15], boxes[:, -1, 15:30] = 256, 0
    boxes[:, 0, 9:15], boxes[:, 0, 24:30] = 256, 0
    captions = np.zeros((n, max(lens)), dtype=np.int64)
    for row, length in enumerate(lens):
        captions[row, :length] = rng.integers(1, 50, length)
    images = rng.standard_normal((n, n_regions, img_dim), dtype=np.float32)
    return torch.tensor(images), torch.tensor(boxes), torch.tensor(captions), list(lens)


def double(state):
    return {name: value.double() for name, value in state.items()}


@pytest.mark.parametrize("no_norm", [False, True])
@pytest.mark.parametrize("position", ["attention", "area", "none"])
@pytest.mark.parametrize("encoder", ["basic", "weight_norm"])
def test_region_embeddings_follow_the_formulas(encoder, position, no_norm):
    model = SCAN(make_opt(precomp_enc_type=encoder, position=position, no_imgnorm=no_norm))
    images, boxes, *_ = random_batch()
    state = double(model.state_dict()[0])
    ours = model.img_enc(images, boxes)
    for embedding, features, box in zip(ours, images.double(), boxes.double(), strict=True):
        close(embedding, reference.image_embedding(state, features, box, position, not no_norm))


def test_the_31st_value_of_a_box_changes_nothing():
    model = SCAN(make_opt())
    images, boxes, *_ = random_batch()
    assert torch.equal(model.img_enc(images, boxes), model.img_enc(images, boxes[..., :30]))


def test_a_region_without_a_box_takes_part_like_any_other():
    """All 15 slots hold "no cell" with weight 0: PFAN-A's position is that row of the table, PFAN-P's is zero."""
    images, boxes, *_ = random_batch()
    for position, share in (("attention", 1), ("area", 0)):
        encoder = SCAN(make_opt(position=position)).img_enc
        expected = share * encoder.position_embedding.weight[256]
        close(encoder.position_feature(images, boxes)[0, -1], expected)


@pytest.mark.parametrize("no_norm", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bi_gru", [True, False])
def test_word_embeddings_follow_the_formulas(bi_gru, num_layers, no_norm):
    model = SCAN(make_opt(bi_gru=bi_gru, num_layers=num_layers, no_txtnorm=no_norm))
    *_, captions, lens = random_batch()
    state = double(model.state_dict()[1])
    ours, _ = model.txt_enc(captions, lens)
    assert ours.shape == (3, 6, 32)
    for embedding, ids, n in zip(ours, captions, lens, strict=True):
        close(embedding[:n], reference.caption_embedding(state, ids[:n], num_layers, bi_gru, not no_norm))
        assert not embedding[n:].any()


@pytest.mark.parametrize(("bi_gru", "num_layers"), [(True, 1), (False, 1), (True, 2), (False, 3)])
def test_gradients_of_the_text_encoder_follow_the_formulas(bi_gru, num_layers):
    encoder = SCAN(make_opt(bi_gru=bi_gru, num_layers=num_layers)).txt_enc
    *_, captions, lens = random_batch(n=4, lens=(2, 6, 1, 4))
    state = {name: value.detach().double().requires_grad_() for name, value in encoder.named_parameters()}
    weights = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    (encoder(captions, lens)[0] * weights).sum().backward()
    for ids, n, weight in zip(captions, lens, weights, strict=True):
        (reference.caption_embedding(state, ids[:n], num_layers, bi_gru) * weight[:n]).sum().backward()
    for name, parameter in encoder.named_parameters():
        close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("position", ["attention", "area", "none"])
@pytest.mark.parametrize("kind", ["basic", "weight_norm"])
def test_gradients_of_the_image_encoder_follow_the_formulas(kind, position):
    encoder = SCAN(make_opt(precomp_enc_type=kind, position=position)).img_enc
    images, boxes, *_ = random_batch()
    state = {name: value.detach().double().requires_grad_() for name, value in encoder.named_parameters()}
    weights = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    (encoder(images, boxes) * weights).sum().backward()
    for features, box, weight in zip(images.double(), boxes.double(), weights, strict=True):
        (reference.image_embedding(state, features, box, position) * weight).sum().backward()
    for name, parameter in encoder.named_parameters():
        close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-4)


def test_a_caption_is_embedded_alike_in_any_company_and_order():
    model = SCAN(make_opt(num_layers=2))
    *_, captions, lens = random_batch(n=5, lens=(9, 2, 5, 5, 1))
    together, _ = model.txt_enc(captions, lens)
    for i, n in enumerate(lens):
        close(model.txt_enc(captions[i : i + 1, :n], [n])[0][0], together[i, :n], atol=1e-6)


# ---------------------------------------------------------------- the model


def test_forward_emb_gives_embeddings_and_the_lengths():
    model = SCAN(make_opt())
    img_emb, cap_emb, cap_lens = model.forward_emb(*random_batch())
    assert img_emb.shape == (3, 4, 32) and cap_emb.shape == (3, 6, 32) and list(cap_lens) == [6, 4, 1]
    assert img_emb.requires_grad and cap_emb.requires_grad
    assert not model.forward_emb(*random_batch(), volatile=True)[0].requires_grad


@pytest.mark.parametrize("position", ["attention", "area", "none"])
@pytest.mark.parametrize("encoder", ["basic", "weight_norm"])
@pytest.mark.parametrize("max_violation", [True, False])
def test_training_lowers_the_loss(encoder, position, max_violation):
    torch.manual_seed(0)
    model = SCAN(make_opt(precomp_enc_type=encoder, position=position, max_violation=max_violation, learning_rate=0.01))
    losses = [model.train_emb(*random_batch(n=4, lens=(6, 4, 3, 1))).item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_batch_of_one_costs_nothing_and_changes_nothing_but_trains():
    for way in ("t2i", "i2t"):
        for max_violation in (True, False):
            model = SCAN(make_opt(cross_attn=way, max_violation=max_violation))
            before = [parameter.clone() for parameter in model.params]
            assert model.train_emb(*random_batch(n=1, lens=(4,))).item() == 0
            assert all(torch.equal(a, b) for a, b in zip(before, model.params, strict=True))


@pytest.mark.parametrize("position", ["attention", "area", "none"])
@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_padded_regions_leave_finite_weights(position, way):
    model = SCAN(make_opt(position=position, cross_attn=way))
    images, boxes, captions, lens = random_batch()
    images[:, 2:] = 0
    images[0] = 0  # a picture in which nothing was found
    boxes[0, :, :15], boxes[0, :, 15:30] = 256, 0
    for _ in range(3):
        assert torch.isfinite(model.train_emb(images, boxes, captions, lens))
    assert all(torch.isfinite(parameter).all() for parameter in model.params)


def test_gradients_are_clipped_to_their_common_norm():
    model = SCAN(make_opt(grad_clip=0.001))
    model.train_emb(*random_batch())
    norms = [parameter.grad.norm() for parameter in model.params]
    assert torch.stack(norms).norm().item() == pytest.approx(0.001, rel=1e-3)


def test_train_emb_counts_steps_and_logs():
    model = SCAN(make_opt())
    model.logger = LogCollector()
    batch = random_batch()
    losses = [model.train_emb(*batch, ids=(0, 1, 2)).item() for _ in range(2)]
    assert model.Eiters == 2
    meters = model.logger.meters
    assert meters["Eit"].val == 2 and meters["lr"].val == 2e-4 and meters["Le"].val == losses[1]
    assert meters["Le"].avg == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_train_and_val_start_switch_both_encoders():
    model = SCAN(make_opt())
    model.val_start()
    assert not model.img_enc.training and not model.txt_enc.training
    model.train_start()
    assert model.img_enc.training and model.txt_enc.training


@pytest.mark.parametrize(
    "name", ["position", "precomp_enc_type", "raw_feature_norm", "agg_func", "cross_attn", "matmul_precision"]
)
def test_an_unknown_choice_is_an_error_that_names_flag_and_value(name):
    with pytest.raises(InputError, match=f"--{name} sideways: expected "):
        SCAN(make_opt(**{name: "sideways"}))


def test_an_unknown_device_is_an_error_that_names_it():
    with pytest.raises(InputError, match="--device abacus"):
        SCAN(make_opt(device="abacus"))


def test_options_without_the_newer_flags_mean_pfan_a_in_full_precision():
    opt = SimpleNamespace(**vars(make_opt()))
    model = SCAN(opt)
    assert hasattr(model.img_enc, "fc_att")
    assert torch.isfinite(model.train_emb(*random_batch()))


def test_start_values():
    """Xavier-uniform fc with zero bias, word embeddings uniform in ±0.1."""
    for encoder, weight in (("basic", "weight"), ("weight_norm", "weight_v")):
        fc = SCAN(make_opt(precomp_enc_type=encoder)).img_enc.fc
        bound = (6 / (64 + 200 + 32)) ** 0.5
        largest = getattr(fc, weight).abs().max().item()
        assert 0.98 * bound < largest <= bound and not fc.bias.any()
    words = SCAN(make_opt()).txt_enc.embed.weight
    assert 0.098 < words.abs().max().item() <= 0.1 and abs(words.mean().item()) < 0.01


def test_weight_norm_starts_with_the_length_of_its_weight():
    fc = SCAN(make_opt(precomp_enc_type="weight_norm")).img_enc.fc
    assert fc.weight_g.item() == pytest.approx(fc.weight_v.norm().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_weight_norm_loads_a_length_of_any_shape(shape):
    """PyTorch 0.3 stored weight_g as one element, later versions as a scalar."""
    model = SCAN(make_opt(precomp_enc_type="weight_norm"))
    images, text = SCAN(make_opt(precomp_enc_type="weight_norm")).state_dict()
    images["fc.weight_g"] = torch.full(shape, 2.5)
    model.load_state_dict([images, text])
    fc = model.img_enc.fc
    weight = 2.5 * images["fc.weight_v"] / images["fc.weight_v"].norm()
    close(fc(torch.eye(264)) - fc.bias, weight.T)


@pytest.mark.parametrize("way", ["t2i", "i2t"])
@pytest.mark.parametrize("max_violation", [True, False])
def test_mixed_precision_trains_on_the_cpu(way, max_violation):
    torch.manual_seed(0)
    batch = random_batch()
    exact = SCAN(make_opt(cross_attn=way, max_violation=max_violation))
    model = SCAN(make_opt(cross_attn=way, max_violation=max_violation, amp=True))
    model.load_state_dict(exact.state_dict())
    assert model.forward_emb(*batch)[0].dtype == torch.float32
    losses = [model.train_emb(*batch).item() for _ in range(3)]
    assert np.isfinite(losses).all()
    assert losses[0] == pytest.approx(exact.train_emb(*batch).item(), rel=0.1)
    assert all(torch.isfinite(parameter).all() for parameter in model.params)
