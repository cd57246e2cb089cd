"""Boxes that belong to their features are told from others, and found again."""

import numpy as np
import pytest
from folders import boxes_with_features

from lib.datasets.region_match import judge, likeness, match, overlaps


@pytest.fixture(scope="module")
def images():
    return boxes_with_features(60)


@pytest.mark.parametrize("img_dim", [4, 2048])
def test_random_features_raise_no_alarm(images, img_dim):
    judgement = judge(np.random.default_rng(0).standard_normal((60, 36, img_dim)), images[0])
    assert judgement.wrong is None and "no regions are more alike than others" in str(judgement)


def test_images_that_stand_twice_are_no_fault(images):
    grids, features = (np.repeat(array, 2, axis=0) for array in images)
    assert judge(features, grids).wrong is False
    assert judge(features, grids[::-1]).wrong is True


def test_what_cannot_be_judged_is_said(images):
    grids, features = images
    assert "7 images are too few" in str(judge(features[:7], grids[:7]))
    assert "most images have the same boxes" in str(judge(features, np.repeat(grids[:1], 60, axis=0)))
    whole_images = np.tile([0] * 15 + [1] + [0] * 15, (60, 36, 1))
    for some, boxes in (
        (features[:0], grids[:0]),
        (features, whole_images),
        (features * 0, grids),
        (features * np.nan, grids),
    ):
        assert judge(some, boxes).wrong is None


def test_padded_regions_do_not_count(images):
    grids, features = images
    n_regions = np.random.default_rng(0).integers(10, 37, 60)
    padded = np.arange(36) >= n_regions[:, None]
    features, grids = np.where(padded[..., None], 0, features), grids.copy()
    grids[padded] = [256] * 15 + [0] * 16
    assert judge(features, grids).wrong is False
    assert judge(features, np.roll(grids, 1, axis=0)).wrong is True


def test_images_without_boxes_find_none(images):
    grids, features = images
    found = match(likeness(features[:40]).pairs, overlaps(grids[20:]).pairs)
    np.testing.assert_array_equal(found, [*[-1] * 20, *range(20)])
    assert (match(likeness(features).pairs, overlaps(np.repeat(grids[:1], 9, axis=0)).pairs) == -1).all()
    assert match(likeness(features).pairs, overlaps(grids[:0]).pairs).tolist() == [-1] * 60


def test_blocks_leave_no_trace(images, monkeypatch):
    grids, features = images
    alike, overlap = likeness(features).pairs, overlaps(grids[::-1][:50]).pairs
    whole = match(alike, overlap)
    monkeypatch.setattr("lib.datasets.region_match.BLOCK", 7)
    np.testing.assert_array_equal(match(alike, overlap), whole)
