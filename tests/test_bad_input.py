"""What a user can do wrong: one clear line on stderr, exit status 2, and nothing half-written."""

import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from dataset_commands import Calls, call, command, full_disk, tool
from folders import make_whole_folder, random_captions, save_model, write_lines
from training import NAME, Place

import evaluation
import train
from lib.checkpoint import load_checkpoint
from Tencent_PFAN import model_whole

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d |INFO|WARNING|\s*$")  # what may stand around the error


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A data set and a checkpoint trained on it, to copy and to spoil."""
    root = tmp_path_factory.mktemp("clean")
    shutil.copy(Place(root, n_regions=36).fit("runs") / "checkpoint_0.pth.tar", root / "model.pth.tar")
    shutil.rmtree(root / "runs")
    return root


class Workplace:
    """A copy of the clean data set, and ways to run the commands on it and to look at how they end."""

    def __init__(self, root):
        self.root = root
        self.line = Place(root).line("runs")
        self.folder, self.model = root / "data" / NAME, root / "model.pth.tar"
        self.vocab = root / "vocab" / f"{NAME}_vocab.json"

    def path(self, name):
        return self.folder / name

    def change(self, name, function):
        """Rewrite an .npy file by what function returns, or changes in place."""
        array = np.load(self.path(name))
        changed = function(array)
        np.save(self.path(name), array if changed is None else changed)

    def refusal(self, run, *args):
        """What follows `error: ` where run(*args), a CompletedProcess, must end as every user error does."""
        before = self.files()
        done = run(*args)
        lines = [line for line in done.stderr.splitlines() if not LOG_LINE.match(line)]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        new = self.files() - before
        assert not [name for name in new if name.endswith((".part", ".pth.tar", ".json"))], new
        return lines[0].removeprefix("error: ")

    def files(self):
        return {str(path) for path in self.root.rglob("*")}

    def train(self, *flags):
        return self.refusal(call, train.main, "train.py", *self.line, *flags)

    def find(self):
        """What train.py refuses the data with, as check_data.py says too."""
        message = self.train()
        done = tool("check_data", self.folder, "--vocab_path", self.root / "vocab")
        assert done.returncode == 1 and f"WRONG: {message}" in done.stdout.splitlines(), done.stdout
        return message

    def evaluate(self, *flags, model=None):
        places = ["--data_path", self.root / "data", "--vocab_path", self.root / "vocab"]
        flags = "--model_path", model or self.model, *places, *flags
        return self.refusal(call, evaluation.main, "evaluation.py", *flags)


@pytest.fixture
def place(clean, tmp_path):
    shutil.copytree(clean, tmp_path, dirs_exist_ok=True)
    return Workplace(tmp_path)


# ---------------------------------------------------------------- from the shell


def test_an_error_in_a_worker_process_is_the_same_one_line(place):
    place.change("train_ims.npy", lambda ims: ims[7, 3].fill(np.nan))
    message = place.refusal(command, "train", *place.line, "--workers", 2)
    assert message == f"{place.path('train_ims.npy')}, image 7: NaN or infinite features, expected numbers"


def test_a_disk_that_fills_up_is_one_line_and_leaves_no_broken_checkpoint(place):
    """The checkpoint takes more than 100 kB, nothing else does."""
    with full_disk(100_000):
        assert str(place.root / "runs/checkpoint_0.pth.tar") in place.train()


# ---------------------------------------------------------------- features and boxes


@pytest.mark.parametrize("name", ["train_ims.npy", "dev_boxes.npy", "dev_caps.txt"])
def test_a_missing_file_is_named(place, name):
    place.path(name).unlink()
    assert place.train() == f"{place.path(name)}: no such file"
    assert not (place.root / "runs").exists()


@pytest.mark.parametrize("name, keep", [("train_ims.npy", 0), ("train_ims.npy", 60), ("dev_boxes.npy", 20_000)])
def test_a_truncated_array_is_named(place, name, keep):
    place.path(name).write_bytes(place.path(name).read_bytes()[:keep])
    message = place.train()
    assert str(place.path(name)) in message and "truncated" in message


@pytest.mark.parametrize("content", ["pickle", "npz", "object", "strings"])
def test_an_array_file_that_is_none_is_refused(place, content, tmp_path):
    trap, path = tmp_path / "ran", place.path("dev_ims.npy")
    if content == "pickle":
        path.write_bytes(pickle.dumps(Calls(open, str(trap), "w")))
    elif content == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    else:
        values = [Calls(open, str(trap), "w")] if content == "object" else ["a", "b"]
        np.save(path, np.array(values), allow_pickle=True)
    assert str(path) in place.train()
    assert not trap.exists()


def test_counts_of_boxes_that_do_not_fit_are_shown(place):
    place.change("train_boxes.npy", lambda boxes: boxes[:11])
    message = place.find()
    assert "11" in message and "12" in message and str(place.path("train_boxes.npy")) in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("train_ims.npy", (12, 36, 24), "16"),
        ("train_ims.npy", (12, 576), "regions"),
        ("train_boxes.npy", (12, 35, 31), "36"),
        ("train_boxes.npy", (12, 36, 4), "30 or 31"),
    ],
)
def test_a_wrong_width_is_shown_with_the_one_expected(place, name, shape, expected):
    place.change(name, lambda array: np.resize(array, shape))
    message = place.find() if "boxes" in name else place.train()
    assert str(place.path(name)) in message
    assert f"found {shape}" in message and expected in message.split("expected")[1]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_features_that_are_no_numbers_are_named_by_image(place, value):
    for name, refusal in (("dev_ims.npy", place.train), ("test_ims.npy", place.evaluate)):
        place.change(name, lambda ims: ims[4, 35, 15:].fill(value))
        assert f"{place.path(name)}, image 4: NaN or infinite" in refusal()


def test_the_image_is_named_as_the_row_of_the_file_in_files_that_repeat_images(place):
    """Rows 10 to 14 are image 2: the user must find the broken one."""
    place.change("test_ims.npy", lambda ims: ims.repeat(5, axis=0))
    place.change("test_ims.npy", lambda ims: ims[10:15, 0].fill(np.inf))
    assert re.search(r"test_ims\.npy, (image 2|row 1[0-4])\b", place.evaluate())


@pytest.mark.parametrize(
    ("slot", "value", "said"),
    [*((2, x, f"cell index {x}") for x in (-1, 257, 3.5)), (20, -0.1, "weight -0.1"), (20, np.nan, "weight nan")],
)
def test_a_cell_or_weight_that_is_none_is_named(place, slot, value, said):
    place.change("dev_boxes.npy", lambda boxes: boxes[3, 7, slot : slot + 1].fill(value))
    assert f"{place.path('dev_boxes.npy')}, image 3, region 7: {said}" in place.find()


# ---------------------------------------------------------------- captions and vocabulary


def test_an_empty_caption_is_named_by_line_and_can_be_accepted(place, monkeypatch):
    captions = random_captions(np.random.default_rng(0), 30)
    captions[11] = ""
    write_lines(place.path("dev_caps.txt"), captions)
    message = place.find()
    assert f"{place.path('dev_caps.txt')}, line 12: empty caption" in message
    assert "--allow_empty_captions" in message
    monkeypatch.setattr(sys, "argv", ["train.py", *place.line, "--allow_empty_captions"])
    train.main()
    assert (place.root / "runs" / "checkpoint_0.pth.tar").exists()


def test_a_data_set_that_is_not_there_is_named_and_no_folder_is_left(place):
    message = place.train("--data_name", "nothere", "--model_name", place.root / "new" / "run")
    assert f"{place.root / 'data' / 'nothere'}: no such data set" in message
    assert not (place.root / "new").exists()


def test_a_missing_vocabulary_names_the_command_that_makes_it(place):
    place.vocab.unlink()
    message = place.train()
    assert f"{place.vocab}: no such vocabulary; name its folder with --vocab_path, or" in message
    assert f"python vocab.py --data_path DATA_PATH --data_name {NAME}" in message


# ---------------------------------------------------------------- checkpoints


def test_options_that_lack_a_flag_name_the_checkpoint(place, tmp_path):
    checkpoint = load_checkpoint(str(place.model))
    path = tmp_path / "old.pth.tar"
    for flag in ("embed_size", "data_name", "img_dim", "batch_size"):
        opt = type(checkpoint["opt"])(**{k: v for k, v in vars(checkpoint["opt"]).items() if k != flag})
        torch.save({**checkpoint, "opt": opt}, path)
        message = place.evaluate(model=path)
        assert str(path) in message and flag in message


def test_a_checkpoint_to_resume_that_is_not_there_is_named(place):
    missing = place.root / "gone.pth.tar"
    for message in (place.train("--resume", missing), place.evaluate(model=missing)):
        assert message == f"{missing}: no such checkpoint"
    assert not (place.root / "runs").exists()


# ---------------------------------------------------------------- flags and places


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--batch_size 1", "at least 2"),
        ("--num_epochs 0", "at least 1"),
        ("--workers -1", "at least 0"),
        ("--agg_func Foo", "LogSumExp"),
        ("--cross_attn both", "t2i"),
        ("--lambda_lse 0 --agg_func LogSumExp", "--lambda_lse 0.0: expected a positive number"),
        ("--precomp_enc_type fancy", "weight_norm"),
        ("--device toaster", "toaster"),
        ("--embed_size 0", ""),
        ("--learning_rate nan", ""),
        ("--seed 99999999999999999999", ""),
    ],
)
def test_a_flag_with_an_impossible_value_is_named(place, flags, expected):
    message = place.train(*flags.split())
    assert flags.split()[0] in message and expected in message, message


@pytest.mark.parametrize(
    "flags", ["--batch_size 0", "--batch_size -1", "--fold5", "--split nowhere", "--device toaster"]
)
def test_an_evaluation_that_cannot_be_is_refused(place, flags):
    place.evaluate(*flags.split())


def test_a_place_that_cannot_be_written_is_named(place):
    file = place.root / "a_file"
    file.write_text("")
    for flags in (["--model_name", file], ["--model_name", file / "in"], ["--logger_name", file / "log"]):
        assert str(file) in place.train(*flags)
    for target in (place.root / "none" / "ranks", file / "ranks", place.root):
        assert str(target) in place.evaluate("--save_ranks", target)
    both = place.evaluate("--save_ranks", place.root / "one", "--save_topk", place.root / "one")
    assert "one: is read or written as well" in both
    assert "--model_name: found no name" in place.train("--model_name", "")
    assert file.read_text() == ""


def test_names_and_checkpoints_of_another_kind_are_told_with_the_way_out(place):
    message = place.train("--data_name", NAME + "/", "--vocab_path", place.root)
    assert f"--data_name {NAME} " in message
    news = make_whole_folder(place.root / "news")
    save_model(place.root / "whole.pth.tar", *news, data_name="toy", make_model=model_whole.SCAN, position="area")
    assert "evaluation_whole.py" in place.evaluate(model=place.root / "whole.pth.tar")
