"""Every flag of training, once: its name, default, allowed values and help.

The parsers, the check of what a user typed, the defaults for what an older checkpoint lacks and the check of a
checkpoint's options follow from these rows. To add a flag, add a row to the table it belongs to.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from lib.errors import InputError, brief

NOT_NEGATIVE, COUNT, SEED = (0, 2**31), (1, 2**31), (0, 2**32 - 1)
SHARE = (0, 0.9)
POSITIVE = (sys.float_info.min, sys.float_info.max)
LONGEST_TEXT = 4096  # characters


class Option(NamedTuple):
    """A flag. Its kind is the default's: str, int, float, or bool for a switch that is off by default.

    allowed: least and largest value of a number; the choices of a text, none for any line of text.
    fixed: whether a resumed run must have the same value, because it changes what the model computes or is ranked on.
    several: whether a text may be a list of texts.
    """

    name: str
    default: Any
    help: str
    allowed: tuple = ()
    alias: str = ""
    fixed: bool = False
    several: bool = False

    def fits(self, value: Any) -> bool:
        """Whether value is of this option's kind and allowed."""
        if isinstance(self.default, bool):
            return isinstance(value, bool)
        if isinstance(self.default, str):
            one_line = isinstance(value, str) and len(value) < LONGEST_TEXT and value.splitlines() in ([value], [])
            return one_line and "\0" not in value and (not self.allowed or value in self.allowed)
        kinds = (int,) if isinstance(self.default, int) else (int, float)
        in_kind = isinstance(value, kinds) and not isinstance(value, bool)
        return in_kind and self.allowed[0] <= value <= self.allowed[1]

    def check(self, value: Any) -> None:
        """Raise InputError where value does not fit."""
        if not self.fits(value):
            shown = brief(value).strip("'")
            raise InputError(f"--{self.name} {shown}: expected {self.expected()}")

    def expected(self) -> str:
        """What fits, for an error message."""
        if isinstance(self.default, bool):
            return "True or False"
        if isinstance(self.default, str):
            return f"one of {', '.join(self.allowed)}" if self.allowed else "one line of text"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        if self.allowed is POSITIVE:
            return "a positive number"
        return f"{kind}, at least {self.allowed[0]}, at most {self.allowed[1]}"


# The model and its data. Every checkpoint of SCAN and PFAN has these options.
MODEL = (
    Option("data_path", "./data/", "folder of the data sets"),
    Option("data_name", "precomp", "data set, a folder there: f30k_precomp, coco_precomp, your own", fixed=True),
    Option("vocab_path", "./vocab/", "folder of the vocabularies, DATA_NAME_vocab.json"),
    Option("margin", 0.2, "margin of the hinge loss", NOT_NEGATIVE),
    Option("batch_size", 128, "pairs in a batch, of all processes together; evaluation encodes as many at once", COUNT),
    Option("word_dim", 300, "size of a word's input embedding", COUNT, fixed=True),
    Option("embed_size", 1024, "size of the joint embedding", COUNT, fixed=True),
    Option("grad_clip", 2.0, "largest norm of the gradient; 0 does not clip", NOT_NEGATIVE),
    Option("num_layers", 1, "layers of the GRU", COUNT, fixed=True),
    Option("learning_rate", 0.0002, "learning rate at the start", POSITIVE),
    Option("max_violation", False, "only the hardest negatives in the loss"),
    Option("img_dim", 2048, "size of a region's feature", COUNT, fixed=True),
    Option("no_imgnorm", False, "do not normalise image embeddings", fixed=True),
    Option("no_txtnorm", False, "do not normalise text embeddings", fixed=True),
    Option(
        "raw_feature_norm",
        "clipped_l2norm",
        "normalisation of raw similarities",
        ("softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "no_norm"),
        fixed=True,
    ),
    Option("agg_func", "LogSumExp", "aggregation of relevances", ("LogSumExp", "Mean", "Max", "Sum"), fixed=True),
    Option("cross_attn", "t2i", "words attend to regions, or regions to words", ("t2i", "i2t"), fixed=True),
    Option("precomp_enc_type", "basic", "image encoder", ("basic", "weight_norm"), fixed=True),
    Option("bi_gru", False, "bidirectional GRU", fixed=True),
    Option("lambda_lse", 6.0, "inverse temperature of LogSumExp", NOT_NEGATIVE, fixed=True),
    Option("lambda_softmax", 9.0, "inverse temperature of the attention", NOT_NEGATIVE, fixed=True),
)
# Of the model and its data as well; a checkpoint without one means the default.
MODEL_NEWER = (
    Option("position", "attention", "PFAN-A, PFAN-P, plain SCAN", ("attention", "area", "none"), fixed=True),
    Option("seed", 0, "seed of start values and data order", SEED),
    Option("allow_empty_captions", False, "take an empty caption line as <start> <end>"),
    Option("amp", False, "mixed precision: encoders in bfloat16"),
    Option("position_init", 1.0, "standard deviation of the cells' embeddings at the start", NOT_NEGATIVE),
    Option("matmul_precision", "highest", "precision of float32 products", ("highest", "high", "medium")),
)
WHOLE_IMAGE = (  # the whole-image variant's
    Option("need_box_whole", False, "the last region of _ims.npy is the whole image", fixed=True),
    Option("lambda_whole", 1.0, "weight of the whole-image cosine", NOT_NEGATIVE, fixed=True),
)
# How a run proceeds. A checkpoint's are never used.
RUN = (
    Option("num_epochs", 30, "epochs to train", COUNT, alias="num_epoches"),
    Option("lr_update", 15, "epochs after which the learning rate falls to a tenth", COUNT),
    Option("mean_warmup_epochs", 0, "epochs with all negatives before --max_violation", NOT_NEGATIVE),
    Option("mean_warmup_steps", 0, "the same in steps; the later end counts", NOT_NEGATIVE),
    Option("region_dropout", 0.0, "share of an image's regions that a training step leaves out", SHARE),
    Option("word_dropout", 0.0, "probability that a word is unknown in a training step", SHARE),
    Option("weight_decay", 0.0, "decoupled weight decay (AdamW); 0 is Adam", NOT_NEGATIVE),
    Option("workers", 10, "processes that load batches (at most one a core)", NOT_NEGATIVE),
    Option("log_step", 10, "steps between two log lines", COUNT),
    Option("val_step", 500, "steps between two validations; each epoch's end has one as well", COUNT),
    Option("logger_name", "./runs/runX/log", "folder of the TensorBoard events"),
    Option("model_name", "./runs/runX/checkpoint", "folder of the checkpoints"),
    Option("resume", "", "checkpoint to go on from; auto: the last in --model_name, if any"),
    Option("overwrite", False, "start over in a --model_name that holds another run, whose checkpoints are removed"),
    Option("init_from", "", "checkpoint whose weights a new run starts from"),
    Option("save_step", 0, "steps between two checkpoints within an epoch; 0 saves none", NOT_NEGATIVE),
    Option("keep_last", 0, "checkpoints of epochs to keep, besides the best; 0 keeps all", NOT_NEGATIVE),
    Option("device", "auto", "cpu, cuda, cuda:1, mps; auto: CUDA if there, else the CPU"),
    Option(
        "features_on",
        "auto",
        "where the features that a GPU trains on lie; auto: there, if they take a third of its free memory at most",
        ("auto", "device", "host"),
    ),
)
WHOLE_IMAGE_RUN = (Option("embed_path", "./vocab/embedding.npy", "accepted and unused, as in the published code"),)

# What an evaluation does beside ranking; evalrank's keywords.
EVALUATION = (
    Option("save_ranks", "", "file that the ranks are written to, e.g. ranks.pth.tar"),
    Option(
        "save_topk",
        "",
        "file for each query's best candidates, JSON lines: image (id), captions (rows from 0), scores; then caption, "
        "images, scores",
    ),
    Option("topk", 10, "how many of them", COUNT),
    Option("eccv", False, "ECCV Caption and CxC metrics of MS-COCO's testall as well"),
    Option("intervals", False, "95 % intervals as well, bootstrap over images"),
    Option("versus", "", "other checkpoints: paired difference from these", several=True),
)

OPTIONS = {row.name: row for row in (*MODEL, *RUN, *MODEL_NEWER, *WHOLE_IMAGE, *WHOLE_IMAGE_RUN)}
TRAIN, TRAIN_WHOLE = (*MODEL, *RUN, *MODEL_NEWER), tuple(OPTIONS.values())
REQUIRED = frozenset(row.name for row in MODEL)
CHOICES = tuple(row.name for row in (*MODEL, *MODEL_NEWER) if isinstance(row.default, str) and row.allowed)


def option(opt: Any, name: str) -> Any:
    """opt.name, or its default where opt (any object, such as an older checkpoint's options) lacks it.

    Raises AttributeError for an option that every checkpoint has.
    """
    return getattr(opt, name) if name in REQUIRED else getattr(opt, name, OPTIONS[name].default)


def to_namespace(opt: Any) -> argparse.Namespace:
    """A Namespace of opt's options (any object with flags as attributes), as a checkpoint can hold them.

    A flag of training that opt lacks has its default; a path is text, a NumPy number is Python's.
    """
    values = {row.name: getattr(opt, row.name, row.default) for row in TRAIN}
    values |= vars(opt)
    for name, value in values.items():
        if isinstance(value, os.PathLike):
            values[name] = os.fspath(value)
        elif isinstance(value, np.generic):
            values[name] = value.item()
    return argparse.Namespace(**values)


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option | str], **defaults: Any) -> None:
    """Add a flag for each of options, rows or names of rows, with other defaults where given.

    A default of None stands for the checkpoint's value.
    """
    for row in (OPTIONS[name] if isinstance(name, str) else name for name in options):
        flags = [f"--{name}" for name in (row.name, row.alias) if name]
        if isinstance(row.default, bool):
            parser.add_argument(*flags, action="store_true", help=row.help.replace("%", "%%"))
            continue
        more: dict[str, Any] = {"nargs": "+"} if row.several else {}
        default = defaults.get(row.name, row.default)
        choices = " | ".join(row.allowed) + ": " if isinstance(row.default, str) and row.allowed else ""
        shown = "the checkpoint's" if default is None else "none" if default == "" else default
        parser.add_argument(
            *flags, default=default, type=type(row.default), help=f"{choices}{row.help} (default: {shown})", **more
        )


def check_options(opt: Any, names: Iterable[str] = OPTIONS) -> None:
    """Raise InputError that names the first flag among names whose value in opt is not allowed."""
    for name in names:
        if hasattr(opt, name):
            OPTIONS[name].check(getattr(opt, name))


def evaluation_options(options: dict[str, Any]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Keyword arguments of evalrank → the rows of EVALUATION, by default where missing or None, and a checkpoint's.

    Raises TypeError for one that there is not, InputError for a value that is not allowed.
    """
    own = {row.name: row for row in EVALUATION}
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        row = own.get(name) or OPTIONS.get(name)
        if row is None:
            allowed = ", ".join([*own, *OPTIONS])
            raise TypeError(f"evalrank() got an unexpected keyword argument {name!r}, expected one of {allowed}")
        for one in as_list(value) if row.several else [value]:
            row.check(os.fspath(one) if isinstance(one, os.PathLike) else one)
    settings = {row.name: options.pop(row.name, row.default) for row in EVALUATION}
    return argparse.Namespace(**settings), options


def as_list(paths: Any) -> list:
    """A list of paths, where one path or several may be given."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
