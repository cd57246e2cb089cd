"""What test_distributed.py runs in one, two and three processes: a list of jobs, one after the
other, so that the processes have to be started once only.

jobs.py JOBS.json …      each file holds [processes, jobs, folder]; what job NAME gives in process R goes to
                         folder/NAME.R, what the process prints to folder/printed.R
"""

import json
import os
import signal
import socket
import sys
import traceback

import _root  # noqa: F401
import torch
from training import last_checkpoint

import evaluation
import train
from lib import distributed
from Tencent_PFAN import evaluation_whole, train_whole


def recording(make_model, dtype, stop_at, steps):
    """The class make_model with parameters of dtype; each step's numbers go to the list steps. Before step stop_at the
    last process gets a SIGTERM."""

    class Model(make_model):
        def __init__(self, opt):
            super().__init__(opt)
            self.img_enc.to(dtype)
            self.txt_enc.to(dtype)

        def encode_images(self, *parts):
            return super().encode_images(*(x.to(dtype) for x in parts))

        def step(self, batch, ids=None):
            if self.Eiters + 1 == stop_at and distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            loss = super().step(batch, ids)
            gradient = torch.cat([p.grad.flatten() for p in self.params])
            steps.append((len(batch[0]), loss.item(), gradient if not steps else None))
            return loss

    return Model


def train_job(flags, variant="root", dtype="float64", stop_at=None):
    """Train in float64 or float32: shares, losses, the first step's gradient, the last weights, how it ended, and how
    far the last checkpoint was at each validation."""
    trainer = train if variant == "root" else train_whole
    opt = trainer.get_parser().parse_args(flags.split())
    steps, models, saved, stopped, validate = [], [], [], False, train.validate

    class Model(recording(trainer.SCAN, getattr(torch, dtype), stop_at, steps)):
        def __init__(self, opt):
            super().__init__(opt)
            models.append(self)

    def validation(*args):
        checkpoint = last_checkpoint(opt.model_name)[1]
        saved.append((checkpoint["epoch"], checkpoint["step"]) if checkpoint else None)
        return validate(*args)

    train.validate = validation
    try:
        train.fit(opt, Model)
    except train.StopTraining:
        stopped = True
    finally:
        train.validate = validate
    shares, losses, gradients = zip(*steps, strict=True)
    return {
        "shares": shares,
        "losses": losses,
        "gradient": gradients[0],
        "weights": torch.cat([p.detach().flatten() for p in models[0].params]),
        "stopped": stopped,
        "saved": saved,
    }


def evaluate_job(model, variant="root", shard_size=128, batch_size=128):
    """What evalrank returns, and similarities of the test split in shards of shard_size."""
    module = evaluation if variant == "root" else evaluation_whole
    trainer = train if variant == "root" else train_whole
    torch.set_num_threads(1)
    loaded, loader = evaluation.load_split(model, None, None, "test", trainer.SCAN, batch_size=batch_size)
    sims = module.shard_xattn(*module.encode_data(loaded, loader), loaded.opt, shard_size)
    return {"result": module.evalrank(model, split="test", batch_size=batch_size), "sims": torch.from_numpy(sims)}


def work(jobs, folder):
    distributed.start("cpu")
    distributed.stop = lambda: None  # the next job needs the other processes
    for name, job in jobs.items():
        result = {"train": train_job, "evaluate": evaluate_job}[job.pop("job")](**job)
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
