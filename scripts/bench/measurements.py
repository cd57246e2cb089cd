"""The measurements of scripts/benchmark.py, each a function of the sizes s.

python scripts/bench/measurements.py '{"name": …, "sizes": …, "arguments": …}' takes one and prints it as a line of
JSON; sizes are those at the top of scripts/benchmark.py, and folder, device and started (seconds since 1970).
"""

import json
import os
import resource
import sys
import time
from argparse import ArgumentParser, Namespace
from statistics import median

import numpy as np

if not __package__:
    import _root  # noqa: F401

from scripts.bench.inputs import (
    CELL_SLOTS,
    REGIONS,
    caption_lengths,
    embeddings,
    flags,
    make_split,
    make_vocab,
    random_batch,
    random_boxes,
)

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def prepare(s):
    """Write the test split and, with sparse files, the training splits. Returns what the machine is."""
    import platform

    import torch

    from lib.distributed import pick_device

    make_split(s, s.folder, "test", s.images)
    for n_images in s.train_images:
        make_split(s, os.path.join(s.folder, str(n_images)), "train", n_images, sparse=True)
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    chosen = pick_device(s.device)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def timed(s, work, warm_up=None):
    """Seconds of s.repeats runs of work, after one of warm_up, and the last run's result."""
    import torch

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


def tile_product():
    """A function of float32 matrices that multiplies them as amx.py does, or None where it cannot."""
    import torch

    from lib.kernels import amx

    if not amx.available():
        return None

    @amx.compiled
    def multiply_rows(first, last, left, right, configuration, product):
        amx.configure(configuration.ctypes.data)
        sides = left[0, first].ctypes.data, left[0].nbytes, right.ctypes.data, right[0].nbytes
        at, stride = product[first * amx.BLOCK].ctypes.data, product.strides[0]
        amx.multiply(*sides, left.shape[2], len(left), at, last - first, right.shape[1], stride)

    def multiply(a, b):
        left = amx.side([(a, np.arange(len(a)))], amx.PARTS["highest"], right=False).numpy()
        right = amx.side([(b, np.arange(len(b)))], amx.PARTS["highest"], right=True).numpy()
        product = torch.empty(len(a), len(b))
        work = left, right, amx.CONFIGURATION, product.numpy()
        amx.in_threads(lambda first, last: multiply_rows(first, last, *work), len(a) // amx.BLOCK)
        return product

    return multiply


def products(s):
    """Seconds of the fastest float32 product regions × words of the test split, by route and size of a block."""
    import torch

    from lib.distributed import pick_device

    device = pick_device(s.device)
    torch.set_float32_matmul_precision("highest")
    n_words = sum(caption_lengths(np.random.default_rng(0), s.images * s.per_image))
    flops = 2 * s.images * REGIONS * n_words * s.embed_size
    rates, in_tiles = {}, tile_product() if device.type == "cpu" else None
    for rows, columns in ((128 * REGIONS, 512), (128 * REGIONS, 2048), (32 * REGIONS, 512), (1024, 1024)):
        a, b = (torch.randn(n, s.embed_size, device=device) for n in (rows, columns))
        routes = {"mm": lambda a=a, b=b: a @ b.T}
        if device.type == "cpu":
            x, y, image, kernel = a.numpy(), b.numpy().T, a.T[None].contiguous(), b[:, :, None]
            routes["numpy"] = lambda x=x, y=y: x @ y
            routes["oneDNN"] = lambda image=image, kernel=kernel: torch.conv1d(image, kernel)
        if in_tiles:
            routes["tiles"] = lambda a=a, b=b: in_tiles(a, b)
        for name, product in routes.items():
            n = 128 * REGIONS * 2048 // (rows * columns)
            seconds, _ = timed(s, lambda n=n, product=product: [product() for _ in range(n)][-1])
            rates[f"{name} {rows}×{columns}"] = n * 2 * rows * columns * s.embed_size / median(seconds) / 1e9
    best = max(rates, key=rates.get)
    return {"seconds": [flops / rates[best] / 1e9], "flops": flops, "best": best, "gflops": rates}


class Sampled:
    """A score function that computes each every-th block and gives zeros for the others, and times what it computes."""

    def __init__(self, score, every):
        self.score, self.every = score, every
        self.calls = self.seconds = self.done = self.all = 0

    def __call__(self, images, words, lens, opt):
        self.calls += 1
        size = len(images) * len(words)
        self.all += size
        if (self.calls - 1) % self.every:
            return images.new_zeros(len(images), len(lens))
        start = time.perf_counter()
        scores = self.score(images, words, lens, opt).cpu()
        self.seconds += time.perf_counter() - start
        self.done += size
        return scores


def score(s, cross_attn="t2i", n_images=None, precision="highest", every=1):
    """Score and rank all pairs with shard_xattn. Of every > 1 blocks one is computed; seconds are scaled by words."""
    import torch

    from evaluation import SHARD_SIZE, i2t, shard_xattn, t2i
    from lib.cross_attention import XATTN_SCORE

    torch.set_float32_matmul_precision(precision)
    opt = flags(s, cross_attn)
    images, words, lens = embeddings(s, n_images or s.images)
    scaled = []

    def work():
        sampled = Sampled(XATTN_SCORE[cross_attn], every)
        start = time.perf_counter()
        sims = shard_xattn(images, words, lens, opt, SHARD_SIZE, score=sampled)
        recalls = i2t(None, None, None, sims)[:3], t2i(None, None, None, sims)[:3]
        wall = time.perf_counter() - start
        scaled.append(wall + sampled.seconds * (sampled.all / sampled.done - 1))
        return recalls

    few = lens[:1024]  # enough for whole blocks
    shard_xattn(images[:512], words[: sum(few)], few, opt, SHARD_SIZE)
    _, recalls = timed(s, work, warm_up=lambda: None)
    return {"seconds": scaled, "recalls": [*recalls[0], *recalls[1]], "pairs": len(images) * len(lens), "every": every}


def score_published(s, cross_attn="t2i"):
    """A part of the pairs in the published way, scaled by pairs, and ranking all of them."""
    import torch

    from data import pad
    from lib import cross_attention
    from lib.cross_attention import XATTN_SCORE
    from lib.distributed import pick_device
    from scripts.bench import published_way

    cross_attention.TILES_FROM = 0  # the part is scored as the whole is
    opt, device = flags(s, cross_attn), pick_device(s.device)
    images, words, lens = embeddings(s, s.images)
    lens = lens[: s.plain_captions]
    images, captions = images[: s.plain_images].clone(), pad(words[: sum(lens)].split(lens))
    ours = {}
    for precision in s.precisions:
        torch.set_float32_matmul_precision(precision)
        ours[precision] = XATTN_SCORE[cross_attn](images.to(device), captions.to(device), lens, opt).cpu().numpy()
    torch.set_float32_matmul_precision("highest")
    del words
    part = images.double().numpy(), captions.double().numpy()
    scoring, sims = timed(
        s,
        lambda: published_way.shard_xattn(*part, lens, opt, device=device),
        lambda: published_way.shard_xattn(part[0][:32], part[1][:32], lens[:32], opt, device=device),
    )
    all_sims = np.random.default_rng(0).random((s.images, s.images * s.per_image))
    ranking, _ = timed(s, lambda: published_way.ranks(all_sims, s.per_image))
    scale = all_sims.size / sims.size
    seconds = [scale * part + rank for part, rank in zip(scoring, ranking, strict=True)]
    differences = {precision: float(abs(sims - scores).max()) for precision, scores in ours.items()}
    return {"seconds": seconds, "part": f"{sims.shape[0]} × {sims.shape[1]}", "differences": differences}


def train(s, cross_attn="t2i", batch=None, amp=False):
    """One training step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from model import SCAN

    torch.manual_seed(0)
    model, data = SCAN(flags(s, cross_attn, amp=amp)), random_batch(s, batch or s.batch_size)
    with FlopCounterMode(display=False) as counter:
        model.train_emb(*data)
    seconds, _ = timed(s, lambda: model.train_emb(*data).item())
    return {"seconds": seconds, "flops": counter.get_total_flops()}


def train_published(s, cross_attn="t2i"):
    """One training step in the published way, from the same weights; the two losses' relative difference."""
    import torch

    from model import SCAN
    from scripts.bench import published_way

    torch.manual_seed(0)
    opt, data = flags(s, cross_attn), random_batch(s, s.batch_size)
    ours = SCAN(opt)
    model = published_way.Model(opt, ours.device)
    model.load_state_dict(ours.state_dict())
    with torch.no_grad():
        loss = ours.forward_loss(*ours.forward_emb(*data)).item()
    del ours
    first = model.train_emb(*data)
    seconds, _ = timed(s, lambda: model.train_emb(*data))
    return {"seconds": seconds, "difference": abs(first - loss) / abs(first)}


def encode(s):
    """Encode the test split."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from data import PrecompDataset, get_precomp_loader
    from evaluation import encode_data
    from model import SCAN

    torch.manual_seed(0)
    model = SCAN(flags(s))
    loader = get_precomp_loader(PrecompDataset(s.folder, "test", make_vocab(s)), s.batch_size, 0)
    with FlopCounterMode(display=False) as counter:
        encode_data(model, loader, packed=True)
    seconds, _ = timed(s, lambda: encode_data(model, loader, packed=True))
    return {"seconds": seconds, "flops": counter.get_total_flops()}


def encode_published(s):
    """Encode a part of the test split in the published way, scaled by pairs."""
    import torch

    from data import collate_fn
    from model import SCAN
    from scripts.bench import published_way

    torch.manual_seed(0)
    opt = flags(s)
    ours = SCAN(opt)
    model = published_way.Model(opt, ours.device)
    model.load_state_dict(ours.state_dict())
    n = min(s.plain_batches * s.batch_size, s.images * s.per_image)
    loader = published_way.get_loader(os.path.join(s.folder, "test"), make_vocab(s), s.batch_size, n)
    seconds, (images, words, _) = timed(s, lambda: published_way.encode_data(model, loader))
    *batch, _ = collate_fn([loader.dataset[i] for i in range(8)])
    order = sorted(range(8), key=lambda i: -len(loader.dataset[i][2]))  # collate_fn's
    with torch.no_grad():
        mine = [x.cpu().numpy() for x in ours.forward_emb(*batch)[:2]]
    plain = images[order], words[order, : mine[1].shape[1]]
    difference = max(float(abs(a - b).max()) for a, b in zip(mine, plain, strict=True))
    scale = s.images * s.per_image / n
    return {"seconds": [x * scale for x in seconds], "part": f"{n} pairs", "difference": difference}


def grids(s, n_images=None):
    """Position grids of n images."""
    from position import position_grid

    boxes, sizes = random_boxes(np.random.default_rng(0), n_images or s.images)
    return {"seconds": timed(s, lambda: position_grid(boxes, sizes), lambda: position_grid(boxes[:9], sizes[:9]))[0]}


def grids_published(s):
    """Position grids of a part of the images in the published way, scaled."""
    from position import position_grid
    from scripts.bench import published_way

    boxes, sizes = random_boxes(np.random.default_rng(0), s.plain_grids)
    seconds, plain = timed(s, lambda: published_way.position_grids(boxes, sizes))
    difference = abs(plain[..., CELL_SLOTS:] - position_grid(boxes, sizes)[..., CELL_SLOTS:]).max()
    seconds = [x * s.images / s.plain_grids for x in seconds]
    return {"seconds": seconds, "part": f"{s.plain_grids} images", "difference": float(difference)}


def start_training(s, n_images):
    """From the start of the process to the first batch, with a sparse train_ims.npy; this process' own memory."""
    from data import PrecompDataset, get_precomp_loader
    from model import SCAN

    folder = os.path.join(s.folder, str(n_images))
    dataset = PrecompDataset(folder, "train", make_vocab(s), img_dim=s.img_dim)
    loader = get_precomp_loader(dataset, s.batch_size, 0, shuffle_seed=0)
    model = SCAN(flags(s))
    batches = iter(loader)
    first = next(batches)
    seconds, anonymous = time.time() - s.started, [own_memory()]
    model.train_start()
    for batch in (first, next(batches)):
        model.train_emb(*batch)
        anonymous.append(own_memory())
    size = os.path.getsize(os.path.join(folder, "train_ims.npy")) / 1e9
    return {"seconds": [seconds], "file_gb": size, "own_gb": anonymous}


def own_memory():
    """Anonymous memory of this process in GB: without the pages of files, which the kernel can drop."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024 / 1e9


MEASUREMENTS = {
    work.__name__: work
    for work in (
        prepare,
        products,
        score,
        score_published,
        train,
        train_published,
        encode,
        encode_published,
        grids,
        grids_published,
        start_training,
    )
}


def run_measurement(name, sizes, arguments):
    """What a process of its own does: one measurement, and the peak of its memory in GB."""
    result = MEASUREMENTS[name](Namespace(**sizes), **arguments)
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 1e9
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        result["device_gb"] = sys.modules["torch"].cuda.max_memory_allocated() / 1e9
    return result


if __name__ == "__main__":
    parser = ArgumentParser(
        description="One measurement of scripts/benchmark.py, which starts this.",
        epilog="example: python scripts/benchmark.py --quick",
    )
    parser.add_argument("job", type=json.loads, help='JSON: {"name": …, "sizes": {…}, "arguments": {…}}')
    job = parser.parse_args().job
    print(json.dumps(run_measurement(job["name"], job["sizes"], job["arguments"])))
