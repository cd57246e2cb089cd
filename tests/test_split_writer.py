"""A split written row by row: restarts, half files, notes of other runs, memory; ids."""

import contextlib
import functools
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from dataset_commands import D, R, detected, no_leftovers, tsv_line
from folders import write_lines

from lib.datasets.arrays import ArrayWriter, open_rows, read_rows
from lib.datasets.ids import canonical_id, read_file_names, read_ids
from lib.datasets.problems import Problems
from lib.datasets.writer import Origin, SplitWriter
from lib.errors import InputError


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

    writer, calls = start(), []
    for row in range(3)[:kept]:
        writer.write(row, ims=np.full(2, row), boxes=np.full(3, row))
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
        writer.finish()
    monkeypatch.undo()
    assert start().finished
    assert np.load(tmp_path / "train_ims.npy").tolist() == [[row] * 2 for row in range(kept)]
    assert np.load(tmp_path / "train_boxes.npy").tolist() == [[row] * 3 for row in range(kept)]
    assert (tmp_path / "train_ids.txt").read_text() == "a\nb\nc\n"[: 2 * kept]
    assert len((tmp_path / "train_caps.txt").read_text().splitlines()) == 2 * kept
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("note", ["[]", "{}", "{", "\udcff", "[" * 100_000, '{"inputs": 3}', '{"inputs": [3]}'])
def test_rows_of_a_stopped_run_whose_note_is_of_another_form_are_written_anew(tmp_path, note, capsys):
    arrays = {"ims": ((2,), np.float32)}
    with SplitWriter(tmp_path, "train", ["a", "b"], arrays, Origin({})) as writer:
        writer.write(0, ims=np.ones(2))
    with SplitWriter(tmp_path, "train", ["a", "b"], arrays, Origin({})) as writer:
        assert writer.done.tolist() == [True, False]
    (tmp_path / "train_state.part").write_text(note + "\n\1\1", errors="surrogateescape")
    with SplitWriter(tmp_path, "train", ["a", "b"], arrays, Origin({})) as writer:
        assert not writer.done.any() and "train: begun anew" in capsys.readouterr().out


def test_a_state_that_a_stopped_run_had_only_begun_is_begun_anew(tmp_path):
    (tmp_path / "train_state.part").write_text('{"settings": {"to')
    with SplitWriter(tmp_path, "train", ["a"], {"ims": ((2,), np.float32)}, Origin({})) as writer:
        assert not writer.done.any()


def test_two_runs_do_not_write_one_split_at_once(tmp_path):
    arrays = {"ims": ((2,), np.float32)}
    with SplitWriter(tmp_path, "train", ["a"], arrays, Origin({})), pytest.raises(InputError, match="another run"):
        SplitWriter(tmp_path, "train", ["a"], arrays, Origin({}))


def test_memory_stays_small_while_gigabytes_are_written(tmp_path):
    """2 GB of rows in a sparse file: the process grows by a few MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = ArrayWriter(str(tmp_path / "x.npy"), (7000, R, 2048), np.float32)
    row = np.ones((1, R, 2048), np.float32)
    for i in range(0, 7000, 100):
        file.write(i, row)
    file.commit()
    array = open_rows(str(tmp_path / "x.npy"))
    assert array.shape == (7000, R, 2048) and (read_rows(array, 6900) == 1).all() and not read_rows(array, 6999).any()
    assert np.load(tmp_path / "x.npy", mmap_mode="r")[100, 5, 7] == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


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


WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None
from lib.errors import run
from scripts import tsv_to_dataset
run(tsv_to_dataset.main)
"""


def test_a_system_without_fcntl_writes_a_split(tmp_path):
    """Windows has no such module."""
    write_lines(tmp_path / "t.tsv", [tsv_line(1, *detected(np.random.default_rng(0)))])
    args = [tmp_path / "t.tsv", "--out", tmp_path / "o", "--all", "train", "--img_dim", D]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FCNTL, *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "o/train_ims.npy").shape == (1, R, D) and no_leftovers(tmp_path / "o")
