"""Dataset folders → batches. Features stay on disk, memory-mapped.

A folder holds for each split SPLIT_ims.npy (features), SPLIT_boxes.npy (position grids) and SPLIT_caps.txt.
"""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lib import distributed
from lib.constants import N_CELLS, N_SLOTS
from lib.datasets.checks import bad_cells, bad_weights, rows_per_image, same_as_previous, unequal_repeats
from lib.errors import InputError
from lib.files import open_npy, read_ahead, read_lines
from lib.gpu import AUTO_SHARE, load_rows
from lib.options import option
from lib.tensors import send
from lib.workers import WorkerLog, check_shared_memory, start_worker
from vocab import read_captions, unknown_words_message

log = logging.getLogger(__name__)

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to a file's rows

PREFETCH = 2  # batches that each loading process keeps ready
SAMPLED_CAPTIONS = 1000  # looked at for unknown words


class PrecompDataset(Dataset):
    """One split of a folder of precomputed region features; an item for every pair of an image and its caption.

    images, boxes: memory-mapped files. captions: list of str. n_images: different images.
    im_div: captions per image. repeats: rows of the files per image (1, or im_div where they repeat each image).
    With need_boxes False (position none) SPLIT_boxes.npy is not read and items have boxes of shape (R, 0).
    With captions_optional a split without a caption file has images only: it can be encoded, and has no items.
    Raises InputError where files are missing or do not fit together.
    """

    worker_log = None  # a WorkerLog, where loading processes read the data set
    on_gpu: list | None = None  # all images' features and grids, once keep_on has put them there

    def __init__(
        self,
        data_path,
        data_split,
        vocab,
        img_dim=None,
        need_boxes=True,
        allow_empty_captions=False,
        captions_optional=False,
    ):
        self.vocab = vocab
        self.prefix = os.path.join(data_path, data_split)
        without_captions = captions_optional and not os.path.exists(self._caption_path())
        self.captions = [] if without_captions else read_captions(self._caption_path(), allow_empty_captions)
        self.encoded = [None] * len(self.captions)  # word ids as bytes, the smallest form
        self.need_boxes = need_boxes
        self._open()
        path, shape = self.prefix + "_ims.npy", self.images.shape
        if len(shape) != 3 or 0 in shape or img_dim not in (None, shape[2]):
            raise InputError(f"{path}: found {shape}, expected (images, regions, {img_dim or 'img_dim'})")
        self._count()
        if need_boxes:
            self._check_boxes()
        self._warn_unknown()

    def _caption_path(self):
        return self.prefix + "_caps.txt"

    def _open(self):
        self.images = open_npy(self.prefix + "_ims.npy")
        self.boxes = open_npy(self.prefix + "_boxes.npy") if self.need_boxes else None

    def __getstate__(self):  # a copy sent to a worker opens the files again instead of carrying their contents
        on_gpu = None if self.on_gpu is None else []  # loading processes only have to know that it is so
        return {
            **self.__dict__,
            "images": None,
            "boxes": None,
            "on_gpu": on_gpu,
            "encoded": [None] * len(self.captions),
        }

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def _count(self):
        rows, n_captions = len(self.images), len(self.captions)
        if n_captions and max(rows, n_captions) % min(rows, n_captions):
            raise InputError(
                f"{self.prefix}: {rows} images in _ims.npy and {n_captions} captions, expected one to be a multiple "
                "of the other"
            )
        self.repeats = 1
        if rows == n_captions:
            same = same_as_previous(self.images)
            if fault := unequal_repeats(same):
                raise InputError(f"{self.prefix}_ims.npy: {fault}")
            self.repeats = rows_per_image(same)
        self.n_images = rows // self.repeats
        self.im_div = max(1, n_captions // self.n_images)

    def _warn_unknown(self):
        """Log a warning where most words of a sample of the captions are not in the vocabulary."""
        sample = self.captions[:: len(self.captions) // SAMPLED_CAPTIONS + 1]
        ids = [i for caption in sample for i in self.vocab.encode(caption)[1:-1]]
        unknown = ids.count(self.vocab.word2idx[self.vocab.unknown])
        if warning := unknown_words_message(self._caption_path(), unknown, len(ids)):
            log.warning(warning)

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
            grids = np.asarray(self.boxes[start : start + 1024])
            for name, bad, first, largest in (
                ("cell index", bad_cells(grids), 0, N_CELLS),
                ("weight", bad_weights(grids), N_SLOTS, 1),
            ):
                if bad.any():
                    image, region, slot = np.argwhere(bad)[0]
                    raise InputError(
                        f"{path}, image {start + image}, region {region}: {name} {grids[image, region, first + slot]}, "
                        f"expected 0 to {largest}"
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
        return self._check_finite(features, suffix, start)

    def _check_finite(self, features, suffix, start):
        """features (n, …) of the images from start on; InputError that names the first with NaN or infinite ones."""
        # a sum is NaN or infinite as soon as one of its terms is, and reads the features once
        if torch.isfinite(features.sum(dtype=torch.float32)):
            return features
        finite = torch.isfinite(features).flatten(1).all(1)
        if not finite.all():
            image = start + int(finite.int().argmin())
            raise InputError(f"{self.prefix}{suffix}, image {image}: NaN or infinite features, expected numbers")
        return features

    def _rows(self, img_id):
        """What read_images returns, of one image: tensors that share the memory of a float16 or float32 file."""
        images = self._feature_row(self.images, "_ims.npy", img_id)
        if not self.need_boxes:
            return images, images.new_zeros(len(images), 0)
        row = img_id * (len(self.boxes) // self.n_images)
        return images, torch.from_numpy(np.array(self.boxes[row], dtype=np.float32))

    def _feature_row(self, file, suffix, img_id):
        """The row of one image in an opened file, whose name ends in suffix."""
        row = np.asarray(file[img_id * self.repeats])
        if file.dtype not in (np.float16, np.float32):
            row = row.astype(np.float32)
        return self._check_finite(torch.from_numpy(row)[None], suffix, img_id)[0]

    def encode_caption(self, index):
        """Word ids (W,) int64 of caption index; each process tokenises a caption once."""
        if self.encoded[index] is None:
            self.encoded[index] = np.array(self.vocab.encode(self.captions[index]), dtype=np.int32).tobytes()
        return torch.from_numpy(np.frombuffer(self.encoded[index], dtype=np.int32).astype(np.int64))

    def _image_of(self, index):
        return index * self.n_images // len(self)

    def _item(self, index, with_features=True):
        """An item whose features share the file's memory, or that has its image's number () in their place."""
        if self.worker_log:
            self.worker_log.note_item(index)
        img_id = self._image_of(index)
        rows = self._rows(img_id) if with_features else (torch.tensor(img_id),)
        return *rows, self.encode_caption(index * len(self.captions) // len(self)), index, img_id

    def __getitem__(self, index):
        """(image (R, img_dim), box (R, 30 | 31 | 0), target (W,), index, img_id); float32."""
        *image, target, index, img_id = self._item(index)
        return *(torch.clone(x.float()) for x in image), target, index, img_id

    def __getitems__(self, indices):
        """What a DataLoader asks for: items whose features are copied once only, by collate_fn.

        Those of a subclass with a __getitem__ of another kind are that method's.
        """
        if self.on_gpu is not None:
            return [self._item(index, with_features=False) for index in indices]
        read_ahead(self.images, [self._image_of(index) * self.repeats for index in indices])
        return [self[index] if self._has_other_items() else self._item(index) for index in indices]

    def _has_other_items(self):
        return type(self).__getitem__ is not __class__.__getitem__

    def keep_on(self, device: torch.device, where: str) -> None:
        """Put all features and grids on a GPU, if where (--features_on) says so; batches then hold image numbers."""
        if where != "host" and not self._has_other_items():
            self.on_gpu = load_rows(self._rows, self.n_images, device, AUTO_SHARE if where == "auto" else 1)

    def with_features(self, batch):
        """A batch of a loader of this data set, with its features and grids where a GPU has them."""
        if self.on_gpu is None or not batch:
            return batch
        rows = send(batch[0], self.on_gpu[0].device)
        return *(x.index_select(0, rows) for x in self.on_gpu), *batch[1:]

    def __len__(self):
        return max(self.n_images, len(self.captions)) if self.captions else 0

    def describe_item(self, index):
        """Item index in words: its pair, image and caption line."""
        image, line = (index * n // len(self) for n in (self.n_images, len(self.captions)))
        return f"pair {index}, which is image {image} and caption line {line + 1}"


def collate_fn(data: list) -> tuple:
    """Batch items, longest caption first.

    Returns images (B, R, img_dim), boxes (B, R, 30 | 31 | 0), targets (B, W) int64 padded with 0,
    lengths (list of B int), ids (tuple of B int, which item each row is); () for no items. A loader's images are
    float16 where the file's are. In a loading process they are written straight into shared memory.
    """
    if not data:
        return ()
    data.sort(key=lambda item: len(item[-3]), reverse=True)
    *images, captions, ids, _ = zip(*data, strict=True)
    lengths = [len(caption) for caption in captions]
    return *map(default_collate, images), pad(list(captions)), lengths, ids


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
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.n, generator=generator).tolist()
        for start in range(self.first * self.batch_size, self.n, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield batch[distributed.local_slice(len(batch))]

    def __len__(self):
        return -(-self.n // self.batch_size)


def get_precomp_dataset(data_name: str, data_split: str, vocab: Any, opt: Any, **more: Any) -> PrecompDataset:
    """The PrecompDataset of a split under opt.data_path/data_name, as opt's flags ask for.

    more: other arguments of PrecompDataset.
    """
    return PrecompDataset(
        os.path.join(opt.data_path, data_name),
        data_split,
        vocab,
        img_dim=opt.img_dim,
        need_boxes=option(opt, "position") != "none",
        allow_empty_captions=option(opt, "allow_empty_captions"),
        **more,
    )


def get_precomp_loader(
    dataset: Any, batch_size: int, workers: int, shuffle_seed: int | None = None, device: str = "auto"
) -> DataLoader:
    """A DataLoader of collate_fn's batches, in order or shuffled by seed and its batch sampler's epoch.

    device: --device; batches for a GPU are in pinned memory, from which they are copied without waiting.
    """
    workers = min(workers, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dataset.worker_log = WorkerLog(workers) if workers else None
    if workers and shuffle_seed is not None:  # training; evaluation reads its images without workers
        image_bytes = sum(x.nbytes for x in dataset.__getitems__([0])[0] if isinstance(x, Tensor))
        n_batches = min(PREFETCH * workers + 1, -(-len(dataset) // batch_size))  # and the one that is trained on
        check_shared_memory(image_bytes * min(batch_size, len(dataset)), n_batches)
    order = {"batch_size": batch_size}
    if shuffle_seed is not None:
        order = {"batch_sampler": EpochBatches(len(dataset), batch_size, shuffle_seed)}
    return DataLoader(
        dataset,
        **order,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=start_worker,
        pin_memory=distributed.pick_device(device).type == "cuda",
        collate_fn=collate_fn,
        generator=torch.Generator(),  # so that loading leaves the random state of training alone
    )


def get_loaders(
    data_name: str, vocab: Any, batch_size: int, workers: int, opt: Any, make_dataset: Callable = get_precomp_dataset
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the train split (shuffled) and the whole dev split (in order)."""
    train, dev = (make_dataset(data_name, split, vocab, opt) for split in ("train", "dev"))
    device = option(opt, "device")
    return (
        get_precomp_loader(train, batch_size, workers, option(opt, "seed"), device),
        get_precomp_loader(dev, batch_size, workers, device=device),
    )


def get_test_loader(
    split_name: str,
    data_name: str,
    vocab: Any,
    batch_size: int,
    workers: int,
    opt: Any,
    make_dataset: Callable = get_precomp_dataset,
    **more: Any,
) -> DataLoader:
    """Loader of a split, in order. more: other arguments of make_dataset."""
    dataset = make_dataset(data_name, split_name, vocab, opt, **more)
    return get_precomp_loader(dataset, batch_size, workers, device=option(opt, "device"))
