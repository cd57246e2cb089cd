"""The variant that CONTRIBUTING.md shows, word for word."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from folders import make_folder

from evaluation import load_split, score_split


@pytest.fixture
def mine(tmp_path):
    """The module mine.py of CONTRIBUTING.md, run as a file on a small data set: its folder and what it printed."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(code)
    data_path, vocab_path = make_folder(str(tmp_path), n_regions=6)
    flags = f"--data_path {data_path} --vocab_path {vocab_path} --data_name toy_precomp --img_dim 16 --embed_size 8"
    flags += f" --word_dim 8 --num_epochs 1 --workers 0 --model_name {tmp_path}/run --logger_name {tmp_path}/run"
    line = [sys.executable, tmp_path / "mine.py", *flags.split()]
    done = subprocess.run(line, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tmp_path, done.stdout


def test_a_variant_of_score_and_data_is_trained_and_ranked(mine, monkeypatch):
    folder, printed = mine
    monkeypatch.syspath_prepend(folder)
    import mine as module

    model, loader = load_split(f"{folder}/run/model_best.pth.tar", split="test", make_model=module.Mine)
    features, boxes = loader.dataset.features([0, 1])
    assert torch.equal(2 * features, torch.from_numpy(np.array(loader.dataset.images[:2])))
    words = model.encode_captions(loader.dataset.encode_caption(0)[None], [len(loader.dataset.encode_caption(0))])
    images = model.encode_images(features, boxes)
    both = [super(module.Mine, model).score(*images, *words, cross_attn=way) for way in ("t2i", "i2t")]
    [sims] = score_split(model, loader)
    np.testing.assert_allclose(sims[:2, :1], (sum(both) / 2).detach().numpy(), atol=1e-6)
    assert printed.startswith("Images: 6, Captions: 30\n")
