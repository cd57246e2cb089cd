"""Training that is ended from outside, or ends itself: what is on disk afterwards, and how it goes on."""

import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from processes import LIMIT, run, started, wait_for
from training import NAME, Place, assert_same, last_checkpoint, load

import train
from lib.checkpoint import load_checkpoint, save_checkpoint
from lib.errors import InputError
from lib.gpu import FeaturesOnGPU
from lib.workers import watched
from model import SCAN


class Forgetful(SCAN):
    """A model whose steps draw random numbers, as dropout does. before(step) is called before each step."""

    before = staticmethod(lambda step: None)

    def forward_emb(self, *batch):
        images, *rest = super().forward_emb(*batch)
        return torch.nn.functional.dropout(images, 0.2), *rest

    def step(self, *batch):
        self.before(self.Eiters + 1)
        return super().step(*batch)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "--num_epochs 2")


@pytest.fixture
def fit(place):
    """fit(name, flags, make_model) trains in this process, by default for 2 epochs of 4 steps; returns its folder."""

    def run(name, flags="", make_model=Forgetful):
        return place.fit(name, flags, make_model)

    return run


def ends_at(step, number=signal.SIGTERM):
    class Model(Forgetful):
        @staticmethod
        def before(now):
            if now == step:
                os.kill(os.getpid(), number)

    return Model


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("straight"), "--num_epochs 2").fit("run", "", Forgetful)


# ---------------------------------------------------------------- asked to end


@pytest.mark.parametrize(("number", "steps"), [(signal.SIGTERM, (1, 4, 5, 8)), (signal.SIGINT, (3,))])
def test_a_run_stopped_at_any_step_ends_bit_for_bit_as_if_it_had_not_been(fit, straight, number, steps):
    """Weights, optimizer, counters, best score, data order and random state."""
    for step in steps:
        with pytest.raises(KeyboardInterrupt) as stopped:
            fit(f"stopped{step}", "", ends_at(step, number))
        assert stopped.value.args == (number,)
        folder = fit(f"stopped{step}", "--resume auto")
        for name in ("checkpoint_1", "model_best"):
            assert_same(load(folder, name), load(straight, name))
        assert not (folder / "checkpoint_last.pth.tar").exists()


def test_validation_is_interrupted_at_once_and_made_up_for(fit, straight, tmp_path, monkeypatch):
    validate = train.validate

    def interrupted(*args):
        monkeypatch.setattr(train, "validate", validate)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended this")

    monkeypatch.setattr(train, "validate", interrupted)
    with pytest.raises(train.StopTraining):
        fit("stopped")
    saved = load(tmp_path / "stopped", "checkpoint_last")
    assert (saved["epoch"], saved["step"], saved["Eiters"]) == (0, 4, 4)
    assert_same(load(fit("stopped", "--resume auto"), "checkpoint_1"), load(straight, "checkpoint_1"))


def test_a_second_ctrl_c_does_not_wait_and_does_not_save_half_a_step(fit, tmp_path):
    class Impatient(Forgetful):
        def before(self, now):
            if now == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(60)

    with pytest.raises(KeyboardInterrupt) as stopped:
        fit("impatient", "", Impatient)
    assert not isinstance(stopped.value, train.StopTraining)
    assert last_checkpoint(str(tmp_path / "impatient")) == ("", None)


def test_sigterm_from_the_shell_saves_says_where_and_exits_with_143(place, tmp_path):
    line = [sys.executable, ROOT / "train.py", *place.line("run", "--workers 2 --num_epochs 100000 --keep_last 1")]
    with started(line, stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: list(tmp_path.glob("run/checkpoint_[0-9]*.tar")) or run.poll() is not None)
        os.killpg(run.pid, signal.SIGTERM)  # as a service manager does: to the loading processes as well
        _, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 143, errors
    path = re.search(r"stopped after step \d+; --resume (\S+) continues, as auto does\ninterrupted\n$", errors)[1]
    assert load_checkpoint(path)["epoch"] >= 1


def test_a_thread_trains_too_and_leaves_the_signals_alone(fit, straight):
    """Notebooks and web back ends train in threads, where Python sets no signal handlers."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        folder = pool.submit(fit, "thread", "--workers 1").result()
    assert_same(load(folder, "checkpoint_1"), load(straight, "checkpoint_1"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class Hanging(SCAN.dataset):
    """Training data that do not come in the loading process, and a SIGTERM while they are waited for."""

    def __getitems__(self, indices):
        if "train" in self.prefix:
            os.kill(os.getppid(), signal.SIGTERM)
            threading.Event().wait()
        return super().__getitems__(indices)


def test_sigterm_ends_a_wait_for_data_that_do_not_come_and_the_loading_process(fit, tmp_path):
    class Model(Forgetful):
        dataset = Hanging

    with pytest.raises(train.StopTraining):
        fit("run", "--workers 1", Model)
    assert load(tmp_path / "run", "checkpoint_last")["step"] == 0
    gc.collect()
    wait_for(lambda: not multiprocessing.active_children())


# ---------------------------------------------------------------- not asked


def killed_inside_a_save(fit, moment):
    """Fork a training that goes on, and ends as by SIGKILL at its moment-th sync or rename of a file. Its status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    moments = iter(range(moment))

    def ending(call):
        return lambda *args: os._exit(9) if next(moments, None) is None else call(*args)

    try:
        torch.set_num_threads(1)  # torch's other threads stay with the parent
        os.fsync, os.replace = ending(os.fsync), ending(os.replace)
        fit("killed", "--resume auto --save_step 2")
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_inside_any_save_every_checkpoint_loads_and_training_goes_on(fit, straight, tmp_path):
    """Time and again, each time a little later, until it gets to its end."""
    folder, moment, reached = tmp_path / "killed", 0, (0, 0)
    while (status := killed_inside_a_save(fit, moment)) == 9:
        for path in folder.glob("*.pth.tar"):
            load_checkpoint(str(path))
        checkpoint = last_checkpoint(folder)[1] or {"epoch": 0, "step": 0}
        before, reached = reached, (checkpoint["epoch"], checkpoint["step"])
        assert reached >= before and (folder / "model_best.pth.tar").exists() >= (reached[0] > 0)
        moment += 1
    assert status == 0 and moment > 4
    for name in ("checkpoint_1", "model_best"):
        assert_same(load(folder, name), load(straight, name))


def test_the_last_checkpoint_is_the_one_with_the_most_training_that_loads(tmp_path, fit, caplog):
    assert last_checkpoint(str(tmp_path / "none")) == ("", None)
    folder = fit("run", "--num_epochs 3")
    assert last_checkpoint(str(folder))[0] == str(folder / "checkpoint_2.pth.tar")
    state = load(folder, "checkpoint_1")
    save_checkpoint({**state, "step": 3}, False, "checkpoint_last.pth.tar", str(folder))
    assert last_checkpoint(str(folder))[0] == str(folder / "checkpoint_2.pth.tar"), "3 epochs beat 2 and 3 steps"
    os.truncate(folder / "checkpoint_2.pth.tar", 1000)
    (folder / "checkpoint_7.pth.tar.part").write_bytes(b"what a killed process left")
    assert last_checkpoint(str(folder))[0] == str(folder / "checkpoint_last.pth.tar")
    assert "checkpoint_2.pth.tar: truncated or not a checkpoint" in caplog.text


def test_save_step_saves_within_epochs_and_the_file_goes_with_the_epoch(fit):
    seen = []

    class Watching(Forgetful):
        def before(self, now):
            path = last_checkpoint(self.opt.model_name)[0]
            seen.append(os.path.basename(path) if path else None)

    fit("run", "--save_step 3", Watching)
    last, first = "checkpoint_last.pth.tar", "checkpoint_0.pth.tar"
    assert seen == [None, None, None, last, first, first, last, last]


def test_keep_last_keeps_that_many_epochs_and_the_best(fit):
    for keep, expected in ((0, "0123"), (1, "3"), (3, "123")):
        folder = fit(f"keep{keep}", f"--num_epochs 4 --keep_last {keep}")
        names = sorted(path.name for path in folder.glob("*.tar"))
        assert names == [*(f"checkpoint_{epoch}.pth.tar" for epoch in expected), "model_best.pth.tar"]


@pytest.mark.parametrize("flags", ["--batch_size 8", "--seed 1"])
def test_a_checkpoint_within_an_epoch_goes_on_with_the_same_batches_only(fit, flags):
    with pytest.raises(KeyboardInterrupt):
        fit("stopped", "", ends_at(2))
    with pytest.raises(InputError, match=f"saved within an epoch with {flags.split()[0]} "):
        fit("stopped", f"--resume auto {flags}")


# ---------------------------------------------------------------- it ends itself


def breaking(step, what):
    class Model(SCAN):
        def forward_loss(self, *embeddings):
            loss = super().forward_loss(*embeddings)
            return what(loss) if self.Eiters == step else loss

    return Model


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda loss: loss * float("nan"), "the loss is nan"),
        (lambda loss: loss + 1e9, r"the loss is 1\d{9}"),
    ],
    ids=["nan", "exploding"],
)
def test_a_loss_that_is_none_names_step_pairs_and_the_last_good_checkpoint(fit, what, said, tmp_path):
    with pytest.raises(InputError, match=f"epoch 0, step 1: .*{said}") as error:
        fit("early", "", breaking(2, what))
    assert "there is no checkpoint yet" in str(error.value)
    with pytest.raises(InputError, match=f"epoch 1, step 2: .*{said}") as error:
        fit("late", "", breaking(7, what))
    assert f"the last good checkpoint is {tmp_path / 'late' / 'checkpoint_0.pth.tar'}" in str(error.value)
    ids = json.loads(re.search(r"pairs (\[.*?\]) of \S*train", str(error.value))[1])
    assert len(ids) == 16 and len(set(ids)) == 16 and set(ids) < set(range(60))
    assert all(torch.isfinite(x).all() for x in load(tmp_path / "late")["model"][0].values())


def test_the_death_of_a_loading_process_is_one_line_with_the_reason(tmp_path):
    """A file that shrinks under a run ends the process that reads it with a bus error."""
    place = Place(tmp_path, splits={"train": 40, "dev": 4}, n_regions=36, img_dim=512)
    code = """if True:
        import os, sys, train
        from lib.errors import run

        class Shrinking(train.SCAN):
            def step(self, *batch):
                os.truncate(sys.argv[1], 8192)
                return super().step(*batch)

        run(lambda: train.fit(train.get_parser().parse_args(sys.argv[2:]), Shrinking))
    """
    file = tmp_path / "data" / NAME / "train_ims.npy"
    done = run([sys.executable, "-c", code, file, *place.line("run", "--img_dim 512 --workers 1")], cwd=ROOT)
    assert done.returncode == 2, done.stderr
    said = r"error: \S*train: a loading process died, as when a file shrinks .*: .*killed by signal: Bus error"
    assert re.search(said, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_the_death_of_a_loading_process_is_told_where_features_lie_on_a_gpu():
    loader = FeaturesOnGPU.__new__(FeaturesOnGPU)
    loader.loader = SimpleNamespace(watched=SimpleNamespace(), has_died=lambda: True, dataset=None)
    with pytest.raises(InputError, match="a loading process died.*: killed"), watched(loader):
        raise RuntimeError("killed")


@pytest.mark.parametrize(
    ("option", "said"), [("size=128k", "/dev/shm: no space .*"), ("ro", "loading processes cannot .*/dev/shm.*")]
)
def test_shared_memory_that_is_full_or_cannot_be_written_ends_training_with_one_line(tmp_path, option, said):
    private = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {option} tmpfs /dev/shm && exec "$@"', "sh"]
    try:
        subprocess.run([*private, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small /dev/shm")
    place = Place(tmp_path, n_regions=36, img_dim=512)
    done = run([*private, sys.executable, ROOT / "train.py", *place.line("run", "--img_dim 512 --workers 1")])
    assert done.returncode == 2, done.stderr
    assert re.search(f"^error: {said}--workers 0", done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_line_and_the_older_checkpoints_stay(fit, tmp_path, monkeypatch):
    folder = fit("run", "--num_epochs 1")
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    written = torch.save

    def full(state, file):
        written(state, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device.*checkpoint_1"):
        fit("run", "--resume auto")
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar*")} == before
