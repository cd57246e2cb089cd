"""Put the position files of one dataset folder in the order of another's features.

Images are paired by their ids where both folders have SPLIT_ids.txt, else by their captions: all of them the same
(except for case and punctuation), or most of them; else by their regions: regions that overlap look alike. A partner
may lie in another split than the image it belongs to. Whatever they are paired by, the pairs are verified by the
captions, by the features where both folders have them, and by the regions. Nothing is written where a pair fails.

example: python scripts/align.py --reference scan/f30k_precomp --source pfan/f30k_precomp --out scan/f30k_precomp
"""

import argparse
import os

import numpy as np
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets import region_match
from lib.datasets.ids import SPLITS
from lib.datasets.pairing import choose, load, pair
from lib.datasets.problems import Problems
from lib.datasets.writer import Origin, SplitWriter
from lib.errors import InputError, run
from lib.files import digest_lines, write_lines

SAMPLE = 100  # images of a split whose features and regions are compared
CLOSE = 1e-3  # relative difference of features that are the same; float16 rounds by 5e-4


def verify(split, pairs, problems):
    """Compare the captions of all pairs, and features and regions of a sample. Prints what agrees."""
    captioned = [pair for pair in pairs if all(image.split.captions for image in pair)]
    others = [pair for pair in captioned if set.isdisjoint(*(image.keys("captions") for image in pair))]
    for image, partner in others:
        problems.add("in disagreement", str(image), f"no caption in common with {partner}")
    agree = len(captioned) - len(others)
    said = f"{split.split}: {len(pairs)} of {split.n} paired; captions agree in {agree} of {len(captioned)}"
    sample = pairs[:: max(1, len(pairs) // SAMPLE)] if "ims" in split.arrays else []
    if with_features := [pair for pair in sample if "ims" in pair[1].split.arrays]:
        others = [pair for pair in with_features if not same_features(*pair)]
        for image, partner in others:
            problems.add("of other features", str(image), f"not the features of {partner}")
        said += f", features in {len(with_features) - len(others)} of {len(with_features)} compared"
    print(said)
    if with_boxes := [pair for pair in sample if "boxes" in pair[1].split.arrays]:
        check_regions(split, with_boxes, problems)


def same_features(image, partner):
    a, b = (features.astype(np.float32) for features in (image.read("ims"), partner.read("ims")))
    return a.shape == b.shape and np.abs(a - b).max() <= CLOSE * max(np.abs(a).max(), 1)


def check_regions(split, pairs, problems):
    """Judge whether the partners' boxes belong to the images' features."""
    features = np.array([image.read("ims") for image, _ in pairs])
    grids = [partner.read("boxes") for _, partner in pairs]
    if len({grid.shape for grid in grids}) > 1 or features.ndim != 3 or grids[0].ndim != 2:
        return  # write() and training name what is wrong with shapes
    judgement = region_match.judge(features, np.array(grids))
    print(f"{split.split}: {judgement}")
    if judgement.wrong:
        problems.add("of other regions", split.prefix, str(judgement))


def write(split, pairs, opt, copy):
    """Write the source's arrays for the paired images of a reference split, in its order.

    copy: what else the reference has goes along, so that the folder is whole without it.
    """
    sources = list(dict.fromkeys(partner.split for _, partner in pairs))
    arrays = {name: common_row(name, sources) for name in opt.arrays}
    kept = {}
    if copy:
        kept = {name: (array.shape[1:], array.dtype) for name, (array, _) in split.arrays.items() if name not in arrays}
    ids = [split.names[image.row] if split.names else f"{split.split} {image.row}" for image, _ in pairs]
    inputs = [other.arrays[name][0].filename for other in sources for name in arrays]
    partners = digest_lines(f"{partner.split.split} {partner.row}" for _, partner in pairs)
    origin = Origin({"tool": "align", "partners": partners}, inputs)
    out = SplitWriter(opt.out, split.split, ids, arrays | kept, origin, opt.overwrite, write_ids=bool(split.names))
    with out:
        if out.finished:
            print(f"{split.split}: there already")
            return
        for row in tqdm(np.flatnonzero(~out.done), desc=f"{split.split}: writing", unit="image", disable=None):
            image, partner = pairs[row]
            values = {name: partner.read(name) for name in arrays} | {name: image.read(name) for name in kept}
            out.write(row, **values)
        if copy and split.captions:
            lines = [line for image, _ in pairs for line in image.captions()]
            write_lines(os.path.join(opt.out, split.split + "_caps.txt"), lines)
        out.finish()
    print(f"{split.split}: {', '.join(arrays)} of {len(pairs)} images in {opt.out}")


def common_row(name, sources):
    """Shape and type of a row of array name, the same in all sources."""
    for source in sources:
        if name not in source.arrays:
            raise InputError(f"{source.prefix}_{name}.npy: no such file, expected the array to put in order")
    arrays = [source.arrays[name][0] for source in sources]
    if len(rows := {(array.shape[1:], array.dtype) for array in arrays}) > 1:
        found = " and ".join(f"{shape} {dtype}" for shape, dtype in rows)
        raise InputError(f"{sources[0].folder}: rows of {name} are {found}, expected the same in all splits")
    return rows.pop()


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--reference", required=True, metavar="DIR", help="the folder whose order counts (SCAN's features)")
    add("--source", required=True, metavar="DIR", help="the folder whose arrays are put in that order (positions)")
    add("--out", required=True, metavar="DIR", help="where they go; may be the reference")
    add("--arrays", nargs="+", default=["boxes"], help="which: boxes, ims, who_ims (default: boxes)")
    add("--splits", nargs="+", default=list(SPLITS), help="(default: those that are there)")
    add("--by", choices=("auto", "ids", "captions", "regions"), default="auto", help="pair by (default: %(default)s)")
    add("--skip_bad", action="store_true", help="leave out what has no partner; copies the rest of the reference")
    add("--overwrite", action="store_true", help="replace what is there")
    return parser


def align(opt):
    """Pair the images of opt.reference with those of opt.source, verify the pairs, write the arrays.

    Raises InputError where the pairs are not proved, or some images have none and may not be left out.
    """
    reference, source = load(opt.reference, opt.splits), load(opt.source, SPLITS)
    by = choose(opt.by, reference, source)
    problems = Problems(os.path.join(opt.out, "align_problems.txt"))
    pairs = pair(reference, source, by, problems)
    for split in reference:
        verify(split, pairs[split.split], problems)
    listed = f"{problems} (listed in {problems.path})"
    if any(problems.counts[kind] for kind in ("in disagreement", "of other features", "of other regions")):
        hint = "; --by captions pairs by these" if by == "ids" and problems.counts["in disagreement"] else ""
        raise InputError(listed + hint)
    if problems.total and not opt.skip_bad:
        raise InputError(f"{listed}; --skip_bad leaves them out")
    if problems.total and os.path.realpath(opt.out) == os.path.realpath(opt.reference):
        raise InputError(f"--out {opt.out}: with --skip_bad expected another folder than the reference")
    for split in reference:
        if pairs[split.split]:
            write(split, pairs[split.split], opt, copy=problems.total > 0)
        else:
            print(f"{split.split}: nothing to write")


def main():
    align(get_parser().parse_args())


if __name__ == "__main__":
    run(main)
