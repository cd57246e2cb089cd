"""From public data to a dataset folder: boxes, align, check."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from dataset_commands import D, R, fails, ok, picture, tool
from folders import make_folder, write_lines

from data import PrecompDataset
from lib.datasets.arrays import ArrayReader
from lib.errors import InputError
from position import position_grid, rows
from vocab import deserialize_vocab

# ---------------------------------------------------------------- TSV


def test_boxes_of_arrays_become_grids(tmp_path):
    rng = np.random.default_rng(3)
    boxes = np.stack([picture(rng)[0] for _ in range(5)])
    boxes[2, 4, 2:] = boxes[2, 4, :2]  # no area
    sizes = np.tile([375, 500], (5, 1))
    expected = position_grid(boxes, sizes)
    np.savez(tmp_path / "b.npz", boxes=boxes, image_h=sizes[:, 0], image_w=sizes[:, 1])
    assert "1 boxes without area" in ok("position", tmp_path / "b.npz", "--out", tmp_path / "npz.npy")
    np.save(tmp_path / "b.npy", boxes)
    np.save(tmp_path / "s.npy", sizes)
    ok("position", tmp_path / "b.npy", "--sizes", tmp_path / "s.npy", "--out", tmp_path / "npy.npy")
    ok("position", tmp_path / "b.npy", "--sizes", "375x500", "--out", tmp_path / "one.npy")
    xywh = boxes.copy()
    xywh[..., 2:] -= xywh[..., :2]
    np.save(tmp_path / "w.npy", xywh.astype(np.float64))
    ok("position", tmp_path / "w.npy", "--sizes", "375x500", "--xywh", "--out", tmp_path / "xywh.npy")
    for name in ("npz", "npy", "one"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    np.testing.assert_allclose(np.load(tmp_path / "xywh.npy")[..., 15:], expected[..., 15:], atol=1e-4)
    assert "there already" in ok("position", tmp_path / "b.npz", "--out", tmp_path / "npz.npy")


def test_a_bad_box_is_named_and_nothing_written(tmp_path):
    boxes = np.zeros((1500, 2, 4), np.float32)
    boxes[1400, 1] = [5, 5, 2, 9]
    np.save(tmp_path / "b.npy", boxes)
    message = fails("position", tmp_path / "b.npy", "--sizes", "9x9", "--out", tmp_path / "o.npy")
    assert "picture 1400, box 1" in message and "reversed" in message
    assert os.listdir(tmp_path) == ["b.npy"]
    assert "--sizes" in fails("position", tmp_path / "b.npy", "--out", tmp_path / "o.npy")


def test_boxes_of_another_kind_are_named_and_no_file_is_left(tmp_path):
    boxes, sizes = np.zeros((2, 3, 4), np.float32), np.ones((2, 2))
    np.save(tmp_path / "b.npy", boxes)
    (tmp_path / "array.npz").write_bytes((tmp_path / "b.npy").read_bytes())
    np.savez(tmp_path / "words.npz", boxes=np.full((2, 3, 4), "a"), image_sizes=sizes)
    np.savez(tmp_path / "none.npz", boxes=boxes[:0], image_sizes=sizes[:0])
    np.savez(tmp_path / "good.npz", boxes=boxes, image_sizes=sizes)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-40])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-10])
    (tmp_path / "ids.txt").write_text("1\n")
    boxes_of_1 = '"annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]'
    picture = '{"images": [{"id": 1, "height": %s, "width": 5}], ' + boxes_of_1 + "}"
    (tmp_path / "good.json").write_text(picture % 5)
    (tmp_path / "huge.json").write_text(picture % ("9" * 400))
    (tmp_path / "folder").mkdir()
    before = sorted(os.listdir(tmp_path))
    for name, more, said in (
        ("array.npz", (), "not an .npz file"),
        ("cut.npz", (), "truncated or not an .npz file"),
        ("cut.npy", ("--sizes", "5x5"), "truncated or not an .npy array"),
        ("words.npz", (), "boxes are <U1, expected numbers"),
        ("none.npz", (), "boxes (0, 3, 4): none"),
        ("b.npy", ("--sizes", "1.2.3x4"), "1.2.3x4: no such file"),
        ("b.npy", ("--sizes", "0x4"), "expected positive numbers"),
        ("good.npz", ("--ids", tmp_path / "ids.txt"), "--ids is for JSON"),
        ("good.json", ("--sizes", "5x5"), "--sizes is for arrays"),
        ("good.json", ("--n_regions", 0), "--n_regions 0: expected at least 1"),
        ("huge.json", (), "huge.json: "),
        ("good.npz", ("--out", tmp_path / "folder"), "folder: is no file"),
    ):
        assert said in fails("position", tmp_path / name, "--out", tmp_path / "o.npy", *more), name
    assert sorted(os.listdir(tmp_path)) == before


def test_coco_style_json_boxes_follow_the_id_list(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 200} for i in (5, 6, 7)]
    annotations = [{"image_id": i, "bbox": [i, 2 * j, 50, 40]} for j in range(3) for i in (7, 5, 6)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"info": {"x": [1]}, "annotations": annotations, "images": images}))
    write_lines(tmp_path / "ids.txt", ["7", "5.jpg"])
    out = ok("position", path, "--ids", tmp_path / "ids.txt", "--n_regions", 4, "--out", tmp_path / "o.npy")
    assert "2 regions padded in 2 pictures" in out
    boxes = [[[i, 2 * j, i + 50, 2 * j + 40] for j in range(3)] + [[0] * 4] for i in (7, 5)]
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), position_grid(boxes, [[100, 200]] * 2))
    assert "more than 2 boxes" in fails("position", path, "--n_regions", 2, "--out", tmp_path / "o2.npy")
    path.write_text(path.read_text()[:-30])
    assert "JSON" in fails("position", path, "--out", tmp_path / "o3.npy")


@pytest.mark.parametrize(
    "bbox, said",
    [
        ([1, 2, -3, 4], "picture 1 (image 6), box 2: [1.0, 2.0, -2.0, 6.0]: corners are reversed"),
        ([1, float("nan"), 3, 4], "near"),
        ([1, 2], "image 6, box 2: bbox [1, 2], expected x, y, width, height"),
        ([1, 2, 3, None], "image 6, box 2: bbox [1, 2, 3, None]"),
        (None, "image 6, box 2: bbox None"),
    ],
)
def test_a_bad_box_in_json_is_named_with_its_image(tmp_path, bbox, said):
    images = [{"id": i, "height": 100, "width": 200} for i in (5, 6)]
    annotations = [{"image_id": i, "bbox": [0, 0, 5, 5]} for i in (5, 6) for _ in range(2)]
    value = {"images": images, "annotations": [*annotations, {"image_id": 6, "bbox": bbox}]}
    (tmp_path / "i.json").write_text(json.dumps(value))
    message = fails("position", tmp_path / "i.json", "--out", tmp_path / "o.npy")
    assert "i.json: " in message and said in message and ("NaN, 3, 4]" in message or said != "near")
    assert os.listdir(tmp_path) == ["i.json"]


def test_what_a_line_quotes_of_a_file_is_short(tmp_path):
    long = "x" * 3000
    (tmp_path / "ids.txt").write_text(long + "\n")
    np.savez(tmp_path / "b.npz", **{long[:99] + str(i): np.zeros(1) for i in range(30)})
    image, box = {"id": 1, "height": 5, "width": 5}, {"image_id": 1, "bbox": [0, 0, 1, 1]}
    for name, images, boxes, more, said in (
        ("lost", [image], [box], ("--ids", tmp_path / "ids.txt"), "no image 'xxx"),
        ("bbox", [image], [{**box, "bbox": long}], (), "image 1, box 0: bbox 'xxx"),
        ("deep", [image], [{**box, "bbox": [[long]]}], (), "image 1, box 0: bbox [['xxx"),
        ("many", [{**image, "id": long}], [{**box, "image_id": long}] * 2, ("--n_regions", 1), "has more than 1 boxes"),
        ("size", [{**image, "height": long}], [box], (), "not a COCO-style file"),
        ("back", [{**image, "id": long}], [{"image_id": long, "bbox": [3, 3, -1, -1]}], (), "corners are reversed"),
        ("b.npz", [], [], (), "expected boxes or bboxes"),
    ):
        path = tmp_path / name
        if not name.endswith(".npz"):
            path = tmp_path / f"{name}.json"
            path.write_text(json.dumps({"images": images, "annotations": boxes}))
        message = fails("position", path, "--out", tmp_path / "o.npy", *more)
        assert message.startswith(f"error: {path}: ") and said in message
        assert len(message) < len(str(path)) + 300, message


def test_the_pages_of_a_file_of_boxes_are_given_back(tmp_path):
    """Half a gigabyte read in blocks, of a sparse file: what is resident grows by a few MB, not by all of it."""
    boxes = np.lib.format.open_memmap(tmp_path / "b.npy", "w+", np.float32, (1 << 20, R // 3, 4 * 3))
    resident = Path("/proc/self/statm").read_text().split()[1]
    for start in range(0, len(boxes), 1024):
        assert not rows(boxes, start, 1024).any()
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - int(resident)
    assert grown * resource.getpagesize() < 50e6


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


@pytest.mark.parametrize(
    "name",
    [
        "tsv_to_dataset",
        "align",
        "captions_to_dataset",
        "check_data",
        "position",
        "extract_features",
        "vocab",
        "download_data",
    ],
)
def test_every_tool_shows_an_example(name):
    assert "example: python " in ok(name, "--help")
