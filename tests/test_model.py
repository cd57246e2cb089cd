"""Encoders and the training step against the formulas in reference.py; test_score.py has the score and the loss."""

import numpy as np
import pytest
import reference
import torch
from conftest import make_opt
from folders import random_batch

from evaluation import LogCollector
from model import SCAN, EncoderImagePrecomp
from Tencent_PFAN import model_whole


def close(ours, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(ours.detach().numpy(), expected.detach().numpy(), rtol=rtol, atol=atol)


# ---------------------------------------------------------------- encoders


def double(state):
    return {name: value.double() for name, value in state.items()}


def test_the_number_of_cells_and_the_size_of_their_embedding_are_honoured():
    encoder = EncoderImagePrecomp(64, 32, split_size=4, position_embed_size=7)
    assert encoder.position_embedding.weight.shape == (17, 7) and encoder.fc.weight.shape == (32, 71)
    images, boxes, *_ = random_batch()
    boxes[..., :15] %= 17
    state = double(encoder.state_dict())
    for embedding, features, box in zip(encoder(images, boxes), images.double(), boxes.double(), strict=True):
        close(embedding, reference.image_embedding(state, features, box))


@pytest.mark.parametrize("no_norm", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bi_gru", [True, False])
def test_word_embeddings_and_their_gradients_follow_the_formulas(bi_gru, num_layers, no_norm):
    encoder = SCAN(make_opt(bi_gru=bi_gru, num_layers=num_layers, no_txtnorm=no_norm)).txt_enc
    *_, captions, lens = random_batch((2, 6, 1, 4))
    state = {name: value.detach().double().requires_grad_() for name, value in encoder.named_parameters()}
    weights = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(0))
    ours, _ = encoder(captions, lens)
    assert ours.shape == (4, 6, 32)
    (ours * weights).sum().backward()
    for embedding, ids, n, weight in zip(ours, captions, lens, weights, strict=True):
        expected = reference.caption_embedding(state, ids[:n], num_layers, bi_gru, not no_norm)
        close(embedding[:n], expected)
        assert not embedding[n:].any()
        (expected * weight[:n]).sum().backward()
    for name, parameter in encoder.named_parameters():
        close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("no_norm", [False, True])
@pytest.mark.parametrize("position", ["attention", "area", "none"])
@pytest.mark.parametrize("kind", ["basic", "weight_norm"])
def test_region_embeddings_and_their_gradients_follow_the_formulas(kind, position, no_norm):
    encoder = SCAN(make_opt(precomp_enc_type=kind, position=position, no_imgnorm=no_norm)).img_enc
    images, boxes, *_ = random_batch()
    state = {name: value.detach().double().requires_grad_() for name, value in encoder.named_parameters()}
    weights = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    ours = encoder(images, boxes)
    assert torch.equal(ours, encoder(images, boxes[..., :30])), "the 31st value of a box changes nothing"
    (ours * weights).sum().backward()
    for embedding, features, box, weight in zip(ours, images.double(), boxes.double(), weights, strict=True):
        expected = reference.image_embedding(state, features, box, position, not no_norm)
        close(embedding, expected)
        (expected * weight).sum().backward()
    for name, parameter in encoder.named_parameters():
        close(parameter.grad, state[name].grad, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- the model


def scan_of(position, **flags):
    """A model of this position, or the whole-image variant; and batches for it."""
    whole = position == "whole"
    scan = (model_whole.SCAN if whole else SCAN)(make_opt(position="area" if whole else position, **flags))
    return scan, lambda *lens: random_batch(lens, whole=whole)


@pytest.mark.parametrize("position", ["attention", "area", "none", "whole"])
@pytest.mark.parametrize(("encoder", "max_violation"), [("basic", True), ("weight_norm", False)])
def test_training_lowers_the_loss(encoder, position, max_violation):
    torch.manual_seed(0)
    model, batch = scan_of(
        position, precomp_enc_type=encoder, max_violation=max_violation, learning_rate=0.01, bi_gru=max_violation
    )
    losses = [model.train_emb(*batch(6, 4, 3, 1)).item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("position", ["attention", "area", "none"])
@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_padded_regions_leave_finite_weights(position, way):
    model = SCAN(make_opt(position=position, cross_attn=way))
    images, boxes, captions, lens = random_batch()
    images[:, 2:] = 0
    images[0] = 0  # an image in which nothing was found
    boxes[0, :, :15], boxes[0, :, 15:30] = 256, 0
    for _ in range(3):
        assert torch.isfinite(model.train_emb(images, boxes, captions, lens))
    assert all(torch.isfinite(parameter).all() for parameter in model.params)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda loss: loss * float("nan"), "the loss is nan"),
        (lambda loss: (loss * 0 + 1e-30).sqrt() * 1e38 * loss, "the norm of its gradient (inf|nan)"),
    ],
)
def test_a_loss_or_gradient_that_is_none_leaves_parameters_and_moments_untouched(broken, said):
    class Broken(SCAN):
        def forward_loss(self, *embeddings):
            return broken(super().forward_loss(*embeddings))

    model = Broken(make_opt())
    before = [parameter.clone() for parameter in model.params]
    with pytest.raises(FloatingPointError, match=said):
        model.train_emb(*random_batch())
    assert all(torch.equal(a, b) for a, b in zip(before, model.params, strict=True))
    assert not any(x.any() for state in model.optimizer.state.values() for x in state.values())


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
    assert [model.forward_emb(*batch, volatile=x)[0].requires_grad for x in (False, True)] == [True, False]
    for start, training in ((model.val_start, False), (model.train_start, True)):
        start()
        assert (model.img_enc.training, model.txt_enc.training) == (training, training)


def test_start_values():
    """Xavier-uniform fc with zero bias, word embeddings uniform in ±0.1."""
    for encoder, weight in (("basic", "weight"), ("weight_norm", "weight_v")):
        fc = SCAN(make_opt(precomp_enc_type=encoder)).img_enc.fc
        bound = (6 / (64 + 200 + 32)) ** 0.5
        largest = getattr(fc, weight).abs().max().item()
        assert 0.98 * bound < largest <= bound and not fc.bias.any()
    assert fc.weight_g.item() == pytest.approx(fc.weight_v.norm().item(), rel=1e-6)
    words = SCAN(make_opt()).txt_enc.embed.weight
    assert 0.098 < words.abs().max().item() <= 0.1 and abs(words.mean().item()) < 0.01


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


@pytest.mark.parametrize(("way", "max_violation"), [("t2i", True), ("i2t", False)])
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
