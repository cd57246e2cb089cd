"""Windows and macOS: no module needs what only POSIX systems have, and loading processes may be spawned."""

import ast
import os
import signal
import subprocess
import sys

from conftest import ROOT
from folders import make_folder

POSIX_MODULES = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "os": {
        "fork",
        "getloadavg",
        "killpg",
        "mkfifo",
        "nice",
        "pread",
        "pwrite",
        "sched_getaffinity",
        "setsid",
        "statvfs",
    },
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "pause", "pthread_kill"},
}
FOLDERS = (".", "lib", "scripts", "Tencent_PFAN", "test_server")


def sources():
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))


def unguarded(tree):
    """The nodes of a module that run when it is imported on any system: bodies of try are left out."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.Try):
            yield node
            yield from unguarded(node)


def test_no_module_imports_what_only_posix_systems_have():
    found, count = [], 0
    for path in sources():
        count += 1
        for node in unguarded(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(path, alias.name) for alias in node.names if alias.name in POSIX_MODULES]
            elif isinstance(node, ast.ImportFrom) and node.module in POSIX_MODULES:
                found.append((path, node.module))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.attr in POSIX_NAMES.get(node.value.id, ()):
                    found.append((path, f"{node.value.id}.{node.attr}"))
    assert count > 40 and not found, found


def test_the_names_that_only_posix_systems_have_are_spelled_right():
    for module, names in POSIX_NAMES.items():
        for name in names:
            assert hasattr({"os": os, "signal": signal}[module], name) or sys.platform != "linux", name


SPAWN = """
import sys
import torch.multiprocessing
from lib.errors import run
import train
if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    run(train.main)
"""


def test_training_loads_data_with_spawned_processes(tmp_path):
    """The start method of Windows and macOS: what loading processes get is pickled."""
    data_path, vocab_path = make_folder(tmp_path, splits={"train": 4, "dev": 2})
    (tmp_path / "spawned.py").write_text(SPAWN)
    flags = ["--data_path", data_path, "--data_name", "toy_precomp", "--vocab_path", vocab_path, "--img_dim", "16"]
    flags += ["--embed_size", "8", "--word_dim", "8", "--batch_size", "10", "--num_epochs", "1", "--workers", "1"]
    flags += ["--model_name", str(tmp_path / "runs"), "--logger_name", str(tmp_path / "log"), "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "spawned.py", *flags], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/model_best.pth.tar").is_file()
