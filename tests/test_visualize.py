"""Figures: each command writes an image, from the numbers that the rest of the project computes."""

import io
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import ROOT
from dataset_commands import fails, ok
from folders import make_folder, save_model
from matplotlib import font_manager
from PIL import Image
from processes import run

from lib import events
from scripts import visualize


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Untrained checkpoints and runs' logs; the folder."""
    root = tmp_path_factory.mktemp("figures")
    where = make_folder(root, splits={"dev": 6, "test": 8}, n_regions=4)
    save_model(root / "attention.pth.tar", *where)
    save_model(root / "none.pth.tar", *where, position="none")
    other = make_folder(root / "other", splits={"dev": 6, "test": 8}, n_regions=4, seed=1)
    save_model(root / "other.pth.tar", *other)  # of as many images and captions
    huge = make_folder(root / "huge", splits={"dev": 6, "test": 8}, n_regions=4)
    save_model(root / "huge.pth.tar", *huge)
    features = root / "huge" / "data" / "toy_precomp" / "test_ims.npy"
    np.save(features, np.full_like(np.load(features), 3e38))  # float32's largest: sums of it are infinite
    log_run(root / "_run", "a")
    log_run(root / "accuracy", "a", "accuracy")
    os.mkdir(root / "older")  # of a version that wrote TensorBoard's files only
    for path in (root / "_run").glob("*tfevents*"):
        path.rename(root / "older" / path.name)
    return root


def log_run(folder, run_mark, name="rsum", steps=range(20), offset=0.0):
    """Log a run as train.py does: a number of every step, another one after every tenth."""
    events.configure(str(folder), run_mark)
    for step in steps:
        events.log_value("Le" if name == "rsum" else name, offset + 20.0 - step, step)
        if step % 10 == 9:
            events.log_value(name, offset + 10.0 * step, step)
    events.close()


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def draw(*flags):
    """The figure of a command line, drawn but not written."""
    opt = visualize.get_parser().parse_args([*map(str, flags), "--out", "x.png"])
    return opt.draw(opt)


FIGURES = [
    # a price and half of an emoji
    ("search", "--model_path", "{}/attention.pth.tar", "--sentence", "a $5 or $10_ ball \ud83d", "--top", "2"),
    ("positions", "--model_path", "{}/attention.pth.tar"),
    ("curves", "{}/_run", "{}/older"),
    ("ablation", "--model_path", "{}/attention.pth.tar", "{}/none.pth.tar"),
]


@pytest.mark.parametrize("flags", FIGURES, ids=[flags[0] for flags in FIGURES])
def test_every_figure_is_written_as_a_png(toy, tmp_path, flags):
    out = tmp_path / "figure.png"
    ok("visualize", *(word.format(toy) for word in flags), "--out", out, "--dpi", "40")
    with Image.open(out) as image:
        assert image.format == "PNG" and len(np.unique(image.convert("L"))) > 5
    assert os.listdir(tmp_path) == ["figure.png"]


def test_figures_need_no_package_of_the_server_and_the_explorer():
    unneeded = {"fastapi", "uvicorn", "faiss", "jieba", "numba", "nltk"}
    code = f"import sys; from scripts import visualize; print(*({unneeded} & set(sys.modules)))"
    loaded = run([sys.executable, "-c", code], cwd=ROOT)
    assert (loaded.returncode, loaded.stdout.split()) == (0, []), loaded.stderr


def test_search_draws_the_attention_of_each_word(toy, capsys):
    figure = draw("search", "--model_path", toy / "attention.pth.tar", "--sentence", "a red xyzzy", "--top", "2")
    titles = [axis.get_title() for axis in figure.axes]
    assert [title for title in titles if title] == ["a", "red", "xyzzy (unknown)"]
    assert capsys.readouterr().out == "not in the vocabulary, read as <unk>: xyzzy\n"
    assert len(figure.axes) == 2 * 4
    assert all(len(axis.patches) == 4 for axis in figure.axes)  # regions on a blank frame


def test_a_character_that_the_usual_font_lacks_is_drawn_by_one_that_has_it(recwarn):
    fonts = [font.fname for font in font_manager.fontManager.ttflist if font.name != visualize.PLACEHOLDERS]
    usual = font_manager.get_font(font_manager.findfont(visualize.FONT)).get_charmap()
    lacked = next(lacked for font in fonts if (lacked := {*font_manager.get_font(font).get_charmap()} - {*usual}))
    figure = plt.figure()
    visualize.show_as_typed([figure.text(0.5, 0.5, "a" + chr(min(lacked)))])
    figure.savefig(io.BytesIO())
    assert not [str(warning.message) for warning in recwarn if "missing from font" in str(warning.message)]


def test_ablation_bars_are_the_recalls_with_their_intervals(toy, capsys):
    figure = draw("ablation", "--model_path", toy / "attention.pth.tar", toy / "none.pth.tar")
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    printed = [line.split(": ")[1].split(" [")[0] for line in capsys.readouterr().out.splitlines() if " R@" in line]
    assert len(bars) == 12 and [f"{bar:.1f}" for bar in bars] == [x for x in printed if x.count(".") == 1]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[0].startswith("PFAN-A t2i, rsum ") and labels[1].startswith("SCAN t2i, rsum ")


def curve_of(figure, number=1):
    """Labels and points of the lines of one of the curves' axes, 1 being rsum's."""
    return {line.get_label(): line.get_xydata().tolist() for line in figure.axes[number].lines}


@pytest.mark.parametrize("folder", ["_run", "older"])  # matplotlib leaves out labels with _
def test_curves_are_what_was_logged(toy, folder):
    figure = draw("curves", toy / folder)
    assert curve_of(figure) == {str(toy / folder): [[9, 90.0], [19, 190.0]]}
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == [str(toy / folder)]
    (loss,) = curve_of(figure, 0).values()
    assert loss == [[19, pytest.approx(10.5)]]  # the mean of 20 steps


def test_a_resumed_run_is_one_line_with_its_last_values_and_another_run_is_another_line(tmp_path):
    log_run(tmp_path, "a")
    log_run(tmp_path, "a", steps=range(15, 40), offset=0.5)
    points = [[9, 90.0], [19, 190.5], [29, 290.5], [39, 390.5]]
    assert curve_of(draw("curves", tmp_path)) == {str(tmp_path): points}
    log_run(tmp_path, "b", offset=0.5)
    expected = {f"{tmp_path}, run 1": points, f"{tmp_path}, run 2": [[9, 90.5], [19, 190.5]]}
    assert curve_of(draw("curves", tmp_path)) == expected


def test_logs_of_a_killed_run_keep_what_is_whole(toy, tmp_path):
    for folder, cut in (("older", 7), ("_run", 3)):
        (source,) = (toy / folder).iterdir()
        (tmp_path / folder).mkdir()
        (tmp_path / folder / source.name).write_bytes(source.read_bytes()[:-cut])
        assert list(curve_of(draw("curves", tmp_path / folder)).values()) == [[[9, 90.0]]]


def test_position_maps_compare_cells_by_what_fc_makes_of_them(toy):
    figure = draw("positions", "--model_path", toy / "attention.pth.tar")
    mosaic = np.asarray(figure.axes[0].images[0].get_array())
    for row, column in ((0, 0), (3, 11), (15, 15)):
        shown = mosaic[18 * row + 1 : 18 * row + 17, 18 * column + 1 : 18 * column + 17]
        assert shown[row, column] == pytest.approx(1, abs=1e-5) == shown.max()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("positions --model_path {}/none.pth.tar", "none.pth.tar: holds no position embedding"),
        ("curves {}/vocab", "vocab: no metrics.csv and no TensorBoard files"),
        ("curves {}/accuracy", "accuracy: logs accuracy, expected Le, rsum, r1, r1i of train.py"),
        ("search --model_path {}/none.pth.tar --sentence xyzzy!", "found xyzzy, expected at least one word"),
        ("search --model_path {}/huge.pth.tar --sentence red", "test_ims.npy gives NaN or infinite numbers, expected"),
        ("search --model_path {}/none.pth.tar --sentence red --top 99", "--top"),
        ("ablation --model_path {}/none.pth.tar {}/other.pth.tar", "other.pth.tar: ranks the test split of"),
        ("curves missing --out {}", "is no file, expected one or a free name"),  # told before the work
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(toy, tmp_path, flags, said):
    command, *words = flags.replace("{}", str(toy)).split()
    assert said in fails("visualize", command, "--out", tmp_path / "x.png", *words) and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name, said", [("events.out.tfevents.1", "not a TensorBoard file"), ("metrics.csv", "expected run,step,name,value")]
)
def test_a_file_of_another_kind_is_an_error(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"\x01\0\0\0\0\0\0\0".ljust(12) + b"\xff" * 100 + b"\n")
    assert said in fails("visualize", "curves", tmp_path, "--out", tmp_path / "x.png")
