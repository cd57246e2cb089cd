"""Float32 matrix products on CPUs with AMX, whose tiles multiply bfloat16 eight times as fast as vectors do float32.

A float32 number is the sum of three bfloat16 ones of 8 bits each: the nearest, the one nearest to what it leaves, and
what those leave. So a product of float32 matrices is a sum of products of bfloat16 matrices, which the tiles add up in
float32. Parts p and q of the two sides (0 the largest) contribute some 2^-8(p+q) of it; of n parts, those with
p + q < n are multiplied. attention_kernel.py multiplies so, a piece at a time that stays in the cache.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock, Thread
from typing import Any, TypeAlias

import numpy as np
import torch
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Array: TypeAlias = np.ndarray

PARTS = {"highest": 3, "high": 2, "medium": 1}  # of a number, by torch.get_float32_matmul_precision()
BLOCK = 32  # rows and columns of sums at a time: four tiles of 16 × 16; their rows are 64 bytes
STEP = 32  # elements of a dot product that an instruction takes: a row of bfloat16 numbers
DEPTH = 4  # steps before the next block's turn, so that a block's share of both sides stays in the nearest cache
WIDTH = 128  # elements of 16 rows that are brought into tiles at a time, in the nearest cache too
PACKED = 16  # blocks of rows that a thread brings into tiles at a time
PAIR = 2048  # bytes of the two tiles of one side that are multiplied with two of the other

# What the tile registers hold: palette 1; from byte 16 on a row's bytes, from byte 48 on the rows, of eight tiles.
CONFIGURATION = np.frombuffer(bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8]), np.uint8)

# fastmath: no flag that assumes there is no NaN, because it must reach the scores
compiled = njit(nogil=True, fastmath={"contract"}, error_model="numpy")
compiled_inline = njit(fastmath={"contract"}, inline="always")


@cache
def available() -> bool:
    """Whether this processor has the instructions, the compiler knows it, and the system lets this process use them."""
    features = binding.get_host_cpu_features()
    if config.DISABLE_JIT or config.CPU_NAME or config.CPU_FEATURES:  # compiled for another processor, or not at all
        return False
    return bool(features.get("amx-tile") and features.get("amx-bf16") and torch.cpu._init_amx())


# ---------------------------------------------------------------- instructions, for use in compiled functions


def emit(builder: Any, name: str, *tiles: int, at: Any = None, stride: Any = None) -> None:
    """One instruction: the tile registers that it names, and possibly an address and the bytes from row to row."""
    arguments = [ir.Constant(ir.IntType(8), number) for number in tiles]
    arguments += [builder.inttoptr(at, ir.IntType(8).as_pointer())] if at else []
    arguments += [stride] if stride else []
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def emit_for_sums(name: str) -> Any:
    """What a compiled function does with the four tiles of sums and a float32 matrix: address, bytes of a row."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, stride = arguments
        for number in range(4):
            below = builder.mul(stride, stride.type(16 * (number // 2)))
            at = builder.add(builder.add(address, below), stride.type(64 * (number % 2)))
            emit(builder, name, number, at=at, stride=stride)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def load_sums(typing: Any, address: Any, stride: Any) -> Any:
    return emit_for_sums("tileloadd64")


@intrinsic
def store_sums(typing: Any, address: Any, stride: Any) -> Any:
    return emit_for_sums("tilestored64")


@intrinsic
def clear_sums(typing: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for number in range(4):
            emit(builder, "tilezero", number)
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def configure(typing: Any, address: Any) -> Any:
    """Each thread has to, before anything else here."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, "ldtilecfg", at=arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def release(typing: Any) -> Any:
    """After the last of these: a thread without tiles is cheaper to switch."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        emit(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), code


def load_pair(builder: Any, first: int, address: Any) -> None:
    """Tiles first and first + 1 from an address and the 1,024 bytes after it."""
    for half in range(2):
        at = builder.add(address, address.type(half * PAIR // 2))
        emit(builder, "tileloadd64", first + half, at=at, stride=address.type(64))


@intrinsic
def load_left(typing: Any, address: Any) -> Any:
    """Two tiles of the left side."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        load_pair(builder, 4, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def add_products(typing: Any, address: Any) -> Any:
    """The sums += the products of the left side's two tiles with the two of the right side at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        load_pair(builder, 6, arguments[0])
        for number in range(4):
            emit(builder, "tdpbf16ps", number, 4 + number // 2, 6 + number % 2)
        return context.get_dummy_value()

    return types.void(types.int64), code


# ---------------------------------------------------------------- products


starting = Lock()  # held by a thread of the pool while it starts


def compute_alone() -> None:
    """Keep torch's computations of this thread in this thread from now on.

    torch.set_num_threads also sets the number that later threads start with; another thread sets that back.
    """
    with starting:
        before = torch.get_num_threads()  # asked first: a thread's first question or product undoes what it set before
        torch.set_num_threads(1)
        other = Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, initializer=compute_alone)


def in_threads(work: Callable[[int, int], Any], count: int, shares: int = 1) -> None:
    """work(first, last) for all of count things, in shares for each of torch.get_num_threads() threads."""
    threads = torch.get_num_threads()
    cuts = np.linspace(0, count, min(count, threads * shares) + 1).astype(int).tolist()
    if threads == 1 or count == 1:
        work(0, count)
    else:
        list(pool(threads).map(work, cuts[:-1], cuts[1:]))


@compiled
def pack(X: Array, index: Array, right: bool, blocks: Array, first: int, last: int) -> None:
    """Blocks first to last of one side of a product: rows index (32 · blocks) of X (rows, D), zeros for -1.

    blocks (parts, blocks, D/32, 2, 16, 16) uint32: pairs of bfloat16 numbers that follow each other in a row of X, as
    tiles of 16 rows of X × 16 pairs for the left side, of 16 pairs × 16 rows of X for the right one.
    """
    rest, part, pairs = np.empty(WIDTH, np.float32), np.empty(WIDTH, np.float32), np.empty(WIDTH // 2, np.uint32)
    rest_bits, bits = rest.view(np.uint32), part.view(np.uint32)
    for tile_row in range(2 * first, 2 * last):
        for column in range(0, X.shape[1], WIDTH):
            width = min(WIDTH, X.shape[1] - column)
            for line in range(16):
                source = index[16 * tile_row + line]
                for k in range(width):
                    rest[k] = X[source, column + k] if source >= 0 else 0
                for p in range(len(blocks)):
                    for k in range(width):  # to the nearest bfloat16 number, an even one of two
                        odd = (rest_bits[k] >> np.uint32(16)) & np.uint32(1)
                        bits[k] = (rest_bits[k] + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
                    for k in range(width):
                        rest[k] -= part[k]
                    for k in range(width // 2):
                        pairs[k] = (bits[2 * k] >> np.uint32(16)) | bits[2 * k + 1]
                    for step in range(width // STEP):
                        tile = blocks[p, tile_row // 2, column // STEP + step, tile_row % 2]
                        if right:
                            for pair in range(16):
                                tile[pair, line] = pairs[16 * step + pair]
                        else:
                            for pair in range(16):
                                tile[line, pair] = pairs[16 * step + pair]


@compiled
def multiply(
    left: int,
    left_part: int,
    right: int,
    right_part: int,
    steps: int,
    parts: int,
    sums: int,
    rows: int,
    columns: int,
    stride: int,
) -> None:
    """The float32 matrix at sums, blocks rows × columns, each of its rows stride bytes long = left · rightᵀ.

    left, right: addresses of the first blocks of what pack has made; left_part, right_part: bytes of all blocks of one
    of their parts.
    """
    for first in range(0, steps, DEPTH):
        last = min(first + DEPTH, steps)
        for i in range(rows):
            for j in range(columns):
                at = sums + i * BLOCK * stride + j * BLOCK * 4
                if first == 0:
                    clear_sums()
                else:
                    load_sums(at, stride)
                a, b = left + (i * steps + first) * PAIR, right + (j * steps + first) * PAIR
                for _ in range(first, last):
                    for p in range(parts):
                        load_left(a + p * left_part)
                        for q in range(parts - p):
                            add_products(b + q * right_part)
                    a += PAIR
                    b += PAIR
                store_sums(at, stride)


def side(wanted: Sequence[tuple[torch.Tensor, Array]], parts: int, right: bool) -> torch.Tensor:
    """One side of products as multiply takes it.

    wanted: X (rows, D), float32 on the CPU, and index (n,): the rows of X that it shall hold, -1 for zeros; n and D
    must be multiples of 32. Several follow one another. parts: of each number, one of PARTS. Returns
    (parts, Σn/32, D/32, 2, 16, 16) int32, in torch's memory because that begins at a multiple of 64 bytes: from other
    places tiles load half as fast.
    """
    D = wanted[0][0].shape[1]
    ends = np.cumsum([len(index) // BLOCK for _, index in wanted]).tolist()
    blocks = torch.empty((parts, ends[-1], D // STEP, 2, 16, 16), dtype=torch.int32)
    bits, jobs = blocks.numpy().view(np.uint32), []
    for (X, index), end in zip(wanted, ends, strict=True):
        rows, X_blocks = X.detach().contiguous().numpy(), bits[:, end - len(index) // BLOCK : end]
        for first in range(0, X_blocks.shape[1], PACKED):
            jobs.append((rows, index, right, X_blocks, first, min(first + PACKED, X_blocks.shape[1])))
    in_threads(lambda first, last: [pack(*job) for job in jobs[first:last]], len(jobs))
    return blocks
