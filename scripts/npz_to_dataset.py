"""A folder of feature files, one an image (.npz or .npy) → SPLIT_ims.npy, SPLIT_boxes.npy, SPLIT_ids.txt.

An .npz file holds x (R, D), and bbox (R, 4) x1 y1 x2 y2 in pixels, image_h, image_w and num_bbox, each in an array of
its name or in the dict of an array called info; feat, features, boxes and num_boxes are known as well. An .npy file
holds (R, D), with such a dict in NAME_info.npy. --boxes names a second folder with the boxes in NAME.npy. Without any
boxes only the features are written, for training with --position none.
The files' names are the ids. D, and with --regions fixed the number of regions, are those of the first file.
A stopped run goes on where it was; --skip_bad finishes one that found damaged files.

example: python scripts/npz_to_dataset.py features/train2014 --out data/coco_precomp --split train
example: python scripts/npz_to_dataset.py cocobu_att --boxes cocobu_box --sizes instances_train2014.json \\
    --out data/coco_precomp --ids train=train_ids.txt
"""

import argparse
import contextlib
import os
import re

from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets.boxes import CocoImage, parse_size
from lib.datasets.ids import SPLITS, canonical_id, split_ids, walk
from lib.datasets.json_files import json_items
from lib.datasets.npz_files import read_regions
from lib.datasets.problems import Problems
from lib.datasets.writer import Origin
from lib.errors import InputError, brief, run
from scripts.features.feature_job import FeatureJob, add_flags, default_n_regions

SUFFIX = re.compile(r"\.np[yz]$")


def find_files(folder, problems):
    """{canonical id: path} of the feature files in folder and below it, in the order of their names."""
    if not os.path.isdir(folder):
        found = "is a file" if os.path.exists(folder) else "no such folder"
        raise InputError(f"{folder}: {found}, expected a folder of files, one an image")
    paths = {}
    for path in walk(folder, SUFFIX, problems):
        if path.endswith("_info.npy") and os.path.exists(path.removesuffix("_info.npy") + ".npy"):
            continue
        first = paths.setdefault(canonical_id(id_of(path)), path)
        if first != path:
            problems.add("doubled", path, f"of the same image as {first}")
    if not paths:
        raise InputError(f"{folder}: no .npz and no .npy files in it")
    return paths


def id_of(path):
    """The id that a file's name gives."""
    return SUFFIX.sub("", os.path.basename(path))


def read_sizes(path):
    """{canonical id: (height, width)} of a JSON file with COCO's images."""
    by_id, by_name = {}, {}
    for image in json_items(path, "images", CocoImage):
        if image.height is None or image.width is None:
            raise InputError(f"{path}: image {brief(image.id)} without height and width")
        size = image.height, image.width
        by_id[canonical_id(image.id)] = by_name[canonical_id(image.file_name or image.id)] = size
    if not by_id:
        raise InputError(f"{path}: no sizes, expected JSON with images of id, height and width, or HxW")
    return by_id | by_name  # the id of one image may be the file name of another


def find_sources(opt, problems):
    """{canonical id: the arguments of read_regions: path, path of the boxes or None, size or None} of the images."""
    paths = find_files(opt.folder, problems)
    size = parse_size(opt.sizes) if opt.sizes else None
    sizes = read_sizes(opt.sizes) if opt.sizes and not size else {}
    sources = {}
    for name, path in paths.items():
        boxes = os.path.join(opt.boxes, id_of(path) + ".npy") if opt.boxes else None
        sources[name] = path, boxes, sizes.get(name, size)
    return sources


def read_first(sources, names):
    """Path and Regions of the first of these images that can be read. Raises InputError where none can."""
    for name in names:
        with contextlib.suppress(InputError):
            return sources[name][0], read_regions(*sources[name])
    return read_regions(*sources[names[0]])  # raises what is wrong with it


def convert(sources, job, img_dim, problems):
    """Write the images that are not written yet, and report what is malformed or missing."""
    for name in tqdm(job.todo(), unit="image", disable=None):
        if name not in sources:
            continue
        path = sources[name][0]
        try:
            regions = read_regions(*sources[name])
            if regions.features.shape[1] != img_dim:
                raise InputError(f"features {regions.features.shape}, expected (R, {img_dim}) as in the first file")
            if "boxes" in job.arrays and regions.boxes is None:
                raise InputError("no boxes, which the first file has")
            job.write(name, regions)
        except InputError as error:
            problems.add("malformed", path, str(error).removeprefix(f"{path}: "))
        else:
            job.check_early()
    job.counts["of other images"] = len(sources.keys() - job.rows.keys())
    job.report_missing(sources, "no file of this name")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the folder of feature files, one an image")
    add_flags(add)
    add("--split", choices=SPLITS, help="instead of id lists: every image of the folder, by name, as this split")
    help_number = "regions an image (default: fixed, as many as the first file has; best 36; all 100)"
    add("--n_regions", type=int, metavar="N", help=help_number)
    add("--boxes", metavar="FOLDER", help="the folder of the boxes, NAME.npy (R, 4) each, where they stand apart")
    help_sizes = (
        "sizes of the images, where the files lack them: COCO-style JSON (images with id, height, width), or HxW"
    )
    add("--sizes", metavar="FILE|HxW", help=help_sizes)
    return parser


def main():
    opt = get_parser().parse_args()
    if opt.split and opt.ids:
        raise InputError("--split and --ids: expected one of them")
    problems = Problems(os.path.join(opt.out, "npz_problems.txt"))
    sources = find_sources(opt, problems)
    if opt.split:
        splits = {opt.split: [id_of(path) for path, _, _ in sources.values()]}
    else:
        splits = split_ids(opt.out, opt.ids, problems)
    listed = [canonical_id(image_id) for ids in splits.values() for image_id in ids]
    there = [name for name in listed if name in sources]
    if not there:
        raise InputError(f"{opt.folder}: none of the {len(listed)} images of the id lists is there")
    path, first = read_first(sources, there)
    opt.img_dim = first.features.shape[1]
    opt.n_regions = len(first.features) if opt.n_regions is None and opt.regions == "fixed" else default_n_regions(opt)
    arrays = ("ims",) if first.boxes is None else ("ims", "boxes")
    print(f"{path}: features {first.features.shape}, {'no boxes' if first.boxes is None else 'boxes'}")

    def files(image_id):
        """The paths of an image's files."""
        paths = sources.get(canonical_id(image_id), ())[:2]
        return [path for path in paths if path and os.path.isfile(path)]

    settings = {"tool": "npz_to_dataset", "regions": opt.regions, "boxes": opt.boxes, "sizes": opt.sizes}
    inputs = [opt.sizes] if opt.sizes and os.path.isfile(opt.sizes) else []
    origin = Origin(settings, inputs, files)
    with FeatureJob(opt, problems, splits, arrays, origin, opt.regions, source=opt.folder) as job:
        if job.writers:
            convert(sources, job, opt.img_dim, problems)
            job.finish("images")
            if first.boxes is None:
                print("no boxes: train with --position none, or make SPLIT_boxes.npy with position.py")


if __name__ == "__main__":
    run(main)
