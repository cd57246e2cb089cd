"""The measurements of scripts/benchmark.py, each a function of the sizes s.

python scripts/bench/measurements.py '{"name": …, "sizes": …, "arguments": …}' takes one and prints it as a line of
JSON; sizes are those at the top of scripts/benchmark.py, and folder, device and started (seconds since 1970).
"""

import json
import os
import platform
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

if not __package__:
    import _root  # noqa: F401

try:
    import resource
except ImportError:  # Windows: no memory is measured there
    resource = None

from data import PrecompDataset, collate_fn, get_precomp_loader, pad
from evaluation import SHARD_SIZE, encode_data, i2t, shard_xattn, t2i
from lib import kernels
from lib.constants import N_REGIONS, N_SLOTS
from lib.distributed import pick_device
from model import SCAN, XATTN_SCORE
from position import position_grid
from scripts.bench import inputs, published_way

BFLOAT16 = ("avx512_bf16", "amx_bf16")  # instructions that lib/kernels uses where a processor has them


def prepare(s):
    """Write the test split and, with sparse files, the training splits. Returns what the machine is."""
    inputs.make_split(s, s.folder, "test", s.images)
    for n_images in s.train_images:
        inputs.make_split(s, os.path.join(s.folder, str(n_images)), "train", n_images, sparse=True)
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    device, capabilities = pick_device(s.device), torch.cpu.get_capabilities()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": [torch.backends.cpu.get_cpu_capability(), *(x for x in BFLOAT16 if capabilities.get(x))],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def timed(s, work, warm_up=None):
    """Seconds of s.repeats runs of work, after one of warm_up, and the last run's result."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = []
    (warm_up or work)()
    for _ in range(s.repeats):
        wait()
        start = time.perf_counter()
        result = work()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def largest_difference(a, b):
    return float(abs(a - b).max())


# ---------------------------------------------------------------- matrix products


def products(s):
    """float32 products of regions and words: operations a second in 10⁹, by route and size of a block."""
    device = pick_device(s.device)
    torch.set_float32_matmul_precision("highest")
    rates = {}
    for rows, columns in ((128 * N_REGIONS, 512), (128 * N_REGIONS, 2048), (32 * N_REGIONS, 512), (1024, 1024)):
        a, b = (torch.randn(n, s.embed_size, device=device) for n in (rows, columns))
        n = 128 * N_REGIONS * 2048 // (rows * columns)
        for name, product in product_routes(a, b).items():
            seconds, _ = timed(s, lambda product=product, n=n: [product() for _ in range(n)][-1])
            rates[f"{name} {rows}×{columns}"] = n * 2 * rows * columns * s.embed_size / median(seconds) / 1e9
    return {"best": max(rates, key=rates.get), "gflops": rates}


def product_routes(a, b):
    """Ways to compute a (n, D) · b (m, D)ᵀ: {name: function}."""
    routes = {"mm": lambda: a @ b.T}
    if a.device.type == "cpu":
        from lib.kernels import amx, pieces  # here, because numba takes memory and half a second

        x, y, left, right = a.numpy(), b.numpy().T, pieces.factor(a, False), pieces.factor(b, False)
        routes |= {"numpy": lambda: x @ y, "oneDNN": lambda: pieces.multiply(left, right)}
        if amx.available():
            from scripts.bench import tiles

            routes["tiles"] = lambda: tiles.product(a, b)
    return routes


# ---------------------------------------------------------------- scoring


class Sampled:
    """A score function that computes every n-th block, returns zeros for the others, and times what it computes."""

    def __init__(self, score, every):
        self.score, self.every = score, every
        self.calls = self.seconds = self.computed = self.all = 0

    def __call__(self, images, words, lens, opt):
        self.calls += 1
        size = len(images) * len(words)
        self.all += size
        if (self.calls - 1) % self.every:
            return images.new_zeros(len(images), len(lens))
        start = time.perf_counter()
        scores = self.score(images, words, lens, opt).cpu()
        self.seconds += time.perf_counter() - start
        self.computed += size
        return scores


def score(s, cross_attn="t2i", n_images=None, precision="highest", every=1):
    """Score and rank all pairs with shard_xattn; of every > 1 blocks one is computed, seconds are scaled by words."""
    torch.set_float32_matmul_precision(precision)
    opt = inputs.flags(s, cross_attn)
    images, words, lens = inputs.embeddings(s, n_images or s.images)
    seconds = []

    def work():
        sampled = Sampled(XATTN_SCORE[cross_attn], every)
        start = time.perf_counter()
        sims = shard_xattn(images, words, lens, opt, SHARD_SIZE, score=sampled)
        recalls = i2t(None, None, None, sims)[:3] + t2i(None, None, None, sims)[:3]
        wall = time.perf_counter() - start
        seconds.append(wall + sampled.seconds * (sampled.all / sampled.computed - 1))
        return recalls

    few = lens[:1024]  # enough for whole blocks
    shard_xattn(images[:512], words[: sum(few)], few, opt, SHARD_SIZE)
    _, recalls = timed(s, work, warm_up=lambda: None)
    result = {"seconds": seconds, "recalls": recalls, "pairs": len(images) * len(lens), "every": every}
    flops = 2 * images.shape[0] * images.shape[1] * words.shape[0] * words.shape[1]
    return {**result, "flops": flops} if precision == "highest" else result


def score_published(s, cross_attn="t2i"):
    """A part of the pairs in the published way, scaled by pairs, and ranking all of them."""
    kernels.TILES_FROM = 0  # the part is scored as the whole is
    opt, device = inputs.flags(s, cross_attn), pick_device(s.device)
    images, words, lens = inputs.embeddings(s, s.images)
    lens = lens[: s.plain_captions]
    images, captions = images[: s.plain_images].clone(), pad(words[: sum(lens)].split(lens))
    del words
    ours = {}
    for precision in s.precisions:
        torch.set_float32_matmul_precision(precision)
        ours[precision] = XATTN_SCORE[cross_attn](images.to(device), captions.to(device), lens, opt).cpu().numpy()
    torch.set_float32_matmul_precision("highest")
    part = images.double().numpy(), captions.double().numpy()
    scoring, sims = timed(
        s,
        lambda: published_way.shard_xattn(*part, lens, opt, device=device),
        lambda: published_way.shard_xattn(part[0][:32], part[1][:32], lens[:32], opt, device=device),
    )
    all_sims = np.random.default_rng(0).random((s.images, s.images * s.per_image))
    ranking, _ = timed(s, lambda: published_way.ranks(all_sims, s.per_image))
    scale = all_sims.size / sims.size
    return {
        "seconds": [scale * part + rank for part, rank in zip(scoring, ranking, strict=True)],
        "part": f"{sims.shape[0]} × {sims.shape[1]}",
        "differences": {f"score {cross_attn} {name}": largest_difference(sims, x) for name, x in ours.items()},
    }


# ---------------------------------------------------------------- training and encoding


def both_models(opt):
    """This code's model and the published way's with the same weights."""
    torch.manual_seed(0)
    ours = SCAN(opt)
    published = published_way.Model(opt, ours.device)
    published.load_state_dict(ours.state_dict())
    return ours, published


def train(s, cross_attn="t2i", batch=None, amp=False):
    """One training step."""
    torch.manual_seed(0)
    model, data = SCAN(inputs.flags(s, cross_attn, amp=amp)), inputs.random_batch(s, batch or s.batch_size)
    with FlopCounterMode(display=False) as counter:
        model.train_emb(*data)
    seconds, _ = timed(s, lambda: model.train_emb(*data).item())
    return {"seconds": seconds} if amp else {"seconds": seconds, "flops": counter.get_total_flops()}


def train_published(s, cross_attn="t2i"):
    """One training step in the published way; the relative difference of the first losses."""
    opt, data = inputs.flags(s, cross_attn), inputs.random_batch(s, s.batch_size)
    ours, model = both_models(opt)
    with torch.no_grad():
        loss = ours.forward_loss(*ours.forward_emb(*data)).item()
    del ours
    first = model.train_emb(*data)
    seconds, _ = timed(s, lambda: model.train_emb(*data))
    return {"seconds": seconds, "differences": {f"train {cross_attn}": abs(first - loss) / abs(first)}}


def encode(s):
    """Encode the test split."""
    torch.manual_seed(0)
    model = SCAN(inputs.flags(s))
    loader = get_precomp_loader(PrecompDataset(s.folder, "test", inputs.make_vocab(s)), s.batch_size, 0)
    with FlopCounterMode(display=False) as counter:
        encode_data(model, loader, packed=True)
    seconds, _ = timed(s, lambda: encode_data(model, loader, packed=True))
    return {"seconds": seconds, "flops": counter.get_total_flops()}


def encode_published(s):
    """Encode a part of the test split in the published way, scaled by pairs."""
    ours, model = both_models(inputs.flags(s))
    n = min(s.plain_batches * s.batch_size, s.images * s.per_image)
    loader = published_way.get_loader(os.path.join(s.folder, "test"), inputs.make_vocab(s), s.batch_size, n)
    seconds, (images, words, _) = timed(s, lambda: published_way.encode_data(model, loader))
    *batch, order = collate_fn([loader.dataset[i] for i in range(8)])
    order = list(order)
    with torch.no_grad():
        our_images, our_words = (x.cpu().numpy() for x in ours.forward_emb(*batch)[:2])
    differences = (
        largest_difference(our_images, images[order]),
        largest_difference(our_words, words[order, : our_words.shape[1]]),
    )
    scale = s.images * s.per_image / n
    return {"seconds": [x * scale for x in seconds], "part": f"{n} pairs", "differences": {"encode": max(differences)}}


def start_training(s, n_images):
    """From the start of the process to the first batch, with a sparse train_ims.npy; this process's memory."""
    folder = os.path.join(s.folder, str(n_images))
    dataset = PrecompDataset(folder, "train", inputs.make_vocab(s), img_dim=s.img_dim)
    loader = get_precomp_loader(dataset, s.batch_size, 0, shuffle_seed=0)
    model = SCAN(inputs.flags(s))
    batches = iter(loader)
    first = next(batches)
    seconds, anonymous = time.time() - s.started, [anonymous_memory()]
    model.train_start()
    for batch in (first, next(batches)):
        model.train_emb(*batch)
        anonymous.append(anonymous_memory())
    size = os.path.getsize(os.path.join(folder, "train_ims.npy")) / 1e9
    return {"seconds": [seconds], "file_gb": size, "own_gb": anonymous}


def anonymous_memory():
    """Anonymous memory of this process in GB, without the pages of files. NaN where there is no /proc."""
    if not os.path.exists("/proc/self/status"):
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


# ---------------------------------------------------------------- position grids


def grids(s, n_images=None):
    """Position grids of n images."""
    boxes, sizes = inputs.random_boxes(np.random.default_rng(0), n_images or s.images)
    return {"seconds": timed(s, lambda: position_grid(boxes, sizes), lambda: position_grid(boxes[:9], sizes[:9]))[0]}


def grids_published(s):
    """Position grids of a part of the images in the published way, scaled."""
    boxes, sizes = inputs.random_boxes(np.random.default_rng(0), s.plain_grids)
    seconds, published = timed(s, lambda: published_way.position_grids(boxes, sizes))
    weights = np.s_[..., N_SLOTS:]  # cells of equal weights may be in another order
    return {
        "seconds": [x * s.images / s.plain_grids for x in seconds],
        "part": f"{s.plain_grids} images",
        "differences": {"grids": largest_difference(published[weights], position_grid(boxes, sizes)[weights])},
    }


# ---------------------------------------------------------------- a process for each


def peak_bytes():
    """The most memory that this process has held; NaN where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # at least that of the process that started this


def run_measurement(name, sizes, arguments):
    """One of the functions above, and the peak of this process's memory in GB."""
    result = globals()[name](Namespace(**sizes), **arguments)
    result["peak_gb"] = peak_bytes() / 1e9
    if torch.cuda.is_available():
        result["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


if __name__ == "__main__":
    parser = ArgumentParser(
        description="One measurement of scripts/benchmark.py, which starts this.",
        epilog="example: python scripts/benchmark.py --quick",
    )
    parser.add_argument("job", type=json.loads, help='JSON: {"name": …, "sizes": {…}, "arguments": {…}}')
    print(json.dumps(run_measurement(**parser.parse_args().job)))
