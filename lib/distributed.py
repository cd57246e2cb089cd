"""Several processes that train or evaluate as one, over PyTorch's own engine: gloo between CPUs, NCCL between GPUs.

torchrun --nproc_per_node 4 train.py --batch_size 128 …     128 is the whole batch, each process encodes 32 pairs of it

The loss is that of the whole batch. Captions travel and images stay: a process gets the words of every caption of the
batch and scores its own images against them, so that the score matrix is divided by rows. Gradients are then added up.
In a process that torchrun did not start, every function here returns what it was given.
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


def pick_device(name: str = "auto") -> torch.device:
    """A torch.device: the one named, or for auto CUDA where there is one, the CPU otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def start(device: str) -> None:
    """Join the other processes, where torchrun started several. All but the first are silent from then on.

    device: the --device flag. With CUDA each process takes the GPU of its own number on its machine.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: expected auto, cpu or cuda where there are several processes")
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise InputError(f"--nproc_per_node: more processes than GPUs on this machine, which has {there}")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    with report_lost_peer():
        dist.init_process_group(backend)
    if rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays for the life of the process)


def stop() -> None:
    """Leave the other processes; for a run's orderly end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def report_lost_peer() -> Iterator[None]:
    """Say in one line that another process is gone, wherever processes wait for each other."""
    try:
        yield
    except RuntimeError as error:
        if is_worker_crash(error):
            raise
        where = f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{where}: another process has ended, so this one ends as well ({reason})") from None


def local_slice(n: int) -> slice:
    """Which of a batch's n pairs are this process's. Too few for all of them to have one are the first process's."""
    if n < world_size():
        return slice(0, n if rank() == 0 else 0)
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def my_indices(n: int, done: int = 0) -> range:
    """Which of n equal pieces of work, after done others, are this process's: every size-th."""
    return range((rank() - done) % world_size(), n, world_size())


# ---------------------------------------------------------------- sums


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """x of all processes added up, in place."""
    if world_size() > 1:
        with report_lost_peer():
            dist.all_reduce(x)
    return x


def any_process(condition: Any) -> bool:
    """Whether condition holds in any process."""
    return bool(all_reduce_sum(torch.tensor(int(bool(condition)))))


def barrier() -> None:
    """Until all processes are here."""
    any_process(False)


def same_in_all_processes(number: int) -> bool:
    """Whether all processes have the same number."""
    return len(set(gather_ints([number]))) == 1


class SumOverProcesses(torch.autograd.Function):
    """The parts of a sum added up, in every process; each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx, part):
        return all_reduce_sum(part.clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def sum_over_processes(part: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' parts, with gradient."""
    return SumOverProcesses.apply(part) if world_size() > 1 else part


def all_reduce_gradients(parameters: list) -> None:
    """Give every process the sum of all processes' gradients, in one message."""
    if world_size() > 1:
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sums = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters]))
        for p, gradient in zip(parameters, sums.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(gradient.view_as(p))


# ---------------------------------------------------------------- gathering


class GatherRows(torch.autograd.Function):
    """Every process's rows x (n, …), one after the other: (Σ counts, …). counts: how many rows each process has."""

    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])  # messages of one size are what every backend can send
        padded[: len(x)] = x
        blocks = [torch.empty_like(padded) for _ in counts]
        with report_lost_peer():
            dist.all_gather(blocks, padded)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce_sum(gradient.contiguous().clone()).split(ctx.counts)[rank()], None


def gather_ints(numbers: Iterable[int]) -> list:
    """Every process's integers, however many, one after the other."""
    own = torch.tensor(list(numbers), dtype=torch.int64)
    if world_size() == 1:
        return own.tolist()
    counts = GatherRows.apply(torch.tensor([len(own)]), [1] * world_size()).tolist()
    return GatherRows.apply(own, counts).tolist()


class Batch:
    """How a batch is divided: counts, the pairs of each process; first, how many come before this process's.

    Made by all processes at once, each from the number of its pairs. A batch that lies with one process alone is not
    shared: there, as where there is one process only, the methods return what they are given.
    """

    def __init__(self, n: int):
        self.counts = gather_ints([n])
        self.shared = 0 not in self.counts and world_size() > 1
        self.first = sum(self.counts[: rank()]) if self.shared else 0

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Rows (n, …) of this process's pairs → of the whole batch's (B, …), with gradient."""
        return GatherRows.apply(x, self.counts) if self.shared else x

    def gather_captions(self, words: torch.Tensor, lengths, *more: torch.Tensor) -> tuple:
        """This process's captions → the whole batch's, with gradient.

        words (n, W, D) padded, lengths (n ints), more: (n, …) each. Returns words, packed as (ΣW_i, D) where the
        batch is shared, lengths (B ints), and more, (B, …) each.
        """
        if not self.shared:
            return words, lengths, *more
        inside = torch.arange(words.shape[1]) < torch.as_tensor(lengths)[:, None]
        lengths = gather_ints(lengths)
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        n_words = [sum(lengths[end - count : end]) for end, count in zip(ends, self.counts, strict=True)]
        words = GatherRows.apply(words[inside.to(words.device)], n_words)
        return words, lengths, *map(self.gather, more)

    def hardest(self, scores: torch.Tensor) -> tuple:
        """Largest score of each column in the whole batch, and its row there; scores (n, B) are this process's rows."""
        best, row = scores.max(0)
        if not self.shared:
            return best, row
        each = GatherRows.apply(best[None], [1] * world_size()).max(0)
        rows = GatherRows.apply(row[None] + self.first, [1] * world_size())
        return each.values, rows.gather(0, each.indices[None])[0]
