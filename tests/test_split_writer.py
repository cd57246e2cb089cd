"""A split written row by row: restarts, half files, notes of other runs, memory; ids."""

import json
import os
import resource

import numpy as np
import pytest
from dataset_commands import R, no_leftovers
from folders import write_lines

from lib.datasets.arrays import ArrayReader, ArrayWriter
from lib.datasets.ids import canonical_id, read_ids
from lib.datasets.problems import Problems
from lib.datasets.writer import SplitWriter
from lib.errors import InputError


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
