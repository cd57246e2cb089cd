"""Training as a user runs it: SCAN's flags in; checkpoints, log lines and TensorBoard events out."""

import argparse
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from folders import make_folder, write_lines
from processes import LIMIT

import train
from evaluation import evalrank
from lib.checkpoint import load_checkpoint, save_checkpoint

# A published README's command line, but for the small sizes.
PUBLISHED = (
    "--max_violation --bi_gru --agg_func=Mean --lr_update=15 --val_step=2000000 --raw_feature_norm=clipped_l2norm"
)
SMALL = "--img_dim 16 --embed_size 24 --word_dim 8 --batch_size 16 --learning_rate .001"
TRAIN_TAGS = {"epoch", "step", "Eit", "Le", "lr", "batch_time", "data_time"}
DEV_TAGS = {"r1", "r5", "r10", "medr", "meanr", "r1i", "r5i", "r10i", "medri", "meanri", "rsum"}


def command(script, *flags):
    line = [sys.executable, str(ROOT / script), *map(str, flags)]
    return subprocess.run(line, capture_output=True, text=True, timeout=LIMIT)


def events(folder):
    """(tag, step, value) of every scalar in a folder's TensorBoard files, in the order written."""
    from tensorboard_logger.tf_protobuf import event_pb2  # after train has set what its protobuf needs

    found = []
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # a TFRecord: length, its checksum, bytes, their checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def values(folder, tag):
    return [value for name, _, value in events(folder) if name == tag]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Flags that lead to a small random data set."""
    data_path, vocab_path = make_folder(str(tmp_path_factory.mktemp("toy")))
    return ["--data_path", data_path, "--vocab_path", vocab_path, "--data_name", "toy_precomp"]


@pytest.fixture
def fit(toy, tmp_path, monkeypatch):
    """fit(name, flags) trains on the toy data in this process and returns the folder of its checkpoints."""

    def run(name, flags="--num_epochs 1"):
        folder = tmp_path / name
        places = ["--logger_name", str(folder / "log"), "--model_name", str(folder)]
        line = [*toy, *PUBLISHED.split(), *SMALL.split(), "--workers", "0", *places, *flags.split()]
        monkeypatch.setattr(sys, "argv", ["train.py", *line])
        train.main()
        return folder

    return run


def load(folder, name="checkpoint_0"):
    return load_checkpoint(str(folder / f"{name}.pth.tar"))


def flat(tree):
    """A checkpoint's contents without its options, as a list of (place, value)."""
    if isinstance(tree, dict):
        return [(f"{k}.{at}", v) for k, sub in tree.items() if k != "opt" for at, v in flat(sub)]
    if isinstance(tree, (list, tuple)):
        return [(f"{i}.{at}", v) for i, sub in enumerate(tree) for at, v in flat(sub)]
    return [("", tree)]


def assert_same(one, other):
    """Bit for bit the same parameters, optimizer state, counters and scores."""
    one, other = flat(one), flat(other)
    assert [place for place, _ in one] == [place for place, _ in other]
    for (place, a), (_, b) in zip(one, other, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, place


def same_weights(one, other):
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(flat(one["model"]), flat(other["model"]), strict=True))


# ---------------------------------------------------------------- a run from the command line


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """Two epochs with the README's flags, as users of the published code have them in their scripts."""
    folder = tmp_path_factory.mktemp("run")
    places = ["--logger_name", folder / "log", "--model_name", folder / "models"]
    flags = f"{PUBLISHED} {SMALL} --num_epoches 2 --log_step 2 --workers 2"
    done = command("train.py", *toy, *places, *flags.split())
    assert done.returncode == 0, done.stderr
    done.folder = folder
    return done


def test_every_epoch_leaves_a_checkpoint_and_the_best_one_its_copy(run):
    names = sorted(path.name for path in (run.folder / "models").iterdir())
    assert names == ["checkpoint_0.pth.tar", "checkpoint_1.pth.tar", "model_best.pth.tar"]
    first, second, best = (load(run.folder / "models", name.split(".")[0]) for name in names)
    assert (first["epoch"], second["epoch"]) == (1, 2), "epoch counts finished epochs"
    assert (first["Eiters"], second["Eiters"]) == (4, 8), "60 pairs in batches of 16"
    rsums = [float(found) for found in re.findall(r"rsum: ([\d.]+)", run.stderr)]
    assert first["best_rsum"] == pytest.approx(rsums[0], abs=0.06)
    assert second["best_rsum"] == best["best_rsum"] == pytest.approx(max(rsums), abs=0.06)
    assert_same(best, first if rsums[0] >= rsums[1] else second)


def test_a_checkpoint_holds_what_the_published_code_reads(run):
    # weights_only=False is how the published code loads; the file is our own
    checkpoint = torch.load(run.folder / "models" / "model_best.pth.tar", weights_only=False)
    assert {"epoch", "model", "best_rsum", "opt", "Eiters", "optimizer"} <= set(checkpoint)
    image, text = checkpoint["model"]
    assert {name.split(".")[0] for name in image} == {"fc", "fc_att", "position_embedding"}
    assert {name.split(".")[0] for name in text} == {"embed", "rnn"}
    assert image["position_embedding.weight"].shape == (257, 200) and image["fc.weight"].shape == (24, 216)
    opt = checkpoint["opt"]
    assert isinstance(opt, argparse.Namespace)
    assert (opt.num_epochs, opt.agg_func, opt.max_violation, opt.position) == (2, "Mean", True, "attention")
    assert opt.vocab_size == len(text["embed.weight"])


def test_the_log_says_how_far_training_is_and_how_good(run):
    line = r"Epoch: \[0\]\[1/4\]\tEit 2  lr 0.001  Le [\d.]+ \([\d.]+\)\tTime [\d.]+ .*\tData [\d.]+"
    assert re.search(line, run.stderr)
    assert len(re.findall(r"Epoch: \[", run.stderr)) == 4  # 8 steps, a line every 2
    numbers = r"([\d.]+, ){4}[\d.]+"
    assert len(re.findall(rf"Image to text: {numbers}\n", run.stderr)) == 2
    assert len(re.findall(rf"Text to image: {numbers}\n", run.stderr)) == 2
    assert "60 pairs" in run.stderr


def test_tensorboard_gets_every_tag_of_every_step(run):
    found = events(run.folder / "log")
    assert {tag for tag, _, _ in found} == TRAIN_TAGS | DEV_TAGS
    for tag in TRAIN_TAGS:
        assert [step for name, step, _ in found if name == tag] == list(range(1, 9)), tag
    for tag in DEV_TAGS:
        assert [step for name, step, _ in found if name == tag] == [4, 8], tag
    by_tag = {tag: [value for name, _, value in found if name == tag] for tag in TRAIN_TAGS | DEV_TAGS}
    assert by_tag["epoch"] == [0] * 4 + [1] * 4 and by_tag["step"] == [0, 1, 2, 3] * 2
    recalls = zip(*(by_tag[tag] for tag in ("r1", "r5", "r10", "r1i", "r5i", "r10i")), strict=True)
    assert by_tag["rsum"] == pytest.approx([sum(row) for row in recalls], rel=1e-5)


def test_a_trained_model_is_evaluated_from_the_command_line(run):
    done = command("evaluation.py", "--model_path", run.folder / "models" / "model_best.pth.tar", "--split", "dev")
    assert done.returncode == 0, done.stderr
    assert "Images: 6, Captions: 30" in done.stdout
    best = load(run.folder / "models", "model_best")["best_rsum"]
    assert float(re.search(r"rsum: ([\d.]+)", done.stdout)[1]) == pytest.approx(best, abs=0.06)


# ---------------------------------------------------------------- what flags promise


def test_every_published_flag_has_its_published_default():
    published = dict(
        data_path="./data/",
        data_name="precomp",
        vocab_path="./vocab/",
        margin=0.2,
        num_epochs=30,
        batch_size=128,
        word_dim=300,
        embed_size=1024,
        grad_clip=2.0,
        num_layers=1,
        learning_rate=0.0002,
        lr_update=15,
        workers=10,
        log_step=10,
        val_step=500,
        logger_name="./runs/runX/log",
        model_name="./runs/runX/checkpoint",
        resume="",
        max_violation=False,
        img_dim=2048,
        no_imgnorm=False,
        no_txtnorm=False,
        raw_feature_norm="clipped_l2norm",
        agg_func="LogSumExp",
        cross_attn="t2i",
        precomp_enc_type="basic",
        bi_gru=False,
        lambda_lse=6.0,
        lambda_softmax=9.0,
    )
    opt = vars(train.get_parser().parse_args([]))
    assert {name: opt[name] for name in published} == published
    assert opt["position"] == "attention"


def test_the_same_seed_trains_the_same_model(fit):
    one, same, other = load(fit("one")), load(fit("same")), load(fit("other", "--num_epochs 1 --seed 1"))
    assert_same(one, same)
    assert not same_weights(one, other)


def test_workers_do_not_change_what_is_trained(fit):
    assert_same(load(fit("none")), load(fit("two", "--num_epochs 1 --workers 2")))


@pytest.mark.parametrize("more", ["", " --lr_update 1 --workers 2"], ids=["plain", "lr drop, workers"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(fit, more):
    straight = fit("straight", "--num_epochs 3" + more)
    broken = fit("broken", "--num_epochs 1" + more)
    resumed = fit("resumed", f"--num_epochs 3 --resume {broken}/checkpoint_0.pth.tar" + more)
    assert not (resumed / "checkpoint_0.pth.tar").exists()
    for name in ("checkpoint_1", "checkpoint_2"):
        assert_same(load(straight, name), load(resumed, name))
    assert load(resumed, "checkpoint_2")["optimizer"]["state"], "Adam's moments are kept"


def test_resuming_keeps_the_best_score_and_does_not_call_a_worse_model_best(fit):
    folder = fit("run")
    best = (folder / "model_best.pth.tar").read_bytes()
    checkpoint = torch.load(folder / "checkpoint_0.pth.tar", weights_only=False)
    torch.save({**checkpoint, "best_rsum": 600.0}, folder / "checkpoint_0.pth.tar")
    fit("run", f"--num_epochs 2 --resume {folder}/checkpoint_0.pth.tar")
    assert load(folder, "checkpoint_1")["best_rsum"] == 600.0
    assert (folder / "model_best.pth.tar").read_bytes() == best


def test_the_log_names_no_best_checkpoint_that_is_not_there(fit, caplog):
    """Resumed into another folder, without beating the earlier epochs: the best model lies where they were saved."""
    caplog.set_level("INFO")
    folder = fit("run")
    checkpoint = torch.load(folder / "checkpoint_0.pth.tar", weights_only=False)
    torch.save({**checkpoint, "best_rsum": 600.0}, folder / "checkpoint_0.pth.tar")
    fit("elsewhere", f"--num_epochs 2 --resume {folder}/checkpoint_0.pth.tar")
    for path in re.findall(r"\S+model_best\.pth\.tar", caplog.text):
        assert Path(path).exists(), path


def test_even_a_model_that_tells_nothing_apart_leaves_a_best_checkpoint(tmp_path, monkeypatch):
    """Ties count against a model: with equal pictures and equal captions its rsum is 0."""
    data_path, vocab_path = make_folder(str(tmp_path), splits={"train": 4, "dev": 40}, captions_per_image=1)
    for split, n in (("train", 4), ("dev", 40)):
        prefix = Path(data_path) / "toy_precomp" / split
        np.save(f"{prefix}_ims.npy", np.zeros((n, 36, 16), np.float32))
        np.save(f"{prefix}_boxes.npy", np.tile([*range(15), *[1 / 15] * 15], (n, 36, 1)).astype(np.float32))
        write_lines(f"{prefix}_caps.txt", ["a man runs"] * n * 5)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train.py",
            "--data_path",
            data_path,
            "--vocab_path",
            vocab_path,
            "--data_name",
            "toy_precomp",
            *SMALL.split(),
            "--num_epochs",
            "1",
            "--workers",
            "0",
            "--logger_name",
            str(tmp_path / "log"),
            "--model_name",
            str(tmp_path / "models"),
        ],
    )
    train.main()
    assert load(tmp_path / "models")["best_rsum"] == 0
    assert (tmp_path / "models" / "model_best.pth.tar").exists()


def test_a_finished_run_resumed_trains_no_more(fit):
    folder = fit("run")
    before = sorted(path.name for path in folder.iterdir())
    fit("run", f"--num_epochs 1 --resume {folder}/checkpoint_0.pth.tar")
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_published_checkpoint_without_optimizer_resumes_with_a_warning(fit, tmp_path, caplog, zipped):
    checkpoint = torch.load(fit("run") / "checkpoint_0.pth.tar", weights_only=False)
    del checkpoint["optimizer"]
    for flag in ("position", "seed", "device", "amp", "matmul_precision", "allow_empty_captions"):
        delattr(checkpoint["opt"], flag)
    path = tmp_path / "published.pth.tar"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    resumed = load(fit("more", f"--num_epochs 2 --resume {path}"), "checkpoint_1")
    assert "published.pth.tar holds no optimizer state" in caplog.text
    assert (resumed["epoch"], resumed["Eiters"]) == (2, 8)


def test_the_learning_rate_falls_to_a_tenth_every_lr_update_epochs(fit):
    folder = fit("run", "--num_epochs 4 --lr_update 2 --batch_size 30")
    assert values(folder / "log", "lr") == pytest.approx([1e-3] * 4 + [1e-4] * 4)


def test_mean_warmup_epochs_count_all_negatives_before_the_hardest(fit, caplog):
    """The first epochs are those of a run without --max_violation, also where the warm-up is resumed in its middle."""
    caplog.set_level("INFO")
    flags = "--num_epochs 3 --mean_warmup_epochs 2"
    losses = values(fit("warm", flags) / "log", "Le")
    said = re.findall(r"epoch (\d): the loss counts (.*) negatives", caplog.text)
    assert said == [("0", "all"), ("2", "only the hardest")]
    hardest = values(fit("hardest", "--num_epochs 1") / "log", "Le")
    assert len(losses) == 12 and losses[0] > 2 * hardest[0], "16 negatives a pair are more than the hardest one"
    assert max(losses[8:]) <= 2 * 16 * 0.25 < min(losses[:8]), "the hardest only: about the margin a pair and direction"
    fit("broken", flags.replace("--num_epochs 3", "--num_epochs 1"))
    caplog.clear()
    resumed = fit("broken", f"{flags} --resume auto")
    assert_same(load(resumed, "checkpoint_2"), load(resumed.parent / "warm", "checkpoint_2"))
    assert re.findall(r"the loss counts (.*) negatives", caplog.text) == ["all", "only the hardest"]


def test_val_step_validates_within_an_epoch(fit):
    folder = fit("run", "--num_epochs 1 --batch_size 10 --val_step 2")
    steps = [step for tag, step, _ in events(folder / "log") if tag == "rsum"]
    assert steps == [2, 4, 6, 6]  # the last at the epoch's end


def test_a_last_batch_of_one_is_trained(fit):
    for flags in ("", " --cross_attn i2t"):
        folder = fit("run" + flags, "--num_epochs 1 --batch_size 59" + flags)
        assert values(folder / "log", "Le")[1] == 0


def test_training_lowers_the_loss(fit):
    losses = values(fit("run", "--num_epochs 12 --learning_rate .005 --batch_size 30") / "log", "Le")
    assert len(losses) == 24 and sum(losses[-4:]) < 0.9 * sum(losses[:4])


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
def test_every_variant_trains_and_is_evaluated_as_it_was_trained(fit, flags, parameters):
    folder = fit("run", "--num_epochs 1 " + flags)
    checkpoint = load(folder)
    image = checkpoint["model"][0]
    assert parameters is None or {name.split(".")[0] for name in image} == parameters
    if "weight_norm" in flags:
        assert {"fc.weight_g", "fc.weight_v", "fc.bias"} <= set(image)
    result = evalrank(str(folder / "checkpoint_0.pth.tar"), split="dev")
    assert result["rsum"] == pytest.approx(checkpoint["best_rsum"], abs=1e-3)


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_part(tmp_path, monkeypatch):
    save_checkpoint({"epoch": 1}, False, "checkpoint_0.pth.tar", str(tmp_path))
    old = (tmp_path / "checkpoint_0.pth.tar").read_bytes()

    def run_out_of_disk(state, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", run_out_of_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint({"epoch": 2}, True, "checkpoint_0.pth.tar", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_0.pth.tar"]
    assert (tmp_path / "checkpoint_0.pth.tar").read_bytes() == old


# ---------------------------------------------------------------- real photographs


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory):
    """The real folder with its first 100 training photographs only, so that learning them takes seconds."""
    real, folder = shared / "real" / "flickr8k_precomp", tmp_path_factory.mktemp("data") / "flickr8k_precomp"
    folder.mkdir()
    for kind in ("ims", "boxes"):
        np.save(folder / f"train_{kind}.npy", np.load(real / f"train_{kind}.npy", mmap_mode="r")[:100])
    with open(real / "train_caps.txt", encoding="utf-8", newline="\n") as file:
        write_lines(folder / "train_caps.txt", [line.rstrip("\n") for line in file][:500])
    for path in real.glob("dev_*"):
        (folder / path.name).symlink_to(path)
    return folder.parent


@pytest.mark.parametrize("attention", ["--cross_attn=t2i --lambda_softmax=9", "--cross_attn=i2t --lambda_softmax=4"])
def test_real_photographs_are_learned_from_the_command_line(photographs, tmp_path, attention):
    """vocab.py, train.py, evaluation.py on 100 photographs and their 500 captions; chance is R@10 = 10 either way."""
    data = ["--data_path", photographs, "--data_name", "flickr8k_precomp", "--vocab_path", tmp_path / "vocab"]
    assert command("vocab.py", *data).returncode == 0
    flags = f"""--max_violation --bi_gru --agg_func=Mean {attention} --num_epochs=8 --lr_update=15 --batch_size=16
        --learning_rate=.0005 --embed_size=128 --word_dim=64 --img_dim=1280 --val_step=2000000 --workers=0"""
    places = ["--logger_name", tmp_path / "run", "--model_name", tmp_path / "run"]
    done = command("train.py", *data, *places, *flags.split())
    assert done.returncode == 0, done.stderr
    model = tmp_path / "run" / "checkpoint_7.pth.tar"
    done = command("evaluation.py", "--model_path", model, "--split", "train")
    assert done.returncode == 0, done.stderr
    assert "Images: 100, Captions: 500" in done.stdout
    for direction in ("Image to text", "Text to image"):
        recalls = [float(x) for x in re.search(rf"{direction}: (.*)", done.stdout)[1].split()][:3]
        assert recalls[2] > 30, done.stdout
        assert recalls == sorted(recalls)


def test_published_grids_and_captions_of_flickr30k_are_learned_from_the_command_line(shared, tmp_path):
    """50 + 50 images with the position files and captions as published; their features are random numbers."""
    folder = tmp_path / "f30k_test"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for path in (shared / "real" / "f30k_test").iterdir():
        (folder / path.name).symlink_to(path)
    for split in ("train", "dev"):
        np.save(folder / f"{split}_ims.npy", np.maximum(rng.normal(size=(50, 36, 64)), 0).astype(np.float32))
    data = ["--data_path", tmp_path, "--data_name", "f30k_test", "--vocab_path", tmp_path / "vocab"]
    assert command("vocab.py", *data).returncode == 0
    flags = """--max_violation --bi_gru --agg_func=Mean --num_epochs=12 --batch_size=16 --learning_rate=.001
        --embed_size=64 --word_dim=32 --img_dim=64 --val_step=2000000 --workers=0"""
    done = command("train.py", *data, "--logger_name", tmp_path, "--model_name", tmp_path, *flags.split())
    assert done.returncode == 0, done.stderr
    done = command("evaluation.py", "--model_path", tmp_path / "checkpoint_11.pth.tar", "--split", "train")
    assert "Images: 50, Captions: 250" in done.stdout, done.stderr
    for direction in ("Image to text", "Text to image"):
        r10 = float(re.search(rf"{direction}: (.*)", done.stdout)[1].split()[2])
        assert r10 > 60, done.stdout  # chance is 20
