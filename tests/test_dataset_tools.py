"""From public data to a dataset folder: TSV, boxes, align, captions, check; restarts and half files."""

import base64
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from folders import make_folder, write_lines

from data import PrecompDataset
from lib.datasets.arrays import ArrayReader, ArrayWriter
from lib.datasets.ids import canonical_id, read_ids
from lib.datasets.problems import Problems
from lib.datasets.writer import SplitWriter
from lib.errors import InputError
from position import position_grid, rows
from vocab import deserialize_vocab

ROOT = Path(__file__).resolve().parents[1]
R, D = 36, 8


def tool(name, *args, **more):
    path = ROOT / (f"{name}.py" if name in ("position", "vocab") else f"scripts/{name}.py")
    return subprocess.run(
        [sys.executable, path, *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT, **more
    )


def ok(name, *args):
    done = tool(name, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(name, *args, **more):
    """What a tool that stops with one line says."""
    done = tool(name, *args, **more)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def picture(rng, n=R, width=500, height=375):
    """Boxes (n, 4) in a picture of that size, and features (n, D)."""
    low = rng.random((n, 2)) * [width * 0.6, height * 0.6]
    boxes = np.concatenate([low, low + 10 + rng.random((n, 2)) * [width * 0.3, height * 0.3]], 1)
    return boxes.astype("<f4"), rng.standard_normal((n, D)).astype("<f4")


def tsv_line(image_id, boxes, features, width=500, height=375, *more):
    data = [base64.b64encode(np.ascontiguousarray(x, "<f4")).decode() for x in (boxes, features, *more)]
    return "\t".join(map(str, (image_id, width, height, len(boxes), *data)))


@pytest.fixture
def parts(tmp_path):
    """Two TSV parts with pictures 10…15 and 99 (of no list), an id list each for train and test; {id: picture}."""
    rng = np.random.default_rng(0)
    pictures = {i: picture(rng) for i in (*range(10, 16), 99)}
    lines = {i: tsv_line(i, *pictures[i]) for i in pictures}
    write_lines(tmp_path / "a.tsv", [lines[i] for i in (12, 99, 10)])
    write_lines(tmp_path / "b.tsv", [lines[i] for i in (15, 11, 14, 13)])
    write_lines(tmp_path / "train.txt", [10, 11, 12, 13])
    write_lines(tmp_path / "test.txt", ["15.jpg", "COCO_val2014_000000000014.jpg"])
    return pictures


def tsv_args(folder, *more):
    return (
        folder / "a.tsv",
        folder / "b.tsv",
        "--out",
        folder / "out",
        "--img_dim",
        D,
        "--ids",
        f"train={folder}/train.txt",
        f"test={folder}/test.txt",
        *more,
    )


def no_leftovers(folder):
    return not [path.name for path in folder.iterdir() if path.name.endswith((".part", "_commit"))]


# ---------------------------------------------------------------- TSV


def test_tsv_parts_become_a_dataset_in_the_order_of_the_id_lists(tmp_path, parts):
    out = ok("tsv_to_dataset", *tsv_args(tmp_path))
    assert "1 of other pictures" in out and "train: 4 of 4" in out
    for split, ids in (("train", (10, 11, 12, 13)), ("test", (15, 14))):
        images, boxes = (np.load(tmp_path / f"out/{split}_{name}.npy") for name in ("ims", "boxes"))
        assert images.dtype == boxes.dtype == np.float32
        np.testing.assert_array_equal(images, [parts[i][1] for i in ids])
        np.testing.assert_array_equal(
            boxes, position_grid(np.stack([parts[i][0] for i in ids]), [[375, 500]] * len(ids))
        )
    assert (tmp_path / "out/test_ids.txt").read_text() == "15.jpg\nCOCO_val2014_000000000014.jpg\n"
    assert no_leftovers(tmp_path / "out")


def test_a_second_run_leaves_finished_files_alone_and_other_settings_need_overwrite(tmp_path, parts):
    ok("tsv_to_dataset", *tsv_args(tmp_path))
    before = os.stat(tmp_path / "out/train_ims.npy")
    assert "train: there already" in ok("tsv_to_dataset", *tsv_args(tmp_path))
    after = os.stat(tmp_path / "out/train_ims.npy")
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert "--overwrite" in fails("tsv_to_dataset", *tsv_args(tmp_path, "--float16"))
    ok("tsv_to_dataset", *tsv_args(tmp_path, "--float16", "--overwrite"))
    halves = np.load(tmp_path / "out/train_ims.npy")
    assert halves.dtype == np.float16
    np.testing.assert_allclose(halves, [parts[i][1] for i in (10, 11, 12, 13)], rtol=1e-3, atol=1e-3)


def test_bad_lines_are_listed_by_line_and_fail_the_run_unless_skipped(tmp_path, parts):
    boxes, features = parts[13]
    reversed_boxes = boxes[:, [2, 3, 0, 1]]
    nan = features.copy()
    nan[3, 2] = np.nan
    write_lines(
        tmp_path / "b.tsv",
        [
            tsv_line(15, *parts[15]),
            tsv_line(10, *parts[10]),  # doubled
            tsv_line(11, parts[11][0], nan),
            tsv_line(13, reversed_boxes, features),
            "14\t500\t375",
        ],
    )
    message = fails("tsv_to_dataset", *tsv_args(tmp_path))
    assert "3 malformed" in message and "1 doubled" in message and "--skip_bad" in message
    listed = (tmp_path / "out/tsv_problems.txt").read_text().splitlines()
    where = str(tmp_path / "b.tsv")
    assert [line for line in listed if line.startswith(f"{where}, line 2: doubled: id 10")]
    assert [line for line in listed if line.startswith(f"{where}, line 3: malformed") and "NaN" in line]
    assert [line for line in listed if line.startswith(f"{where}, line 4: malformed") and "reversed" in line]
    assert [line for line in listed if line.startswith(f"{where}, line 5: malformed") and "3 fields" in line]
    assert not (tmp_path / "out/train_ims.npy").exists()
    ok("tsv_to_dataset", *tsv_args(tmp_path, "--skip_bad"))
    np.testing.assert_array_equal(np.load(tmp_path / "out/train_ims.npy"), [parts[i][1] for i in (10, 12)])
    assert (tmp_path / "out/train_ids.txt").read_text() == "10\n12\n"


def test_missing_and_doubled_ids_of_a_list_are_named(tmp_path, parts):
    write_lines(tmp_path / "train.txt", [10, 11, 12, 777, 11, 13])
    message = fails("tsv_to_dataset", *tsv_args(tmp_path))
    assert "1 doubled" in message and "1 missing" in message
    listed = (tmp_path / "out/tsv_problems.txt").read_text()
    assert "train.txt, line 5: doubled: id 11 stands in line 2" in listed and "train, id 777: missing" in listed


def test_skipping_pictures_takes_their_captions_along(tmp_path, parts):
    (tmp_path / "out").mkdir()
    write_lines(tmp_path / "out/train_ids.txt", [10, 11, 777, 13])
    write_lines(tmp_path / "out/train_caps.txt", [f"{i} {j}" for i in (10, 11, 777, 13) for j in range(5)])
    ok(
        "tsv_to_dataset",
        tmp_path / "a.tsv",
        tmp_path / "b.tsv",
        "--out",
        tmp_path / "out",
        "--img_dim",
        D,
        "--skip_bad",
    )
    lines = (tmp_path / "out/train_caps.txt").read_text().splitlines()
    assert lines == [f"{i} {j}" for i in (10, 11, 13) for j in range(5)]
    assert np.load(tmp_path / "out/train_ims.npy").shape == (3, R, D)
    assert "there already" in ok(
        "tsv_to_dataset", tmp_path / "a.tsv", tmp_path / "b.tsv", "--out", tmp_path / "out", "--img_dim", D
    )


@pytest.mark.parametrize("regions, n, kept", [("best", 36, 36), ("all", 60, 50)])
def test_adaptive_regions_are_cut_or_padded(tmp_path, regions, n, kept):
    rng = np.random.default_rng(1)
    many, few = picture(rng, 50), picture(rng, 10)
    scores = rng.random(50)
    fields = "image_id,image_w,image_h,num_boxes,boxes,features,objects_conf"
    write_lines(tmp_path / "t.tsv", [tsv_line(1, *many, 500, 375, scores), tsv_line(2, *few, 500, 375, np.ones(10))])
    out = ok(
        "tsv_to_dataset",
        tmp_path / "t.tsv",
        "--out",
        tmp_path / "out",
        "--all",
        "train",
        "--img_dim",
        D,
        "--regions",
        regions,
        "--n_regions",
        n,
        "--fields",
        fields,
    )
    assert "padded" in out
    images, boxes = (np.load(tmp_path / f"out/train_{name}.npy") for name in ("ims", "boxes"))
    best = np.argsort(-scores.astype("<f4"), kind="stable")[:36] if regions == "best" else np.arange(50)
    np.testing.assert_array_equal(images[0, :kept], many[1][best])
    np.testing.assert_array_equal(images[1, :10], few[1])
    assert (images[1, 10:] == 0).all() and (boxes[1, 10:, :15] == 256).all() and (boxes[1, 10:, 15:] == 0).all()
    assert "36 (--regions fixed)" in (
        fails(
            "tsv_to_dataset",
            tmp_path / "t.tsv",
            "--out",
            tmp_path / "o2",
            "--all",
            "train",
            "--img_dim",
            D,
            "--fields",
            fields,
        )
        and (tmp_path / "o2/tsv_problems.txt").read_text()
    )


DIES = """
import os
from lib import errors
from lib.datasets import writer
from scripts import tsv_to_dataset
write = writer.SplitWriter.write
def dying(self, row, **values):
    write(self, row, **values)
    if self.done.sum() == 25:
        os.kill(os.getpid(), 9)
writer.SplitWriter.write, writer.SYNC_SECONDS = dying, 0
errors.run(tsv_to_dataset.main)
"""


def test_a_killed_run_leaves_no_half_file_and_the_next_one_goes_on(tmp_path):
    rng = np.random.default_rng(2)
    pictures = [picture(rng) for _ in range(40)]
    write_lines(tmp_path / "t.tsv", [tsv_line(i, *pictures[i]) for i in range(40)])
    write_lines(tmp_path / "train.txt", range(40))
    args = ["t.tsv", "--out", "out", "--ids", "train=train.txt", "--img_dim", str(D)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", DIES, *args], cwd=tmp_path, env=env)
    assert done.returncode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train_ims.npy.part",
        "train_boxes.npy.part",
        "train_state.part",
    }
    # what the killed run wrote is not made again: other numbers of the same length do not show
    other = [tsv_line(i, pictures[0][0], pictures[0][1] + 1) for i in range(25)]
    write_lines(tmp_path / "t.tsv", other + [tsv_line(i, *pictures[i]) for i in range(25, 40)])
    subprocess.run([sys.executable, ROOT / "scripts/tsv_to_dataset.py", *args], cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out/train_ims.npy"), [features for _, features in pictures])
    assert no_leftovers(tmp_path / "out")


def test_a_run_stopped_while_it_renamed_is_completed(tmp_path, monkeypatch):
    arrays = {"ims": ((2,), np.float32), "boxes": ((3,), np.float32)}

    def start():
        return SplitWriter(tmp_path, "train", ["a", "b"], arrays, {"tool": "test"})

    class Killed(BaseException):
        pass

    replace, calls = os.replace, []

    def dies(source, target):
        calls.append(target)
        if str(target).endswith("train_boxes.npy"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    writer = start()
    for row in range(2):
        writer.write(row, ims=np.full(2, row), boxes=np.full(3, row))
    with pytest.raises(Killed):
        writer.finish()
    monkeypatch.undo()
    assert not (tmp_path / "train_boxes.npy").exists()
    writer.state.close()  # as the end of the process does
    assert start().finished
    np.testing.assert_array_equal(np.load(tmp_path / "train_boxes.npy"), [[0] * 3, [1] * 3])
    assert no_leftovers(tmp_path)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("train_made.json", "[]", "found [], expected an object; --overwrite"),
        ("train_made.json", "null", "found None, expected an object"),
        ("train_made.json", "{", "not JSON (b'{'), expected an object"),
        ("train_made.json", DEEP, "not JSON (b'[[["),
        ("train_made.json", '{"a": ' + "9" * 5000 + "}", "not JSON"),
        ("train_state.part", "[]\n", "found [], expected an object of settings, arrays, ids, inputs; --overwrite"),
        ("train_state.part", "{}\n", "found {}, expected an object of settings"),
        ("train_state.part", '{"inputs": 3}\n', "found {'inputs': 3}, expected an object of settings"),
        ("train_state.part", '{"inputs": [], "other": 1}\n', "expected an object of settings"),
        ("train_state.part", "\udcff\n", "not JSON (b'\\xff\\n'), expected an object of settings"),
        ("train_state.part", DEEP + "\n", "not JSON (b'[[["),
        ("train_commit", "", "not JSON (b''), expected pairs of train_NAME and its .part to rename; delete it"),
        ("train_commit", "{}", "found {}, expected pairs"),
        ("train_commit", DEEP, "not JSON (b'[[["),
        ("train_commit", '["ab"]', "found ['ab'], expected pairs"),
        ("train_commit", "[[1, 2]]", "found [[1, 2]], expected pairs"),
        ("train_commit", '[["train_ims.npy"]]', "expected pairs"),
    ],
)
def test_notes_of_another_form_are_one_line_that_names_them(tmp_path, name, text, said):
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError) as caught:
        SplitWriter(tmp_path, "train", ["a"], {"ims": ((2,), np.float32)}, {})
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and said in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 200 and "\n" not in str(caught.value)


def test_a_command_ends_with_that_line_and_status_2(tmp_path, parts):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train_commit").write_text(DEEP)
    assert f"error: {tmp_path / 'out/train_commit'}: not JSON" in fails("tsv_to_dataset", *tsv_args(tmp_path))


def test_overwrite_goes_past_notes_of_another_form(tmp_path):
    (tmp_path / "train_made.json").write_text(DEEP)
    (tmp_path / "train_state.part").write_text("[]\n")
    with SplitWriter(tmp_path, "train", ["a"], {"ims": ((2,), np.float32)}, {}, overwrite=True) as writer:
        assert not writer.finished and not writer.done.any()


def test_a_state_that_a_stopped_run_had_only_begun_is_begun_anew(tmp_path):
    (tmp_path / "train_state.part").write_text('{"settings": {"to')
    with SplitWriter(tmp_path, "train", ["a"], {"ims": ((2,), np.float32)}, {}) as writer:
        assert not writer.done.any()


@pytest.mark.parametrize(
    "name, part",
    [
        ("../theirs", "train_ims.npy.part"),
        ("{}/theirs", "train_ims.npy.part"),
        ("train_ims.npy", "../theirs"),
        ("train_ims.npy", "{}/theirs"),
        ("train_/../../theirs", "train_/../../theirs.part"),
        ("dev_ims.npy", "dev_ims.npy.part"),
        ("train_ims.npy", "dev_ims.npy.part"),
    ],
)
def test_a_commit_renames_nothing_but_its_splits_own_parts(tmp_path, name, part):
    folder = tmp_path / "out"
    (folder / "train_").mkdir(parents=True)
    for path in (
        tmp_path / "theirs",
        tmp_path / "theirs.part",
        folder / "train_ims.npy.part",
        folder / "dev_ims.npy.part",
    ):
        path.write_text("untouched")
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
    (folder / "train_commit").write_text(json.dumps([[name.format(tmp_path), part.format(tmp_path)]]))
    with pytest.raises(InputError, match="train_commit: found .*, expected pairs of train_NAME and its .part"):
        SplitWriter(folder, "train", ["a"], {"ims": ((2,), np.float32)}, {})
    (folder / "train_commit").unlink()
    assert {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")} == before


def test_two_runs_do_not_write_one_split_at_once(tmp_path):
    arrays = {"ims": ((2,), np.float32)}
    with SplitWriter(tmp_path, "train", ["a"], arrays, {}), pytest.raises(InputError, match="another run"):
        SplitWriter(tmp_path, "train", ["a"], arrays, {})


def test_files_of_others_are_not_replaced(tmp_path):
    np.save(tmp_path / "train_ims.npy", np.zeros((1, 2), np.float32))
    with pytest.raises(InputError, match="--overwrite"):
        SplitWriter(tmp_path, "train", ["a"], {"ims": ((2,), np.float32)}, {})


def test_memory_stays_small_while_gigabytes_are_written(tmp_path):
    """2 GB of rows in a sparse file: the process grows by a few MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = ArrayWriter(str(tmp_path / "x.npy"), 7000, (R, 2048), np.float32)
    row = np.ones((1, R, 2048), np.float32)
    for i in range(0, 7000, 100):
        file.write(i, row)
    file.commit()
    reader = ArrayReader(str(tmp_path / "x.npy"))
    assert reader.shape == (7000, R, 2048) and (reader.read(6900) == 1).all() and (reader.read(6999) == 0).all()
    assert np.load(tmp_path / "x.npy", mmap_mode="r")[100, 5, 7] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_ids_of_one_picture_meet_and_repeated_lists_shrink(tmp_path):
    assert canonical_id("COCO_val2014_000000000042.jpg") == canonical_id("42") == canonical_id("00042.png") == "42"
    assert canonical_id("a.b.jpeg") == "a.b" and canonical_id("0") == "0" and canonical_id("dog_007") == "dog_007"
    write_lines(tmp_path / "ids.txt", [7, 7, 8, 8])
    problems = Problems(str(tmp_path / "problems.txt"))
    assert read_ids(str(tmp_path / "ids.txt"), problems) == ["7", "8"] and not problems.total


# ---------------------------------------------------------------- position.py


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


# ---------------------------------------------------------------- align


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


# ---------------------------------------------------------------- captions


def karpathy(path, coco):
    images = []
    for i, (split, k) in enumerate([("train", 5), ("restval", 6), ("val", 5), ("test", 5), ("test", 5), ("train", 4)]):
        sentences = [{"raw": f"Caption {i} {j} é.\n", "tokens": ["x"]} for j in range(k)]
        images.append(
            {
                "filename": f"COCO_val2014_{i:012}.jpg" if coco else f"{i}00.jpg",
                "split": split,
                "sentences": sentences,
                **({"cocoid": i} if coco else {}),
            }
        )
    path.write_text(json.dumps({"dataset": "x", "images": images}))


def test_karpathy_splits(tmp_path):
    karpathy(tmp_path / "coco.json", True)
    out = ok("captions_to_dataset", "--karpathy", tmp_path / "coco.json", "--out", tmp_path / "c", "--test_images", 1)
    assert "1 with more than 5 captions" in out and "1 with fewer than 5 captions" in out
    read = {p.name: p.read_text().splitlines() for p in (tmp_path / "c").glob("*.txt")}
    assert read["train_ids.txt"] == ["0", "1"] and read["dev_ids.txt"] == ["2"]
    assert read["testall_ids.txt"] == ["3", "4"] and read["test_ids.txt"] == ["3"]
    assert read["train_caps.txt"] == [f"Caption {i} {j} é." for i in (0, 1) for j in range(5)]
    assert read["caption_problems.txt"] == [
        "1: with more than 5 captions: the first 5 of 6 are kept",
        "5: with fewer than 5 captions: 4; left out",
    ]
    karpathy(tmp_path / "f30k.json", False)
    ok("captions_to_dataset", "--karpathy", tmp_path / "f30k.json", "--out", tmp_path / "f")
    assert (tmp_path / "f/test_ids.txt").read_text() == "300.jpg\n400.jpg\n"
    assert not (tmp_path / "f/testall_ids.txt").exists()


def test_official_coco_captions(tmp_path):
    for name, ids in (("train", (7, 3)), ("val", (9,))):
        annotations = [{"id": 10 * i + j, "image_id": i, "caption": f"{i} {j}"} for j in (4, 1, 3, 2, 5) for i in ids]
        value = {"images": [{"id": i} for i in ids], "annotations": annotations}
        (tmp_path / f"captions_{name}.json").write_text(json.dumps(value))
    files = [tmp_path / f"captions_{name}.json" for name in ("train", "val")]
    write_lines(tmp_path / "tr.txt", ["COCO_train2014_000000000009.jpg", "7"])
    write_lines(tmp_path / "de.txt", ["3"])
    ok(
        "captions_to_dataset",
        "--coco",
        *files,
        "--out",
        tmp_path / "o",
        "--ids",
        f"train={tmp_path}/tr.txt",
        f"dev={tmp_path}/de.txt",
    )
    assert (tmp_path / "o/train_caps.txt").read_text().splitlines() == [f"{i} {j}" for i in (9, 7) for j in range(1, 6)]
    assert "--ids" in fails("captions_to_dataset", "--coco", *files, "--out", tmp_path / "o")
    write_lines(tmp_path / "de.txt", ["3", "444"])
    assert "1 without captions" in fails(
        "captions_to_dataset", "--coco", *files, "--out", tmp_path / "o", "--ids", f"dev={tmp_path}/de.txt"
    )


def test_captions_do_not_slip_under_features_in_another_order(tmp_path):
    write_lines(tmp_path / "caps.tsv", [f"{i}.jpg#{j}\tcaption {i} {j}" for i in range(6) for j in range(5)])
    args = ("captions_to_dataset", "--tsv", tmp_path / "caps.tsv", "--out", tmp_path / "o")
    ok(*args, "--sizes", "dev=1", "test=2", "--seed", 1)
    splits = {s: (tmp_path / f"o/{s}_ids.txt").read_text().split() for s in ("train", "dev", "test")}
    assert [len(ids) for ids in splits.values()] == [3, 1, 2] and len({i for s in splits.values() for i in s}) == 6
    for split, ids in splits.items():
        lines = (tmp_path / f"o/{split}_caps.txt").read_text().splitlines()
        assert lines == [f"caption {i[:-4]} {j}" for i in ids for j in range(5)]
        np.save(tmp_path / f"o/{split}_ims.npy", np.zeros((len(ids), R, D), np.float32))
    ok(*args, "--sizes", "dev=1", "test=2", "--seed", 1)
    assert "not known to be in the order" in fails(*args, "--sizes", "dev=1", "test=2", "--seed", 2)
    np.save(tmp_path / "o/test_ims.npy", np.zeros((2, R, D), np.float32))
    os.remove(tmp_path / "o/train_ims.npy")
    fails(*args, "--sizes", "dev=1", "test=2", "--seed", 2)  # train alone would fit; no split is written
    assert (tmp_path / "o/train_ids.txt").read_text().split() == splits["train"]
    write_lines(tmp_path / "caps.tsv", ["no tab here"])
    assert "no picture has 5 captions" in fails(*args, "--split", "train")


@pytest.mark.parametrize(
    "item, found",
    [
        ({"split": "train", "filename": "x", "sentences": [{"raw": 3}]}, "'int'"),
        ({"split": "train", "filename": None, "sentences": [{"raw": "a"}]}, "None is no name"),
        ({"split": "train", "filename": "x"}, "'sentences'"),
        ({"split": "odd", "filename": "x", "sentences": []}, "split 'odd', expected train, restval, val, test"),
    ],
)
def test_a_picture_of_another_form_is_named(tmp_path, item, found):
    good = {"split": "train", "filename": "y", "sentences": [{"raw": "a"}] * 5}
    (tmp_path / "k.json").write_text(json.dumps({"images": [good, item]}))
    message = fails("captions_to_dataset", "--karpathy", tmp_path / "k.json", "--out", tmp_path / "o")
    assert "k.json: picture 2" in message and found in message


# ---------------------------------------------------------------- what does not fit


def test_inputs_and_outputs_of_another_kind_are_named(tmp_path, parts):
    (tmp_path / "empty").write_text("")
    (tmp_path / "spaces.tsv").write_text("1 500 375 36 AAAA AAAA\n")
    (tmp_path / "list.json").write_text("[]")
    write_lines(tmp_path / "head.tsv", ["image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures"])
    write_lines(tmp_path / "wide.tsv", [tsv_line(10, *parts[10], width=10**400)])
    for name in ("reference", "source"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / f"{name}/train_ids.txt", [1])
    np.save(tmp_path / "source/train_boxes.npy", np.float32(1))
    out, ids = ("--out", tmp_path / "o"), ("--ids", f"train={tmp_path}/train.txt")
    folders = ("--reference", tmp_path / "reference", "--source", tmp_path / "source")
    for args, said in (
        (("tsv_to_dataset", tmp_path / "empty", *out, *ids), "empty: empty, expected lines of image_id"),
        (("tsv_to_dataset", tmp_path / "head.tsv", *out, "--all", "train"), "head.tsv: no pictures"),
        (("tsv_to_dataset", tmp_path / "wide.tsv", "--out", tmp_path / "w", *ids, "--img_dim", D), "1 malformed"),
        (("tsv_to_dataset", tmp_path / "spaces.tsv", *out, *ids), "1 malformed"),
        (("tsv_to_dataset", tmp_path / "a.tsv", *out, *ids, "--n_regions", 0), "--n_regions 0: expected at least 1"),
        (("tsv_to_dataset", tmp_path / "a.tsv", "--out", tmp_path / "empty", *ids), "empty: is no folder"),
        (("captions_to_dataset", "--karpathy", tmp_path / "list.json", *out), "list.json: no picture has 5 captions"),
        (("captions_to_dataset", "--tsv", tmp_path / "empty", *out), "empty: no picture has 5 captions"),
        (("align", *folders, *out), "train_boxes.npy: found (), expected a row for each picture"),
        (("align", *folders, *out, "--arrays", "ims"), "train_ims.npy: no such file"),
    ):
        if "ims" in args:
            os.remove(tmp_path / "source/train_boxes.npy")
        assert said in fails(*args), args
    assert "1 fields, expected 6: image_id" in (tmp_path / "o/tsv_problems.txt").read_text()


def test_a_full_disk_is_named_with_the_file(tmp_path, parts):
    # no coverage of the tools' processes: its files could not grow either
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}

    def full():  # no file may grow beyond it: the same OSError as on a full disk, but for its number
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    message = fails("tsv_to_dataset", *tsv_args(tmp_path), preexec_fn=full, env=env)
    assert f"{tmp_path}/out/train_ims.npy" in message
    write_lines(tmp_path / "caps.tsv", [f"{i}.jpg\tcaption {i} {j}" for i in range(100) for j in range(5)])
    args = ("--tsv", tmp_path / "caps.tsv", "--split", "train", "--out", tmp_path / "o")
    assert f"{tmp_path}/o/train_caps.txt" in fails("captions_to_dataset", *args, preexec_fn=full, env=env)
    assert not [path for folder in ("out", "o") for path in (tmp_path / folder).iterdir() if path.suffix != ".part"]


# ---------------------------------------------------------------- check


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
