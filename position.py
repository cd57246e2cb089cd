"""Where a region is: pixel boxes → position grids.

The image is cut into 16×16 cells; a region becomes the 15 cells it covers most, with their shares of the
covered area (Wang et al., Position Focused Attention Network for Image-Text Matching, IJCAI 2019, section 3.1).

python position.py boxes.npz --out data/mine/train_boxes.npy    grids for the boxes of existing features
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from lib.constants import N_REGIONS, N_SLOTS, SPLIT_SIZE
from lib.errors import InputError, run
from lib.files import check_output, make_folder, open_npy, replace

REGIONS_AT_ONCE = 1024  # × 256 cells × 8 bytes = 2 MB an array
IMAGES_AT_ONCE = 1024  # read from a file


class BoxError(InputError):
    """A box, or the size of an image where box is None, from which no grid can be made: image, box, reason."""

    def __init__(self, image: Any, box: int | None, reason: str):
        super().__init__(f"image {image}" + ("" if box is None else f", box {box}") + f": {reason}")
        self.image, self.box, self.reason = image, box, reason


def position_grid(boxes: Any, image_size: Any, split_size: int = SPLIT_SIZE, top_n: int = N_SLOTS) -> np.ndarray:
    """Turn pixel boxes into position grids.

    boxes: (…, R, 4) as x1, y1, x2, y2 in pixels. image_size: (…, 2) as height, width in pixels.
    Returns float32 (…, R, 2·top_n + 1): top_n cell indices (column·split_size + row) in descending order of the
    area that the box covers of them, top_n weights (that area divided by the sum over the listed cells), and the
    box's share of the image area. Where fewer cells are covered the rest holds index split_size² ("no cell") and
    weight 0, and so does the whole of a box without area inside the image.

    Boxes reaching outside are clipped. Cells covered equally are ordered by the distance of their centre from the
    (clipped) box's centre, then by index, so the result is the same on every machine.
    Raises BoxError, an InputError, for NaN, infinite or reversed corners and for sizes not positive.
    """
    boxes = np.asarray(boxes, dtype=np.float64)
    image_size = np.asarray(image_size, dtype=np.float64)
    if boxes.ndim < 2 or boxes.shape[-1] != 4 or image_size.shape != boxes.shape[:-2] + (2,):
        raise InputError(f"boxes {boxes.shape} with image sizes {image_size.shape}: expected (…, R, 4) and (…, 2)")
    if split_size < 1 or not 0 < top_n <= split_size**2:
        raise InputError(f"split_size {split_size}, top_n {top_n}: expected at least 1, and 1 to split_size²")
    flat, sizes = boxes.reshape(-1, 4), image_size.reshape(-1, 2)
    check_boxes(boxes.reshape(len(sizes), *boxes.shape[-2:]), sizes)
    sizes = np.repeat(sizes, boxes.shape[-2], axis=0)
    grid = np.empty((len(flat), 2 * top_n + 1), dtype=np.float32)
    for start in range(0, len(flat), REGIONS_AT_ONCE):
        block = slice(start, start + REGIONS_AT_ONCE)
        grid[block] = _grid(flat[block], sizes[block], split_size, top_n)
    return grid.reshape(boxes.shape[:-1] + (2 * top_n + 1,))


def check_boxes(boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Raise BoxError for the first of boxes (n, R, 4) or image sizes (n, 2) that is none."""
    for bad, values, what in (
        (~np.isfinite(boxes), boxes, "corners must be numbers"),
        (boxes[..., 2:] < boxes[..., :2], boxes, "corners are reversed, expected x1 <= x2, y1 <= y2"),
        (~(np.isfinite(sizes) & (sizes > 0)), sizes, "height and width, expected positive numbers"),
    ):
        if bad.any():
            image, *box = np.argwhere(bad)[0, :-1].tolist()
            raise BoxError(image, box[0] if box else None, f"{values[(image, *box)].tolist()}: {what}")


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

    # Areas and squared distances of the centres are rounded, so that rounding errors do not decide between equals:
    # to 2⁻²⁵ of the largest area, float32's precision, and to 2⁻²⁶ of the longer side squared.
    largest = area.max(1, keepdims=True)
    order = np.rint(area * (2.0**25 / np.where(largest > 0, largest, 1))) + (area > 0)  # any area is before none
    stretch = (lengths / lengths.max(1, keepdims=True))[..., None]
    far = np.rint(((edge + 0.5 - (low + high) / 2) * stretch) ** 2 * (2**26 / n**2))
    distance = (far[:, 0, :, None] + far[:, 1, None, :]).reshape(len(boxes), n * n)
    best = np.lexsort((distance, -order))[:, :top_n]

    areas = np.take_along_axis(area, best, axis=1)
    total = areas.sum(1, keepdims=True)
    cells = np.where(areas > 0, best, n * n)
    return np.concatenate([cells, areas / np.where(total > 0, total, 1), share], axis=1)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Position grids (SPLIT_boxes.npy) for boxes in the order of the features that they are of.",
        epilog="example: python position.py boxes.npz --out data/mine/train_boxes.npy",
    )
    add = parser.add_argument
    add("boxes", help=".npy or .npz (boxes (n, R, 4): x1 y1 x2 y2; image_sizes (n, 2): height width), or COCO's JSON")
    add("--out", required=True, metavar="FILE", help="the .npy file to write, (n, R, 31)")
    help_sizes = ".npy of heights and widths, or one for all; 1x1, for boxes from 0 to 1, takes all images for squares"
    add("--sizes", metavar="FILE|HxW", help=help_sizes)
    add("--xywh", action="store_true", help="the arrays hold x, y, width, height (as JSON always does)")
    add("--ids", metavar="FILE", help="which images in which order, one id or file name a line; for files with ids")
    add("--n_regions", type=int, default=N_REGIONS, help="for JSON: regions an image, padded if fewer (default: 36)")
    add("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def grids(data: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yield first image and grids (m, R, 31) of a lib.datasets.boxes.BoxFile, IMAGES_AT_ONCE images at a time."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(data.boxes), IMAGES_AT_ONCE), unit=f"{IMAGES_AT_ONCE} images", disable=None):
        try:
            yield start, position_grid(*data.rows(start, IMAGES_AT_ONCE))
        except BoxError as error:
            raise data.named(error, start) from None
    if note := data.check.note():
        print(f"note: {data.path}: {note}")


def main() -> None:
    from lib.datasets.arrays import npy_header
    from lib.datasets.boxes import BoxFile

    opt = get_parser().parse_args()
    data = BoxFile(opt.boxes, opt.sizes, opt.ids, opt.n_regions, opt.xywh)
    make_folder(os.path.dirname(opt.out) or ".")
    check_output(opt.out, opt.boxes, opt.sizes, opt.ids)
    n, n_regions = data.boxes.shape[:2]
    shape = (n, n_regions, 2 * N_SLOTS + 1)
    if os.path.isfile(opt.out) and not opt.overwrite:
        there = open_npy(opt.out)
        same = (np.allclose(there[start : start + len(grid)], grid) for start, grid in grids(data))
        if there.shape != shape or not all(same):
            raise InputError(f"{opt.out}: there already, and not the grids of {opt.boxes} (--overwrite replaces it)")
        print(f"{opt.out}: there already")
        return

    def write(file):
        file.write(npy_header(shape, np.float32))
        file.writelines(grid.tobytes() for _, grid in grids(data))

    replace(opt.out, write)
    padded = n_regions - data.found
    print(f"{opt.out}: {n} images, {n_regions} regions; {data.check.empty - padded.sum()} boxes without area", end="")
    print(f", {padded.sum()} regions padded in {(padded > 0).sum()} images" if padded.any() else "")


if __name__ == "__main__":
    run(main)
