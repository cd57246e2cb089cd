"""A dataset folder → the same with fewer values a feature: root, standardised, the first principal directions.

python scripts/reduce_features.py data/photos_all --out data/photos --dimensions 512

The pooled values of image networks are small, not negative and unequal. Their roots, less each value's mean over the
train split and divided by its deviation, train several times as fast; the first principal directions keep most of what
differs, also where the values of two networks stand side by side.
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
        for start in tqdm(range(0, len(images), ROWS), desc=name, unit=f"{ROWS} images", disable=None):
            yield self(images[start : start + ROWS]).reshape(-1, images.shape[2])

    def __call__(self, features):
        """Features (…, D) → (…, K), float32."""
        features = np.asarray(features, np.float32)
        roots = np.sign(features) * np.sqrt(np.abs(features))
        values = ((roots - self.mean) / self.deviation).astype(np.float32)
        return values if self.directions is None else values @ self.directions


@cache
def reduction_of(path, dimensions):
    """The Reduction to so many dimensions that the features at path, the train split's, give."""
    reduction = Reduction(open_npy(path), dimensions)
    print(f"{reduction.kept:.0%} of the variance is kept")
    return reduction


def write_split(split, opt):
    """Write one split of the dataset folder opt.out; what belongs to its images beside the features is copied."""
    source, target = os.path.join(opt.folder, split), os.path.join(opt.out, split)
    images = open_npy(source + "_ims.npy")
    ids = read_lines(source + "_ids.txt") if os.path.isfile(source + "_ids.txt") else list(map(str, range(len(images))))
    train = os.path.join(opt.folder, "train_ims.npy")
    arrays = {"ims": ((images.shape[1], min(opt.dimensions, images.shape[2])), np.float16)}
    origin = Origin({"tool": "reduce_features"}, [train, source + "_ims.npy"])
    for name in ("caps.txt", "boxes.npy", "pixel_boxes.npy"):
        if os.path.isfile(f"{source}_{name}"):
            shutil.copyfile(f"{source}_{name}", f"{target}_{name}")
    with SplitWriter(opt.out, split, ids, arrays, origin, opt.overwrite) as out:
        if out.finished:
            print(f"{split}: there already")
            return
        for row in tqdm(np.flatnonzero(~out.done), desc=split, unit="image", disable=None):
            out.write(row, ims=reduction_of(train, opt.dimensions)(images[row]))
        print(f"{split}: {out.finish()} images, {images.shape[2]} values → {arrays['ims'][0][1]}, in {opt.out}")


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/reduce_features.py data/photos_all --out data/photos --dimensions 512",
    )
    add = parser.add_argument
    add("folder", help="the dataset folder; its train split decides the reduction of all")
    add("--out", required=True, metavar="DIR", help="the dataset folder to write")
    add("--dimensions", type=int, default=512, help="values of a feature, at most (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")
    return parser


def main():
    opt = get_parser().parse_args()
    if opt.dimensions < 1:
        raise InputError(f"--dimensions {opt.dimensions}: expected at least 1")
    if os.path.realpath(opt.folder) == os.path.realpath(opt.out):
        raise InputError(f"--out {opt.out}: is read as well, expected another folder")
    make_folder(opt.out)
    images = open_npy(os.path.join(opt.folder, "train_ims.npy"))
    if images.ndim != 3:
        raise InputError(f"{opt.folder}/train_ims.npy: found {images.shape}, expected (images, regions, values)")
    for split in SPLITS:
        if os.path.isfile(os.path.join(opt.folder, f"{split}_ims.npy")):
            write_split(split, opt)


if __name__ == "__main__":
    run(main)
