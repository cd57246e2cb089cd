"""Image files: found below a folder, read a little ahead, grouped into batches of one shape."""

import contextlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image, ImageOps

from lib.datasets.ids import IMAGE_SUFFIX, canonical_id, walk
from lib.errors import InputError

MOST_PIXELS = 10**8  # a larger image than this is not read, unless its format can be read in small
LEAST_SIDE = 32  # pixels that an image is scaled to at least


def find_images(folder, problems):
    """{key: paths below folder (a list)} of the image files, in the order of their names."""
    if not os.path.isdir(folder):
        found = "is no folder" if os.path.exists(folder) else "no such folder"
        raise InputError(f"{folder}: {found}, expected one of images")
    found = {}
    for path in walk(folder, IMAGE_SUFFIX, problems):
        path, name = os.path.relpath(path, folder), os.path.basename(path)
        for alias in {canonical_id(path), canonical_id(name), path, name}:
            found.setdefault(alias, []).append(path)
    if not found:
        raise InputError(f"{folder}: no images (jpg, png, bmp, gif, webp, tif, ppm) in it")
    return found


def read_image(path, short, long):
    """An image as RGB uint8 (h, w, 3), upright by its EXIF orientation, scaled so that its shorter side is short
    (or its longer one long, if that would be longer), and its upright size (height, width) before scaling.

    Greyscale, palette, 16-bit and CMYK become RGB; what is transparent becomes white. A broken EXIF block counts for
    none.
    """
    with Image.open(path) as image:
        size = image.size
        image.draft(None, (2 * long, 2 * long))  # a JPEG several times too large is decoded smaller at once
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}×{image.height} pixels, more than {MOST_PIXELS}")
        image.load()
        loaded = image.size
        with contextlib.suppress(Exception):  # Pillow's readers raise whatever a broken block leads them to
            ImageOps.exif_transpose(image, in_place=True)
        if image.size != loaded:
            size = size[::-1]
        if image.mode.startswith("I"):  # 16 bits: convert() would cut at 255
            values = np.asarray(image, dtype=np.float64)
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        width, height = size
        scale = min(short / min(size), long / max(size))
        target = max(LEAST_SIDE, round(width * scale)), max(LEAST_SIDE, round(height * scale))
        pixels = np.array(image.convert("RGB").resize(target, Image.Resampling.BILINEAR, reducing_gap=3.0))
    return pixels, (height, width)


def read_ahead(paths, opt, problems, boxes_of):
    """Yield (path, pixels, size, boxes) of paths below opt.images, read by threads a little ahead.

    boxes_of(path, size) → boxes or None. Images that cannot be read or used are reported to problems.
    """

    def load(path):
        pixels, size = read_image(os.path.join(opt.images, path), opt.image_size, opt.image_size * 5 // 3)
        return path, pixels, size, boxes_of(path, size)

    paths, waiting = iter(paths), deque()
    with ThreadPoolExecutor(opt.workers) as pool:
        while True:
            waiting.extend((path, pool.submit(load, path)) for path in islice(paths, 2 * opt.workers - len(waiting)))
            if not waiting:
                return
            path, loading = waiting.popleft()
            if error := loading.exception():  # Pillow's readers raise whatever a broken file leads them to
                problems.add("unreadable", os.path.join(opt.images, path), f"{type(error).__name__}: {error}; skipped")
            else:
                yield loading.result()


def batches(images, batch_size):
    """Group (path, pixels, …) by shape, so that no image is padded and its features are its own alone.

    At most 4 batches' worth of images wait for others of their shape.
    """
    groups = {}
    for image in images:
        groups.setdefault(image[1].shape, []).append(image)
        largest = max(groups, key=lambda shape: len(groups[shape]))
        if len(groups[largest]) == batch_size or sum(map(len, groups.values())) > 4 * batch_size:
            yield groups.pop(largest)
    yield from groups.values()
