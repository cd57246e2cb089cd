"""scripts/benchmark.py: the published way agrees with this code, and a tiny run prints its table."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest
from folders import make_folder, save_model

from model import SCAN
from scripts import benchmark
from scripts.bench import measurements

TINY = {
    "repeats": 1,
    "embed_size": 32,
    "img_dim": 24,
    "word_dim": 16,
    "vocab_size": 50,
    "images": 12,
    "plain_images": 8,
    "plain_captions": 12,
    "batch_size": 8,
    "plain_batches": 2,
    "splits": [6],
    "batches": [4],
}


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_the_published_way_trains_as_this_code_does(way):
    s = Namespace(**{**benchmark.SIZES, **TINY, "device": "cpu"})
    ours, batch = measurements.make_model(SCAN, s, way), measurements.random_batch(s, 8)
    published = measurements.as_published(ours)
    steps = [(ours.train_emb(*batch).item(), published.train_emb(*batch).item()) for _ in range(3)]
    assert [a for a, _ in steps] == pytest.approx([b for _, b in steps], rel=1e-4)


def in_this_process(s, name, *arguments):
    return json.loads(json.dumps(getattr(measurements, name)(s, *arguments)))


def run_command(monkeypatch, *flags, measure=in_this_process):
    """Run benchmark.py with flags at tiny sizes."""
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "SIZES", {**benchmark.SIZES, **TINY})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device", "cpu", *map(str, flags)])
    benchmark.main()


def cells_of(printed):
    """{work: the other cells of its row} of a printed table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    return {work: cells for work, *cells in rows[2:]}


def test_a_tiny_run_prints_every_row_and_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "benchmark.json"
    run_command(monkeypatch, "--out", out)
    results, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert results["machine"]["processor"] in printed.splitlines()[0]
    table = cells_of(printed)
    assert [*table] == [row["work"] for row in results["rows"]]
    for row in results["rows"]:
        assert min(row["here"]["seconds"]) > 0 and row["here"]["memory_gb"] > 0
        assert row["here"].get("difference", 0) < (1e-2 if "medium" in row["work"] else 1e-5), row["work"]
    for work in ("score and rank 12 × 60, t2i", "score and rank 12 × 60, i2t, by `model.attend` alone"):
        reference, here, faster, products, memory, _, difference = table[work]
        assert reference and here and faster.endswith("×") and products.endswith("×") and memory.startswith("≥")
        assert float(difference) < 1e-5
    assert {"training step, batch 8, i2t", "training step, batch 4, t2i", "encode 12 images, 60 captions"} < {*table}
    assert {"score and rank 6 × 30, t2i", "position grids of 12 images"} < {*table}


def test_search_rows_compare_the_two_stages_with_an_exhaustive_search(tmp_path, monkeypatch, capsys):
    where = make_folder(tmp_path, splits={"dev": 6, "test": 30}, captions_per_image=2)
    for way in ("t2i", "i2t"):
        save_model(tmp_path / f"{way}.pth.tar", *where, cross_attn=way)
        flags = ("--model_path", tmp_path / f"{way}.pth.tar", "--sizes", "25", "30", "--candidates", "12", "30")
        run_command(monkeypatch, "--only", "search", *flags, "--queries", "3", "--out", tmp_path / "x.json")
        table = cells_of(capsys.readouterr().out)
        assert [*table] == [f"best 10 of {n} images for a sentence, 12 scored exactly" for n in (25, 30)]
        missed = [row["here"]["difference"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]]
        assert all(0 < share < 0.8 for share in missed)  # by chance 0.52 and 0.6


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--only", "search"], "--only search: expected --model_path"),
        (["--sizes", "5"], "expected --sizes and --candidates of 10 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(tmp_path, monkeypatch, capsys, flags, said):
    with pytest.raises(SystemExit) as left:
        run_command(monkeypatch, *flags, "--out", tmp_path / "x.json", measure=lambda *_: pytest.fail("measured"))
    assert left.value.code == 2 and said in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_measurement_runs_in_a_process_of_its_own():
    ballast = np.ones(10**9, np.uint8)
    s = Namespace(**{**benchmark.SIZES, **TINY, "device": "cpu"})
    result = benchmark.measure(s, "train_published", "t2i")
    assert len(result["seconds"]) == 1 and 0 < result["memory_gb"] < ballast.nbytes / 1e9
