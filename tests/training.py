"""Trainings on a small random data set, and what tells two checkpoints apart."""

import csv
import os

import torch
from folders import make_folder, make_whole_folder

import train
from lib.checkpoint import load_checkpoint
from lib.run_folder import RunFolder
from Tencent_PFAN import train_whole

NAME = "toy_precomp"
# A published README's command line, but for the small sizes.
SMALL = (
    "--max_violation --bi_gru --agg_func=Mean --lr_update=15 --val_step=2000000 --raw_feature_norm=clipped_l2norm "
    "--img_dim 16 --embed_size 24 --word_dim 8 --batch_size 16 --learning_rate .001 --workers 0 --num_epochs 1"
)


class Place:
    """A data set in root, 12 training images with 60 captions, and trainings on it.

    trainer: the module that trains. flags: its, without the places of logs and checkpoints; of two of one name the last
    counts.
    """

    trainer = train

    def __init__(self, root, more="", **shape):
        self.root, self.data_path, self.vocab_path = root, str(root / "data"), str(root / "vocab")
        if not (root / "data").exists():
            make_folder(str(root), NAME, **{"n_regions": 4, **shape})
        self.vocab_file = root / "vocab" / f"{NAME}_vocab.json"
        self.flags = f"--data_path {self.data_path} --vocab_path {self.vocab_path} --data_name {NAME} {SMALL} {more}"

    def line(self, name, flags=""):
        """The words of a command line that trains in root/name."""
        folder = self.root / name
        return f"{self.flags} --logger_name {folder / 'log'} --model_name {folder} {flags}".split()

    def fit(self, name, flags="", *make_model):
        """Train in this process; returns root/name, the folder of the checkpoints."""
        self.trainer.fit(self.trainer.get_parser().parse_args(self.line(name, flags)), *make_model)
        return self.root / name


class WholePlace(Place):
    """The same of the whole-image variant: 12 training images with a caption each."""

    trainer = train_whole

    def __init__(self, root, more="", **shape):
        self.root = root
        self.data_path, self.vocab_path = make_whole_folder(root, **shape)
        self.folder = os.path.join(self.data_path, "toy")
        self.vocab_file = root / "vocab" / "toy_sent_vocab.json"
        where = f"--data_path {self.data_path} --vocab_path {self.vocab_path} --data_name toy"
        self.flags = f"{where} {SMALL} --img_dim 8 --embed_size 6 --word_dim 5 --batch_size 4 {more}"


def load(folder, name="checkpoint_0"):
    return load_checkpoint(str(folder / f"{name}.pth.tar"))


def last_checkpoint(folder):
    """Path and contents of what --resume auto continues."""
    return RunFolder(str(folder)).last()


def change(path, **changes):
    """Rewrite a checkpoint; a change of None removes the key."""
    checkpoint = {**torch.load(path, weights_only=False), **changes}
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, path)


def metrics(folder):
    """(name, step, value) of every line of a folder's metrics.csv, in the order written."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["run", "step", "name", "value"]
    return [(name, int(step), float(value)) for _, step, name, value in rows]


def values(folder, name):
    """What a run in folder logged under a name."""
    return [value for found, _, value in metrics(folder / "log") if found == name]


def flat(tree):
    """A checkpoint's contents without its options, its run's mark and its class, as a list of (place, value)."""
    if isinstance(tree, dict):
        return [
            (f"{k}.{at}", v) for k, sub in tree.items() if k not in ("opt", "run", "variant") for at, v in flat(sub)
        ]
    if isinstance(tree, (list, tuple)):
        return [(f"{i}.{at}", v) for i, sub in enumerate(tree) for at, v in flat(sub)]
    return [("", tree)]


def assert_same(one, other):
    """Bit for bit the same parameters, optimizer state, counters and scores."""
    one, other = flat(one), flat(other)
    assert [place for place, _ in one] == [place for place, _ in other]
    for (place, a), (_, b) in zip(one, other, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, place
