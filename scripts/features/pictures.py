"""Picture files: found below a folder, read a little ahead, grouped into batches of one shape."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from lib.datasets.ids import PICTURE_SUFFIX, canonical_id
from lib.errors import InputError

MOST_PIXELS = 10**8  # a larger picture than this is not read, unless its format can be read in small
LEAST_SIDE = 32  # pixels that a picture is scaled to at least


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
        target = max(LEAST_SIDE, round(width * scale)), max(LEAST_SIDE, round(height * scale))
        pixels = np.array(image.convert("RGB").resize(target, Image.Resampling.BILINEAR, reducing_gap=3.0))
    return pixels, (height, width)


def read_ahead(items, opt, problems, boxes_of):
    """Yield (row, pixels, size, boxes) of items (row, path), read by threads a little ahead.

    boxes_of(path, size) → boxes or None. Pictures that cannot be read or used are reported to problems.
    """

    def load(row, path):
        try:
            pixels, size = read_picture(path, opt.image_size, opt.image_size * 5 // 3)
            return row, pixels, size, boxes_of(path, size)
        except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
            problem = f"{type(error).__name__}: {error}; skipped"
            return path, problem

    def readable(loaded):
        if len(loaded) == 2:
            problems.add("unreadable", *loaded)
            return ()
        return (loaded,)

    with ThreadPoolExecutor(opt.workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(load, *item))
            if len(waiting) > 2 * opt.workers:
                yield from readable(waiting.popleft().result())
        while waiting:
            yield from readable(waiting.popleft().result())


def batches(pictures, batch_size):
    """Group (row, pixels, …) by shape, so that no picture is padded and its features are its own alone.

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
