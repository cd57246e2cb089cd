"""Images of two dataset folders paired by ids, by captions or by regions, for align.py."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
CLOSE = 1e-3  # relative difference of features that are the same; float16 rounds by 5e-4
MOST_UNPROVED = 0.1  # share of images without a proved partner above which regions do not tell images apart


class Split:
    """One split of a folder. n: its images. ids: list of n canonical ids, or None. names: the ids as they stand.

    arrays: {name: (array, rows per image)}. captions: list of lines, or None. digests: n tuples of digests of the
    images' captions, or None.
    """

    def __init__(self, folder, split):
        self.folder, self.split, self.prefix = folder, split, os.path.join(folder, split)
        paths = sorted(glob.glob(glob.escape(self.prefix) + "_*.npy"))
        arrays = {path[len(self.prefix) + 1 : -len(".npy")]: open_rows(path) for path in paths}
        captions, ids = self._lines("caps.txt"), self._lines("ids.txt")
        self.n = self._count(arrays, captions, ids)
        for name, rows in {"caps.txt": captions, "ids.txt": ids, **arrays}.items():
            if rows is not None and len(rows) % self.n:
                raise InputError(f"{self.prefix}_{name}: {len(rows)} rows do not divide by {self.n} images")
        self.arrays = {name: (array, len(array) // self.n) for name, array in arrays.items()}
        self.names = ids[:: len(ids) // self.n] if ids else None
        self.ids = [canonical_id(name) for name in self.names] if ids else None
        self.captions, self.digests = captions, None
        if captions:
            self.per_image = len(captions) // self.n
            self.digests = [tuple(map(caption_digest, self.captions_of(row))) for row in range(self.n)]

    def _lines(self, name):
        path = f"{self.prefix}_{name}"
        return read_lines(path) if os.path.isfile(path) else None

    def _count(self, arrays, captions, ids):
        """How many images there are: rows of the arrays, unless these repeat an image once per caption."""
        n = min(map(len, arrays.values()), default=0)
        if arrays and captions and n == len(captions):
            name = "ims" if "ims" in arrays else next(iter(arrays))
            try:
                n //= rows_per_image(f"{self.prefix}_{name}.npy", arrays[name])
            except InputError:
                if name == "ims":  # images may have equal grids
                    raise
        n = n or len(dict.fromkeys(ids or ())) or len(captions or ()) // 5
        if not n:
            raise InputError(f"{self.prefix}: neither arrays nor ids nor captions")
        return n

    def captions_of(self, row):
        return self.captions[row * self.per_image : (row + 1) * self.per_image]

    def read(self, name, row, n=1):
        """The rows (n, …) of the images row … row+n-1 in array name."""
        array, step = self.arrays[name]
        return read_rows(array, row * step, n * step)[::step]

    def title(self, row):
        return f"{self.split}, image {row}" + (f" (id {self.names[row]})" if self.names else "")


class Partner(NamedTuple):
    """An image of the source: its Split and row there."""

    split: Split
    row: int

    def read(self, name):
        return self.split.read(name, self.row)[0]


Hits = dict[str, list[list[Partner]]]


def same_features(split: Split, row: int, partner: Partner) -> bool:
    """Whether an image and its partner have the same features."""
    a, b = (features.astype(np.float32) for features in (split.read("ims", row)[0], partner.read("ims")))
    return a.shape == b.shape and bool(np.abs(a - b).max() <= CLOSE * max(np.abs(a).max(), 1))


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
    splits = [*reference, *source]
    possible = {
        "ids": all(split.ids for split in splits),
        "captions": all(split.digests for split in splits),
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
) -> dict[str, list[Partner | None]]:
    """{split: [Partner or None, for each reference image]}. What has no partner goes to problems."""
    found = {"ids": by_ids, "captions": by_captions, "regions": by_regions}[by](reference, source)
    pairs = {}
    for split in reference:
        partners = pairs[split.split] = []
        taken: dict = {}
        for row, hits in enumerate(found[split.split]):
            hits = nearest(hits, split)
            partners.append(hits[0] if len(hits) == 1 else None)
            if not hits:
                problems.add("without a partner", split.title(row), f"nothing like it in {source[0].folder}")
            elif len(hits) > 1:
                others = "; ".join(hit.split.title(hit.row) for hit in hits[:3])
                problems.add("ambiguous", split.title(row), f"{len(hits)} partners: {others}")
            elif (first := taken.setdefault(hits[0], row)) != row:
                partners[row] = None
                problems.add("ambiguous", split.title(row), f"has the partner of {split.title(first)}")
    return pairs


def nearest(hits: list[Partner], split: Split) -> list[Partner]:
    """Of partners in several splits those in the split's namesake, else those in the first of the splits.

    An image that stands in test and in testall is one image.
    """
    same = [hit for hit in hits if hit.split.split == split.split]
    return same or [hit for hit in hits if hit.split is hits[0].split]


def by_ids(reference: Sequence[Split], source: Sequence[Split]) -> Hits:
    """{split: for each of its images the partners: one, or none, or more where that cannot be told}."""
    index = index_of(source, lambda split: [[name] for name in split.ids])
    return {split.split: [index.get(name, []) for name in split.ids] for split in reference}


def by_captions(reference: Sequence[Split], source: Sequence[Split]) -> Hits:
    """As by_ids, by the captions: those that have most of an image's captions, and more than half."""
    index = index_of(source, lambda split: map(set, split.digests))

    def partners(digests):
        votes = Counter(hit for digest in digests for hit in index.get(digest, ()))
        most = max(votes.values(), default=0)
        return [hit for hit, count in votes.items() if count == most and 2 * count > len(digests)]

    return {split.split: [partners(set(digests)) for digests in split.digests] for split in reference}


def by_regions(reference: Sequence[Split], source: Sequence[Split]) -> Hits:
    """As by_ids, by which boxes fit the features, see lib/datasets/region_match.py.

    Raises InputError where regions do not tell a split's images apart.
    """
    overlaps = {split: signatures(split, "boxes", region_match.overlaps) for split in source}
    hits = {}
    for split in reference:
        same = [other for other in source if other.split == split.split] or source
        candidates = [Partner(other, row) for other in same for row in range(other.n)]
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


def index_of(splits: Iterable[Split], names: Callable[[Split], Iterable]) -> dict[Any, list[Partner]]:
    """{name: [Partner]}; names(split) gives, for each image, the names it goes by."""
    index = {}
    for split in splits:
        for row, names_of_image in enumerate(names(split)):
            for name in names_of_image:
                index.setdefault(name, []).append(Partner(split, row))
    return index


def signatures(split: Split, name: str, signature: Callable[[np.ndarray], region_match.Signature]) -> np.ndarray:
    """The pairs (n, P) of all images of a split: signature, a function of region_match, of its array name."""
    rows = range(0, split.n, IMAGES_AT_ONCE)
    bar = tqdm(rows, desc=f"{split.prefix}_{name}.npy", unit=f"{IMAGES_AT_ONCE} images", disable=None)
    pairs = np.empty((0, 0))
    for row in bar:
        block = signature(split.read(name, row, IMAGES_AT_ONCE)).pairs
        if not row:
            pairs = np.empty((split.n, block.shape[1]), dtype=block.dtype)
        pairs[row : row + len(block)] = block
    return pairs
