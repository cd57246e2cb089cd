"""Training as a user runs it: SCAN's flags in; checkpoints, log lines, TensorBoard events and metrics.csv out."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_commands import command, tool
from folders import write_lines
from training import Place, WholePlace, assert_same, change, load, metrics, values

from evaluation import evalrank
from scripts.explorer.logs import read_events
from vocab import from_txt

TRAIN_TAGS = {"epoch", "step", "Eit", "Le", "lr", "batch_time", "data_time"}
DEV_TAGS = {"r1", "r5", "r10", "medr", "meanr", "r1i", "r5i", "r10i", "medri", "meanri", "rsum"}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# ---------------------------------------------------------------- a run from the command line


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two epochs of train.py with the README's flags, as users of the published code have them in their scripts."""
    place = Place(tmp_path_factory.mktemp("run"))
    done = command("train", *place.line("models", "--num_epoches 2 --log_step 2 --workers 2"))
    assert done.returncode == 0, done.stderr
    done.folder = place.root / "models"
    return done


def test_every_epoch_leaves_a_checkpoint_and_the_best_one_its_copy(done):
    names = sorted(path.name for path in done.folder.glob("*.tar"))
    assert names == ["checkpoint_0.pth.tar", "checkpoint_1.pth.tar", "model_best.pth.tar"]
    first, second, best = (load(done.folder, name.split(".")[0]) for name in names)
    assert (first["epoch"], second["epoch"]) == (1, 2), "epoch counts finished epochs"
    assert (first["Eiters"], second["Eiters"]) == (4, 8), "60 pairs in batches of 16"
    rsums = [float(found) for found in re.findall(r"rsum: ([\d.]+)", done.stderr)]
    assert first["best_rsum"] == pytest.approx(rsums[0], abs=0.06)
    assert second["best_rsum"] == best["best_rsum"] == pytest.approx(max(rsums), abs=0.06)
    assert_same(best, first if rsums[0] >= rsums[1] else second)
    evaluated = command("evaluation", "--model_path", done.folder / "model_best.pth.tar", "--split", "dev")
    assert "Images: 6, Captions: 30" in evaluated.stdout, evaluated.stderr
    assert float(re.search(r"rsum: ([\d.]+)", evaluated.stdout)[1]) == pytest.approx(best["best_rsum"], abs=0.06)


def test_a_checkpoint_holds_what_the_published_code_reads(done):
    # weights_only=False is how the published code loads; the file is our own
    checkpoint = torch.load(done.folder / "model_best.pth.tar", weights_only=False)
    assert {"epoch", "model", "best_rsum", "opt", "Eiters", "optimizer"} <= set(checkpoint)
    image, text = checkpoint["model"]
    assert {name.split(".")[0] for name in image} == {"fc", "fc_att", "position_embedding"}
    assert {name.split(".")[0] for name in text} == {"embed", "rnn"}
    assert image["position_embedding.weight"].shape == (257, 200) and image["fc.weight"].shape == (24, 216)
    opt = checkpoint["opt"]
    assert isinstance(opt, argparse.Namespace)
    assert (opt.num_epochs, opt.agg_func, opt.max_violation, opt.position) == (2, "Mean", True, "attention")
    assert opt.vocab_size == len(text["embed.weight"])


def test_the_log_says_how_far_training_is_and_how_good(done):
    line = r"Epoch: \[0\]\[1/4\]\tEit 2  lr 0.001  Le [\d.]+ \([\d.]+\)\tTime [\d.]+ .*\tData [\d.]+"
    assert re.search(line, done.stderr)
    assert len(re.findall(r"Epoch: \[", done.stderr)) == 4  # 8 steps, a line every 2
    numbers = r"([\d.]+, ){4}[\d.]+"
    assert len(re.findall(rf"Image to text: {numbers}\n", done.stderr)) == 2
    assert len(re.findall(rf"Text to image: {numbers}\n", done.stderr)) == 2
    assert "60 pairs" in done.stderr


def test_tensorboard_and_metrics_csv_get_every_tag_of_every_step(done):
    found = metrics(done.folder / "log")
    (path,) = (done.folder / "log").glob("events.out.tfevents.*")
    for tag, values_by_step in read_events(path).items():
        assert values_by_step == pytest.approx({step: value for name, step, value in found if name == tag}), tag
    for tags, steps in ((TRAIN_TAGS, list(range(1, 9))), (DEV_TAGS, [4, 8])):
        for tag in tags:
            assert [step for name, step, _ in found if name == tag] == steps, tag
    by_tag = {tag: [value for name, _, value in found if name == tag] for tag, _, _ in found}
    assert set(by_tag) == set(read_events(path)) == TRAIN_TAGS | DEV_TAGS
    assert by_tag["epoch"] == [0] * 4 + [1] * 4 and by_tag["step"] == [0, 1, 2, 3] * 2
    recalls = zip(*(by_tag[tag] for tag in ("r1", "r5", "r10", "r1i", "r5i", "r10i")), strict=True)
    assert by_tag["rsum"] == pytest.approx([sum(row) for row in recalls], rel=1e-5)


# ---------------------------------------------------------------- what flags promise


def test_the_same_seed_trains_the_same_model_whatever_the_workers(place):
    one, same, other = (
        load(place.fit("one")),
        load(place.fit("same", "--workers 2")),
        load(place.fit("two", "--seed 1")),
    )
    assert_same(one, same)
    with pytest.raises(AssertionError):
        assert_same(one["model"], other["model"])


@pytest.mark.parametrize("kind", [Place, WholePlace])
def test_a_resumed_run_ends_where_an_unbroken_one_does(kind, tmp_path):
    place = kind(tmp_path, "--lr_update 1 --workers 2 --num_epochs 3")
    straight, broken = place.fit("straight"), place.fit("broken", "--num_epochs 1")
    resumed = place.fit("resumed", f"--resume {broken}/checkpoint_0.pth.tar")
    assert not (resumed / "checkpoint_0.pth.tar").exists()
    for name in ("checkpoint_1", "checkpoint_2"):
        assert_same(load(straight, name), load(resumed, name))
    assert load(resumed, "checkpoint_2")["optimizer"]["state"], "Adam's moments are kept"


def test_resuming_keeps_the_best_score_and_the_log_names_no_best_checkpoint_that_is_not_there(place, caplog):
    caplog.set_level("INFO")
    folder = place.fit("run")
    best = (folder / "model_best.pth.tar").read_bytes()
    change(folder / "checkpoint_0.pth.tar", best_rsum=600.0)
    for name in ("run", "elsewhere"):
        resumed = place.fit(name, f"--num_epochs 2 --resume {folder}/checkpoint_0.pth.tar")
        assert load(resumed, "checkpoint_1")["best_rsum"] == 600.0
    assert (folder / "model_best.pth.tar").read_bytes() == best
    for path in re.findall(r"\S+model_best\.pth\.tar", caplog.text):
        assert Path(path).exists(), path


def test_even_a_model_that_tells_nothing_apart_leaves_a_best_checkpoint(tmp_path):
    """Ties count against a model: with equal images and equal captions its rsum is 0."""
    place = Place(tmp_path, splits={"train": 4, "dev": 12}, captions_per_image=1)
    for split, n in (("train", 4), ("dev", 12)):
        prefix = Path(place.data_path) / "toy_precomp" / split
        np.save(f"{prefix}_ims.npy", np.zeros((n, 4, 16), np.float32))
        np.save(f"{prefix}_boxes.npy", np.tile([*range(15), *[1 / 15] * 15], (n, 4, 1)).astype(np.float32))
        write_lines(f"{prefix}_caps.txt", ["a man runs"] * n * 5)
    assert load(place.fit("models"), "model_best")["best_rsum"] == 0


def test_a_published_checkpoint_without_optimizer_resumes_with_a_warning(place, caplog):
    checkpoint = torch.load(place.fit("run") / "checkpoint_0.pth.tar", weights_only=False)
    del checkpoint["optimizer"]
    for flag in ("position", "seed", "device", "amp", "matmul_precision", "allow_empty_captions"):
        delattr(checkpoint["opt"], flag)
    path = place.root / "published.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    resumed = load(place.fit("more", f"--num_epochs 2 --resume {path}"), "checkpoint_1")
    assert "published.pth.tar holds no optimizer state" in caplog.text
    assert (resumed["epoch"], resumed["Eiters"]) == (2, 8)


def test_the_learning_rate_falls_to_a_tenth_every_lr_update_epochs(place):
    folder = place.fit("run", "--num_epochs 4 --lr_update 2 --batch_size 30")
    assert values(folder, "lr") == pytest.approx([1e-3] * 4 + [1e-4] * 4)


def test_mean_warmup_epochs_count_all_negatives_before_the_hardest(place, caplog):
    """The first epochs are those of a run without --max_violation, also where the warm-up is resumed in its middle."""
    caplog.set_level("INFO")
    flags = "--mean_warmup_epochs 2 --num_epochs"
    losses = values(place.fit("warm", f"{flags} 3"), "Le")
    said = re.findall(r"step (\d): the loss counts (.*) negatives", caplog.text)
    assert said == [("0", "all"), ("8", "only the hardest")]
    hardest = values(place.fit("hardest"), "Le")
    assert len(losses) == 12 and losses[0] > 2 * hardest[0], "16 negatives a pair are more than the hardest one"
    assert max(losses[8:]) < min(losses[:8])
    place.fit("broken", f"{flags} 1")
    caplog.clear()
    resumed = place.fit("broken", f"{flags} 3 --resume auto")
    assert_same(load(resumed, "checkpoint_2"), load(place.root / "warm", "checkpoint_2"))
    assert re.findall(r"the loss counts (.*) negatives", caplog.text) == ["all", "only the hardest"]


def test_val_step_validates_within_an_epoch(place):
    folder = place.fit("run", "--batch_size 10 --val_step 2")
    steps = [step for name, step, _ in metrics(folder / "log") if name == "rsum"]
    assert steps == [2, 4, 6, 6]  # the last at the epoch's end


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_a_last_batch_of_one_is_trained(place, way):
    assert values(place.fit("run", f"--batch_size 59 --cross_attn {way}"), "Le")[1] == 0


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        ("--position attention --cross_attn i2t --lambda_softmax 4", {"fc", "fc_att", "position_embedding"}),
        ("--position area", {"fc", "position_embedding"}),
        ("--position none --agg_func LogSumExp", {"fc"}),
        ("--precomp_enc_type weight_norm", {"fc", "fc_att", "position_embedding"}),
        ("--raw_feature_norm l1norm --agg_func Sum --num_layers 2 --no_imgnorm --no_txtnorm --amp", None),
    ],
)
def test_every_variant_trains_and_is_evaluated_as_it_was_trained(place, flags, parameters):
    folder = place.fit("run", flags)
    checkpoint = load(folder)
    image = checkpoint["model"][0]
    assert parameters is None or {name.split(".")[0] for name in image} == parameters
    if "weight_norm" in flags:
        assert {"fc.weight_g", "fc.weight_v", "fc.bias"} <= set(image)
    result = evalrank(str(folder / "checkpoint_0.pth.tar"), split="dev")
    assert result["rsum"] == pytest.approx(checkpoint["best_rsum"], abs=1e-3)


# ---------------------------------------------------------------- real photographs


@pytest.mark.parametrize("attention", ["--cross_attn=t2i --lambda_softmax=9", "--cross_attn=i2t --lambda_softmax=4"])
def test_real_photographs_are_learned_from_the_command_line(shared, tmp_path, attention):
    """The first 50 photographs and their 250 captions; chance is R@10 = 20 either way."""
    real, folder = shared / "real" / "flickr8k_precomp", tmp_path / "flickr8k_precomp"
    folder.mkdir()
    for kind in ("ims", "boxes"):
        np.save(folder / f"train_{kind}.npy", np.load(real / f"train_{kind}.npy", mmap_mode="r")[:50])
    write_lines(folder / "train_caps.txt", from_txt(real / "train_caps.txt")[:250])
    for path in real.glob("dev_*"):
        (folder / path.name).symlink_to(path)
    data = ["--data_path", tmp_path, "--data_name", "flickr8k_precomp", "--vocab_path", tmp_path / "vocab"]
    assert tool("vocab", *data).returncode == 0
    flags = "--max_violation --bi_gru --agg_func=Mean --batch_size=16 --val_step=2000000 --workers=0 --num_epochs=5"
    flags += " --mean_warmup_epochs=3 --learning_rate=.0005 --embed_size=64 --word_dim=32 --img_dim=1280 " + attention
    done = tool("train", *data, "--logger_name", tmp_path, "--model_name", tmp_path, *flags.split())
    assert done.returncode == 0, done.stderr
    done = tool("evaluation", "--model_path", tmp_path / "checkpoint_4.pth.tar", "--split", "train")
    found = re.findall(r"(?:to text|to image): (.*)", done.stdout)
    assert len(found) == 2, done.stderr
    for recalls in ([float(x) for x in line.split()][:3] for line in found):
        assert recalls[2] > 40 and recalls == sorted(recalls)
