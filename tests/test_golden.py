"""The numbers that the published code gave on seeded inputs, in golden/; real checkpoints and texts in ../shared."""

import json
from functools import cache

import numpy as np
import pytest
import reference
import torch
from conftest import golden, make_opt

import model
from evaluation import evalrank, i2t, load_split, score_split, t2i
from position import position_grid
from Tencent_PFAN import model_whole

golden = cache(golden)


def close(ours, published, atol):
    np.testing.assert_allclose(torch.as_tensor(ours).detach(), published, rtol=0, atol=atol)


def starting_with(arrays, prefix):
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "case"), [("pfan", case) for case in range(51)] + [("tencent", case) for case in range(17)]
)
def test_a_model_gives_the_published_embeddings_scores_loss_gradients_and_steps(name, case):
    arrays, whole = golden(name), name == "tencent"
    meta = json.loads(str(arrays["meta"]))
    assert len(meta) == (17 if whole else 51)
    opt = make_opt(**{"lambda_whole": 2, "weights": "w", **meta[case]})
    published = starting_with(arrays, f"c{case}.")
    scan = (model_whole if whole else model).SCAN(opt)
    states = (starting_with(arrays, f"{opt.weights}.{encoder}.") for encoder in ("img_enc", "txt_enc"))
    scan.load_state_dict([{key: torch.tensor(x) for key, x in state.items()} for state in states])
    inputs = ("images", "whole_images", "boxes", "captions") if whole else ("images", "boxes", "captions")
    batch = *(torch.tensor(arrays[key]) for key in inputs), arrays["lengths"].tolist()

    embeddings = scan.forward_emb(*batch)
    names = ("img_emb", "whole_emb", "cap_emb", "lens", "final_cap_emb") if whole else ("img_emb", "cap_emb", "lens")
    stored = published if whole else starting_with(arrays, f"{opt.weights}_{int(opt.no_imgnorm)}.")
    for key, ours in zip(names, embeddings, strict=True):
        if key in stored and stored[key].size:
            close(ours, stored[key], 1e-5)
    close(scan.score(*embeddings), published["sims"], 2e-4 if opt.agg_func == "Sum" else 1e-5)

    loss = scan.forward_loss(*embeddings)
    assert loss.item() == pytest.approx(float(published["loss"]), rel=1e-4)
    loss.backward()
    for key, gradient in starting_with(published, "grad.").items():
        encoder, parameter = key.split(".", 1)
        ours = dict(getattr(scan, encoder).named_parameters())[parameter].grad
        close(ours, gradient, 1e-3 * np.abs(gradient).max())
    if "train_losses" in published:
        assert [scan.train_emb(*batch).item() for _ in range(3)] == pytest.approx(published["train_losses"], rel=1e-3)
    if "after3.img_enc.fc.weight" in published:
        close(scan.img_enc.fc.weight, published["after3.img_enc.fc.weight"], 2e-5)


@pytest.mark.parametrize("module", [model, model_whole])
def test_func_attention_and_cosine_similarity_give_the_published_numbers(module):
    arrays = golden("func_attention")
    tensors = {name: torch.tensor(x) for name, x in arrays.items() if x.dtype == np.float32}
    cases = json.loads(str(arrays["meta"]))
    assert len(cases) > 1
    for case, (raw_feature_norm, smooth) in enumerate(cases):
        opt = make_opt(raw_feature_norm=raw_feature_norm)
        found = module.func_attention(tensors["query"], tensors["context"], opt, smooth=smooth)
        for ours, name in zip(found, ("context", "attn", "max"), strict=True):
            close(ours, arrays[f"c{case}.{name}"], 1e-5)
    close(module.cosine_similarity(tensors["x1"], tensors["x2"], dim=2), arrays["cos"], 1e-6)
    x, y = torch.ones(1, 3), torch.ones(1, 3)
    assert module.cosine_similarity(x, y).shape == (), "squeezed, as published"


@pytest.mark.parametrize("case", ["s0", "s1"])
def test_recalls_and_ranks_are_the_published_ones(case):
    published = starting_with(golden("recall"), f"{case}.")
    for name, rank in (("i2t", i2t), ("t2i", t2i)):
        recalls, (ranks, top1) = rank(None, None, None, published["sims"], return_ranks=True)
        assert recalls == tuple(published[name])
        assert (ranks == published[f"{name}_ranks"]).all() and (top1 == published[f"{name}_top1"]).all()


def test_position_grids_are_the_published_ones():
    boxes, sizes, published = (golden("position")[name] for name in ("boxes", "image_hw", "grid"))
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
