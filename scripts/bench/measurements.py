"""The measurements of scripts/benchmark.py, each a function of the sizes s that returns a dict.

s: a Namespace of the sizes at the top of scripts/benchmark.py and its flags. Results: seconds, a list; memory_gb, the
most that was held; flops of the matrix products; part, where less than the whole work was done and seconds are scaled;
difference from the other way of doing the same.
"""

import platform
import re
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from data import PrecompDataset, collate_fn, get_precomp_loader, pad
from evaluation import SHARD_SIZE, embed_captions, embed_images, i2t, load_split, score_shards, t2i
from lib.constants import N_REGIONS, SPECIAL
from lib.distributed import pick_device
from lib.errors import InputError
from lib.files import write_lines
from lib.kernels import pieces
from lib.tensors import has_bfloat16
from model import SCAN, ScoreConfig, formula_scores, xattn_score
from position import position_grid
from scripts.bench import published_way
from train import get_parser
from vocab import Vocabulary

TOP = 10  # images that a search returns
LONG = 60  # seconds after which a measurement is not repeated
PUBLISHED_SHARD = 128  # images, and captions, of a shard
FEW_IMAGES, FEW_CAPTIONS = 8, 32  # whose scores by both ways are compared


def timed(s, work, warm_up=None):
    """Run work at most s.repeats times, after warm_up or once more than that.

    Returns its seconds and memory_gb in a dict, and what the last run returned.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    (warm_up or work)()
    while len(seconds) < s.repeats and sum(seconds) < LONG:
        wait()
        start = time.perf_counter()
        value = work()
        wait()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "memory_gb": memory_gb()}, value


def memory_gb():
    """The most memory that torch has allocated on CUDA, or this process has held; NaN where the system does not say."""
    allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    status = Path("/proc/self/status")
    held = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return (allocated or (1024 * int(held[1]) if held else float("nan"))) / 1e9


def scaled(result, factor):
    """result of a part of the work, its seconds multiplied by factor."""
    return {**result, "seconds": [factor * x for x in result["seconds"]], "part": True}


def largest_difference(a, b):
    return float(abs(a - b).max())


# ---------------------------------------------------------------- the machine


def machine(s):
    """What the machine is. flops: float32 products of regions and words a second, by the fastest route."""
    cpuinfo, device = Path("/proc/cpuinfo"), pick_device(s.device)
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    bfloat16 = device.type == "cuda" or has_bfloat16()
    a, b = (torch.randn(n, s.embed_size, device=device) for n in (128 * N_REGIONS, 2048))
    products = [partial(torch.mm, a, b.T)]
    if device.type == "cpu":
        products.append(partial(pieces.multiply, pieces.factor(a, False), pieces.factor(b, False)))
    seconds = min(min(timed(s, product)[0]["seconds"]) for product in products)
    return {
        "processor": [*names, platform.processor() or platform.machine()][0],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": [torch.backends.cpu.get_cpu_capability(), *["bfloat16"] * bfloat16],
        "torch": torch.__version__,
        "flops": 2 * a.numel() * len(b) / seconds,
    }


# ---------------------------------------------------------------- scoring


def score(s, way, form, n_images):
    """Score and rank all pairs of n_images and their captions.

    form: highest or medium, the products' precision, or formula: model.attend alone.
    """
    torch.set_float32_matmul_precision("medium" if form == "medium" else "highest")
    opt, device = flags(s, way), pick_device(s.device)
    score_pairs = partial(formula_scores if form == "formula" else xattn_score, config=ScoreConfig.of(opt))
    images, words, lens = embeddings(s, n_images)

    def work():
        sims = score_shards((images,), (words, lens), score_pairs, device)
        i2t(None, None, None, sims), t2i(None, None, None, sims)
        return sims

    few = lens[:SHARD_SIZE]
    warm_up = partial(score_shards, (images[:128],), (words[: sum(few)], few), score_pairs, device)
    result, sims = timed(s, work, warm_up)
    few = lens[:FEW_CAPTIONS]
    captions = pad(words[: sum(few)].double().split(few))
    published = published_way.xattn_score(images[:FEW_IMAGES].double(), captions, few, opt).numpy()
    difference = largest_difference(sims[:FEW_IMAGES, :FEW_CAPTIONS], published)
    return {**result, "flops": 2 * images.numel() * len(words), "difference": difference}


def score_published(s, way):
    """Score a part of the pairs in the published way; nothing is ranked."""
    opt, device = flags(s, way), pick_device(s.device)
    images, words, lens = embeddings(s, s.images)
    n_pairs, lens = len(images) * len(lens), lens[: s.plain_captions]
    images, captions = images[: s.plain_images].double(), pad(words[: sum(lens)].double().split(lens))
    del words

    def work(n_images=s.plain_images, n_captions=s.plain_captions):
        part = (images[:n_images],), (captions[:n_captions], lens[:n_captions])
        return score_shards(*part, lambda *x: published_way.xattn_score(*x, opt), device, PUBLISHED_SHARD)

    result, sims = timed(s, work, lambda: work(32, 32))
    return scaled(result, n_pairs / sims.size)


# ---------------------------------------------------------------- training and encoding


def make_model(make, s, way="t2i", **changes):
    """An untrained SCAN or Published, the same in every run."""
    torch.manual_seed(0)
    return make(flags(s, way, **changes))


def as_published(model):
    """The published way's model with the weights of model."""
    published = published_way.Published(model.opt)
    published.load_state_dict(model.state_dict())
    return published


def train(s, way, n_pairs, amp):
    """A training step; the relative difference of the loss."""
    model, data = make_model(SCAN, s, way, amp=amp), random_batch(s, n_pairs)
    with FlopCounterMode(display=False) as counter:
        model.train_emb(*data)
    result, _ = timed(s, lambda: model.train_emb(*data).item())
    if amp:
        return result
    with torch.no_grad():
        ours, published = (x.forward_loss(*x.forward_emb(*data)).item() for x in (model, as_published(model)))
    return {**result, "flops": counter.get_total_flops(), "difference": abs(ours - published) / published}


def train_published(s, way):
    """A training step in the published way."""
    model, data = make_model(published_way.Published, s, way), random_batch(s, s.batch_size)
    return timed(s, lambda: model.train_emb(*data).item())[0]


def encode(s):
    """Encode a test split."""
    model = make_model(SCAN, s)
    with tempfile.TemporaryDirectory() as folder:
        vocab = make_split(s, folder, "test")
        loader = get_precomp_loader(folder, "test", vocab, model.opt, s.batch_size, False, 0)

        def work():
            return embed_images(model, loader), embed_captions(model, loader)

        with FlopCounterMode(display=False) as counter:
            work()
        result, _ = timed(s, work)
        *batch, _ = collate_fn([loader.dataset[i] for i in range(FEW_IMAGES)])
        with torch.no_grad():
            ours, published = (x.forward_emb(*batch)[:2] for x in (model, as_published(model)))
    difference = max(map(largest_difference, ours, published))
    return {**result, "flops": counter.get_total_flops(), "difference": difference}


def encode_published(s):
    """Encode a part of a test split in the published way."""
    model = make_model(published_way.Published, s)
    n = min(s.plain_batches * s.batch_size, s.images * s.per_image)
    with tempfile.TemporaryDirectory() as folder:
        dataset = PrecompDataset(folder, "test", make_split(s, folder, "test"))
        dataset.images = np.array(dataset.images)  # in memory
        loader = DataLoader(Subset(dataset, range(n)), s.batch_size, collate_fn=collate_fn)
        result, _ = timed(s, lambda: published_way.encode_data(model, loader))
    return scaled(result, s.images * s.per_image / n)


def grids(s):
    """Turn the boxes of a split's images into grids."""
    boxes, sizes = random_boxes(s.images)
    return timed(s, lambda: position_grid(boxes, sizes))[0]


# ---------------------------------------------------------------- search


@torch.no_grad()
def search(s, n, candidates):
    """The best TOP of a split's first n images for a caption. candidates: how many are scored exactly, all where None;
    difference is then the share of the exhaustive best that is not found."""
    from scripts.search.build import open_or_build  # here, because only this section needs faiss
    from scripts.search.collection import Collection

    model, loader = load_split(s.model_path, s.data_path, s.vocab_path, s.split, device="cpu")
    dataset = loader.dataset
    if n > dataset.n_images:
        raise InputError(f"--sizes {n}: the split {s.split} has {dataset.n_images} images")
    whole = open_or_build(s.model_path, model, loader, s.split, s.collection)
    stage, captions = whole.first_stage, n * len(dataset.captions) // dataset.n_images
    if stage.t2i:
        stage = replace(stage, table=stage.table[:, :n])
    else:
        stage = replace(stage, nearest=stage.nearest[: stage.starts[n]], starts=stage.starts[: n + 1])
    two_stage, exhaustive = (Collection(model, whole.vocab, whole.images[:n], [], [], x) for x in (stage, None))
    queries = [dataset.captions[i] for i in np.random.default_rng(1).permutation(captions)[: s.queries]]

    def find(collection, *limit):
        return [collection.search(query, TOP, *limit)[0] for query in queries]

    result, found = timed(s, partial(find, two_stage, candidates) if candidates else partial(find, exhaustive))
    result["seconds"] = [x / len(queries) for x in result["seconds"]]
    if candidates:
        hits = [np.isin(best, some) for best, some in zip(find(exhaustive), found, strict=True)]
        result["difference"] = 1 - np.mean(hits).item()
    return result


# ---------------------------------------------------------------- random inputs, the same in every run


def flags(s, way="t2i", **changes):
    """The flags of the published Flickr30K run, as train.py parses them, at the sizes s."""
    words = f"--max_violation --bi_gru --agg_func Mean --cross_attn {way} --lambda_softmax {9 if way == 't2i' else 4}"
    opt = get_parser().parse_args([*words.split(), "--device", s.device])
    sizes = {name: getattr(s, name) for name in ("embed_size", "img_dim", "word_dim", "vocab_size", "batch_size")}
    vars(opt).update(sizes, **changes)
    return opt


def caption_lengths(rng, n):
    """Words of n captions with <start> and <end>, spread like 500 Flickr30K captions: mean 15.3, from 6 to 43."""
    return np.exp(rng.normal(2.68, 0.31, n)).round().clip(6, 43).astype(int).tolist()


def embeddings(s, n_images):
    """Random images (n, R, D), words (ΣW, D), lengths."""
    torch.manual_seed(0)
    lens = caption_lengths(np.random.default_rng(0), n_images * s.per_image)
    images, words = torch.randn(n_images, N_REGIONS, s.embed_size), torch.randn(sum(lens), s.embed_size)
    return normalize(images, dim=2, out=images), normalize(words, dim=1, out=words), lens


def random_boxes(n):
    """Boxes (n, R, 4) in pixels, heights and widths (n, 2)."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(300, 500, (n, 2)).astype(float)
    corners = np.sort(rng.random((n, N_REGIONS, 2, 2)), axis=2) * sizes[:, None, None, ::-1]
    return corners.reshape(n, N_REGIONS, 4), sizes


def random_batch(s, n):
    """A batch as collate_fn gives it."""
    torch.manual_seed(0)
    lens = sorted(caption_lengths(np.random.default_rng(0), n), reverse=True)
    captions = [torch.randint(s.vocab_size, (length,)) for length in lens]
    return torch.rand(n, N_REGIONS, s.img_dim), torch.from_numpy(position_grid(*random_boxes(n))), pad(captions), lens


def make_split(s, folder, split):
    """Write a split of a data set of s.images images to folder; returns its vocabulary, of s.vocab_size words."""
    rng, prefix = np.random.default_rng(0), f"{folder}/{split}"
    np.save(prefix + "_ims.npy", rng.random((s.images, N_REGIONS, s.img_dim), np.float32))
    np.save(prefix + "_boxes.npy", position_grid(*random_boxes(s.images)))
    vocab = [f"w{i}" for i in range(s.vocab_size - len(SPECIAL))]
    lens = caption_lengths(rng, s.images * s.per_image)
    write_lines(prefix + "_caps.txt", (" ".join(rng.choice(vocab, length - 2)) for length in lens))
    return Vocabulary.from_words([*SPECIAL, *vocab])
