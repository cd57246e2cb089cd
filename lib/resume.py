"""A new run that continues another's checkpoint (--resume) or takes its weights (--init_from)."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from lib.errors import InputError
from lib.files import digest_lines, sample_digest
from lib.options import OPTIONS

log = logging.getLogger(__name__)

WAY_OUT = "give the same, or start a new run from its weights with --init_from"


def data_digests(train_loader: Any, dev_loader: Any) -> dict[str, dict[str, str]]:
    """Digests of the train and the dev loader's data sets: {"captions": {split: …}, "features": {split: …}}.

    Of a data set without captions, or without features in a file, there is none.
    """
    datasets = {"train": train_loader.dataset, "dev": dev_loader.dataset}
    captions = {split: digest_lines(x.captions) for split, x in datasets.items() if hasattr(x, "captions")}
    files = {split: getattr(getattr(x, "images", None), "filename", None) for split, x in datasets.items()}
    return {"captions": captions, "features": {split: sample_digest(path) for split, path in files.items() if path}}


def check_same_options(path: str, checkpoint: dict, opt: Any) -> None:
    """Raise InputError where a run's options make another model, data or batches than those of what it resumes.

    path: of the checkpoint. opt: the run's options. Batch size and seed must be the same within an epoch only.
    """
    then = checkpoint["opt"]
    of_batches = ("batch_size", "seed") if checkpoint.get("step", 0) else ()
    for name, row in OPTIONS.items():
        if not (row.fixed or name in of_batches) or not (hasattr(opt, name) and hasattr(then, name)):
            continue
        if getattr(opt, name) != getattr(then, name):
            flags = f"--{name} {getattr(then, name)}, found --{name} {getattr(opt, name)}"
            when = "saved within an epoch" if name in of_batches else "trained"
            raise InputError(f"{path}: {when} with {flags}; {WAY_OUT}")


def check_same_data(path: str, checkpoint: dict, vocab_size: int, digests: dict[str, dict[str, str]]) -> None:
    """Raise InputError where a run's data are not those of the checkpoint that it resumes.

    digests: the run's data_digests. The train captions must be the same within an epoch only.
    """
    words = len(checkpoint["model"][1]["embed.weight"])
    if words != vocab_size:
        raise InputError(f"{path}: made with a vocabulary of {words} words, found one of {vocab_size}")
    for kind, found in digests.items():
        stored = checkpoint.get(kind)
        for split in found if isinstance(stored, dict) else ():
            if kind == "captions" and split == "train" and not checkpoint.get("step", 0):
                continue
            if stored.get(split, found[split]) != found[split]:
                raise InputError(f"{path}: trained with other {split} {kind}; {WAY_OUT}")


def load_training_state(path: str, checkpoint: dict, model: Any) -> None:
    """Put a checkpoint's parameters, optimizer, step count and random state into model.

    Raises InputError naming path where they do not fit.
    """
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


def load_moments(model: Any, state: dict) -> None:
    """Put Adam's moments of each parameter from an optimizer's state_dict into model's; the settings stay this run's.

    Raises ValueError where they do not fit the parameters, and other exceptions for a state of another form.
    """
    groups = model.optimizer.state_dict()["param_groups"]
    if len(state["param_groups"][0]["params"]) != len(model.params):
        raise ValueError(f"optimizer: not of {len(model.params)} parameters")
    shapes = {i: {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape} for i, p in enumerate(model.params)}
    for number, moments in state["state"].items():
        if {name: x.shape for name, x in moments.items()} != shapes.get(number):
            raise ValueError(f"optimizer: moments of parameter {number!r:.20} do not fit this model")
    model.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def take_weights(path: str, checkpoint: dict, model: Any, words: list[str], ids: Mapping[str, int]) -> int:
    """Put a checkpoint's parameters into model, the word embeddings by word. Returns how many words have theirs.

    words: the checkpoint's, by id. ids: word → id of the model's vocabulary; a word that the checkpoint lacks keeps its
    start value. Raises InputError naming path where the parameters do not fit.
    """
    image, text = checkpoint["model"]
    sizes = text["embed.weight"].shape[1], model.txt_enc.embed.weight.shape[1]
    if sizes[0] != sizes[1]:
        raise InputError(f"{path}: words of word_dim {sizes[0]}, expected --word_dim {sizes[1]}")
    shared = [(ids[word], old) for old, word in enumerate(words) if word in ids]
    embed = model.txt_enc.embed.weight.detach().clone()
    try:
        new, old = torch.tensor(shared).T  # the special words at least
        embed[new] = text["embed.weight"][old].to(embed)
        model.load_state_dict([image, {**text, "embed.weight": embed}])
    except (InputError, RuntimeError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
    for theirs, ours in zip((image, text), model.state_dict(), strict=True):
        if unused := [name for name in theirs if name not in ours]:
            log.warning("%s: this model has no %s", path, ", ".join(unused))
    return len(shared)
