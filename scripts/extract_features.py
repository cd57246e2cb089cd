"""Pictures → SPLIT_ims.npy, SPLIT_boxes.npy, SPLIT_ids.txt (or a TSV): 36 regions a picture and their features.

Regions are the best boxes of torchvision's Faster R-CNN (--regions proposals), or 36 fixed overlapping windows that
need no detector (--regions windows). A region's feature is the mean over its part (RoIAlign) of the last map of a
backbone: the detector's own ResNet-50 (2048), another ResNet (2048) or EfficientNet-Lite0 (1280).
The pictures of a split are those of DIR's SPLIT_ids.txt; without one, all pictures below --images become --split.
"""

import argparse
import base64
import contextlib
import ctypes
import hashlib
import os
import sys
import types
from collections import deque
from concurrent.futures import ThreadPoolExecutor

if __name__ == "__main__":  # memory that nothing here needs
    # oneDNN keeps the code that it makes for 1,024 layers and shapes of picture: 100 MB after some hundred pictures
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # torchvision would import PyTorch's compiler, to ask it one question, and the compiler of GPU kernels: 150 MB
    sys.modules["triton"] = None
    compiler = types.SimpleNamespace(is_compile_supported=lambda device: False)
    sys.modules["torch._dynamo"] = sys.modules["torch._dynamo.utils"] = compiler
    import torchvision.ops  # noqa: F401

    del sys.modules["torch._dynamo"], sys.modules["torch._dynamo.utils"]

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.ops import roi_align
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.constants import N_REGIONS
from lib.datasets.ids import PICTURE_SUFFIX, SPLITS, canonical_id, split_ids
from lib.datasets.problems import Problems
from lib.datasets.writer import SplitWriter
from lib.distributed import pick_device  # not through model, which brings NLTK and SciPy along: 73 MB
from lib.errors import InputError, run
from lib.files import make_folder, name_in_errors
from position import position_grid
from scripts.features.region_networks import BACKBONES, Detector, load_backbone, windows

STRIDE = 32  # pixels of the input per cell of every backbone's last map
POOL = 7  # points a side at which a region is sampled
SETTINGS = ("regions", "backbone", "weights", "detector", "detector_weights", "image_size", "seed")  # decide the values
MOST_PIXELS = 10**8  # a larger picture than this is not read, unless its format can be read in small


def find_pictures(folder):
    """{key: paths below folder (a list)} of the picture files, in the order of their names."""
    if not os.path.isdir(folder):
        found = "is no folder" if os.path.exists(folder) else "no such folder"
        raise InputError(f"{folder}: {found}, expected one of pictures")
    found = {}
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if PICTURE_SUFFIX.search(name):
                path = os.path.relpath(os.path.join(root, name), folder)
                for alias in {canonical_id(path), canonical_id(name), path, name}:
                    found.setdefault(alias, []).append(path)
    if not found:
        raise InputError(f"{folder}: no pictures (jpg, png, bmp, gif, webp, tif, ppm) in it")
    return found


def read_picture(path, short, long):
    """A picture as RGB uint8 (h, w, 3), upright by its EXIF orientation, scaled so that its shorter side is short
    (or its longer one long, if that would be longer), and its upright size (height, width) before scaling.

    Greyscale, palette, 16-bit and CMYK become RGB; what is transparent becomes white.
    """
    with Image.open(path) as image:
        size = image.size
        image.draft(None, (2 * long, 2 * long))  # a JPEG several times too large is decoded smaller at once
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels, more than {MOST_PIXELS}")
        if image.getexif().get(0x0112) in (5, 6, 7, 8):  # lies on its side
            size = size[::-1]
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: convert() would cut at 255
            values = np.asarray(image, dtype=np.float64)
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        width, height = size
        scale = min(short / min(size), long / max(size))
        target = max(STRIDE, round(width * scale)), max(STRIDE, round(height * scale))
        pixels = np.array(image.convert("RGB").resize(target, Image.Resampling.BILINEAR, reducing_gap=3.0))
    return pixels, (height, width)


def read_ahead(items, opt, problems):
    """Yield (row, pixels, size) of items (row, path), read by threads a little ahead; problems names the unreadable."""

    def load(row, path):
        try:
            return row, *read_picture(path, opt.image_size, opt.image_size * 5 // 3)
        except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
            return row, path, error

    with ThreadPoolExecutor(opt.workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(load, *item))
            if len(waiting) > 2 * opt.workers:
                yield from _readable(waiting.popleft().result(), problems)
        while waiting:
            yield from _readable(waiting.popleft().result(), problems)


def _readable(loaded, problems):
    row, what, size = loaded
    if isinstance(size, Exception):
        problems.add("unreadable", what, f"{type(size).__name__}: {size}; skipped")
    else:
        yield row, what, size


def batches(pictures, batch_size):
    """Group (row, pixels, size) by shape, so that no picture is padded and its features are its own alone.

    At most 4 batches' worth of pictures wait for others of their shape.
    """
    groups, waiting = {}, 0
    for picture in pictures:
        group = groups.setdefault(picture[1].shape, [])
        group.append(picture)
        waiting += 1
        if len(group) < batch_size and waiting > 4 * batch_size:
            group = max(groups.values(), key=len)
        if len(group) >= batch_size or waiting > 4 * batch_size:
            waiting -= len(group)
            yield groups.pop(group[0][1].shape)
    yield from groups.values()


@torch.no_grad()
def extract(pixels, sizes, backbone, detector, device):
    """Regions of a batch of pictures of one shape.

    pixels: list of B (h, w, 3) uint8. sizes: list of B (height, width) before scaling. detector: None for windows.
    Returns features (B, 36, D), boxes (B, 36, 4) in pixels of those sizes, whole-picture features (B, D), float32.
    """
    images = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 255
    height, width = images.shape[2:]
    if detector is None:
        last, boxes = None, images.new_tensor(windows(height, width)).expand(len(images), -1, -1)
    else:
        last, boxes = detector(images)
    if backbone is not None:
        last = backbone(images)
    last = last.float()
    # sampled densely enough that a box over the whole map still averages all of its cells
    pooled = roi_align(last, list(boxes), POOL, spatial_scale=1 / STRIDE, sampling_ratio=-1, aligned=True)
    features = pooled.mean((2, 3)).reshape(len(images), N_REGIONS, -1)
    scale = np.array([[w / width, h / height] * 2 for h, w in sizes])[:, None]
    return features.cpu().numpy(), boxes.cpu().numpy() * scale, last.mean((2, 3)).cpu().numpy()


def regions(items, opt, networks, problems, unit):
    """Yield (row, features (36, D), boxes (36, 4), size, whole (D,)) for items (row, path)."""
    with tqdm(total=len(items), desc=unit, unit="picture", disable=None) as bar:
        for batch in batches(read_ahead(items, opt, problems), opt.batch_size):
            rows, pixels, sizes = zip(*batch, strict=True)
            features, boxes, wholes = extract(pixels, sizes, *networks)
            yield from zip(rows, features, boxes, sizes, wholes, strict=True)
            bar.update(len(batch))


def write_dataset(split, ids, paths, opt, networks, img_dim, problems):
    """Write one split of the dataset folder opt.out."""
    number = np.float16 if opt.float16 else np.float32
    arrays = {"ims": ((N_REGIONS, img_dim), number), "boxes": ((N_REGIONS, 31), np.float32)}
    if opt.whole:
        arrays["who_ims"] = ((img_dim,), number)
    settings = {"tool": "extract_features", **{name: getattr(opt, name) for name in SETTINGS}}
    with SplitWriter(opt.out, split, ids, arrays, settings, overwrite=opt.overwrite) as out:
        if out.finished:
            print(f"{split}: there already")
            return
        items = [(row, paths[row]) for row in np.flatnonzero(~out.done) if paths[row]]
        no_area = 0
        for row, features, boxes, size, whole in regions(items, opt, networks, problems, split):
            grid = position_grid(boxes, size)
            no_area += int((grid[:, -1] == 0).sum())
            extra = {"who_ims": whole} if opt.whole else {}
            out.write(row, ims=features, boxes=grid, **extra)
        kept = out.finish()
    print(f"{split}: {kept} of {len(ids)} pictures, {N_REGIONS} regions of {img_dim} numbers each, in {opt.out}")
    if no_area:
        print(f"{split}: {no_area} boxes without area")


def write_tsv(path, ids, paths, opt, networks, problems):
    """Write opt.tsv: image_id image_w image_h num_boxes boxes features.

    The whole lines of a stopped run with the same settings are kept.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: is no file, expected one or a free name")
    if os.path.exists(path) and not opt.overwrite:
        print(f"{path}: there already")
        return
    settings = hashlib.sha256(repr([getattr(opt, name) for name in SETTINGS]).encode()).hexdigest()
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
        for row, features, boxes, (height, width), _ in regions(items, opt, networks, problems, "pictures"):
            data = [base64.b64encode(np.ascontiguousarray(x, dtype="<f4")).decode() for x in (boxes, features)]
            file.write("\t".join(map(str, (ids[row], width, height, N_REGIONS, *data))).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not file.tell():
            raise InputError(f"{path}: none of the {len(ids)} pictures could be used")
    os.replace(part, path)
    print(f"{path}: {len(done) + len(items)} pictures asked for, {problems.counts['unreadable']} of them unreadable")


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
        "--backbone efficientnet_lite0",
    )
    add = parser.add_argument
    add("--images", required=True, metavar="DIR", help="the folder of pictures")
    add("--out", required=True, metavar="DIR", help="the dataset folder; its SPLIT_ids.txt say which pictures")
    add("--ids", nargs="+", metavar="SPLIT=FILE", help="id lists to use instead of the folder's own")
    add("--split", choices=SPLITS, default="train", help="of all pictures, without id lists (default: %(default)s)")
    add("--tsv", metavar="FILE", help="write this bottom-up-attention TSV instead of arrays")
    add("--regions", choices=("proposals", "windows"), default="proposals", help="(default: %(default)s)")
    help_backbone = "detector: its own ResNet-50 (default with proposals); with windows: resnet50"
    add("--backbone", choices=("detector", *BACKBONES), help=help_backbone)
    help_weights = "download (torchvision's, on first use; EfficientNet-Lite0's lie in its package), random, or a file"
    add("--weights", default="download", help=f"of the backbone: {help_weights} (default: %(default)s)")
    add("--detector", choices=Detector.NAMES, default=Detector.NAMES[0], help="(default: %(default)s)")
    add("--detector_weights", default="download", help="of the detector: likewise (default: %(default)s)")
    add("--image_size", type=int, help="pixels of the shorter side (default: 600 with proposals, 448 with windows)")
    add("--whole", action="store_true", help="also write the whole picture's feature, SPLIT_who_ims.npy")
    add("--float16", action="store_true", help="features in half the space")
    add("--batch_size", type=int, help="pictures at once (default: 8 on a GPU; 1 on the CPU, where more are no faster)")
    add("--workers", type=int, default=4, help="threads that read pictures (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1; auto: CUDA if there, else the CPU (default: %(default)s)")
    add("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")
    return parser


def free_at_once():
    """Have glibc give large blocks back when they are freed: maps of many sizes would pile up as holes otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def main():
    free_at_once()
    opt = get_parser().parse_args()
    opt.backbone = opt.backbone or ("detector" if opt.regions == "proposals" else "resnet50")
    device = pick_device(opt.device)
    opt.batch_size = (8 if device.type == "cuda" else 1) if opt.batch_size is None else opt.batch_size
    opt.image_size = (600 if opt.regions == "proposals" else 448) if opt.image_size is None else opt.image_size
    if opt.regions == "windows" and opt.backbone == "detector":
        raise InputError("--regions windows has no detector: expected --backbone " + " | ".join(BACKBONES))
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
    torch.manual_seed(opt.seed)
    detector = Detector(opt.detector, opt.detector_weights).to(device) if opt.regions == "proposals" else None
    backbone = None if opt.backbone == "detector" else load_backbone(opt.backbone, opt.weights).to(device)
    img_dim = 2048 if backbone is None else BACKBONES[opt.backbone]
    networks = (backbone, detector, device)
    if opt.tsv:
        ids, files = ([x for part in parts.values() for x in part] for parts in (splits, paths))
        write_tsv(opt.tsv, ids, files, opt, networks, problems)
    else:
        for split, ids in splits.items():
            write_dataset(split, ids, paths[split], opt, networks, img_dim, problems)
    if problems.total:
        print(f"{problems} (listed in {problems.path})")


if __name__ == "__main__":
    run(main)
