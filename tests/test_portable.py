"""Every command starts; on Windows and macOS too: nothing needs what only POSIX systems have; spawned processes."""

import os
import sys

import pytest
from conftest import ROOT
from dataset_commands import command, ok
from processes import run
from torch import multiprocessing
from training import Place

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


def test_modules_are_imported_without_what_only_posix_systems_have():
    paths = sorted(path for folder in FOLDERS for path in ROOT.glob(folder) if not path.name.startswith("_"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    done = run([sys.executable, "-c", AS_ON_WINDOWS, *names], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(names) > 40 and done.stdout == f"{len(names)} modules\n"


PROTOBUF_FIRST = """
from google.protobuf import timestamp_pb2
import train
from lib import events
events.configure("logs")
events.log_value("Le", 1.0, 1)
"""


@pytest.mark.parametrize("implementation", ["python", "upb"])
def test_training_logs_where_protobuf_was_imported_first(tmp_path, implementation):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation}
    done = run([sys.executable, "-c", PROTOBUF_FIRST], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs/metrics.csv").read_text().splitlines()[1:] == [",1,Le,1.0"]


def test_training_loads_data_with_spawned_processes(tmp_path):
    """The start method of Windows and macOS: what loading processes get is pickled."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        Place(tmp_path).fit("run", "--workers 1")
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert (tmp_path / "run" / "model_best.pth.tar").is_file()


TOOLS = "tsv_to_dataset npz_to_dataset align captions_to_dataset check_data extract_features vocab download_data"


@pytest.mark.parametrize("name", TOOLS.split())
def test_every_tool_shows_an_example(name):
    assert "example: python " in ok(name, "--help")


@pytest.mark.parametrize("name", ["position", "tsv_to_dataset"])
def test_tools_start_as_files(name):
    """One of the root, one of scripts/."""
    done = command(name, "--help")
    assert done.returncode == 0 and "example: python " in done.stdout, done.stderr
