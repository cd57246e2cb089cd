"""The formula that is read is the one that runs: who edits or replaces it, or the score of a subclass, changes all that
scores. test_score.py has the formula's numbers."""

import contextlib
import json
import re
import sys
import traceback
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, make_opt
from dataset_commands import call
from folders import make_folder, save_model
from pretend_cuda import Pretend, pretend_cuda
from serving import make_model, make_request
from training import Place, load, values

import model
import train
from evaluation import evalrank, load_split, score_split, shard_xattn_i2t, shard_xattn_t2i
from lib.kernels import pieces
from model import AGG_FUNC, RAW_FEATURE_NORM, SCAN, ContrastiveLoss, l2norm, leaky
from scripts.search.build import open_or_build
from scripts.search.collection import Collection
from Tencent_PFAN.scoring import Scorer

PUBLISHED = model.attend
KERNELS = ROOT / "lib", ROOT / "lib/kernels"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Paths of a checkpoint of a small data set, and of a whole-image model for the scoring server."""
    root = tmp_path_factory.mktemp("formula")
    where = make_folder(root, splits={"train": 4, "dev": 12}, n_regions=4)
    save_model(root / "model.pth.tar", *where)
    (root / "server").mkdir()
    return str(root / "model.pth.tar"), make_model(str(root / "server"))


@pytest.fixture(scope="module", autouse=True)
def compiled_for_few_pairs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LEAST_ELEMENTS", 0)
        patch.setattr(pieces, "ROWS", 1)
        yield


@pytest.fixture
def calls(monkeypatch):
    """The calls of the compiled form, but those that compare it with the formula."""
    seen, scores, sample = [], pieces.scores, len(pieces.sample()[2])
    monkeypatch.setattr(pieces, "scores", lambda *args: len(args[1]) > sample and seen.append(1) or scores(*args))
    model.pieces_agree.cache_clear()
    return seen


def on_cpu(x):
    return (x.inner if isinstance(x, Pretend) else x).detach().clone()


def embeddings(device="cpu"):
    """images (7, 4, 8), captions (7, 9, 8) and their lengths."""
    rng = torch.Generator().manual_seed(0)
    lens = [9, 7, 7, 4, 3, 2, 1]
    images, captions = (l2norm(torch.randn(7, n, 8, generator=rng), 2) for n in (4, 9))
    captions = captions * (torch.arange(9) < torch.tensor(lens)[:, None])[..., None]
    return *(x.to(device) for x in (images, captions)), lens


def answers(toy, folder, device):
    """What all that scores gives now: {name: array}."""
    path, server = toy
    found, opt = {}, make_opt(device=device)
    for way in ("t2i", "i2t"):
        score, shard = getattr(model, f"xattn_score_{way}"), {"t2i": shard_xattn_t2i, "i2t": shard_xattn_i2t}[way]
        found[f"xattn_score_{way}"] = on_cpu(score(*embeddings(device), opt))
        found[f"shard_xattn_{way}"] = shard(*embeddings(), opt)
        for opt.max_violation in (True, False):
            images, captions, lens = embeddings(device)
            opt.cross_attn = way
            images.requires_grad_()
            loss = ContrastiveLoss(opt, 0.2, opt.max_violation)(images, captions, lens)
            loss.backward()
            found[f"loss {way} {opt.max_violation}"] = on_cpu(loss)
            found[f"gradient {way} {opt.max_violation}"] = on_cpu(images.grad)
    scan, loader = load_split(path, split="dev", device=device)
    found["validate"] = train.validate(scan.opt, loader, scan)
    found["evalrank"] = evalrank(path, device=device)["i2t"]
    index = open_or_build(path, scan, loader, "dev", str(folder), n_centroids=4, overwrite=True)
    for name, collection in (("explorer", Collection.encode(scan, loader)), ("index", index)):
        found[f"search of the {name}"] = collection.search("a man runs", 12)[1]
        found[f"search of the {name} for captions"] = collection.search_captions(collection.image(0), 5)[1]
    scorer = Scorer(server, device=device)
    for way, scores in scorer.score([scorer.read(json.dumps(make_request(3)).encode())])[0].items():
        found[f"server's {way}"] = scores
    return {name: np.asarray(x, dtype=float) for name, x in found.items()}


EDITS = {
    "attend": (model, "attend", lambda *args: 0.3 - PUBLISHED(*args)),
    "norm": (RAW_FEATURE_NORM, "clipped_l2norm", lambda S, dim, mask=None: -3 * l2norm(leaky(S), dim)),
    "aggregation without mask": (AGG_FUNC, "Mean", lambda r, dim, lse: 0.5 - r.mean(dim)),
}


def edit(monkeypatch, name):
    place, key, value = EDITS[name]
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, key, value)


@pytest.fixture(scope="module")
def before(toy, tmp_path_factory):
    return answers(toy, tmp_path_factory.mktemp("index"), "cpu")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("name", ["nothing", *EDITS])
def test_an_edit_of_the_formula_changes_all_that_scores_on_every_device(name, toy, before, tmp_path, monkeypatch):
    """Also where nothing is edited, all that scores gives the CPU's numbers on a GPU."""
    after = before
    if name in EDITS:
        edit(monkeypatch, name)
        after = answers(toy, tmp_path, "cpu")
        assert [key for key, x in before.items() if np.allclose(x, after[key], atol=1e-4)] == []
    with contextlib.nullcontext() if torch.cuda.is_available() else pretend_cuda():
        for key, x in answers(toy, tmp_path, "cuda:0").items():
            np.testing.assert_allclose(x, after[key], rtol=1e-4, atol=2e-3 if "index" in key else 1e-4, err_msg=key)


# ---------------------------------------------------------------- what is compiled proves itself


def test_the_compiled_form_is_used_where_it_gives_the_formulas_numbers(calls, caplog, monkeypatch):
    for way in ("t2i", "i2t"):
        for agg_func in AGG_FUNC:
            for norm in ("l2norm", "clipped_l2norm"):
                opt = make_opt(agg_func=agg_func, raw_feature_norm=norm)
                getattr(model, f"xattn_score_{way}")(*embeddings(), opt)
    assert len(calls) == 16
    monkeypatch.setattr(model, "attend", lambda *args: PUBLISHED(*args))  # other text, the same numbers
    monkeypatch.setitem(AGG_FUNC, "Mean", lambda r, dim, lse: r.sum(dim) / r.shape[dim])
    model.xattn_score_t2i(*embeddings(), make_opt())
    assert len(calls) == 17 and not caplog.text


def one_word_less(r, dim, lse):
    return r.mean(dim) - 0.001 * (r.shape[dim] == 1)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        *EDITS.values(),
        (RAW_FEATURE_NORM, "clipped_l2norm", lambda S, dim: l2norm(torch.nn.functional.leaky_relu(S, 0.2), dim)),
        (AGG_FUNC, "Mean", one_word_less),
        (model, "leaky", torch.relu),
        (model, "attention_weights", lambda S, *args: torch.full_like(S, 1 / S.shape[1])),
    ],
    ids=[*EDITS, "only negative similarities", "only captions of one word", "leaky", "attention_weights"],
)
def test_any_edit_takes_the_formula_with_one_warning_that_names_the_cost(place, key, value, calls, caplog, monkeypatch):
    expected = model.xattn_score_t2i(*embeddings(), make_opt())
    assert calls == [1]
    (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, key, value)
    scores = [model.xattn_score_t2i(*embeddings(), make_opt()) for _ in range(2)]
    exact = model.xattn_score_t2i(*(x.double() if torch.is_tensor(x) else x for x in embeddings()), make_opt())
    assert calls == [1] and not torch.allclose(scores[0], expected, atol=1e-4)
    assert torch.equal(*scores) and torch.allclose(scores[0].double(), exact, atol=1e-5)
    (said,) = caplog.messages
    assert "model.attend differs by" in said and "times slower" in said


# ---------------------------------------------------------------- variants are classes


class Pooled(SCAN):
    """Mean regions and mean words, compared by their cosine."""

    def score(self, img_emb, cap_emb, cap_lens, pairs=None, cross_attn=None):
        lens = torch.as_tensor(cap_lens)[:, None].to(cap_emb)
        images, captions = l2norm(img_emb.mean(1), 1), l2norm(cap_emb.sum(1) / lens, 1)
        return images @ captions.T if pairs is None else (images[pairs[:, 0]] * captions[pairs[:, 1]]).sum(1)


def test_a_subclass_with_another_score_is_trained_validated_ranked_and_searched_with_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(model, "attend", lambda *args: pytest.fail("the published score"))
    place = Place(tmp_path)
    folder = place.fit("run", "--num_epochs 3 --learning_rate .01 --mean_warmup_epochs 1", Pooled)
    path = str(folder / "model_best.pth.tar")
    best = load(folder, "model_best")
    assert best["best_rsum"] == max(values(folder, "rsum")) == load(folder, "checkpoint_2")["best_rsum"]
    assert evalrank(path, make_model=Pooled)["rsum"] == pytest.approx(best["best_rsum"])
    scan, loader = load_split(path, split="dev", make_model=Pooled)
    collection = Collection.encode(scan, loader)
    images = l2norm(collection.images.mean(1), 1)
    for sentence in loader.dataset.captions[:3]:
        expected = (images @ l2norm(collection.embed(sentence).mean(0), 0)).sort(descending=True)
        assert collection.search(sentence, 6)[1] == pytest.approx(expected.values.numpy(), abs=1e-5)
    monkeypatch.undo()
    assert "trained by the class" not in caplog.text
    assert evalrank(path)["rsum"] != pytest.approx(best["best_rsum"])
    assert "trained by the class 'Pooled', read as SCAN" in caplog.text


def test_the_variant_of_score_and_data_that_contributing_shows_word_for_word_trains_and_ranks(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    (tmp_path / "mine.py").write_text(code)
    line = [
        sys.executable,
        tmp_path / "mine.py",
        *Place(tmp_path, splits={"train": 4, "test": 6, "dev": 4}).line("run"),
    ]
    done = processes.run(line, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Images: 6, Captions: 30\n")
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    scan, loader = load_split(f"{tmp_path}/run/model_best.pth.tar", split="test", make_model=mine.Mine)
    features, boxes = loader.dataset.features([0, 1])
    assert torch.equal(2 * features, torch.from_numpy(np.array(loader.dataset.images[:2])))
    words = scan.encode_captions(loader.dataset.encode_caption(0)[None], [len(loader.dataset.encode_caption(0))])
    images = scan.encode_images(features, boxes)
    both = [super(mine.Mine, scan).score(*images, *words, cross_attn=way) for way in ("t2i", "i2t")]
    [sims] = score_split(scan, loader)
    np.testing.assert_allclose(sims[:2, :1], (sum(both) / 2).detach().numpy(), atol=1e-6)


def test_from_main_to_attend_are_at_most_12_calls(tmp_path, monkeypatch):
    """Of this project's functions, main the first, in training and validation."""
    found = set()

    def attend(*args):
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent in (ROOT, *KERNELS)]
        names = [frame.name for frame in frames]
        found.add((*names[names.index("main") :], "attend"))
        return PUBLISHED(*args)

    monkeypatch.setattr(model, "attend", attend)
    monkeypatch.setattr(pieces, "applies", lambda *_: False)  # else attend is only asked for the sample
    call(train.main, "train.py", *Place(tmp_path).line("run", "--num_epochs 1"))
    assert len(found) >= 2 and all(len(names) <= 12 for names in found), found
