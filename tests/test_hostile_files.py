"""Broken and hostile files: whatever bytes a file holds, reading it succeeds or ends in one clear line.

Never a traceback, never a hang, and nothing in a file is ever run. HOSTILE_FILES=20000 reads that many instead of a few
hundred.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_opt
from dataset_commands import tsv_line, vinvl_line
from folders import make_folder, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluation
import train
from data import PrecompDataset
from lib.checkpoint import load_checkpoint
from lib.datasets.boxes import BoxFile
from lib.datasets.npz_files import read_npy, read_regions
from lib.errors import InputError
from lib.resume import check_same_options
from model import SCAN
from position import position_grid
from scripts import captions_to_dataset, tsv_to_dataset
from vocab import deserialize_vocab, word_list

INPUTS = int(os.environ.get("HOSTILE_FILES", 300))
SECONDS = 20  # more than any of these files may take
NAME = "toy_precomp"
SIZES = {"embed_size": 6, "word_dim": 4, "img_dim": 8}
AWKWARD = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n\n", b"\t", b"\x80\x02", b"PK\x03\x04"]
AWKWARD += [b"NaN", b"1e999", b"-1", b"9" * 400, b'"', b"{}", b"[" * 3000, b"null", b"a" * 2_000_000]
AWKWARD += [text.encode() for text in ("\u2028", "\u202e\u0645\u0631\u062d\u0628\u0627", "\U0001f99c")]
NUMBERS = (b"0", b"-1", b"1e400", b"9" * 20, b"NaN", b'""')


# ---------------------------------------------------------------- what reads them


def command(script, flags):
    """A function that runs a command on a file."""

    def read(path):
        sys.argv = [script.__name__, *flags.format(path=path, out=path.parent / "out").split()]
        script.main()

    return read


def read_checkpoint(path):
    evaluation.evalrank(str(path), str(path.parent.parent), "train", vocab_path=str(path.parent))
    checkpoint = load_checkpoint(str(path))
    words = len(checkpoint["model"][1]["embed.weight"])
    opt = make_opt(resume=str(path), vocab_size=words, batch_size=4, seed=0, device="cpu", **SIZES)
    model = SCAN(opt)
    check_same_options(str(path), checkpoint, opt)
    train.Run(opt, model).resume(checkpoint, str(path))
    model.train_emb(torch.rand(2, 3, 8), torch.zeros(2, 3, 31), torch.tensor([[1, 4, 2]] * 2), [3, 3])


def read_split(path):
    vocab = deserialize_vocab(str(path.parent / f"{NAME}_vocab.json"))
    dataset = PrecompDataset(str(path.parent), "train", vocab, make_opt(img_dim=8))
    for index in range(len(dataset)):
        dataset[index]


read_tsv = command(tsv_to_dataset, "{path} --out {out} --all train --img_dim 4 --n_regions 2 --overwrite")
read_caption_lines = command(captions_to_dataset, "--tsv {path} --out {out} --split train --overwrite")
READERS = {
    "model.pth.tar": read_checkpoint,
    "old_model.pth.tar": read_checkpoint,
    "train_ims.npy": read_split,
    "train_boxes.npy": read_split,
    "train_caps.txt": read_split,
    f"{NAME}_vocab.json": read_split,
    "regions.tsv": read_tsv,
    "vinvl.tsv": read_tsv,
    "captions.tsv": read_caption_lines,
    "captions.csv": read_caption_lines,
    "karpathy.json": command(captions_to_dataset, "--karpathy {path} --out {out} --overwrite"),
    "coco.json": command(captions_to_dataset, "--coco {path} --out {out} --split train --overwrite"),
    "image.npz": lambda path: read_regions(str(path)),
    "info.npy": lambda path: read_npy(str(path)),
    "boxes.npz": lambda path: position_grid(*BoxFile(str(path)).rows(0, 9)),
    "boxes.json": lambda path: position_grid(*BoxFile(str(path), best=True).rows(0, 9)),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder with a valid file of every kind, each of which its reader takes."""
    root = tmp_path_factory.mktemp("valid")
    _, vocab_path = make_folder(str(root), NAME, {"train": 3, "dev": 1}, 2, 3, 8)
    folder = root / "data" / NAME
    shutil.copy(Path(vocab_path) / f"{NAME}_vocab.json", folder)
    write_checkpoints(folder)
    write_features(folder)
    write_captions(folder)
    return folder


def write_checkpoints(folder):
    torch.manual_seed(0)
    vocab = deserialize_vocab(str(folder / f"{NAME}_vocab.json"))
    opt = make_opt(data_path="data", data_name=NAME, vocab_path="vocab", batch_size=4, vocab_size=len(vocab), **SIZES)
    model = SCAN(opt)
    for parameter in model.params:
        parameter.grad = torch.ones_like(parameter)
    model.optimizer.step()
    state = {"epoch": 1, "step": 0, "model": model.state_dict(), "best_rsum": 3.5, "opt": opt, "Eiters": 4}
    state |= {"optimizer": model.optimizer.state_dict(), "random": torch.get_rng_state(), "words": word_list(vocab)}
    state |= {"segment": False, "captions": {"dev": "0" * 64}}
    torch.save(state, folder / "model.pth.tar")
    torch.save(state, folder / "old_model.pth.tar", _use_new_zipfile_serialization=False)


def write_features(folder):
    rng = np.random.default_rng(0)
    boxes, features = np.array([[1, 2, 90, 80], [0, 0, 50, 60]], np.float32), rng.random((2, 4), np.float32)
    write_lines(folder / "regions.tsv", [tsv_line(image, boxes, features, 200, 100) for image in range(2)])
    write_lines(folder / "vinvl.tsv", [vinvl_line(image, boxes, features, features[:, 0]) for image in range(2)])
    info = {"bbox": boxes, "num_boxes": 2, "image_h": 100, "image_w": np.int64(200)}
    np.savez(folder / "image.npz", x=features, info=info)
    np.save(folder / "info.npy", np.array(info, dtype=object), allow_pickle=True)  # noqa: S301 (to be read safely)
    np.savez(folder / "boxes.npz", ids=["1", "2"], boxes=[boxes, boxes], image_sizes=[[100, 200]] * 2)
    found = [{"image_id": image, "bbox": [1, 2, 50, 60], "score": 0.5} for image in range(2)]
    described = [{"id": image, "height": 100, "width": 200} for image in range(2)]
    (folder / "boxes.json").write_text(json.dumps({"images": described, "annotations": found}))


def write_captions(folder):
    pairs = [(f"{i}.jpg", f"a man, who sits {k}") for i in range(2) for k in range(5)]
    write_lines(folder / "captions.tsv", [f"{name}\t{text}" for name, text in pairs])
    write_lines(folder / "captions.csv", ["image,caption", *(f'{name},"{text}"' for name, text in pairs)])
    sentences = [{"raw": f"a dog {k}"} for k in range(5)]
    images = [
        {"filename": f"{i}.jpg", "imgid": i, "cocoid": i, "split": split, "sentences": sentences}
        for i, split in enumerate(("train", "val", "test"))
    ]
    (folder / "karpathy.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    notes = [{"image_id": i, "id": 5 * i + k, "caption": f"a cat {k}"} for i in range(2) for k in range(5)]
    (folder / "coco.json").write_text(json.dumps({"images": [{"id": 0}, {"id": 1}], "annotations": notes}))


RUNNING = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen"}
watched = []


def watch(event, args):
    if watched and event in RUNNING:
        raise AssertionError(f"a file led to {event} {args}")


sys.addaudithook(watch)


def survive(name, folder):
    """Read folder/name as its reader does; the error's line, or None. Anything but one line is a failure."""

    def too_long(*_):
        raise AssertionError(f"{name}: not read within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    argv = sys.argv
    watched.append(name)
    try:
        READERS[name](folder / name)
    except (InputError, OSError, FloatingPointError) as error:  # the last names the step and its pairs in train.py
        lines = str(error).splitlines()
        assert len(lines) == 1 and lines[0].strip(), f"{name}: {error!r}"
        assert len(lines[0]) < 2000, f"{name}: a line of {len(lines[0])} characters"
        return lines[0]
    finally:
        watched.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = argv
    return None


def mutate(data, rng):
    """data with one to four random changes: bits, cuts, repeats, awkward pieces, numbers."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.7 else rng.randrange(min(len(data), 200) + 1)
        end = min(len(data), at + rng.choice((1, 4, 30, 1000)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        elif kind == 4:
            data[at:at] = rng.choice(AWKWARD)
        elif kind == 5:
            data[at:end] = rng.randbytes(end - at)
        else:
            digits = [match.span() for match in re.finditer(rb"\d+", data[at : at + 4000])]
            if digits:
                start, stop = rng.choice(digits)
                data[at + start : at + stop] = rng.choice(NUMBERS)
    return bytes(data)


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", READERS)
def test_the_valid_file_is_read(valid, name):
    assert survive(name, valid) is None


@pytest.mark.parametrize("name", READERS)
def test_mutations_of_a_valid_file_end_in_success_or_one_line(valid, name, tmp_path, capfd):
    folder = tmp_path / NAME
    shutil.copytree(valid, folder)
    data, rng = (folder / name).read_bytes(), random.Random(name)
    refused = 0
    for number in range(-(-INPUTS // len(READERS))):
        (folder / name).write_bytes(mutated := mutate(data, rng))
        try:
            refused += survive(name, folder) is not None
        except BaseException:
            (Path(os.environ.get("HOSTILE_KEEP", tmp_path)) / f"failed_{name}").write_bytes(mutated)
            print(f"mutation {number} of {name}")
            raise
        shutil.rmtree(folder / "out", ignore_errors=True)
    assert refused


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
places = st.sampled_from(
    "word2idx idx2word idx images annotations image_id id bbox sentences filename caption split".split()
)


@settings(max_examples=max(20, INPUTS // 10))
@given(value=json_values | st.dictionaries(places, json_values, max_size=4))
@pytest.mark.parametrize("name", [name for name in READERS if name.endswith(".json")])
def test_any_json_ends_in_success_or_one_line(tmp_path_factory, name, value):
    folder = tmp_path_factory.getbasetemp() / "json"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    survive(name, folder)


OTHERS = [None, -1, 2**70, 10**9, float("nan"), True, "a\nb", [], {}]
OTHERS += [torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)]


def change(state, place, value):
    """A copy of a checkpoint that holds value at place, keys or indices with dots between."""
    if not place:
        return value
    if isinstance(state, argparse.Namespace):
        return argparse.Namespace(**change(vars(state), place, value))
    if isinstance(state, list):
        state = dict(enumerate(state))
        return list(change(state, place, value).values())
    key = next(key for key in state if f"{place}.".startswith(f"{key}."))
    return {**state, key: change(state[key], place[len(str(key)) + 1 :], value)}


@pytest.mark.parametrize(
    "place",
    """epoch step best_rsum Eiters model optimizer random words segment captions opt opt.embed_size opt.num_layers
    opt.cross_attn opt.lambda_softmax opt.bi_gru optimizer.param_groups.0.lr optimizer.param_groups.0.betas
    optimizer.param_groups.0.fused optimizer.state.0.step optimizer.state.0.exp_avg model.0.fc.weight
    model.1.rnn.weight_hh_l0 words.7 captions.dev""".split(),
)
def test_a_checkpoint_with_another_value_anywhere_ends_in_success_or_one_line(valid, tmp_path, place):
    """Read to evaluate, to resume and to train."""
    folder = tmp_path / NAME
    shutil.copytree(valid, folder)
    state = torch.load(valid / "model.pth.tar", weights_only=False)  # written above
    for value in OTHERS:
        torch.save(change(state, place, value), folder / "model.pth.tar")
        survive("model.pth.tar", folder)


@pytest.mark.parametrize("name", ["karpathy.json", "coco.json"])
@pytest.mark.parametrize(
    "data", [b'{"images": [\xed\xa0\x80', b'{"annotations": ' + b"[" * 100_000, b'{"images": ["\xff"]}']
)
def test_json_that_broke_its_reader_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert survive(name, tmp_path)
