"""Ranks, embedding a split, scoring in shards, and evalrank as a user calls it."""

import json
import os
import shutil
from functools import cache

import numpy as np
import pytest
import reference
import torch
from dataset_commands import command
from folders import make_folder, save_model, write_lines
from hypothesis import example, given, settings
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
    score_split,
    shard_xattn_i2t,
    shard_xattn_t2i,
    softmax,
    t2i,
)
from lib import distributed, eccv, report
from lib.errors import InputError
from model import xattn_score_i2t, xattn_score_t2i
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
@example(sims=np.random.default_rng(0).integers(0, 9, (600, 1200)))  # whole numbers; more rows than a block
@example(sims=np.repeat(np.eye(20), 5, axis=1))
def test_ranks_and_recalls_are_those_of_sorting_each_row(sims):
    before = sims.copy()
    for rank, matrix in ((i2t, sims), (t2i, sims.T)):
        recalls, (ranks, top1) = rank(None, None, None, sims, return_ranks=True)
        expected = reference.ranks(matrix)
        assert (ranks == expected).all()
        assert recalls == pytest.approx(reference.recalls(expected))
        assert rank(None, None, None, sims) == recalls
        for row, place, best in zip(matrix, ranks, top1.astype(int), strict=True):
            assert place > 0 or row[best] == row.max()
        assert (matrix[np.arange(len(matrix)), top1.astype(int)] == matrix.max(1)).all()
    assert (sims == before).all()


def test_a_model_that_scores_everything_alike_finds_nothing():
    """A tie counts against the model: with 20 images and 100 captions the 95 wrong captions come first."""
    recalls, (ranks, top1) = i2t(None, None, None, np.zeros((20, 100)), return_ranks=True)
    assert recalls == (0, 0, 0, 96, 96) and (ranks == 95).all()
    assert (top1 // 5 != np.arange(20)).all()
    assert t2i(None, None, None, np.zeros((20, 100))) == (0, 0, 0, 20, 20)


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


def test_meters_average_and_show_themselves_and_softmax_sums_to_1():
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
    X = np.array([[0.0, 900.0], [0.0, np.log(3)]])
    np.testing.assert_allclose(softmax(X, 1), [[0, 1], [0.25, 0.75]])
    np.testing.assert_allclose(softmax(X.T, 0), [[0, 0.25], [1, 0.75]])


# ---------------------------------------------------------------- embeddings and scores


class Toy:
    """A folder with dev, test and testall splits, and a t2i and an i2t checkpoint of it."""

    def __init__(self, root):
        self.root = root
        where = make_folder(root, splits={"dev": 6, "test": 25, "testall": 10}, n_regions=4)
        self.models = {way: save_model(root / f"{way}.pth.tar", *where, cross_attn=way) for way in ("t2i", "i2t")}
        self.opt = self.models["t2i"].opt
        self.scores = cache(self.score_directly)
        self.t2i, self.i2t = (str(root / f"{way}.pth.tar") for way in ("t2i", "i2t"))

    def loader(self, split="test", batch_size=4):
        vocab = deserialize_vocab(os.path.join(self.opt.vocab_path, "toy_precomp_vocab.json"))
        return get_test_loader(split, "toy_precomp", vocab, batch_size, 0, self.opt)

    def score_directly(self, way="t2i", split="test"):
        """Scores of a split by the shortest way: item after item through forward_emb, then one call."""
        model, dataset = self.models[way], self.loader(split).dataset
        model.val_start()
        with torch.no_grad():
            items = [dataset[i] for i in range(len(dataset))]
            pairs = [model.forward_emb(x[0][None], x[1][None], x[2][None], [len(x[2])]) for x in items]
            images = torch.cat([pair[0] for pair in pairs[::5]])
            columns = [XATTN_SCORE[way](images, words, lens, model.opt) for _, words, lens in pairs]
        return torch.cat(columns, 1).numpy()

    def copy(self, folder, name="toy_precomp"):
        """The splits in another folder, as (data_path, prefix of the test split)."""
        shutil.copytree(os.path.join(self.opt.data_path, "toy_precomp"), folder / "data" / name)
        return str(folder / "data"), str(folder / "data" / name / "test")

    def change(self, path, **options):
        """A copy of the t2i checkpoint with other options; its path."""
        checkpoint = torch.load(self.t2i, weights_only=False)
        vars(checkpoint["opt"]).update(options)
        torch.save(checkpoint, path)
        return str(path)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("toy"))


def test_encode_data_returns_each_image_once_and_each_caption_in_order(toy):
    model, loader = toy.models["t2i"], toy.loader(batch_size=7)
    images, captions, lens = encode_data(model, loader)
    assert images.shape == (25, 4, 16) and captions.shape == (125, max(lens), 16) and len(lens) == 125
    assert images.dtype == captions.dtype == torch.float32 and not images.requires_grad
    for i in (0, 61, 124):
        image, boxes, target, *_ = loader.dataset[i]
        img_emb, cap_emb, _ = model.forward_emb(image[None], boxes[None], target[None], [len(target)])
        torch.testing.assert_close(images[i // 5], img_emb[0].detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(captions[i, : lens[i]], cap_emb[0].detach(), rtol=0, atol=1e-6)
        assert lens[i] == len(target) and not captions[i, lens[i] :].any()


@pytest.mark.parametrize(("way", "shard"), [("t2i", shard_xattn_t2i), ("i2t", shard_xattn_i2t)])
def test_scores_are_the_same_for_any_batch_and_shard_size_threads_and_form(toy, way, shard):
    """Ranks may differ by pairs only whose scores are this close."""
    model, expected, threads = toy.models[way], toy.scores(way), torch.get_num_threads()
    assert np.ptp(expected) > 1e-3
    for batch_size, shard_size, n_threads in ((1, 128, 1), (7, 16, 1), (200, 4, 1), (128, 128, 2)):
        torch.set_num_threads(n_threads)
        images, captions, lens = encode_data(model, toy.loader(batch_size=batch_size))
        scores = shard(images, captions, lens, model.opt, shard_size)
        torch.set_num_threads(threads)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    (sims,) = score_split(model, toy.loader())
    np.testing.assert_allclose(sims, expected, rtol=0, atol=1e-6)
    arrays = shard(images.numpy(), captions.numpy(), np.array(lens), model.opt, shard_size=7)
    assert arrays.dtype == np.float32
    np.testing.assert_allclose(arrays, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- evalrank


def numbers_of(sims):
    """The numbers of a similarity matrix by brute force, as evalrank returns them."""
    i2t, t2i = (reference.recalls(reference.ranks(matrix)) for matrix in (sims, sims.T))
    ar, ari = sum(i2t[:3]) / 3, sum(t2i[:3]) / 3
    return {"rsum": 3 * (ar + ari), "ar": ar, "ari": ari, "i2t": i2t, "t2i": t2i}


def check_result(result, expected):
    for key, value in expected.items():
        assert result[key] == pytest.approx(value), key


def check_printed(lines, expected):
    """SCAN's labels, each followed by its numbers."""
    numbers = {label: [float(x) for x in rest.split()] for label, _, rest in (line.partition(": ") for line in lines)}
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


@pytest.mark.parametrize(("way", "split", "n"), [("t2i", "dev", 6), ("i2t", "test", 25), ("i2t", "testall", 10)])
def test_evalrank_prints_and_returns_the_numbers_of_a_split(toy, way, split, n, capsys):
    expected = numbers_of(toy.scores(way, split))
    path = str(toy.root / f"{way}.pth.tar")
    result = evalrank(path) if split == "dev" else evalrank(path, split=split)  # SCAN's default
    check_result(result, {**expected, "n_images": n, "n_captions": 5 * n})
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"Images: {n}, Captions: {5 * n}"
    check_printed(lines, expected)


def test_fold5_ranks_five_fifths_and_prints_their_means_under_the_right_names(toy, capsys, caplog):
    sims = toy.scores()
    folds = [numbers_of(sims[5 * k : 5 * k + 5, 25 * k : 25 * k + 25]) for k in range(5)]
    mean = {key: np.mean([fold[key] for fold in folds], axis=0) for key in folds[0]}
    assert mean["ar"] != pytest.approx(mean["ari"], abs=0.1)  # else names could be mixed up unseen
    result = evalrank(toy.t2i, split="test", fold5=True)
    check_result(result, {**mean, "n_images": 25, "n_captions": 125})
    for fold, expected in zip(result["folds"], folds, strict=True):
        check_result(fold, expected)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[:2] == ["Images: 25, Captions: 125", "5 folds of 5 images"]
    fold_lines = [line for line in lines if " ar: " in line]
    assert fold_lines == ["rsum: {rsum:.1f} ar: {ar:.1f} ari: {ari:.1f}".format(**fold) for fold in folds]
    check_printed(lines[lines.index("Mean metrics: ") + 1 :], mean)
    assert "5 images a fold, published 1K results have 1,000" in caplog.text
    assert "R@10 of so few says nothing" in caplog.text
    done = command("evaluation", "--model_path", toy.t2i, "--split", "test", "--fold5")
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
    with pytest.raises(InputError, match="6 images do not divide into 5 folds"):
        evalrank(toy.t2i, split="dev", fold5=True)


@pytest.mark.parametrize("fold5", [False, True])
def test_an_ensemble_ranks_the_mean_of_its_models_similarities(toy, fold5):
    sims = (toy.scores("t2i") + toy.scores("i2t")) / 2
    result = evalrank([toy.t2i, toy.i2t], split="test", fold5=fold5)
    if fold5:
        check_result(result["folds"][3], numbers_of(sims[15:20, 75:100]))
    else:
        check_result(result, numbers_of(sims))


@pytest.mark.parametrize("word", ["splt", "shard_size"])
def test_a_word_that_evalrank_does_not_know_is_refused_with_those_it_knows(toy, word):
    with pytest.raises(TypeError, match=f"'{word}', expected one of .*save_ranks.*intervals.*versus.*batch_size"):
        evalrank(toy.t2i, **{word: "test"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lambda_softmax": -3.0}, "--lambda_softmax -3.0: expected a number, at least 0"),
        ({"lambda_softmax": "x"}, "--lambda_softmax x: expected a number"),
        ({"agg_func": "Median"}, "--agg_func Median: expected one of LogSumExp, Mean, Max, Sum"),
        ({"batch_size": 0}, "--batch_size 0: expected a whole number, at least 1"),
        ({"topk": 0, "save_topk": "best"}, "--topk 0: expected a whole number, at least 1"),
        ({"intervals": "yes"}, "--intervals yes: expected True or False"),
        ({"device": "abacus"}, "--device abacus: "),
        ({"save_topk": "no/best.jsonl"}, "No such file or directory: .*best.jsonl"),
        ({"versus": "no.pth.tar"}, "no.pth.tar: no such checkpoint"),
        ({"save_ranks": "no/ranks"}, "No such file or directory: .*ranks"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_before_scoring(toy, options, said, monkeypatch):
    monkeypatch.setattr(evaluation, "score_split", lambda *args: pytest.fail("scored"))
    with pytest.raises((InputError, OSError), match=said):
        evalrank(toy.t2i, split="test", **options)


def test_options_of_evalrank_replace_the_checkpoints(toy, tmp_path, monkeypatch):
    moved = toy.change(tmp_path / "moved.pth.tar", data_path="/nowhere", vocab_path="/nowhere")
    with pytest.raises(InputError, match="/nowhere"):
        evalrank(moved, split="test")
    sizes, real = [], distributed.my_batches
    monkeypatch.setattr(distributed, "my_batches", lambda starts, desc: sizes.append(starts.step) or real(starts, desc))
    result = evalrank(moved, toy.opt.data_path, "test", vocab_path=toy.opt.vocab_path, batch_size=9)
    assert sizes == [9, 9], "captions and images"
    check_result(result, numbers_of(toy.scores()))
    check_result(evalrank(toy.t2i, split="test", cross_attn="i2t", device=None), numbers_of(toy.scores("i2t")))


def test_processes_of_which_some_hold_the_images_on_their_gpu_score_each_pair_once(monkeypatch):
    images, captions = (torch.zeros(10, 3, 4),), (torch.zeros(7, 5, 4), [5] * 7)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda x: x)
    counts = np.zeros((10, 7))
    for rank, held in enumerate((lambda x, device: x, lambda x, device: x.clone())):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(evaluation, "resident", held)
        pairs = evaluation.score_shards(
            images, captions, lambda i, c, lens: torch.ones(len(i), len(c)), torch.device("cpu"), 2
        )
        counts += pairs
    assert (counts == 1).all()


@pytest.mark.parametrize("fold5", [False, True])
def test_save_ranks_writes_ranks_and_top1(toy, tmp_path, fold5):
    evalrank(toy.t2i, split="test", fold5=fold5, save_ranks=tmp_path / "ranks.pth.tar")
    saved, sims = torch.load(tmp_path / "ranks.pth.tar"), toy.scores()
    if fold5:
        assert len(saved) == 5
        saved, sims = saved[1], sims[5:10, 25:50]
    assert (saved["rt"][0].numpy() == reference.ranks(sims)).all()
    assert (saved["rti"][0].numpy() == reference.ranks(sims.T)).all()
    assert (saved["rt"][1].numpy() == sims.argmax(1)).all() and (saved["rti"][1].numpy() == sims.argmax(0)).all()


@pytest.mark.parametrize("fold5", [False, True])
def test_save_topk_writes_every_querys_best(toy, tmp_path, fold5):
    evalrank(toy.t2i, split="test", fold5=fold5, save_topk=tmp_path / "best.jsonl", topk=3)
    rows = [json.loads(line) for line in open(tmp_path / "best.jsonl")]
    assert len(rows) == 25 + 125
    for fold in range(5 if fold5 else 1):
        n = 5 if fold5 else 25
        part = toy.scores()[fold * n : (fold + 1) * n, 5 * fold * n : 5 * (fold + 1) * n]
        for i, row in enumerate(rows[fold * n : (fold + 1) * n]):
            best = np.argsort(-part[i])[:3]
            assert row["image"] == str(fold * n + i) and row["captions"] == (best + 5 * fold * n).tolist()
            assert row["scores"] == pytest.approx(part[i][best].tolist(), abs=1e-5)
        for c, row in enumerate(rows[25 + 5 * fold * n : 25 + 5 * (fold + 1) * n]):
            best = np.argsort(-part[:, c])[:3]
            assert row["caption"] == 5 * fold * n + c and row["images"] == [str(fold * n + i) for i in best]


# ---------------------------------------------------------------- other data, and models that do not belong together


def test_more_images_than_captions_are_ranked(toy, tmp_path):
    """Each of 5 captions belongs to 5 images in a row: one column a caption, the best image counts for t2i."""
    data_path, prefix = toy.copy(tmp_path)
    write_lines(prefix + "_caps.txt", ["a man runs", "a dog", "a child jumps", "red ball in grass", "with water"])
    result = evalrank(toy.t2i, data_path, "test")
    assert (result["n_images"], result["n_captions"]) == (25, 5)
    model, loader = load_split(toy.t2i, data_path, None, "test")
    check_result(result, numbers_of(XATTN_SCORE["t2i"](*encode_data(model, loader), model.opt).numpy()))


def test_plain_scan_is_evaluated_without_boxes(toy, tmp_path):
    """Here without ids as well, so that the best candidates are named by row; and beside a model of other words."""
    data_path, prefix = toy.copy(tmp_path)
    os.remove(prefix + "_boxes.npy")
    os.remove(prefix + "_ids.txt")
    vocab = deserialize_vocab(os.path.join(toy.opt.vocab_path, "toy_precomp_vocab.json"))
    vocab.add_word("zebra")
    serialize_vocab(vocab, str(tmp_path / "toy_precomp_vocab.json"))
    scan = str(tmp_path / "scan.pth.tar")
    save_model(scan, data_path, str(tmp_path), position="none")
    assert evalrank(scan, split="test", save_topk=tmp_path / "best.jsonl")["n_captions"] == 125
    rows = [json.loads(line) for line in open(tmp_path / "best.jsonl")]
    assert [row["image"] for row in rows[:25]] == list(range(25)) and len(rows[30]["images"]) == 10
    assert evalrank([toy.t2i, scan], split="test")["n_captions"] == 125


def test_another_data_set_is_ranked_with_the_checkpoints_vocabulary(toy, tmp_path, capsys):
    """No vocabulary of that data set is needed."""
    data_path, prefix = toy.copy(tmp_path, "other_precomp")
    write_lines(prefix + "_caps.txt", open(prefix + "_caps.txt").read().splitlines()[::-1])
    result = evalrank(toy.t2i, data_path, "test", data_name="other_precomp")
    printed = capsys.readouterr().out
    assert result["n_images"] == 25 and result != evalrank(toy.t2i, split="test")
    flags = "--model_path", toy.t2i, "--data_path", data_path, "--data_name", "other_precomp", "--split", "test"
    done = command("evaluation", *flags)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


@pytest.mark.parametrize("together", ["ensemble", "versus"])
def test_models_of_other_captions_or_images_are_not_ranked_together(toy, tmp_path, together):
    """Their files have the same shapes: only captions and ids tell that images stand in another order."""
    data_path, prefix = toy.copy(tmp_path)
    other = toy.change(tmp_path / "o.pth.tar", data_path=data_path)
    models = {"model_path": [toy.t2i, other]} if together == "ensemble" else {"model_path": toy.t2i, "versus": other}
    assert evalrank(**models, split="test")["n_images"] == 25
    captions = open(prefix + "_caps.txt").read().splitlines()
    write_lines(prefix + "_caps.txt", captions[5:] + captions[:5])
    with pytest.raises(InputError, match=f"o.pth.tar: caption 0 of {prefix} is '.*', that of .*toy0.*test '"):
        evalrank(**models, split="test")
    write_lines(prefix + "_caps.txt", captions)
    write_lines(prefix + "_ids.txt", [*range(24), 99])
    with pytest.raises(InputError, match="o.pth.tar: id 24 of .*test is '99'"):
        evalrank(**models, split="test")


# ---------------------------------------------------------------- ECCV Caption


def test_eccv_is_refused_for_another_split_before_scoring(toy, monkeypatch):
    monkeypatch.setattr(evaluation, "score_split", lambda *args: pytest.fail("scored"))
    with pytest.raises(InputError, match="test: 25 images and 125 captions, --eccv expects MS-COCO's testall"):
        evalrank(toy.t2i, split="test", eccv=True)
    with pytest.raises(InputError, match="--eccv: .*expected no --fold5"):
        evalrank(toy.t2i, split="testall", eccv=True, fold5=True)


def test_eccv_measures_the_mean_similarities_of_an_ensemble(toy, monkeypatch):
    """test_eccv.py has the metrics, which are those of testall: its 5,000 × 25,000 scores take minutes."""
    found, measured = {"eccv_map_at_r": (12.34, 5.0)}, []
    monkeypatch.setattr(report, "check_split", lambda *split: None)
    monkeypatch.setattr(eccv, "print_metrics", lambda sims: measured.append(sims) or found)
    assert evalrank([toy.t2i, toy.i2t], split="testall", eccv=True)["eccv"] == found
    expected = (toy.scores("t2i", "testall") + toy.scores("i2t", "testall")) / 2
    np.testing.assert_allclose(measured, [expected], atol=1e-6)
