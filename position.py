"""Where a region is: pixel boxes → position grids.

The image is cut into 16×16 cells; a region becomes the 15 cells it covers most, with their shares of the
covered area (Wang et al., Position Focused Attention Network for Image-Text Matching, IJCAI 2019, section 3.1).
"""

import numpy as np

from errors import InputError

CHUNK = 4096  # regions computed at once: 256 cells × 8 bytes × 4096 = 8 MB a temporary


def position_grid(boxes, image_size, split_size=16, top_n=15):
    """Turn pixel boxes into position grids.

    boxes: (…, R, 4) as x1, y1, x2, y2 in pixels. image_size: (…, 2) as height, width in pixels.
    Returns float32 (…, R, 2·top_n + 1): top_n cell indices (column·split_size + row) in descending order of the
    area that the box covers of them, top_n weights (that area divided by the sum over the listed cells), and the
    box's share of the image area. Where fewer cells are covered the rest holds index split_size² ("no cell") and
    weight 0, and so does the whole of a box without area inside the image.

    Boxes reaching outside are clipped. Cells covered equally are ordered by the distance of their centre from the
    (clipped) box's centre, then by index, so the result is the same on every machine.
    Raises InputError, naming picture and box, for NaN, infinite or reversed corners and for sizes not positive.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    image_size = np.asarray(image_size, dtype=np.float64)
    if boxes.ndim < 2 or boxes.shape[-1] != 4 or image_size.shape != boxes.shape[:-2] + (2,):
        raise InputError(f"boxes {boxes.shape} with image sizes {image_size.shape}: expected (…, R, 4) and (…, 2)")
    if not 0 < split_size <= 22 or not 0 < top_n <= split_size**2:  # 22² cells fit the 9 bits of _grid's key
        raise InputError(f"split_size {split_size}, top_n {top_n}: expected 1 to 22, and 1 to split_size²")
    n_regions = boxes.shape[-2]
    flat = boxes.reshape(-1, 4)
    sizes = image_size.reshape(-1, 2)
    _check(flat, sizes, n_regions)
    sizes = np.repeat(sizes, n_regions, axis=0)
    grid = np.empty((len(flat), 2 * top_n + 1), dtype=np.float32)
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        grid[part] = _grid(flat[part], sizes[part], split_size, top_n)
    return grid.reshape(boxes.shape[:-1] + (2 * top_n + 1,))


def _check(boxes, sizes, n_regions):
    for bad, what in (
        (~np.isfinite(boxes).all(1), "corners must be numbers"),
        (
            (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1]),
            "corners are reversed, expected x1 <= x2, y1 <= y2",
        ),
    ):
        if bad.any():
            first = int(np.argmax(bad))
            picture, box = divmod(first, n_regions)
            raise InputError(f"picture {picture}, box {box}: {boxes[first].tolist()}: {what}")
    bad = ~(np.isfinite(sizes) & (sizes > 0)).all(1)
    if bad.any():
        first = int(np.argmax(bad))
        raise InputError(f"picture {first}: height, width {sizes[first].tolist()}: expected positive numbers")


def _grid(boxes, sizes, n, top_n):
    """Grids (N, 2·top_n + 1) in float64 of N clean boxes (N, 4), each with its image's (height, width)."""
    height, width = sizes.T
    x1, x2 = np.clip(boxes[:, 0], 0, width), np.clip(boxes[:, 2], 0, width)
    y1, y2 = np.clip(boxes[:, 1], 0, height), np.clip(boxes[:, 3], 0, height)
    # In cell units a cell is 1×1, so areas become shares of a cell; the ratio of areas is the same.
    covered_x, middle_x = _cover(x1, x2, width, n)
    covered_y, middle_y = _cover(y1, y2, height, n)
    area = (covered_x[:, :, None] * covered_y[:, None, :]).reshape(-1, n * n)  # index = column·n + row
    # One integer a cell orders it by area, then nearness, then index: 26 + 28 + 9 bits. Areas are taken relative to
    # the region's largest, rounded to 2⁻²⁵ (float32's precision), so that rounding errors do not decide between equals.
    largest = area.max(1, keepdims=True)
    side = np.maximum(width, height)
    step_x = (middle_x * (width / side)[:, None]) ** 2
    step_y = (middle_y * (height / side)[:, None]) ** 2
    distance = (step_x[:, :, None] + step_y[:, None, :]).reshape(-1, n * n) / (2 * n * n)  # < 1
    key = np.rint(area * (2.0**25 / np.where(largest > 0, largest, 1))).astype(np.int64) << 28
    key += (2**28 - 1) - np.rint(distance * (2**27)).astype(np.int64)
    key = (key << 9) + (n * n - 1 - np.arange(n * n))
    key[area <= 0] = -1
    best = np.argpartition(key, -top_n, axis=1)[:, -top_n:]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(key, best, 1), axis=1, kind="stable"), 1)
    weights = np.take_along_axis(area, best, 1)
    total = weights.sum(1, keepdims=True)
    cells = np.where(weights > 0, best, n * n)
    weights = weights / np.where(total > 0, total, 1)
    share = (x2 - x1) * (y2 - y1) / (width * height)
    return np.concatenate([cells, weights, share[:, None]], axis=1)


def _cover(low, high, length, n):
    """How much of each of n equal parts of [0, length] the span [low, high] covers, and how far its middle is.

    low, high, length: (N,). Returns two arrays (N, n), both in units of a part.
    """
    low, high = low * n / length, high * n / length
    edge = np.arange(n)
    covered = np.minimum(high[:, None], edge + 1) - np.maximum(low[:, None], edge)
    return np.maximum(covered, 0), edge + 0.5 - (low + high)[:, None] / 2
