"""What test_cuda.py runs: two processes on the simulated device train as one does.

gloo carries the messages. A stand-in for NCCL checks what NCCL demands of those between GPUs: one size and one type,
contiguous, not empty.
"""

import itertools
import os
import socket
import traceback

import _root  # noqa: F401
import torch
import torch.distributed as dist
from conftest import make_opt
from pretend_cuda import Pretend, pretend_cuda
from test_cuda import batch_of, on_cpu

from lib import distributed
from model import SCAN
from Tencent_PFAN import model_whole

COMBINATIONS = list(itertools.product(("t2i", "i2t"), (True, False), (False, True)))
gloo_reduce, gloo_gather = dist.all_reduce, dist.all_gather


def all_reduce(x):
    assert x.is_contiguous()
    return gloo_reduce(x.inner if isinstance(x, Pretend) else x)


def all_gather(parts, x):
    assert all(isinstance(part, Pretend) == isinstance(x, Pretend) for part in parts)
    assert all(part.shape == x.shape and part.dtype == x.dtype and part.is_contiguous() for part in parts)
    assert x.is_contiguous() and (x.numel() or not isinstance(x, Pretend))
    if isinstance(x, Pretend):
        return gloo_gather([part.inner for part in parts], x.inner)
    return gloo_gather(parts, x)


def losses(log):
    """Losses of two steps, the parameters after them and the waits of the second, for each combination."""
    results = []
    for way, max_violation, whole in COMBINATIONS:
        opt = make_opt(cross_attn=way, max_violation=max_violation, device="cuda:0")
        opt.position, opt.lambda_whole, opt.need_box_whole = "area" if whole else "attention", 2.0, whole
        torch.manual_seed(0)
        model = (model_whole.SCAN if whole else SCAN)(opt)
        share = distributed.local_slice(7)
        batch = [x[share] for x in batch_of(opt, 7, whole=whole)]
        steps = []
        for _ in range(2):
            log.reset()
            steps.append(model.train_emb(*batch).item())
        results.append((steps, [on_cpu(p) for p in model.params], list(log.waits)))
    return results


def start(rank, port):
    """The results of process rank of two."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    with pretend_cuda() as log:
        return losses(log)


def main():
    torch.set_num_threads(1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = os.fork()
    if not child:
        status = 1
        try:
            start(1, port)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    two = start(0, port)
    assert os.waitpid(child, 0)[1] == 0
    dist.destroy_process_group()
    del os.environ["WORLD_SIZE"]
    with pretend_cuda() as log:
        one = losses(log)
    for names, single, shared in zip(COMBINATIONS, one, two, strict=True):
        torch.testing.assert_close(torch.tensor(shared[0]), torch.tensor(single[0]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shared[1], single[1], rtol=0, atol=1e-4)
        assert len(shared[2]) <= 2, shared[2]
        print(*names, "as one process", len(shared[2]), "waits")


if __name__ == "__main__":
    main()
