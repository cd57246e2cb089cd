"""Where a region is: pixel boxes → position grids.

The image is cut into 16×16 cells; a region becomes the 15 cells it covers most, with their shares of the
covered area (Wang et al., Position Focused Attention Network for Image-Text Matching, IJCAI 2019, section 3.1).

python position.py boxes.npz --out data/mine/train_boxes.npy    grids for the boxes of features one has already
"""

import argparse
import os
import re
import sys
from typing import Any

import numpy as np

from lib.errors import InputError, brief, run
from lib.files import open_npy, replace

CELLS_AT_ONCE = 1 << 16  # × 8 bytes = 0.5 MB a temporary, which stays in the cache
WINDOWS = 4, 6, 8, 12  # columns or rows that most boxes fit into, so that the other cells need not be looked at
FEW = 500  # regions up to which one window, the whole image, is faster


def position_grid(boxes: Any, image_size: Any, split_size: int = 16, top_n: int = 15) -> np.ndarray:
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
    grid = _grid(flat, np.repeat(sizes, n_regions, axis=0), split_size, top_n)
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
    """Grids (N, 2·top_n + 1) in float32 of N clean boxes (N, 4), each with its image's (height, width)."""
    lengths = sizes[:, ::-1]  # of x and y
    low, high = np.clip(boxes[:, :2], 0, lengths), np.clip(boxes[:, 2:], 0, lengths)
    grid = np.empty((len(boxes), 2 * top_n + 1), dtype=np.float32)
    grid[:, -1] = (high - low).prod(1) / lengths.prod(1)
    # In cell units a cell is 1×1, so areas become shares of a cell; the ratio of areas is the same.
    low, high = low * n / lengths, high * n / lengths
    windows = [w for w in WINDOWS if w < n and w * w >= top_n] if len(boxes) > FEW else []
    windows = np.array([*windows, n])
    first = np.minimum(np.floor(low), n - 1).astype(int)
    kind = np.searchsorted(windows, np.minimum(np.ceil(high), n) - first) @ (len(windows), 1)
    stretch = lengths / lengths.max(1, keepdims=True)
    for each in np.unique(kind):
        window, members = windows[[*divmod(each, len(windows))]], np.flatnonzero(kind == each)
        step = CELLS_AT_ONCE // window.prod()
        for at in range(0, len(members), step):
            some = members[at : at + step]
            start = np.minimum(first[some], n - window)
            grid[some, :-1] = _best_cells(low[some], high[some], stretch[some], start, window, n, top_n)
    return grid


def _best_cells(low, high, stretch, start, window, n, top_n):
    """The cells and weights (N, 2·top_n) of N boxes that lie in windows of (columns, rows) beginning at start (N, 2).

    low, high (N, 2): the corners x, y in cells. stretch (N, 2): the image's width and height, the longer one being 1.
    """
    (covered_x, order_x), (covered_y, order_y) = (
        _cover(low[:, axis], high[:, axis], stretch[:, axis], start[:, axis], window[axis], n) for axis in (0, 1)
    )
    area = (covered_x[:, None] * covered_y).reshape(-1, len(low))
    # One integer a cell orders it by area, then nearness, then index: 26 + 28 + 9 bits. Areas are taken relative to
    # the region's largest, rounded to 2⁻²⁵ (float32's precision), so that rounding errors do not decide between equals;
    # nearness and index (column·n + row) are sums of a column's and a row's part.
    largest = area.max(0)
    order = area * (2.0**25 / np.where(largest > 0, largest, 1))
    np.rint(order, out=order)
    order += area > 0  # any area comes before none
    key = order.astype(np.int64)
    key <<= 37
    order_x += (1 << 36) + n * n - 1 - (n - 1) * (start[:, 0] + np.arange(window[0])[:, None])
    key += (order_x[:, None] + order_y).reshape(key.shape)
    key = np.ascontiguousarray(key.T)
    key.partition(-top_n, axis=1)
    key = np.sort(key[:, -top_n:], axis=1)
    best = n * n - 1 - (key[:, ::-1] & 511)
    column = best // n
    row = best - column * n
    place = (column - start[:, :1]) * window[1] + row - start[:, 1:]
    weights = area[place, np.arange(len(low))[:, None]]
    total = weights.sum(1, keepdims=True)
    cells = np.where(weights > 0, best, n * n)
    return np.concatenate([cells, weights / np.where(total > 0, total, 1)], axis=1)


def _cover(low, high, stretch, start, count, n):
    """Of count columns (or rows) from start on: how much the span [low, high] covers of each, and their order.

    Returns covered (count, N) in columns, and (count, N) int64 that is the larger the nearer a column is to the span's
    middle, by index among equals; its lowest 9 bits are for the index.
    """
    edge = start + np.arange(count)[:, None]
    covered = np.minimum(high, edge + 1) - np.maximum(low, edge)
    middle = edge + 0.5 - (low + high) / 2
    far = np.rint((middle * stretch) ** 2 * (2**26 / n**2)).astype(np.int64)  # at most 2²⁶
    return np.maximum(covered, 0), -(far << 9) - edge


# ---------------------------------------------------------------- command line

PICTURES_AT_ONCE = 1024
BOX_NAMES = ("boxes", "bboxes", "bbox")  # of arrays in an .npz
SIZE_NAMES = ("image_sizes", "image_size", "sizes")


def read_archive(path: str) -> tuple:
    """Boxes, and image sizes or None, of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as archive:  # noqa: TID251
            names = archive.files
            arrays = {name: archive[name] for name in (*BOX_NAMES, *SIZE_NAMES, "image_h", "image_w") if name in names}
    except OSError:  # says which file
        raise
    except Exception as error:  # NumPy, zip and zlib each have their own
        reason = str(error).partition(". If you trust")[0]
        raise InputError(f"{path}: truncated or not an .npz file of numbers ({reason})") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path}: {name} are {array.dtype}, expected numbers")
    boxes, sizes = (next((arrays[name] for name in known if name in arrays), None) for known in (BOX_NAMES, SIZE_NAMES))
    if boxes is None:
        raise InputError(f"{path}: holds {', '.join(names)[:200]}; expected {' or '.join(BOX_NAMES)}")
    if sizes is None and {"image_h", "image_w"} <= set(arrays):
        sizes = np.stack([arrays["image_h"], arrays["image_w"]], axis=-1)
    return boxes, sizes


def read_arrays(path: str, sizes_path: str) -> tuple:
    """Boxes (n, R, 4) and image sizes (n, 2) of an .npy or .npz file; the sizes may come from sizes_path."""
    boxes, sizes = read_archive(path) if path.endswith(".npz") else (open_npy(path), None)
    if sizes_path:
        pair = re.fullmatch(r"(\d+\.?\d*)[x,](\d+\.?\d*)", sizes_path)
        if pair:
            sizes = np.tile(np.array(pair.groups(), dtype=np.float64), (len(boxes), 1))
        else:
            sizes = open_npy(sizes_path)
    if sizes is None:
        raise InputError(f"{path}: no image sizes in it; --sizes gives them")
    if boxes.ndim != 3 or boxes.shape[2] != 4 or sizes.shape != (len(boxes), 2):
        raise InputError(f"{path}: boxes {boxes.shape} with image sizes {sizes.shape}: expected (n, R, 4) and (n, 2)")
    if not boxes.size:
        raise InputError(f"{path}: boxes {boxes.shape}: none, expected at least one")
    return boxes, sizes


def read_json(path: str, ids: Any, n_regions: int) -> tuple:
    """Boxes (n, n_regions, 4), sizes (n, 2), regions found (n,) and ids (n) of a COCO-style JSON file, read by item.

    Its images give id, height, width (and file_name), its annotations image_id and bbox x, y, width, height; the
    regions keep their order in the file. ids: list of ids or file names, None for the images' order.
    """
    from lib.datasets.ids import canonical_id
    from lib.datasets.json_files import json_items

    try:
        images = {image["id"]: image for image in json_items(path, "images")}
        if ids is not None:
            named = {
                canonical_id(name): id for id, image in images.items() for name in (image.get("file_name", id), id)
            }
            lost = [name for name in ids if canonical_id(name) not in named]
            if lost:
                raise InputError(f"{path}: no image {brief(lost[0])} ({len(lost)} of {len(ids)} ids are missing)")
            images = {named[canonical_id(name)]: images[named[canonical_id(name)]] for name in ids}
        rows = {id: row for row, id in enumerate(images)}
        sizes = np.array([(image["height"], image["width"]) for image in images.values()], dtype=np.float64)
        boxes = np.zeros((len(rows), n_regions, 4), dtype=np.float32)
        found = np.zeros(len(rows), dtype=np.int64)
        for annotation in json_items(path, "annotations"):
            row = rows.get(annotation["image_id"])
            if row is None:
                continue
            if found[row] == n_regions:
                image = brief(annotation["image_id"])
                raise InputError(f"{path}: image {image} has more than {n_regions} boxes (--n_regions)")
            try:
                x, y, width, height = annotation["bbox"]
                boxes[row, found[row]] = x, y, x + width, y + height
            except (KeyError, TypeError, ValueError):
                what = f"bbox {brief(annotation.get('bbox'))}, expected x, y, width, height"
                raise InputError(f"{path}: image {brief(annotation['image_id'])}, box {found[row]}: {what}") from None
            found[row] += 1
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a COCO-style file of images and annotations ({repr(error)[:200]})") from None
    if not found.any():
        raise InputError(f"{path}: no boxes for any of {len(rows)} images")
    return boxes, sizes, found, list(images)


def rows(array: np.ndarray, start: int, n: int) -> np.ndarray:
    """Rows start … start+n-1 (n, …) of an array. A file is mapped anew each time: a map keeps its pages in memory."""
    if isinstance(array, np.memmap) and array.filename:
        array = open_npy(array.filename)
    return array[start : start + n]


def main() -> None:
    from tqdm import tqdm

    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "scripts"))
    from lib.datasets.ids import read_ids
    from lib.datasets.problems import Problems

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
    add("--n_regions", type=int, default=36, help="for JSON: regions an image, padded if fewer (default: %(default)s)")
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
    if of_json:
        problems = Problems(opt.out + ".problems.txt")
        ids = read_ids(opt.ids, problems) if opt.ids else None
        if problems.total:
            raise InputError(f"{opt.ids}: {problems} (listed in {problems.path})")
        boxes, sizes, found, names = read_json(opt.boxes, ids, opt.n_regions)
    else:
        boxes, sizes = read_arrays(opt.boxes, opt.sizes)
        found, names = np.full(len(boxes), boxes.shape[1]), None
    no_area = 0

    def write(file):
        nonlocal no_area
        shape = (*boxes.shape[:2], 31)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in tqdm(range(0, len(boxes), PICTURES_AT_ONCE), unit=f"{PICTURES_AT_ONCE} pictures", disable=None):
            some = np.array(rows(boxes, start, PICTURES_AT_ONCE), dtype=np.float64)
            if opt.xywh and not of_json:
                some[..., 2:] += some[..., :2]
            try:
                grid = position_grid(some, rows(sizes, start, PICTURES_AT_ONCE))
            except InputError as error:
                number, rest = re.fullmatch(r"picture (\d+)(.*)", str(error)).groups()
                picture = start + int(number)
                name = f" (image {brief(names[picture])})" if names else ""
                raise InputError(f"{opt.boxes}: picture {picture}{name}{rest}") from None
            no_area += int((grid[..., -1] == 0).sum())
            file.write(grid.astype("<f4", copy=False).tobytes())

    replace(opt.out, write)
    padded = int((boxes.shape[1] - found).sum())
    print(f"{opt.out}: {len(boxes)} pictures, {boxes.shape[1]} regions; {no_area - padded} boxes without area", end="")
    print(f", {padded} regions padded in {int((found < boxes.shape[1]).sum())} pictures" if padded else "")


if __name__ == "__main__":
    run(main)
