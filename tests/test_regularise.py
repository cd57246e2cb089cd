"""What training leaves out of a batch: regions, words; and the start of the cells' embeddings, weight decay."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_opt

from lib.regularise import regularise
from model import SCAN
from Tencent_PFAN.model_whole import SCAN as WholeImageSCAN


def make_batch(n=6, n_regions=10, n_words=8, n_boxes=None):
    """images, boxes, captions, lengths, ids; a region's features and its box are its number."""
    regions = torch.arange(n_regions).float()[None, :, None].repeat(n, 1, 3)
    boxes = torch.arange(n_boxes or n_regions).float()[None, :, None].repeat(n, 1, 31)
    captions = torch.full((n, n_words), 7)
    captions[:, 0], captions[:, 5], captions[:, 6:] = 1, 2, 0
    return regions, boxes, captions, [6] * n, tuple(range(100, 100 + n))


def drop(batch, epoch=0, **flags):
    return regularise(batch, SimpleNamespace(**flags), epoch, 3)


def test_nothing_is_left_out_by_default():
    batch = make_batch()
    assert drop(batch) is batch


def test_equally_many_regions_stay_with_their_boxes_and_differ_between_pairs_and_epochs():
    images, boxes, *_ = drop(make_batch(), region_dropout=0.3)
    assert images.shape == (6, 7, 3) and boxes.shape == (6, 7, 31)
    assert torch.equal(images[..., 0], boxes[..., 0])
    rows = {tuple(row.tolist()) for row in images[..., 0]}
    assert len(rows) > 3 and all(list(row) == sorted(set(row)) for row in rows)
    assert not torch.equal(images, drop(make_batch(), epoch=1, region_dropout=0.3)[0])
    assert not torch.equal(images, drop(make_batch(), seed=1, region_dropout=0.3)[0])


def test_a_pair_loses_the_same_in_any_company():
    """Several processes, and a run that was stopped, leave out what one process does."""
    flags = {"region_dropout": 0.5, "word_dropout": 0.5}
    whole = drop(make_batch(), **flags)
    batch = make_batch()
    part = drop((*(x[3:5] for x in batch[:3]), batch[3][3:5], batch[4][3:5]), **flags)
    for ours, all_rows in zip(part[:3], whole[:3], strict=True):
        assert torch.equal(ours, all_rows[3:5])


@pytest.mark.parametrize("n_boxes", [10, 9])
def test_the_whole_image_region_stays(n_boxes):
    whole = torch.rand(6, 3)
    images, boxes, *rest = make_batch(n_boxes=n_boxes)
    images, kept_whole, boxes, *_ = drop((images, whole, boxes, *rest), region_dropout=0.5, need_box_whole=True)
    assert (images[:, -1] == 9).all() and kept_whole is whole
    assert boxes.shape[1] == n_boxes - 5 and torch.equal(boxes[:, :4, 0], images[:, :4, 0])


def test_words_become_unknown_but_the_marks_of_a_caption_do_not():
    batch = make_batch(n=400)
    images, _, captions, *_ = drop(batch, word_dropout=0.25)
    assert images is batch[0]
    marks = torch.tensor([0, 5, 6, 7])
    assert torch.equal(captions[:, marks], batch[2][:, marks])
    words = captions[:, 1:5]
    assert set(words.unique().tolist()) == {3, 7}
    assert (words == 3).float().mean().item() == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("kind", [SCAN, WholeImageSCAN])
def test_cells_start_as_small_as_asked_and_as_published_by_default(kind):
    position = {} if kind is SCAN else {"position": "area"}
    published, small = (kind(make_opt(**position, **more)) for more in ({}, {"position_init": 0.02}))
    assert published.img_enc.position_embedding.weight.std().item() == pytest.approx(1, abs=0.02)
    assert small.img_enc.position_embedding.weight.std().item() == pytest.approx(0.02, abs=0.0005)


def test_weight_decay_is_adamws_and_none_is_adam():
    assert type(SCAN(make_opt()).optimizer) is torch.optim.Adam
    optimizer = SCAN(make_opt(weight_decay=0.01)).optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.param_groups[0]["weight_decay"] == 0.01
