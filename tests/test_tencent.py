"""The whole-image variant: published numbers, the formulas in plain form, files, training, evaluation."""

import base64
import gzip
import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from conftest import ROOT, make_opt
from folders import make_whole_folder, random_boxes, write_lines

from evaluation import load_split, score_split
from lib import errors
from model import load_checkpoint
from position import position_grid
from Tencent_PFAN import evaluation_whole, train_whole
from Tencent_PFAN import vocab as vocab_whole
from Tencent_PFAN.data_whole import PrecompDataset, get_loaders
from Tencent_PFAN.evaluation_whole import encode_data, evalrank, i2t, shard_xattn_i2t, shard_xattn_t2i, t2i
from Tencent_PFAN.model_whole import SCAN, ContrastiveLoss, load_model
from Tencent_PFAN.vocab import Vocabulary, deserialize_vocab, tokenize

SMALL = {"img_dim": 8, "embed_size": 6, "word_dim": 5, "lambda_whole": 2.0}


def close(ours, expected, atol):
    np.testing.assert_allclose(torch.as_tensor(ours).detach(), torch.as_tensor(expected).detach(), rtol=0, atol=atol)


# ---------------------------------------------------------------- the published numbers


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "tencent.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("case", range(17))
def test_model_gives_the_published_embeddings_scores_loss_and_gradients(golden, case):
    meta = json.loads(str(golden["meta"]))
    assert len(meta) == 17
    opt = make_opt(**{"lambda_whole": 2, **meta[case]})
    published = {name.partition(".")[2]: value for name, value in golden.items() if name.startswith(f"c{case}.")}
    model = SCAN(opt)
    model.load_state_dict(
        [
            {name[len(prefix) :]: torch.tensor(x) for name, x in golden.items() if name.startswith(prefix)}
            for prefix in ("w.img_enc.", "w.txt_enc.")
        ]
    )
    batch = [torch.tensor(golden[name]) for name in ("images", "whole_images", "boxes", "captions")]
    embeddings = model.forward_emb(*batch, golden["lengths"].tolist())
    for name, ours in zip(("img_emb", "whole_emb", "cap_emb", "lens", "final_cap_emb"), embeddings, strict=True):
        if name in published and published[name].size:
            close(ours, published[name], 1e-5)
    sims = model.score(*embeddings)
    close(sims, published["sims"], 2e-4 if opt.agg_func == "Sum" else 1e-5)
    loss = model.forward_loss(*embeddings)
    assert loss.item() == pytest.approx(float(published["loss"]), rel=1e-4)
    loss.backward()
    for name, gradient in published.items():
        if name.startswith("grad."):
            _, encoder, parameter = name.split(".", 2)
            ours = dict(getattr(model, encoder).named_parameters())[parameter].grad
            close(ours, gradient, 1e-3 * np.abs(gradient).max())


def test_published_server_checkpoint_gives_the_published_scores(shared):
    folder = shared / "golden" / "server"
    model = load_model(folder / "sentence_t2i.pth.tar")
    vocab = deserialize_vocab(folder / "vocab" / "tencent_data_sent_vocab.json")
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert lines
    for line in lines:
        request, response = line["request"], line["response"]
        features, boxes = (
            np.stack([np.frombuffer(base64.b64decode(x[key]), np.float32).reshape(36, -1) for x in request["boxes"]])
            for key in ("features", "boxes")
        )
        sizes = [[item["image_h"], item["image_w"]] for item in request["boxes"]]
        ids = vocab.encode(" ".join(request["sentence"]))
        embeddings = model.forward_emb(
            torch.tensor(features),
            torch.tensor(request["whole_items"]),
            torch.tensor(position_grid(boxes, sizes)),
            torch.tensor([ids]),
            [len(ids)],
            volatile=True,
        )
        for way in ("t2i", "i2t"):
            close(model.score(*embeddings, cross_attn=way)[:, 0], response[f"sim_{way}"], 1e-5)


# ---------------------------------------------------------------- the formulas in plain form


def random_batch(n=4, n_regions=5, img_dim=8, n_boxes=None, seed=0):
    """images, whole_images, boxes, captions, lengths of n pairs; the last region of the first image is padding."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, n, n_boxes or n_regions)
    images = rng.standard_normal((n, n_regions, img_dim)).astype(np.float32)
    boxes[0, -1], images[0, -1] = [256] * 15 + [0] * 16, 0
    whole = rng.standard_normal((n, img_dim)).astype(np.float32)
    lengths = sorted(rng.integers(3, 7, n).tolist(), reverse=True)
    captions = rng.integers(1, 50, (n, max(lengths))) * (np.arange(max(lengths)) < np.array(lengths)[:, None])
    return *map(torch.tensor, (images, whole, boxes, captions)), lengths


def plain_embeddings(img, txt, images, whole_images, boxes, captions, lengths, opt):
    """Embeddings of a batch, one image and one caption at a time, from the encoders' float64 parameters."""
    regions = []
    for features, grid in zip(images, boxes, strict=True):
        p = [reference.position_feature(img, None, box, "area") for box in grid]
        if opt.need_box_whole:
            p = [*p[: len(features) - 1], img["position_embedding.weight"].mean(0)]
        joined = [torch.cat(pair) for pair in zip(features, p, strict=True)]
        regions.append([reference.unit(img["fc.weight"] @ x + img["fc.bias"]) for x in joined])
    whole = [reference.unit(img["fc_whole.weight"] @ x + img["fc_whole.bias"]) for x in whole_images]
    words, sentences = [], []
    for ids, length in zip(captions, lengths, strict=True):
        inputs = [txt["embed.weight"][int(word)] for word in ids[:length]]
        for layer in range(opt.num_layers):
            forward = reference.gru_states(txt, inputs, f"l{layer}")
            backward = reference.gru_states(txt, inputs[::-1], f"l{layer}_reverse")[::-1]
            inputs = [torch.cat(pair) for pair in zip(forward, backward, strict=True)]
        words.append([reference.unit((f + b) / 2) for f, b in zip(forward, backward, strict=True)])
        sentences.append(reference.unit((forward[-1] + backward[0]) / 2))
    return regions, whole, words, sentences


def plain_score(regions, whole, words, sentence, opt):
    score = opt.lambda_whole * reference.cosine(whole, sentence)
    if opt.cross_attn == "t2i" and opt.need_box_whole:
        score = score + 0.5 * reference.cosine(regions[-1], sentence)
        regions = regions[:-1]
    queries, context = (words, regions) if opt.cross_attn == "t2i" else (regions, words)
    cosines, attentions = reference.relevance(queries, context, opt)
    attention_term = reference.aggregate([a.max() for a in attentions], opt)
    return score + reference.aggregate(cosines, opt) + 0.5 * attention_term


@pytest.mark.parametrize("n_boxes", [None, 5, 4], ids=["regions only", "box_whole replaced", "box_whole appended"])
@pytest.mark.parametrize("cross_attn", ["t2i", "i2t"])
@pytest.mark.parametrize("max_violation", [True, False])
def test_scores_loss_and_gradients_follow_the_formulas(cross_attn, n_boxes, max_violation):
    opt = make_opt(
        **SMALL,
        cross_attn=cross_attn,
        max_violation=max_violation,
        need_box_whole=n_boxes is not None,
        num_layers=2,
        margin=0.6,
    )
    torch.manual_seed(0)
    model = SCAN(opt)
    batch = random_batch(n_boxes=n_boxes)
    encoders = {"img": model.img_enc, "txt": model.txt_enc}
    exact = {
        name: {key: x.detach().double().requires_grad_() for key, x in encoder.state_dict().items()}
        for name, encoder in encoders.items()
    }
    inputs = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in batch]
    regions, whole, words, sentences = plain_embeddings(exact["img"], exact["txt"], *inputs, opt)
    plain = torch.stack(
        [
            torch.stack([plain_score(r, w, c, s, opt) for c, s in zip(words, sentences, strict=True)])
            for r, w in zip(regions, whole, strict=True)
        ]
    )
    embeddings = model.forward_emb(*batch)
    close(model.score(*embeddings), plain, 1e-5)
    shard = {"t2i": shard_xattn_t2i, "i2t": shard_xattn_i2t}[cross_attn]
    close(shard(*(x.detach() if torch.is_tensor(x) else x for x in embeddings), opt, shard_size=1), plain, 1e-5)

    loss, exact_loss = model.forward_loss(*embeddings), reference.loss(plain, opt.margin, max_violation)
    assert exact_loss > 0
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    loss.backward()
    exact_loss.backward()
    for name, encoder in encoders.items():
        for key, parameter in encoder.named_parameters():
            expected = exact[name][key].grad
            close(parameter.grad, expected, 1e-4 * max(expected.abs().max().item(), 1e-3))


def test_a_batch_of_one_and_one_without_violations_cost_nothing_and_train():
    model = SCAN(make_opt(**SMALL))
    assert model.train_emb(*random_batch(1)).item() == 0
    model = SCAN(make_opt(**SMALL, margin=-9))
    assert model.train_emb(*random_batch()).item() == 0
    assert all(torch.isfinite(x).all() for x in model.params)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = SCAN(make_opt(**SMALL, learning_rate=0.01))
    batch = random_batch()
    losses = [model.train_emb(*batch).item() for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_weight_norm_and_one_direction_have_their_parameters_and_train():
    model = SCAN(make_opt(**SMALL, precomp_enc_type="weight_norm", bi_gru=False))
    assert {"fc.weight_g", "fc.weight_v", "fc_whole.weight_g", "fc_whole.weight_v"} <= set(model.state_dict()[0])
    assert model.train_emb(*random_batch()).item() > 0


def test_positions_other_than_area_are_refused():
    with pytest.raises(errors.InputError, match="--position attention: expected area"):
        SCAN(make_opt(**SMALL, position="attention"))


def test_scan_names_are_at_hand():
    assert isinstance(SCAN(make_opt(**SMALL)).criterion, ContrastiveLoss)
    assert evaluation_whole.AverageMeter and evaluation_whole.LogCollector


# ---------------------------------------------------------------- captions and vocabulary


def test_only_ascii_letters_are_lower_cased():
    assert tokenize("A DNF Φ Ⅲ É 平定") == ["a", "dnf", "Φ", "Ⅲ", "É", "平定"]


def test_words_of_the_published_vocabulary_are_reached(shared):
    vocab = deserialize_vocab(shared / "real" / "vocab" / "tencent_data_sent_vocab.json")
    assert vocab("Φ") > 3 and vocab("Ⅲ") > 3
    assert vocab.encode("Φ zxqvj Ⅲ") == [1, vocab("Φ"), 0, vocab("Ⅲ"), 2]


def small_vocab():
    vocab = Vocabulary()
    for word in ("<pad>", "<start>", "<end>", "<unk>", "a", "dog"):
        vocab.add_word(word)
    return vocab


def test_an_unknown_word_is_id_0():
    assert small_vocab().encode("A dog zxqvj") == [1, 4, 5, 0, 2]


# ---------------------------------------------------------------- data folders


@pytest.fixture
def folder(tmp_path):
    data_path, vocab_path = make_whole_folder(tmp_path)
    return os.path.join(data_path, "toy"), data_path, vocab_path


def test_items_and_batches_hold_the_whole_image(folder):
    opt = make_opt(**SMALL, data_path=folder[1])
    train, dev = get_loaders("toy", small_vocab(), 4, 0, opt)
    image, whole, box, target, index, img_id = train.dataset[3]
    assert (image.shape, whole.shape, box.shape, index, img_id) == ((4, 8), (8,), (4, 31), 3, 3)
    assert (whole.numpy() == np.load(folder[0] + "/train_who_ims.npy")[3]).all()
    assert target[0] == 1 and target[-1] == 2 and 3 not in target
    images, whole, boxes, targets, lengths, ids = next(iter(dev))
    assert (images.shape, whole.shape, boxes.shape) == ((4, 4, 8), (4, 8), (4, 4, 31))
    assert targets.shape == (4, lengths[0]) and sorted(ids) == [0, 1, 2, 3]
    assert all(a >= b for a, b in pairwise(lengths))


def test_workers_load_the_same_batches(folder):
    opt = make_opt(**SMALL, data_path=folder[1])
    alone, together = (list(get_loaders("toy", small_vocab(), 4, workers, opt)[1]) for workers in (0, 1))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_a_copy_for_a_worker_opens_the_files_again(folder):
    dataset = PrecompDataset(folder[0], "dev", small_vocab())
    sent = pickle.dumps(dataset)
    assert not any(file.tobytes() in sent for file in (dataset.images, dataset.whole_images, dataset.boxes))
    copy = pickle.loads(sent)  # noqa: S301
    assert (copy.whole_images == dataset.whole_images).all()
    assert copy.vocab.encode("A zxqvj") == [1, 4, 0, 2]


def test_sent_captions_win_and_plain_names_do(folder):
    prefix = folder[0] + "/dev"
    assert len(PrecompDataset(folder[0], "dev", small_vocab())) == 6
    os.rename(prefix + "_sent_caps.txt", prefix + "_caps.txt")
    assert len(PrecompDataset(folder[0], "dev", small_vocab())) == 6
    write_lines(prefix + "_sent_caps.txt", ["a Φ"] * 6)
    assert PrecompDataset(folder[0], "dev", small_vocab()).captions == ["a Φ"] * 6


def test_equal_neighbours_stay_images_of_their_own(folder):
    np.save(folder[0] + "/dev_ims.npy", np.ones((6, 4, 8), np.float32))
    dataset = PrecompDataset(folder[0], "dev", small_vocab())
    assert (len(dataset), dataset.n_images) == (6, 6)


@pytest.mark.parametrize("n_regions", [4, 5], ids=["as many boxes", "one more image row"])
@pytest.mark.parametrize("box_width", [30, 31])
def test_need_box_whole_takes_a_last_region_without_a_box(tmp_path, n_regions, box_width):
    data_path, _ = make_whole_folder(tmp_path, 4, box_width)
    if n_regions == 5:
        ims = os.path.join(data_path, "toy", "dev_ims.npy")
        np.save(ims, np.concatenate([np.load(ims), np.ones((6, 1, 8), np.float32)], 1))
        with pytest.raises(errors.InputError, match=r"dev_boxes.npy: found \(6, 4, .*\), expected \(6, 5, 30 or 31\)"):
            PrecompDataset(data_path + "/toy", "dev", small_vocab())
    dataset = PrecompDataset(data_path + "/toy", "dev", small_vocab(), need_box_whole=True)
    model = SCAN(make_opt(**SMALL, need_box_whole=True))
    regions, whole = model.encode_images(*dataset.read_images(0, 6))
    assert regions.shape == (6, n_regions, 6) and whole.shape == (6, 6)


def damage(folder, name, change):
    np.save(f"{folder}/{name}", change(np.load(f"{folder}/{name}")))


def with_nan(x):
    x[2, 1] = np.nan
    return x


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: os.remove(f + "/train_who_ims.npy"), "train_who_ims.npy: no such file"),
        (lambda f: os.remove(f + "/train_boxes.npy"), "train_boxes.npy: no such file"),
        (lambda f: os.remove(f + "/train_sent_caps.txt"), "train_sent_caps.txt: no such file"),
        (lambda f: os.remove(f + "/../../vocab/toy_sent_vocab.json"), "make it with: python Tencent_PFAN/vocab.py"),
        (lambda f: damage(f, "dev_who_ims.npy", lambda x: x[:-1]), "dev_who_ims.npy: found (5, 8), expected (6, 8)"),
        (lambda f: damage(f, "dev_who_ims.npy", with_nan), "dev_who_ims.npy, image 2: NaN or infinite"),
        (lambda f: write_lines(f + "/dev_sent_caps.txt", ["a"] * 12), "6 images in _ims.npy and 12 captions"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line_and_status_2(folder, tmp_path, monkeypatch, capsys, break_it, message):
    break_it(folder[0])
    monkeypatch.setattr(sys, "argv", ["train_whole.py", *train_flags(folder, tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        errors.run(train_whole.main)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2
    assert len(error) == 1 and message in error[0]


# ---------------------------------------------------------------- training and evaluation


def train_flags(folder, run, *more):
    flags = f"--data_path {folder[1]} --vocab_path {folder[2]} --data_name toy --img_dim 8 --embed_size 6 --word_dim 5 "
    flags += f"--batch_size 4 --num_epochs 1 --workers 0 --device cpu --logger_name {run}/log --model_name {run}"
    return [*flags.split(), *more]


def train_here(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train_whole.py", *flags])
    train_whole.main()


def run(*command, cwd=ROOT):
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("cross_attn, lambda_softmax", [("t2i", 9), ("i2t", 4)])
def test_run_train_trains_with_the_published_flags(folder, tmp_path, cross_attn, lambda_softmax):
    where = tmp_path / "run"
    done = run("sh", str(ROOT / "Tencent_PFAN/run_train.sh"), cross_attn, *train_flags(folder, where), cwd=tmp_path)
    assert f"--cross_attn={cross_attn} --lambda_softmax={lambda_softmax}" in done.stderr  # the command is shown
    checkpoint = load_checkpoint(where / "model_best.pth.tar")
    opt = checkpoint["opt"]
    assert (opt.cross_attn, opt.lambda_softmax, opt.lambda_whole) == (cross_attn, lambda_softmax, 2)
    assert (opt.agg_func, opt.max_violation, opt.bi_gru, opt.learning_rate) == ("Mean", True, True, 0.0002)
    assert (opt.lr_update, opt.val_step, opt.position) == (15, 2000000, "area")
    assert checkpoint["epoch"] == 1
    assert set(checkpoint["model"][0]) == {
        "fc.weight",
        "fc.bias",
        "fc_whole.weight",
        "fc_whole.bias",
        "position_embedding.weight",
    }


def test_train_runs_as_a_file_and_has_the_published_flags(tmp_path):
    as_file = run(sys.executable, str(ROOT / "Tencent_PFAN/train_whole.py"), "--help", cwd=tmp_path).stdout
    for flag in ("--need_box_whole", "--lambda_whole", "--embed_path", "--cross_attn"):
        assert flag in as_file
    opt = train_whole.get_parser().parse_args([])
    assert (opt.embed_size, opt.position, opt.lambda_whole, opt.need_box_whole) == (512, "area", 1.0, False)
    assert opt.embed_path == "./vocab/embedding.npy"


def test_resuming_ends_where_an_unbroken_run_ends(folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(monkeypatch, *train_flags(folder, whole, "--bi_gru", "--max_violation", "--num_epochs", "3"))
    train_here(monkeypatch, *train_flags(folder, parts, "--bi_gru", "--max_violation", "--num_epochs", "2"))
    resume = "--bi_gru", "--max_violation", "--num_epochs", "3", "--resume", f"{parts}/checkpoint_1.pth.tar"
    train_here(monkeypatch, *train_flags(folder, parts, *resume))
    ours, expected = (load_checkpoint(run / "checkpoint_2.pth.tar") for run in (parts, whole))
    assert (ours["epoch"], ours["Eiters"], ours["best_rsum"]) == (3, expected["Eiters"], expected["best_rsum"])
    for a, b in zip(ours["model"], expected["model"], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("more", [(), ("--need_box_whole",)], ids=["regions only", "need_box_whole"])
def test_evalrank_ranks_what_the_trained_models_score(folder, tmp_path, monkeypatch, capsys, more):
    paths = []
    for cross_attn in ("t2i", "i2t"):
        where = tmp_path / cross_attn
        train_here(monkeypatch, *train_flags(folder, where, "--bi_gru", "--cross_attn", cross_attn, *more))
        paths.append(f"{where}/checkpoint_0.pth.tar")
    capsys.readouterr()
    sims = 0
    for path in paths:
        model, loader = load_split(path, split="test", make_model=SCAN)
        (block,) = score_split(model, loader)
        embeddings = encode_data(model, loader)
        assert [tuple(x.shape[::2]) for x in embeddings[:3:2]] == [(6, 6), (6, 6)]
        assert embeddings[1].shape == embeddings[4].shape == (6, 6) and len(embeddings[3]) == 6
        close(model.score(*embeddings), block, 1e-5)
        sims = sims + block / 2
    result = evalrank(paths, split="test", batch_size=5)
    assert (result["n_images"], result["n_captions"]) == (6, 6)
    assert result["i2t"] == pytest.approx(i2t(None, None, sims))
    assert result["t2i"] == pytest.approx(t2i(None, None, sims))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Images: 6, Captions: 6"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "rsum",
        "Average i2t Recall",
        "Image to text",
        "Average t2i Recall",
        "Text to image",
    ]


def test_caption_i_belongs_to_image_i():
    sims = np.array([[3.0, 5.0, 1.0], [0.0, 2.0, 1.0], [0.0, 9.0, 9.0]])
    _, (ranks, top1) = i2t(None, None, sims, return_ranks=True)
    assert (ranks.tolist(), top1.tolist()) == ([1, 0, 1], [1, 1, 1])
    _, (ranks, top1) = t2i(None, None, sims, return_ranks=True)
    assert (ranks.tolist(), top1.tolist()) == ([0, 2, 0], [0, 2, 2])
    assert i2t(None, None, sims, npts=1) == (100, 100, 100, 1, 1)
    with pytest.raises(errors.InputError, match="as many captions as images"):
        i2t(None, None, sims[:, :2])


def test_vocab_and_evaluation_run_as_files(folder, tmp_path, monkeypatch):
    write_lines(folder[0] + "/train_sent_caps.txt", ["DNF Φ 平定"] * 3 + ["a"] * 9)
    write_lines(folder[0] + "/dev_sent_caps.txt", ["dnf Φ Ⅲ"] + ["b"] * 5)
    flags = "--data_path", folder[1], "--vocab_path", folder[2], "--data_name", "toy"
    done = run(sys.executable, str(ROOT / "Tencent_PFAN/vocab.py"), *flags, "--overwrite", cwd=tmp_path)
    assert done.stdout == f"{folder[2]}/toy_sent_vocab.json: 8 words that occur at least 4 times\n"
    vocab = vocab_whole.deserialize_vocab(folder[2] + "/toy_sent_vocab.json")
    assert list(vocab.word2idx)[4:] == ["a", "b", "dnf", "Φ"]
    train_here(monkeypatch, *train_flags(folder, tmp_path / "run", "--bi_gru"))
    checkpoint = f"{tmp_path}/run/model_best.pth.tar"
    script = str(ROOT / "Tencent_PFAN/evaluation_whole.py")
    done = run(sys.executable, script, "--model_path", checkpoint, cwd=tmp_path)
    assert done.stdout.startswith("Images: 6, Captions: 6\nrsum: ")
