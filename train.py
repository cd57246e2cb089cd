"""Train PFAN (or SCAN) with SCAN's flags: the training loop, checkpoints, TensorBoard.

python train.py --data_path ./data --data_name f30k_precomp --max_violation --bi_gru --agg_func Mean
"""

import argparse
import logging
import os
import time

# tensorboard_logger needs this before protobuf is first imported
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")

import tensorboard_logger
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from checkpoint import load_checkpoint, save_checkpoint
from cross_attention import AGG_FUNC, RAW_FEATURE_NORM, XATTN_SCORE
from data import NEW_FLAGS, get_loaders
from errors import InputError, run
from evaluation import AverageMeter, LogCollector, encode_data, i2t, read_vocab, shard_xattn, t2i
from model import LINEAR, MATMUL_PRECISION, POSITIONS, SCAN

log = logging.getLogger(__name__)


def get_parser():
    """SCAN's and PFAN's flags with their published defaults, then the new ones."""
    parser = argparse.ArgumentParser(
        description="Train a Position Focused Attention Network for image-text matching.",
        epilog="example: python train.py --data_path ./data --data_name f30k_precomp --max_violation --bi_gru "
        "--agg_func Mean --logger_name runs/f30k --model_name runs/f30k",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data_path", default="./data/", help="folder of the data sets")
    add("--data_name", default="precomp", help="data set, a folder there: f30k_precomp, coco_precomp, your own")
    add("--vocab_path", default="./vocab/", help="folder of the vocabularies, DATA_NAME_vocab.json")
    add("--margin", default=0.2, type=float, help="margin of the hinge loss")
    add("--num_epochs", "--num_epoches", default=30, type=int, help="epochs to train")
    add("--batch_size", default=128, type=int, help="pairs in a batch")
    add("--word_dim", default=300, type=int, help="size of a word's input embedding")
    add("--embed_size", default=1024, type=int, help="size of the joint embedding")
    add("--grad_clip", default=2.0, type=float, help="largest norm of the gradient; 0 does not clip")
    add("--num_layers", default=1, type=int, help="layers of the GRU")
    add("--learning_rate", default=0.0002, type=float, help="learning rate at the start")
    add("--lr_update", default=15, type=int, help="epochs after which the learning rate falls to a tenth")
    add("--workers", default=10, type=int, help="processes that load batches (at most one a core)")
    add("--log_step", default=10, type=int, help="steps between two log lines")
    add("--val_step", default=500, type=int, help="steps between two validations; each epoch's end has one as well")
    add("--logger_name", default="./runs/runX/log", help="folder of the TensorBoard events")
    add("--model_name", default="./runs/runX/checkpoint", help="folder of the checkpoints")
    add("--resume", default="", metavar="FILE", help="checkpoint to go on from")
    add("--max_violation", action="store_true", help="only the hardest negatives in the loss")
    add("--img_dim", default=2048, type=int, help="size of a region's feature")
    add("--no_imgnorm", action="store_true", help="do not normalise image embeddings")
    add("--no_txtnorm", action="store_true", help="do not normalise text embeddings")
    add("--raw_feature_norm", default="clipped_l2norm", help=" | ".join(RAW_FEATURE_NORM))
    add("--agg_func", default="LogSumExp", help=" | ".join(AGG_FUNC))
    add("--cross_attn", default="t2i", help=" | ".join(XATTN_SCORE))
    add("--precomp_enc_type", default="basic", help=" | ".join(LINEAR))
    add("--bi_gru", action="store_true", help="bidirectional GRU")
    add("--lambda_lse", default=6.0, type=float, help="temperature of LogSumExp")
    add("--lambda_softmax", default=9.0, type=float, help="temperature of the attention")
    add("--position", default=NEW_FLAGS["position"], help=" | ".join(POSITIONS) + ": PFAN-A, PFAN-P, plain SCAN")
    add("--seed", default=NEW_FLAGS["seed"], type=int, help="of start values and data order")
    add("--allow_empty_captions", action="store_true", help="take an empty caption line as <start> <end>")
    add("--device", default=NEW_FLAGS["device"], help="cpu, cuda, cuda:1, mps; auto: CUDA if there, else the CPU")
    add("--amp", action="store_true", help="mixed precision: encoders in bfloat16")
    add("--matmul_precision", default=NEW_FLAGS["matmul_precision"], help=" | ".join(MATMUL_PRECISION))
    return parser


def check(opt):
    """Raise InputError for flags that cannot be trained with."""
    for names, least, most in (
        ("batch_size", 2, 2**31),
        ("num_epochs log_step val_step lr_update num_layers embed_size word_dim img_dim", 1, 2**31),
        ("workers grad_clip margin lambda_lse lambda_softmax", 0, 2**31),
        ("seed", 0, 2**32 - 1),
    ):
        for name in names.split():
            if not least <= getattr(opt, name) <= most:
                raise InputError(f"--{name} {getattr(opt, name)}: expected at least {least}, at most {most}")
    if not 0 < opt.learning_rate < float("inf"):
        raise InputError(f"--learning_rate {opt.learning_rate}: expected a positive number")


def fit(opt, make_model=SCAN, make_loaders=get_loaders, vocab=None, validate=None):
    """Train as opt says; make_model, make_loaders and validate are what a variant replaces. Returns the best rsum."""
    check(opt)
    validate = validate or validation
    checkpoint = load_checkpoint(opt.resume) if opt.resume else None
    vocab = vocab or read_vocab(opt)
    opt.vocab_size = len(vocab)
    train_loader, val_loader = make_loaders(opt.data_name, vocab, opt.batch_size, opt.workers, opt)
    torch.manual_seed(opt.seed)
    model = make_model(opt)
    start_epoch, best_rsum = resume(model, checkpoint, opt) if checkpoint else (0, -1.0)
    os.makedirs(opt.model_name, exist_ok=True)
    tb = tensorboard_logger.Logger(opt.logger_name, flush_secs=5)
    log.info("%s on %s: %d pairs, %d words", opt.data_name, model.device, len(train_loader.dataset), len(vocab))
    for epoch in range(start_epoch, opt.num_epochs):
        adjust_learning_rate(opt, model.optimizer, epoch)
        train_loader.sampler.epoch = epoch
        train(opt, train_loader, model, epoch, val_loader, tb, validate)
        rsum = validate(opt, val_loader, model, tb)
        is_best = rsum > best_rsum
        best_rsum = max(rsum, best_rsum)
        state = {
            "epoch": epoch + 1,
            "model": model.state_dict(),
            "best_rsum": best_rsum,
            "opt": opt,
            "Eiters": model.Eiters,
            "optimizer": model.optimizer.state_dict(),
        }
        save_checkpoint(state, is_best, f"checkpoint_{epoch}.pth.tar", prefix=opt.model_name)
    best = os.path.join(opt.model_name, "model_best.pth.tar")
    log.info("best rsum on dev %.1f, in %s", best_rsum, best if os.path.exists(best) else "the run that was resumed")
    return best_rsum


def resume(model, checkpoint, opt):
    """Put a checkpoint's parameters, optimizer and step count into model. Returns (epochs done, best rsum)."""
    words = len(checkpoint["model"][1]["embed.weight"])
    if words != opt.vocab_size:
        raise InputError(f"{opt.resume}: made with a vocabulary of {words} words, found one of {opt.vocab_size}")
    try:
        model.load_state_dict(checkpoint["model"])
        if "optimizer" in checkpoint:
            model.optimizer.load_state_dict(checkpoint["optimizer"])
        else:
            log.warning("%s holds no optimizer state: Adam starts afresh", opt.resume)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{opt.resume}: {error or type(error).__name__}") from None
    model.Eiters = checkpoint["Eiters"]
    log.info("%s: %d epochs done, best rsum %.1f", opt.resume, checkpoint["epoch"], checkpoint["best_rsum"])
    return checkpoint["epoch"], float(checkpoint["best_rsum"])


def train(opt, train_loader, model, epoch, val_loader, tb, validate):
    """One epoch."""
    batch_time, data_time = AverageMeter(), AverageMeter()
    model.logger = LogCollector()
    end = time.time()
    with logging_redirect_tqdm():
        for i, batch in enumerate(tqdm(train_loader, desc=f"epoch {epoch}", unit="step", leave=False, disable=None)):
            model.train_start()
            data_time.update(time.time() - end, 1)
            loss = model.train_emb(*batch).item()
            if not torch.isfinite(torch.tensor(loss)):
                raise InputError(
                    f"epoch {epoch}, step {i}: the loss is {loss}, training cannot go on; "
                    f"pairs {list(batch[-1])[:8]} … of {train_loader.dataset.prefix}; "
                    f"the last good checkpoint is in {opt.model_name}"
                )
            batch_time.update(time.time() - end, 1)
            if model.Eiters % opt.log_step == 0:
                log.info(
                    "Epoch: [%d][%d/%d]\t%s\tTime %s\tData %s",
                    epoch, i, len(train_loader), model.logger, batch_time, data_time,
                )  # fmt: skip
            for name, value in (
                ("epoch", epoch), ("step", i), ("batch_time", batch_time.val), ("data_time", data_time.val),
            ):  # fmt: skip
                tb.log_value(name, value, step=model.Eiters)
            model.logger.tb_log(tb, step=model.Eiters)
            if model.Eiters % opt.val_step == 0:
                validate(opt, val_loader, model, tb)
            end = time.time()


def validation(opt, val_loader, model, tb):
    """Rank the dev split both ways, log the recalls, return their sum."""
    images, words, lens = encode_data(model, val_loader, packed=True)
    return log_recalls(shard_xattn(images, words, lens, opt), model, tb)


def log_recalls(sims, model, tb):
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


def adjust_learning_rate(opt, optimizer, epoch):
    """opt.learning_rate, a tenth of it after every opt.lr_update epochs."""
    for group in optimizer.param_groups:
        group["lr"] = opt.learning_rate * 0.1 ** (epoch // opt.lr_update)


def main():
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    fit(get_parser().parse_args())


if __name__ == "__main__":
    run(main)
