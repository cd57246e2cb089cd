"""Dataset folders → batches. Features stay on disk, memory-mapped; see README, "Data layout", for the files."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from lib import distributed
from lib.constants import N_CELLS, N_SLOTS
from lib.errors import InputError
from lib.files import open_npy
from lib.options import option
from vocab import read_captions


class PrecompDataset(Dataset):
    """One split of a folder of precomputed region features; an item for every pair of an image and its caption.

    images, boxes: memory-mapped files. captions: list of str. n_images: different images.
    im_div: captions per image. repeats: files' rows per image (1, or im_div where they repeat each image).
    With need_boxes False (position none) SPLIT_boxes.npy is not read and items have boxes of shape (R, 0).
    Raises InputError where files are missing or do not fit together.
    """

    reading = None  # shared with loading processes, see watched_workers

    def __init__(self, data_path, data_split, vocab, img_dim=None, need_boxes=True, allow_empty_captions=False):
        self.vocab = vocab
        self.prefix = os.path.join(data_path, data_split)
        self.captions = read_captions(self._caption_path(), allow_empty_captions)
        self.need_boxes = need_boxes
        self._open()
        path, shape = self.prefix + "_ims.npy", self.images.shape
        if len(shape) != 3 or 0 in shape or img_dim not in (None, shape[2]):
            raise InputError(f"{path}: found {shape}, expected (images, regions, {img_dim or 'img_dim'})")
        self._count()
        if need_boxes:
            self._check_boxes()

    def _caption_path(self):
        return self.prefix + "_caps.txt"

    def _open(self):
        self.images = open_npy(self.prefix + "_ims.npy")
        self.boxes = open_npy(self.prefix + "_boxes.npy") if self.need_boxes else None

    def __getstate__(self):  # a copy sent to a worker opens the files again instead of carrying their contents
        return {**self.__dict__, "images": None, "boxes": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def _count(self):
        rows, n_captions = len(self.images), len(self.captions)
        if max(rows, n_captions) % min(rows, n_captions):
            raise InputError(
                f"{self.prefix}: {rows} images in _ims.npy and {n_captions} captions, expected one to be a multiple "
                "of the other"
            )
        self.repeats = run_length(self.images) if rows == n_captions else 1
        self.n_images = rows // self.repeats
        self.im_div = max(1, n_captions // self.n_images)

    def _box_counts(self):
        """Boxes that an image may have: one for each region."""
        return (self.images.shape[1],)

    def _check_boxes(self):
        path, shape = self.prefix + "_boxes.npy", self.boxes.shape
        if len(shape) != 3 or shape[1] not in self._box_counts() or shape[2] not in (2 * N_SLOTS, 2 * N_SLOTS + 1):
            regions = " or ".join(map(str, self._box_counts()))
            raise InputError(f"{path}: found {shape}, expected ({len(self.images)}, {regions}, 30 or 31)")
        if len(self.boxes) not in (len(self.images), self.n_images):
            raise InputError(f"{path}: {len(self.boxes)} images, but {len(self.images)} in {self.prefix}_ims.npy")
        for start in range(0, len(self.boxes), 1024):
            block = np.asarray(self.boxes[start : start + 1024, :, : 2 * N_SLOTS])
            cells, weights = np.split(block, 2, axis=2)
            with np.errstate(invalid="ignore"):  # NaN, which the comparison finds
                bad_cells = ~((cells >= 0) & (cells <= N_CELLS) & (cells == np.floor(cells)))
            if bad_cells.any():
                image, region, slot = np.argwhere(bad_cells)[0]
                raise InputError(
                    f"{path}, image {start + image}, region {region}: cell index {cells[image, region, slot]}, "
                    f"expected 0 to {N_CELLS}"
                )
            bad_weights = ~((weights >= 0) & (weights <= 1.001))  # the tolerance is for float16
            if bad_weights.any():
                image, region, slot = np.argwhere(bad_weights)[0]
                raise InputError(
                    f"{path}, image {start + image}, region {region}: weight {weights[image, region, slot]}, "
                    "expected 0 to 1"
                )

    def read_images(self, start, stop):
        """Features (n, R, img_dim) and grids (n, R, 30 | 31 | 0) of the images start…stop-1 as float32 tensors.

        Raises InputError naming the image where a feature is NaN or infinite.
        """
        images = self.read_features(self.images, "_ims.npy", start, stop)
        if not self.need_boxes:
            return images, images.new_zeros(*images.shape[:2], 0)
        step = len(self.boxes) // self.n_images
        return images, torch.from_numpy(np.array(self.boxes[start * step : stop * step : step], dtype=np.float32))

    def read_features(self, file, suffix, start, stop):
        """Rows (n, …) of the images start…stop-1 in an opened file, whose name ends in suffix."""
        step = self.repeats
        features = torch.from_numpy(np.array(file[start * step : stop * step : step], dtype=np.float32))
        # a sum is NaN or infinite as soon as one of its terms is, and reads the features once
        if not torch.isfinite(features.sum()) and not (finite := torch.isfinite(features).flatten(1).all(1)).all():
            image = start + int(finite.int().argmin())
            raise InputError(f"{self.prefix}{suffix}, image {image}: NaN or infinite features, expected numbers")
        return features

    def encode_caption(self, index):
        """Word ids (W,) int64 of caption index."""
        return torch.tensor(self.vocab.encode(self.captions[index]))

    def __getitem__(self, index):
        """(image (R, img_dim), box (R, 30 | 31 | 0), target (W,), index, img_id)."""
        if self.reading is not None and (worker := get_worker_info()):
            self.reading[worker.id, 1] = index
        img_id = index * self.n_images // len(self)
        image = [rows[0] for rows in self.read_images(img_id, img_id + 1)]
        return *image, self.encode_caption(index * len(self.captions) // len(self)), index, img_id

    def __len__(self):
        return max(self.n_images, len(self.captions))


def run_length(images: np.ndarray) -> int:
    """Length of the runs of identical consecutive rows of images (n, R, D): captions per image where rows repeat.

    Two equal pictures side by side lengthen one run only, so the greatest common divisor of the runs' lengths counts.
    A few values of each row tell most rows apart. Rows that agree there are compared whole: some of them, and all
    as soon as those show that the few values are not enough.
    """
    sample = np.asarray(images[:, :: max(1, images.shape[1] // 8), :: max(1, images.shape[2] // 8)])
    equal = (sample[1:] == sample[:-1]).all(axis=(1, 2))
    alike = np.flatnonzero(equal)
    for pairs in (alike[:: len(alike) // 256 + 1], alike):
        equal[pairs] = [np.array_equal(images[row], images[row + 1]) for row in pairs]
        if equal[pairs].all():
            break
    starts = np.flatnonzero(~equal) + 1
    return int(np.gcd.reduce(np.diff([0, *starts, len(images)])))


def collate_fn(data: list) -> tuple:
    """Batch items, longest caption first.

    Returns images (B, R, img_dim), boxes (B, R, 30 | 31 | 0), targets (B, W) int64 padded with 0,
    lengths (list of B int), ids (tuple of B int, which item each row is); () for no items.
    """
    if not data:
        return ()
    data.sort(key=lambda item: len(item[-3]), reverse=True)
    *images, captions, ids, _ = zip(*data, strict=True)
    lengths = [len(caption) for caption in captions]
    return *map(torch.stack, images), pad(list(captions)), lengths, ids


def pad(captions: list[Tensor]) -> Tensor:
    """Word ids, a list of (W_i,) tensors → (B, W) int64, padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)


class EpochBatches(Sampler):
    """Batches of a new order of n items each epoch, given by seed and epoch alone: a resumed run goes on as it would
    have. Of each batch a process gets its share. first: how many of the epoch's batches are done already."""

    def __init__(self, n, batch_size, seed):
        self.n, self.batch_size, self.seed, self.epoch, self.first = n, batch_size, seed, 0, 0

    def __iter__(self):
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.n, generator=generator).tolist()
        for at in range(self.first * self.batch_size, self.n, self.batch_size):
            batch = order[at : at + self.batch_size]
            yield batch[distributed.local_slice(len(batch))]

    def __len__(self):
        return -(-self.n // self.batch_size)


def get_precomp_dataset(data_name: str, data_split: str, vocab: Any, opt: Any) -> PrecompDataset:
    """The PrecompDataset of a split under opt.data_path/data_name, as opt's flags ask for."""
    return PrecompDataset(
        os.path.join(opt.data_path, data_name),
        data_split,
        vocab,
        img_dim=opt.img_dim,
        need_boxes=option(opt, "position") != "none",
        allow_empty_captions=option(opt, "allow_empty_captions"),
    )


def get_precomp_loader(dataset: Any, batch_size: int, workers: int, shuffle_seed: int | None = None) -> DataLoader:
    """A DataLoader of collate_fn's batches, in order or shuffled by seed and its batch sampler's epoch."""
    workers = min(workers, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dataset.reading = torch.zeros(workers + 1, 2, dtype=torch.int64).share_memory_() if workers else None
    order = {"batch_size": batch_size}
    if shuffle_seed is not None:
        order = {"batch_sampler": EpochBatches(len(dataset), batch_size, shuffle_seed)}
    return DataLoader(
        dataset,
        **order,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate_fn,
        generator=torch.Generator(),  # its own, so that loading leaves the random state of training alone
    )


def start_worker(number: int) -> None:
    """In a loading process: note its id, leave Ctrl-C to the process that trains, and SIGTERM as long as that lasts."""
    table = get_worker_info().dataset.reading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if table[-1, 0] else os._exit(0))
    table[number, 0] = os.getpid()


@contextmanager
def watched_workers(dataset: Any) -> Iterator[None]:
    """While this lasts, a loading process that dies becomes an InputError that names what it was reading.

    dataset.reading (workers + 1, 2) has a row for each loading process, its id and the item that it reads; the last
    row says whether this lasts.
    """
    table = dataset.reading if dataset.reading is not None else torch.zeros(1, 2)
    table[-1, 0] = 1
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        dead = set(map(int, found[1].split(","))) if found else ()
        for pid, index in table[:-1].tolist():
            if pid in dead:
                image, line = (index * n // len(dataset) for n in (dataset.n_images, len(dataset.captions)))
                raise InputError(
                    f"{dataset.prefix}: a loading process died when it read pair {index}, which is image {image} and "
                    f"caption line {line + 1} ({str(error).strip().splitlines()[0]})"
                ) from None
        raise
    finally:
        table[-1, 0] = 0


def get_loaders(
    data_name: str, vocab: Any, batch_size: int, workers: int, opt: Any, make_dataset: Callable = get_precomp_dataset
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the train split (shuffled) and the whole dev split (in order)."""
    train, dev = (make_dataset(data_name, split, vocab, opt) for split in ("train", "dev"))
    return (
        get_precomp_loader(train, batch_size, workers, shuffle_seed=option(opt, "seed")),
        get_precomp_loader(dev, batch_size, workers),
    )


def get_test_loader(
    split_name: str,
    data_name: str,
    vocab: Any,
    batch_size: int,
    workers: int,
    opt: Any,
    make_dataset: Callable = get_precomp_dataset,
) -> DataLoader:
    """Loader of a split, in order."""
    return get_precomp_loader(make_dataset(data_name, split_name, vocab, opt), batch_size, workers)
