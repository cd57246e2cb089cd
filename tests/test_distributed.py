"""Several processes train and evaluate as one does: the same losses, gradients, weights and ranks, and the same end."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from folders import make_folder, make_whole_folder
from processes import LIMIT, started, wait_for

import train
from lib import distributed
from lib.checkpoint import load_checkpoint
from lib.errors import InputError

SIZES = "--bi_gru --agg_func Mean --workers 0 --num_epochs 1 --batch_size 13"
ROOT_FLAGS = f"{SIZES} --img_dim 16 --embed_size 24 --word_dim 8"
WHOLE_FLAGS = f"{SIZES} --img_dim 8 --embed_size 12 --word_dim 6"
I2T = "--cross_attn i2t --lambda_softmax 4"
# 80 pairs are 6 batches of 13, with shares of unequal size, and one of 2, too few for three processes
FLAGS = {
    "t2i": ROOT_FLAGS,
    "i2t": f"{ROOT_FLAGS} {I2T} --grad_clip 0",
    "t2i hardest": f"{ROOT_FLAGS} --max_violation",
    "i2t hardest": f"{ROOT_FLAGS} --max_violation {I2T}",
    "whole": f"{WHOLE_FLAGS} --lambda_whole 2",
    "whole hardest": f"{WHOLE_FLAGS} --max_violation --need_box_whole {I2T}",
}
SAME = [("t2i", 2), ("t2i", 3), ("i2t", 3), ("t2i hardest", 3), ("i2t hardest", 2), ("whole", 2), ("whole hardest", 3)]
STOPPED = {2: "t2i", 3: "t2i hardest"}
EVALUATED = [("t2i", 3), ("whole", 2)]
ON_GPUS = {
    "gpu t2i": {"cross_attn": "t2i", "max_violation": False, "whole": False},
    "gpu i2t hardest": {"cross_attn": "i2t", "max_violation": True, "whole": False},
    "gpu whole i2t": {"cross_attn": "i2t", "max_violation": False, "whole": True},
    "gpu whole t2i hardest": {"cross_attn": "t2i", "max_violation": True, "whole": True},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """done[n](job) → the results of that job's n processes; done["folder"], where the data and the models are."""
    root = tmp_path_factory.mktemp("distributed")
    data = (*make_folder(str(root), splits={"train": 16, "dev": 6, "test": 40}, n_regions=6), "toy_precomp")
    whole = (*make_whole_folder(str(root / "whole"), sizes=(80, 6, 9)), "toy")
    files = []
    for n in (1, 2, 3):
        jobs = {}
        for name, flags in FLAGS.items():
            if n > 1 and (name, n) not in SAME:
                continue
            data_path, vocab_path, data_name = whole if "whole" in name else data
            folder = root / str(n) / name.replace(" ", "_")
            flags = f"{flags} --data_path {data_path} --vocab_path {vocab_path} --data_name {data_name}"
            flags += f" --model_name {folder} --logger_name {folder}"
            jobs[name] = {"job": "train", "whole": "whole" in name, "flags": flags}
        if n > 1:
            job = jobs[STOPPED[n]]
            folder = root / str(n) / "stopped"
            flags = f"{job['flags']} --model_name {folder} --logger_name {folder}"
            jobs["stopped"] = {**job, "flags": flags, "stop_at": 4}
            jobs["resumed"] = {**job, "flags": f"{flags} --resume auto"}
        for name, count in EVALUATED:
            if n in (1, count):
                model = str(root / "1" / name / "checkpoint_0.pth.tar")
                jobs[f"evaluate {name}"] = {"job": "evaluate", "model": model, "whole": name == "whole"}
        if n < 3 and not torch.cuda.is_available():
            jobs |= {name: {"job": "gpu", **flags} for name, flags in ON_GPUS.items()}
        (root / f"out{n}").mkdir()
        files.append(root / f"{n}.json")
        files[-1].write_text(json.dumps([n, jobs, str(root / f"out{n}")]))
    run = subprocess.run([sys.executable, ROOT / "tests" / "jobs.py", *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = {"folder": root}
    for n in (1, 2, 3):
        results[n] = lambda name, n=n: [torch.load(root / f"out{n}" / f"{name}.{rank}") for rank in range(n)]
    return results


@pytest.mark.parametrize(("name", "n"), SAME)
def test_losses_and_weights_are_those_of_one_process(done, name, n):
    """In float64 within 1e-8 over 7 steps, 1e-6 where the hardest negatives are picked."""
    (one,), several = done[1](name), done[n](name)
    bound = 1e-6 if "hardest" in name else 1e-8
    assert len(one["losses"]) == 7
    for result in several:
        assert result["losses"] == pytest.approx(one["losses"], abs=bound, rel=0)
        assert (result["weights"] - one["weights"]).abs().max() < bound
        assert (result["gradient"] - one["gradient"]).abs().max() < bound
    for result in several[1:]:
        assert torch.equal(result["weights"], several[0]["weights"]), "all processes hold the very same weights"


def test_a_batch_is_divided_into_shares_of_all_its_pairs(done):
    """Two pairs are computed by each of three processes."""
    for n, shares, last in ((1, [13], [2]), (2, [6, 7], [1, 1]), (3, [4, 4, 5], [2, 2, 2])):
        found = [result["shares"] for result in done[n]("t2i")]
        assert found == [[share] * 6 + [rest] for share, rest in zip(shares, last, strict=True)]


@pytest.mark.parametrize("n", STOPPED)
def test_sigterm_to_one_process_stops_all_at_the_same_step_and_resuming_ends_the_same(done, n):
    straight, stopped, resumed = (done[n](name) for name in (STOPPED[n], "stopped", "resumed"))
    for whole, first, rest in zip(straight, stopped, resumed, strict=True):
        assert first["stopped"] and len(first["losses"]) == 4
        assert first["losses"] + rest["losses"] == whole["losses"]
        assert torch.equal(rest["weights"], whole["weights"])
    names = sorted(path.name for path in (done["folder"] / str(n) / "stopped").glob("*.tar"))
    assert names == ["checkpoint_0.pth.tar", "model_best.pth.tar"], "what was saved within the epoch has gone"


def test_several_processes_save_before_they_validate(done):
    """A SIGTERM then ends them after the validation only, and torchrun kills them 30 s after it."""
    assert [done[n]("t2i")[0]["saved"] for n in (1, 2, 3)] == [[None], [(0, 7)], [(0, 7)]]


@pytest.mark.parametrize(("name", "n"), EVALUATED)
def test_similarities_and_recalls_are_those_of_one_process(done, name, n):
    """Bit for bit: the processes take turns with the pieces that one process works through."""
    (one,) = done[1](f"evaluate {name}")
    for result in done[n](f"evaluate {name}"):
        assert torch.equal(result["sims"], one["sims"])
        assert result["result"] == one["result"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the simulated device waits for; here is a real one")
@pytest.mark.parametrize("name", ON_GPUS)
def test_two_processes_on_gpus_train_as_one_and_wait_at_most_twice_a_step(done, name):
    """Their messages are of one size and type each and lie in one piece, as NCCL demands."""
    (one,), two = done[1](name), done[2](name)
    for result in two:
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["weights"], one["weights"], rtol=0, atol=1e-4)
        assert len(result["waits"]) <= 2, result["waits"]


def test_only_the_first_process_prints_logs_and_saves(done):
    for n in (1, 2, 3):
        first, *others = ((done["folder"] / f"out{n}" / f"printed.{rank}").read_text() for rank in range(n))
        assert "Images: 40, Captions: 200" in first or n == 2
        assert "Images: 9, Captions: 9" in first or n == 3
        assert not any(others)
        folder = done["folder"] / str(n) / "t2i"
        assert sum(path.name.startswith("events") for path in folder.iterdir()) == 1
        assert load_checkpoint(folder / "model_best.pth.tar")["epoch"] == 1


def test_a_process_that_dies_ends_the_run_on_all_with_a_clear_line(done, tmp_path):
    """Started by torchrun, as the README says; one of the processes is killed outright."""
    data = done["folder"] / "data"
    flags = f"--data_path {data} --vocab_path {data.parent / 'vocab'} --data_name toy_precomp --model_name {tmp_path} "
    flags += f"--logger_name {tmp_path} {ROOT_FLAGS} --num_epochs 100000 --keep_last 1"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
    with open(tmp_path / "log", "w") as log, started([*line, *flags.split()], stderr=log, stdout=log) as run:
        wait_for(lambda: list(tmp_path.glob("checkpoint_[0-9]*.tar")) or run.poll() is not None)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
        assert run.wait(timeout=LIMIT) == 1
    said = (tmp_path / "log").read_text()
    assert "another process has ended, so this one ends as well" in said, said
    assert "Signal 9 (SIGKILL)" in said, "torchrun names the process that died"
    assert load_checkpoint(max(tmp_path.glob("checkpoint_[0-9]*.tar")))["epoch"] >= 1


def test_flags_that_do_not_go_with_several_processes_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="--device cuda:1: expected auto, cpu or cuda"):
        distributed.start("cuda:1")
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(InputError, match="--batch_size 2: expected at least 3"):
        train.check(train.get_parser().parse_args(["--batch_size", "2"]))


def test_errors_of_the_device_and_of_loading_are_not_taken_for_another_process(monkeypatch):
    for error in (torch.AcceleratorError("CUDA error"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error)), distributed.report_lost_peer():
            raise error
    with pytest.raises(InputError, match="another process has ended"), distributed.report_lost_peer():
        raise RuntimeError("Connection closed by peer")
    monkeypatch.setattr(distributed.workers, "have_died", lambda: True)
    with pytest.raises(RuntimeError, match="Bus error"), distributed.report_lost_peer():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")


def test_a_process_takes_the_gpu_of_its_number_or_the_only_one_it_can_see(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [distributed.pick_gpu(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="more processes than GPUs on this machine, which has 1"):
        distributed.pick_gpu(1, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # as SLURM sets it for the third of a machine's processes
    assert distributed.pick_gpu(2, 1) == 0
    with pytest.raises(InputError, match="which has 2"):
        distributed.pick_gpu(2, 2)
