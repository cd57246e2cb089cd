"""Checkpoint files: written whole or not at all, read without running anything in them."""

import argparse
import io
import logging
import os
import pickle
import pickletools
import re
import shutil
import warnings
from typing import Any

import torch

from lib.errors import InputError, brief
from lib.files import replace

log = logging.getLogger(__name__)

LAST, BEST = "checkpoint_last.pth.tar", "model_best.pth.tar"  # saved within an epoch; of the best score
EPOCH = re.compile(r"checkpoint_(\d+)\.pth\.tar")  # saved after an epoch

# What every checkpoint of SCAN and PFAN says of its model and data, by kind; and what newer ones say as well.
TEXTS = "data_path data_name vocab_path raw_feature_norm agg_func cross_attn precomp_enc_type".split()
COUNTS = "batch_size word_dim embed_size num_layers img_dim".split()
NUMBERS = "lambda_lse lambda_softmax margin learning_rate grad_clip".split()
SWITCHES = "no_imgnorm no_txtnorm bi_gru max_violation".split()
OPTIONS = (*TEXTS, *COUNTS, *NUMBERS, *SWITCHES)
NEWER = {
    "position": TEXTS,
    "matmul_precision": TEXTS,
    "lambda_whole": NUMBERS,
    "seed": NUMBERS,
    "allow_empty_captions": SWITCHES,
    "amp": SWITCHES,
    "need_box_whole": SWITCHES,
}
LARGEST = 2**32  # of any number


def save_checkpoint(state: dict, is_best: bool, filename: str = "checkpoint.pth.tar", prefix: str = "") -> None:
    """Write state to prefix/filename, and to prefix/model_best.pth.tar if it is the best; each whole or not at all.

    The best one gets its name first: a run that ends between the two goes on from the older checkpoint, and comes to
    the same best again.
    """

    def write(file):
        torch.save(state, file)
        if is_best:
            file.flush()
            with open(file.name, "rb") as source:
                replace(os.path.join(prefix, BEST), lambda copy: shutil.copyfileobj(source, copy))

    replace(os.path.join(prefix, filename), write)


def epoch_checkpoints(folder: str) -> list[str]:
    """Paths of the checkpoints that epochs left in folder, the latest first."""
    found = [(int(match[1]), match[0]) for match in map(EPOCH.fullmatch, os.listdir(folder)) if match]
    return [os.path.join(folder, name) for _, name in sorted(found, reverse=True)]


def last_checkpoint(folder: str) -> tuple[str, dict] | tuple[None, None]:
    """Path of the checkpoint in folder that holds the most training, and its contents; None, None where there is none.

    One that cannot be read is passed over with a warning.
    """
    if not os.path.isdir(folder):
        return None, None
    found = []
    for paths in ([os.path.join(folder, LAST)], epoch_checkpoints(folder)):
        for path in filter(os.path.isfile, paths):
            try:
                found.append((path, load_checkpoint(path)))
                break
            except InputError as error:
                log.warning("passed over: %s", error)
    return max(found, key=lambda one: (one[1]["epoch"], one[1].get("step", 0)), default=(None, None))


def remove_older(folder: str, keep: int) -> None:
    """Remove what a newly saved epoch makes superfluous: LAST, and all epochs' checkpoints but the latest keep ones
    (none of these with keep 0). The best one stays."""
    older = epoch_checkpoints(folder)[keep:] if keep else []
    for path in [os.path.join(folder, LAST), *older]:
        if os.path.isfile(path):
            os.remove(path)


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this or the published code onto the CPU; nothing in it is ever executed.

    Returns its dict, opt's position filled in from the parameters where opt has none.
    Raises InputError where path is missing, is no checkpoint, or holds anything but tensors, numbers and options.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint")
    try:
        checkpoint = load_plain(path)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {found[1]}" if found else "damaged"
        raise InputError(f"{path}: refused, expected nothing but tensors, numbers and options ({reason})") from None
    except Exception as error:  # torch.load meets broken bytes with many exception types
        raise InputError(f"{path}: not a checkpoint ({type(error).__name__})") from None
    keys = ("epoch", "model", "best_rsum", "opt", "Eiters")
    missing = [key for key in keys if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"{path}: found no {missing[0]}, expected a dict of {', '.join(keys)}")
    opt, states = checkpoint["opt"], checkpoint["model"]
    if not isinstance(opt, argparse.Namespace):
        raise InputError(f"{path}: opt is a {type(opt).__name__}, expected an argparse.Namespace")
    lacking = [name for name in OPTIONS if not hasattr(opt, name)]
    if lacking:
        raise InputError(f"{path}: its options lack {lacking[0]}")
    check_options(path, opt)
    for key, kinds, least in (("epoch", int, 0), ("best_rsum", (int, float), -1), ("Eiters", int, 0), ("step", int, 0)):
        value = checkpoint.get(key, 0)
        if not isinstance(value, kinds) or not least <= value <= LARGEST:
            raise InputError(f"{path}: {key} is {brief(value)}, expected a number of at least {least}")
    if not isinstance(states, (list, tuple)) or [isinstance(state, dict) for state in states] != [True, True]:
        raise InputError(f"{path}: model is no list of two encoders' states")
    words = states[1].get("embed.weight")
    if not isinstance(words, torch.Tensor) or words.dim() != 2:
        raise InputError(f"{path}: text encoder: no embed.weight in the checkpoint, (words, word_dim)")
    least = len(words) * opt.word_dim + opt.embed_size * (opt.img_dim + 3 * opt.num_layers * opt.embed_size)
    if least > os.path.getsize(path):  # a model that large could not come from here, and need not be made to find out
        raise InputError(f"{path}: {os.path.getsize(path)} bytes, too few for the sizes in its options")
    image_state = states[0]
    if not hasattr(opt, "position"):
        opt.position = (
            "attention"
            if "fc_att.weight" in image_state
            else "area"
            if "position_embedding.weight" in image_state
            else "none"
        )
    return checkpoint


def check_options(path: str, opt: argparse.Namespace) -> None:
    """Raise InputError naming path and the option of a checkpoint's opt that is of another kind than train.py's."""
    kinds = (
        (
            TEXTS,
            "one line of text",
            lambda x: isinstance(x, str) and len(x) < 4096 and x.splitlines() in ([x], []) and "\0" not in x,
        ),
        (COUNTS, f"a whole number from 1 to {LARGEST}", lambda x: type(x) is int and 1 <= x <= LARGEST),
        (NUMBERS, f"a number from 0 to {LARGEST}", lambda x: type(x) in (int, float) and 0 <= x <= LARGEST),
        (SWITCHES, "True or False", lambda x: isinstance(x, bool)),
    )
    for names, expected, fits in kinds:
        newer = [name for name, like in NEWER.items() if like is names and hasattr(opt, name)]
        for name in (*names, *newer):
            if not fits(value := getattr(opt, name)):
                raise InputError(f"{path}: its option {name} is {brief(value)}, expected {expected}")


def load_plain(path: str) -> Any:
    """torch.load of nothing but tensors, numbers and an argparse.Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
        except pickle.UnpicklingError as error:
            if "Unsupported operand 84" not in str(error):  # 84 is T, the opcode of Python 2 for a long string
                raise
            return torch.load(python3_strings(path), map_location="cpu", weights_only=True)  # noqa: TID251


def python3_strings(path: str) -> io.BytesIO:
    """The bytes of a file in PyTorch's old format, its Python 2 strings made into those of Python 3 (same layout)."""
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read())
    with stream.getbuffer() as data:
        for _ in range(5):  # magic number, version, machine, the checkpoint itself, its storages' names
            for opcode, _, at in pickletools.genops(stream):
                if opcode.name == "BINSTRING" and at is not None:
                    data[at] = ord("X")
    stream.seek(0)
    return stream
