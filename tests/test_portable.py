"""Every command starts; on Windows and macOS too: nothing needs what only POSIX systems have; spawned processes."""

import os
import sys

import pytest
from conftest import ROOT
from dataset_commands import command
from folders import make_folder
from processes import run

FOLDERS = ("*.py", "lib/**/*.py", "scripts/**/*.py", "Tencent_PFAN/*.py", "test_server/*.py")
# First as here, so that other people's modules are loaded; then again, without what Windows has not.
AS_ON_WINDOWS = """
import importlib, os, signal, sys
names = sys.argv[1:]
for name in names:
    importlib.import_module(name)
for name in names:
    del sys.modules[name]
for module in "crypt fcntl grp posix pty pwd resource syslog termios tty".split():
    sys.modules[module] = None
for name in "fork getloadavg killpg mkfifo nice pread pwrite sched_getaffinity setsid statvfs posix_fadvise".split():
    delattr(os, name)
for name in "SIGALRM SIGHUP SIGKILL SIGQUIT SIGUSR1 SIGUSR2 ITIMER_REAL alarm pause setitimer pthread_kill".split():
    delattr(signal, name)
for name in names:
    importlib.import_module(name)
print(len(names), "modules")
"""
SPAWN = """
import torch.multiprocessing
from lib.errors import run
import train
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    run(train.main)
"""


def test_modules_are_imported_without_what_only_posix_systems_have():
    paths = sorted(path for folder in FOLDERS for path in ROOT.glob(folder) if not path.name.startswith("_"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    done = run([sys.executable, "-c", AS_ON_WINDOWS, *names], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(names) > 40 and done.stdout == f"{len(names)} modules\n"


def test_training_loads_data_with_spawned_processes(tmp_path):
    """The start method of Windows and macOS: what loading processes get is pickled."""
    data_path, vocab_path = make_folder(tmp_path, splits={"train": 4, "dev": 2})
    (tmp_path / "spawned.py").write_text(SPAWN)
    flags = f"--data_path {data_path} --data_name toy_precomp --vocab_path {vocab_path} --img_dim 16 --embed_size 8 "
    flags += f"--word_dim 8 --batch_size 10 --num_epochs 1 --workers 1 --model_name {tmp_path} --logger_name {tmp_path}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run([sys.executable, tmp_path / "spawned.py", *flags.split(), "--device", "cpu"], env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model_best.pth.tar").is_file()


TOOLS = "tsv_to_dataset npz_to_dataset align captions_to_dataset check_data position extract_features"


@pytest.mark.parametrize("name", [*TOOLS.split(), "vocab", "download_data"])
def test_every_tool_starts_as_a_file_and_shows_an_example(name):
    done = command(name, "--help")
    assert done.returncode == 0 and "example: python " in done.stdout, done.stderr
