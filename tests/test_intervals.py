"""Bootstrap intervals of recalls, and the paired difference of two models, as evalrank prints and returns them."""

import contextlib
import io

import numpy as np
import pytest
from dataset_commands import ok
from folders import make_folder, save_model

from evaluation import evalrank, i2t, t2i
from lib.errors import InputError
from lib.intervals import MEASURES, bootstrap, group_hits


def ranks_of(sims):
    return i2t(None, None, None, sims, return_ranks=True)[1][0], t2i(None, None, None, sims, return_ranks=True)[1][0]


@pytest.mark.parametrize("shape", [(20, 100), (60, 20)])
def test_the_mean_of_the_hits_is_the_recall(shape):
    sims = np.random.default_rng(0).standard_normal(shape)
    expected = [*i2t(None, None, None, sims)[:3], *t2i(None, None, None, sims)[:3]]
    assert group_hits(*ranks_of(sims)).mean(0) == pytest.approx([*expected, sum(expected)])


def test_95_of_100_intervals_hold_the_truth(monkeypatch):
    """400 draws of 150 images each from a population with 60 % hits; 3 standard errors of that share are allowed."""
    monkeypatch.setattr("lib.intervals.BLOCK", 150 * 300)  # several blocks
    rng = np.random.default_rng(1)
    samples = 100.0 * (rng.random((400, 150, 1)) < 0.6)
    held = [low[0] <= 60 <= high[0] for low, high in (bootstrap(sample, samples=1000) for sample in samples)]
    assert np.mean(held) == pytest.approx(0.945, abs=0.033)


def test_captions_of_one_image_count_as_one_draw():
    """Five captions that succeed or fail together say no more than one."""
    one = 100.0 * (np.random.default_rng(0).random((200, 1)) < 0.5)
    t2i_ranks = np.where(one.repeat(5), 0, 99)
    values = group_hits(np.where(one.ravel(), 0, 99), t2i_ranks)
    low, high = bootstrap(values)
    assert low[3] == low[0] and high[3] == high[0]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Two untrained checkpoints and one of another data set; returns their paths."""
    root = tmp_path_factory.mktemp("intervals")
    where = make_folder(root, splits={"dev": 6, "test": 25}, n_regions=4)
    save_model(root / "a.pth.tar", *where, seed=1)
    save_model(root / "b.pth.tar", *where, seed=2)
    other = make_folder(root / "other", splits={"dev": 6, "test": 10}, n_regions=4)
    save_model(root / "c.pth.tar", *other)
    return [str(root / f"{name}.pth.tar") for name in "abc"]


def printed(*args, **kwargs):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result = evalrank(*args, split="test", **kwargs)
    return result, out.getvalue()


@pytest.mark.parametrize("fold5", [False, True])
def test_evalrank_adds_intervals_only_when_asked(toy, fold5):
    plain, lines = printed(toy[0], fold5=fold5)
    assert "intervals" not in plain
    result, more = printed(toy[0], fold5=fold5, intervals=True)
    assert more.startswith(lines) and "95 % intervals" not in lines
    assert more.removeprefix(lines).splitlines()[0] == "95 % intervals, bootstrap over images:"
    assert list(result["intervals"]) == list(MEASURES)
    means = [mean for mean, _, _ in result["intervals"].values()]
    assert means == pytest.approx([*plain["i2t"][:3], *plain["t2i"][:3], plain["rsum"]])
    assert all(low <= mean <= high for mean, low, high in result["intervals"].values())


def test_evalrank_compares_two_models(toy):
    result, lines = printed(toy[0], versus=toy[1])
    rival, _ = printed(toy[1])
    assert result["versus"]["rsum"][0] == pytest.approx(rival["rsum"])
    assert result["difference"]["rsum"][0] == pytest.approx(result["rsum"] - rival["rsum"])
    assert "Paired difference, first minus other:\n  i2t R@1: " in lines and lines.count("[") == 21
    assert ok("evaluation", "--model_path", toy[0], "--split", "test", "--versus", toy[1]) == lines
    same, _ = printed(toy[0], versus=[toy[0]])
    assert set(same["difference"].values()) == {(0.0, 0.0, 0.0)}


def test_models_of_different_splits_are_not_compared(toy):
    with pytest.raises(InputError, match="c.pth.tar: ranks 10 images and 50 captions, the first model 25 and 125"):
        printed(toy[0], versus=toy[2])
