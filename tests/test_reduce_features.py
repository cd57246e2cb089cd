"""reduce_features.py against plain NumPy: roots, standardised, in the first principal directions."""

import shutil

import numpy as np
import pytest
from dataset_commands import fails, ok
from folders import make_folder

from scripts import reduce_features

K = 5  # of 16 values


@pytest.fixture
def folder(tmp_path):
    """A data set with boxes in pixels; beside it the features of another network, of 7 values."""
    make_folder(tmp_path, splits={"train": 12, "dev": 6})
    folder, more = tmp_path / "data/toy_precomp", tmp_path / "more"
    np.save(folder / "dev_pixel_boxes.npy", np.random.default_rng(0).random((6, 36, 4)))
    shutil.copytree(folder, more)
    for split in ("train", "dev"):
        np.save(more / f"{split}_ims.npy", np.load(more / f"{split}_ims.npy")[:, ::-1, :7] ** 3)
    return folder


def reduced(*folders):
    """The features of both splits as they should be, but for the signs of the directions."""

    def roots(split):
        features = np.concatenate([np.load(folder / f"{split}_ims.npy") for folder in folders], 2).astype(np.float64)
        return np.sign(features) * np.sqrt(np.abs(features))

    train = roots("train").reshape(12 * 36, -1)
    mean, deviation = train.mean(0), np.sqrt(train.var(0) + 1e-6)
    sampled = ((train - mean) / deviation)[::4]
    shares, vectors = np.linalg.eigh(sampled.T @ sampled)
    directions = vectors[:, np.argsort(-shares)[:K]]
    return {split: (roots(split) - mean) / deviation @ directions for split in ("train", "dev")}


@pytest.mark.parametrize("more, values", [((), 16), (("more",), 23)], ids=["one network", "two networks"])
def test_features_are_reduced_and_what_belongs_to_them_goes_along(tmp_path, folder, monkeypatch, more, values):
    monkeypatch.setattr(reduce_features, "ROWS", 5)  # several blocks
    folders = folder, *(tmp_path / name for name in more)
    said = ok("reduce_features", *folders, "--out", tmp_path / "o", "--dimensions", K)
    assert "of the variance is kept" in said and f"dev: 6 images, {values} values → 5" in said
    for split, expected in reduced(*folders).items():
        found = np.load(tmp_path / f"o/{split}_ims.npy")
        assert found.dtype == np.float16 and found.shape == expected.shape
        products = (np.einsum("irk,jsk->irjs", x, x) for x in (found.astype(np.float64), expected))
        np.testing.assert_allclose(*products, rtol=0, atol=0.03)  # up to 30, of half precision
        for name in ("caps.txt", "ids.txt", "boxes.npy"):
            assert (tmp_path / f"o/{split}_{name}").read_bytes() == (folder / f"{split}_{name}").read_bytes()
    assert (tmp_path / "o/dev_pixel_boxes.npy").read_bytes() == (folder / "dev_pixel_boxes.npy").read_bytes()


def test_a_finished_run_is_kept(tmp_path, folder):
    args = ("reduce_features", folder, "--out", tmp_path / "o", "--dimensions")
    ok(*args, K)
    assert ok(*args, K) == "train: there already\ndev: there already\n"
    assert "--overwrite" in fails(*args, 4)


def test_what_cannot_be_reduced_is_refused(tmp_path, folder):
    before = sorted(folder.iterdir())
    assert "is read as well, expected another folder" in fails("reduce_features", folder, "--out", f"{folder}/.")
    assert "--dimensions 0" in fails("reduce_features", folder, "--out", tmp_path / "o", "--dimensions", 0)
    np.save(tmp_path / "more/train_boxes.npy", np.load(folder / "train_boxes.npy")[::-1])
    said = fails("reduce_features", folder, tmp_path / "more", "--out", tmp_path / "o")
    assert "more/train_boxes.npy: other images or regions than" in said
    np.save(folder / "train_ims.npy", np.zeros((12, 16), np.float32))
    assert "found (12, 16), expected (images" in fails("reduce_features", folder, "--out", tmp_path / "o")
    assert sorted(folder.iterdir()) == before and not (tmp_path / "o").exists()
