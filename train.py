"""Train PFAN (or SCAN) with SCAN's flags: the training loop, checkpoints, TensorBoard.

python train.py --data_path ./data --data_name f30k_precomp --max_violation --bi_gru --agg_func Mean
"""

import argparse
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from data import EpochBatches
from evaluation import AverageMeter, LogCollector, i2t, score_split, t2i
from lib import distributed
from lib import events as tb_logger
from lib.checkpoint import BEST, load_checkpoint, save_checkpoint  # noqa: F401 (save_checkpoint: one of SCAN's names)
from lib.constants import SPECIAL
from lib.datasets.region_match import warn_of_boxes
from lib.errors import InputError, run
from lib.gpu import keep_features
from lib.interrupts import GracefulStop, StopTraining
from lib.options import TRAIN, add_options, check_options, option, to_namespace
from lib.regularise import regularise
from lib.resume import check_same_data, check_same_options, data_digests, load_training_state, take_weights
from lib.run_folder import LAST, RunFolder
from lib.workers import watched
from model import SCAN
from vocab import checkpoint_vocab, checkpoint_words, word_list

log = logging.getLogger(__name__)

IMPOSSIBLE = 1000  # times (1 + margin) · batch²: a loss above it means broken numbers, scores being cosines


def get_parser() -> argparse.ArgumentParser:
    """SCAN's and PFAN's flags with their published defaults, then the new ones."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]    (--help lists them)",
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
    for name in ("data_name", "model_name", "logger_name"):
        if not getattr(opt, name):
            raise InputError(f"--{name}: found no name, expected a folder's")
    least = max(2, distributed.world_size())
    if opt.batch_size < least:
        raise InputError(f"--batch_size {opt.batch_size}: expected at least {least}")
    if opt.agg_func == "LogSumExp" and not opt.lambda_lse:
        raise InputError(
            f"--lambda_lse {opt.lambda_lse}: expected a positive number, which --agg_func LogSumExp divides by"
        )
    if opt.overwrite and opt.resume == "auto":
        raise InputError("--overwrite: starts over, expected no --resume auto beside it")
    for name in ("mean_warmup_epochs", "mean_warmup_steps"):
        if getattr(opt, name) and not opt.max_violation:
            raise InputError(f"--{name} {getattr(opt, name)}: has no effect without --max_violation")


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    fit(get_parser().parse_args())


def fit(opt: Any, make_model: type[SCAN] = SCAN) -> float:
    """Train as opt says. Returns the best rsum on the dev split.

    opt: any object with flags as attributes; those that it lacks have their defaults. make_model: SCAN or a subclass.
    """
    opt = to_namespace(opt)
    distributed.start(opt.device)
    check(opt)
    folder = RunFolder(opt.model_name)
    with folder.locked() if distributed.rank() == 0 else nullcontext():
        path, checkpoint = checkpoint_to_resume(opt, folder)
        kind = make_model.vocabulary
        if checkpoint:
            check_same_options(path, checkpoint, opt)
        folder.claim(checkpoint, opt.overwrite)
        vocab = checkpoint_vocab(path, checkpoint, opt, kind) if checkpoint else kind.read(opt)
        opt.vocab_size = len(vocab)
        train_loader, val_loader = make_model.dataset.get_loaders(
            opt.data_name, vocab, opt.batch_size, opt.workers, opt
        )
        warn_of_boxes(train_loader.dataset)
        torch.manual_seed(opt.seed)
        model = make_model(opt)
        training = Run(opt, model, vocab, data_digests(train_loader, val_loader), folder)
        if checkpoint:
            training.resume(checkpoint, path)
        elif opt.init_from:
            training.start_from(opt.init_from)
        if not distributed.same_in_all_processes([model.Eiters]):
            raise InputError(f"--resume {opt.resume}: the processes found different checkpoints")
        log.info("%s on %s: %d pairs, %d words", opt.data_name, model.device, len(train_loader.dataset), len(vocab))
        train_loader = keep_features(train_loader, model.device, opt.features_on)
        with training.recorded(checkpoint), watched(train_loader):
            for epoch in range(training.epoch, opt.num_epochs):
                adjust_learning_rate(opt, model.optimizer, epoch)
                train(opt, train_loader, model, epoch, val_loader, training)
                training.finish_epoch(training.validate(val_loader))
    distributed.stop()
    return training.best_rsum


def train(opt: Any, train_loader: Any, model: SCAN, epoch: int, val_loader: Any, training: "Run | None" = None) -> None:
    """Train for the steps that are left of an epoch, and validate every opt.val_step steps.

    train_loader: any DataLoader whose batches model.train_emb takes. training: the run that the epoch belongs to, with
    its signals and checkpoints; None: an epoch by itself. Raises InputError that names the step, the pairs and the last
    good checkpoint where the loss is NaN, infinite or impossible, or its gradient NaN or infinite.
    """
    training = training or Run(opt, model)
    batch_time, data_time, model.logger = AverageMeter(), AverageMeter(), LogCollector()
    end = time.time()
    with logging_redirect_tqdm():
        for batch in training.stop.wait(training.batches(train_loader, epoch)):
            data_time.update(time.time() - end, 1)
            model.train_start()
            choose_negatives(opt, model.criterion, epoch, epoch * len(train_loader) + training.step)
            batch = regularise(batch, opt, epoch, SPECIAL.index(model.vocabulary.unknown))
            try:
                check_loss(model.train_emb(*batch), opt)
            except FloatingPointError as error:
                raise InputError(training.describe_failure(error, epoch, batch[-1], train_loader.dataset)) from None
            batch_time.update(time.time() - end, 1)
            if model.Eiters % opt.log_step == 0:
                place = epoch, training.step, len(train_loader)
                log.info("Epoch: [%d][%d/%d]\t%s\tTime %s\tData %s", *place, model.logger, batch_time, data_time)
            times = {"batch_time": batch_time.val, "data_time": data_time.val}
            for name, value in {"epoch": epoch, "step": training.step, **times}.items():
                tb_logger.log_value(name, value, step=model.Eiters)
            model.logger.tb_log(tb_logger, step=model.Eiters)
            training.step += 1
            if model.Eiters % opt.val_step == 0:
                training.validate(val_loader)
            training.finish_step()
            end = time.time()


def check_loss(loss: Tensor, opt: Any) -> None:
    """Raise FloatingPointError for a loss that cosine scores cannot produce."""
    if loss > IMPOSSIBLE * (1 + opt.margin) * opt.batch_size**2:
        raise FloatingPointError(f"the loss is {loss.item()}, which cosine scores cannot produce")


def validate(opt: Any, val_loader: Any, model: SCAN) -> float:
    """Rank the dev split both ways, log the recalls. Returns their sum, rsum."""
    (sims,) = score_split(model, val_loader)
    r, ri = i2t(None, None, None, sims), t2i(None, None, None, sims)
    rsum = sum(r[:3]) + sum(ri[:3])
    log.info("Image to text: %.1f, %.1f, %.1f, %.1f, %.1f", *r)
    log.info("Text to image: %.1f, %.1f, %.1f, %.1f, %.1f", *ri)
    log.info("rsum: %.1f", rsum)
    names = ("r1", "r5", "r10", "medr", "meanr", "r1i", "r5i", "r10i", "medri", "meanri", "rsum")
    for name, value in zip(names, (*r, *ri, rsum), strict=True):
        tb_logger.log_value(name, value, step=model.Eiters)
    return rsum


def adjust_learning_rate(opt: Any, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """opt.learning_rate, a tenth of it after every opt.lr_update epochs."""
    for group in optimizer.param_groups:
        group["lr"] = opt.learning_rate * 0.1 ** (epoch // opt.lr_update)


def choose_negatives(opt: Any, criterion: Any, epoch: int, step: int) -> None:
    """With --max_violation: all negatives in the first opt.mean_warmup_epochs epochs and opt.mean_warmup_steps steps,
    only the hardest afterwards. step: finished steps of the run."""
    warm_up = epoch < option(opt, "mean_warmup_epochs") or step < option(opt, "mean_warmup_steps")
    if opt.max_violation and criterion.max_violation == warm_up:
        criterion.max_violation = not warm_up
        log.info("step %d: the loss counts %s negatives", step, "all" if warm_up else "only the hardest")


@dataclass
class Run:
    """A training run: where it is, its checkpoints, and the signals that end it.

    vocab: its words go into the checkpoints. digests: of its data, see lib/resume.py. folder: of its checkpoints; None
    for an epoch by itself. epoch: finished epochs. step: finished steps of the epoch after them. saved: path of the
    last good checkpoint.
    """

    opt: Any
    model: SCAN
    vocab: Any = None
    digests: dict = field(default_factory=dict)
    folder: RunFolder | None = None
    epoch: int = 0
    step: int = 0
    best_rsum: float = -1.0
    saved: str = ""
    stop: GracefulStop = field(default_factory=GracefulStop, repr=False)

    @contextmanager
    def recorded(self, resumed: dict | None) -> Iterator[None]:
        """Inside, the run is saved and its events are written; Ctrl-C and SIGTERM end it where it can be resumed.

        resumed: the checkpoint that it goes on from.
        """
        opt = self.opt
        if distributed.rank() == 0:
            self.folder.clear(resumed, opt.logger_name)
            tb_logger.configure(opt.logger_name, self.folder.run)
        if self.epoch >= opt.num_epochs:
            log.warning("%s: has %d epochs, --num_epochs %d trains no more", self.saved, self.epoch, opt.num_epochs)
        try:
            with self.stop:
                yield
        except StopTraining:
            self.save(LAST)
            log.info("stopped after step %d; --resume %s continues, as auto does", self.model.Eiters, self.saved)
            raise
        finally:
            tb_logger.close()
        best = os.path.join(opt.model_name, BEST)
        where = best if os.path.exists(best) else "the run that was resumed"
        log.info("best rsum on dev %.1f, in %s", self.best_rsum, where)

    def batches(self, loader: Any, epoch: int) -> Iterable:
        """The batches that are left of an epoch, with a progress bar."""
        if isinstance(loader.batch_sampler, EpochBatches):
            loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, self.step
        return distributed.progress(loader, f"epoch {epoch}", len(loader), initial=self.step, unit="step")

    def describe_failure(self, error: Exception, epoch: int, ids: Sequence[int], dataset: Any) -> str:
        place, prefix = f"epoch {epoch}, step {self.step}", getattr(dataset, "prefix", "the data set")
        last = f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
        pairs = distributed.gather_ints(ids)
        return f"{place}: {error}, training cannot go on; pairs {pairs} of {prefix}; {last}"

    def validate(self, val_loader: Any) -> float:
        """rsum on the dev split. Several processes save first: torchrun ends those that do not end soon after it."""
        if distributed.world_size() > 1 and self.folder:
            self.save(LAST)
        with self.stop.resting():
            return validate(self.opt, val_loader, self.model)

    def finish_step(self) -> None:
        """Save where a step's end is the time for it; raise StopTraining after a signal."""
        if self.folder and self.opt.save_step and self.model.Eiters % self.opt.save_step == 0:
            self.save(LAST)
        self.stop.check()

    def finish_epoch(self, rsum: float) -> None:
        """Save an epoch whose rsum on dev is known."""
        name, is_best = f"checkpoint_{self.epoch}.pth.tar", rsum > self.best_rsum
        self.epoch, self.step, self.best_rsum = self.epoch + 1, 0, max(rsum, self.best_rsum)
        self.save(name, is_best)
        if distributed.rank() == 0:
            self.folder.remove_older(self.opt.keep_last)

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
            "words": word_list(self.vocab),
            "segment": self.vocab.segment,
            "variant": type(model).__name__,
            **self.digests,
        }
        if model.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(model.device)
        if distributed.rank() == 0:
            self.folder.save(state, is_best, name)
        distributed.barrier()
        self.saved = os.path.join(self.opt.model_name, name)

    def resume(self, checkpoint: dict, path: str) -> None:
        """Continue from a checkpoint: its parameters, optimizer, step count, random state and best score.

        Raises InputError naming path where it does not fit this run.
        """
        check_same_data(path, checkpoint, self.opt.vocab_size, self.digests)
        load_training_state(path, checkpoint, self.model)
        self.epoch, self.step = checkpoint["epoch"], checkpoint.get("step", 0)
        self.best_rsum, self.saved = float(checkpoint["best_rsum"]), path
        log.info("%s: %d epochs and %d steps done, best rsum %.1f", path, self.epoch, self.step, self.best_rsum)

    def start_from(self, path: str) -> None:
        """Take over the parameters of the checkpoint at path, nothing else."""
        checkpoint = load_checkpoint(path)
        words = checkpoint_words(path, checkpoint, self.opt, type(self.vocab))
        n = take_weights(path, checkpoint, self.model, words, self.vocab.word2idx)
        log.info("%s: weights taken over, embeddings of %d of %d words", path, n, len(self.vocab))


def checkpoint_to_resume(opt: Any, folder: RunFolder) -> tuple[str, dict | None]:
    """Path and contents of the checkpoint that --resume asks for; "", None without training."""
    if opt.resume == "auto":
        return folder.last()
    return opt.resume, load_checkpoint(opt.resume) if opt.resume else None


if __name__ == "__main__":
    run(main)
