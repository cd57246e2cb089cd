"""check_data.py: what is there, and what would go wrong in training."""

import os

import numpy as np
import pytest
from conftest import make_opt
from dataset_commands import fails, ok, tool
from folders import boxes_with_features, make_folder, write_lines

from data import PrecompDataset
from lib.datasets.arrays import open_rows, read_rows
from lib.datasets.region_match import warn_of_boxes
from vocab import deserialize_vocab


def check(tmp_path, *more):
    """Exit status and the lines of check_data.py on data/toy_precomp."""
    done = tool("check_data", tmp_path / "data/toy_precomp", "--vocab_path", tmp_path / "vocab", *more)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout.splitlines()


def wrongs(lines):
    return [line for line in lines if line.startswith("WRONG")]


@pytest.fixture
def folder(tmp_path):
    """data/toy_precomp of 40 images whose boxes belong to their features."""
    make_folder(tmp_path, splits={"train": 40, "dev": 10})
    for seed, (split, n) in enumerate({"train": 40, "dev": 10}.items()):
        grids, features = boxes_with_features(n, seed=seed)
        np.save(tmp_path / f"data/toy_precomp/{split}_ims.npy", features)
        np.save(tmp_path / f"data/toy_precomp/{split}_boxes.npy", grids)
    return tmp_path / "data/toy_precomp"


def test_check_counts_features_that_are_no_numbers_and_finds_captions_that_do_not_divide(tmp_path, folder):
    """test_bad_input.py has what training refuses and check_data.py says as well."""
    images = np.load(folder / "train_ims.npy")
    images[3:5, 2, 1] = np.nan
    np.save(folder / "train_ims.npy", images)
    write_lines(folder / "dev_caps.txt", (folder / "dev_caps.txt").read_text().splitlines()[1:])
    status, lines = check(tmp_path)
    assert status == 1 and wrongs(lines) == [
        f"WRONG: {folder}/train_ims.npy: NaN or infinite features in 2 images, the first is 3",
        f"WRONG: {folder}/dev: 10 images in _ims.npy and 49 captions, expected one to be a multiple of the other",
    ]


def test_check_finds_features_that_were_never_filled(tmp_path, folder):
    images = np.load(folder / "train_ims.npy")
    images[:, 1:] = 0
    np.save(folder / "train_ims.npy", images)
    status, lines = check(tmp_path)
    assert status == 0 and any("rows are all zero (padding)" in line for line in lines)
    np.save(folder / "train_ims.npy", images * 0)
    assert any("train_ims.npy: all of the 1440 rows are zero" in line for line in wrongs(check(tmp_path)[1]))


def test_check_reads_arrays_in_fortran_order_as_training_does(tmp_path, folder):
    for name in ("ims", "boxes"):
        path = folder / f"train_{name}.npy"
        np.save(path, np.asfortranarray(np.load(path)))
    assert check(tmp_path)[0] == 0
    vocab = deserialize_vocab(str(tmp_path / "vocab/toy_precomp_vocab.json"))
    images, _ = PrecompDataset(str(folder), "train", vocab).features(range(40))
    np.testing.assert_array_equal(read_rows(open_rows(str(folder / "train_ims.npy")), 3, 99), images[3:].numpy())


def test_check_says_what_is_there(tmp_path, folder):
    status, lines = check(tmp_path)
    said = "\n".join(lines)
    assert status == 0 and "ready to train" in said
    assert "(40, 36, 256)" in said and "5 captions an image" in said and "--img_dim 256" in said
    assert "vocab.py" in tool("check_data", folder, "--vocab_path", tmp_path).stdout
    os.remove(folder / "dev_ims.npy")
    (folder / "train_ids.txt").write_bytes(b"\xff\n")
    (folder / "test_ims.npy").write_bytes(b"no array")
    status, lines = check(tmp_path)
    assert len([line for line in wrongs(lines) if "test_ims.npy: truncated or not an .npy array" in line]) == 1
    assert status == 1 and any("dev_ims.npy: no such file" in line for line in lines)
    assert any(line.startswith(f"note: {folder}/train_ids.txt, line 1: not UTF-8") for line in lines)
    assert "no such folder" in fails("check_data", tmp_path / "nowhere")


# ---------------------------------------------------------------- files that do not belong together


def train(tmp_path, position):
    """What training notices of the folder's boxes is logged."""
    opt = make_opt(data_path=str(tmp_path / "data"), img_dim=256, position=position)
    vocab = deserialize_vocab(str(tmp_path / "vocab/toy_precomp_vocab.json"))
    warn_of_boxes(PrecompDataset(str(tmp_path / "data/toy_precomp"), "train", vocab, opt))


def test_boxes_that_belong_to_the_features_are_said_to(tmp_path, folder, caplog):
    status, lines = check(tmp_path)
    assert status == 0 and any("40 images" in line and "regions that overlap look alike: 0." in line for line in lines)
    train(tmp_path, "attention")
    assert not caplog.messages


ORDERS = {
    "shifted": lambda grids: np.roll(grids, 1, axis=0),
    "regions": lambda grids: grids[:, ::-1],
}


@pytest.mark.parametrize("order", ORDERS)
def test_boxes_of_other_images_or_regions_are_wrong_and_training_warns_of_them(tmp_path, folder, caplog, order):
    np.save(folder / "train_boxes.npy", ORDERS[order](np.load(folder / "train_boxes.npy")))
    status, lines = check(tmp_path)
    [wrong] = wrongs(lines)
    assert status == 1 and "train_boxes.npy: of other images or regions than" in wrong and "scripts/align.py" in wrong
    assert check(tmp_path, "--position", "none")[0] == 0
    train(tmp_path, "attention")
    (message,) = caplog.messages
    assert message.startswith(f"{folder}/train_boxes.npy: of other images or regions") and "align.py" in message
    train(tmp_path, "none")
    assert len(caplog.messages) == 1


def test_what_cannot_be_told_is_a_note(tmp_path, folder):
    np.save(folder / "train_ims.npy", np.random.default_rng(0).random((40, 36, 256), np.float32))
    status, lines = check(tmp_path)
    assert status == 0
    assert [line for line in lines if line.startswith("note: ") and "train_boxes.npy: whether the boxes belong" in line]


def test_a_vocabulary_of_other_captions_is_wrong(tmp_path, folder):
    write_lines(folder / "dev_caps.txt", [f"völlig andere wörter {i}" for i in range(50)])
    status, lines = check(tmp_path)
    [wrong] = wrongs(lines)
    assert status == 1 and "dev_caps.txt: 100 % of the words are not in the vocabulary" in wrong


def test_whole_images_of_another_number_are_wrong(tmp_path, folder):
    np.save(folder / "train_who_ims.npy", np.random.default_rng(0).random((40, 256), np.float32))
    assert check(tmp_path)[0] == 0
    np.save(folder / "train_who_ims.npy", np.load(folder / "train_who_ims.npy")[:39])
    status, lines = check(tmp_path)
    assert status == 1 and "train_who_ims.npy: found (39, 256), expected (40, 256)" in wrongs(lines)[0]


@pytest.mark.parametrize("order", ["shifted by a line", "one of every image first"])
def test_captions_that_are_grouped_otherwise_are_wrong(tmp_path, folder, order):
    lines = [f"image {chr(97 + i % 26)}{i} of a thing{i} by word{i}, seen {j}" for i in range(40) for j in range(5)]
    write_lines(folder / "train_caps.txt", lines)
    names = ("--data_path", tmp_path / "data", "--data_name", "toy_precomp", "--vocab_path", tmp_path / "vocab")
    ok("vocab", *names, "--threshold", 1, "--overwrite")
    assert check(tmp_path)[0] == 0
    if order == "shifted by a line":
        lines, said = lines[1:] + lines[:1], "the first image's from line 5"
    else:
        lines, said = [lines[5 * i + j] for j in range(5) for i in range(40)], "first one caption of every image"
    write_lines(folder / "train_caps.txt", lines)
    status, lines = check(tmp_path)
    assert status == 1 and said in wrongs(lines)[0]


def test_ids_of_another_number_are_noted(tmp_path, folder):
    write_lines(folder / "train_ids.txt", range(39))
    assert [line for line in check(tmp_path)[1] if "39 ids for 40 images" in line]


def test_features_of_different_sizes_are_wrong(tmp_path, folder):
    np.save(folder / "dev_ims.npy", np.ones((10, 36, 8), np.float32))
    assert f"WRONG: {folder}: features of different sizes: train 256, dev 8" in check(tmp_path)[1]
