"""Figures: each command writes a picture, from the numbers that the rest of the project computes."""

import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from folders import make_folder, save_model
from PIL import Image

from lib.errors import InputError, run
from scripts import visualize
from train import tensorboard_logger


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Two untrained checkpoints and a run's TensorBoard file; the folder."""
    root = tmp_path_factory.mktemp("figures")
    where = make_folder(root, splits={"dev": 6, "test": 8}, n_regions=4)
    save_model(root / "attention.pth.tar", *where)
    save_model(root / "none.pth.tar", *where, position="none")
    log = tensorboard_logger.Logger(str(root / "run"), flush_secs=1)
    for step in range(20):
        log.log_value("Le", 20.0 - step, step=step)
    for step in (9, 19):
        log.log_value("rsum", 10.0 * step, step=step)
    log.writer.flush() if hasattr(log, "writer") else None
    return root


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def draw(*flags):
    """The figure of a command line, drawn but not written."""
    opt = visualize.get_parser().parse_args([*map(str, flags), "--out", "x.png"])
    return opt.draw(opt)


FIGURES = [
    ("search", "--model_path", "{}/attention.pth.tar", "--sentence", "a red ball", "--top", "2"),
    ("captions", "--model_path", "{}/none.pth.tar", "--picture", "3"),
    ("positions", "--model_path", "{}/attention.pth.tar"),
    ("curves", "{}/run"),
    ("ablation", "--model_path", "{}/attention.pth.tar", "{}/none.pth.tar"),
]


@pytest.mark.parametrize("flags", FIGURES, ids=[flags[0] for flags in FIGURES])
def test_every_figure_is_written_as_a_png(toy, tmp_path, monkeypatch, flags):
    out = tmp_path / "figure.png"
    words = [word.format(toy) for word in flags]
    monkeypatch.setattr("sys.argv", ["visualize.py", *words, "--out", str(out), "--dpi", "40"])
    visualize.main()
    with Image.open(out) as picture:
        assert picture.format == "PNG" and len(np.unique(picture.convert("L"))) > 5
    assert os.listdir(tmp_path) == ["figure.png"]


@pytest.mark.parametrize(
    "command, unneeded",
    [
        ("visualize", ("fastapi", "uvicorn", "faiss", "jieba", "numba", "nltk")),
        ("explore", ("jieba", "numba", "matplotlib", "nltk")),
    ],
)
def test_a_command_loads_only_what_it_needs(command, unneeded):
    code = f"import sys; from scripts import {command}; print(*({set(unneeded)} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


def test_search_draws_the_attention_of_each_word(toy, capsys):
    figure = draw("search", "--model_path", toy / "attention.pth.tar", "--sentence", "a red xyzzy", "--top", "2")
    titles = [axis.get_title() for axis in figure.axes]
    assert [title for title in titles if title] == ["a", "red", "xyzzy (unknown)"]
    assert capsys.readouterr().out == "not in the vocabulary, read as <unk>: xyzzy\n"
    assert len(figure.axes) == 2 * 4
    assert all(len(axis.patches) == 4 for axis in figure.axes)  # regions on a blank frame


def test_ablation_bars_are_the_recalls_with_their_intervals(toy, capsys):
    figure = draw("ablation", "--model_path", toy / "attention.pth.tar", toy / "none.pth.tar")
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    printed = [line.split(": ")[1].split(" [")[0] for line in capsys.readouterr().out.splitlines() if " R@" in line]
    assert len(bars) == 12 and [f"{bar:.1f}" for bar in bars] == [x for x in printed if x.count(".") == 1]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0].startswith("PFAN-A t2i, rsum ") and labels[1].startswith("SCAN t2i, rsum ")


def test_curves_are_what_was_logged(toy):
    scalars = visualize.read_run(str(toy / "run"))
    assert scalars["Le"].tolist() == [[step, 20.0 - step] for step in range(20)]
    assert scalars["rsum"].tolist() == [[9, 90.0], [19, 190.0]]
    figure = draw("curves", toy / "run")
    (line,) = figure.axes[1].lines
    assert line.get_xydata().tolist() == [[9, 90.0], [19, 190.0]]


def test_a_file_cut_short_keeps_its_whole_events(toy, tmp_path):
    (source,) = (toy / "run").iterdir()
    (tmp_path / source.name).write_bytes(source.read_bytes()[:-7])
    scalars = visualize.read_run(str(tmp_path))
    assert scalars["Le"].shape == (20, 2) and len(scalars["rsum"]) == 1


def test_the_running_mean_of_a_constant_is_the_constant():
    assert visualize.smooth(np.full(50, 3.0)) == pytest.approx(3.0)


def test_position_maps_compare_cells_by_what_fc_makes_of_them(toy):
    figure = draw("positions", "--model_path", toy / "attention.pth.tar")
    mosaic = np.asarray(figure.axes[0].images[0].get_array())
    for row, column in ((0, 0), (3, 11), (15, 15)):
        shown = mosaic[18 * row + 1 : 18 * row + 17, 18 * column + 1 : 18 * column + 17]
        assert shown[row, column] == pytest.approx(1, abs=1e-5) == shown.max()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("positions", "--model_path", "{}/none.pth.tar"), "none.pth.tar: holds no position embedding"),
        (("captions", "--model_path", "{}/none.pth.tar", "--picture", "8"), "--picture 8: expected 0 to 7"),
        (("curves", "{}/vocab"), "vocab: no TensorBoard files"),
        (("search", "--model_path", "{}/none.pth.tar", "--sentence", " "), "expected at least one word"),
        (("search", "--model_path", "{}/none.pth.tar", "--sentence", "xyzzy!"), "is in the vocabulary (xyzzy)"),
        (("search", "--model_path", "{}/none.pth.tar", "--sentence", "a", "--top", "99"), "expected --top 1 to 10"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(toy, tmp_path, monkeypatch, capsys, flags, said):
    words = [word.format(toy) for word in flags]
    monkeypatch.setattr("sys.argv", ["visualize.py", *words, "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as left:
        run(visualize.main)
    assert left.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1] and not os.listdir(tmp_path)


@pytest.mark.parametrize("flags", [("search", "--sentence", "a red ball"), ("captions", "--picture", "3")])
def test_features_that_give_nan_are_one_line(tmp_path, monkeypatch, capsys, flags):
    where = make_folder(tmp_path, splits={"dev": 6, "test": 8}, n_regions=4)
    save_model(tmp_path / "model.pth.tar", *where)
    features = tmp_path / "data" / "toy_precomp" / "test_ims.npy"
    np.save(features, np.full_like(np.load(features), 3e38))  # float32's largest: sums of it are infinite
    out = tmp_path / "x.png"
    line = ["visualize.py", *flags, "--model_path", str(tmp_path / "model.pth.tar"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as left:
        run(visualize.main)
    last = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and not out.exists()
    assert last.startswith(f"error: {tmp_path / 'model.pth.tar'}: picture ") and f"of {features} gives NaN" in last


def test_an_ablation_on_other_captions_of_the_same_number_is_refused(toy, tmp_path):
    """Flickr30K's and MS-COCO's test splits both have 1,000 pictures of 5 captions."""
    where = make_folder(tmp_path, splits={"dev": 6, "test": 8}, n_regions=4, seed=1)
    save_model(tmp_path / "other.pth.tar", *where)
    with pytest.raises(InputError, match="other.pth.tar: ranks the test split of .*, other captions than"):
        draw("ablation", "--model_path", toy / "attention.pth.tar", tmp_path / "other.pth.tar")


def test_a_run_that_logged_none_of_the_curves_is_refused(tmp_path):
    log = tensorboard_logger.Logger(str(tmp_path / "other"), flush_secs=1)
    log.log_value("accuracy", 1.0, step=1)
    with pytest.raises(InputError, match="other: logs accuracy, expected Le, rsum, r1, r1i of train.py"):
        draw("curves", tmp_path / "other")


def test_a_file_that_is_no_tensorboard_file_is_an_error(tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not a TensorBoard file"):
        visualize.read_run(str(tmp_path))
