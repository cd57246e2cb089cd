"""Regions of the demo's images: boxes as a detector would propose them, and features from pixels alone."""

import numpy as np

from lib.constants import N_REGIONS
from scripts.demo.scenes import HEIGHT, WIDTH

CELLS = 12  # a crop is averaged to CELLS×CELLS colours before its feature is computed
IMG_DIM = 128
N_PAIRS, N_GROUND = 3, 4  # regions around two shapes, and over background


def propose(rng, scene):
    """Boxes (36, 4) in whole pixels as a detector would give them, best first.

    Near-duplicates around every shape, loose and partial ones, boxes over two shapes and over mere background.
    """
    tight = np.array([o["box"] for o in scene["objects"]], dtype=np.float64)
    around, scores = around_shapes(rng, tight)
    boxes = np.concatenate([around, around_pairs(rng, tight), over_background(rng)])
    scores = np.concatenate([scores, rng.uniform(0, 0.5, len(boxes) - len(scores))])
    boxes = np.rint(boxes[np.argsort(-scores, kind="stable")])
    limit = np.array([WIDTH, HEIGHT])
    low = np.clip(boxes[:, :2], 0, limit - CELLS)
    high = np.clip(np.maximum(boxes[:, 2:], low + CELLS), 0, limit)  # at least a pixel for each of a crop's cells
    return np.concatenate([low, high], 1).astype(np.float32)


def around_shapes(rng, tight):
    """Boxes around single shapes, whose tight boxes are (n, 4), and the scores that order them."""
    count = N_REGIONS - N_PAIRS - N_GROUND
    shape, pass_ = np.arange(count) % len(tight), np.arange(count) // len(tight)
    boxes = tight[shape]
    extent = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    shift = rng.uniform(-1, 1, (count, 4)) * np.where(pass_ < 5, 0.05, 0.12)[:, None]  # a share of the extent
    shift[pass_ == 5] += 0.18 * np.array([-1, -1, 1, 1])
    partial = pass_ >= 6
    shift[partial, rng.integers(0, 4, partial.sum())] += 0.35  # cut one side; the sign below makes it inwards
    shift[:, 2:] *= np.where(partial, -1, 1)[:, None]
    return boxes + shift * extent, 0.9 - 0.08 * pass_ + rng.normal(0, 0.1, count)


def around_pairs(rng, tight):
    """Boxes around two shapes each."""
    first = rng.integers(0, len(tight), N_PAIRS)
    second = (first + rng.integers(1, len(tight), N_PAIRS)) % len(tight)
    low, high = np.minimum(tight[first, :2], tight[second, :2]), np.maximum(tight[first, 2:], tight[second, 2:])
    return np.concatenate([low, high], 1) + rng.uniform(-4, 4, (N_PAIRS, 4))


def over_background(rng):
    """Boxes anywhere."""
    size = rng.uniform(28, 90, (N_GROUND, 2))
    corner = rng.uniform(0, 1, (N_GROUND, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    return np.concatenate([corner, corner + size], 1)


def region_features(image, boxes):
    """Features (R, 128) float32 ≥ 0 of the crops boxes (R, 4), in whole pixels, of an image (H, W, 3) uint8.

    The crop is averaged to 12×12 colours. From these: how colourful each of 8×8 spots is (64), the directions of
    its edges in each quarter (32), a histogram of hues (16) and of lightness (8), and one of the
    crop's size (8), which the averaging loses.
    """
    boxes = np.asarray(boxes).astype(np.int64)
    size = boxes[:, 2:] - boxes[:, :2]
    colour = average_colours(image, boxes, size)
    high, low = colour.max(-1), colour.min(-1)
    chroma = high - low
    vivid = chroma / (chroma.max((1, 2), keepdims=True) + 0.1)  # (R, 12, 12)
    spots = smooth(vivid)
    dy, dx = np.gradient(vivid, axis=(1, 2))
    length = np.hypot(dx, dy)
    direction = soft_bins(np.arctan2(dy, dx) / (2 * np.pi) % 1, 8, wrap=True) * length[..., None]
    quarters = direction.reshape(-1, 2, CELLS // 2, 2, CELLS // 2, 8).mean((2, 4)).reshape(-1, 32)
    r, g, b = np.moveaxis(colour, -1, 0)
    hue = np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b) / (2 * np.pi) % 1
    weight = chroma**2 / ((chroma**2).sum((1, 2), keepdims=True) + 0.5)
    hues = (soft_bins(hue, 16, wrap=True) * weight[..., None]).sum((1, 2))
    lights = soft_bins((high + low) / 2, 8).mean((1, 2))
    sizes = soft_bins((np.log2(np.sqrt(size[:, 0] * size[:, 1])) - 4) / 4, 8)
    # Scaled so that each part counts, and to a length well above that of a fresh position feature (about 4), as a
    # detector's features have: with short ones PFAN-A's training settles on the same embedding for every region.
    parts = [2 * spots, 30 * quarters, 12 * hues, 4 * lights, 4 * sizes]
    return np.concatenate(parts, 1).astype(np.float32)


def average_colours(image, boxes, size):
    """Mean colours (R, 12, 12, 3) from 0 to 1 of the cells of crops boxes (R, 4), of size (R, 2), of an image."""
    total = np.zeros((image.shape[0] + 1, image.shape[1] + 1, 3), dtype=np.int64)
    total[1:, 1:] = image.astype(np.int64).cumsum(0).cumsum(1)
    edges = boxes[:, None, :2] + np.arange(CELLS + 1)[None, :, None] * size[:, None] // CELLS  # (R, 13, 2) x, y
    corners = total[edges[:, :, None, 1], edges[:, None, :, 0]]  # (R, 13, 13, 3)
    sums = corners[:, 1:, 1:] - corners[:, 1:, :-1] - corners[:, :-1, 1:] + corners[:, :-1, :-1]
    step = np.diff(edges, axis=1)
    return sums / (255 * step[:, :, None, 1] * step[:, None, :, 0])[..., None]


def smooth(vivid):
    """Average (R, 12, 12) over overlapping 2×2 windows at 8×8 spots: (R, 64)."""
    first = np.arange(8) * 10 // 7
    pairs = vivid[:, first] + vivid[:, first + 1]
    return ((pairs[:, :, first] + pairs[:, :, first + 1]) / 4).reshape(-1, 64)


def soft_bins(values, n, wrap=False):
    """One-hot (…, n) of values (…) in 0…1, shared linearly between the two nearest bins."""
    if wrap:
        distance = np.abs(values[..., None] * n - np.arange(n))
        distance = np.minimum(distance, n - distance)
    else:
        distance = np.abs(np.clip(values, 0, 1)[..., None] * (n - 1) - np.arange(n))
    return np.maximum(1 - distance, 0)
