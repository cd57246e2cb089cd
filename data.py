"""Dataset folders → batches. Features stay on disk, memory-mapped.

A folder holds for each split SPLIT_ims.npy (features), SPLIT_boxes.npy (position grids) and SPLIT_caps.txt.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lib import distributed, workers
from lib.datasets.checks import check_grids, rows_per_image
from lib.errors import InputError
from lib.files import open_npy, read_ahead, read_lines
from lib.options import option
from vocab import from_txt, unknown_words_message

log = logging.getLogger(__name__)

SAMPLED_CAPTIONS = 1000  # looked at for unknown words
SEED_MODULUS = 2**32 - 5  # a prime; PyTorch's generator takes 32 bits


class ImageCaptions(Protocol):
    """What evaluation asks of a split; training asks for items that collate_fn can batch.

    prefix: names the split in messages. n_images: different images. captions: list of str; image i's are the i-th of
    n_images equal parts.
    """

    prefix: str
    n_images: int
    captions: list[str]

    def features(self, images: int | Sequence[int]) -> tuple[Tensor, ...]:
        """What model.encode_images takes of an image, or of several, stacked."""

    def encode_caption(self, index: int) -> Tensor:
        """Word ids (W,) int64 of a caption."""


class PrecompDataset(Dataset):
    """One split of a folder of precomputed region features; an item for every pair of an image and its caption.

    images, boxes: memory-mapped files. captions: list of str. n_images: different images. im_div: captions per image.
    repeats: rows of the files per image (1, or im_div where they repeat each image). opt: options of the run; without,
    img_dim is not checked, and the rest is by default. With position none SPLIT_boxes.npy is not read and items have
    boxes of shape (R, 0). With captions_optional a split without a caption file has images only, and no items.
    Raises InputError where files are missing or do not fit together.
    """

    numbers_only = False  # once the features lie on a GPU: items have an image's number in their place

    def __init__(self, data_path, data_split, vocab, opt=None, captions_optional=False):
        self.vocab, self.opt = vocab, opt
        self.prefix = os.path.join(data_path, data_split)
        without_captions = captions_optional and not os.path.exists(self.caption_path())
        allow_empty = option(opt, "allow_empty_captions")
        self.captions = [] if without_captions else from_txt(self.caption_path(), allow_empty)
        self.encoded = [None] * len(self.captions)  # word ids as bytes, the smallest form
        self.need_boxes = option(opt, "position") != "none"
        self.open_files()
        path, shape, img_dim = self.prefix + "_ims.npy", self.images.shape, getattr(opt, "img_dim", None)
        if len(shape) != 3 or 0 in shape or img_dim not in (None, shape[2]):
            size = "img_dim" if img_dim is None else f"--img_dim {img_dim}"
            raise InputError(f"{path}: found {shape}, expected (images, regions, {size})")
        self.count()
        if self.need_boxes:
            self.check_boxes()
        self.warn_unknown()

    # ---- what a variant replaces

    def caption_path(self):
        return self.prefix + "_caps.txt"

    def open_files(self):
        """Memory-map the files; called again in each loading process."""
        self.images = open_npy(self.prefix + "_ims.npy")
        self.boxes = open_npy(self.prefix + "_boxes.npy") if self.need_boxes else None

    def box_counts(self):
        """Boxes that an image may have: one for each region."""
        return (self.images.shape[1],)

    def features(self, images):
        """Region features (…, R, img_dim), of the file's float type, and grids (…, R, 30 | 31 | 0), float32, of an
        image (its number) or of several, stacked.

        Raises InputError naming the image where a feature is NaN or infinite.
        """
        return self.read_rows(self.images, "_ims.npy", images), self.read_grids(images)

    # ---- reading

    def read_rows(self, file, suffix, images):
        """Rows (…) of images in an opened file, whose name ends in suffix."""
        index = np.asarray(images)
        rows = file[index * self.repeats]
        rows = torch.from_numpy(np.array(rows, dtype=None if rows.dtype in (np.float16, np.float32) else np.float32))
        # a sum is NaN or infinite as soon as one of its terms is, and reads the features once
        if not torch.isfinite(rows.sum(dtype=torch.float32)):
            finite = torch.isfinite(rows).reshape(index.size, -1).all(1)
            if not finite.all():
                image = index.reshape(-1)[int(finite.int().argmin())]
                raise InputError(f"{self.prefix}{suffix}, image {image}: NaN or infinite features, expected numbers")
        return rows

    def read_grids(self, images):
        index = np.asarray(images)
        if not self.need_boxes:
            return torch.zeros(*index.shape, self.images.shape[1], 0)
        return torch.from_numpy(np.array(self.boxes[index * (len(self.boxes) // self.n_images)], dtype=np.float32))

    def encode_caption(self, index):
        """Word ids (W,) int64 of caption index; each process tokenises a caption once."""
        if self.encoded[index] is None:
            self.encoded[index] = np.array(self.vocab.encode(self.captions[index]), dtype=np.int32).tobytes()
        return torch.from_numpy(np.frombuffer(self.encoded[index], dtype=np.int32).astype(np.int64))

    def __len__(self):
        return max(self.n_images, len(self.captions)) if self.captions else 0

    def image_of(self, index):
        return index * self.n_images // len(self)

    def __getitem__(self, index):
        """(image (R, img_dim), box (R, 30 | 31 | 0), target (W,), index, img_id)."""
        img_id = self.image_of(index)
        features = (torch.tensor(img_id),) if self.numbers_only else self.features(img_id)
        return *features, self.encode_caption(index * len(self.captions) // len(self)), index, img_id

    def __getitems__(self, indices):
        """The items of a batch, which a DataLoader asks for. In a loading process an InputError is returned instead."""
        if not self.numbers_only:
            read_ahead(self.images, [self.image_of(index) * self.repeats for index in indices])
        try:
            return [self[index] for index in indices]
        except InputError as error:
            if not workers.is_loading:
                raise
            return error

    def __getstate__(self):  # a copy sent to a loading process opens the files again instead of carrying their contents
        return {**self.__dict__, "images": None, "boxes": None, "encoded": [None] * len(self.captions)}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.open_files()

    # ---- checks

    def count(self):
        rows, n_captions = len(self.images), len(self.captions)
        if n_captions and max(rows, n_captions) % min(rows, n_captions):
            raise InputError(
                f"{self.prefix}: {rows} images in _ims.npy and {n_captions} captions, expected one to be a multiple "
                "of the other"
            )
        self.repeats = rows_per_image(self.prefix + "_ims.npy", self.images) if rows == n_captions else 1
        self.n_images = rows // self.repeats
        self.im_div = max(1, n_captions // self.n_images)

    def check_boxes(self):
        path = self.prefix + "_boxes.npy"
        check_grids(path, self.boxes, self.box_counts())
        if len(self.boxes) not in (len(self.images), self.n_images):
            raise InputError(f"{path}: {len(self.boxes)} images, but {len(self.images)} in {self.prefix}_ims.npy")

    def warn_unknown(self):
        """Log a warning where most words of a sample of the captions are not in the vocabulary."""
        sample = self.captions[:: len(self.captions) // SAMPLED_CAPTIONS + 1]
        ids = [i for caption in sample for i in self.vocab.encode(caption)[1:-1]]
        unknown = ids.count(self.vocab.word2idx[self.vocab.unknown])
        if warning := unknown_words_message(self.caption_path(), unknown, len(ids)):
            log.warning(warning)

    # ---- ids

    def read_id_lines(self):
        """The lines (list of str) of SPLIT_ids.txt, one for each image, row or caption; None where it is missing.

        Raises InputError for another number of lines.
        """
        path = self.prefix + "_ids.txt"
        if not os.path.exists(path):
            return None
        ids = read_lines(path)
        if len(ids) < self.n_images or len(ids) not in (self.n_images, len(self.images), len(self.captions)):
            raise InputError(f"{path}: {len(ids)} ids for {self.n_images} images, expected as many")
        return ids

    def read_ids(self):
        """Ids (list of str), one an image, of SPLIT_ids.txt; None where it is missing. Raises as read_id_lines."""
        ids = self.read_id_lines()
        return ids if ids is None else ids[:: len(ids) // self.n_images]

    # ---- loaders

    @classmethod
    def get_precomp_loader(cls, data_path, data_split, vocab, opt, batch_size=100, shuffle=True, num_workers=2, **more):
        """A DataLoader of a split's batches, in order or shuffled. more: other arguments of the data set."""
        return make_loader(cls(data_path, data_split, vocab, opt, **more), opt, batch_size, shuffle, num_workers)

    @classmethod
    def get_loaders(cls, data_name, vocab, batch_size, workers, opt):
        """Loaders of the train split (shuffled) and the whole dev split (in order) of opt.data_path/data_name."""
        path = os.path.join(opt.data_path, data_name)
        train = cls.get_precomp_loader(path, "train", vocab, opt, batch_size, True, workers)
        return train, cls.get_precomp_loader(path, "dev", vocab, opt, batch_size, False, workers)

    @classmethod
    def get_test_loader(cls, split_name, data_name, vocab, batch_size, workers, opt, **more):
        """Loader of a split of opt.data_path/data_name, in order. more: other arguments of the data set."""
        path = os.path.join(opt.data_path, data_name)
        return cls.get_precomp_loader(path, split_name, vocab, opt, batch_size, False, workers, **more)


get_precomp_loader = PrecompDataset.get_precomp_loader
get_loaders = PrecompDataset.get_loaders
get_test_loader = PrecompDataset.get_test_loader


def collate_fn(data: list) -> Any:
    """Batch items, longest caption first.

    Returns images (B, R, img_dim), boxes (B, R, 30 | 31 | 0), targets (B, W) int64 padded with 0,
    lengths (list of B int), ids (tuple of B int, which item each row is). In a loading process the tensors are in
    shared memory, and an InputError is returned.
    """
    if isinstance(data, InputError):
        return data
    data.sort(key=lambda item: len(item[-3]), reverse=True)
    *features, captions, ids, _ = zip(*data, strict=True)
    tensors = *map(torch.stack, features), pad(list(captions))
    try:
        return *map(workers.share, tensors), [len(caption) for caption in captions], ids
    except InputError as error:
        if not workers.is_loading:
            raise
        return error


def pad(captions: list[Tensor]) -> Tensor:
    """Word ids, a list of (W_i,) tensors → (B, W) int64, padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)


class EpochBatches(Sampler):
    """Batches of n items, in a new order each epoch that depends on seed and epoch only, so that a run can be resumed.

    Several processes each get their share of a batch. first: how many of the epoch's batches are done already.
    """

    def __init__(self, n, batch_size, seed):
        self.n, self.batch_size, self.seed, self.epoch, self.first = n, batch_size, seed, 0, 0

    def __iter__(self):
        generator = torch.Generator().manual_seed(((self.seed << 20) + self.epoch) % SEED_MODULUS)
        order = torch.randperm(self.n, generator=generator).tolist()
        for start in range(self.first * self.batch_size, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield batch[distributed.local_slice(len(batch))]

    def __len__(self):
        return -(-self.n // self.batch_size)


def make_loader(dataset: Dataset, opt: Any, batch_size: int, shuffle: bool, num_workers: int) -> DataLoader:
    """A DataLoader of collate_fn's batches of any data set, in order, or shuffled by opt.seed and the epoch.

    num_workers: loading processes, at most one a core. Batches for a GPU are in pinned memory.
    """
    order = {"batch_size": batch_size}
    if shuffle:
        order = {"batch_sampler": EpochBatches(len(dataset), batch_size, option(opt, "seed"))}
    pinned = distributed.pick_device(option(opt, "device")).type == "cuda"
    return workers.Loader(dataset, num_workers, collate_fn=collate_fn, pin_memory=pinned, **order)
