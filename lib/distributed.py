"""Several processes that train or evaluate as one, over torch.distributed: gloo between CPUs, NCCL between GPUs.

torchrun --nproc_per_node 4 train.py --batch_size 128 …     128 is the whole batch; each process encodes 32 pairs of it

The loss is that of the whole batch. Each process gathers the words of all captions of the batch and scores its own
images against them, so that the score matrix is divided by rows. Then gradients are summed over the processes.
A process that torchrun did not start behaves as the only one.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lib.errors import InputError, is_worker_crash
from lib.tensors import send


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
    """Join the other processes that torchrun started; all but the first print and log nothing from then on.

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


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def report_lost_peer() -> Iterator[None]:
    """Turn errors of communication into an InputError that says that another process has ended.

    Crashes of a loading process and CUDA's own errors, out of memory among them, are raised as they are.
    """
    try:
        yield
    except RuntimeError as error:
        if is_worker_crash(error) or isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError)):
            raise
        where = f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{where}: another process has ended, so this one ends as well ({reason})") from None


def local_slice(n: int) -> slice:
    """This process's share of a batch of n pairs. With fewer pairs than processes the first process has them all."""
    if n < world_size():
        return slice(0, n if rank() == 0 else 0)
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def my_indices(n: int, done: int = 0) -> range:
    """This process's share of n equal pieces of work, which follow done others: one in every world_size."""
    return range((rank() - done) % world_size(), n, world_size())


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


def same_in_all_processes(number: int) -> bool:
    """True where all processes have the same number."""
    return len(set(gather_ints([number]))) == 1


class SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' terms, in every process; each term's gradient is the sum's."""

    @staticmethod
    def forward(ctx, term):
        return all_reduce_sum(term.clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def sum_over_processes(term: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' terms, with gradient."""
    return SumOverProcesses.apply(term) if world_size() > 1 else term


def all_reduce_gradients(parameters: list) -> None:
    """Replace each gradient by the sum of all processes', in one message."""
    if world_size() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sums = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, gradient in zip(parameters, sums.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(gradient.view_as(p))


# ---------------------------------------------------------------- gathering


class GatherRows(torch.autograd.Function):
    """All processes' rows x (n, …), in the order of ranks: (Σ counts, …). counts: number of rows of each process."""

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


def gather_ints(numbers: Iterable[int]) -> list:
    """All processes' integers, in the order of ranks; each process may have another number of them."""
    mine = torch.tensor(list(numbers), dtype=torch.int64)
    if world_size() == 1:
        return mine.tolist()
    counts = GatherRows.apply(torch.tensor([len(mine)]), [1] * world_size()).tolist()
    return GatherRows.apply(mine, counts).tolist()


class Batch:
    """The division of a batch among the processes; all of them construct it at once, each with the number of its pairs.

    counts: pairs of each process. first: index in the batch of this process's first pair. shared: whether every process
    has pairs; where one has none, the first has all, and the methods return their arguments, as with a single process.
    """

    def __init__(self, n: int):
        self.counts = gather_ints([n])
        self.shared = 0 not in self.counts and world_size() > 1
        self.first = sum(self.counts[: rank()]) if self.shared else 0

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """This process's rows (n, …) → the whole batch's (B, …), with gradient."""
        return GatherRows.apply(x, self.counts) if self.shared else x

    def gather_captions(self, words: torch.Tensor, lengths, *more: torch.Tensor) -> tuple:
        """This process's captions → the whole batch's, with gradient.

        words (n, W, D) padded, lengths (n ints), more: (n, …) each. Returns words, packed as (ΣW_i, D) where the
        batch is shared, lengths (B ints), and more, (B, …) each.
        """
        if not self.shared:
            return words, lengths, *more
        inside = torch.arange(words.shape[1]) < torch.as_tensor(lengths)[:, None]
        rows = send(inside.flatten().nonzero()[:, 0], words.device)
        lengths = gather_ints(lengths)
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        n_words = [sum(lengths[end - count : end]) for end, count in zip(ends, self.counts, strict=True)]
        words = GatherRows.apply(words.flatten(0, 1).index_select(0, rows), n_words)
        return words, lengths, *map(self.gather, more)

    def hardest(self, scores: torch.Tensor) -> tuple:
        """Largest score (B,) of each column in the whole batch, and its row's index in the batch (B,).

        scores (n, B): this process's rows.
        """
        best, row = scores.max(0)
        if not self.shared:
            return best, row
        each = GatherRows.apply(best[None], [1] * world_size()).max(0)
        rows = GatherRows.apply(row[None] + self.first, [1] * world_size())
        return each.values, rows.gather(0, each.indices[None])[0]
