"""Features of one or several networks → features of fewer values: roots, standardised, the first principal directions.

python scripts/reduce_features.py data/photos_lite0 data/photos_lite2 --out data/photos --dimensions 512

The values of several networks stand side by side. Each becomes its root, less its mean over the train split, divided
by its deviation there, so that a few large values do not outweigh the others; then the first principal directions keep
most of what differs in a fraction of the space.
"""

import argparse
import os
import shutil
from functools import cache

import numpy as np
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets.ids import SPLITS
from lib.datasets.writer import Origin, SplitWriter
from lib.errors import InputError, run
from lib.files import make_folder, open_npy, read_lines

ROWS = 256  # images that are read at once
SAMPLED = 4  # of so many regions one gives the principal directions


class SideBySide:
    """The features of a split in several folders: rows (n, R, D) whose values stand behind each other."""

    def __init__(self, folders, split):
        self.paths = [os.path.join(folder, f"{split}_ims.npy") for folder in folders]
        self.arrays = [open_npy(path) for path in self.paths]
        first = self.arrays[0].shape
        for path, array in zip(self.paths, self.arrays, strict=True):
            if array.ndim != 3 or array.shape[:2] != first[:2]:
                raise InputError(f"{path}: found {array.shape}, expected (images, regions, values) as {self.paths[0]}")
        self.shape = *first[:2], sum(array.shape[2] for array in self.arrays)

    def __getitem__(self, rows):
        return np.concatenate([np.asarray(array[rows], np.float32) for array in self.arrays], -1)


class Reduction:
    """What the train split's features say: mean and deviation (D,) of the roots, and the directions (D, K)."""

    def __init__(self, images, dimensions):
        self.mean, self.deviation = np.zeros(images.shape[2]), np.ones(images.shape[2])
        self.directions = None
        total, squares = np.zeros(images.shape[2]), np.zeros(images.shape[2])
        for rows in self.blocks(images, "mean and deviation"):
            total += rows.sum(0, dtype=np.float64)
            squares += np.einsum("nd,nd->d", rows, rows, dtype=np.float64)
        n = images.shape[0] * images.shape[1]
        self.mean = total / n
        self.deviation = np.sqrt(np.maximum(squares / n - self.mean**2, 0) + 1e-6)
        products = np.zeros((images.shape[2],) * 2)
        for rows in self.blocks(images, "directions"):
            rows = rows[::SAMPLED]
            products += rows.T @ rows
        shares, vectors = np.linalg.eigh(products)
        self.directions = vectors[:, ::-1][:, :dimensions].astype(np.float32)
        self.kept = shares[::-1][:dimensions].sum() / shares.sum()

    def blocks(self, images, name):
        """All features (n, D), some images at a time, as far as they are transformed by now."""
        for start in tqdm(range(0, images.shape[0], ROWS), desc=name, unit=f"{ROWS} images", disable=None):
            yield self(images[start : start + ROWS]).reshape(-1, images.shape[2])

    def __call__(self, features):
        """Features (…, D) → (…, K), float32."""
        roots = np.sign(features) * np.sqrt(np.abs(features))
        values = ((roots - self.mean) / self.deviation).astype(np.float32)
        return values if self.directions is None else values @ self.directions


@cache
def reduction_of(folders, dimensions):
    """The Reduction to so many dimensions that the train split of the folders gives."""
    reduction = Reduction(SideBySide(folders, "train"), dimensions)
    print(f"{reduction.kept:.0%} of the variance is kept")
    return reduction


def write_split(split, opt):
    """Write one split of the dataset folder opt.out; what belongs to its images beside the features is copied."""
    source, target = os.path.join(opt.folders[0], split), os.path.join(opt.out, split)
    images = SideBySide(opt.folders, split)
    check_same_images(opt.folders, split)
    arrays = {"ims": ((images.shape[1], min(opt.dimensions, images.shape[2])), np.float16)}
    inputs = [os.path.join(folder, "train_ims.npy") for folder in opt.folders] + images.paths
    ids = read_lines(source + "_ids.txt")
    with SplitWriter(opt.out, split, ids, arrays, Origin({"tool": "reduce_features"}, inputs), opt.overwrite) as out:
        if out.finished:
            print(f"{split}: there already")
            return
        for name in ("caps.txt", "boxes.npy", "pixel_boxes.npy"):
            if os.path.isfile(f"{source}_{name}"):
                shutil.copyfile(f"{source}_{name}", f"{target}_{name}")
        for row in tqdm(np.flatnonzero(~out.done), desc=split, unit="image", disable=None):
            out.write(row, ims=reduction_of(opt.folders, opt.dimensions)(images[row]))
        print(f"{split}: {out.finish()} images, {images.shape[2]} values → {arrays['ims'][0][1]}, in {opt.out}")


def check_same_images(folders, split):
    """Raise InputError unless a split has the same ids and boxes in all folders."""
    for name, read in (("ids.txt", read_lines), ("boxes.npy", open_npy)):
        paths = [os.path.join(folder, f"{split}_{name}") for folder in folders]
        for path in paths[1:]:
            if not np.array_equal(read(path), read(paths[0])):
                raise InputError(f"{path}: other images or regions than {paths[0]}")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="dataset folders of the same images and regions",
    )
    add("--out", required=True, metavar="DIR", help="the dataset folder to write")
    add("--dimensions", type=int, default=512, help="values of a feature, at most (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")
    return parser


def main():
    opt = get_parser().parse_args()
    if opt.dimensions < 1:
        raise InputError(f"--dimensions {opt.dimensions}: expected at least 1")
    opt.folders = tuple(opt.folders)
    if os.path.realpath(opt.out) in map(os.path.realpath, opt.folders):
        raise InputError(f"--out {opt.out}: is read as well, expected another folder")
    make_folder(opt.out)
    for split in SPLITS:
        if os.path.isfile(os.path.join(opt.folders[0], f"{split}_ims.npy")):
            write_split(split, opt)


if __name__ == "__main__":
    run(main)
