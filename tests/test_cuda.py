"""The whole program on a CUDA device computes what it computes on the CPU, and seldom waits for it.

On a machine without a GPU the device is simulated (pretend_cuda.py); where there is one the same tests run on it, but
for those that count. PFAN_ALL_COMBINATIONS=1 takes every combination of options instead of every eleventh.
"""

import contextlib
import itertools
import json
import os

import numpy as np
import pytest
import torch
from conftest import make_opt
from dataset_commands import call
from folders import random_batch
from pretend_cuda import Pretend, pretend_cuda
from serving import make_model, make_request
from training import Place, WholePlace, assert_same, load

import train
from data import PrecompDataset, get_loaders
from evaluation import LogCollector, evalrank, load_split, score_shards
from lib.gpu import keep_features
from model import AGG_FUNC, RAW_FEATURE_NORM, SCAN, ScoreConfig, xattn_score
from scripts.search.build import open_or_build
from Tencent_PFAN import evaluation_whole, model_whole
from Tencent_PFAN.scoring import Scorer
from vocab import Vocabulary

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


def batch_of(opt, n, whole=False, longest=9):
    lens = sorted(np.random.default_rng(1).integers(3, longest, n).tolist(), reverse=True)
    return random_batch(lens, n_regions=6, img_dim=opt.img_dim, whole=whole)


# ---------------------------------------------------------------- training steps


def combinations():
    axes = {
        "cross_attn": ("t2i", "i2t"),
        "max_violation": (True, False),
        "position": ("attention", "area", "none", "whole"),
        "bi_gru": (True, False),
        "amp": (False, True),
        "precomp_enc_type": ("basic", "weight_norm"),
    }
    found = [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    axes = {name: axes[name] for name in ("cross_attn", "max_violation")}
    axes |= {"raw_feature_norm": RAW_FEATURE_NORM, "agg_func": AGG_FUNC}
    found += [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    return found if os.environ.get("PFAN_ALL_COMBINATIONS") else found[::11]


def two_steps(changes, device):
    """Losses of two training steps, and the parameters after them."""
    torch.manual_seed(0)
    whole = changes.get("position") == "whole"
    if whole:
        changes = {**changes, "position": "area", "need_box_whole": changes["bi_gru"], "lambda_whole": 2.0}
    opt = make_opt(**changes, device=device)
    model = (model_whole.SCAN if whole else SCAN)(opt)
    model.train_start()
    losses = [model.train_emb(*batch_of(opt, 7, whole=whole)).item() for _ in range(2)]
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
    monkeypatch.setattr("model.to_device", lambda x, device: x)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        two_steps({}, "cuda:0")


# ---------------------------------------------------------------- launches and waits


@simulated
@pytest.mark.parametrize("variant", ["root", "whole"])
@pytest.mark.parametrize("max_violation", [True, False])
@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_a_step_launches_few_kernels_and_waits_once(way, max_violation, variant, cuda):
    """A batch of 128 pairs with captions of 3 to 43 words, logging included."""
    whole = variant != "root"
    opt = make_opt(cross_attn=way, max_violation=max_violation, device="cuda:0")
    opt.position = "area" if whole else "attention"
    opt.need_box_whole = whole
    model = (model_whole.SCAN if whole else SCAN)(opt)
    model.logger = LogCollector()
    batch = batch_of(opt, 128, whole=whole, longest=44)
    model.train_emb(*batch)
    cuda.reset()
    loss = model.train_emb(*batch).item()
    str(model.logger)
    assert model.logger.meters["Le"].val == loss
    launches = sum(cuda.launches.values())
    print(f"{variant} {way} max_violation={max_violation}: {launches} launches, {len(cuda.waits)} waits")
    assert launches <= 600, cuda.launches.most_common(20)
    assert len(cuda.waits) <= 1, cuda.waits


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
    batch = batch_of(opt, 7)
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
    """images (I, 36, D), the captions' words one after the other (ΣW_i, D), lengths."""
    rng = np.random.default_rng(2)
    lens = rng.integers(6, 24, n_captions).tolist()
    images, words = (rng.standard_normal(shape, dtype=np.float32) for shape in ((n_images, 36, dim), (sum(lens), dim)))
    return torch.from_numpy(images), torch.from_numpy(words), lens


def scores_of(images, words, lens, device, shard_size, score=xattn_score):
    config = ScoreConfig.of(make_opt())
    ask, device = (lambda *shard: score(*shard, config)), torch.device(device)
    return score_shards((images,), (words, lens), ask, device, shard_size)


@simulated
def test_scoring_sends_both_sides_once(cuda):
    """Of embed_size 64: at 1024 the lengths of the captions are fewer of the bytes."""
    images, words, lens = embeddings(200, 1000, dim=64)

    def score_one(images, *more):
        return xattn_score(images[:1], *more).expand(len(images), -1)

    scores_of(images, words, lens, "cuda:0", 100, score=score_one)
    assert cuda.sent <= 1.1 * (images.nbytes + words.nbytes)


@simulated
def test_images_that_do_not_fit_are_sent_in_chunks_and_blocks_are_as_large_as_memory(cuda):
    some, sizes = embeddings(12, 20, dim=1024), []
    cuda.free = 2**20  # less than twice the images, which take 1.8 MB

    def counted(images, *more):
        sizes.append(len(images))
        return xattn_score(images, *more)

    scores = scores_of(*some, "cuda:0", 8, score=counted)
    np.testing.assert_allclose(scores, scores_of(*some, "cpu", 8), rtol=0, atol=1e-5)
    assert 1 < max(sizes) < 8 and sum(sizes) == 3 * 12


# ---------------------------------------------------------------- the whole program


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("cuda"), "--batch_size 20")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_training_saving_resuming_and_ranking_give_the_cpus_results(place, cuda):
    stored = []
    for name in ("cpu", "cuda"):
        flags = f"--device {name if name == 'cpu' else 'cuda:0'} --num_epochs"
        folder = place.fit(name, f"{flags} 1")
        place.fit(name, f"{flags} 2 --resume {folder}/checkpoint_0.pth.tar")
        stored.append(load(folder, "checkpoint_1"))
    assert stored[1]["best_rsum"] == pytest.approx(stored[0]["best_rsum"], abs=1e-3)
    for a, b in zip(*(checkpoint["model"] for checkpoint in stored), strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=1e-4)
    paths = [str(place.root / name / "checkpoint_1.pth.tar") for name in ("cpu", "cuda")]
    cpu, gpu = (evalrank(paths, split="test", device=device) for device in ("cpu", "cuda:0"))
    assert gpu["rsum"] == pytest.approx(cpu["rsum"], abs=1e-3)


@simulated
def test_a_gpu_that_is_out_of_memory_is_one_line_that_names_the_flag_to_lower(place, cuda):
    cuda.fails = lambda n_bytes: n_bytes > 4 * 24 * 216
    done = call(train.main, "train.py", *place.line("full", "--device cuda:0"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: CUDA out of memory. A smaller --batch_size takes less."


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_whole_image_variant_trains_and_ranks_as_on_the_cpu(tmp_path, cuda):
    place, results = WholePlace(tmp_path), []
    for device in ("cpu", "cuda:0"):
        folder = place.fit(device[:3], f"--device {device} --need_box_whole")
        path = str(tmp_path / "cpu" / "checkpoint_0.pth.tar")
        results.append(
            [load(folder)["best_rsum"], evaluation_whole.evalrank(path, split="test", device=device)["rsum"]]
        )
    assert results[1] == pytest.approx(results[0], abs=1e-3)


def test_a_collection_built_on_a_gpu_is_the_cpus_and_is_searched_alike(place, tmp_path, cuda):
    """build_index.py's files, then the search in two stages, each on its device."""
    path, found = str(place.fit("i2t", "--device cpu --cross_attn i2t") / "checkpoint_0.pth.tar"), []
    for device in ("cpu", "cuda:0"):
        model, loader = load_split(path, None, None, "test", device=device)
        folder = tmp_path / device[:3]
        collection = open_or_build(path, model, loader, "test", str(folder), n_centroids=8)
        image = collection.image(2)
        found.append([*collection.search("a man runs", 3, 4), *collection.search_captions(image, 3, 4)])
        for name in ("images", "words", "lens"):
            built = [np.load(tmp_path / place / f"{name}.npy") for place in ("cpu", device[:3])]
            np.testing.assert_allclose(*built, atol=1e-3)  # half precision
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_the_scoring_server_gives_the_cpus_scores(tmp_path, cuda):
    """Two requests in one batch, with sentences of several lengths; then again, with images from the cache."""
    path, answers = make_model(tmp_path, need_box_whole=True), {}
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
def test_features_kept_on_a_gpu_give_the_same_training_and_are_sent_once(tmp_path, cuda, caplog):
    caplog.set_level("INFO")
    place, stored, sent, batches = Place(tmp_path, "--batch_size 60 --device cuda:0"), {}, {}, []

    class Counting(SCAN):
        def train_emb(self, *batch):
            batches.append(batch[0].device.type)
            return super().train_emb(*batch)

    for where, workers in (("host", 0), ("auto", 1)):
        cuda.reset()
        stored[where] = load(place.fit(where, f"--features_on {where} --workers {workers}", Counting))
        sent[where] = cuda.sent
    assert batches == ["cpu", "cuda"]
    image = 4 * 4 * 16
    assert sent["host"] - sent["auto"] >= (60 - 12) * image
    assert_same(stored["auto"]["model"], stored["host"]["model"])
    cuda.free = 3 * 12 * image
    batches.clear()
    place.fit("full", "", Counting)
    assert set(batches) == {"cpu"} and "features come batch by batch" in caplog.text
    place.fit("device", "--features_on device", Counting)
    assert batches == ["cpu", "cuda"]


def test_a_cpu_and_data_sets_of_ones_own_keep_no_features(place, cuda):
    opt = train.get_parser().parse_args(place.line("run"))
    loader = get_loaders(opt.data_name, Vocabulary.read(opt), 20, 0, opt)[0]
    assert keep_features(loader, torch.device("cpu"), "device") is loader
    own = torch.utils.data.DataLoader([1, 2, 3])
    assert keep_features(own, torch.device("cuda:0"), "device") is own
    loader.dataset.__class__ = type("Own", (PrecompDataset,), {"__getitem__": lambda self, index: index})
    assert keep_features(loader, torch.device("cuda:0"), "device") is loader


def test_batches_are_pinned_for_a_gpu_only(place, cuda):
    for device, pinned in (("cpu", False), ("cuda:0", True), ("auto", True)):
        opt = train.get_parser().parse_args(place.line("run", f"--device {device}"))
        loaders = get_loaders(opt.data_name, Vocabulary.read(opt), 20, 0, opt)
        assert [loader.pin_memory for loader in loaders] == [pinned, pinned]


@simulated
def test_a_numbered_gpu_becomes_the_current_one(cuda, monkeypatch):
    """Pinning and measurements take the current device."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    SCAN(make_opt(device="cuda:1"))
    assert chosen == ["cuda:1"]
