"""Images of two dataset folders paired by ids, by captions or by regions, for align.py."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.datasets import region_match
from lib.datasets.arrays import open_rows, read_rows
from lib.datasets.checks import rows_per_image
from lib.datasets.ids import canonical_id
from lib.datasets.problems import Problems
from lib.errors import InputError
from lib.files import read_lines

WORD = re.compile(r"\w+")
IMAGES_AT_ONCE = 64  # read for their regions
MOST_UNPROVED = 0.1  # share of images without a proved partner above which regions do not tell images apart


class Split:
    """One split of a folder. n: its images. names: their ids, or None. captions: list of lines, maybe empty.

    arrays: {name: (array, rows per image)}. keys: what tells images apart, {"ids": n tuples of the canonical id, or
    None, "captions": n tuples of the captions' digests, or None}.
    """

    def __init__(self, folder, split):
        self.folder, self.split, self.prefix = folder, split, os.path.join(folder, split)
        paths = sorted(glob.glob(glob.escape(self.prefix) + "_*.npy"))
        arrays = {path[len(self.prefix) + 1 : -len(".npy")]: open_rows(path) for path in paths}
        captions, ids = self._lines("caps.txt"), self._lines("ids.txt")
        self.n = self._count(arrays, captions, ids)
        for name, rows in {"caps.txt": captions, "ids.txt": ids, **arrays}.items():
            if len(rows) % self.n:
                raise InputError(f"{self.prefix}_{name}: {len(rows)} rows do not divide by {self.n} images")
        self.arrays = {name: (array, len(array) // self.n) for name, array in arrays.items()}
        self.names, self.captions = ids[:: len(ids) // self.n] if ids else None, captions
        self.keys = {
            "ids": [(canonical_id(name),) for name in self.names] if ids else None,
            "captions": [tuple(map(caption_digest, image.captions())) for image in self.images()] if captions else None,
        }

    def _lines(self, name):
        path = f"{self.prefix}_{name}"
        return read_lines(path) if os.path.isfile(path) else []

    def _count(self, arrays, captions, ids):
        """How many images there are: rows of the arrays, unless these repeat an image once per caption."""
        n = min(map(len, arrays.values()), default=0)
        if arrays and n == len(captions):
            name = "ims" if "ims" in arrays else next(iter(arrays))
            try:
                n //= rows_per_image(f"{self.prefix}_{name}.npy", arrays[name])
            except InputError:
                if name == "ims":  # images may have equal grids
                    raise
        n = n or len(set(ids)) or len(captions) // 5
        if not n:
            raise InputError(f"{self.prefix}: neither arrays nor ids nor captions")
        return n

    def images(self):
        return [Image(self, row) for row in range(self.n)]

    def read(self, name, row, n=1):
        """The rows (n, …) of the images row … row+n-1 in array name."""
        array, step = self.arrays[name]
        return read_rows(array, row * step, n * step)[::step]


class Image(NamedTuple):
    """An image of a folder: its Split and row there."""

    split: Split
    row: int

    def read(self, name):
        return self.split.read(name, self.row)[0]

    def keys(self, by):
        return set(self.split.keys[by][self.row])

    def captions(self):
        k = len(self.split.captions) // self.split.n
        return self.split.captions[self.row * k : (self.row + 1) * k]

    def __str__(self):
        name = f" (id {self.split.names[self.row]})" if self.split.names else ""
        return f"{self.split.split}, image {self.row}{name}"


def caption_digest(caption: str) -> bytes:
    """A digest of a caption's words: the same for "A dog ." and "a dog"."""
    return hashlib.blake2b(" ".join(WORD.findall(caption.lower())).encode(), digest_size=16).digest()


def load(folder: str, splits: Iterable[str]) -> list[Split]:
    """[Split] of the given splits of a folder that are there."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    found = [split for split in splits if glob.glob(glob.escape(os.path.join(folder, split)) + "_*.*")]
    if not found:
        raise InputError(f"{folder}: none of the splits {', '.join(splits)}")
    return [Split(folder, split) for split in tqdm(found, desc=folder, unit="split", disable=None)]


def choose(by: str, reference: Sequence[Split], source: Sequence[Split]) -> str:
    """What both folders have to pair by: ids, captions or regions; by asks for one of them, or "auto"."""
    possible = {
        "ids": all(split.keys["ids"] for split in (*reference, *source)),
        "captions": all(split.keys["captions"] for split in (*reference, *source)),
        "regions": all("ims" in s.arrays for s in reference) and all("boxes" in s.arrays for s in source),
    }
    ways = [way for way in possible if possible[way] and by in (way, "auto")]
    if not ways:
        raise InputError(
            "nothing to pair the images by: expected SPLIT_ids.txt or SPLIT_caps.txt in both folders, or SPLIT_ims.npy "
            "in the reference and SPLIT_boxes.npy in the source"
        )
    return ways[0]


def pair(
    reference: Sequence[Split], source: Sequence[Split], by: str, problems: Problems
) -> dict[str, list[tuple[Image, Image]]]:
    """{split: [(image of the reference, its partner)]}. What has no partner, or several, goes to problems."""
    found = by_regions(reference, source) if by == "regions" else by_keys(reference, source, by)
    pairs = {}
    for split in reference:
        first_with: dict[Image, Image] = {}
        for image, hits in zip(split.images(), found[split.split], strict=True):
            # an image that stands in test and in testall is one image
            in_namesake = [hit for hit in hits if hit.split.split == split.split]
            hits = in_namesake or [hit for hit in hits if hit.split is hits[0].split]
            if not hits:
                problems.add("without a partner", str(image), f"nothing like it in {source[0].folder}")
            elif len(hits) > 1:
                problems.add("ambiguous", str(image), f"{len(hits)} partners: {'; '.join(map(str, hits[:3]))}")
            elif first_with.setdefault(hits[0], image) != image:
                problems.add("ambiguous", str(image), f"has the partner of {first_with[hits[0]]}")
        pairs[split.split] = [(image, partner) for partner, image in first_with.items()]
    return pairs


def by_keys(reference: Sequence[Split], source: Sequence[Split], by: str) -> dict[str, list[list[Image]]]:
    """{split: for each of its images the partners: one, or none, or more where that cannot be told}.

    Partners have the image's id, or most of its captions, and more than half, and are in source's order. by: "ids" or
    "captions".
    """
    index: dict = {}
    place = {split: i for i, split in enumerate(source)}
    for split in source:
        for image in split.images():
            for key in image.keys(by):
                index.setdefault(key, []).append(image)

    def partners(keys):
        votes = Counter(hit for key in keys for hit in index.get(key, ()))
        most = max(votes.values(), default=0)
        hits = [hit for hit, count in votes.items() if count == most and 2 * count > len(keys)]
        return sorted(hits, key=lambda hit: (place[hit.split], hit.row))

    return {split.split: [partners(image.keys(by)) for image in split.images()] for split in reference}


def by_regions(reference: Sequence[Split], source: Sequence[Split]) -> dict[str, list[list[Image]]]:
    """As by_keys, by which boxes fit the features, see lib/datasets/region_match.py.

    Raises InputError where regions do not tell a split's images apart.
    """
    overlaps = {split: signatures(split, "boxes", region_match.overlaps) for split in source}
    hits = {}
    for split in reference:
        same = [other for other in source if other.split == split.split] or source
        candidates = [image for other in same for image in other.images()]
        theirs = overlaps[same[0]] if len(same) == 1 else np.concatenate([overlaps[other] for other in same])
        likeness = signatures(split, "ims", region_match.likeness)
        if likeness.shape[1] != theirs.shape[1]:
            raise InputError(f"{split.prefix}_ims.npy: not as many regions as in {same[0].prefix}_boxes.npy")
        rows = region_match.match(likeness, theirs)
        missing = int((rows < 0).sum())
        if missing > MOST_UNPROVED * split.n:
            raise InputError(
                f"{split.prefix}_ims.npy: {missing} of {split.n} images fit no boxes of {source[0].folder} "
                f"better than all others: these features do not tell (fixed windows, random values?), or the boxes "
                "are of other images"
            )
        hits[split.split] = [[candidates[row]] if row >= 0 else [] for row in rows]
    return hits


def signatures(split: Split, name: str, signature: Callable[[np.ndarray], region_match.Signature]) -> np.ndarray:
    """The pairs (n, P) of all images of a split: signature, a function of region_match, of its array name."""
    first = signature(split.read(name, 0)).pairs
    pairs = np.empty((split.n, first.shape[1]), dtype=first.dtype)
    rows = range(0, split.n, IMAGES_AT_ONCE)
    for row in tqdm(rows, desc=f"{split.prefix}_{name}.npy", unit=f"{IMAGES_AT_ONCE} images", disable=None):
        pairs[row : row + IMAGES_AT_ONCE] = signature(split.read(name, row, IMAGES_AT_ONCE)).pairs
    return pairs
