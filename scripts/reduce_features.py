"""Features of one or several networks → features of fewer values: roots, standardised, the first principal directions.

python scripts/reduce_features.py data/photos_lite0 data/photos_lite2 --out data/photos --dimensions 512

The values of several networks stand side by side. Each becomes its root, less its mean over the train split, divided
by its deviation there, so that a few large values do not outweigh the others; then the first principal directions keep
most of what differs in a fraction of the space.
"""

import argparse
import os
import shutil

import numpy as np
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets.ids import SPLITS
from lib.datasets.writer import Origin, SplitWriter
from lib.errors import InputError, run
from lib.files import open_npy, read_lines

ROWS = 256  # images that are read at once
SAMPLED = 4  # of so many regions one gives the principal directions


def open_split(folders, split):
    """A split's features in each folder, arrays (images, regions, values). Raises InputError where images differ."""
    first, *others = [os.path.join(folder, split) for folder in folders]
    arrays = [open_npy(prefix + "_ims.npy") for prefix in (first, *others)]
    for array in arrays:
        if array.ndim != 3 or array.shape[:2] != arrays[0].shape[:2]:
            expected = f"expected (images, regions, values) as {first}_ims.npy"
            raise InputError(f"{array.filename}: found {array.shape}, {expected}")
    for prefix in others:
        for name, read in (("ids.txt", read_lines), ("boxes.npy", open_npy)):
            if not np.array_equal(read(f"{prefix}_{name}"), read(f"{first}_{name}")):
                raise InputError(f"{prefix}_{name}: other images or regions than {first}_{name}")
    return arrays


def roots(arrays, rows):
    """The signed roots of some images' features side by side: (…, D), float32."""
    features = np.concatenate([np.asarray(array[rows], np.float32) for array in arrays], -1)
    return np.sign(features) * np.sqrt(np.abs(features))


class Reduction:
    """What the train split says: mean and deviation (D,) of the roots, and the directions (D, K)."""

    def __init__(self, train, dimensions):
        self.train = train
        n, total, squares = 0, 0, 0
        for values in self._blocks("mean and deviation"):
            n += len(values)
            total += values.sum(0, dtype=np.float64)
            squares += np.einsum("nd,nd->d", values, values, dtype=np.float64)
        self.mean = total / n
        self.deviation = np.sqrt(np.maximum(squares / n - self.mean**2, 0) + 1e-6)
        products = 0
        for values in self._blocks("directions"):
            sampled = self._standardised(values)[::SAMPLED]
            products = products + (sampled.T @ sampled).astype(np.float64)
        shares, vectors = np.linalg.eigh(products)
        self.directions = vectors[:, ::-1][:, :dimensions].astype(np.float32)
        print(f"{shares[::-1][:dimensions].sum() / shares.sum():.0%} of the variance is kept")

    def _blocks(self, name):
        """The roots (n, D) of all regions of the train split, some images at a time."""
        for start in tqdm(range(0, len(self.train[0]), ROWS), desc=name, unit=f"{ROWS} images", disable=None):
            values = roots(self.train, slice(start, start + ROWS))
            yield values.reshape(-1, values.shape[-1])

    def _standardised(self, values):
        return ((values - self.mean) / self.deviation).astype(np.float32)

    def __call__(self, values):
        """Roots (…, D) → (…, K), float32."""
        return self._standardised(values) @ self.directions


def reduce_splits(opt):
    """Write all splits of the dataset folder opt.out."""
    train, reduction = open_split(opt.folders, "train"), None
    for split in SPLITS:
        source = os.path.join(opt.folders[0], split)
        if not os.path.isfile(source + "_ims.npy"):
            continue
        arrays = open_split(opt.folders, split)
        shape = arrays[0].shape[1], min(opt.dimensions, sum(array.shape[2] for array in arrays))
        origin = Origin({"tool": "reduce_features"}, [array.filename for array in (*train, *arrays)])
        ids = read_lines(source + "_ids.txt")
        with SplitWriter(opt.out, split, ids, {"ims": (shape, np.float16)}, origin, opt.overwrite) as out:
            if out.finished:
                print(f"{split}: there already")
                continue
            for name in ("caps.txt", "boxes.npy", "pixel_boxes.npy"):
                if os.path.isfile(f"{source}_{name}"):
                    shutil.copy(f"{source}_{name}", opt.out)
            reduction = reduction or Reduction(train, opt.dimensions)
            for row in tqdm(np.flatnonzero(~out.done), desc=split, unit="image", disable=None):
                out.write(row, ims=reduction(roots(arrays, row)))
            print(f"{split}: {out.finish()} images, {len(reduction.mean)} values → {shape[1]}, in {opt.out}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="dataset folders of the same images and regions")
    add("--out", required=True, metavar="DIR", help="the dataset folder to write")
    add("--dimensions", type=int, default=512, help="values of a feature, at most (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")
    opt = parser.parse_args()
    if opt.dimensions < 1:
        raise InputError(f"--dimensions {opt.dimensions}: expected at least 1")
    if os.path.realpath(opt.out) in map(os.path.realpath, opt.folders):
        raise InputError(f"--out {opt.out}: is read as well, expected another folder")
    reduce_splits(opt)


if __name__ == "__main__":
    run(main)
