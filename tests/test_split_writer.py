"""A split written row by row: restarts, half files, notes of other runs; ids."""

import contextlib
import errno
import functools
import os
import sys
from unittest import mock

import numpy as np
import pytest
from dataset_commands import command, no_leftovers
from folders import make_folder, write_lines

from lib.datasets import writer
from lib.datasets.ids import canonical_id, read_file_names, read_ids
from lib.datasets.problems import Problems
from lib.datasets.writer import Origin, SplitWriter
from lib.errors import InputError

ARRAY = {"ims": ((2,), np.float32)}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kept, call", [*((3, call) for call in range(6)), *((2, call) for call in range(9))])
def test_a_run_stopped_while_it_named_its_files_is_completed(tmp_path, monkeypatch, kept, call):
    """With all of 3 rows there are 5 renames and removals, with one row left out 8; it is killed before each."""
    write_lines(tmp_path / "train_ids.txt", "abc")
    write_lines(tmp_path / "train_caps.txt", ["a 1", "a 2", "b 1", "b 2", "c 1", "c 2"])

    arrays = {"ims": ((2,), np.float32), "boxes": ((3,), np.float32)}

    def start():
        return SplitWriter(tmp_path, "train", "abc", arrays, Origin({}))

    split, calls = start(), []
    for row in range(3)[:kept]:
        split.write(row, ims=np.full(2, row), boxes=np.full(3, row))
    real = {name: getattr(os, name) for name in ("replace", "remove")}

    def dies(name, *paths):
        if calls or os.path.exists(tmp_path / "train_commit.part"):  # before that no file has its name
            calls.append(paths)
        if len(calls) > call:
            raise Killed
        real[name](*paths)

    for name in real:
        monkeypatch.setattr(os, name, functools.partial(dies, name))
    with pytest.raises(Killed) if call < (5 if kept == 3 else 8) else contextlib.nullcontext():
        split.finish()
    monkeypatch.undo()
    assert start().finished
    assert np.load(tmp_path / "train_ims.npy").tolist() == [[row] * 2 for row in range(kept)]
    assert np.load(tmp_path / "train_boxes.npy").tolist() == [[row] * 3 for row in range(kept)]
    assert (tmp_path / "train_ids.txt").read_text() == "a\nb\nc\n"[: 2 * kept]
    assert len((tmp_path / "train_caps.txt").read_text().splitlines()) == 2 * kept
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("note", ["[]", "{", "\udcff", "[" * 100_000, '{"inputs": [3]}'])
def test_rows_of_a_stopped_run_whose_note_is_of_another_form_are_written_anew(tmp_path, note, capsys):
    def start():
        return SplitWriter(tmp_path, "train", ["a", "b"], ARRAY, Origin({}))

    with start() as split:
        split.write(0, ims=np.ones(2))
    with start() as split:
        assert split.done.tolist() == [True, False]
    (tmp_path / "train_state.part").write_text(note + "\n\1\1", errors="surrogateescape")
    with start() as split:
        assert not split.done.any() and "train: begun anew" in capsys.readouterr().out


def test_rows_of_an_array_that_was_cut_short_are_written_anew(tmp_path):
    with SplitWriter(tmp_path, "train", ["a", "b"], ARRAY, Origin({})) as split:
        for row in range(2):
            split.write(row, ims=np.ones(2))
    part = tmp_path / "train_ims.npy.part"
    os.truncate(part, part.stat().st_size - 8)
    with SplitWriter(tmp_path, "train", ["a", "b"], ARRAY, Origin({})) as split:
        assert not split.done.any()


def test_rows_that_are_begun_anew_do_not_count_though_the_new_run_is_killed_at_once(tmp_path, monkeypatch):
    with SplitWriter(tmp_path, "train", ["a"], ARRAY, Origin({})) as split:
        split.write(0, ims=np.ones(2))
    monkeypatch.setattr(writer, "ArrayFile", mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
        SplitWriter(tmp_path, "train", ["a"], ARRAY, Origin({}), overwrite=True)
    monkeypatch.undo()
    with SplitWriter(tmp_path, "train", ["a"], ARRAY, Origin({})) as split:
        assert not split.done.any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="files are locked on POSIX systems only")
def test_two_runs_do_not_write_one_split_at_once(tmp_path):
    make_folder(tmp_path)
    with SplitWriter(tmp_path / "out", "train", ["a"], ARRAY, Origin({})):
        done = command("reduce_features", tmp_path / "data/toy_precomp", "--out", tmp_path / "out")
    assert done.returncode == 2 and "train_state.part: another run is writing this split" in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="files are locked on POSIX systems only")
def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path):
    without = mock.patch("fcntl.lockf", side_effect=OSError(errno.ENOLCK, "No locks available"))
    with without, pytest.raises(OSError, match="No locks available"):
        SplitWriter(tmp_path, "train", ["a"], ARRAY, Origin({}))


def test_ids_of_one_image_meet_and_repeated_lists_shrink(tmp_path):
    assert canonical_id("COCO_val2014_000000000042.jpg") == canonical_id("42") == canonical_id("00042.png") == "42"
    assert canonical_id("a.b.jpeg") == "a.b" and canonical_id("0") == "0" and canonical_id("dog_007") == "dog_007"
    write_lines(tmp_path / "ids.txt", [7, 7, 8, 8])
    problems = Problems(str(tmp_path / "problems.txt"))
    assert read_ids(str(tmp_path / "ids.txt"), problems) == ["7", "8"] and not problems.total


@pytest.mark.parametrize("text", ["[]", "{", '{"images": [3]}', '{"images": [{"imgid": 3}]}', '{"a": 3}'])
def test_file_names_of_another_form_are_refused(tmp_path, text):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(InputError, match="names.json: "):
        read_file_names(str(tmp_path / "names.json"))


def test_a_system_without_fcntl_writes_a_split(tmp_path, monkeypatch):
    """Windows has no such module."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with SplitWriter(tmp_path, "train", ["a"], ARRAY, Origin({})) as split:
        split.write(0, ims=np.ones(2))
        assert split.finish() == 1
    assert np.load(tmp_path / "train_ims.npy").tolist() == [[1, 1]] and no_leftovers(tmp_path)
