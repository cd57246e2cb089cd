"""Train PFAN (or SCAN) with SCAN's flags: the training loop, checkpoints, TensorBoard.

python train.py --data_path ./data --data_name f30k_precomp --max_violation --bi_gru --agg_func Mean
"""

import argparse
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

# tensorboard_logger needs this before protobuf is first imported
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")

import tensorboard_logger
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data import get_loaders
from evaluation import SHARD_SIZE, AverageMeter, LogCollector, encode_data, i2t, read_vocab, shard_xattn, t2i
from lib import distributed
from lib.checkpoint import BEST, LAST, last_checkpoint, load_checkpoint, remove_older, save_checkpoint
from lib.errors import InputError, run
from lib.options import TRAIN, add_options, check_options, option
from lib.workers import watched_workers
from model import SCAN

log = logging.getLogger(__name__)

EXPLODED = 1000  # a loss this many times the square of the batch has left what cosines can give far behind


def get_parser() -> argparse.ArgumentParser:
    """SCAN's and PFAN's flags with their published defaults, then the new ones."""
    parser = argparse.ArgumentParser(
        description="Train a Position Focused Attention Network for image-text matching.",
        epilog="example: python train.py --data_path ./data --data_name f30k_precomp --max_violation --bi_gru "
        "--agg_func Mean --logger_name runs/f30k --model_name runs/f30k",
    )
    add_options(parser, TRAIN)
    return parser


def check(opt: Any) -> None:
    """Raise InputError for flags that cannot be trained with."""
    check_options(opt)
    least = max(2, distributed.world_size())
    if opt.batch_size < least:
        raise InputError(f"--batch_size {opt.batch_size}: expected at least {least}")
    if opt.mean_warmup_epochs and not opt.max_violation:
        raise InputError(f"--mean_warmup_epochs {opt.mean_warmup_epochs}: has no effect without --max_violation")


class Events(tensorboard_logger.Logger):
    """TensorBoard's events in a folder; with is_dummy nowhere. An error in writing them names the folder."""

    def log_value(self, *args, **more):
        if not self.is_dummy:  # which would keep them in memory
            super().log_value(*args, **more)

    def _write_event(self, event):
        try:
            super()._write_event(event)
        except OSError as error:
            error.filename = self.logdir
            raise

    def __del__(self):
        with suppress(OSError):  # of the same full disk
            super().__del__()


@dataclass
class Progress:
    """How far training is: epochs done, steps done of the epoch after them, the best rsum, the last good checkpoint."""

    epoch: int = 0
    step: int = 0
    best_rsum: float = -1.0
    saved: str = ""


class Stopped(KeyboardInterrupt):
    """Raised between two steps, the signal's number its argument: what is saved then can be gone on from."""


class Stop:
    """While this lasts, Ctrl-C and SIGTERM are noted in asked; training ends after the step at hand.

    Where the model rests, it ends at once; a second Ctrl-C or SIGTERM does not wait for the step either. Several
    processes have to end at the same step, so there they always wait for it.
    """

    def __init__(self):
        self.asked, self.resting = None, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        again, self.asked = self.asked, number
        if distributed.world_size() == 1 and (self.resting or again):
            raise (Stopped if self.resting else KeyboardInterrupt)(number)

    @contextmanager
    def rest(self):
        """The model does not change in here."""
        self.resting = True
        try:
            yield
        finally:
            self.resting = False

    def check(self):
        """Raise Stopped in all processes where an end was asked for in one of them."""
        if distributed.any_process(self.asked):
            raise Stopped(self.asked or signal.SIGTERM)


def fit(
    opt: Any,
    make_model: Callable = SCAN,
    make_loaders: Callable = get_loaders,
    vocab: Any = None,
    validate: Callable | None = None,
) -> float:
    """Train as opt says; make_model, make_loaders and validate are what a variant replaces. Returns the best rsum."""
    distributed.start(opt.device)
    check(opt)
    validate = validate or validation
    if opt.resume == "auto":
        path, checkpoint = last_checkpoint(opt.model_name)
    else:
        path, checkpoint = opt.resume, load_checkpoint(opt.resume) if opt.resume else None
    vocab = vocab or read_vocab(opt)
    opt.vocab_size = len(vocab)
    train_loader, val_loader = make_loaders(opt.data_name, vocab, opt.batch_size, opt.workers, opt)
    torch.manual_seed(opt.seed)
    model = make_model(opt)
    progress = resume(model, checkpoint, opt, str(path)) if checkpoint else Progress()
    if not distributed.same_in_all_processes(model.Eiters):
        raise InputError(f"--resume {opt.resume}: the processes found different checkpoints")
    first = distributed.rank() == 0  # the process that logs and saves
    if first:
        os.makedirs(opt.model_name, exist_ok=True)
    tb = Events(opt.logger_name, is_dummy=not first)
    log.info("%s on %s: %d pairs, %d words", opt.data_name, model.device, len(train_loader.dataset), len(vocab))
    with Stop() as stop, watched_workers(train_loader.dataset):
        try:
            while progress.epoch < opt.num_epochs:
                train_epoch(opt, train_loader, model, progress, val_loader, tb, validate, stop)
        except Stopped:
            save(opt, model, progress, LAST)
            log.info("stopped after step %d; --resume %s goes on there, as auto does", model.Eiters, progress.saved)
            raise
    best = os.path.join(opt.model_name, BEST)
    where = best if os.path.exists(best) else "the run that was resumed"
    log.info("best rsum on dev %.1f, in %s", progress.best_rsum, where)
    distributed.stop()
    return progress.best_rsum


def train_epoch(
    opt: Any,
    train_loader: Any,
    model: Any,
    progress: Progress,
    val_loader: Any,
    tb: Any,
    validate: Callable,
    stop: Stop,
) -> None:
    """What is left of an epoch, its validation, its checkpoint."""
    adjust_learning_rate(opt, model.optimizer, progress.epoch)
    choose_negatives(opt, model.criterion, progress.epoch)
    train(opt, train_loader, model, progress, val_loader, tb, validate, stop)
    rsum = rank_dev(opt, val_loader, model, progress, tb, validate, stop)
    name, is_best = f"checkpoint_{progress.epoch}.pth.tar", rsum > progress.best_rsum
    progress.epoch, progress.step, progress.best_rsum = progress.epoch + 1, 0, max(rsum, progress.best_rsum)
    save(opt, model, progress, name, is_best)
    if distributed.rank() == 0:
        remove_older(opt.model_name, opt.keep_last)


def save(opt: Any, model: Any, progress: Progress, name: str, is_best: bool = False) -> None:
    """The first process writes all that a run needs to go on, to opt.model_name/name; the others wait for it."""
    state = {
        "epoch": progress.epoch,
        "step": progress.step,
        "model": model.state_dict(),
        "best_rsum": progress.best_rsum,
        "opt": opt,
        "Eiters": model.Eiters,
        "optimizer": model.optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    if model.device.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state(model.device)
    if distributed.rank() == 0:
        save_checkpoint(state, is_best, name, prefix=opt.model_name)
    distributed.barrier()
    progress.saved = os.path.join(opt.model_name, name)


def resume(model: Any, checkpoint: dict, opt: Any, path: str) -> Progress:
    """Put a checkpoint's parameters, optimizer, step count and random state into model. Returns its Progress."""
    words = len(checkpoint["model"][1]["embed.weight"])
    if words != opt.vocab_size:
        raise InputError(f"{path}: made with a vocabulary of {words} words, found one of {opt.vocab_size}")
    progress = Progress(checkpoint["epoch"], checkpoint.get("step", 0), float(checkpoint["best_rsum"]), path)
    for name in ("batch_size", "seed") if progress.step else ():
        found, then = getattr(opt, name), option(checkpoint["opt"], name)
        if found != then:
            raise InputError(f"{path}: saved within an epoch with --{name} {then}, found --{name} {found}")
    try:
        model.load_state_dict(checkpoint["model"])
        if "optimizer" in checkpoint:
            load_moments(model, checkpoint["optimizer"])
        else:
            log.warning("%s holds no optimizer state: Adam starts afresh", path)
        if "random" in checkpoint:
            torch.set_rng_state(checkpoint["random"])
        if "random_cuda" in checkpoint and model.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random_cuda"], model.device)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    model.Eiters = checkpoint["Eiters"]
    log.info("%s: %d epochs and %d steps done, best rsum %.1f", path, progress.epoch, progress.step, progress.best_rsum)
    return progress


def load_moments(model: Any, state: dict) -> None:
    """Put Adam's moments of each parameter from an optimizer's state_dict into model's; the settings stay this run's.

    Raises ValueError where they do not fit the parameters, and whatever a state of another form leads to.
    """
    groups = model.optimizer.state_dict()["param_groups"]
    if len(state["param_groups"][0]["params"]) != len(model.params):
        raise ValueError(f"optimizer: not of {len(model.params)} parameters")
    for number, moments in state["state"].items():
        if number not in range(len(model.params)):
            raise ValueError(f"optimizer: moments of a parameter {number!r:.20}, there are {len(model.params)}")
        shape = model.params[number].shape
        if {name: x.shape for name, x in moments.items()} != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
            raise ValueError(f"optimizer: moments of parameter {number} do not fit its shape {tuple(shape)}")
    model.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def train(
    opt: Any,
    train_loader: Any,
    model: Any,
    progress: Progress,
    val_loader: Any,
    tb: Any,
    validate: Callable,
    stop: Stop,
) -> None:
    """The steps that are left of an epoch."""
    batch_time, data_time = AverageMeter(), AverageMeter()
    model.logger = LogCollector()
    epoch, order = progress.epoch, train_loader.batch_sampler
    order.epoch, order.first = epoch, progress.step
    bar = tqdm(
        train_loader,
        f"epoch {epoch}",
        len(train_loader),
        initial=progress.step,
        unit="step",
        leave=False,
        disable=distributed.rank() > 0 or None,
    )
    end = time.time()
    with logging_redirect_tqdm():
        for i, batch in enumerate(bar, progress.step):
            model.train_start()
            data_time.update(time.time() - end, 1)
            train_step(opt, model, batch, f"epoch {epoch}, step {i}", train_loader.dataset.prefix, progress.saved)
            progress.step = i + 1
            batch_time.update(time.time() - end, 1)
            if model.Eiters % opt.log_step == 0:
                log.info(
                    "Epoch: [%d][%d/%d]\t%s\tTime %s\tData %s",
                    epoch,
                    i,
                    len(train_loader),
                    model.logger,
                    batch_time,
                    data_time,
                )
            for name, value in (
                ("epoch", epoch),
                ("step", i),
                ("batch_time", batch_time.val),
                ("data_time", data_time.val),
            ):
                tb.log_value(name, value, step=model.Eiters)
            model.logger.tb_log(tb, step=model.Eiters)
            if model.Eiters % opt.val_step == 0:
                rank_dev(opt, val_loader, model, progress, tb, validate, stop)
            if opt.save_step and model.Eiters % opt.save_step == 0:
                save(opt, model, progress, LAST)
            stop.check()
            end = time.time()


def train_step(opt: Any, model: Any, batch: Sequence, place: str, prefix: str, saved: str) -> None:
    """One step on this process's share of a batch. Raises InputError that names place, pairs and the last good
    checkpoint where the loss or its gradient is no number, or the loss far beyond what scores between -1 and 1 give."""
    try:
        loss = (model.train_emb(*batch) if batch else model.step_without_pairs()).item()
        if loss > EXPLODED * (1 + opt.margin) * opt.batch_size**2:
            raise FloatingPointError(f"the loss is {loss}")
    except FloatingPointError as error:
        ids = distributed.gather_ints(batch[-1] if batch else ())
        last = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
        raise InputError(f"{place}: {error}, training cannot go on; pairs {ids} of {prefix}; {last}") from None


def rank_dev(
    opt: Any, val_loader: Any, model: Any, progress: Progress, tb: Any, validate: Callable, stop: Stop
) -> float:
    """What validate returns. Several processes save first: they end after it, and torchrun may not wait so long."""
    if distributed.world_size() > 1:
        save(opt, model, progress, LAST)
    with stop.rest():
        return validate(opt, val_loader, model, tb)


def validation(opt: Any, val_loader: Any, model: Any, tb: Any) -> float:
    """Rank the dev split both ways, log the recalls, return their sum."""
    images, words, lens = encode_data(model, val_loader, packed=True)
    return log_recalls(shard_xattn(images, words, lens, opt, SHARD_SIZE), model, tb)


def log_recalls(sims: Any, model: Any, tb: Any) -> float:
    """Log the recalls of dev similarities (n_images, n_captions) and return rsum."""
    r, ri = i2t(None, None, None, sims), t2i(None, None, None, sims)
    rsum = sum(r[:3]) + sum(ri[:3])
    log.info("Image to text: %.1f, %.1f, %.1f, %.1f, %.1f", *r)
    log.info("Text to image: %.1f, %.1f, %.1f, %.1f, %.1f", *ri)
    log.info("rsum: %.1f", rsum)
    names = ("r1", "r5", "r10", "medr", "meanr", "r1i", "r5i", "r10i", "medri", "meanri", "rsum")
    for name, value in zip(names, (*r, *ri, rsum), strict=True):
        tb.log_value(name, value, step=model.Eiters)
    return rsum


def adjust_learning_rate(opt: Any, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """opt.learning_rate, a tenth of it after every opt.lr_update epochs."""
    for group in optimizer.param_groups:
        group["lr"] = opt.learning_rate * 0.1 ** (epoch // opt.lr_update)


def choose_negatives(opt: Any, criterion: Any, epoch: int) -> None:
    """With --max_violation: all negatives in the first opt.mean_warmup_epochs epochs, only the hardest afterwards."""
    warm_up = epoch < opt.mean_warmup_epochs
    if opt.max_violation and criterion.max_violation == warm_up:
        criterion.max_violation = not warm_up
        log.info("epoch %d: the loss counts %s negatives", epoch, "all" if warm_up else "only the hardest")


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    fit(get_parser().parse_args())


if __name__ == "__main__":
    run(main)
