"""The numbers that the published code gave on the same inputs; ../shared/README.md says how they were made."""

import gzip
import json

import numpy as np
import pytest
import reference
import torch
from conftest import make_opt

from evaluation import evalrank, i2t, load_split, score_split, t2i
from model import SCAN
from position import position_grid
from vocab import deserialize_vocab, from_txt, tokenize


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "pfan.npz") as file:
        return {name: file[name] for name in file.files}


def close(ours, published, atol):
    ours = ours.detach().numpy() if torch.is_tensor(ours) else ours
    np.testing.assert_allclose(ours, published, rtol=0, atol=atol)


@pytest.mark.parametrize("case", range(51))
def test_model_gives_the_published_embeddings_scores_loss_gradients_and_steps(golden, case):
    meta = json.loads(str(golden["meta"]))
    assert len(meta) == 51
    opt = make_opt(**meta[case])
    published = {name.partition(".")[2]: value for name, value in golden.items() if name.startswith(f"c{case}.")}
    state = [
        {
            name.removeprefix(f"{opt.weights}.{encoder}."): torch.tensor(value)
            for name, value in golden.items()
            if name.startswith(f"{opt.weights}.{encoder}.")
        }
        for encoder in ("img_enc", "txt_enc")
    ]
    model = SCAN(opt)
    model.load_state_dict(state)
    batch = [torch.tensor(golden[name]) for name in ("images", "boxes", "captions")] + [golden["lengths"].tolist()]

    embeddings = model.forward_emb(*batch)
    for name, ours in zip(("img_emb", "cap_emb"), embeddings, strict=False):
        close(ours, golden[f"{opt.weights}_{int(opt.no_imgnorm)}.{name}"], 1e-5)
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

    assert [model.train_emb(*batch).item() for _ in range(3)] == pytest.approx(published["train_losses"], rel=1e-3)
    if "after3.img_enc.fc.weight" in published:
        close(model.img_enc.fc.weight, published["after3.img_enc.fc.weight"], 2e-5)


@pytest.mark.parametrize("case", ["s0", "s1"])
def test_recall_and_ranks_are_the_published_ones(shared, case):
    with np.load(shared / "golden" / "recall.npz") as file:
        for name, rank in (("i2t", i2t), ("t2i", t2i)):
            recalls, (ranks, top1) = rank(None, None, None, file[f"{case}.sims"], return_ranks=True)
            assert recalls == tuple(file[f"{case}.{name}"])
            assert (ranks == file[f"{case}.{name}_ranks"]).all()
            assert (top1 == file[f"{case}.{name}_top1"]).all()


def test_position_grids_are_the_published_ones(shared):
    with np.load(shared / "golden" / "position.npz") as file:
        boxes, sizes, published = file["boxes"], file["image_hw"], file["grid"]
    ours = position_grid(boxes, sizes)
    close(ours[..., 15:], published[..., 15:], 1e-6)
    for image, region in np.ndindex(boxes.shape[:2]):
        height, width = sizes[image]
        areas = reference.cell_areas(boxes[image, region].astype(float), height, width)
        areas = np.append(areas, 0) / (height * width / 256)  # "no cell" covers nothing
        mine, theirs = ours[image, region, :15].astype(int), published[image, region, :15].astype(int)
        # cells covered equally may be listed either way, so the covered areas decide
        close(areas[mine], areas[theirs], 1e-5)
        used = mine[mine < 256]
        assert len(set(used)) == len(used) == (theirs < 256).sum()


def test_evalrank_gives_the_published_ranks_and_lines(shared, tmp_path, capsys):
    folder = shared / "golden" / "evalrank"
    expected = np.load(folder / "expected.npz")
    where = {"data_path": str(folder / "data"), "vocab_path": str(folder / "vocab")}
    checkpoint = str(folder / "model_best.pth.tar")
    evalrank(checkpoint, split="test", save_ranks=tmp_path / "ranks", **where)
    assert capsys.readouterr().out == (folder / "expected.txt").read_text()
    ranks = torch.load(tmp_path / "ranks")
    assert (ranks["rt"][0].numpy() == expected["i2t_ranks"]).all()
    assert (ranks["rti"][0].numpy() == expected["t2i_ranks"]).all()
    (sims,) = score_split(*load_split(checkpoint, split="test", **where))
    close(sims, expected["sims"], 1e-5)


def test_tokens_are_those_of_nltk_word_tokenize(shared):
    with gzip.open(shared / "real" / "flickr8k_tokens.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    assert len(pairs) == 20730
    assert [caption for caption, tokens in pairs if tokenize(caption) != tokens] == []


@pytest.mark.parametrize("name", ["f30k_new_vocab", "coco_precomp_vocab", "tencent_data_sent_vocab"])
def test_published_vocabularies_load_and_give_their_ids(shared, name):
    path = shared / "real" / "vocab" / f"{name}.json"
    vocab, stored = deserialize_vocab(path), json.loads(path.read_text(encoding="utf-8"))
    assert len(vocab) == stored["idx"]
    assert [vocab(word) for word in ("<pad>", "<start>", "<end>", "<unk>")] == [0, 1, 2, 3]
    assert all(vocab(word) == index for word, index in stored["word2idx"].items())
    assert all(vocab.idx2word[int(index)] == word for index, word in stored["idx2word"].items())
    assert vocab.encode("zxqvj") == [1, 3, 2]


def test_published_vocabulary_covers_the_published_captions(shared):
    vocab = deserialize_vocab(shared / "real" / "vocab" / "f30k_new_vocab.json")
    captions = from_txt(shared / "real" / "f30k_test" / "train_caps.txt")
    ids = [i for caption in captions for i in vocab.encode(caption)]
    assert ids.count(3) < 0.02 * len(ids)  # words seen fewer than four times are unknown
