"""position.py as a command: files of boxes → files of grids."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from dataset_commands import R, fails, ok, picture
from folders import write_lines

from lib.datasets.boxes import read_rows
from position import position_grid


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
        assert not read_rows(boxes, start, 1024).any()
    grown = int(Path("/proc/self/statm").read_text().split()[1]) - int(resident)
    assert grown * resource.getpagesize() < 50e6


# ---------------------------------------------------------------- boxes outside their images


@pytest.fixture
def detections():
    """Boxes (20, 36, 4) in pixels, as a detector gives them, in pictures of sizes (20, 2), height, width."""
    rng = np.random.default_rng(0)
    sizes = np.stack([rng.integers(200, 300, 20), rng.integers(400, 640, 20)], 1)
    corners = np.sort(rng.random((20, R, 2, 2)), axis=2) * sizes[:, None, None, ::-1]
    return corners.reshape(20, R, 4).astype(np.float32), sizes


@pytest.mark.parametrize(
    "mistake, said",
    [
        ("swapped", "height and width look swapped"),
        ("too small", "reach to 2.0 times"),
        ("pixels for 0 to 1", "1x1 of 1 are for boxes from 0 to 1, these are in pixels"),
        ("0 to 1 for pixels", "boxes from 0 to 1 need --sizes 1x1"),
        ("corners for widths", "look like corners x1, y1, x2, y2"),
        ("widths for corners", "corners are reversed, expected x1 <= x2, y1 <= y2 (x, y, width, height need --xywh)"),
        ("corners in JSON", "look like corners x1, y1, x2, y2"),
    ],
)
def test_boxes_outside_their_images_are_refused_with_the_likely_mistake(tmp_path, detections, mistake, said):
    boxes, sizes = detections
    more, path = [], tmp_path / "b.npz"
    if mistake == "swapped":
        sizes = sizes[:, ::-1]
    elif mistake == "too small":
        sizes = sizes / 2
    elif mistake == "pixels for 0 to 1":
        more = ["--sizes", "1x1"]
    elif mistake == "0 to 1 for pixels":
        boxes = boxes / np.tile(sizes[:, None, ::-1], 2)
    elif mistake == "corners for widths":
        more = ["--xywh"]
    elif mistake == "widths for corners":
        boxes[..., 2:] -= boxes[..., :2]
    np.savez(path, boxes=boxes, image_sizes=sizes)
    if mistake == "corners in JSON":
        path = tmp_path / "b.json"
        images = [{"id": i, "height": int(height), "width": int(width)} for i, (height, width) in enumerate(sizes)]
        annotations = [{"image_id": i, "bbox": box.tolist()} for i in range(20) for box in boxes[i]]
        path.write_text(json.dumps({"images": images, "annotations": annotations}))
    message = fails("position", path, "--out", tmp_path / "o.npy", *more)
    assert said in message and message.startswith(f"error: {path}: ")
    assert not (tmp_path / "o.npy").exists() and not (tmp_path / "o.npy.part").exists()


def test_a_few_boxes_outside_are_counted(tmp_path, detections):
    boxes, sizes = detections
    boxes[3, 2, 2] = 2000
    np.savez(tmp_path / "b.npz", boxes=boxes, image_sizes=sizes)
    out = ok("position", tmp_path / "b.npz", "--out", tmp_path / "o.npy")
    assert "note: " in out and "1 boxes reach well outside their images" in out


def test_a_pixel_beyond_the_edge_is_nothing(tmp_path, detections):
    boxes, sizes = detections
    np.savez(tmp_path / "b.npz", boxes=boxes + 1, image_sizes=sizes)
    assert "note" not in ok("position", tmp_path / "b.npz", "--out", tmp_path / "o.npy")


def test_sizes_that_are_too_large_are_noted(tmp_path, detections):
    boxes, sizes = detections
    np.savez(tmp_path / "b.npz", boxes=boxes, image_sizes=sizes * 2)
    out = ok("position", tmp_path / "b.npz", "--out", tmp_path / "o.npy")
    assert "no box reaches beyond 50% of its image, are the sizes too large?" in out
