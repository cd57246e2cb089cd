"""Encode a split, score all pairs, rank, recall@K.

python evaluation.py --model_path runs/f30k/model_best.pth.tar [MORE …] --data_path ./data --split test [--fold5]
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import get_test_loader, pad
from lib import distributed
from lib.checkpoint import load_checkpoint
from lib.datasets.region_match import warn_of_boxes
from lib.eccv import check_split, print_metrics
from lib.errors import InputError, brief, run
from lib.gpu import BlockLimit, resident_chunks
from lib.intervals import RECALL_AT, group_hits, print_summary
from lib.meters import AverageMeter, LogCollector  # noqa: F401 (SCAN's names)
from lib.options import OPTIONS, add_options, check_options, option
from lib.rankings import write_ranks, write_topk
from lib.tensors import send
from model import SCAN, XATTN_SCORE, load_model
from vocab import checkpoint_vocab, deserialize_vocab, vocab_file

log = logging.getLogger(__name__)

COCO_FOLD = 1000  # pictures of each of the five folds of MS-COCO's published 1K results
# Images and captions of a shard. With 128 what each side of a shard needs would be computed four times as often.
SHARD_SIZE = 512


# ---------------------------------------------------------------- embeddings and scores


@torch.no_grad()
def encode_data(
    model: Any, data_loader: Any, log_step: int = 10, logging: Callable = print, packed: bool = False
) -> tuple:
    """Embed every image and every caption of a loader's data set once.

    Returns img_embs (n_images, R, D), cap_embs (n_captions, W, D) padded with 0, cap_lens (list of int), float32
    tensors on the CPU; with packed, cap_embs is (ΣW_i, D), the captions' words one after the other.
    log_step and logging are SCAN's; a progress bar shows instead.
    """
    model.val_start()
    words, cap_lens = embed_captions(model, data_loader)
    (img_embs,) = embed_images(model, data_loader)
    return img_embs, words if packed else pad_words(words, cap_lens), cap_lens


def pad_words(words: Tensor, lens: list[int]) -> Tensor:
    """Captions' words one after the other (ΣW_i, D) → (n_captions, W, D), padded with 0."""
    return pad(list(words.split(lens))) if lens else words.reshape(0, 0, words.shape[1])


def embed_captions(model: Any, data_loader: Any, n_more: int = 0) -> tuple:
    """Embed every caption of a loader's data set once, in batches of captions of similar length.

    n_more: how many embeddings (B, D) model.encode_captions returns after the words, such as a whole sentence's.
    Returns words (ΣW_i, D), the captions' words one after the other, cap_lens (list of int), and n_more embeddings
    (n_captions, D); on the CPU.
    """
    dataset, batch = data_loader.dataset, data_loader.batch_size
    targets = [dataset.encode_caption(i) for i in range(len(dataset.captions))]
    cap_lens = [len(target) for target in targets]
    by_length = sorted(range(len(targets)), key=cap_lens.__getitem__)
    starts = np.cumsum([0, *cap_lens])
    words = torch.zeros(starts[-1], model.opt.embed_size)
    more = [torch.zeros(len(targets), model.opt.embed_size) for _ in range(n_more)]
    for start in my_batches(range(0, len(targets), batch), "captions"):
        index = by_length[start : start + batch]
        block, *rows = as_tuple(model.encode_captions(pad([targets[i] for i in index]), [cap_lens[i] for i in index]))
        for i, embedding in zip(index, block.cpu(), strict=True):
            words[starts[i] : starts[i + 1]] = embedding[: cap_lens[i]]
        for embeddings, x in zip(more, rows, strict=True):
            embeddings[index] = x.to(embeddings)
    return distributed.all_reduce_sum(words), cap_lens, *map(distributed.all_reduce_sum, more)


def embed_images(model: Any, data_loader: Any, n_more: int = 0) -> list[Tensor]:
    """Embed every image of a loader's data set once.

    n_more: how many embeddings (B, D) model.encode_images returns after the regions, such as the whole image's.
    Returns regions (n_images, R, D) and n_more embeddings (n_images, D), on the CPU.
    """
    dataset, batch = data_loader.dataset, data_loader.batch_size
    n, size = dataset.n_images, model.opt.embed_size
    embeddings = [torch.zeros(n, dataset.images.shape[1], size), *(torch.zeros(n, size) for _ in range(n_more))]
    for start in my_batches(range(0, n, batch), "images"):
        blocks = as_tuple(model.encode_images(*dataset.read_images(start, min(start + batch, n))))
        for rows, x in zip(embeddings, blocks, strict=True):
            rows[start : start + batch] = x.cpu()
    return [distributed.all_reduce_sum(rows) for rows in embeddings]


def my_batches(batches: Sequence, desc: str) -> Iterable:
    """The batches that this process encodes, with a progress bar."""
    mine = [batches[i] for i in distributed.my_indices(len(batches))]
    return tqdm(mine, desc=desc, unit="batch", leave=False, disable=distributed.rank() > 0 or None)


def as_tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)


@torch.no_grad()
def shard_xattn(
    images: Any,
    captions: Any,
    caplens: Any,
    opt: Any,
    shard_size: int = 128,
    cross_attn: str | None = None,
    score: Callable | None = None,
) -> np.ndarray:
    """Scores (n_images, n_captions) float32 numpy, a shard of images × a shard of captions at a time.

    images (n_images, R, D), captions (n_captions, W, D) padded or (ΣW_i, D) packed, caplens (n_captions); numpy or
    tensors. opt: the model's options. shard_size: images, and captions, of a shard. cross_attn: t2i or i2t, opt's
    where None. score(images, words, lens, opt) → a shard's scores; XATTN_SCORE[cross_attn] where None.
    On a GPU the images are sent once and stay, as far as memory allows, and a shard that does not fit is divided.
    Several processes divide the shards between them, and each returns all scores.
    """
    cross_attn = cross_attn or opt.cross_attn
    score = score or XATTN_SCORE[cross_attn]
    images, captions = (torch.as_tensor(x, dtype=torch.float32) for x in (images, captions))
    lens = torch.as_tensor(caplens, dtype=torch.int64).reshape(-1)
    device = distributed.pick_device(option(opt, "device"))
    sims, limit = np.zeros((len(images), len(lens)), dtype=np.float32), BlockLimit(device)
    with tqdm(
        total=sims.size,
        desc=f"scores {cross_attn}",
        unit="pair",
        unit_scale=True,
        leave=False,
        disable=distributed.rank() > 0 or None,
    ) as bar:
        for first, chunk in resident_chunks(images, device, shard_size):
            shards = range(0, len(chunk), shard_size)
            for number, index in enumerate(lens.argsort(stable=True).split(shard_size)):
                words = send(select_words(captions, lens, index), device)
                for i in distributed.my_indices(len(shards), number * len(shards)):
                    rows = chunk[shards[i] : shards[i] + shard_size]
                    block = limit.score(rows, len(words), partial(score_with, score, words, lens[index], opt))
                    start = first + shards[i]
                    sims[start : start + len(rows), index.numpy()] = block.numpy()
                    bar.update(block.numel() * distributed.world_size())
    distributed.all_reduce_sum(torch.from_numpy(sims))
    return sims


def score_with(score: Callable, words: Tensor, lens: Tensor, opt: Any, images: Tensor) -> Tensor:
    """score(images, words, lens, opt), with the images last."""
    return score(images, words, lens, opt)


def select_words(captions: Tensor, lens: Tensor, index: Tensor) -> Tensor:
    """Words (ΣW_i, D) of the captions in index, one after the other; captions as shard_xattn takes them."""
    if captions.dim() == 3:
        return torch.cat([captions[i, : lens[i]] for i in index.tolist()])
    starts = lens.cumsum(0) - lens
    return torch.cat([captions[starts[i] : starts[i] + lens[i]] for i in index.tolist()])


def shard_xattn_t2i(images: Any, captions: Any, caplens: Any, opt: Any, shard_size: int = 128) -> np.ndarray:
    """shard_xattn where words attend to regions."""
    return shard_xattn(images, captions, caplens, opt, shard_size, "t2i")


def shard_xattn_i2t(images: Any, captions: Any, caplens: Any, opt: Any, shard_size: int = 128) -> np.ndarray:
    """shard_xattn where regions attend to words."""
    return shard_xattn(images, captions, caplens, opt, shard_size, "i2t")


# ---------------------------------------------------------------- ranks


def rank_rows(sims: Any) -> tuple[np.ndarray, np.ndarray]:
    """For each row of sims (n, m), how many wrong columns score at least as much as its best right one.

    Rows and columns belong together in equal consecutive groups, as many as the shorter side is long.
    Returns ranks (n,) and the index of each row's best column (n,), a wrong one where it ties with the best right one.
    """
    n, m = sims.shape
    groups = min(n, m)
    if groups == 0 or n % groups or m % groups:
        raise InputError(f"similarities {n} × {m}: expected one count to be a multiple of the other")
    ranks, top1 = np.empty(n), np.empty(n)
    for start in range(0, n, 256):
        block = np.array(sims[start : start + 256], dtype=np.result_type(sims, np.float32))
        if np.isnan(block).any():
            raise InputError(f"similarities: NaN in row {start + int(np.isnan(block).any(1).argmax())}")
        rows = np.arange(len(block))[:, None]
        right = (rows + start) * groups // n * (m // groups) + np.arange(m // groups)
        best = block[rows, right].max(1, keepdims=True)
        ahead = block >= best
        ahead[rows, right] = False
        rank = ahead.sum(1)
        ranks[start : start + 256] = rank
        winner = block.argmax(1)
        block[rows, right] = -np.inf
        top1[start : start + 256] = np.where(rank > 0, block.argmax(1), winner)
    return ranks, top1


def recall(ranks: np.ndarray) -> tuple:
    """(R@1, R@5, R@10, median rank, mean rank) of ranks that start at 0; recalls in percent."""
    recalls = [100.0 * float((ranks < k).mean()) for k in RECALL_AT]
    return (*recalls, float(np.floor(np.median(ranks)) + 1), float(ranks.mean() + 1))


def i2t(
    images: Any, captions: Any, caplens: Any, sims: Any, npts: int | None = None, return_ranks: bool = False
) -> tuple:
    """Images find their captions. sims (n_images, n_captions); images, captions and caplens are not read.

    npts: only the first npts images and their captions. Returns (R@1, R@5, R@10, medr, meanr), with
    return_ranks also (ranks (n_images,), top1 (n_images,)). A tie counts against the model; NaN is an InputError.
    """
    ranks, top1 = rank_rows(first_images(sims, npts))
    return (recall(ranks), (ranks, top1)) if return_ranks else recall(ranks)


def t2i(
    images: Any, captions: Any, caplens: Any, sims: Any, npts: int | None = None, return_ranks: bool = False
) -> tuple:
    """Captions find their image: i2t with the roles swapped, ranks and top1 are (n_captions,)."""
    ranks, top1 = rank_rows(first_images(sims, npts).T)
    return (recall(ranks), (ranks, top1)) if return_ranks else recall(ranks)


def first_images(sims: Any, npts: int | None) -> np.ndarray:
    """The scores of the first npts images and their captions; all, where npts is None."""
    sims = np.asarray(sims)
    return sims if npts is None else sims[:npts, : npts * sims.shape[1] // sims.shape[0]]


# ---------------------------------------------------------------- a checkpoint's scores


def read_vocab(opt: Any) -> Any:
    """The vocabulary that opt's vocab_path and data_name lead to."""
    return deserialize_vocab(vocab_file(opt.vocab_path, opt.data_name))


def load_split(
    model_path: Any,
    data_path: str | None,
    vocab_path: str | None,
    split: str,
    make_model: Callable = SCAN,
    read_vocab: Callable = read_vocab,
    get_test_loader: Callable = get_test_loader,
    captions_optional: bool = False,
    check: Callable | None = None,
    **overrides: Any,
) -> tuple:
    """A checkpoint's model and a loader of the split.

    data_path, vocab_path: instead of the checkpoint's. make_model, read_vocab, get_test_loader: what a variant
    replaces. captions_optional: a split without a caption file has images only. check(model_path, dataset) is called
    before the model is made. overrides: other options of the checkpoint to set; data_name leaves its vocabulary.
    """
    checkpoint = load_checkpoint(model_path)
    opt = checkpoint["opt"]
    opt.data_path, opt.vocab_path = data_path or opt.data_path, vocab_path or opt.vocab_path
    vocab = checkpoint_vocab(model_path, checkpoint, opt, read_vocab)
    vars(opt).update({"device": OPTIONS["device"].default, **overrides})  # not the device it was trained on
    check_options(opt, ("batch_size", "matmul_precision"))
    more = {"captions_optional": True} if captions_optional else {}
    loader = get_test_loader(split, opt.data_name, vocab, opt.batch_size, 0, opt, **more)
    if check:
        check(model_path, loader.dataset)
    warn_of_boxes(loader.dataset)
    return load_model(model_path, len(vocab), make_model, **overrides), loader


def cut_folds(dataset: Any, n_folds: int) -> list:
    """Slices of the images and of the captions of each of n equal folds of a data set."""
    counts = dataset.n_images, len(dataset.captions)
    if any(n % n_folds for n in counts):
        raise InputError(
            f"{dataset.prefix}: {counts[1]} captions of {counts[0]} images do not divide into {n_folds} folds"
        )
    return [[slice(fold * n // n_folds, (fold + 1) * n // n_folds) for n in counts] for fold in range(n_folds)]


def score_split(
    model_path: Any,
    data_path: str | None,
    vocab_path: str | None,
    split: str,
    n_folds: int,
    load_split: Callable = load_split,
    encode_data: Callable = encode_data,
    shard_xattn: Callable = shard_xattn,
    **overrides: Any,
) -> list[np.ndarray]:
    """Similarities of one checkpoint on a split: a list with one (n_images, n_captions) matrix for each fold.

    load_split, encode_data, shard_xattn: what a variant replaces. overrides: other options of the checkpoint to set.
    """
    model, loader = load_split(model_path, data_path, vocab_path, split, **overrides)
    folds = cut_folds(loader.dataset, n_folds)
    embeddings, n = encode_data(model, loader, packed=True), model.criterion.n_image_embeddings
    images, (words, lens, *sentences) = embeddings[:n], embeddings[n:]
    sims = []
    for i, c in folds:
        captions = word_rows(words, lens, c), lens[c], *(x[c] for x in sentences)
        sims.append(shard_xattn(*(x[i] for x in images), *captions, model.opt, SHARD_SIZE))
    return sims


def word_rows(words: Tensor, lens: list, captions: slice) -> Tensor:
    """The words of a slice of the captions in words (ΣW_i, D), a view."""
    return words[sum(lens[: captions.start]) : sum(lens[: captions.stop])]


class SharedSplit:
    """The split that all models of an evaluation score. Call it with each model's path and data set.

    dataset: the first model's. Raises InputError where another's has other images or captions, or in another order.
    eccv: raise it as well where the split is not MS-COCO's testall.
    """

    def __init__(self, eccv: bool = False):
        self.eccv = eccv
        self.path: Any = None
        self.dataset: Any = None

    def __call__(self, path: Any, dataset: Any) -> None:
        if self.dataset is None:
            self.path, self.dataset = path, dataset
            if self.eccv:
                check_split(dataset.prefix, dataset.n_images, len(dataset.captions), dataset.read_id_lines())
            return
        counts, others = ((x.n_images, len(x.captions)) for x in (dataset, self.dataset))
        if counts != others:
            raise InputError(
                f"{path}: ranks {min(counts)} groups of images and captions, {counts[0]} and {counts[1]}, "
                f"{self.path} {min(others)}, {others[0]} and {others[1]}"
            )
        for kind, rows, other_rows in (
            ("caption", dataset.captions, self.dataset.captions),
            ("id", dataset.read_ids() or [], self.dataset.read_ids() or []),
        ):
            differ = [i for i, (x, y) in enumerate(zip(rows, other_rows, strict=False)) if x != y]
            if differ:
                raise InputError(
                    f"{path}: {kind} {differ[0]} of {dataset.prefix} is {brief(rows[differ[0]])}, that of "
                    f"{self.dataset.prefix} for {self.path} is {brief(other_rows[differ[0]])}"
                )


def mean_sims(paths: Sequence, *args: Any, score_split: Callable = score_split, **overrides: Any) -> list[np.ndarray]:
    """score_split's matrices of several checkpoints, averaged."""
    folds = score_split(paths[0], *args, **overrides)
    for path in paths[1:]:
        for total, block in zip(folds, score_split(path, *args, **overrides), strict=True):
            total += block
    for total in folds:
        total /= len(paths)
    return folds


# ---------------------------------------------------------------- evalrank


def evalrank(
    model_path: Any,
    data_path: str | None = None,
    split: str = "dev",
    fold5: bool = False,
    vocab_path: str | None = None,
    save_ranks: str | None = None,
    score_split: Callable = score_split,
    intervals: bool = False,
    versus: Any = None,
    eccv: bool = False,
    save_topk: str | None = None,
    topk: int = 10,
    **overrides: Any,
) -> dict:
    """Rank a split both ways and print SCAN's lines.

    model_path: a checkpoint, or a list of them whose mean similarities are ranked. data_path, vocab_path: instead of
    the checkpoint's. fold5: five folds, each printed, then their means. save_ranks: a file for ranks and top-1
    choices. score_split: what scores a checkpoint, for a variant. intervals: also print 95 % bootstrap intervals.
    versus: another checkpoint (or list), whose intervals and whose paired difference from model_path are printed too.
    eccv: also the ECCV Caption and CxC metrics of MS-COCO's testall, see lib/eccv.py. save_topk: a file for each
    query's best topk candidates as JSON lines, see lib/rankings.py. overrides: other options of the checkpoint to set
    (batch_size, device, matmul_precision, data_name; another data set is read with the checkpoint's vocabulary).
    Returns {"rsum", "ar", "ari", "i2t": (R@1, R@5, R@10, medr, meanr), "t2i": likewise, "n_images", "n_captions"},
    with fold5 the means and "folds", the same for each; "intervals", and with versus "versus" and "difference", are
    {measure: (mean, low, high)}, see lib/intervals.py; with eccv "eccv" as well. Raises InputError for files that do
    not fit.
    """
    check_outputs(save_ranks, save_topk, topk)
    if eccv and fold5:
        raise InputError("--eccv: ranks all 5,000 images of testall, expected no --fold5")
    shared = SharedSplit(eccv)

    def score(paths):
        options = {"score_split": score_split, "check": shared, **overrides}
        return mean_sims(as_list(paths), data_path, vocab_path, split, 5 if fold5 else 1, **options)

    sims = score(model_path)
    result, ranks = rank_folds(sims)
    print_result(result)
    if eccv:
        result["eccv"] = print_metrics(sims[0])
    if save_topk and distributed.rank() == 0:
        write_topk(save_topk, sims, topk, shared.dataset.read_ids())
    del sims
    if intervals or versus is not None:
        result |= compare(ranks, None if versus is None else rank_folds(score(versus))[1])
    if save_ranks and distributed.rank() == 0:
        write_ranks(save_ranks, ranks)
    return result


def check_outputs(save_ranks: str | None, save_topk: str | None, topk: int) -> None:
    """Raise InputError for files that cannot be written and a count of candidates below 1."""
    for path in filter(None, (save_ranks, save_topk)):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"{path}: no such folder")
    if topk < 1:
        raise InputError(f"--topk {topk}: expected at least 1")


def rank_folds(folds: list) -> tuple[dict, list]:
    """Rank each fold's similarities both ways: evalrank's result, and rank_both's ranks of each fold."""
    results, ranks = zip(*map(rank_both, folds), strict=True)
    result = dict(results[0])
    if len(folds) > 1:
        for key in result:
            mean = np.mean([fold[key] for fold in results], axis=0)
            result[key] = tuple(mean.tolist()) if mean.ndim else float(mean)
        result["folds"] = list(results)
    counts = np.sum([sims.shape for sims in folds], axis=0).tolist()
    return {**result, "n_images": counts[0], "n_captions": counts[1]}, list(ranks)


def rank_both(sims: Any) -> tuple[dict, dict]:
    """Recalls of a similarity matrix both ways, and {"rt": (i2t ranks, top1), "rti": (t2i ranks, top1)}."""
    r, rt = i2t(None, None, None, sims, return_ranks=True)
    ri, rti = t2i(None, None, None, sims, return_ranks=True)
    ar, ari = sum(r[:3]) / 3, sum(ri[:3]) / 3
    return {"rsum": sum(r[:3]) + sum(ri[:3]), "ar": ar, "ari": ari, "i2t": r, "t2i": ri}, {"rt": rt, "rti": rti}


def print_result(result: dict) -> None:
    """Print evalrank's result in SCAN's lines: each fold, where there are several, then the recalls.

    Warns where recalls are not what they are taken for: of few candidates, or of folds other than MS-COCO's.
    """
    print("Images: {n_images}, Captions: {n_captions}".format(**result))
    n_folds = len(result.get("folds", [0]))
    per_fold = min(result["n_images"], result["n_captions"]) // n_folds
    if n_folds > 1:
        print(f"{n_folds} folds of {result['n_images'] // n_folds} pictures")
        if result["n_images"] != n_folds * COCO_FOLD:
            log.warning("--fold5: %d pictures a fold, published 1K results have 1,000", result["n_images"] // n_folds)
    if per_fold <= max(RECALL_AT):
        log.warning("only %d images or captions are ranked: R@10 of so few says nothing", per_fold)
    for fold in result.get("folds", ()):
        print("Image to text: {:.1f}, {:.1f}, {:.1f}, {:.1f}, {:.1f}".format(*fold["i2t"]))
        print("Text to image: {:.1f}, {:.1f}, {:.1f}, {:.1f}, {:.1f}".format(*fold["t2i"]))
        print("rsum: {rsum:.1f} ar: {ar:.1f} ari: {ari:.1f}".format(**fold))
    if "folds" in result:
        print("-----------------------------------\nMean metrics: ")
    print("rsum: {rsum:.1f}\nAverage i2t Recall: {ar:.1f}".format(**result))
    print("Image to text: {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*result["i2t"]))
    print("Average t2i Recall: {ari:.1f}".format(**result))
    print("Text to image: {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}".format(*result["t2i"]))


def compare(ranks: list, other_ranks: list | None) -> dict:
    """Print the intervals of ranks and, where there are other_ranks, theirs and the paired difference.

    Returns {"intervals", "versus", "difference"}, the last two with other_ranks only.
    """
    hits = all_hits(ranks)
    found = {"intervals": print_summary("95 % intervals, bootstrap over images", hits)}
    if other_ranks is not None:
        other_hits = all_hits(other_ranks)
        found["versus"] = print_summary("The other model", other_hits)
        found["difference"] = print_summary("Paired difference, first minus other", hits - other_hits, signed=True)
    return found


def all_hits(ranks: list) -> np.ndarray:
    """group_hits of each fold's ranks as rank_folds returns them, one below the other."""
    return np.concatenate([group_hits(fold["rt"][0], fold["rti"][0]) for fold in ranks])


def as_list(paths: Any) -> list:
    """A list of paths, where one path or several may be given."""
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Rank a split with one checkpoint, or with the mean similarities of several.",
        epilog="example: python evaluation.py --model_path runs/f30k_t2i/model_best.pth.tar "
        "runs/f30k_i2t/model_best.pth.tar --data_path ./data --split test",
    )
    parser.add_argument("--model_path", nargs="+", required=True, help="checkpoints; several are an ensemble")
    add_options(parser, ("data_path", "vocab_path", "batch_size"), data_path=None, vocab_path=None, batch_size=None)
    add_options(parser, ("device", "matmul_precision"))
    parser.add_argument("--data_name", help="another data set, read with the checkpoint's vocabulary")
    parser.add_argument("--split", default="test", help="dev, test, testall or one of your own (default: %(default)s)")
    parser.add_argument("--fold5", action="store_true", help="mean over five folds, as for MS-COCO 1K")
    parser.add_argument("--save_ranks", metavar="FILE", help="also write the ranks, e.g. to ranks.pth.tar")
    parser.add_argument("--save_topk", metavar="FILE", help="also write each query's best candidates as JSON lines")
    parser.add_argument("--topk", type=int, default=10, help="how many of them (default: %(default)s)")
    parser.add_argument("--eccv", action="store_true", help="ECCV Caption and CxC metrics of MS-COCO's testall as well")
    parser.add_argument("--intervals", action="store_true", help="also 95 %% intervals, bootstrap over images")
    parser.add_argument("--versus", nargs="+", metavar="MODEL", help="other checkpoints: paired difference from these")
    return parser


def main(parser: argparse.ArgumentParser | None = None, evalrank: Callable = evalrank) -> None:
    opt = vars((parser or get_parser()).parse_args())
    distributed.start(opt["device"])
    evalrank(**{name: value for name, value in opt.items() if value is not None})
    distributed.stop()


if __name__ == "__main__":
    run(main)
