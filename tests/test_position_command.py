"""position.py as a command: files of boxes → files of grids."""

import json
import os

import numpy as np
import pytest
from dataset_commands import R, coco, detected, fails, ok
from folders import write_lines

from position import position_grid


@pytest.fixture
def detections():
    """Boxes (20, 36, 4) in pixels, as a detector gives them, in images of sizes (20, 2), height, width."""
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(200, 300, 20), rng.integers(400, 640, 20)], 1)
    corners = np.sort(rng.random((20, R, 2, 2)), axis=2) * sizes[:, None, None, ::-1]
    return corners.reshape(20, R, 4).astype(np.float32), sizes


def test_boxes_of_arrays_become_grids(tmp_path):
    rng = np.random.default_rng(3)
    boxes = np.stack([detected(rng)[0] for _ in range(5)])
    boxes[2, 4, 2:] = boxes[2, 4, :2]  # no area
    sizes = np.tile([375, 500], (5, 1))
    expected = position_grid(boxes, sizes)
    np.savez(tmp_path / "b.npz", boxes=boxes, image_h=sizes[:, 0], image_w=sizes[:, 1])
    assert "1 boxes without area" in ok("position", tmp_path / "b.npz", "--out", tmp_path / "npz.npy")
    np.save(tmp_path / "b.npy", boxes)
    np.save(tmp_path / "s.npy", sizes)
    ok("position", tmp_path / "b.npy", "--sizes", tmp_path / "s.npy", "--out", tmp_path / "npy.npy")
    ok("position", tmp_path / "b.npy", "--sizes", "375x500", "--out", tmp_path / "one.npy")
    xywh = boxes.astype(np.float64)
    xywh[..., 2:] -= xywh[..., :2]
    np.save(tmp_path / "w.npy", xywh)
    ok("position", tmp_path / "w.npy", "--sizes", "375x500", "--xywh", "--out", tmp_path / "xywh.npy")
    for name in ("npz", "npy", "one"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    np.testing.assert_allclose(np.load(tmp_path / "xywh.npy")[..., 15:], expected[..., 15:], atol=1e-4)


def test_coco_style_json_boxes_follow_the_id_list(tmp_path):
    boxes = [[[i, 2 * j, i + 50, 2 * j + 40] for j in range(3)] for i in (5, 6, 7)]
    path = coco(tmp_path / "instances.json", boxes, [[100, 200]] * 3, (5, 6, 7))
    write_lines(tmp_path / "ids.txt", ["7", "5.jpg"])
    out = ok("position", path, "--ids", tmp_path / "ids.txt", "--n_regions", 4, "--out", tmp_path / "o.npy")
    assert "2 regions padded in 2 images" in out and "; 0 boxes without area" in out
    expected = position_grid([[*boxes[i], [0] * 4] for i in (2, 0)], [[100, 200]] * 2)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)
    assert "more than 2 boxes" in fails("position", path, "--n_regions", 2, "--out", tmp_path / "o2.npy")


def test_boxes_of_unknown_images_are_counted_and_an_id_may_be_text_in_one_place(tmp_path):
    path = coco(tmp_path / "i.json", [[[0, 0, 90, 90]]] * 3, [[100, 100]] * 3, (1, 2, 3))
    value = json.loads(path.read_text())
    value["annotations"][0]["image_id"] = "1"
    path.write_text(json.dumps({**value, "images": value["images"][:2]}))
    said = ok("position", path, "--n_regions", 1, "--out", tmp_path / "o.npy")
    assert "1 boxes are of images that it does not list" in said and "padded" not in said
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), position_grid([[[0, 0, 90, 90]]] * 2, [[100, 100]] * 2))


def test_file_names_count_before_ids(tmp_path):
    """Image 1 is 2.jpg and image 2 is 1.jpg: a list of file names is not a list of ids."""
    path = tmp_path / "i.json"
    images = [{"id": i, "file_name": f"{3 - i}.jpg", "height": 100, "width": 100} for i in (1, 2)]
    boxes = [{"image_id": i, "bbox": [0, 0, 20 * i, 90]} for i in (1, 2)]
    path.write_text(json.dumps({"images": images, "annotations": boxes}))
    write_lines(tmp_path / "ids.txt", ["1.jpg", "2.jpg"])
    ok("position", path, "--ids", tmp_path / "ids.txt", "--n_regions", 1, "--out", tmp_path / "o.npy")
    expected = position_grid([[[0, 0, 40, 90]], [[0, 0, 20, 90]]], [[100, 100]] * 2)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)


@pytest.mark.parametrize("form", ["npz", "json"])
def test_boxes_from_0_to_1_with_the_sizes_of_the_images_give_the_grids_of_pixels(tmp_path, form):
    """Whole pixels in images that are not square, so that many cells are covered equally and nearness decides."""
    boxes = np.sort(np.random.default_rng(0).integers(0, 640, (5, R, 2, 2)), axis=2).reshape(5, R, 4) / [1, 4, 1, 4]
    sizes, path = np.tile([160, 640], (5, 1)), tmp_path / f"b.{form}"
    shares = boxes / [640, 160, 640, 160]
    if form == "npz":
        np.savez(path, boxes=shares, image_sizes=sizes)
    else:
        coco(path, shares, sizes)
    assert "the boxes are from 0 to 1" in ok("position", path, "--out", tmp_path / "o.npy")
    expected, found = position_grid(boxes, sizes), np.load(tmp_path / "o.npy")
    np.testing.assert_allclose(found[..., 15:], expected[..., 15:], atol=1e-5)
    assert (found[..., :15] == expected[..., :15]).all(-1).mean() > (0.9 if form == "json" else 0.999)
    np.save(tmp_path / "s.npy", shares)
    said = ok("position", tmp_path / "s.npy", "--sizes", "1x1", "--out", tmp_path / "square.npy")
    assert "1x1 of 1: the images are taken for squares" in said
    np.testing.assert_array_equal(np.load(tmp_path / "square.npy"), position_grid(shares, np.ones((5, 2))))


def test_grids_that_are_there_are_kept_only_where_they_are_of_these_boxes(tmp_path, detections):
    boxes, sizes = detections
    path, out = tmp_path / "b.npz", tmp_path / "o.npy"
    np.savez(path, boxes=boxes, image_sizes=sizes)
    ok("position", path, "--out", out)
    before = out.read_bytes()
    assert "there already" in ok("position", path, "--out", out)
    boxes[7, 3, 2] += 40
    np.savez(path, boxes=boxes, image_sizes=sizes)
    assert "not the grids of" in (message := fails("position", path, "--out", out)) and "--overwrite" in message
    assert out.read_bytes() == before
    (tmp_path / "link.npy").symlink_to(out)
    ok("position", path, "--out", tmp_path / "link.npy", "--overwrite")
    assert (tmp_path / "link.npy").is_symlink()
    np.testing.assert_array_equal(np.load(out), position_grid(boxes, sizes))
    np.save(out, np.load(out)[..., :30])  # published files have 30 values
    assert "--overwrite" in fails("position", path, "--out", out)
    assert "is read or written as well" in fails("position", path, "--out", path, "--overwrite")


def test_what_does_not_fit_is_one_line_and_leaves_no_file(tmp_path):
    boxes, sizes = np.zeros((1500, 2, 4), np.float32), np.ones((1500, 2))
    np.save(tmp_path / "b.npy", boxes)
    np.savez(tmp_path / "words.npz", boxes=np.full((2, 3, 4), "a"), image_sizes=sizes[:2])
    np.savez(tmp_path / "none.npz", boxes=boxes[:0], image_sizes=sizes[:0])
    np.savez(tmp_path / "few.npz", boxes=boxes, image_sizes=sizes[1:])
    np.savez(tmp_path / "sides.npz", boxes=boxes, image_h=sizes[:, 0], image_w=sizes[1:, 0])
    np.savez(tmp_path / "good.npz", boxes=boxes, image_sizes=sizes)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-40])
    boxes[1400, 1] = [5, 5, 2, 9]
    np.save(tmp_path / "reversed.npy", boxes)
    write_lines(tmp_path / "ids.txt", [1])
    coco(tmp_path / "good.json", [[[0, 0, 1, 1]]], [[5, 5]])
    (tmp_path / "list.json").write_text('[{"image_id": 1, "bbox": [0, 0, 1, 1]}]')
    before = sorted(os.listdir(tmp_path))
    for name, more, said in (
        ("cut.npz", (), "truncated or not an .npz file"),
        ("words.npz", (), "boxes are an array (2, 3, 4) of <U1, expected an array of numbers"),
        ("none.npz", (), "boxes (0, 2, 4), expected (n, R, 4), at least one"),
        ("few.npz", (), "boxes (1500, 2, 4) with image sizes (1499, 2)"),
        ("sides.npz", (), "image_w (1499,) of 1500 images, expected (1500,)"),
        ("b.npy", (), "no image sizes in it; --sizes gives them"),
        ("b.npy", ("--sizes", "0x4"), "image 0: [0.0, 4.0]: height and width, expected positive numbers"),
        ("reversed.npy", ("--sizes", "9x9"), "image 1400, box 1: [5.0, 5.0, 2.0, 9.0]: corners are reversed"),
        ("good.npz", ("--ids", tmp_path / "ids.txt"), "holds no ids"),
        ("good.json", ("--ids", tmp_path / "ids.txt"), "no image '1' (1 of 1 ids are missing)"),
        ("good.json", ("--n_regions", 0), "--n_regions 0: expected at least 1"),
        ("list.json", (), "no image sizes in it"),
        ("nowhere.npz", (), "no such file"),
        ("good.npz", ("--out", tmp_path / "b.npy/o.npy"), "b.npy"),
    ):
        message = fails("position", tmp_path / name, "--out", tmp_path / "o.npy", *more)
        assert said in message, message
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "bbox, said",
    [
        ([1, 2, -3, 4], "image 1 (id '6'), box 2: [1.0, 2.0, -2.0, 6.0]: corners are reversed"),
        ([1, float("nan"), 3, 4], "NaN, 3, 4]"),
        ([1, 2], 'annotations 4: found b\'{"image_id": 6, "bbox": [1, 2]}\' (Expected `array` of length 4'),
        (None, 'annotations 4: found b\'{"image_id": 6, "bbox": null}\''),
    ],
)
def test_a_bad_box_in_json_is_named_with_its_image(tmp_path, bbox, said):
    images = [{"id": i, "height": 100, "width": 200} for i in (5, 6)]
    annotations = [{"image_id": i, "bbox": [0, 0, 5, 5]} for i in (5, 6) for _ in range(2)]
    value = {"images": images, "annotations": [*annotations, {"image_id": 6, "bbox": bbox}]}
    (tmp_path / "i.json").write_text(json.dumps(value))
    message = fails("position", tmp_path / "i.json", "--out", tmp_path / "o.npy")
    assert "i.json: " in message and said in message
    assert os.listdir(tmp_path) == ["i.json"]


# ---------------------------------------------------------------- boxes outside their images


@pytest.mark.parametrize(
    "mistake, said",
    [
        ("swapped", "times the image sizes: expected height before width"),
        (
            "pixels for 0 to 1",
            "times 1x1: expected height before width, in the pixels of the boxes (1x1 for boxes from",
        ),
        ("widths for corners", "corners are reversed, expected x1 <= x2, y1 <= y2 (x, y, width, height need --xywh)"),
        ("corners in JSON", "expected height before width"),
    ],
)
def test_boxes_outside_their_images_are_refused_with_the_likely_mistakes(tmp_path, detections, mistake, said):
    boxes, sizes = detections
    path, more = tmp_path / "b.npz", ["--sizes", "1x1"] if mistake == "pixels for 0 to 1" else []
    if mistake == "widths for corners":
        boxes[..., 2:] -= boxes[..., :2]
    np.savez(path, boxes=boxes, image_sizes=sizes[:, ::-1] if mistake == "swapped" else sizes)
    if mistake == "corners in JSON":
        boxes[..., 2:] += boxes[..., :2]  # which the bbox, a difference, takes off again
        path = coco(tmp_path / "b.json", boxes, sizes)
    message = fails("position", path, "--out", tmp_path / "o.npy", *more)
    assert said in message and message.startswith(f"error: {path}: ")
    assert not (tmp_path / "o.npy").exists() and not (tmp_path / "o.npy.part").exists()


@pytest.mark.parametrize(
    "change, note",
    [
        ("a few outside", "1 boxes reach well outside their images"),
        ("sizes too large", "no box reaches beyond 50% of its image, are the sizes too large?"),
    ],
)
def test_boxes_that_nearly_fit_are_noted(tmp_path, detections, change, note):
    boxes, sizes = detections
    if change == "a few outside":
        boxes[3, 2, 2] = 2000
    else:
        sizes = sizes * 2
    np.savez(tmp_path / "b.npz", boxes=boxes, image_sizes=sizes)
    out = ok("position", tmp_path / "b.npz", "--out", tmp_path / "o.npy")
    assert f"note: {tmp_path}/b.npz: {note}" in out
