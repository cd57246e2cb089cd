"""Put the position files of one dataset folder in the order of another's features.

Pictures are paired by their ids where both folders have SPLIT_ids.txt, else by their captions: all of them the same
(but for case and punctuation), or most of them. A partner may lie in another split than the picture it belongs to.
The pairs are verified by the captions and, where both folders have features, by these.
"""

import argparse
import glob
import hashlib
import os
import re
from collections import Counter

import numpy as np
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets.arrays import ArrayReader
from lib.datasets.ids import SPLITS, canonical_id
from lib.datasets.problems import Problems
from lib.datasets.writer import SplitWriter, digest_lines
from lib.errors import InputError, run
from lib.files import make_folder, read_lines, write_lines

WORD = re.compile(r"\w+")
SAMPLE = 100  # pictures whose features are compared
CLOSE = 1e-3  # relative difference of features that are the same; float16 rounds by 5e-4


class Split:
    """One split of a folder. n: its pictures. ids: list of keys or None. texts: list of tuples of captions, or None.

    arrays: {name: (ArrayReader, rows per picture)}.
    """

    def __init__(self, folder, split):
        self.folder, self.split, self.prefix = folder, split, os.path.join(folder, split)
        readers = {}
        for path in sorted(glob.glob(glob.escape(self.prefix) + "_*.npy")):
            reader = readers[path[len(self.prefix) + 1 : -len(".npy")]] = ArrayReader(path)
            if 0 in (reader.shape or (0,)):
                raise InputError(f"{path}: found {reader.shape}, expected a row for each picture")
        captions, ids = self._lines("caps.txt"), self._lines("ids.txt")
        rows = min((len(reader) for reader in readers.values()), default=0)
        if readers and captions and rows == len(captions):  # every picture once per caption
            rows //= repeats(readers.get("ims") or next(iter(readers.values())))
        self.n = rows or len(dict.fromkeys(ids or ())) or len(captions or ()) // 5
        if not self.n:
            raise InputError(f"{self.prefix}: neither arrays nor ids nor captions")
        for name, lines in (("caps.txt", captions), ("ids.txt", ids), *((f"{n}.npy", r) for n, r in readers.items())):
            if lines is not None and len(lines) % self.n:
                raise InputError(f"{self.prefix}_{name}: {len(lines)} rows do not divide by {self.n} pictures")
        self.arrays = {name: (reader, len(reader) // self.n) for name, reader in readers.items()}
        self.names = ids[:: len(ids) // self.n] if ids else None
        self.ids = [canonical_id(name) for name in self.names] if ids else None
        self.captions, self.texts = captions, None
        if captions:
            k = len(captions) // self.n
            self.texts = [tuple(map(plain, captions[i * k : (i + 1) * k])) for i in range(self.n)]

    def _lines(self, name):
        path = f"{self.prefix}_{name}"
        return read_lines(path) if os.path.isfile(path) else None

    def read(self, name, row):
        """The row of picture row in array name."""
        reader, step = self.arrays[name]
        return reader.read(row * step)[0]

    def name(self, row):
        return f"{self.split}, picture {row}" + (f" (id {self.names[row]})" if self.names else "")


def plain(caption):
    """A digest of a caption's words: the same for "A dog ." and "a dog"."""
    return hashlib.blake2b(" ".join(WORD.findall(caption.lower())).encode(), digest_size=16).digest()


def repeats(reader):
    """How often each picture's row stands in a row: the greatest common divisor of the runs' lengths."""
    starts, last = [0], reader.read(0)
    for row in range(1, len(reader)):
        here = reader.read(row)
        if not np.array_equal(here, last):
            starts.append(row)
        last = here
    return int(np.gcd.reduce(np.diff([*starts, len(reader)])))


def load(folder, splits):
    """[Split] of the given splits of a folder that are there."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    found = [split for split in splits if glob.glob(glob.escape(os.path.join(folder, split)) + "_*.*")]
    if not found:
        raise InputError(f"{folder}: none of the splits {', '.join(splits)}")
    return [Split(folder, split) for split in tqdm(found, desc=folder, unit="split", disable=None)]


def index_of(splits, names):
    """{name: [(Split, row)]}; names(split) lists, for each picture, the names it goes by (a list)."""
    index = {}
    for split in splits:
        for row, own in enumerate(names(split)):
            for name in own:
                index.setdefault(name, []).append((split, row))
    return index


class Partners:
    """Finds a reference picture's partner in the source splits, by "ids" or "captions"."""

    def __init__(self, source, by):
        self.by = by
        if by == "ids":
            self.index = index_of(source, lambda split: [[name] for name in split.ids])
        else:
            self.index = index_of(source, lambda split: [[tuple(sorted(texts))] for texts in split.texts])
            self.single = index_of(source, lambda split: [set(texts) for texts in split.texts])

    def find(self, split, row):
        """[(Split, row)] of the partners of a reference picture: one, or none, or more if that cannot be told."""
        if self.by == "ids":
            hits = self.index.get(split.ids[row], [])
        else:
            texts = split.texts[row]
            hits = self.index.get(tuple(sorted(texts)), [])
            if not hits:
                votes = Counter(hit for text in set(texts) for hit in self.single.get(text, ()))
                hits = [hit for hit, count in votes.items() if 2 * count > len(texts)]
        same = [hit for hit in hits if hit[0].split == split.split]
        if same:
            return same
        # the same picture in test and testall is one: take it from the first split that has it
        return [hit for hit in hits if hit[0] is hits[0][0]]


def choose(by, reference, source):
    """ "ids" or "captions": what both folders have."""
    for way, attribute in (("ids", "ids"), ("captions", "texts")):
        if by in (way, "auto") and all(getattr(split, attribute) for split in [*reference, *source]):
            return way
    raise InputError("nothing to pair the pictures by: expected SPLIT_ids.txt or SPLIT_caps.txt in both folders")


def pair(reference, source, by, problems):
    """{split: [(Split, row) or None, for each reference picture]}. What has no partner goes to problems."""
    finder = Partners(source, by)
    pairs, used = {}, set()
    for split in reference:
        partners = pairs[split.split] = []
        for row in tqdm(range(split.n), desc=f"{split.split}: pairing by {by}", unit="picture", disable=None):
            hits = finder.find(split, row)
            partners.append(hits[0] if len(hits) == 1 else None)
            used.update(hits)
            if not hits:
                problems.add("without a partner", split.name(row), f"nothing like it in {source[0].folder}")
            elif len(hits) > 1:
                others = "; ".join(hit[0].name(hit[1]) for hit in hits[:3])
                problems.add("ambiguous", split.name(row), f"{len(hits)} partners: {others}")
    for split in source:
        left = sum((split, row) not in used for row in range(split.n))
        if left:
            print(f"note: {left} of {split.n} pictures of {split.prefix} are in no split of {reference[0].folder}")
    return pairs


def verify(split, partners, problems):
    """Compare the captions of all pairs, and the features of some. Prints what agrees."""
    pairs = [(row, *partner) for row, partner in enumerate(partners) if partner]
    with_texts = [(row, other, at) for row, other, at in pairs if split.texts and other.texts]
    agree = 0
    for row, other, at in with_texts:
        shared = len(set(split.texts[row]) & set(other.texts[at]))
        agree += shared > 0
        if not shared:
            problems.add("in disagreement", split.name(row), f"no caption in common with {other.name(at)}")
    both = [pair for pair in pairs if "ims" in split.arrays and "ims" in pair[1].arrays]
    some = both[:: max(1, len(both) // SAMPLE)]
    same = 0
    for row, other, at in some:
        a, b = (x.astype(np.float32) for x in (split.read("ims", row), other.read("ims", at)))
        if a.shape == b.shape and np.abs(a - b).max() <= CLOSE * max(np.abs(a).max(), 1):
            same += 1
        else:
            problems.add("of other features", split.name(row), f"they are not those of {other.name(at)}")
    said = f"{split.split}: {len(pairs)} of {split.n} paired; captions agree in {agree} of {len(with_texts)}"
    print(said + (f", features in {same} of {len(some)} compared" if some else ""))


def write(split, partners, opt, copy):
    """Write the source's arrays for the paired pictures of a reference split, in its order.

    copy: what else the reference has goes along, so that the folder is whole without it.
    """
    pairs = [(row, *partner) for row, partner in enumerate(partners) if partner]
    sources = list({id(other): other for _, other, _ in pairs}.values())
    arrays = {}
    for name in opt.arrays:
        for other in sources:
            if name not in other.arrays:
                raise InputError(f"{other.prefix}_{name}.npy: no such file, expected the array to put in order")
        rows = [other.arrays[name][0] for other in sources]
        arrays[name] = rows[0].shape[1:], rows[0].dtype
        for row in rows:
            if (row.shape[1:], row.dtype) != arrays[name]:
                raise InputError(f"{row.path}: rows of {row.shape[1:]} {row.dtype}, unlike those of {rows[0].path}")
    kept = {}
    if copy:
        kept = {name: (r.shape[1:], r.dtype) for name, (r, _) in split.arrays.items() if name not in arrays}
    ids = [split.names[row] if split.names else f"{split.split} {row}" for row, _, _ in pairs]
    inputs = [other.arrays[name][0].path for other in sources for name in arrays]
    settings = {"tool": "align", "partners": digest_lines(f"{other.split} {at}" for _, other, at in pairs)}
    out = SplitWriter(
        opt.out, split.split, ids, {**arrays, **kept}, settings, inputs, opt.overwrite, write_ids=bool(split.names)
    )
    with out:
        if out.finished:
            print(f"{split.split}: there already")
            return
        for row in tqdm(np.flatnonzero(~out.done), desc=f"{split.split}: writing", unit="picture", disable=None):
            own, other, at = pairs[row]
            values = {name: other.read(name, at) for name in arrays}
            out.write(row, **values, **{name: split.read(name, own) for name in kept})
        if copy and split.captions:
            k = len(split.captions) // split.n
            lines = [line for row, _, _ in pairs for line in split.captions[row * k : (row + 1) * k]]
            write_lines(os.path.join(opt.out, split.split + "_caps.txt"), lines)
        out.finish()
    print(f"{split.split}: {', '.join(arrays)} of {len(pairs)} pictures in {opt.out}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/align.py --reference scan/f30k_precomp --source pfan/f30k_precomp "
        "--out scan/f30k_precomp",
    )
    add = parser.add_argument
    add("--reference", required=True, metavar="DIR", help="the folder whose order counts (SCAN's features)")
    add("--source", required=True, metavar="DIR", help="the folder whose arrays are put in that order (positions)")
    add("--out", required=True, metavar="DIR", help="where they go; may be the reference")
    add("--arrays", nargs="+", default=["boxes"], help="which: boxes, ims, who_ims (default: boxes)")
    add("--splits", nargs="+", default=list(SPLITS), help="(default: those that are there)")
    add("--by", choices=("auto", "ids", "captions"), default="auto", help="pair by (default: %(default)s)")
    add("--skip_bad", action="store_true", help="leave out what has no partner; copies the rest of the reference")
    add("--overwrite", action="store_true", help="replace what is there")
    opt = parser.parse_args()
    reference, source = load(opt.reference, opt.splits), load(opt.source, SPLITS)
    by = choose(opt.by, reference, source)
    make_folder(opt.out)
    problems = Problems(os.path.join(opt.out, "align_problems.txt"))
    pairs = pair(reference, source, by, problems)
    for split in reference:
        verify(split, pairs[split.split], problems)
    if problems.counts["in disagreement"] or problems.counts["of other features"]:
        hint = "; --by captions pairs by these" if by == "ids" and problems.counts["in disagreement"] else ""
        raise InputError(f"{problems} (listed in {problems.path}){hint}")
    if problems.total and not opt.skip_bad:
        raise InputError(f"{problems} (listed in {problems.path}); --skip_bad leaves them out")
    if problems.total and os.path.realpath(opt.out) == os.path.realpath(opt.reference):
        raise InputError(f"--out {opt.out}: with --skip_bad expected another folder than the reference")
    for split in reference:
        if not any(pairs[split.split]):
            print(f"{split.split}: nothing to write")
            continue
        write(split, pairs[split.split], opt, copy=problems.total > 0)


if __name__ == "__main__":
    run(main)
