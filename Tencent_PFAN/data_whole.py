"""Dataset folders with whole-image features → batches: the root's data.py with SPLIT_who_ims.npy."""

import os

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

    def __init__(self, data_path, data_split, vocab, opt=None, captions_optional=False):
        super().__init__(data_path, data_split, Vocabulary.of(vocab), opt, captions_optional)

    def caption_path(self):
        folder, split = os.path.split(self.prefix)
        return os.path.join(folder, caption_file(folder, split))

    def open_files(self):
        super().open_files()
        self.whole_images = open_npy(self.prefix + "_who_ims.npy")

    def box_counts(self):
        regions = self.images.shape[1]
        return (regions, regions - 1) if option(self.opt, "need_box_whole") else (regions,)

    def features(self, images):
        """Features (…, R, img_dim), whole-image features (…, img_dim), grids (…, R | R - 1, 30 | 31)."""
        regions, boxes = super().features(images)
        return regions, self.read_rows(self.whole_images, "_who_ims.npy", images), boxes

    def count(self):
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

    def __getstate__(self):
        return {**super().__getstate__(), "whole_images": None}


get_precomp_loader = PrecompDataset.get_precomp_loader
get_loaders = PrecompDataset.get_loaders
get_test_loader = PrecompDataset.get_test_loader
