"""scripts/flickr8k.sh on drawn images, from files as Flickr8k's are published to recalls; compare_runs.py."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from dataset_commands import call, ok
from folders import write_lines
from PIL import Image

from evaluation import evalrank
from lib.errors import InputError
from lib.files import digest_lines
from scripts.demo import regions, scenes, sentences
from scripts.features import compare_runs

SPLITS = {"train": 10, "dev": 3, "test": 3}
LINE = "  (.*): ([.0-9]+), ([.0-9]+), difference (\\S+), over images \\[(.*), (.*)\\], over seeds \\[(.*), (.*)\\]"
SMALL = "--embed_size 64 --word_dim 64 --batch_size 25 --num_epochs 40 --lr_update 35 --mean_warmup_epochs 20".split()


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory):
    """A folder with photos/, Flickr8k.token.txt, boxes.npz and the three lists under their official names."""
    folder, rng = tmp_path_factory.mktemp("flickr8k"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    boxes, lines = {}, []
    for split, n in SPLITS.items():
        names = [f"{split}_{i}.png" for i in range(n)]
        for name in names:
            (scene,) = scenes.make_group(rng, 1)
            Image.fromarray(scenes.render(rng, scene)).save(folder / "photos" / name)
            boxes[name] = regions.propose(rng, scene)
            lines += [f"{name}#{i}\t{sentences.caption(rng, scene)}" for i in range(5)]
        write_lines(folder / f"Flickr_8k.{split}Images.txt", names)
    write_lines(folder / "Flickr8k.token.txt", lines)
    np.savez(folder / "boxes.npz", ids=list(boxes), boxes=np.stack(list(boxes.values())))
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """chain(folder, flags) runs a copy of the script: CompletedProcess.

    Its python does nothing, except for the check of the flags.
    """
    place = tmp_path_factory.mktemp("script")
    (place / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/flickr8k.sh", place / "scripts")
    (place / "python").write_text(f'#!/bin/sh\n[ "$1" != -c ] || {{ cd "{ROOT}" && exec "{sys.executable}" "$@"; }}\n')
    (place / "python").chmod(0o755)

    def run(folder, *flags):
        files = [folder / name for name in ("photos", "Flickr8k.token.txt", ".", "boxes.npz")]
        env = {**os.environ, "OUT": str(folder), "PATH": f"{place}:{os.environ['PATH']}"}
        command = ["sh", place / "scripts/flickr8k.sh", *files, *flags]
        return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def trained(flickr8k, chain):
    """The folder after the commands of the script; the commands, each a list of words; what they printed."""
    done = chain(flickr8k, *SMALL)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("+ python ")]
    said = [ok(path.removeprefix("scripts/").removesuffix(".py"), *words) for path, *words in commands]
    return flickr8k, [path for path, *_ in commands], "".join(said)


def test_the_chain_goes_from_photographs_to_recalls_with_intervals(trained):
    folder, commands, said = trained
    tools = ["captions_to_dataset", "extract_features", "extract_features", "reduce_features"]
    tools += ["vocab", "check_data", "train", "evaluation"]
    assert [os.path.basename(path).removesuffix(".py") for path in commands] == tools
    assert "36 boxes in pixels for each of 16 images" in said and "ready to train" in said
    assert "Images: 3, Captions: 15" in said and "95 % intervals" in said
    for split, n in SPLITS.items():
        features = np.load(folder / f"data/flickr8k/{split}_ims.npy")
        assert features.shape == (n, 24, 512) and features.dtype == np.float16 and np.isfinite(features).all()
    result = evalrank(str(folder / "runs/flickr8k/t2i_attention_seed0/model_best.pth.tar"), split="train")
    assert result["n_images"] == 10 and result["n_captions"] == 50
    assert result["i2t"][0] > 50 and result["t2i"][0] > 50  # R@1, chance is 10


def compare(*args):
    """What compare_runs.py prints."""
    done = call(compare_runs.main, "compare_runs.py", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_becomes_one_row_of_the_table_of_results(trained):
    folder, *_ = trained
    run, table = folder / "runs/flickr8k/t2i_attention_seed0", folder / "results.csv"
    for minutes in ("1", "2"):
        said = compare("record", run, "--features", "boxes", "--out", table, "--minutes", minutes)
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    expected = {"model": "PFAN-A", "features": "boxes", "cross_attn": "t2i", "seed": "0", "embed_size": "64"}
    expected |= {"epochs": "40", "mean_warmup_epochs": "20", "amp": "False", "minutes": "2"}
    assert row.items() >= expected.items()
    recalls = [row[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert f"Image to text: {' '.join(recalls[:3])} " in said and f"Text to image: {' '.join(recalls[3:])} " in said
    assert float(row["rsum_low"]) <= float(row["rsum"]) <= float(row["rsum_high"])
    ranks = run / "test_ranks.pth.tar"
    captions = folder / "data/flickr8k/test_caps.txt"
    said = compare(captions, "--first", ranks, ranks, "--second", ranks, ranks)
    assert said.startswith("15 captions, 2 seeds\n")
    assert said.count("difference +0.0, over images [+0.0, +0.0], over seeds [+0.0, +0.0]") == 7 + 3
    assert "captions with a word of place: 15 of 15\n" in said and said.endswith("captions without: 0 of 15\n")


def test_a_run_is_not_continued_with_other_flags(trained, chain):
    done = chain(trained[0], *SMALL, "--embed_size", "32")
    assert done.returncode == 2 and "RUN=NAME names another run" in done.stderr


@pytest.mark.parametrize(
    "missing, flags, said",
    [
        ("photos", "", "photos: no such file"),
        ("Flickr8k.token.txt", "", "Flickr8k.token.txt: no such file"),
        ("Flickr_8k.devImages.txt", "", "no dev_ids.txt or Flickr_8k.devImages.txt"),
        ("", "--embed_sise 64", "unrecognized arguments: --embed_sise"),
        ("", "--agg_func Median", "--agg_func Median: expected one of LogSumExp, Mean"),
    ],
)
def test_what_is_missing_or_misspelt_is_named_before_anything_is_made(flickr8k, chain, tmp_path, missing, flags, said):
    for path in flickr8k.iterdir():
        if path.name not in (missing, "data", "vocab", "runs"):
            (tmp_path / path.name).symlink_to(path)
    done = chain(tmp_path, *flags.split())
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "error: " in error and said in error
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


def test_differences_and_their_intervals_are_of_all_captions_and_of_those_with_a_word_of_place(tmp_path):
    rng, place = np.random.default_rng(0), np.arange(500) % 4 == 0
    texts = ["A dog LEFT of a ball .", "a leftover meal", "a dog in the grass", "two men and a table"]
    write_lines(tmp_path / "caps.txt", [texts[i % 4] for i in range(500)])
    models = rng.integers(0, 12, (2, 3, 500))  # of three seeds
    for model, seeds in zip("AB", models, strict=True):
        for i, t2i in enumerate(seeds):
            ranks = {"rt": (torch.tensor(t2i[:100]), None), "rti": (torch.tensor(t2i), None)}
            torch.save(ranks, tmp_path / f"{model}{i}")
    first, second = ([tmp_path / f"{model}{i}" for i in range(3)] for model in "AB")
    said = compare(tmp_path / "caps.txt", "--first", *first, "--second", *second).splitlines()
    assert said[8] == "captions with a word of place: 125 of 500" and said[12] == "captions without: 375 of 500"
    widths = []
    for start, chosen in ((4, place | True), (9, place), (13, ~place)):
        for line, k in zip(said[start : start + 3], (1, 5, 10), strict=True):
            recalls = 100 * (models[:, :, chosen] < k).mean(2)  # (2, seeds)
            each = recalls[0] - recalls[1]
            half = 4.302653 * each.std(ddof=1) / np.sqrt(3)  # 97.5 % of Student's t with two degrees of freedom
            name, *numbers = re.fullmatch(LINE, line).groups()
            *found, low, high, low_of_seeds, high_of_seeds = map(float, numbers)
            assert name == f"t2i R@{k}"
            expected = [*recalls.mean(1), each.mean(), each.mean() - half, each.mean() + half]
            np.testing.assert_allclose([*found, low_of_seeds, high_of_seeds], expected, atol=0.051)
            assert low < each.mean() < high
            widths.append(high - low)
    assert (np.array(widths[:3]) < widths[3:6]).all()  # fewer captions, a wider interval


def test_ranks_of_another_split_are_refused(tmp_path):
    path, captions = tmp_path / "ranks.pth.tar", [f"caption {i}" for i in range(50)]
    ranks = {"rt": (torch.zeros(10), None), "rti": (torch.zeros(50), None)}
    torch.save(ranks, path)  # as older versions wrote them
    assert [len(ranks) for ranks in compare_runs.read_ranks(path, captions, 10)] == [10, 50]
    with pytest.raises(InputError, match="ranks of 10 and 50, expected those of 20 images and 100 captions"):
        compare_runs.read_ranks(path, 2 * captions, 20)
    torch.save({**ranks, "captions": digest_lines(captions)}, path)
    compare_runs.read_ranks(path, captions, 10)
    with pytest.raises(InputError, match="ranks of as many, but other captions"):
        compare_runs.read_ranks(path, captions[::-1], 10)
