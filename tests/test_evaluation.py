"""Ranks, embedding a split, scoring in shards, and evalrank as a user calls it."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, make_opt
from folders import make_folder, random_boxes, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluation
from data import get_test_loader
from evaluation import (
    AverageMeter,
    LogCollector,
    encode_data,
    evalrank,
    i2t,
    load_split,
    shard_xattn_i2t,
    shard_xattn_t2i,
    t2i,
)
from lib import eccv
from lib.errors import InputError
from model import SCAN, xattn_score_i2t, xattn_score_t2i
from vocab import deserialize_vocab, serialize_vocab

XATTN_SCORE = {"t2i": xattn_score_t2i, "i2t": xattn_score_i2t}


# ---------------------------------------------------------------- ranks

# Integer scores, so that ties are common; k columns a row or k rows a column.
matrices = st.builds(
    lambda n, k, seed, flip: (lambda sims: np.ascontiguousarray(sims.T) if flip else sims)(
        np.random.default_rng(seed).integers(0, 12, (n, n * k)).astype(np.float32)
    ),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 2**20),
    st.booleans(),
)


@settings(max_examples=150)
@given(sims=matrices)
def test_ranks_and_recalls_are_those_of_sorting_each_row(sims):
    for rank, matrix in ((i2t, sims), (t2i, sims.T)):
        recalls, (ranks, top1) = rank(None, None, None, sims, return_ranks=True)
        expected = reference.ranks(matrix)
        assert (ranks == expected).all()
        assert recalls == pytest.approx(reference.recalls(expected))
        assert rank(None, None, None, sims) == recalls
        for row, place, best in zip(matrix, ranks, top1.astype(int), strict=True):
            assert place > 0 or row[best] == row.max()
        assert (matrix[np.arange(len(matrix)), top1.astype(int)] == matrix.max(1)).all()


def test_more_rows_than_a_block_are_ranked_alike():
    sims = np.random.default_rng(0).standard_normal((600, 1200))
    assert (i2t(None, None, None, sims, return_ranks=True)[1][0] == reference.ranks(sims)).all()
    assert (t2i(None, None, None, sims, return_ranks=True)[1][0] == reference.ranks(sims.T)).all()


def test_a_model_that_scores_everything_alike_finds_nothing():
    """A tie counts against the model: with 20 images and 100 captions the 95 wrong captions come first."""
    recalls, (ranks, top1) = i2t(None, None, None, np.zeros((20, 100)), return_ranks=True)
    assert recalls == (0, 0, 0, 96, 96) and (ranks == 95).all()
    assert (top1 // 5 != np.arange(20)).all()
    assert t2i(None, None, None, np.zeros((20, 100))) == (0, 0, 0, 20, 20)


def test_a_perfect_model_finds_everything():
    sims = np.repeat(np.eye(20), 5, axis=1)
    assert i2t(None, None, None, sims) == (100, 100, 100, 1, 1) == t2i(None, None, None, sims)


@pytest.mark.parametrize("rank", [i2t, t2i])
def test_nan_similarities_are_an_error(rank):
    sims = np.zeros((300, 300))
    sims[270, 3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        rank(None, None, None, sims)


@pytest.mark.parametrize("shape", [(3, 10), (10, 3), (0, 5)])
def test_counts_that_do_not_divide_are_an_error(shape):
    for rank in (i2t, t2i):
        with pytest.raises(InputError, match="multiple"):
            rank(None, None, None, np.ones(shape))


def test_npts_ranks_the_first_images_and_their_captions_only():
    sims = np.random.default_rng(0).standard_normal((8, 24))
    for rank in (i2t, t2i):
        part = rank(None, None, None, sims[:3, :9], return_ranks=True)
        whole = rank(None, None, None, sims, npts=3, return_ranks=True)
        assert whole[0] == part[0]
        assert all((a == b).all() for a, b in zip(whole[1], part[1], strict=True))


def test_whole_number_similarities_are_ranked():
    sims = np.random.default_rng(0).integers(0, 9, (4, 8))
    assert i2t(None, None, None, sims) == i2t(None, None, None, sims.astype(float))
    assert t2i(None, None, None, sims) == t2i(None, None, None, sims.astype(float))


def test_ranking_leaves_the_similarities_as_they_were():
    sims = np.random.default_rng(0).standard_normal((4, 8))
    before = sims.copy()
    i2t(None, None, None, sims), t2i(None, None, None, sims)
    assert (sims == before).all()


def test_meters_average_and_show_themselves():
    meter = AverageMeter()
    meter.update(2.0, 1), meter.update(5.0, 2)
    assert meter.val == 5.0 and meter.avg == pytest.approx(4.0, abs=1e-3)
    log, seen = LogCollector(), []
    log.update("Le", 2.0, 1), log.update("lr", 0.1)
    assert str(log) == "Le 2.0000 (1.9998)  lr 0.1"  # SCAN's 0.0001 in the average's denominator

    class Tb:
        def log_value(self, name, value, step):
            seen.append((name, value, step))

    log.tb_log(Tb(), prefix="train_", step=7)
    assert seen == [("train_Le", 2.0, 7), ("train_lr", 0.1, 7)]


# ---------------------------------------------------------------- embeddings and scores


def save_model(path, data_path, vocab_path, seed=0, data_name="toy_precomp", **flags):
    """Write a checkpoint of an untrained model for the folder of make_folder."""
    vocab = deserialize_vocab(os.path.join(vocab_path, f"{data_name}_vocab.json"))
    sizes = {"img_dim": 16, "embed_size": 16, "word_dim": 8, "batch_size": 4, "vocab_size": len(vocab)}
    where = {"data_path": data_path, "vocab_path": vocab_path, "data_name": data_name}
    opt = make_opt(**{**sizes, **where, **flags})
    torch.manual_seed(seed)
    model = SCAN(opt)
    state = {"epoch": 1, "model": model.state_dict(), "best_rsum": 0.0, "opt": opt, "Eiters": 0}
    torch.save(state, path)
    return model


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with dev, test and testall splits, and a t2i and an i2t checkpoint; (root, models)."""
    root = tmp_path_factory.mktemp("toy")
    where = make_folder(root, splits={"dev": 6, "test": 25, "testall": 10}, n_regions=4)
    models = {way: save_model(root / f"{way}.pth.tar", *where, cross_attn=way) for way in ("t2i", "i2t")}
    return root, models


def toy_loader(toy, way="t2i", split="test", batch_size=4):
    opt = toy[1][way].opt
    vocab = deserialize_vocab(os.path.join(opt.vocab_path, "toy_precomp_vocab.json"))
    return get_test_loader(split, "toy_precomp", vocab, batch_size, 0, opt)


def direct_scores(toy, way="t2i", split="test"):
    """Scores of a split by the shortest way: item after item through forward_emb, then one call."""
    model, dataset = toy[1][way], toy_loader(toy, way, split).dataset
    model.val_start()
    with torch.no_grad():
        items = [dataset[i] for i in range(len(dataset))]
        pairs = [model.forward_emb(x[0][None], x[1][None], x[2][None], [len(x[2])]) for x in items]
        images = torch.cat([pair[0] for pair in pairs[::5]])
        columns = [XATTN_SCORE[way](images, words, lens, model.opt) for _, words, lens in pairs]
    return torch.cat(columns, 1).numpy()


def test_encode_data_returns_each_image_once_and_each_caption_in_order(toy):
    model, loader = toy[1]["t2i"], toy_loader(toy, batch_size=7)
    images, captions, lens = encode_data(model, loader)
    assert images.shape == (25, 4, 16) and captions.shape == (125, max(lens), 16) and len(lens) == 125
    assert images.dtype == captions.dtype == torch.float32 and not images.requires_grad
    for i in (0, 61, 124):
        image, boxes, target, *_ = loader.dataset[i]
        img_emb, cap_emb, _ = model.forward_emb(image[None], boxes[None], target[None], [len(target)])
        torch.testing.assert_close(images[i // 5], img_emb[0].detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(captions[i, : lens[i]], cap_emb[0].detach(), rtol=0, atol=1e-6)
        assert lens[i] == len(target) and not captions[i, lens[i] :].any()


def test_encode_data_packed_holds_the_same_words_without_padding(toy):
    images, captions, lens = encode_data(toy[1]["t2i"], toy_loader(toy))
    images_too, words, lens_too = encode_data(toy[1]["t2i"], toy_loader(toy), packed=True)
    assert torch.equal(images, images_too) and lens == lens_too
    assert torch.equal(words, torch.cat([caption[:n] for caption, n in zip(captions, lens, strict=True)]))


def test_a_split_without_captions_is_encoded(toy, tmp_path):
    opt = toy[1]["t2i"].opt
    os.symlink(os.path.join(opt.data_path, "toy_precomp"), tmp_path / "all")
    os.makedirs(tmp_path / "toy_precomp")
    for name in ("test_ims.npy", "test_boxes.npy"):
        os.symlink(tmp_path / "all" / name, tmp_path / "toy_precomp" / name)
    path = str(toy[0] / "t2i.pth.tar")
    with pytest.raises(InputError, match="test_caps.txt: no such file"):
        load_split(path, str(tmp_path), None, "test")
    model, loader = load_split(path, str(tmp_path), None, "test", captions_optional=True)
    images, captions, lens = encode_data(model, loader)
    assert torch.equal(images, encode_data(model, toy_loader(toy))[0]) and len(captions) == len(lens) == 0
    assert encode_data(model, loader, packed=True)[1].shape == (0, 16)


@pytest.mark.parametrize(("way", "shard"), [("t2i", shard_xattn_t2i), ("i2t", shard_xattn_i2t)])
def test_scores_are_the_same_for_any_shard_size_and_form(toy, way, shard):
    model = toy[1][way]
    images, captions, lens = encode_data(model, toy_loader(toy, way))
    expected = XATTN_SCORE[way](images, captions, lens, model.opt).numpy()
    np.testing.assert_allclose(expected, direct_scores(toy, way), rtol=0, atol=1e-5)
    assert np.ptp(expected) > 1e-3
    for size in (1, 3, 128):
        np.testing.assert_allclose(shard(images, captions, lens, model.opt, size), expected, rtol=0, atol=1e-6)
    words = encode_data(model, toy_loader(toy, way), packed=True)[1]
    np.testing.assert_allclose(shard(images, words, np.array(lens), model.opt), expected, rtol=0, atol=1e-6)
    arrays = shard(images.numpy(), captions.numpy(), lens, model.opt, shard_size=7)
    assert arrays.dtype == np.float32
    np.testing.assert_allclose(arrays, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- evalrank


def expected_lines(sims):
    """The numbers of a similarity matrix by brute force, as evalrank returns them."""
    i2t, t2i = (reference.recalls(reference.ranks(matrix)) for matrix in (sims, sims.T))
    ar, ari = sum(i2t[:3]) / 3, sum(t2i[:3]) / 3
    return {"rsum": 3 * (ar + ari), "ar": ar, "ari": ari, "i2t": i2t, "t2i": t2i}


def check_result(result, expected):
    for key, value in expected.items():
        assert result[key] == pytest.approx(value), key


def printed_numbers(lines):
    """The numbers after each of SCAN's labels."""
    return {label: [float(x) for x in rest.split()] for label, _, rest in (line.partition(": ") for line in lines)}


def check_printed(lines, expected):
    numbers = printed_numbers(lines)
    labels = {
        "rsum": [expected["rsum"]],
        "Average i2t Recall": [expected["ar"]],
        "Image to text": expected["i2t"],
        "Average t2i Recall": [expected["ari"]],
        "Text to image": expected["t2i"],
    }
    assert list(numbers) == list(labels)
    for label, values in labels.items():
        assert numbers[label] == pytest.approx(values, abs=0.0501), label


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path_factory, monkeypatch):
    """Each test runs in a folder of its own, and must leave nothing there that it did not ask for."""
    folder = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(folder)
    yield
    assert os.listdir(folder) == []


@pytest.mark.parametrize("way", ["t2i", "i2t"])
@pytest.mark.parametrize(("split", "n"), [("dev", 6), ("test", 25), ("testall", 10)])
def test_evalrank_prints_and_returns_the_numbers_of_a_split(toy, way, split, n, capsys):
    expected = expected_lines(direct_scores(toy, way, split))
    result = evalrank(str(toy[0] / f"{way}.pth.tar"), split=split)
    check_result(result, {**expected, "n_images": n, "n_captions": 5 * n})
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"Images: {n}, Captions: {5 * n}"
    check_printed(lines, expected)


def test_evalrank_reads_dev_where_no_split_is_named(toy):
    assert evalrank(str(toy[0] / "t2i.pth.tar"))["n_images"] == 6


def test_fold5_ranks_five_fifths_and_prints_their_means_under_the_right_names(toy, capsys):
    sims = direct_scores(toy)
    folds = [expected_lines(sims[5 * k : 5 * k + 5, 25 * k : 25 * k + 25]) for k in range(5)]
    mean = {key: np.mean([fold[key] for fold in folds], axis=0) for key in folds[0]}
    assert mean["ar"] != pytest.approx(mean["ari"], abs=0.1)  # else names could be mixed up unseen
    result = evalrank(str(toy[0] / "t2i.pth.tar"), split="test", fold5=True)
    check_result(result, mean)
    for fold, expected in zip(result["folds"], folds, strict=True):
        check_result(fold, expected)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Images: 25, Captions: 125"
    fold_lines = [line for line in lines if " ar: " in line]
    assert fold_lines == ["rsum: {rsum:.1f} ar: {ar:.1f} ari: {ari:.1f}".format(**fold) for fold in folds]
    check_printed(lines[lines.index("Mean metrics: ") + 1 :], mean)


def test_fold5_of_a_split_that_does_not_divide_is_an_error(toy):
    with pytest.raises(InputError, match="6 images do not divide into 5 folds"):
        evalrank(str(toy[0] / "t2i.pth.tar"), split="dev", fold5=True)


@pytest.mark.parametrize("fold5", [False, True])
def test_an_ensemble_ranks_the_mean_of_its_models_similarities(toy, fold5):
    sims = (direct_scores(toy, "t2i") + direct_scores(toy, "i2t")) / 2
    result = evalrank([str(toy[0] / "t2i.pth.tar"), str(toy[0] / "i2t.pth.tar")], split="test", fold5=fold5)
    if fold5:
        check_result(result["folds"][3], expected_lines(sims[15:20, 75:100]))
    else:
        check_result(result, expected_lines(sims))


def test_data_path_and_vocab_path_replace_the_checkpoints(toy, tmp_path):
    opt = toy[1]["t2i"].opt
    save_model(tmp_path / "moved.pth.tar", opt.data_path, opt.vocab_path)
    checkpoint = torch.load(tmp_path / "moved.pth.tar", weights_only=False)
    checkpoint["opt"].data_path = checkpoint["opt"].vocab_path = "/nowhere"
    torch.save(checkpoint, tmp_path / "moved.pth.tar")
    with pytest.raises(InputError, match="/nowhere"):
        evalrank(str(tmp_path / "moved.pth.tar"), split="test")
    result = evalrank(str(tmp_path / "moved.pth.tar"), opt.data_path, "test", vocab_path=opt.vocab_path)
    check_result(result, expected_lines(direct_scores(toy)))


def test_a_vocabulary_of_another_size_is_an_error_that_names_both_sizes(toy, tmp_path):
    words = toy[1]["t2i"].opt.vocab_size
    _, vocab_path = make_folder(tmp_path, splits={"test": 1}, captions_per_image=1)
    with pytest.raises(InputError, match=f"vocabulary of {words} words, found one of"):
        evalrank(str(toy[0] / "t2i.pth.tar"), split="test", vocab_path=vocab_path)


def test_batch_size_replaces_the_checkpoints(toy, monkeypatch):
    sizes = []
    real = evaluation.my_batches
    monkeypatch.setattr(evaluation, "my_batches", lambda starts, desc: sizes.append(starts.step) or real(starts, desc))
    result = evalrank(str(toy[0] / "t2i.pth.tar"), split="test", batch_size=9)
    assert sizes == [9, 9], "captions and images"
    check_result(result, expected_lines(direct_scores(toy)))


@pytest.mark.parametrize("fold5", [False, True])
def test_save_ranks_writes_ranks_and_top1(toy, tmp_path, fold5):
    evalrank(str(toy[0] / "t2i.pth.tar"), split="test", fold5=fold5, save_ranks=tmp_path / "ranks.pth.tar")
    saved = torch.load(tmp_path / "ranks.pth.tar")
    sims = direct_scores(toy)
    if fold5:
        assert len(saved) == 5
        saved, sims = saved[1], sims[5:10, 25:50]
    assert (saved["rt"][0].numpy() == reference.ranks(sims)).all()
    assert (saved["rti"][0].numpy() == reference.ranks(sims.T)).all()
    assert (saved["rt"][1].numpy() == sims.argmax(1)).all() and (saved["rti"][1].numpy() == sims.argmax(0)).all()


def test_more_images_than_captions_are_ranked(tmp_path):
    """Each of 3 captions belongs to 4 images in a row: one column a caption, the best image counts for t2i."""
    data_path, vocab_path = make_folder(tmp_path, splits={"test": 12}, captions_per_image=1, n_regions=4)
    prefix = os.path.join(data_path, "toy_precomp", "test")
    write_lines(prefix + "_caps.txt", ["a man runs", "two dogs near water", "a child jumps with a red ball"])
    model = save_model(tmp_path / "m.pth.tar", data_path, vocab_path)
    result = evalrank(str(tmp_path / "m.pth.tar"), split="test", save_ranks=tmp_path / "ranks")
    assert (result["n_images"], result["n_captions"]) == (12, 3)
    vocab = deserialize_vocab(os.path.join(vocab_path, "toy_precomp_vocab.json"))
    loader = get_test_loader("test", "toy_precomp", vocab, 5, 0, model.opt)
    sims = XATTN_SCORE["t2i"](*encode_data(model, loader), model.opt).numpy()
    assert sims.shape == (12, 3)
    check_result(result, expected_lines(sims))


def test_features_repeated_for_each_caption_give_the_same_numbers(toy, tmp_path):
    opt = toy[1]["t2i"].opt
    folder = tmp_path / "toy_precomp"
    folder.mkdir()
    source = os.path.join(opt.data_path, "toy_precomp", "test")
    for name in ("ims", "boxes"):
        np.save(folder / f"test_{name}.npy", np.repeat(np.load(f"{source}_{name}.npy"), 5, axis=0))
    (folder / "test_caps.txt").write_bytes(open(source + "_caps.txt", "rb").read())
    result = evalrank(str(toy[0] / "t2i.pth.tar"), str(tmp_path), "test")
    assert result["n_images"] == 25
    check_result(result, expected_lines(direct_scores(toy)))


def test_plain_scan_is_evaluated_without_boxes(tmp_path):
    data_path, vocab_path = make_folder(tmp_path, splits={"test": 5}, n_regions=4)
    os.remove(os.path.join(data_path, "toy_precomp", "test_boxes.npy"))
    save_model(tmp_path / "scan.pth.tar", data_path, vocab_path, position="none")
    assert evalrank(str(tmp_path / "scan.pth.tar"), split="test")["n_captions"] == 25


def test_a_checkpoint_that_gives_nan_is_an_error(toy, tmp_path):
    checkpoint = torch.load(toy[0] / "t2i.pth.tar", weights_only=False)
    checkpoint["model"][0]["fc.bias"][3] = torch.nan
    torch.save(checkpoint, tmp_path / "nan.pth.tar")
    with pytest.raises(InputError, match="NaN"):
        evalrank(str(tmp_path / "nan.pth.tar"), split="test")


def test_fold5_of_5000_images_is_five_folds_of_1000(tmp_path):
    """The MS-COCO protocol: 5,000 test images, means over five folds of 1,000 images and 5,000 captions each."""
    data_path, vocab_path = make_folder(tmp_path, splits={"dev": 2}, n_regions=4, img_dim=8)
    prefix = os.path.join(data_path, "toy_precomp", "testall")
    rng = np.random.default_rng(0)
    np.save(prefix + "_ims.npy", rng.standard_normal((5000, 4, 8)).astype(np.float16))
    np.save(prefix + "_boxes.npy", random_boxes(rng, 5000, 4))
    words = np.array("a man dog runs".split())
    write_lines(prefix + "_caps.txt", [" ".join(row) for row in words[rng.integers(0, 4, (25000, 3))]])
    save_model(tmp_path / "coco.pth.tar", data_path, vocab_path, img_dim=8, batch_size=128)
    result = evalrank(str(tmp_path / "coco.pth.tar"), split="testall", fold5=True, save_ranks=tmp_path / "ranks")
    assert (result["n_images"], result["n_captions"], len(result["folds"])) == (5000, 25000, 5)
    saved = torch.load(tmp_path / "ranks")
    assert [(len(fold["rt"][0]), len(fold["rti"][0])) for fold in saved] == [(1000, 5000)] * 5
    assert result["t2i"][4] == pytest.approx(np.mean([fold["rti"][0].numpy().mean() + 1 for fold in saved]))


def test_the_command_line_prints_what_evalrank_prints(toy, capsys):
    evalrank(str(toy[0] / "t2i.pth.tar"), split="test", fold5=True)
    command = [
        sys.executable,
        ROOT / "evaluation.py",
        "--model_path",
        toy[0] / "t2i.pth.tar",
        "--split",
        "test",
        "--fold5",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, capsys.readouterr().out), done.stderr


def test_the_command_line_reports_a_missing_checkpoint_in_one_line():
    command = [sys.executable, ROOT / "evaluation.py", "--model_path", "missing.pth.tar"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: missing.pth.tar: no such checkpoint\n"


# ---------------------------------------------------------------- other data, and models that do not belong together


def copied(toy, tmp_path, name="toy_precomp"):
    """The toy folder's test split under another root, as (data_path, prefix)."""
    source = os.path.join(toy[1]["t2i"].opt.data_path, "toy_precomp")
    shutil.copytree(source, tmp_path / "data" / name)
    return str(tmp_path / "data"), str(tmp_path / "data" / name / "test")


def test_another_data_set_is_ranked_with_the_checkpoints_vocabulary(toy, tmp_path, capsys):
    """No vocabulary of that data set is needed."""
    data_path, prefix = copied(toy, tmp_path, "other_precomp")
    write_lines(prefix + "_caps.txt", open(prefix + "_caps.txt").read().splitlines()[::-1])
    path = str(toy[0] / "t2i.pth.tar")
    result = evalrank(path, data_path, "test", data_name="other_precomp")
    printed = capsys.readouterr().out
    assert result["n_images"] == 25 and result != evalrank(path, split="test")
    capsys.readouterr()
    flags = ["--model_path", path, "--data_path", data_path, "--data_name", "other_precomp", "--split", "test"]
    done = subprocess.run([sys.executable, ROOT / "evaluation.py", *flags], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def save_moved(toy, path, data_path, vocab_path=None):
    """A copy of the t2i checkpoint whose data lie elsewhere."""
    checkpoint = torch.load(toy[0] / "t2i.pth.tar", weights_only=False)
    checkpoint["opt"].data_path = data_path
    checkpoint["opt"].vocab_path = vocab_path or checkpoint["opt"].vocab_path
    torch.save(checkpoint, path)
    return str(path)


@pytest.mark.parametrize("together", ["ensemble", "versus"])
def test_models_of_other_captions_or_pictures_are_not_ranked_together(toy, tmp_path, together):
    """Their files have the same shapes: only captions and ids tell that pictures stand in another order."""
    data_path, prefix = copied(toy, tmp_path)
    first, other = str(toy[0] / "t2i.pth.tar"), save_moved(toy, tmp_path / "o.pth.tar", data_path)

    def rank():
        return (
            evalrank([first, other], split="test")
            if together == "ensemble"
            else evalrank(first, split="test", versus=other)
        )

    assert rank()["n_images"] == 25
    captions = open(prefix + "_caps.txt").read().splitlines()
    write_lines(prefix + "_caps.txt", captions[5:] + captions[:5])
    with pytest.raises(InputError, match="o.pth.tar: caption 0 of .*test is .*, that of .*test for .*t2i.pth.tar is"):
        rank()
    write_lines(prefix + "_caps.txt", captions)
    write_lines(prefix + "_ids.txt", [*range(24), 99])
    with pytest.raises(InputError, match="o.pth.tar: id 24 of .*test is '99'"):
        rank()


def test_models_with_other_vocabularies_are_ranked_together(toy, tmp_path):
    opt = toy[1]["t2i"].opt
    vocab = deserialize_vocab(os.path.join(opt.vocab_path, "toy_precomp_vocab.json"))
    vocab.add_word("zebra")
    (tmp_path / "vocab").mkdir()
    serialize_vocab(vocab, str(tmp_path / "vocab" / "toy_precomp_vocab.json"))
    save_model(tmp_path / "more.pth.tar", opt.data_path, str(tmp_path / "vocab"))
    assert evalrank([str(toy[0] / "t2i.pth.tar"), str(tmp_path / "more.pth.tar")], split="test")["n_captions"] == 125


# ---------------------------------------------------------------- folds, best candidates, ECCV Caption


def test_fold5_says_how_many_pictures_a_fold_has_and_warns_of_other_folds_than_published(toy, capsys, caplog):
    evalrank(str(toy[0] / "t2i.pth.tar"), split="test", fold5=True)
    assert "5 folds of 5 pictures\n" in capsys.readouterr().out
    assert "5 pictures a fold, published 1K results have 1,000" in caplog.text
    assert "R@10 of so few says nothing" in caplog.text


def test_recalls_of_a_handful_of_pictures_are_warned_of(toy, capsys, caplog):
    evalrank(str(toy[0] / "t2i.pth.tar"), split="test")
    assert not caplog.text and "folds" not in capsys.readouterr().out
    evalrank(str(toy[0] / "t2i.pth.tar"), split="dev")
    assert "only 6 images or captions are ranked" in caplog.text


@pytest.mark.parametrize("fold5", [False, True])
def test_save_topk_writes_every_querys_best(toy, tmp_path, fold5):
    path = tmp_path / "best.jsonl"
    evalrank(str(toy[0] / "t2i.pth.tar"), split="test", fold5=fold5, save_topk=path, topk=3)
    rows = [json.loads(line) for line in open(path)]
    assert len(rows) == 25 + 125
    sims = direct_scores(toy)
    for fold in range(5 if fold5 else 1):
        n = 5 if fold5 else 25
        part = sims[fold * n : (fold + 1) * n, 5 * fold * n : 5 * (fold + 1) * n]
        for i, row in enumerate(rows[fold * n : (fold + 1) * n]):
            best = np.argsort(-part[i])[:3]
            assert row["image"] == str(fold * n + i) and row["captions"] == (best + 5 * fold * n).tolist()
            assert row["scores"] == pytest.approx(part[i][best].tolist(), abs=1e-5)
        for c, row in enumerate(rows[25 + 5 * fold * n : 25 + 5 * (fold + 1) * n]):
            best = np.argsort(-part[:, c])[:3]
            assert row["caption"] == 5 * fold * n + c and row["images"] == [str(fold * n + i) for i in best]


def test_without_ids_the_best_candidates_are_named_by_row(toy, tmp_path):
    data_path, prefix = copied(toy, tmp_path)
    os.remove(prefix + "_ids.txt")
    evalrank(str(toy[0] / "t2i.pth.tar"), data_path, "test", save_topk=tmp_path / "best.jsonl")
    rows = [json.loads(line) for line in open(tmp_path / "best.jsonl")]
    assert [row["image"] for row in rows[:25]] == list(range(25)) and len(rows[30]["images"]) == 10


def test_files_and_counts_that_cannot_be_written_are_refused_before_scoring(toy, tmp_path):
    for options, message in (
        ({"save_topk": tmp_path / "no" / "best.jsonl"}, "best.jsonl: no such folder"),
        ({"save_ranks": tmp_path / "no" / "ranks"}, "ranks: no such folder"),
        ({"save_topk": tmp_path / "best", "topk": 0}, "--topk 0: expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            evalrank("never.pth.tar", split="test", **options)


def test_eccv_is_refused_for_another_split_before_scoring(toy, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *args: pytest.fail("scored"))
    with pytest.raises(InputError, match="test: 25 images and 125 captions, --eccv expects MS-COCO's testall"):
        evalrank(str(toy[0] / "t2i.pth.tar"), split="test", eccv=True)
    with pytest.raises(InputError, match="--eccv: .*expected no --fold5"):
        evalrank(str(toy[0] / "t2i.pth.tar"), split="testall", eccv=True, fold5=True)


def test_eccv_measures_the_mean_similarities_of_an_ensemble(capsys):
    """Only the scores are made up: encoding and scoring 5,000 × 25,000 takes minutes."""
    ids = list(map(str, eccv.testall_ids()[0].tolist()))
    dataset = Namespace(
        prefix="testall",
        n_images=5000,
        captions=["a dog"] * 25000,
        read_ids=lambda: ids,
        read_id_lines=lambda: list(map(str, eccv.testall_ids()[1].tolist())),  # ids of captions are accepted as well
    )

    def scores(path, *where, check):
        check(path, dataset)
        return [np.random.default_rng(int(path)).random((5000, 25000), dtype=np.float32)]

    result = evalrank(["1", "2"], split="testall", eccv=True, score_split=scores)
    expected = eccv.metrics((scores("1", check=lambda *seen: None)[0] + scores("2", check=lambda *seen: None)[0]) / 2)
    assert result["eccv"] == expected
    printed = capsys.readouterr().out
    assert "ECCV mAP@R: {:.1f} {:.1f}\n".format(*expected["eccv_map_at_r"]) in printed and "CxC R@10: " in printed
