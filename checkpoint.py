"""Checkpoint files: written whole or not at all, read without running anything in them."""

import argparse
import os
import pickle
import shutil

import torch

from errors import InputError


def save_checkpoint(state, is_best, filename="checkpoint.pth.tar", prefix=""):
    """Write state to prefix/filename, and to prefix/model_best.pth.tar if it is the best; each whole or not at all."""
    path = os.path.join(prefix, filename)
    replace(path, lambda file: torch.save(state, file))
    if is_best:
        with open(path, "rb") as source:
            replace(os.path.join(prefix, "model_best.pth.tar"), lambda file: shutil.copyfileobj(source, file))


def replace(path, write):
    """Have write(file) fill a temporary file, then give it its name, on disk before it replaces what was there."""
    part = path + ".part"
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def load_checkpoint(path):
    """Read a checkpoint of this or the published code onto the CPU; nothing in it is ever executed.

    Returns its dict, opt's position filled in from the parameters where opt has none.
    Raises InputError where path is missing, is no checkpoint, or holds anything but tensors, numbers and options.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "global" in line.lower()), "damaged")
        raise InputError(f"{path}: refused, not a plain checkpoint ({reason.strip()})") from None
    except Exception as error:  # torch.load meets broken bytes with many exception types
        raise InputError(f"{path}: not a checkpoint ({type(error).__name__})") from None
    keys = ("epoch", "model", "best_rsum", "opt", "Eiters")
    missing = [key for key in keys if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing or not isinstance(checkpoint["opt"], argparse.Namespace) or len(checkpoint["model"]) != 2:
        found = f"no {missing[0]}" if missing else "other contents"
        raise InputError(f"{path}: found {found}, expected a dict of {', '.join(keys)}")
    opt, image_state = checkpoint["opt"], checkpoint["model"][0]
    if not hasattr(opt, "position"):
        opt.position = (
            "attention" if "fc_att.weight" in image_state
            else "area" if "position_embedding.weight" in image_state
            else "none"
        )  # fmt: skip
    return checkpoint
