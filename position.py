"""Where a region is: pixel boxes → position grids.

The image is cut into 16×16 cells; a region becomes the 15 cells it covers most, with their shares of the
covered area (Wang et al., Position Focused Attention Network for Image-Text Matching, IJCAI 2019, section 3.1).

python position.py boxes.npz --out data/mine/train_boxes.npy    grids for the boxes of existing features
"""

import argparse
import os
import re
from typing import Any

import numpy as np

from lib.constants import N_REGIONS, N_SLOTS, SPLIT_SIZE
from lib.errors import InputError, brief, run
from lib.files import replace

REGIONS_AT_ONCE = 128  # × 256 cells × 8 bytes = 0.25 MB an array; arrays of 1 MB were fresh memory in every block
PICTURES_AT_ONCE = 1024  # read from a file


def position_grid(boxes: Any, image_size: Any, split_size: int = SPLIT_SIZE, top_n: int = N_SLOTS) -> np.ndarray:
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
    if not 0 < split_size <= 22 or not 0 < top_n <= split_size**2:  # 22² cells fit the 9 bits of _grid's order
        raise InputError(f"split_size {split_size}, top_n {top_n}: expected 1 to 22, and 1 to split_size²")
    n_regions = boxes.shape[-2]
    flat = boxes.reshape(-1, 4)
    sizes = image_size.reshape(-1, 2)
    _check(flat, sizes, n_regions)
    sizes = np.repeat(sizes, n_regions, axis=0)
    grid = np.empty((len(flat), 2 * top_n + 1), dtype=np.float32)
    for start in range(0, len(flat), REGIONS_AT_ONCE):
        block = slice(start, start + REGIONS_AT_ONCE)
        grid[block] = _grid(flat[block], sizes[block], split_size, top_n)
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
    """Grids (N, 2·top_n + 1) of N clean boxes (N, 4), each with its image's (height, width)."""
    lengths = sizes[:, ::-1]  # of x and y
    low, high = np.clip(boxes[:, :2], 0, lengths), np.clip(boxes[:, 2:], 0, lengths)
    share = (high - low).prod(1, keepdims=True) / lengths.prod(1, keepdims=True)

    # In cell units a cell is 1×1, so areas become shares of a cell; the ratio of areas is the same.
    low, high = (low * n / lengths)[..., None], (high * n / lengths)[..., None]
    edge = np.arange(n)
    covered = np.maximum(np.minimum(high, edge + 1) - np.maximum(low, edge), 0)  # (N, 2, n): of columns, of rows
    area = (covered[:, 0, :, None] * covered[:, 1, None, :]).reshape(len(boxes), n * n)

    # Squared distance of a cell's centre from the box's, in 2⁻²⁶ of the longer side squared; then the cell's index.
    stretch = (lengths / lengths.max(1, keepdims=True))[..., None]
    far = np.rint(((edge + 0.5 - (low + high) / 2) * stretch) ** 2 * (2**26 / n**2)).astype(np.int64)
    far = (far << 9) + np.stack([edge * n, edge])
    distance = (far[:, 0, :, None] + far[:, 1, None, :]).reshape(len(boxes), n * n)

    # Areas relative to the largest are rounded to 2⁻²⁵, float32's precision: rounding must not decide between equals.
    largest = area.max(1, keepdims=True)
    weight = np.rint(area * (2.0**25 / np.where(largest > 0, largest, 1)))
    weight += area > 0  # any area comes before none

    # Weight, distance and index are 26 + 28 + 9 bits of one integer, which is sorted: lexsort takes five times as long.
    order = distance - (weight.astype(np.int64) << 37)
    order.partition(top_n - 1, axis=1)
    best = np.sort(order[:, :top_n], axis=1) & 511

    weights = np.take_along_axis(area, best, axis=1)
    total = weights.sum(1, keepdims=True)
    cells = np.where(weights > 0, best, n * n)
    return np.concatenate([cells, weights / np.where(total > 0, total, 1), share], axis=1)


# ---------------------------------------------------------------- command line


def write_grids(opt: argparse.Namespace) -> None:
    """Read opt.boxes, write their grids to opt.out and print how many there are."""
    from tqdm import tqdm

    from lib.datasets.boxes import Reach, read_arrays, read_coco_boxes, read_rows
    from lib.datasets.ids import read_ids
    from lib.datasets.problems import Problems

    of_json = opt.boxes.endswith(".json")
    if of_json:
        problems = Problems(opt.out + ".problems.txt")
        ids = read_ids(opt.ids, problems) if opt.ids else None
        if problems.total:
            raise InputError(f"{opt.ids}: {problems} (listed in {problems.path})")
        data = read_coco_boxes(opt.boxes, ids, opt.n_regions)
    else:
        data = read_arrays(opt.boxes, opt.sizes)
    n, n_regions = data.boxes.shape[:2]
    without_area = 0
    reach = Reach(opt.boxes, opt.sizes or "the image sizes", of_json or opt.xywh)

    def write(file):
        nonlocal without_area
        header = {"descr": "<f4", "fortran_order": False, "shape": (n, n_regions, 2 * N_SLOTS + 1)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in tqdm(range(0, n, PICTURES_AT_ONCE), unit=f"{PICTURES_AT_ONCE} pictures", disable=None):
            boxes = np.array(read_rows(data.boxes, start, PICTURES_AT_ONCE), dtype=np.float64)
            sizes = np.array(read_rows(data.sizes, start, PICTURES_AT_ONCE), dtype=np.float64)
            if opt.xywh and not of_json:
                boxes[..., 2:] += boxes[..., :2]
            try:
                grid = position_grid(boxes, sizes)
            except InputError as error:
                number, rest = re.fullmatch(r"picture (\d+)(.*)", str(error)).groups()
                picture = start + int(number)
                name = f" (image {brief(data.names[picture])})" if data.names else ""
                hint = " (x, y, width, height need --xywh)" if "reversed" in rest and not (of_json or opt.xywh) else ""
                raise InputError(f"{opt.boxes}: picture {picture}{name}{rest}{hint}") from None
            without_area += int((grid[..., -1] == 0).sum())
            reach.add(boxes, sizes)
            file.write(grid.astype("<f4", copy=False).tobytes())
        note = reach.check()
        if note:
            print(f"note: {opt.boxes}: {note}")

    replace(opt.out, write)
    padded = n_regions - data.found
    print(f"{opt.out}: {n} pictures, {n_regions} regions; {without_area - padded.sum()} boxes without area", end="")
    print(f", {padded.sum()} regions padded in {(padded > 0).sum()} pictures" if padded.any() else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Position grids (SPLIT_boxes.npy) for boxes in pixels, in the order of the features they are of.",
        epilog="example: python position.py boxes.npz --out data/mine/train_boxes.npy",
    )
    add = parser.add_argument
    add(
        "boxes",
        help=".npy or .npz (boxes (n, R, 4): x1 y1 x2 y2; image_sizes (n, 2): height width), or COCO-style JSON",
    )
    add("--out", required=True, metavar="FILE", help="the .npy file to write, (n, R, 31)")
    add("--sizes", metavar="FILE|HxW", help=".npy of heights and widths, or one for all; 1x1 for boxes from 0 to 1")
    add("--xywh", action="store_true", help="the arrays hold x, y, width, height (as JSON always does)")
    add("--ids", metavar="FILE", help="for JSON: which images in which order, one id or file name a line")
    add(
        "--n_regions",
        type=int,
        default=N_REGIONS,
        help="for JSON: regions an image, padded if fewer (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a file that is there")
    opt = parser.parse_args()
    of_json = opt.boxes.endswith(".json")
    if opt.n_regions < 1:
        raise InputError(f"--n_regions {opt.n_regions}: expected at least 1")
    if opt.sizes if of_json else opt.ids:
        raise InputError(f"{opt.boxes}: {'--sizes is for arrays' if of_json else '--ids is for JSON'}")
    if os.path.isfile(opt.out) and not opt.overwrite:
        print(f"{opt.out}: there already (--overwrite makes it anew)")
        return
    os.makedirs(os.path.dirname(opt.out) or ".", exist_ok=True)
    write_grids(opt)


if __name__ == "__main__":
    run(main)
