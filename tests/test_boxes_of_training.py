"""Training notices boxes that do not belong to its features."""

import logging

import numpy as np
import pytest
from conftest import make_opt
from folders import make_folder
from regions import boxes_with_features

from data import PrecompDataset
from lib.datasets.region_match import warn_of_boxes
from vocab import deserialize_vocab


@pytest.fixture
def folder(tmp_path):
    """A folder whose train split has 40 images with the boxes that belong to their features; prefix of its files."""
    make_folder(tmp_path, splits={"train": 40, "dev": 4})
    prefix = str(tmp_path / "data/toy_precomp/train")
    grids, features = boxes_with_features(40)
    np.save(prefix + "_ims.npy", features)
    np.save(prefix + "_boxes.npy", grids)
    return prefix


def warnings_of(prefix, caplog, position="attention"):
    data_path = prefix.rpartition("/toy_precomp")[0]
    opt = make_opt(data_path=data_path, img_dim=256, position=position)
    vocab = deserialize_vocab(f"{data_path}/../vocab/toy_precomp_vocab.json")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lib.datasets.region_match"):
        warn_of_boxes(PrecompDataset(f"{data_path}/toy_precomp", "train", vocab, opt))
    return [record.getMessage() for record in caplog.records]


def test_right_boxes_raise_no_warning(folder, caplog):
    assert warnings_of(folder, caplog) == []


@pytest.mark.parametrize(
    "order",
    [lambda grids: np.roll(grids, 1, axis=0), lambda grids: grids[::-1], lambda grids: grids[:, ::-1]],
    ids=["shifted", "reversed", "regions in another order"],
)
def test_boxes_of_other_images_are_warned_of(folder, caplog, order):
    np.save(folder + "_boxes.npy", order(np.load(folder + "_boxes.npy")))
    [message] = warnings_of(folder, caplog)
    assert message.startswith(folder + "_boxes.npy: of other images or regions") and "scripts/align.py" in message
    assert warnings_of(folder, caplog, position="none") == []


def test_random_features_raise_no_warning(folder, caplog):
    np.save(folder + "_ims.npy", np.random.default_rng(0).random((40, 36, 256), np.float32))
    assert warnings_of(folder, caplog) == []
