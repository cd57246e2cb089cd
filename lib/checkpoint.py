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
import zipfile
from typing import Any

import numpy as np
import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from lib.constants import SPECIAL
from lib.errors import InputError, brief
from lib.files import replace, save_tensors
from lib.options import MODEL, MODEL_NEWER, REQUIRED, WHOLE_IMAGE

log = logging.getLogger(__name__)

BEST = "model_best.pth.tar"  # of the best score
KEYS = ("epoch", "model", "best_rsum", "opt", "Eiters")
LARGEST = 2**32  # of any count


def save_checkpoint(state: dict, is_best: bool, filename: str = "checkpoint.pth.tar", prefix: str = "") -> None:
    """Write state to prefix/filename, and to prefix/model_best.pth.tar if it is the best; each whole or not at all.

    The best one gets its name first: a run that ends between the two goes on from the older checkpoint, and comes to
    the same best again.
    """

    def write(file):
        save_tensors(state, file)
        if is_best:
            file.flush()
            with open(file.name, "rb") as source:
                replace(os.path.join(prefix, BEST), lambda copy: shutil.copyfileobj(source, copy))

    replace(os.path.join(prefix, filename), write)


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint of this or the published code onto the CPU; nothing in it is ever executed.

    Returns its dict, opt's position filled in from the parameters where opt has none.
    Raises InputError where path is missing, is no checkpoint, or holds anything but tensors, numbers and options.
    """
    if not os.path.isfile(path):
        found = "a folder, expected one of its checkpoints" if os.path.isdir(path) else "no such checkpoint"
        raise InputError(f"{path}: {found}")
    try:
        checkpoint = load_plain(path)
        make_plain(checkpoint)
        check_keys(checkpoint)
        check_checkpoint_options(checkpoint["opt"])
        check_states(checkpoint["model"], checkpoint["opt"], os.path.getsize(path))
        check_words(checkpoint)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused, damaged or more than tensors, numbers and options") from None
    except Exception:  # torch.load meets broken bytes with many exception types
        raise InputError(f"{path}: truncated or not a checkpoint, expected a file that train.py saved") from None
    if not hasattr(checkpoint["opt"], "position"):
        checkpoint["opt"].position = infer_position(checkpoint["model"][0])
    return checkpoint


def make_plain(checkpoint: Any) -> None:
    """Bring what other programs save into the form of train.py's checkpoints, in place, where nothing is lost.

    Options may be a dict, numbers tensors of one value; DataParallel puts `module.` before the names of parameters.
    """
    if not isinstance(checkpoint, dict):
        return
    if isinstance(checkpoint.get("opt"), dict) and all(isinstance(name, str) for name in checkpoint["opt"]):
        checkpoint["opt"] = argparse.Namespace(**checkpoint["opt"])
    options: Any = vars(checkpoint["opt"]) if isinstance(checkpoint.get("opt"), argparse.Namespace) else {}
    for values in (checkpoint, options):
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                values[name] = value.item()
    if isinstance(checkpoint.get("model"), (list, tuple)):
        for state in checkpoint["model"]:
            consume_prefix_in_state_dict_if_present(state, "module.")


def check_keys(checkpoint: Any) -> None:
    """Raise InputError where a checkpoint lacks a key, or a count or score is no number of its range."""
    missing = [key for key in KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise InputError(f"found no {missing[0]}, expected a dict of {', '.join(KEYS)}")
    for key, kinds, least in (("epoch", int, 0), ("best_rsum", (int, float), -1), ("Eiters", int, 0), ("step", int, 0)):
        value = checkpoint.get(key, 0)
        if not isinstance(value, kinds) or not least <= value <= LARGEST:
            raise InputError(f"{key} is {brief(value)}, expected a number of at least {least}")


def check_checkpoint_options(opt: Any) -> None:
    """Raise InputError where a checkpoint's opt lacks an option that SCAN's have, or an option's value does not fit."""
    if not isinstance(opt, argparse.Namespace):
        raise InputError(f"opt is a {type(opt).__name__}, expected an argparse.Namespace")
    for row in (*MODEL, *MODEL_NEWER, *WHOLE_IMAGE):
        if row.name in REQUIRED and not hasattr(opt, row.name):
            raise InputError(f"its options lack {row.name}")
        if hasattr(opt, row.name) and not row.fits(value := getattr(opt, row.name)):
            raise InputError(f"its option {row.name} is {brief(value)}, expected {row.expected()}")


def check_states(states: Any, opt: argparse.Namespace, n_bytes: int) -> None:
    """Raise InputError where states are not those of two encoders, or opt's sizes too large for a file of n_bytes."""
    if not isinstance(states, (list, tuple)) or [isinstance(state, dict) for state in states] != [True, True]:
        raise InputError("model is no list of two encoders' states")
    words = states[1].get("embed.weight")
    if not isinstance(words, torch.Tensor) or words.dim() != 2:
        raise InputError("text encoder: no embed.weight in the checkpoint, (words, word_dim)")
    least = len(words) * opt.word_dim + opt.embed_size * (opt.img_dim + 3 * opt.num_layers * opt.embed_size)
    if least > n_bytes:  # a model that large could not come from here, and need not be made to find out
        raise InputError(f"{n_bytes} bytes, too few for the sizes in its options")


def check_words(checkpoint: dict) -> None:
    """Raise InputError where a checkpoint's words, which older ones lack, are not one text for each word embedding."""
    words, n = checkpoint.get("words"), len(checkpoint["model"][1]["embed.weight"])
    if words is None:
        return
    texts = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not texts or len(set(words)) != n or len(words) != n or words[: len(SPECIAL)] != list(SPECIAL):
        raise InputError(f"words is {brief(words)}, expected {n} different words that begin with {' '.join(SPECIAL)}")
    if not isinstance(checkpoint.get("segment", False), bool):
        raise InputError(f"segment is {brief(checkpoint['segment'])}, expected True or False")


def check_state(encoder: str, own: dict, state: dict) -> None:
    """Raise InputError, naming an encoder, where a state lacks one of its parameters or has it in another shape."""
    for key, value in own.items():
        if key not in state:
            raise InputError(f"{encoder} encoder: no {key} in the checkpoint")
        if state[key].shape != value.shape and (value.dim() or state[key].numel() != 1):
            found, expected = tuple(state[key].shape), tuple(value.shape)
            raise InputError(f"{encoder} encoder: {key} is {found}, expected {expected}")


def check_kind(path: str, checkpoint: dict, whole_image: bool) -> None:
    """Raise InputError where the checkpoint at path is of a whole-image model, and one without was expected, or not."""
    if ("fc_whole.bias" in checkpoint["model"][0]) != whole_image:
        if whole_image:
            raise InputError(f"{path}: no whole-image model, expected to be evaluated by evaluation.py")
        others = "evaluation, explorer, search and figures take train.py's models only"
        raise InputError(f"{path}: a whole-image model; {others}, Tencent_PFAN/evaluation_whole.py ranks it")


def infer_position(image_state: dict) -> str:
    """The --position of an image encoder with these parameters."""
    if "fc_att.weight" in image_state:
        return "attention"
    return "area" if "position_embedding.weight" in image_state else "none"


def warn_of_variant(path: str, checkpoint: dict, make_model: type) -> None:
    """Log a warning where the checkpoint at path was trained by another class than the one that is to read it."""
    found, expected = checkpoint.get("variant"), make_model.__name__
    if found not in (None, expected):  # older checkpoints do not say
        log.warning("%s: trained by the class %s, read as %s (make_model)", path, brief(found), expected)


class NumberType:
    """Stands in for numpy.dtype while a checkpoint is read: the types of plain numbers and text, no other."""

    def __init__(self, code, *flags):
        self.code = code
        if not re.fullmatch(r"b1|[iuf][1248]|U\d{1,4}", code):
            raise pickle.UnpicklingError(f"GLOBAL numpy.{brief(code)}")

    def __setstate__(self, state):
        if state[1] in ("<", ">"):  # the byte order
            self.code = state[1] + self.code


def read_scalar(kind: NumberType, data: Any) -> Any:
    """Stands in for NumPy's function that restores a scalar: returns Python's bool, int, float or str."""
    data = data if isinstance(data, bytes) else data.encode("latin1")  # Python 2 wrote bytes as text
    return np.frombuffer(data, kind.code, count=1)[0].item()


PLAIN = [
    argparse.Namespace,
    (NumberType, "numpy.dtype"),
    (read_scalar, "numpy.core.multiarray.scalar"),
    (read_scalar, "numpy._core.multiarray.scalar"),
    *(
        (os.path.join, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    ),
]


def load_plain(path: str, mmap: bool = False) -> Any:
    """torch.load of nothing but tensors, numbers, text, paths (as text) and an argparse.Namespace.

    mmap: tensors are mapped instead of read, of files in PyTorch's present format.
    """
    with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_zip = zipfile.is_zipfile(path)
        file = path if is_zip else python3_strings(path)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zip)  # noqa: TID251


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
