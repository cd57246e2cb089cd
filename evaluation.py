"""Encode a split, score all pairs, rank, recall@K.

python evaluation.py --model_path runs/f30k/model_best.pth.tar [MORE …] --data_path ./data --split test [--fold5]
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import ImageCaptions, pad
from lib import distributed, eccv, report
from lib.checkpoint import check_kind, load_checkpoint
from lib.datasets.region_match import warn_of_boxes
from lib.errors import InputError, run
from lib.files import check_output, digest_lines
from lib.gpu import resident, score_blocks
from lib.intervals import RECALL_AT
from lib.meters import AverageMeter, LogCollector  # noqa: F401 (SCAN's names)
from lib.options import EVALUATION, OPTIONS, add_options, as_list, check_options, evaluation_options, option
from lib.rankings import write_ranks, write_topk
from lib.tensors import pad_rows, to_device
from model import SCAN, ScoreConfig, load_model, xattn_score
from vocab import checkpoint_vocab, deserialize_vocab  # noqa: F401 (SCAN's names)

log = logging.getLogger(__name__)

# Images and captions of a shard. 512 take 0.1 GB more and 5 % less time: what one side needs is computed once.
SHARD_SIZE = 256


# ---------------------------------------------------------------- embeddings


def encode_data(model: Any, data_loader: Any, log_step: int = 10, logging: Callable = print) -> tuple:
    """Embed every image and every caption of a loader's data set once.

    Returns what model.forward_emb returns of a batch: img_embs (n_images, R, D), cap_embs (n_captions, W, D) padded
    with 0, cap_lens (list of int), float32 tensors on the CPU. log_step and logging are SCAN's; a progress bar shows
    instead.
    """
    images, (words, lens, *more) = embed_images(model, data_loader), embed_captions(model, data_loader)
    padded = pad(list(words.split(lens))) if lens else words.reshape(0, 0, words.shape[1])
    return *images, padded, lens, *more


@torch.no_grad()
def embed_images(model: Any, data_loader: Any) -> tuple[Tensor, ...]:
    """model.encode_images of every image of a loader's data set, once: tensors (n_images, …) on the CPU."""
    model.val_start()
    dataset, batch = data_loader.dataset, model.opt.batch_size
    n, found = dataset.n_images, ()
    for start, mine in distributed.my_batches(range(0, n, batch), "images"):
        stop = min(start + batch, n)
        rows = model.encode_images(*dataset.features(range(start, stop)))
        found = found or tuple(torch.zeros(n, *x.shape[1:]) for x in rows)
        for embeddings, x in zip(found, rows, strict=True) if mine else ():
            embeddings[start:stop] = x.cpu()
    return tuple(map(distributed.all_reduce_sum, found))


@torch.no_grad()
def embed_captions(model: Any, data_loader: Any) -> tuple:
    """model.encode_captions of every caption of a loader's data set, once, in batches of similar length.

    Returns words (ΣW_i, D), the captions' words one after the other, cap_lens (list of int) and the further embeddings
    (n_captions, …), tensors on the CPU.
    """
    model.val_start()
    dataset, batch = data_loader.dataset, model.opt.batch_size
    targets = [dataset.encode_caption(i) for i in range(len(dataset.captions))]
    lens = [len(target) for target in targets]
    by_length, starts = sorted(range(len(targets)), key=lens.__getitem__), np.cumsum([0, *lens])
    found: tuple[Tensor, ...] = ()
    for start, mine in distributed.my_batches(range(0, len(targets), batch), "captions"):
        index = by_length[start : start + batch]
        words, _, *more = model.encode_captions(pad([targets[i] for i in index]), [lens[i] for i in index])
        found = found or (
            torch.zeros(starts[-1], words.shape[2]),
            *(torch.zeros(len(lens), *x.shape[1:]) for x in more),
        )
        if mine:
            for i, caption in zip(index, words.cpu(), strict=True):
                found[0][starts[i] : starts[i + 1]] = caption[: lens[i]]
            for embeddings, x in zip(found[1:], more, strict=True):
                embeddings[index] = x.float().cpu()
    words, *more = map(distributed.all_reduce_sum, found or (torch.zeros(0, model.opt.embed_size),))
    return words, lens, *more


# ---------------------------------------------------------------- scores


@torch.no_grad()
def score_shards(
    images: tuple[Tensor, ...],
    captions: tuple,
    score: Callable,
    device: torch.device,
    shard_size: int = SHARD_SIZE,
    desc: str = "scores",
) -> np.ndarray:
    """Scores (n_images, n_captions) float32, a shard of images × a shard of captions at a time.

    images: what model.encode_images returns, of all. captions: what model.encode_captions returns, of all, the words
    padded (n_captions, W, D) or one after the other (ΣW_i, D). score(*embeddings) → a shard's scores, on device.
    shard_size: images, and captions, of a shard. On a GPU the images are sent once where they take half of its free
    memory at most, else a shard at a time, and a shard that does not fit is divided. Several processes divide the
    shards between them; each returns all scores.
    """
    words, lens, *more = captions
    lens = torch.as_tensor(lens, dtype=torch.int64).reshape(-1)
    images, shards = tuple(resident(x, device) for x in images), range(0, len(images[0]), shard_size)
    sims = np.zeros((len(images[0]), len(lens)), dtype=np.float32)
    with distributed.progress(total=sims.size, desc=desc, unit="pair", unit_scale=True) as bar:
        for number, index in enumerate(lens.argsort(stable=True).split(shard_size)):
            text = select_words(words, lens, index, device), lens[index], *(to_device(x[index], device) for x in more)
            for i in distributed.my_indices(len(shards), number * len(shards)):
                rows = slice(shards[i], shards[i] + shard_size)
                block = score_blocks(score, [to_device(x[rows], device) for x in images], text, device)
                sims[rows, index.numpy()] = block.numpy()
                bar.update(block.numel() * distributed.world_size())
    distributed.all_reduce_sum(torch.from_numpy(sims))
    return sims


def select_words(words: Tensor, lens: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Words (C, W, D) on device, padded with 0, of the captions in index; words as score_shards takes them."""
    if words.dim() == 3:
        return to_device(words[index, : int(lens[index].max())], device)
    starts = lens.cumsum(0) - lens
    rows = torch.cat([words[starts[i] : starts[i] + lens[i]] for i in index.tolist()])
    return pad_rows(to_device(rows, device), lens[index])


def shard_xattn(
    images: Any, captions: Any, caplens: Any, opt: Any, shard_size: int = 128, cross_attn: str | None = None
) -> np.ndarray:
    """Scores (n_images, n_captions) float32 numpy of images (n_images, R, D) and captions (n_captions, W, D).

    caplens (n_captions); numpy or tensors. opt: the model's options. cross_attn: t2i or i2t, opt's where None.
    """
    images, captions = (torch.as_tensor(x, dtype=torch.float32) for x in (images, captions))

    def score(im, s, s_l):
        return xattn_score(im, s, s_l, ScoreConfig.of(opt, cross_attn))

    device = distributed.pick_device(option(opt, "device"))
    return score_shards((images,), (captions, caplens), score, device, shard_size)


def shard_xattn_t2i(images: Any, captions: Any, caplens: Any, opt: Any, shard_size: int = 128) -> np.ndarray:
    """shard_xattn where words attend to regions."""
    return shard_xattn(images, captions, caplens, opt, shard_size, "t2i")


def shard_xattn_i2t(images: Any, captions: Any, caplens: Any, opt: Any, shard_size: int = 128) -> np.ndarray:
    """shard_xattn where regions attend to words."""
    return shard_xattn(images, captions, caplens, opt, shard_size, "i2t")


def softmax(X: Any, axis: int) -> np.ndarray:
    """Softmax of X, which has two axes at least, along axis."""
    X = np.atleast_2d(X)
    e = np.exp(X - X.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


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


# ---------------------------------------------------------------- evalrank


def load_split(
    model_path: str,
    data_path: str | None = None,
    vocab_path: str | None = None,
    split: str = "dev",
    make_model: type[SCAN] = SCAN,
    captions_optional: bool = False,
    **overrides: Any,
) -> tuple:
    """A checkpoint's model and a loader of the split.

    data_path, vocab_path: instead of the checkpoint's. captions_optional: a split without a caption file has images
    only. overrides: other options of the checkpoint to set; data_name leaves its vocabulary.
    """
    checkpoint = load_checkpoint(model_path)
    check_kind(model_path, checkpoint, make_model.whole_image)
    opt = checkpoint["opt"]
    opt.data_path, opt.vocab_path = data_path or opt.data_path, vocab_path or opt.vocab_path
    vocab = checkpoint_vocab(model_path, checkpoint, opt, make_model.vocabulary)
    vars(opt).update({"device": OPTIONS["device"].default, **overrides})  # not the device it was trained on
    check_options(opt, ("batch_size", "matmul_precision"))
    more = {"captions_optional": True} if captions_optional else {}
    loader = make_model.dataset.get_test_loader(split, opt.data_name, vocab, opt.batch_size, 0, opt, **more)
    warn_of_boxes(loader.dataset)
    return load_model(model_path, len(vocab), make_model, checkpoint, **overrides), loader


def score_split(model: Any, loader: Any, n_folds: int = 1) -> list[np.ndarray]:
    """A model's similarities of a loader's data set: a matrix (n_images, n_captions) for each of n equal folds."""
    dataset: ImageCaptions = loader.dataset
    counts = dataset.n_images, len(dataset.captions)
    if any(n % n_folds for n in counts):
        raise InputError(
            f"{dataset.prefix}: {counts[1]} captions of {counts[0]} images do not divide into {n_folds} folds"
        )
    images, (words, lens, *more) = embed_images(model, loader), embed_captions(model, loader)
    sims = []
    for fold in range(n_folds):
        i, c = (slice(fold * n // n_folds, (fold + 1) * n // n_folds) for n in counts)
        captions = words[sum(lens[: c.start]) : sum(lens[: c.stop])], lens[c], *(x[c] for x in more)
        sims.append(score_shards(tuple(x[i] for x in images), captions, model.score, model.device))
    return sims


@dataclass
class Split:
    """The split that all models of an evaluation score.

    where: data_path, vocab_path, split and make_model of load_split, and overrides. dataset: the first model's, whose
    images and captions the others must have; with eccv MS-COCO's testall.
    """

    where: tuple
    overrides: dict
    n_folds: int
    eccv: bool
    dataset: Any = None

    def mean_sims(self, paths: list) -> list[np.ndarray]:
        """The folds' similarities, averaged over checkpoints. Raises InputError where splits differ."""
        total: list[np.ndarray] = []
        for path in paths:
            model, loader = load_split(path, *self.where, **self.overrides)
            self.dataset = loader.dataset if self.dataset is None else self.dataset
            report.check_same_split(path, loader.dataset, self.dataset, self.eccv)
            folds = score_split(model, loader, self.n_folds)
            total = total or [np.zeros_like(sims) for sims in folds]
            for mean, sims in zip(total, folds, strict=True):
                mean += sims / len(paths)
        return total


def evalrank(
    model_path: Any,
    data_path: str | None = None,
    split: str = "dev",
    fold5: bool = False,
    vocab_path: str | None = None,
    make_model: type[SCAN] = SCAN,
    **options: Any,
) -> dict:
    """Rank a split both ways and print SCAN's lines.

    model_path: a checkpoint, or a list of them whose mean similarities are ranked. data_path, vocab_path: instead of
    the checkpoint's. fold5: five folds, each printed, then their means. make_model: the class of the models. options:
    the rows of lib.options.EVALUATION (intervals, versus, eccv, save_ranks, save_topk, topk), and options of the
    checkpoint to set, such as batch_size, device or data_name; None is the default.
    Returns {"rsum", "ar", "ari", "i2t": (R@1, R@5, R@10, medr, meanr), "t2i": likewise, "n_images", "n_captions"},
    with fold5 the means and "folds", the same for each; "intervals", and with versus "versus" and "difference", are
    {measure: (mean, low, high)}, see lib/intervals.py; with eccv "eccv" as well. Raises TypeError for an option that
    there is not, InputError for a value that is not allowed and for files that do not fit.
    """
    settings, overrides = evaluation_options(options)
    if settings.eccv and fold5:
        raise InputError("--eccv: ranks all 5,000 images of testall, expected no --fold5")
    for path, other in ((settings.save_ranks, ""), (settings.save_topk, settings.save_ranks)):
        if path:
            check_output(path, other)
    for path in as_list(settings.versus or ()):
        load_checkpoint(path)  # what is none is refused before the first model is ranked
    scored = Split((data_path, vocab_path, split, make_model), overrides, 5 if fold5 else 1, settings.eccv)
    sims = scored.mean_sims(as_list(model_path))
    result, ranks = rank_folds(sims)
    report.print_result(result)
    if settings.eccv:
        result["eccv"] = eccv.print_metrics(sims[0])
    if settings.save_topk and distributed.rank() == 0:
        write_topk(settings.save_topk, sims, settings.topk, scored.dataset.read_ids())
    del sims
    if settings.intervals or settings.versus:
        other = scored.mean_sims(as_list(settings.versus)) if settings.versus else None
        result |= report.compare(ranks, rank_folds(other)[1] if other else None)
    if settings.save_ranks and distributed.rank() == 0:
        write_ranks(settings.save_ranks, ranks, digest_lines(scored.dataset.captions))
    return result


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


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model_path FILE [FILE …] [flags]    (--help lists them)",
        description="Rank a split with one checkpoint, or with the mean similarities of several.",
        epilog="example: python %(prog)s --model_path runs/f30k_t2i/model_best.pth.tar "
        "runs/f30k_i2t/model_best.pth.tar --data_path ./data --split test",
    )
    parser.add_argument("--model_path", nargs="+", required=True, help="checkpoints; several are an ensemble")
    from_checkpoint = ("data_path", "vocab_path", "data_name", "batch_size")
    add_options(parser, from_checkpoint, **dict.fromkeys(from_checkpoint))
    add_options(parser, ("device", "matmul_precision"))
    parser.add_argument("--split", default="test", help="dev, test, testall or one of your own (default: %(default)s)")
    parser.add_argument("--fold5", action="store_true", help="mean over five folds, as for MS-COCO 1K")
    add_options(parser, EVALUATION)
    return parser


def main(make_model: type[SCAN] = SCAN) -> None:
    opt = vars(get_parser().parse_args())
    distributed.start(opt["device"])
    evalrank(make_model=make_model, **opt)
    distributed.stop()


if __name__ == "__main__":
    run(main)
