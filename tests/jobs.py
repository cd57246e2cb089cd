"""What test_distributed.py runs in one, two and three processes: a list of jobs, one after the other, so that the
processes have to be started once only.

jobs.py JOBS.json …      each file holds [processes, jobs, folder]; what job NAME gives in process R goes to
                         folder/NAME.R, what the process prints to folder/printed.R
"""

import json
import os
import signal
import socket
import sys
import traceback
from unittest import mock

import _root  # noqa: F401
import torch
import torch.distributed as dist
from conftest import make_opt
from folders import random_batch
from pretend_cuda import Pretend, pretend_cuda
from training import last_checkpoint

import evaluation
import train
from lib import distributed
from Tencent_PFAN import evaluation_whole, train_whole

gloo_reduce, gloo_gather = dist.all_reduce, dist.all_gather


def train_job(flags, whole, stop_at=None):
    """Train in float64: shares, losses, the first step's gradient, the last weights, whether training was stopped, and
    how far the last checkpoint was at each validation. Before step stop_at the last process gets a SIGTERM."""
    trainer = train_whole if whole else train
    opt = trainer.get_parser().parse_args(flags.split())
    found = {"shares": [], "losses": [], "saved": [], "stopped": False}
    validate = train.validate

    class Model(trainer.SCAN):
        def __init__(self, opt):
            super().__init__(opt)
            self.img_enc.double()
            self.txt_enc.double()

        def encode_images(self, *parts):
            return super().encode_images(*(x.double() for x in parts))

        def step(self, batch, ids=None):
            if self.Eiters + 1 == stop_at and distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            loss = super().step(batch, ids)
            found["shares"].append(len(batch[0]))
            found["losses"].append(loss.item())
            found.setdefault("gradient", torch.cat([p.grad.flatten() for p in self.params]))
            found["weights"] = torch.cat([p.detach().flatten() for p in self.params])
            return loss

    def validation(*args):
        checkpoint = last_checkpoint(opt.model_name)[1]
        found["saved"].append((checkpoint["epoch"], checkpoint["step"]) if checkpoint else None)
        return validate(*args)

    with mock.patch.object(train, "validate", validation):
        try:
            train.fit(opt, Model)
        except train.StopTraining:
            found["stopped"] = True
    return found


def evaluate_job(model, whole):
    """What evalrank returns, and the similarities of the test split in shards of 7."""
    module, kind = (evaluation_whole, train_whole.SCAN) if whole else (evaluation, train.SCAN)
    loaded, loader = evaluation.load_split(model, None, None, "test", kind, batch_size=16)
    sims = module.shard_xattn(*module.encode_data(loaded, loader), loaded.opt, 7)
    return {"result": module.evalrank(model, split="test", batch_size=16), "sims": torch.from_numpy(sims)}


def gpu_job(whole, **flags):
    """Two steps on the simulated GPU: losses, the parameters after them, and what the second one waited for."""
    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather), pretend_cuda() as log:
        opt = make_opt(device="cuda:0", position="area" if whole else "attention", need_box_whole=whole, **flags)
        torch.manual_seed(0)
        model = (train_whole if whole else train).SCAN(opt)
        share, losses = distributed.local_slice(7), []
        for _ in range(2):
            log.reset()
            batch = random_batch((8, 7, 7, 5, 4, 4, 3), n_regions=6, img_dim=opt.img_dim, whole=whole)
            losses.append(model.train_emb(*(x[share] for x in batch)).item())
        weights = torch.cat([p.detach().inner.flatten() for p in model.params])
        return {"losses": losses, "weights": weights, "waits": log.waits}


def all_reduce(x):
    """gloo's, of a tensor that lies in one piece, as NCCL demands."""
    assert x.is_contiguous()
    return gloo_reduce(x.inner if isinstance(x, Pretend) else x)


def all_gather(parts, x):
    """gloo's, of tensors of one size and type that lie in one piece and are not empty, as NCCL demands."""
    assert all(isinstance(part, Pretend) == isinstance(x, Pretend) for part in parts)
    assert all(part.shape == x.shape and part.dtype == x.dtype and part.is_contiguous() for part in (x, *parts))
    if not isinstance(x, Pretend):
        return gloo_gather(parts, x)
    assert x.numel()
    return gloo_gather([part.inner for part in parts], x.inner)


def work(jobs, folder):
    torch.set_num_threads(1)
    distributed.start("cpu")
    distributed.stop = lambda: None  # the next job needs the other processes
    for name, job in jobs.items():
        result = {"train": train_job, "evaluate": evaluate_job, "gpu": gpu_job}[job.pop("job")](**job)
        torch.save(result, os.path.join(folder, f"{name}.{distributed.rank()}"))


def start(n, jobs, folder):
    """Fork n processes that find each other as those of torchrun do. Returns their ids."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(n):
        if pid := os.fork():
            started.append(pid)
            continue
        places = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.stdout = open(os.path.join(folder, f"printed.{rank}"), "w", buffering=1)  # noqa: SIM115
        status = 1
        try:
            work(jobs, folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return started


def main():
    for jobs in sys.argv[1:]:
        with open(jobs) as file:
            n, jobs, folder = json.load(file)
        ended = [os.waitpid(pid, 0)[1] for pid in start(n, jobs, folder)]
        if any(ended):
            sys.exit(f"{n} processes ended with {ended}")


if __name__ == "__main__":
    main()
