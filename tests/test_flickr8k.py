"""scripts/flickr8k.sh on 60 photographs of Flickr8k: from files as they are published to recalls."""

import os
import re
import subprocess
import tarfile

import numpy as np
import pytest
from conftest import ROOT, SHARED
from folders import write_lines

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
    tools = ["captions_to_dataset", "extract_features", "vocab", "check_data", "train", "evaluation"]
    assert [os.path.basename(path).removesuffix(".py") for path in commands] == tools
    assert said.startswith("60 photographs, 40 of them to train; on one idle CPU core about\n  features 1 min")
    assert "36 boxes from 0 to 1 for each of 8091 pictures" in said and "ready to train" in said
    assert "Images: 10, Captions: 50" in said and "95 % intervals" in said
    for split, n in SPLITS.items():
        features = np.load(folder / f"data/flickr8k/{split}_ims.npy")
        assert features.shape == (n, 36, 1280) and features.dtype == np.float16 and np.isfinite(features).all()


def test_training_photographs_are_found_far_above_chance(trained):
    folder, _ = trained
    model = folder / "runs/flickr8k/t2i_attention_seed0/model_best.pth.tar"
    args = ["--model_path", model, "--split", "train"]
    done = subprocess.run(
        [ROOT / ".venv/bin/python", ROOT / "evaluation.py", *args], capture_output=True, text=True, timeout=120
    )
    assert "Images: 40, Captions: 200" in done.stdout, done.stderr
    for way in ("Image to text", "Text to image"):
        assert float(re.search(rf"{way}: ([\d.]+)", done.stdout)[1]) > 40  # chance is 2.5


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
