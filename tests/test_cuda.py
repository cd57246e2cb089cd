"""The whole program on a CUDA device computes what it computes on the CPU, and seldom waits for it.

On a machine without a GPU the device is simulated (pretend_cuda.py); where there is one the same tests run on it, but
for those that count. PFAN_ALL_COMBINATIONS=1 takes every combination of options instead of every fifth.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_opt
from folders import make_folder, make_whole_folder, random_boxes
from pretend_cuda import Pretend, pretend_cuda
from serving import make_model, make_request

import train
from data import get_loaders
from evaluation import LogCollector, evalrank, load_split, shard_xattn
from lib import kernels
from lib.checkpoint import load_checkpoint
from lib.kernels import blocks, padded
from model import AGG_FUNC, RAW_FEATURE_NORM, SCAN, XATTN_SCORE, Attention, ContrastiveLoss, xattn_score
from Tencent_PFAN import evaluation_whole, model_whole, train_whole
from Tencent_PFAN.scoring import Scorer

HAS_GPU = torch.cuda.is_available()
simulated = pytest.mark.skipif(HAS_GPU, reason="counts the operations of the simulated device; here is a real one")


@pytest.fixture
def cuda():
    """A CUDA device: yields the simulated one's log, or None where the device is real."""
    with contextlib.nullcontext() if HAS_GPU else pretend_cuda() as log:
        yield log


def on_cpu(x):
    x = x.detach()
    return (x.inner if isinstance(x, Pretend) else x.cpu()).clone()


def random_batch(opt, n, n_regions=6, whole=False, longest=9):
    """images, (whole images,) boxes, captions, lengths of n pairs, longest caption first."""
    rng = np.random.default_rng(1)
    lens = sorted(rng.integers(3, longest, n).tolist(), reverse=True)
    captions = [torch.from_numpy(rng.integers(1, opt.vocab_size, length)) for length in lens]
    images = torch.from_numpy(rng.random((n, n_regions, opt.img_dim), dtype=np.float32))
    more = [torch.from_numpy(rng.random((n, opt.img_dim), dtype=np.float32))] if whole else []
    boxes = torch.from_numpy(random_boxes(rng, n, n_regions))
    return images, *more, boxes, torch.nn.utils.rnn.pad_sequence(captions, batch_first=True), lens


# ---------------------------------------------------------------- training steps


def combinations():
    names = ("cross_attn", "max_violation", "position", "bi_gru", "amp", "precomp_enc_type")
    values = (
        ("t2i", "i2t"),
        (True, False),
        ("attention", "area", "none", "whole"),
        (True, False),
        (False, True),
        ("basic", "weight_norm"),
    )
    found = [dict(zip(names, row, strict=True)) for row in itertools.product(*values)]
    for row in itertools.product(("t2i", "i2t"), (True, False), RAW_FEATURE_NORM, AGG_FUNC):
        found.append(dict(zip(("cross_attn", "max_violation", "raw_feature_norm", "agg_func"), row, strict=True)))
    return found if os.environ.get("PFAN_ALL_COMBINATIONS") else found[::5] + found[1::23]


def two_steps(changes, device):
    """Losses of two training steps, and the parameters after them."""
    torch.manual_seed(0)
    whole = changes.get("position") == "whole"
    if whole:
        changes = {**changes, "position": "area", "need_box_whole": changes["bi_gru"], "lambda_whole": 2.0}
    opt = make_opt(**changes, device=device)
    model = (model_whole.SCAN if whole else SCAN)(opt)
    model.train_start()
    losses = [model.train_emb(*random_batch(opt, 7, whole=whole)).item() for _ in range(2)]
    return losses, [on_cpu(p) for p in model.params]


@pytest.mark.parametrize("changes", combinations(), ids=lambda changes: " ".join(map(str, changes.values())))
def test_training_steps_are_those_of_the_cpu(changes):
    losses, parameters = two_steps(changes, "cpu")
    with contextlib.nullcontext() if HAS_GPU else pretend_cuda():
        cuda_losses, cuda_parameters = two_steps(changes, "cuda:0")
    assert cuda_losses[0] == pytest.approx(losses[0], rel=2e-2 if changes.get("amp") else 1e-5)
    difference = max((a - b).abs().max().item() for a, b in zip(parameters, cuda_parameters, strict=True))
    assert difference <= 2 * 2 * 2e-4 * 1.01, "Adam moves no parameter further than this"


@simulated
def test_an_index_left_on_the_cpu_fails_as_on_cuda(cuda, monkeypatch):
    """These tests can fail: tensors of both devices in one operation, and an index that has to be copied first."""
    x = torch.rand(3, 4, device="cuda:0")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x.index_select(0, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + torch.ones(4)
    assert not cuda.waits
    x[torch.tensor([1])]
    assert "index with an index on the CPU at tests/test_cuda.py" in cuda.waits[0]
    monkeypatch.setattr("model.send", lambda x, device: x)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        two_steps({}, "cuda:0")


# ---------------------------------------------------------------- the padded form


@pytest.mark.parametrize("way", ["t2i", "i2t"])
@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("norm", RAW_FEATURE_NORM)
@pytest.mark.parametrize("agg", AGG_FUNC)
def test_loss_and_gradient_of_both_forms_are_the_formulas(way, max_violation, norm, agg, monkeypatch):
    """In float64 within 1e-10: equal-length blocks as on the CPU and padded captions as on a GPU."""
    opt = make_opt(cross_attn=way, raw_feature_norm=norm, agg_func=agg)
    rng = torch.Generator().manual_seed(3)
    lens = torch.randint(3, 12, (9,), generator=rng).tolist()
    images, words = (torch.randn(*shape, 8, generator=rng, dtype=torch.float64) for shape in ((9, 5), (9, 11)))
    images, words = torch.nn.functional.normalize(images, dim=2), torch.nn.functional.normalize(words, dim=2)
    words = words * (torch.arange(11) < torch.tensor(lens)[:, None])[..., None]
    results = {}
    for name, form in (("formula", None), ("blocks", blocks), ("padded", padded)):

        def scores(images, captions, lens, pairs, attention, form=form):
            if form is None:
                return None
            more = () if pairs is None else (pairs,)
            return (form.score_all if pairs is None else form.score_pairs)(images, captions, lens, *more, attention)

        monkeypatch.setattr(kernels, "scores", scores)
        inputs = images.clone().requires_grad_(), words.clone().requires_grad_()
        loss = ContrastiveLoss(opt, opt.margin, max_violation)(*inputs, lens)
        results[name] = [loss, *torch.autograd.grad(loss, inputs)]
        packed = torch.cat([caption[:n] for caption, n in zip(words, lens, strict=True)])
        results[name].append(xattn_score(images, packed, lens, Attention.of(opt, way == "t2i")))
    for name in ("blocks", "padded"):
        for ours, exact in zip(results[name], results["formula"], strict=True):
            assert (ours - exact).abs().max() <= 1e-10 * max(1, exact.abs().max().item())


def test_normalisations_that_padding_could_change_take_the_blocks(cuda, monkeypatch):
    assert padded.applies(Attention.of(make_opt(), True))
    assert not padded.applies(Attention.of(make_opt(raw_feature_norm="new"), True))
    monkeypatch.setitem(AGG_FUNC, "Median", lambda r, dim, lse: r.median(dim).values)
    opt = make_opt(agg_func="Median")
    images, captions = torch.rand(3, 4, 8, device="cuda:0"), torch.rand(2, 5, 8, device="cuda:0")
    scores = xattn_score(images, captions, [5, 2], Attention.of(opt, True))
    expected = xattn_score(on_cpu(images), on_cpu(captions), [5, 2], Attention.of(opt, True))
    np.testing.assert_allclose(on_cpu(scores), expected, atol=1e-5)


# ---------------------------------------------------------------- launches and waits


@simulated
@pytest.mark.parametrize("variant", ["root", "whole", "box_whole"])
@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_a_step_launches_few_kernels_and_waits_once(way, max_violation, variant, cuda):
    """A batch of 128 pairs with captions of 6 to 43 words, logging included."""
    whole = variant != "root"
    opt = make_opt(cross_attn=way, max_violation=max_violation, device="cuda:0")
    opt.position = "area" if whole else "attention"
    opt.need_box_whole = variant == "box_whole"
    model = (model_whole.SCAN if whole else SCAN)(opt)
    model.logger = LogCollector()
    batch = random_batch(opt, 128, whole=whole, longest=44)
    model.train_emb(*batch)
    cuda.reset()
    loss = model.train_emb(*batch).item()
    str(model.logger)
    assert model.logger.meters["Le"].val == loss
    launches = sum(cuda.launches.values())
    print(f"{variant} {way} max_violation={max_violation}: {launches} launches, {len(cuda.waits)} waits")
    assert launches <= 600, cuda.launches.most_common(20)
    assert len(cuda.waits) <= 2, cuda.waits


@pytest.mark.parametrize("break_it", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_none_leaves_the_parameters_and_moments(break_it, cuda):
    class Breaking(SCAN):
        def forward_loss(self, *embeddings):
            loss = super().forward_loss(*embeddings)
            return loss * float("nan") if break_it == "loss" else (loss * 0 + 1e-30).sqrt() * 1e38 * loss

    opt = make_opt(device="cuda:0")
    model = Breaking(opt)
    before = [on_cpu(p) for p in model.params]
    batch = random_batch(opt, 7)
    with pytest.raises(FloatingPointError, match="the loss is nan" if break_it == "loss" else "gradient's norm"):
        model.train_emb(*batch)
    assert all(torch.equal(a, on_cpu(b)) for a, b in zip(before, model.params, strict=True))
    assert all(not on_cpu(x).any() for state in model.optimizer.state.values() for x in state.values())


# ---------------------------------------------------------------- precision


def test_highest_precision_uses_no_tf32_in_the_gru():
    SCAN(make_opt(matmul_precision="high"))
    assert torch.backends.cudnn.allow_tf32
    SCAN(make_opt())
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


@simulated
def test_amp_runs_the_gru_and_the_sum_of_position_gradients_in_float32(cuda, monkeypatch):
    seen = []
    run = cuda.run

    def spy(func, args, kwargs):
        if "gather" in func._schema.name or "scatter_add" in func._schema.name:
            seen.append(args[0].dtype)
        return run(func, args, kwargs)

    monkeypatch.setattr(cuda, "run", spy)
    opt = make_opt(amp=True, device="cuda:0")
    batch = random_batch(opt, 7)
    torch.manual_seed(0)
    model = SCAN(opt)
    words = model.forward_emb(*batch)[1]
    torch.manual_seed(0)
    float32 = SCAN(make_opt(device="cuda:0")).forward_emb(*batch)[1]
    assert torch.equal(on_cpu(words), on_cpu(float32)), "float16 would round"
    model.train_emb(*batch)
    assert seen and set(seen) == {torch.float32}


# ---------------------------------------------------------------- memory and copies


def embeddings(n_images, n_captions, dim=16):
    """images (I, 36, D), packed words (ΣW_i, D), lengths."""
    rng = np.random.default_rng(2)
    lens = rng.integers(6, 24, n_captions).tolist()
    images, words = (rng.standard_normal(shape, dtype=np.float32) for shape in ((n_images, 36, dim), (sum(lens), dim)))
    return torch.from_numpy(images), torch.from_numpy(words), lens


@simulated
def test_scoring_sends_both_sides_once(cuda):
    """1,000 images × 5,000 captions, of embed_size 64: at 1024 the lengths of the captions are fewer of the bytes."""
    images, words, lens = embeddings(1000, 5000, dim=64)
    score = XATTN_SCORE["t2i"]

    def score_one(images, *more):
        return score(images[:1], *more).expand(len(images), -1)

    shard_xattn(images, words, lens, make_opt(device="cuda:0"), 512, score=score_one)
    assert cuda.sent <= 1.1 * (images.nbytes + words.nbytes)


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_scores_are_those_of_the_cpu(way, cuda):
    images, words, lens = embeddings(40, 90)
    expected = shard_xattn(images, words, lens, make_opt(cross_attn=way, device="cpu"), 16)
    scores = shard_xattn(images, words, lens, make_opt(cross_attn=way, device="cuda:0"), 16)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@simulated
def test_images_that_do_not_fit_are_sent_in_chunks_and_blocks_are_as_large_as_memory(cuda):
    images, words, lens = embeddings(40, 90)
    expected = shard_xattn(images, words, lens, make_opt(device="cpu"), 16)
    cuda.free = images.nbytes  # half of it is for the images
    sizes, score = [], XATTN_SCORE["t2i"]

    def counted(images, *more):
        sizes.append(len(images))
        return score(images, *more)

    scores = shard_xattn(images, words, lens, make_opt(device="cuda:0"), 16, score=counted)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert max(sizes) < 16 and sum(sizes) == 6 * 40


@simulated
def test_out_of_memory_halves_the_block_and_goes_on_with_a_line(cuda, caplog):
    images, words, lens = embeddings(40, 90)
    opt = make_opt(device="cuda:0")
    expected = shard_xattn(images, words, lens, opt, 128)
    cuda.fails = lambda n_bytes: n_bytes > 4 * 36 * sum(lens) * 10  # the raw similarities of ten images
    scores = shard_xattn(images, words, lens, opt, 128)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert "cuda:0: out of memory with 40 images at once, now 20" in caplog.messages
    cuda.fails = lambda n_bytes: n_bytes > 4 * 36 * 24
    with pytest.raises(torch.OutOfMemoryError):
        shard_xattn(images, words, lens, opt, 128)


# ---------------------------------------------------------------- the whole program


FLAGS = "--data_name toy_precomp --img_dim 16 --embed_size 24 --word_dim 8 --bi_gru --max_violation --agg_func Mean "
FLAGS += "--batch_size 20 --workers 0"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("cuda")
    data_path, vocab_path = make_folder(str(root))
    return root, f"{FLAGS} --data_path {data_path} --vocab_path {vocab_path}"


def fit(toy, name, flags):
    root, line = toy
    places = f"--model_name {root / name} --logger_name {root / name}"
    return train.fit(train.get_parser().parse_args(f"{line} {places} {flags}".split()))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_training_saving_resuming_ranking_and_searching_give_the_cpus_results(toy, cuda):
    from scripts.search.collection import Collection

    root, _ = toy
    rsum = fit(toy, "cpu", "--device cpu --num_epochs 2")
    assert fit(toy, "cuda", "--device cuda:0 --num_epochs 2") == pytest.approx(rsum, abs=1e-3)
    stored = [load_checkpoint(str(root / name / "checkpoint_1.pth.tar")) for name in ("cpu", "cuda")]
    for a, b in zip(*(checkpoint["model"] for checkpoint in stored), strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-4)
    rsum = fit(toy, "cpu", f"--device cpu --num_epochs 3 --resume {root}/cpu/checkpoint_1.pth.tar")
    again = fit(toy, "cuda", f"--device cuda:0 --num_epochs 3 --resume {root}/cuda/checkpoint_1.pth.tar")
    assert again == pytest.approx(rsum, abs=1e-3)
    paths = [str(root / name / "checkpoint_2.pth.tar") for name in ("cpu", "cuda")]
    cpu, gpu = (evalrank(paths, split="test", device=device) for device in ("cpu", "cuda:0"))
    assert gpu["rsum"] == pytest.approx(cpu["rsum"], abs=1e-3)
    found = []
    for device in ("cpu", "cuda:0"):
        model, loader = load_split(paths[0], None, None, "test", device=device)
        collection = Collection.encode(model, loader)
        rows, scores = collection.search("a man runs", 3)
        captions, caption_scores = collection.search_captions(collection.image(0), 3)
        attention = collection.attention(collection.image(0), collection.caption(0))
        found.append([rows, scores, captions, caption_scores, *attention])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("way, more", [("t2i", "--need_box_whole"), ("i2t", "")])
def test_the_whole_image_variant_trains_and_ranks_as_on_the_cpu(way, more, tmp_path, cuda):
    data_path, vocab_path = make_whole_folder(tmp_path)
    results = []
    for device in ("cpu", "cuda:0"):
        flags = f"--data_name toy --data_path {data_path} --vocab_path {vocab_path} --img_dim 8 --embed_size 6 "
        flags += f"--word_dim 5 --batch_size 4 --num_epochs 1 --workers 0 --device {device} --bi_gru --max_violation "
        flags += f"--cross_attn {way} {more} --model_name {tmp_path}/{device[:3]} --logger_name {tmp_path}/log"
        opt = train_whole.get_parser().parse_args(flags.split())
        parts = train_whole.SCAN, train_whole.get_loaders, train_whole.read_vocab, train_whole.rank_dev
        rsum = train.fit(opt, *parts)
        path = f"{tmp_path}/cpu/checkpoint_0.pth.tar"
        results.append([rsum, evaluation_whole.evalrank(path, split="test", device=device)["rsum"]])
    assert results[1] == pytest.approx(results[0], abs=1e-3)


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_a_collection_built_on_a_gpu_is_the_cpus_and_is_searched_alike(way, toy, tmp_path, cuda):
    """build_index.py's files, then the search in two stages, each on its device."""
    from scripts.search.build import open_or_build

    root, _ = toy
    fit(toy, way, f"--device cpu --num_epochs 1 --cross_attn {way}")
    path, found = str(root / way / "checkpoint_0.pth.tar"), []
    for device in ("cpu", "cuda:0"):
        model, loader = load_split(path, None, None, "test", device=device)
        folder = tmp_path / device[:3]
        collection = open_or_build(path, model, loader, "test", str(folder), n_centroids=8)
        picture = collection.image(2)
        found.append([*collection.search("a man runs", 3, 4), *collection.search_captions(picture, 3, 4)])
        for name in ("images", "words", "lens"):
            built = [np.load(tmp_path / place / f"{name}.npy") for place in ("cpu", device[:3])]
            np.testing.assert_allclose(*built, atol=1e-3)  # half precision
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("need_box_whole", [False, True], ids=["regions only", "need_box_whole"])
def test_the_scoring_server_gives_the_cpus_scores(need_box_whole, tmp_path, cuda):
    """Two requests in one batch, with sentences of several lengths; then again, with pictures from the cache."""
    path, answers = make_model(tmp_path, need_box_whole=need_box_whole), {}
    requests = [make_request(3), {**make_request(2, seed=1), "sentences": ["上海", ["足球", "天气", "news"]]}]
    del requests[1]["sentence"]
    for device in ("cpu", "cuda:0"):
        scorer = Scorer(path, device=device)
        answers[device] = [scorer.score([scorer.read(json.dumps(x).encode()) for x in requests]) for _ in range(2)]
        assert len(scorer.cache) == 5
        assert {str(x.device) for entry in scorer.cache.values() for x in entry} == {device}
    assert answers["cuda:0"][0] == answers["cuda:0"][1]
    for ours, expected in zip(answers["cuda:0"][0], answers["cpu"][0], strict=True):
        for way, scores in expected.items():
            np.testing.assert_allclose(ours[way], scores, atol=1e-5)


@simulated
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("workers", [0, 1])
def test_features_kept_on_a_gpu_give_the_same_training_and_are_sent_once(workers, toy, cuda, monkeypatch, caplog):
    caplog.set_level("INFO")
    stored, sent, batches = {}, {}, []
    step = SCAN.train_emb

    def counted(self, *batch):
        batches.append(batch[0].device.type)
        return step(self, *batch)

    monkeypatch.setattr(SCAN, "train_emb", counted)
    for where in ("host", "device", "auto"):
        cuda.reset()
        fit(toy, where, f"--device cuda:0 --num_epochs 2 --workers {workers} --features_on {where}")
        stored[where] = load_checkpoint(str(toy[0] / where / "checkpoint_1.pth.tar"))["model"]
        sent[where] = cuda.sent
    assert batches == ["cpu"] * 6 + ["cuda"] * 12
    images = 4 * 36 * 16
    assert sent["host"] - sent["device"] >= (2 * 60 - 12) * images and sent["auto"] == sent["device"]
    for where in ("device", "auto"):
        for a, b in zip(stored["host"], stored[where], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    cuda.free = 3 * 12 * images
    batches.clear()
    fit(toy, "host", f"--device cuda:0 --num_epochs 1 --workers {workers}")
    assert set(batches) == {"cpu"} and "features come batch by batch" in caplog.text


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_cpu_and_data_sets_with_items_of_their_own_keep_no_features(toy, cuda):
    opt = train.get_parser().parse_args(toy[1].split())
    dataset = get_loaders(opt.data_name, train.read_vocab(opt), 20, 0, opt)[0].dataset
    dataset.keep_on(torch.device("cpu"), "device")
    assert dataset.on_gpu is None
    dataset.__class__ = type("Other", (type(dataset),), {"__getitem__": lambda self, index: index})
    dataset.keep_on(torch.device("cuda:0"), "device")
    assert dataset.on_gpu is None


def test_batches_are_pinned_for_a_gpu_only(toy, cuda):
    for device, pinned in (("cpu", False), ("cuda:0", True), ("auto", True)):
        opt = train.get_parser().parse_args(f"{toy[1]} --device {device}".split())
        loaders = get_loaders(opt.data_name, train.read_vocab(opt), 20, 0, opt)
        assert [loader.pin_memory for loader in loaders] == [pinned, pinned]


@simulated
def test_a_numbered_gpu_becomes_the_current_one(cuda, monkeypatch):
    """Pinning and measurements take the current device."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    SCAN(make_opt(device="cuda:1"))
    assert chosen == ["cuda:1"]


# ---------------------------------------------------------------- several processes


@simulated
def test_two_processes_on_gpus_train_as_one():
    """Their messages are of one size and type each and lie in one piece, as NCCL demands."""
    jobs = ROOT / "tests" / "cuda_jobs.py"
    done = subprocess.run([sys.executable, jobs], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as one process") == 8, done.stdout
