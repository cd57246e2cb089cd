"""The whole-image variant: the formulas in plain form, files, training, evaluation. test_golden.py has its numbers."""

import os
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from conftest import make_opt
from dataset_commands import call
from folders import make_whole_folder, random_batch, write_lines
from training import WholePlace, load

from evaluation import load_split, score_split
from lib import errors
from Tencent_PFAN import evaluation_whole, train_whole, vocab
from Tencent_PFAN.data_whole import PrecompDataset, get_loaders
from Tencent_PFAN.evaluation_whole import encode_data, evalrank, i2t, shard_xattn_i2t, shard_xattn_t2i, t2i
from Tencent_PFAN.model_whole import SCAN
from Tencent_PFAN.vocab import Vocabulary

SMALL = {"img_dim": 8, "embed_size": 6, "word_dim": 5, "lambda_whole": 2.0}


def close(ours, expected, atol):
    np.testing.assert_allclose(torch.as_tensor(ours).detach(), torch.as_tensor(expected).detach(), rtol=0, atol=atol)


# ---------------------------------------------------------------- the formulas in plain form


def batch_of(lens=(6, 5, 3, 3), n_regions=5, n_boxes=None):
    return random_batch(lens, n_regions, img_dim=8, whole=True, n_boxes=n_boxes)


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
    batch = batch_of(n_boxes=n_boxes)
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


def test_positions_other_than_area_are_refused():
    with pytest.raises(errors.InputError, match="--position attention: expected area"):
        SCAN(make_opt(**SMALL, position="attention"))


# ---------------------------------------------------------------- data folders


def small_vocab():
    return Vocabulary.from_words(["<pad>", "<start>", "<end>", "<unk>", "a", "dog"])


@pytest.fixture
def place(tmp_path):
    return WholePlace(tmp_path)


def test_items_and_batches_hold_the_whole_image(place):
    train, dev = get_loaders("toy", small_vocab(), 4, 0, make_opt(**SMALL, data_path=place.data_path))
    image, whole, box, target, index, img_id = train.dataset[3]
    assert (image.shape, whole.shape, box.shape, index, img_id) == ((4, 8), (8,), (4, 31), 3, 3)
    assert (whole.numpy() == np.load(place.folder + "/train_who_ims.npy")[3]).all()
    assert target[0] == 1 and target[-1] == 2 and 3 not in target
    images, whole, boxes, targets, lengths, ids = next(iter(dev))
    assert (images.shape, whole.shape, boxes.shape) == ((4, 4, 8), (4, 8), (4, 4, 31))
    assert targets.shape == (4, lengths[0]) and sorted(ids) == [0, 1, 2, 3]
    assert all(a >= b for a, b in pairwise(lengths))


def test_sent_captions_win_and_plain_names_do(place):
    folder = place.folder
    os.rename(folder + "/dev_sent_caps.txt", folder + "/dev_caps.txt")
    assert len(PrecompDataset(folder, "dev", small_vocab())) == 6
    write_lines(folder + "/dev_sent_caps.txt", ["a Φ"] * 6)
    assert PrecompDataset(folder, "dev", small_vocab()).captions == ["a Φ"] * 6


def test_equal_neighbours_stay_images_of_their_own(place):
    np.save(place.folder + "/dev_ims.npy", np.ones((6, 4, 8), np.float32))
    dataset = PrecompDataset(place.folder, "dev", small_vocab())
    assert (len(dataset), dataset.n_images) == (6, 6)


@pytest.mark.parametrize("box_width", [30, 31])
def test_need_box_whole_takes_a_last_region_without_a_box(tmp_path, box_width):
    folder = os.path.join(make_whole_folder(tmp_path, 4, box_width)[0], "toy")
    np.save(folder + "/dev_ims.npy", np.ones((6, 5, 8), np.float32))
    with pytest.raises(errors.InputError, match=r"dev_boxes.npy: found \(6, 4, .*\), expected \(.*, 5, 30 or 31\)"):
        PrecompDataset(folder, "dev", small_vocab())
    opt = make_opt(**SMALL, need_box_whole=True)
    regions, whole = SCAN(opt).encode_images(*PrecompDataset(folder, "dev", small_vocab(), opt).features(range(6)))
    assert regions.shape == (6, 5, 6) and whole.shape == (6, 6)


def with_nan():
    wholes = np.ones((6, 8), np.float32)
    wholes[2, 1] = np.nan
    return wholes


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda f: os.remove(f + "/train_who_ims.npy"), "train_who_ims.npy: no such file"),
        (lambda f: os.remove(f + "/train_sent_caps.txt"), "train_sent_caps.txt: no such file"),
        (lambda f: os.remove(f + "/../../vocab/toy_sent_vocab.json"), "make it with: python Tencent_PFAN/vocab.py"),
        (lambda f: np.save(f + "/dev_who_ims.npy", np.ones((5, 8))), "dev_who_ims.npy: found (5, 8), expected (6, 8)"),
        (lambda f: np.save(f + "/dev_who_ims.npy", with_nan()), "dev_who_ims.npy, image 2: NaN or infinite"),
        (lambda f: write_lines(f + "/dev_sent_caps.txt", ["a"] * 12), "6 images in _ims.npy and 12 captions"),
    ],
)
def test_a_folder_that_does_not_fit_is_named(place, break_it, message):
    break_it(place.folder)
    with pytest.raises(errors.InputError) as error:
        place.fit("run")
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- training and evaluation


@pytest.mark.parametrize("more", ["", "--need_box_whole"], ids=["regions only", "need_box_whole"])
def test_evalrank_ranks_what_the_trained_models_score(place, capsys, more):
    folders = [place.fit(way, f"--cross_attn {way} {more}") for way in ("t2i", "i2t")]
    paths = [str(folder / "checkpoint_0.pth.tar") for folder in folders]
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
    labels = ["Images", "rsum", "Average i2t Recall", "Image to text", "Average t2i Recall", "Text to image"]
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == labels


def test_caption_i_belongs_to_image_i():
    sims = np.array([[3.0, 5.0, 1.0], [0.0, 2.0, 1.0], [0.0, 9.0, 9.0]])
    _, (ranks, top1) = i2t(None, None, sims, return_ranks=True)
    assert (ranks.tolist(), top1.tolist()) == ([1, 0, 1], [1, 1, 1])
    _, (ranks, top1) = t2i(None, None, sims, return_ranks=True)
    assert (ranks.tolist(), top1.tolist()) == ([0, 2, 0], [0, 2, 2])
    assert i2t(None, None, sims, npts=1) == (100, 100, 100, 1, 1)
    with pytest.raises(errors.InputError, match="as many captions as images"):
        i2t(None, None, sims[:, :2])


def test_vocab_train_and_evaluation_follow_the_command_line(place):
    def run(module, *flags):
        done = call(module.main, f"{module.__name__}.py", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    write_lines(place.folder + "/train_sent_caps.txt", ["DNF Φ 平定"] * 3 + ["a"] * 9)
    write_lines(place.folder + "/dev_sent_caps.txt", ["dnf Φ Ⅲ"] + ["b"] * 5)
    where = "--data_path", place.data_path, "--vocab_path", place.vocab_path, "--data_name", "toy"
    vocab_file = f"{place.vocab_path}/toy_sent_vocab.json"
    assert run(vocab, *where, "--overwrite") == f"{vocab_file}: 8 words that occur at least 4 times\n"
    assert list(vocab.deserialize_vocab(vocab_file).word2idx)[4:] == ["a", "b", "dnf", "Φ"]
    run(train_whole, *place.line("run"))
    printed = run(evaluation_whole, "--model_path", place.root / "run" / "model_best.pth.tar")
    assert printed.startswith("Images: 6, Captions: 6\nrsum: ")
    names = {"fc.weight", "fc.bias", "fc_whole.weight", "fc_whole.bias", "position_embedding.weight"}
    assert set(load(place.root / "run", "model_best")["model"][0]) == names
