"""Several processes that train or evaluate as one, over torch.distributed: gloo between CPUs, NCCL between GPUs.

torchrun --nproc_per_node 4 train.py --batch_size 128 …     128 is the whole batch; each process encodes 32 pairs of it

The loss is that of the whole batch. Each process gathers the words of all captions of the batch and scores its own
images against them, so that the score matrix is divided by rows. Then gradients are summed over the processes.
A process that torchrun did not start behaves as the only one.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib import workers
from lib.errors import InputError


def pick_device(name: str = "auto") -> torch.device:
    """The torch.device of this name; auto means CUDA where it is available, else the CPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # pinned memory and measurements are those of the current device
    return device


def start(device: str) -> None:
    """Join the other processes that torchrun started; all but the first then print nothing and log only warnings.

    device: the --device flag. With CUDA a process takes the GPU of its LOCAL_RANK, or the only one that it can see
    (schedulers such as SLURM can show each process one GPU). Raises InputError where there are too few GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: expected auto, cpu or cuda where there are several processes")
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(pick_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    with report_lost_peer():
        dist.init_process_group(backend)
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays for the life of the process)


def pick_gpu(local_rank: int, n_visible: int) -> int:
    """Index of this process's GPU among those that it can see. Raises InputError where there are too few."""
    one_for_each = n_visible == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if local_rank >= n_visible and not one_for_each:
        raise InputError(f"--nproc_per_node: more processes than GPUs on this machine, which has {n_visible}")
    return 0 if one_for_each else local_rank


def stop() -> None:
    """Leave the other processes at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


is_alone = False  # inside `alone`


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() and not is_alone else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() and not is_alone else 1


@contextmanager
def report_lost_peer() -> Iterator[None]:
    """Turn errors of communication into an InputError that says that another process has ended.

    Crashes of a loading process and CUDA's own errors, out of memory among them, are raised as they are.
    """
    try:
        yield
    except RuntimeError as error:
        if workers.have_died() or isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
            raise
        where = f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{where}: another process has ended, so this one ends as well ({reason})") from None


def local_slice(n: int) -> slice:
    """This process's share of a batch of n pairs. With fewer pairs than processes each process has them all."""
    if n < world_size():
        return slice(0, n)
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def my_indices(n: int, done: int = 0) -> range:
    """This process's share of n equal pieces of work, which follow done others: one in every world_size."""
    return range((rank() - done) % world_size(), n, world_size())


def my_batches(batches: Sequence, desc: str) -> Iterable[tuple[Any, bool]]:
    """The batches that this process encodes, and True; the first, and False where it is another's, so that each process
    sees the shapes. With a progress bar."""
    mine = my_indices(len(batches))
    chosen = [(batch, number in mine) for number, batch in enumerate(batches) if number in mine or number == 0]
    return progress(chosen, desc=desc, unit="batch")


def progress(*args: Any, **more: Any) -> tqdm:
    """A progress bar of tqdm, which only the first process shows, on a terminal only, until it has ended."""
    return tqdm(*args, leave=False, disable=True if rank() > 0 else None, **more)


# ---------------------------------------------------------------- sums


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' x, in place."""
    if world_size() > 1:
        with report_lost_peer():
            dist.all_reduce(x)
    return x


def any_process(condition: Any) -> bool:
    """True in all processes where condition is true in any of them."""
    return bool(all_reduce_sum(torch.tensor(int(bool(condition)))))


def barrier() -> None:
    """Wait until all processes are here."""
    any_process(False)


def all_reduce_gradients(parameters: list, mean: bool = False) -> None:
    """Replace each gradient by the sum, or the mean, of all processes', in one message."""
    if world_size() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sums = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters]))
        if mean:
            sums /= world_size()
        for p, gradient in zip(parameters, sums.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(gradient.view_as(p))


# ---------------------------------------------------------------- gathering


class Gather(torch.autograd.Function):
    """All processes' x (n, …), in the order of ranks: (Σ counts, …). counts: n of each process.

    The gradient is the sum of what all processes have of it: each computes something else from all rows.
    """

    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])  # NCCL sends messages of one size only
        padded[: len(x)] = x
        blocks = [torch.empty_like(padded) for _ in counts]
        with report_lost_peer():
            dist.all_gather(blocks, padded)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce_sum(gradient.contiguous().clone()).split(ctx.counts)[rank()], None


def gather(x: torch.Tensor) -> torch.Tensor:
    """All processes' rows x (n, …), in the order of ranks, where all compute the same from them: the gradient that
    each has of its own rows is whole."""
    if world_size() == 1:
        return x
    counts = gather_ints([len(x)])
    blocks = list(Gather.apply(x.detach(), counts).split(counts))
    blocks[rank()] = x
    return torch.cat(blocks)


def gather_ints(numbers: Iterable[int]) -> list:
    """All processes' integers, in the order of ranks; each process may have another number of them."""
    mine = torch.tensor(list(numbers), dtype=torch.int64)
    if world_size() == 1:
        return mine.tolist()
    counts = Gather.apply(torch.tensor([len(mine)]), [1] * world_size()).tolist()
    return Gather.apply(mine, counts).tolist()


def same_in_all_processes(numbers: Iterable[int]) -> bool:
    """Whether all processes have the same integers, equally many."""
    mine = list(numbers)
    return world_size() == 1 or gather_ints([len(mine), *mine]) == [len(mine), *mine] * world_size()


# ---------------------------------------------------------------- a batch


def gather_captions(embeddings: tuple) -> tuple:
    """What forward_emb returns of this process's pairs, with the captions of the whole batch, with gradient.

    The words (n, W, D) stand before the lengths, which are the only integers, the images' embeddings before them.
    """
    if world_size() == 1:
        return embeddings
    at = next(i for i, x in enumerate(embeddings) if not isinstance(x, torch.Tensor) or not x.is_floating_point())
    (words, lengths), more = embeddings[at - 1 : at + 1], embeddings[at + 1 :]
    lengths = gather_ints(int(n) for n in lengths)
    counts = gather_ints([len(words)])
    words = torch.nn.functional.pad(words, (0, 0, 0, max(lengths) - words.shape[1]))
    words, *rest = (Gather.apply(x, counts) for x in (words, *more))
    return *embeddings[: at - 1], words, lengths, *rest


def local_pairs(n: int, negatives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positives (n, 2) and negatives (P, 2) of this process's n images: an image's index, and a caption's in the batch.

    negatives: of the whole batch, by image.
    """
    numbers = torch.arange(n, device=negatives.device)
    first = sum(gather_ints([n])[: rank()])
    positives = torch.stack([numbers, numbers + first], 1)
    if world_size() > 1:
        image = negatives[:, 0] - first
        mine = (image >= 0) & (image < n)
        negatives = torch.stack([image, negatives[:, 1]], 1)[mine]
    return positives, negatives


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process computes as the only one."""
    global is_alone
    is_alone = True
    try:
        yield
    finally:
        is_alone = False
