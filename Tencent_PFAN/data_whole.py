"""Dataset folders with whole-image features → batches: the root's data.py with SPLIT_who_ims.npy."""

import os
from functools import partial

import data
from lib.errors import InputError
from lib.files import open_npy
from lib.options import option
from Tencent_PFAN.vocab import Vocabulary, caption_file

collate_fn = data.collate_fn  # → images, whole_images, boxes, targets, lengths, ids


class PrecompDataset(data.PrecompDataset):
    """One split of a folder; caption i belongs to image i.

    An item is (image (R, img_dim), whole_image (img_dim,), box (R, 30 | 31), target (W,), index, img_id). With
    need_box_whole the last region is the whole image, and SPLIT_boxes.npy may have R - 1 boxes an image.
    Raises InputError where files are missing or do not fit together.
    """

    def __init__(self, data_path, data_split, vocab, img_dim=None, need_box_whole=False, allow_empty_captions=False):
        self.need_box_whole = need_box_whole
        super().__init__(
            data_path, data_split, Vocabulary.of(vocab), img_dim, allow_empty_captions=allow_empty_captions
        )

    def _caption_path(self):
        folder, split = os.path.split(self.prefix)
        return os.path.join(folder, caption_file(folder, split))

    def _open(self):
        super()._open()
        self.whole_images = open_npy(self.prefix + "_who_ims.npy")

    def __getstate__(self):
        return {**super().__getstate__(), "whole_images": None}

    def _count(self):
        n_images, n_captions, img_dim = len(self.images), len(self.captions), self.images.shape[2]
        if n_images != n_captions:
            raise InputError(
                f"{self.prefix}: {n_images} images in _ims.npy and {n_captions} captions, expected one caption an image"
            )
        if self.whole_images.shape != (n_images, img_dim):
            raise InputError(
                f"{self.prefix}_who_ims.npy: found {self.whole_images.shape}, expected ({n_images}, {img_dim})"
            )
        self.repeats, self.n_images, self.im_div = 1, n_images, 1

    def _box_counts(self):
        regions = self.images.shape[1]
        return (regions, regions - 1) if self.need_box_whole else (regions,)

    def read_images(self, start, stop):
        """Features (n, R, img_dim), whole-image features (n, img_dim), grids (n, R | R - 1, 30 | 31), float32."""
        images, boxes = super().read_images(start, stop)
        return images, self.read_features(self.whole_images, "_who_ims.npy", start, stop), boxes

    def _rows(self, img_id):
        images, boxes = super()._rows(img_id)
        return images, self._feature_row(self.whole_images, "_who_ims.npy", img_id), boxes


def get_precomp_dataset(data_name, data_split, vocab, opt):
    """The PrecompDataset of a split under opt.data_path/data_name, as opt's flags ask for."""
    return PrecompDataset(
        os.path.join(opt.data_path, data_name),
        data_split,
        vocab,
        img_dim=opt.img_dim,
        need_box_whole=option(opt, "need_box_whole"),
        allow_empty_captions=option(opt, "allow_empty_captions"),
    )


get_loaders = partial(data.get_loaders, make_dataset=get_precomp_dataset)
get_test_loader = partial(data.get_test_loader, make_dataset=get_precomp_dataset)
