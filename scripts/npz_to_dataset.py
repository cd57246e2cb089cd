"""A folder of feature files, one a picture (.npz or .npy) → SPLIT_ims.npy, SPLIT_boxes.npy, SPLIT_ids.txt.

An .npz file holds x (R, D), and bbox (R, 4) x1 y1 x2 y2 in pixels, image_h, image_w and num_bbox, each in an array of
its name or in the dict of an array called info; feat, features, boxes and num_boxes are known as well. An .npy file
holds (R, D), with such a dict in NAME_info.npy. --boxes names a second folder with the boxes in NAME.npy. Without any
boxes only the features are written, for training with --position none.
The files' names are the ids. D, and with --regions fixed the number of regions, are those of the first file.
A stopped run goes on where it was; --skip_bad finishes one that found damaged files.
"""

import argparse
import os
import re

from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets.ids import SPLITS, canonical_id, split_ids
from lib.datasets.json_files import json_items
from lib.datasets.npz_files import read_regions
from lib.datasets.problems import Problems
from lib.errors import InputError, run
from lib.files import make_folder
from scripts.features.feature_job import FeatureJob, add_flags, default_n_regions

SUFFIX = re.compile(r"\.np[yz]$")


def find_files(folder, problems):
    """{canonical id: path} of the feature files in folder and below it, in the order of their names."""
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    paths = {}
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(root, name)
            is_info = name.endswith("_info.npy") and name.replace("_info.npy", ".npy") in names
            if not SUFFIX.search(name) or is_info:
                continue
            first = paths.setdefault(canonical_id(SUFFIX.sub("", name)), path)
            if first != path:
                problems.add("doubled", path, f"of the same picture as {first}")
    if not paths:
        raise InputError(f"{folder}: no .npz and no .npy files in it")
    return paths


def read_sizes(text):
    """--sizes: {canonical id: (height, width)} of a JSON file, or (height, width) of all pictures."""
    if pair := re.fullmatch(r"(\d+\.?\d*)[x,](\d+\.?\d*)", text):
        return tuple(map(float, pair.groups()))
    sizes = {}
    try:
        for image in json_items(text, "images"):
            size = float(image["height"]), float(image["width"])
            for name in (image["id"], image.get("file_name", image["id"])):
                sizes[canonical_id(name)] = size
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"{text}: expected images with id, height and width ({reason})") from None
    if not sizes:
        raise InputError(f"{text}: no sizes, expected JSON with images of id, height and width, or HxW")
    return sizes


class Reader:
    """Reads the regions of a picture by its canonical id. paths: {canonical id: path}. opt: boxes, sizes."""

    def __init__(self, paths, opt):
        self.paths, self.boxes = paths, opt.boxes
        self.sizes = read_sizes(opt.sizes) if opt.sizes else None

    def read(self, name):
        """The Regions of a picture. Raises InputError naming the file and what is malformed."""
        path, size, boxes_path = self.paths[name], self.sizes, None
        if isinstance(size, dict):
            size = size.get(name)
        if self.boxes:
            boxes_path = os.path.join(self.boxes, SUFFIX.sub("", os.path.basename(path)) + ".npy")
        return read_regions(path, boxes_path, size)

    def first(self, names):
        """The Regions of the first of these pictures that can be read. Raises the first InputError where none can."""
        failure = None
        for name in names:
            try:
                return self.read(name)
            except InputError as error:
                failure = failure or error
        raise failure


def convert(reader, job, img_dim, problems):
    """Write the pictures that are not written yet, and report what is malformed or missing."""
    names = [name for name in job.rows if not job.is_done(name)]
    for name in tqdm(names, unit="picture", disable=None):
        if name not in reader.paths:
            continue
        try:
            regions = reader.read(name)
            if regions.features.shape[1] != img_dim:
                raise InputError(f"features {regions.features.shape}, expected (R, {img_dim}) as in the first file")
            if job.with_boxes and regions.boxes is None:
                raise InputError("no boxes, which the first file has")
            job.write(name, regions)
        except InputError as error:
            problems.add("malformed", reader.paths[name], str(error).removeprefix(f"{reader.paths[name]}: "))
        else:
            job.check_early()
    job.counts["of other pictures"] = len(reader.paths.keys() - job.rows.keys())
    job.report_missing(reader.paths, "no file of this name")


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/npz_to_dataset.py features/train2014 --out data/coco_precomp --split train\n"
        "example: python scripts/npz_to_dataset.py cocobu_att --boxes cocobu_box --sizes instances_train2014.json "
        "--out data/coco_precomp --ids train=train_ids.txt",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the folder of feature files, one a picture")
    add_flags(add)
    add("--split", choices=SPLITS, help="instead of id lists: every picture of the folder, by name, as this split")
    help_number = "regions a picture (default: fixed, as many as the first file has; best 36; all 100)"
    add("--n_regions", type=int, metavar="N", help=help_number)
    add("--boxes", metavar="FOLDER", help="the folder of the boxes, NAME.npy (R, 4) each, where they stand apart")
    help_sizes = (
        "sizes of the pictures, where the files lack them: COCO-style JSON (images with id, height, width), or HxW"
    )
    add("--sizes", metavar="FILE|HxW", help=help_sizes)
    return parser


def main():
    opt = get_parser().parse_args()
    if opt.n_regions is not None and opt.n_regions < 1:
        raise InputError(f"--n_regions {opt.n_regions}: expected at least 1")
    if opt.split and opt.ids:
        raise InputError("--split and --ids: expected one of them")
    if opt.boxes and not os.path.isdir(opt.boxes):
        raise InputError(f"{opt.boxes}: no such folder")
    make_folder(opt.out)
    problems = Problems(os.path.join(opt.out, "npz_problems.txt"))
    paths = find_files(opt.folder, problems)
    if opt.split:
        splits = {opt.split: [SUFFIX.sub("", os.path.basename(path)) for path in paths.values()]}
    else:
        splits = split_ids(opt.out, opt.ids, problems)
    reader = Reader(paths, opt)
    listed = [canonical_id(image_id) for ids in splits.values() for image_id in ids]
    there = [name for name in listed if name in paths]
    if not there:
        raise InputError(f"{opt.folder}: none of the {len(listed)} pictures of the id lists is there")
    first = reader.first(there)
    opt.img_dim = first.features.shape[1]
    opt.n_regions = len(first.features) if opt.n_regions is None and opt.regions == "fixed" else default_n_regions(opt)
    with_boxes = first.boxes is not None
    print(f"{paths[there[0]]}: features {first.features.shape}, {'boxes' if with_boxes else 'no boxes'}")
    settings = {"tool": "npz_to_dataset", "regions": opt.regions, "boxes": opt.boxes, "sizes": opt.sizes}
    inputs = [opt.sizes] if isinstance(reader.sizes, dict) else []
    with FeatureJob(opt.folder, splits, settings, inputs, opt, problems, with_boxes) as job:
        if job.writers:
            convert(reader, job, opt.img_dim, problems)
            job.finish("pictures")
            if not with_boxes:
                print("no boxes: train with --position none, or make SPLIT_boxes.npy with position.py")


if __name__ == "__main__":
    run(main)
