"""scripts/flickr8k.sh on 60 photographs of Flickr8k: from files as they are published to recalls."""

import csv
import os
import re
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from dataset_commands import call
from folders import write_lines

from evaluation import evalrank
from lib.errors import InputError
from lib.files import digest_lines
from scripts.features import compare_runs

SPLITS = {"train": 40, "dev": 10, "test": 10}
SMALL = "--embed_size 64 --word_dim 64 --batch_size 40 --num_epochs 30 --lr_update 25 --mean_warmup_epochs 15".split()


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory):
    """A folder with photos/, Flickr8k.token.txt, boxes.npz and the three lists under their official names."""
    source = SHARED / "real/flickr8k"
    if not (source / "photos.tar").is_file():
        pytest.skip("no ../shared/real/flickr8k beside this checkout: the photographs are not at hand")
    folder = tmp_path_factory.mktemp("flickr8k")
    (folder / "photos").mkdir()
    names = []
    for split, n in SPLITS.items():
        ids = (source / f"{split}_ids.txt").read_text().split()[:n]
        write_lines(folder / f"Flickr_8k.{split}Images.txt", ids)
        names += ids
    with tarfile.open(source / "photos.tar") as tar:
        for member in tar:
            if os.path.basename(member.name) in names:
                (folder / "photos" / os.path.basename(member.name)).write_bytes(tar.extractfile(member).read())
    lines, numbers = [], dict.fromkeys(names, 0)
    for line in (source / "captions.tsv").read_text().splitlines():
        name, caption = line.split("\t")
        if name in numbers:
            lines.append(f"{name}#{numbers[name]}\t{caption}")
            numbers[name] += 1
    write_lines(folder / "Flickr8k.token.txt", lines)
    (folder / "boxes.npz").symlink_to(source / "boxes.npz")
    return folder


def chain(folder, *args):
    files = [folder / "photos", folder / "Flickr8k.token.txt", folder, folder / "boxes.npz"]
    command = ["sh", ROOT / "scripts/flickr8k.sh", *files, *args]
    return subprocess.run(
        list(map(str, command)), env={**os.environ, "OUT": str(folder)}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def trained(flickr8k):
    """The folder after the chain, and what the chain printed."""
    done = chain(flickr8k, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return flickr8k, done.stdout


def test_the_chain_goes_from_photographs_to_recalls_with_intervals(trained):
    folder, said = trained
    commands = re.findall(r"^\+ python (\S+)", said, re.MULTILINE)
    tools = ["captions_to_dataset", "extract_features", "extract_features", "reduce_features"]
    tools += ["vocab", "check_data", "train", "evaluation"]
    assert [os.path.basename(path).removesuffix(".py") for path in commands] == tools
    assert said.startswith("60 photographs, 40 of them to train; on one idle CPU core about\n  features 1 min")
    assert "36 boxes from 0 to 1 for each of 8091 images" in said and "ready to train" in said
    assert "Images: 10, Captions: 50" in said and "95 % intervals" in said
    for split, n in SPLITS.items():
        features = np.load(folder / f"data/flickr8k/{split}_ims.npy")
        assert features.shape == (n, 24, 512) and features.dtype == np.float16 and np.isfinite(features).all()


def compare(*args):
    """What compare_runs.py prints."""
    done = call(compare_runs.main, "compare_runs.py", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_photographs_are_found_far_above_chance(trained):
    folder, _ = trained
    model = folder / "runs/flickr8k/t2i_attention_seed0/model_best.pth.tar"
    result = evalrank(str(model), split="train")
    assert result["n_images"] == 40 and result["n_captions"] == 200
    assert result["i2t"][0] > 40 and result["t2i"][0] > 40  # R@1, chance is 2.5


def test_a_run_becomes_one_row_of_the_table_of_results(trained):
    folder, _ = trained
    run, table = folder / "runs/flickr8k/t2i_attention_seed0", folder / "results.csv"
    for minutes in ("1", "2"):
        said = compare("record", run, "--features", "boxes", "--out", table, "--minutes", minutes)
    with open(table, newline="") as file:
        (row,) = csv.DictReader(file)
    expected = {"model": "PFAN-A", "features": "boxes", "cross_attn": "t2i", "seed": "0", "embed_size": "64"}
    expected |= {"epochs": "30", "mean_warmup_epochs": "15", "amp": "False", "minutes": "2"}
    assert row.items() >= expected.items()
    recalls = [row[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert f"Image to text: {' '.join(recalls[:3])} " in said and f"Text to image: {' '.join(recalls[3:])} " in said
    assert float(row["rsum_low"]) <= float(row["rsum"]) <= float(row["rsum_high"])
    ranks = run / "test_ranks.pth.tar"
    captions = folder / "data/flickr8k/test_caps.txt"
    said = compare(captions, "--first", ranks, ranks, "--second", ranks, ranks)
    assert said.startswith("50 captions, 2 seeds\n")
    assert said.count("difference +0.0, over images [+0.0, +0.0], over seeds [+0.0, +0.0]") == 7
    assert said.count("difference +0.0, over images [+0.0, +0.0]\n") == 6


def test_a_run_is_not_continued_with_other_flags(trained):
    folder, _ = trained
    done = chain(folder, *SMALL, "--embed_size", "32")
    assert done.returncode == 2 and "RUN=NAME names another run" in done.stderr


@pytest.mark.parametrize("missing", ["photos", "Flickr8k.token.txt", "Flickr_8k.devImages.txt"])
def test_what_is_missing_is_named(flickr8k, tmp_path, missing):
    for path in flickr8k.iterdir():
        if path.name not in (missing, "data", "vocab", "runs"):
            (tmp_path / path.name).symlink_to(path)
    done = chain(tmp_path)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and error.startswith("error: ") and missing in error
    assert not (tmp_path / "data").exists()


def test_captions_are_split_by_words_of_place():
    captions = ["A dog LEFT of a ball .", "a leftover meal", "two men behind a table", "a dog in the grass"]
    assert compare_runs.speaks_of_place(captions).tolist() == [True, False, True, False]


def test_the_difference_on_some_captions_is_that_of_their_recalls():
    rng = np.random.default_rng(0)
    ranks, others = rng.integers(0, 12, (2, 3, 500))  # three seeds
    chosen = rng.random(500) < 0.2
    first, second, mean, low, high = compare_runs.compare_chosen(ranks, others, chosen, 100)
    for i, k in enumerate((1, 5, 10)):
        np.testing.assert_allclose(first[i], 100 * (ranks[:, chosen] < k).mean())
        np.testing.assert_allclose(second[i], 100 * (others[:, chosen] < k).mean())
    np.testing.assert_allclose(mean, first - second, atol=1e-9)
    assert (low < mean).all() and (mean < high).all()
    *_, low_of_all, high_of_all = compare_runs.compare_chosen(ranks, others, np.ones(500, dtype=bool), 100)
    assert (high - low > high_of_all - low_of_all).all()  # fewer captions, a wider interval


def test_the_interval_over_seeds_is_students():
    low, high = compare_runs.over_seeds(np.array([[1.0], [2.0], [6.0]]))
    half = 4.302653 * np.sqrt(7.0) / np.sqrt(3)  # 97.5 % of Student's t with two degrees of freedom; variance 7
    np.testing.assert_allclose([low[0], high[0]], [3 - half, 3 + half], rtol=1e-3)


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
