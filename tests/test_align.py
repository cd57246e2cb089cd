"""align.py: arrays of one folder in the order of another's features."""

import os

import numpy as np
import pytest
from dataset_commands import D, R, fails, ok, tool
from folders import boxes_with_features, make_folder, write_lines

from lib.datasets import pairing
from lib.datasets.ids import SPLITS
from lib.datasets.pairing import Split


def folders_to_align(tmp_path, order, ids=True):
    """reference/ (features, captions, ids) and source/ (grids, captions) of the same images in two orders; grids."""
    splits, grids = {"train": 9, "dev": 4}, {}
    make_folder(tmp_path, "reference", splits, img_dim=D)
    reference, source = tmp_path / "data/reference", tmp_path / "data/source"
    source.mkdir()
    for split, n in splits.items():
        perm = np.random.default_rng(order).permutation(n)
        grids[split] = np.load(reference / f"{split}_boxes.npy")
        os.remove(reference / f"{split}_boxes.npy")
        np.save(source / f"{split}_boxes.npy", grids[split][perm])
        lines = (reference / f"{split}_caps.txt").read_text().splitlines()
        lines = [f"{line} {split} {i // 5}" for i, line in enumerate(lines)]
        moved = [lines[5 * i + j].upper().replace(" .", "") for i in perm for j in (4, 2, 0, 1, 3)]
        write_lines(reference / f"{split}_caps.txt", lines)
        write_lines(source / f"{split}_caps.txt", moved)
        write_lines(reference / f"{split}_ids.txt", [f"{split}{i}" for i in range(n)])
        if ids:
            write_lines(source / f"{split}_ids.txt", [f"{split}{i}.jpg" for i in perm])
    return tmp_path / "data", grids


def align(folder, *more):
    return ("align", "--reference", folder / "reference", "--source", folder / "source", *more)


@pytest.mark.parametrize("ids", [True, False])
def test_positions_are_put_in_the_order_of_the_features(tmp_path, ids):
    data, grids = folders_to_align(tmp_path, 1, ids)
    out = ok(*align(data, "--out", data / "reference"))
    assert "9 of 9 paired; captions agree in 9 of 9" in out and f"by {'ids' if ids else 'captions'}" not in out
    for split in grids:
        np.testing.assert_array_equal(np.load(data / f"reference/{split}_boxes.npy"), grids[split])
    assert "there already" in ok(*align(data, "--out", data / "reference"))


def test_ids_that_mean_other_images_are_found_out_by_the_captions(tmp_path):
    data, grids = folders_to_align(tmp_path, 1)
    write_lines(data / "source/train_ids.txt", [f"train{i}" for i in range(9)])
    assert "--by captions" in fails(*align(data, "--out", data / "out"))
    assert not list((data / "out").glob("*.npy"))
    ok(*align(data, "--out", data / "out", "--by", "captions"))
    np.testing.assert_array_equal(np.load(data / "out/train_boxes.npy"), grids["train"])


def test_two_images_with_one_partner_are_ambiguous(tmp_path):
    """a.jpg and a.png have one id; boxes of one would stand beside the features of both."""
    for name, ids in (("reference", ["a.jpg", "b.jpg", "a.png"]), ("source", ["a", "b", "c"])):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / f"{name}/train_ids.txt", ids)
    np.save(tmp_path / "source/train_boxes.npy", np.zeros((3, R, 31), np.float32))
    assert "1 ambiguous" in fails(*align(tmp_path, "--out", tmp_path / "o"))
    assert "(id a.png): ambiguous: has the partner of train, image 0 (id a.jpg)" in (
        (tmp_path / "o/align_problems.txt").read_text()
    )


@pytest.mark.parametrize("offset", range(4))
def test_of_equal_partners_in_two_splits_the_first_split_counts(tmp_path, offset):
    """Not the one whose caption a set of digests, in another order in every process, happens to have first."""
    captions = [f"caption {5 * offset + i}" for i in range(5)]
    for name, lines in (("source/train", captions[:3]), ("source/test", captions[2:]), ("reference/dev", captions)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(f"{tmp_path / name}_boxes.npy", np.zeros((1, R, 31), np.float32))
        write_lines(f"{tmp_path / name}_caps.txt", [*lines, "another", "one more"][:5])
    reference, source = pairing.load(tmp_path / "reference", ["dev"]), pairing.load(tmp_path / "source", SPLITS)
    (hits,) = pairing.by_keys(reference, source, "captions")["dev"]
    assert [hit.split.split for hit in hits] == ["train", "test"]


def test_what_has_no_partner_is_named_and_can_be_left_out(tmp_path):
    data, grids = folders_to_align(tmp_path, 2, ids=False)
    lines = (data / "reference/train_caps.txt").read_text().splitlines()
    lines[5:10] = ["no such image"] * 5  # all five
    lines[10] = "one caption differs"
    write_lines(data / "reference/train_caps.txt", lines)
    message = fails(*align(data, "--out", data / "out"))
    assert "1 without a partner" in message
    assert "train, image 1 (id train1)" in (data / "out/align_problems.txt").read_text()
    assert "another folder" in fails(*align(data, "--out", data / "reference", "--skip_bad"))
    ok(*align(data, "--out", data / "out", "--skip_bad"))
    kept = [0, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(np.load(data / "out/train_boxes.npy"), grids["train"][kept])
    np.testing.assert_array_equal(np.load(data / "out/train_ims.npy"), np.load(data / "reference/train_ims.npy")[kept])
    assert (data / "out/train_caps.txt").read_text().splitlines() == [lines[5 * i + j] for i in kept for j in range(5)]
    for name in ("ims.npy", "caps.txt", "ids.txt"):  # dev is complete, and goes along too: the folder stands alone
        assert (data / f"out/dev_{name}").read_bytes() == (data / f"reference/dev_{name}").read_bytes(), name


def test_features_that_differ_are_named_apart_from_captions(tmp_path):
    data, _ = folders_to_align(tmp_path, 1)
    for split, n in (("train", 9), ("dev", 4)):
        np.save(data / f"source/{split}_ims.npy", np.ones((n, R, D), np.float32))
    done = tool(*align(data, "--out", data / "out"))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: 13 of other features")
    assert "--by captions" not in done.stderr  # which would find the same pairs
    assert "train: 9 of 9 paired; captions agree in 9 of 9, features in 0 of 9 compared\n" in done.stdout


def test_images_with_one_caption_and_equal_grids_are_images_of_their_own(tmp_path):
    grids = np.random.default_rng(0).random((20, R, 30), np.float32)
    grids[1:9:2] = grids[0:8:2]
    np.save(tmp_path / "train_boxes.npy", grids)
    write_lines(tmp_path / "train_caps.txt", map(str, range(20)))
    assert Split(tmp_path, "train").n == 20


def test_arrays_that_are_no_rows_or_not_there_are_named(tmp_path):
    for name in ("reference", "source"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / f"{name}/train_ids.txt", [1])
    np.save(tmp_path / "source/train_boxes.npy", np.float32(1))
    args = align(tmp_path, "--out", tmp_path / "o")
    assert "train_boxes.npy: found (), expected a row for each image" in fails(*args)
    os.remove(tmp_path / "source/train_boxes.npy")
    assert "train_ims.npy: no such file" in fails(*args, "--arrays", "ims")


# ---------------------------------------------------------------- by regions


@pytest.fixture
def photographs(tmp_path):
    """reference/ (features) and source/ (grids) of the same 40 + 20 images in other orders; the grids by split."""
    grids = {}
    for name in ("reference", "source"):
        (tmp_path / name).mkdir()
    for seed, (split, n) in enumerate({"train": 40, "dev": 20}.items()):
        grids[split], features = boxes_with_features(n, seed=seed)
        np.save(tmp_path / f"reference/{split}_ims.npy", features)
        np.save(tmp_path / f"source/{split}_boxes.npy", grids[split][np.random.default_rng(seed).permutation(n)])
    return grids


def test_boxes_find_their_features_without_ids_and_captions(tmp_path, photographs):
    out = ok(*align(tmp_path, "--out", tmp_path / "reference"))
    assert "40 of 40 paired" in out and "regions that overlap look alike" in out
    for split, grids in photographs.items():
        np.testing.assert_array_equal(np.load(tmp_path / f"reference/{split}_boxes.npy"), grids)


def test_an_image_without_boxes_is_named(tmp_path, photographs):
    boxes = np.load(tmp_path / "source/train_boxes.npy")
    np.save(tmp_path / "source/train_boxes.npy", boxes[1:])
    assert "1 without a partner" in fails(*align(tmp_path, "--by", "regions", "--out", tmp_path / "out"))
    lost = int(np.flatnonzero((photographs["train"] == boxes[0]).all((1, 2)))[0])
    assert f"train, image {lost}: without a partner" in (tmp_path / "out/align_problems.txt").read_text()


@pytest.mark.parametrize("of", ["one image", "other images"])
def test_regions_that_do_not_tell_images_apart_are_refused(tmp_path, photographs, of):
    boxes = np.repeat(photographs["train"][:1], 40, axis=0) if of == "one image" else boxes_with_features(40, seed=9)[0]
    np.save(tmp_path / "source/train_boxes.npy", boxes)
    message = fails(*align(tmp_path, "--out", tmp_path / "out"))
    assert "of 40 images fit no boxes" in message and "train_ims.npy" in message
    assert not (tmp_path / "out").exists()


def test_captions_that_pair_boxes_with_other_features_are_found_out_by_the_regions(tmp_path, photographs):
    for split, grids in photographs.items():
        for name in ("reference", "source"):  # the captions agree, the order of the boxes is another
            lines = [f"{split} {i} {j}" for i in range(len(grids)) for j in range(5)]
            write_lines(tmp_path / f"{name}/{split}_caps.txt", lines)
    done = tool(*align(tmp_path, "--out", tmp_path / "out"))
    assert done.returncode == 2 and "2 of other regions" in done.stderr.splitlines()[-1]
    assert "captions agree in 40 of 40" in done.stdout and not list((tmp_path / "out").glob("*.npy"))


def test_without_anything_to_pair_by_it_says_what_is_missing(tmp_path, photographs):
    os.remove(tmp_path / "reference/dev_ims.npy")
    write_lines(tmp_path / "reference/dev_ids.txt", range(20))
    assert "nothing to pair the images by" in fails(*align(tmp_path, "--out", tmp_path / "out"))
