"""align.py: arrays of one folder in the order of another's features."""

import os

import numpy as np
import pytest
from dataset_commands import D, R, fails, ok, tool
from folders import make_folder, write_lines


def folders_to_align(tmp_path, order, ids=True):
    """scan/ (features, captions) and pfan/ (grids, captions) of the same pictures in another order; the grids."""
    make_folder(tmp_path, "scan", {"train": 9, "dev": 4}, img_dim=D)
    data = tmp_path / "data"
    (data / "pfan").mkdir()
    grids = {}
    for split in ("train", "dev"):
        n = 9 if split == "train" else 4
        perm = np.random.default_rng(order).permutation(n)
        grids[split] = np.load(data / f"scan/{split}_boxes.npy")
        os.remove(data / f"scan/{split}_boxes.npy")
        lines = (data / f"scan/{split}_caps.txt").read_text().splitlines()
        lines = [f"{line} {split} {i // 5}" for i, line in enumerate(lines)]
        write_lines(data / f"scan/{split}_caps.txt", lines)
        write_lines(data / f"scan/{split}_ids.txt", [f"{split}{i}" for i in range(n)])
        np.save(data / f"pfan/{split}_boxes.npy", grids[split][perm])
        moved = [lines[5 * i + j].upper().replace(" .", "") for i in perm for j in (4, 2, 0, 1, 3)]
        write_lines(data / f"pfan/{split}_caps.txt", moved)
        if ids:
            write_lines(data / f"pfan/{split}_ids.txt", [f"{split}{i}.jpg" for i in perm])
    return data, grids


def align(data, *more):
    return ("align", "--reference", data / "scan", "--source", data / "pfan", *more)


@pytest.mark.parametrize("ids", [True, False])
def test_positions_are_put_in_the_order_of_the_features(tmp_path, ids):
    data, grids = folders_to_align(tmp_path, 1, ids)
    out = ok(*align(data, "--out", data / "scan"))
    assert "9 of 9 paired; captions agree in 9 of 9" in out and f"by {'ids' if ids else 'captions'}" not in out
    for split in grids:
        np.testing.assert_array_equal(np.load(data / f"scan/{split}_boxes.npy"), grids[split])
    assert "there already" in ok(*align(data, "--out", data / "scan"))


def test_ids_that_mean_other_pictures_are_found_out_by_the_captions(tmp_path):
    data, grids = folders_to_align(tmp_path, 1)
    write_lines(data / "pfan/train_ids.txt", [f"train{i}" for i in range(9)])
    assert "--by captions" in fails(*align(data, "--out", data / "out"))
    assert not list((data / "out").glob("*.npy"))
    ok(*align(data, "--out", data / "out", "--by", "captions"))
    np.testing.assert_array_equal(np.load(data / "out/train_boxes.npy"), grids["train"])


def test_what_has_no_partner_is_named_and_can_be_left_out(tmp_path):
    data, grids = folders_to_align(tmp_path, 2, ids=False)
    lines = (data / "scan/train_caps.txt").read_text().splitlines()
    lines[5:10] = ["no such picture"] * 5  # all five
    lines[10] = "one caption differs"
    write_lines(data / "scan/train_caps.txt", lines)
    message = fails(*align(data, "--out", data / "out"))
    assert "1 without a partner" in message
    assert "train, picture 1 (id train1)" in (data / "out/align_problems.txt").read_text()
    assert "another folder" in fails(*align(data, "--out", data / "scan", "--skip_bad"))
    ok(*align(data, "--out", data / "out", "--skip_bad"))
    kept = [0, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(np.load(data / "out/train_boxes.npy"), grids["train"][kept])
    np.testing.assert_array_equal(np.load(data / "out/train_ims.npy"), np.load(data / "scan/train_ims.npy")[kept])
    assert (data / "out/train_caps.txt").read_text().splitlines() == [lines[5 * i + j] for i in kept for j in range(5)]
    for name in ("ims.npy", "caps.txt", "ids.txt"):  # dev is complete, and goes along too: the folder stands alone
        assert (data / f"out/dev_{name}").read_bytes() == (data / f"scan/dev_{name}").read_bytes(), name


def test_features_that_differ_are_named_apart_from_captions(tmp_path):
    data, _ = folders_to_align(tmp_path, 1)
    for split, n in (("train", 9), ("dev", 4)):
        np.save(data / f"pfan/{split}_ims.npy", np.ones((n, R, D), np.float32))
    done = tool(*align(data, "--out", data / "out"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: 13 of other features")
    assert "--by captions" not in done.stderr  # which would find the same pairs
    assert "train: 9 of 9 paired; captions agree in 9 of 9, features in 0 of 9 compared\n" in done.stdout


def test_arrays_that_are_no_rows_or_not_there_are_named(tmp_path):
    for name in ("reference", "source"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / f"{name}/train_ids.txt", [1])
    np.save(tmp_path / "source/train_boxes.npy", np.float32(1))
    folders = ("--reference", tmp_path / "reference", "--source", tmp_path / "source", "--out", tmp_path / "o")
    assert "train_boxes.npy: found (), expected a row for each picture" in fails("align", *folders)
    os.remove(tmp_path / "source/train_boxes.npy")
    assert "train_ims.npy: no such file" in fails("align", *folders, "--arrays", "ims")
