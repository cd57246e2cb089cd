"""check_data.py: what is there, and what would go wrong in training."""

import os
from pathlib import Path

import numpy as np
import pytest
from dataset_commands import fails, ok, tool
from folders import make_folder, write_lines

from data import PrecompDataset
from lib.datasets.arrays import ArrayReader
from lib.errors import InputError
from vocab import deserialize_vocab


def break_folder(folder, what):
    images, boxes = (np.load(folder / f"train_{name}.npy") for name in ("ims", "boxes"))
    captions = (folder / "train_caps.txt").read_text().splitlines()
    if what == "NaN features":
        images[3, 2, 1] = np.nan
    elif what == "cell indices":
        boxes[2, 1, 3] = 257
    elif what == "weights":
        boxes[2, 1, 20] = -0.5
    elif what == "regions":
        boxes = boxes[:, :-1]
    elif what == "multiple":
        captions = captions[:-1]
    elif what == "empty":
        captions[7] = ""
    elif what == "30 or 31":
        boxes = boxes[..., :29]
    np.save(folder / "train_ims.npy", images)
    np.save(folder / "train_boxes.npy", boxes)
    write_lines(folder / "train_caps.txt", captions)


FAULTS = ("NaN features", "cell indices", "weights", "regions", "multiple", "empty", "30 or 31")


@pytest.mark.parametrize("what", FAULTS)
def test_check_finds_what_training_would_stumble_over(tmp_path, what):
    data_path, vocab_path = make_folder(tmp_path)
    folder = Path(data_path) / "toy_precomp"
    break_folder(folder, what)
    done = tool("check_data", folder, "--vocab_path", vocab_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("WRONG") and what.split()[0] in line]
    vocab = deserialize_vocab(os.path.join(vocab_path, "toy_precomp_vocab.json"))
    with pytest.raises(InputError):
        PrecompDataset(str(folder), "train", vocab).read_images(0, 12)


def test_check_finds_features_that_were_never_filled(tmp_path):
    data_path, vocab_path = make_folder(tmp_path)
    folder = Path(data_path) / "toy_precomp"
    images = np.load(folder / "train_ims.npy")
    images[:, 1:] = 0
    np.save(folder / "train_ims.npy", images)
    assert "rows are all zero (padding)" in ok("check_data", folder, "--vocab_path", vocab_path)
    np.save(folder / "train_ims.npy", images * 0)
    done = tool("check_data", folder, "--vocab_path", vocab_path)
    assert done.returncode == 1 and "train_ims.npy: all of the 432 rows are zero" in done.stdout, done.stdout


def test_check_reads_arrays_in_fortran_order_as_training_does(tmp_path):
    data_path, vocab_path = make_folder(tmp_path)
    folder = Path(data_path) / "toy_precomp"
    for name in ("ims", "boxes"):
        np.save(folder / f"train_{name}.npy", np.asfortranarray(np.load(folder / f"train_{name}.npy")))
    assert "ready to train" in ok("check_data", folder, "--vocab_path", vocab_path)
    vocab = deserialize_vocab(os.path.join(vocab_path, "toy_precomp_vocab.json"))
    images, _ = PrecompDataset(str(folder), "train", vocab).read_images(0, 12)
    np.testing.assert_array_equal(ArrayReader(str(folder / "train_ims.npy")).read(3, 99), images[3:].numpy())


def test_check_says_what_is_there(tmp_path):
    data_path, vocab_path = make_folder(tmp_path)
    folder = Path(data_path) / "toy_precomp"
    done = tool("check_data", folder, "--vocab_path", vocab_path)
    assert done.returncode == 0 and "ready to train" in done.stdout, done.stdout
    assert "(12, 36, 16)" in done.stdout and "5 captions an image" in done.stdout and "--img_dim 16" in done.stdout
    assert "vocab.py" in tool("check_data", folder, "--vocab_path", tmp_path).stdout
    os.remove(folder / "dev_ims.npy")
    done = tool("check_data", folder, "--vocab_path", vocab_path)
    assert done.returncode == 1 and "dev_ims.npy: no such file" in done.stdout
    assert "no such folder" in fails("check_data", tmp_path / "nowhere")
    (folder / "train_ids.txt").write_bytes(b"\xff\n")
    assert "note: " + str(folder / "train_ids.txt, line 1: not UTF-8") in tool("check_data", folder).stdout
