"""The measurements of scripts/benchmark.py, each a function of the sizes s that returns a dict.

s: the sizes at the top of scripts/benchmark.py, its flags, and folder and started (seconds since 1970). Results:
seconds, a list; flops of the matrix products; part, where less than the whole work was done and seconds are scaled;
difference, or differences by form, from the other way of doing the same; peak_gb.
"""

import os
import platform
import re
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from data import PrecompDataset, collate_fn, get_precomp_loader, pad
from evaluation import SHARD_SIZE, embed_captions, embed_images, i2t, load_split, score_shards, t2i
from lib.constants import N_REGIONS, N_SLOTS
from lib.distributed import pick_device
from lib.errors import InputError
from lib.kernels import pieces
from lib.tensors import has_bfloat16
from model import SCAN, ScoreConfig, formula_scores, xattn_score
from position import position_grid
from scripts.bench import inputs, published_way

TOP = 10  # images that a search returns
LONG = 60  # seconds after which a measurement is not repeated
PUBLISHED_SHARD = 128  # images, and captions, of a shard


def timed(s, work, warm_up=None):
    """Seconds of at most s.repeats runs of work, after one of warm_up, and the last run's result."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    (warm_up or work)()
    while len(seconds) < s.repeats and sum(seconds) < LONG:
        wait()
        start = time.perf_counter()
        result = work()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def largest_difference(a, b):
    return float(abs(a - b).max())


# ---------------------------------------------------------------- the machine


def prepare(s):
    """Write the test split and, with sparse files, the training splits. Returns what the machine is."""
    inputs.make_split(s, s.folder, "test", s.images)
    for n_images in s.train_images:
        inputs.make_split(s, os.path.join(s.folder, str(n_images)), "train", n_images, sparse=True)
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        named = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = named[0] if named else processor
    device = pick_device(s.device)
    bfloat16 = device.type == "cuda" or has_bfloat16()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": [torch.backends.cpu.get_cpu_capability(), *["bfloat16"] * bfloat16],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gflops": product_rates(s, device),
    }


def product_rates(s, device):
    """float32 products of regions and words: operations a second in 10⁹, by route and size of a block."""
    rates = {}
    for rows, columns in ((128 * N_REGIONS, 512), (128 * N_REGIONS, 2048), (1024, 1024)):
        a, b = (torch.randn(n, s.embed_size, device=device) for n in (rows, columns))
        routes = {"mm": lambda a=a, b=b: a @ b.T}
        if device.type == "cpu":
            left, right = pieces.factor(a, False), pieces.factor(b, False)
            routes["oneDNN"] = lambda left=left, right=right: pieces.multiply(left, right)
        for name, product in routes.items():
            seconds = median(timed(s, product)[0])
            rates[f"{name} {rows}×{columns}"] = 2 * rows * columns * s.embed_size / seconds / 1e9
    return rates


# ---------------------------------------------------------------- scoring


def make_score(config, form):
    """The score function of a form: the product's own (highest, medium), or the formula alone."""
    torch.set_float32_matmul_precision("medium" if form == "medium" else "highest")
    function = formula_scores if form == "formula" else xattn_score
    return lambda images, words, lens: function(images, words, lens, config)


def score(s, way, form, n):
    """Score and rank all pairs of n images; with the formula one shard of them, its seconds scaled by pairs."""
    device, score = pick_device(s.device), make_score(ScoreConfig.of(inputs.flags(s, way)), form)
    images, words, lens = inputs.embeddings(s, n)
    pairs, result = n * len(lens), {}
    if form == "formula":
        images, lens = images[:SHARD_SIZE], lens[:SHARD_SIZE]
        words, result["part"] = words[: sum(lens)], f"{len(images)} × {len(lens)}"

    def work():
        sims = score_shards((images,), (words, lens), score, device)
        return form == "formula" or (i2t(None, None, None, sims), t2i(None, None, None, sims))

    few = lens[:SHARD_SIZE]
    seconds, _ = timed(s, work, lambda: score_shards((images[:128],), (words[: sum(few)], few), score, device))
    scale = pairs / (len(images) * len(lens))
    return {**result, "seconds": [scale * x for x in seconds], "flops": scale * 2 * images[0].numel() * n * len(words)}


def score_published(s, way):
    """Score a part of the pairs in the published way, scaled by pairs; nothing is ranked."""
    opt, device = inputs.flags(s, way), pick_device(s.device)
    images, words, lens = inputs.embeddings(s, s.images)
    pairs, lens = len(images) * len(lens), lens[: s.plain_captions]
    images, captions = images[: s.plain_images].clone(), pad(words[: sum(lens)].split(lens))
    del words
    ours = {}
    for form in ("highest", "medium", "formula"):
        found = make_score(ScoreConfig.of(opt), form)(images.to(device), captions.to(device), lens)
        ours[form] = found.cpu().numpy()
    images, captions = images.double(), captions.double()

    def work(n_images=s.plain_images, n_captions=s.plain_captions):
        part = (images[:n_images],), (captions[:n_captions], lens[:n_captions])
        return score_shards(*part, lambda *x: published_way.xattn_score(*x, opt), device, PUBLISHED_SHARD)

    seconds, sims = timed(s, work, lambda: work(32, 32))
    return {
        "seconds": [x * pairs / sims.size for x in seconds],
        "part": f"{sims.shape[0]} × {sims.shape[1]}",
        "differences": {form: largest_difference(sims, x) for form, x in ours.items()},
    }


# ---------------------------------------------------------------- training and encoding


def both_models(opt):
    """This code's model and the published way's with the same weights."""
    torch.manual_seed(0)
    ours, published = SCAN(opt), published_way.Published(opt)
    published.load_state_dict(ours.state_dict())
    return ours, published


def train(s, way, form, batch):
    """One training step."""
    torch.manual_seed(0)
    model, data = SCAN(inputs.flags(s, way, amp=form == "amp")), inputs.random_batch(s, batch)
    with FlopCounterMode(display=False) as counter:
        model.train_emb(*data)
    seconds, _ = timed(s, lambda: model.train_emb(*data).item())
    return {"seconds": seconds, **({} if form == "amp" else {"flops": counter.get_total_flops()})}


def train_published(s, way):
    """One training step in the published way; the relative difference of the first losses."""
    data = inputs.random_batch(s, s.batch_size)
    ours, model = both_models(inputs.flags(s, way))
    with torch.no_grad():
        loss = ours.forward_loss(*ours.forward_emb(*data)).item()
    del ours
    first = model.train_emb(*data).item()
    seconds, _ = timed(s, lambda: model.train_emb(*data).item())
    return {"seconds": seconds, "differences": {"highest": abs(first - loss) / abs(first)}}


def encode(s):
    """Encode the test split."""
    torch.manual_seed(0)
    opt = inputs.flags(s)
    model, loader = SCAN(opt), get_precomp_loader(s.folder, "test", inputs.make_vocab(s), opt, s.batch_size, False, 0)

    def work():
        return embed_images(model, loader), embed_captions(model, loader)

    with FlopCounterMode(display=False) as counter:
        work()
    return {"seconds": timed(s, work)[0], "flops": counter.get_total_flops()}


def encode_published(s):
    """Encode a part of the test split in the published way, scaled by pairs."""
    ours, model = both_models(inputs.flags(s))
    n = min(s.plain_batches * s.batch_size, s.images * s.per_image)
    dataset = PrecompDataset(s.folder, "test", inputs.make_vocab(s))
    dataset.images = np.array(dataset.images)  # in memory
    loader = DataLoader(Subset(dataset, range(n)), s.batch_size, collate_fn=collate_fn)
    seconds, (images, words, _) = timed(s, lambda: published_way.encode_data(model, loader))
    *batch, ids = collate_fn([dataset[i] for i in range(8)])
    with torch.no_grad():
        our_images, our_words = (x.cpu().numpy() for x in ours.forward_emb(*batch)[:2])
    theirs = images[list(ids)], words[list(ids), : our_words.shape[1]]
    difference = max(map(largest_difference, (our_images, our_words), theirs))
    scale = s.images * s.per_image / n
    return {"seconds": [x * scale for x in seconds], "part": f"{n} pairs", "differences": {"highest": difference}}


def start(s, n):
    """From the start of the process to the first batch of n images, whose train_ims.npy is sparse."""
    opt = inputs.flags(s)
    folder, vocab = os.path.join(s.folder, str(n)), inputs.make_vocab(s)
    loader = get_precomp_loader(folder, "train", vocab, opt, s.batch_size, num_workers=0)
    SCAN(opt).forward_emb(*next(iter(loader))[:-1], volatile=True)
    return {"seconds": [time.time() - s.started]}


# ---------------------------------------------------------------- position grids


def grids(s, n):
    """Position grids of n images."""
    boxes, sizes = inputs.random_boxes(n)
    return {"seconds": timed(s, lambda: position_grid(boxes, sizes), lambda: position_grid(boxes[:9], sizes[:9]))[0]}


def grids_published(s):
    """Position grids of a part of the images in the published way, scaled."""
    boxes, sizes = inputs.random_boxes(s.plain_grids)
    seconds, published = timed(s, lambda: published_way.position_grids(boxes, sizes))
    weights = np.s_[..., N_SLOTS:]  # cells of equal weights may be in another order
    return {
        "seconds": [x * s.images / s.plain_grids for x in seconds],
        "part": f"{s.plain_grids} images",
        "differences": {"highest": largest_difference(published[weights], position_grid(boxes, sizes)[weights])},
    }


# ---------------------------------------------------------------- search


@torch.no_grad()
def search(s, n, candidates=None):
    """The best TOP of a split's first n images for s.queries captions of theirs. candidates: how many are scored
    exactly, all where None; difference is then the share of the exhaustive best that is not found."""
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
    seconds, found = [], []
    for query in [*queries, *queries]:  # the first time reads from the disk
        start = time.perf_counter()
        found.append((two_stage if candidates else exhaustive).search(query, TOP, candidates)[0])
        seconds.append(time.perf_counter() - start)
    result = {"seconds": seconds[len(queries) :], "peak_gb": peak_bytes() / 1e9}
    if candidates:
        best = [exhaustive.search(query, TOP)[0] for query in queries]
        result["difference"] = 1 - np.mean([np.isin(a, b) for a, b in zip(best, found, strict=False)]).item()
    return result


# ---------------------------------------------------------------- a process for each


def peak_bytes():
    """The most memory that this process has held; NaN where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else float("nan")


def run_measurement(name, sizes, arguments):
    """One of the functions above, and the peak of this process's memory in GB."""
    result = globals()[name](Namespace(**sizes), **arguments)
    result.setdefault("peak_gb", peak_bytes() / 1e9)
    if torch.cuda.is_available():
        result["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result
