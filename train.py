"""Train PFAN (or SCAN) with SCAN's flags: the training loop, checkpoints, TensorBoard.

python train.py --data_path ./data --data_name f30k_precomp --max_violation --bi_gru --agg_func Mean
"""

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data import get_loaders
from evaluation import SHARD_SIZE, AverageMeter, LogCollector, encode_data, i2t, read_vocab, shard_xattn, t2i
from lib import distributed
from lib.checkpoint import BEST, LAST, last_checkpoint, load_checkpoint, remove_older, save_checkpoint
from lib.datasets.region_match import warn_of_boxes
from lib.errors import InputError, run
from lib.events import Events, tensorboard_logger  # noqa: F401 (others import it from here)
from lib.interrupts import GracefulStop, StopTraining
from lib.options import TRAIN, add_options, check_options, option, to_namespace
from lib.resume import caption_digests, check_same_data, check_same_options, load_training_state, take_weights
from lib.workers import watched_workers
from model import SCAN
from vocab import NoVocabularyError, Vocabulary, checkpoint_vocab, word_list

log = logging.getLogger(__name__)

IMPOSSIBLE = 1000  # cosine scores cannot produce a loss this many times (1 + margin) · batch²


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
    if opt.init_from and opt.resume not in ("", "auto"):
        raise InputError(f"--init_from {opt.init_from}: expected no --resume {opt.resume} beside it, only auto")
    least = max(2, distributed.world_size())
    if opt.batch_size < least:
        raise InputError(f"--batch_size {opt.batch_size}: expected at least {least}")
    if opt.agg_func == "LogSumExp" and not opt.lambda_lse:
        raise InputError(
            f"--lambda_lse {opt.lambda_lse}: expected a positive number, which --agg_func LogSumExp divides by"
        )
    if opt.mean_warmup_epochs and not opt.max_violation:
        raise InputError(f"--mean_warmup_epochs {opt.mean_warmup_epochs}: has no effect without --max_violation")


@dataclass
class Run:
    """One training run.

    loaders: of the train and the dev split. rank_dev(opt, dev loader, model, tb) → rsum.
    vocab: its words go into the checkpoints.
    epoch: finished epochs. step: finished steps of the epoch after them. saved: path of the last good checkpoint.
    tb, stop: made by train.
    """

    opt: Any
    model: Any
    loaders: tuple
    rank_dev: Callable
    vocab: Any = None
    epoch: int = 0
    step: int = 0
    best_rsum: float = -1.0
    saved: str = ""
    tb: Events = field(init=False, repr=False)
    stop: GracefulStop = field(init=False, repr=False)

    def train(self) -> None:
        """Train the epochs that are left."""
        opt, dataset = self.opt, self.loaders[0].dataset
        is_first = distributed.rank() == 0  # the process that logs and saves
        if is_first:
            os.makedirs(opt.model_name, exist_ok=True)
        self.tb, self.stop = Events(opt.logger_name, is_dummy=not is_first), GracefulStop()
        log.info("%s on %s: %d pairs, %d words", opt.data_name, self.model.device, len(dataset), opt.vocab_size)
        if self.epoch >= opt.num_epochs:
            log.warning("%s: has %d epochs, --num_epochs %d trains no more", self.saved, self.epoch, opt.num_epochs)
        dataset.keep_on(self.model.device, option(opt, "features_on"))
        with self.stop, watched_workers(dataset):
            try:
                while self.epoch < opt.num_epochs:
                    self.train_one_epoch()
            except StopTraining:
                self.save(LAST)
                log.info("stopped after step %d; --resume %s continues, as auto does", self.model.Eiters, self.saved)
                raise
        best = os.path.join(opt.model_name, BEST)
        where = best if os.path.exists(best) else "the run that was resumed"
        log.info("best rsum on dev %.1f, in %s", self.best_rsum, where)

    def train_one_epoch(self) -> None:
        """Train the steps that are left of an epoch, validate, save."""
        adjust_learning_rate(self.opt, self.model.optimizer, self.epoch)
        choose_negatives(self.opt, self.model.criterion, self.epoch)
        self.train_steps()
        rsum = self.validate()
        name, is_best = f"checkpoint_{self.epoch}.pth.tar", rsum > self.best_rsum
        self.epoch, self.step, self.best_rsum = self.epoch + 1, 0, max(rsum, self.best_rsum)
        self.save(name, is_best)
        if distributed.rank() == 0:
            remove_older(self.opt.model_name, self.opt.keep_last)

    def train_steps(self) -> None:
        opt, model = self.opt, self.model
        batch_time, data_time = AverageMeter(), AverageMeter()
        model.logger = LogCollector()
        end = time.time()
        with logging_redirect_tqdm():
            for batch in self.stop.wait(self.batches()):
                data_time.update(time.time() - end, 1)
                self.train_step(batch)
                batch_time.update(time.time() - end, 1)
                self.log_step(batch_time, data_time)
                if model.Eiters % opt.val_step == 0:
                    self.validate()
                if opt.save_step and model.Eiters % opt.save_step == 0:
                    self.save(LAST)
                self.stop.check()
                end = time.time()

    def batches(self) -> Iterable:
        """The batches that are left of an epoch, with a progress bar."""
        loader, desc = self.loaders[0], f"epoch {self.epoch}"
        loader.batch_sampler.epoch, loader.batch_sampler.first = self.epoch, self.step
        silent = distributed.rank() > 0 or None
        return tqdm(loader, desc, len(loader), initial=self.step, unit="step", leave=False, disable=silent)

    def train_step(self, batch: Sequence) -> None:
        """One step on this process's share of a batch.

        Raises InputError that names the step, the pairs and the last good checkpoint where the loss is NaN, infinite
        or impossible, or its gradient NaN or infinite.
        """
        opt, model = self.opt, self.model
        model.train_start()
        try:
            batch = self.loaders[0].dataset.with_features(batch)
            loss = (model.train_emb(*batch) if batch else model.step_without_pairs()).item()
            if loss > IMPOSSIBLE * (1 + opt.margin) * opt.batch_size**2:
                raise FloatingPointError(f"the loss is {loss}, which cosine scores cannot produce")
        except FloatingPointError as error:
            place, prefix = f"epoch {self.epoch}, step {self.step}", self.loaders[0].dataset.prefix
            ids = distributed.gather_ints(batch[-1] if batch else ())
            last = f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
            raise InputError(f"{place}: {error}, training cannot go on; pairs {ids} of {prefix}; {last}") from None
        self.step += 1

    def log_step(self, batch_time: AverageMeter, data_time: AverageMeter) -> None:
        model, index = self.model, self.step - 1
        if model.Eiters % self.opt.log_step == 0:
            place = self.epoch, index, len(self.loaders[0])
            log.info("Epoch: [%d][%d/%d]\t%s\tTime %s\tData %s", *place, model.logger, batch_time, data_time)
        times = {"batch_time": batch_time.val, "data_time": data_time.val}
        for name, value in {"epoch": self.epoch, "step": index, **times}.items():
            self.tb.log_value(name, value, step=model.Eiters)
        model.logger.tb_log(self.tb, step=model.Eiters)

    def validate(self) -> float:
        """rsum on the dev split. Several processes save first: torchrun ends those that do not end soon after it."""
        if distributed.world_size() > 1:
            self.save(LAST)
        with self.stop.resting():
            return self.rank_dev(self.opt, self.loaders[1], self.model, self.tb)

    def save(self, name: str, is_best: bool = False) -> None:
        """The first process writes all that a run needs to be resumed to opt.model_name/name; the others wait."""
        model = self.model
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "model": model.state_dict(),
            "best_rsum": self.best_rsum,
            "opt": self.opt,
            "Eiters": model.Eiters,
            "optimizer": model.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        if isinstance(self.vocab, Vocabulary):
            state |= {"words": word_list(self.vocab), "segment": self.vocab.segment}
        state["captions"] = caption_digests(self.loaders)
        if model.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(model.device)
        if distributed.rank() == 0:
            save_checkpoint(state, is_best, name, prefix=self.opt.model_name)
        distributed.barrier()
        self.saved = os.path.join(self.opt.model_name, name)

    def resume(self, checkpoint: dict, path: str) -> None:
        """Continue from a checkpoint: its parameters, optimizer, step count, random state and best score.

        Raises InputError naming path where it does not fit this run.
        """
        check_same_data(path, checkpoint, self.opt.vocab_size, caption_digests(self.loaders))
        load_training_state(path, checkpoint, self.model)
        self.epoch, self.step = checkpoint["epoch"], checkpoint.get("step", 0)
        self.best_rsum, self.saved = float(checkpoint["best_rsum"]), path
        log.info("%s: %d epochs and %d steps done, best rsum %.1f", path, self.epoch, self.step, self.best_rsum)

    def start_from(self, path: str, read_vocab: Callable) -> None:
        """Take over the parameters of the checkpoint at path, nothing else. read_vocab: as in fit."""
        checkpoint = load_checkpoint(path)
        words = checkpoint_words(self.opt, checkpoint, read_vocab)
        n = take_weights(path, checkpoint, self.model, words, self.vocab.word2idx)
        log.info("%s: weights taken over, embeddings of %d of %d words", path, n, len(self.vocab))


def fit(
    opt: Any,
    make_model: Callable = SCAN,
    make_loaders: Callable = get_loaders,
    read_vocab: Callable = read_vocab,
    validate: Callable | None = None,
) -> float:
    """Train as opt says; a variant replaces the other arguments. Returns the best rsum.

    opt: any object with flags as attributes; those that it lacks have their defaults. validate: rank_dev where None.
    """
    opt = to_namespace(opt)
    distributed.start(opt.device)
    check(opt)
    path, checkpoint = checkpoint_to_resume(opt)
    if checkpoint:
        check_same_options(path, checkpoint, opt)
    vocab = checkpoint_vocab(path, checkpoint, opt, read_vocab) if checkpoint else read_vocab(opt)
    opt.vocab_size = len(vocab)
    loaders = make_loaders(opt.data_name, vocab, opt.batch_size, opt.workers, opt)
    warn_of_boxes(loaders[0].dataset)
    torch.manual_seed(opt.seed)
    training = Run(opt, make_model(opt), loaders, validate or rank_dev, vocab)
    if checkpoint:
        training.resume(checkpoint, path)
    elif opt.init_from:
        training.start_from(opt.init_from, read_vocab)
    if not distributed.same_in_all_processes(training.model.Eiters):
        raise InputError(f"--resume {opt.resume}: the processes found different checkpoints")
    training.train()
    distributed.stop()
    return training.best_rsum


def checkpoint_to_resume(opt: Any) -> tuple[str, dict | None]:
    """Path and contents of the checkpoint that --resume asks for; "", None without one."""
    if opt.resume == "auto":
        return last_checkpoint(opt.model_name)
    return opt.resume, load_checkpoint(opt.resume) if opt.resume else None


def checkpoint_words(opt: Any, checkpoint: dict, read_vocab: Callable) -> list[str]:
    """The words of the checkpoint that --init_from names; an older one's are in the vocabulary of its data set.

    Raises InputError where there is no such file under --vocab_path or the checkpoint's, or none of the right size.
    """
    if checkpoint.get("words") is not None:
        return checkpoint["words"]
    name, n = checkpoint["opt"].data_name, len(checkpoint["model"][1]["embed.weight"])
    for folder in (opt.vocab_path, checkpoint["opt"].vocab_path):
        with suppress(NoVocabularyError):
            vocab = read_vocab(argparse.Namespace(vocab_path=folder, data_name=name))
            if len(vocab) == n:
                return word_list(vocab)
    raise InputError(
        f"{opt.init_from}: holds no words, and --vocab_path {opt.vocab_path} has no vocabulary of {name} with {n} words"
    )


def rank_dev(opt: Any, val_loader: Any, model: Any, tb: Any) -> float:
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
