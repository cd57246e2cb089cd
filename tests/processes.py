"""Start processes that work together as torchrun starts them, without waiting for torchrun itself to start."""

import os
import socket
import subprocess
import sys

import torch
from conftest import ROOT


def start_processes(n, *command, **options):
    """n processes of `python COMMAND`, Popen objects, that find each other; for 1 one that is alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    kept = {name: value for name, value in os.environ.items() if "COV" not in name}
    started = []
    for rank in range(n):
        environment = {**kept, **{k: str(v) for k, v in {**places, "RANK": rank, "LOCAL_RANK": rank}.items()}}
        line = [sys.executable, *map(str, command)]
        started.append(
            subprocess.Popen(
                line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
            )
        )
    return started


def run_jobs(n, jobs, folder):
    """Run tests/jobs.py in n processes. Returns name → that job's results, one for each process; "printed" is what
    each process wrote on stdout."""
    started = start_processes(n, ROOT / "tests" / "jobs.py", jobs, folder)
    printed = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        printed.append(out)
    return lambda name: printed if name == "printed" else [torch.load(folder / f"{name}.{i}") for i in range(n)]
