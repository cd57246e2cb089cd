"""Bottom-up-attention TSV files → SPLIT_ims.npy, SPLIT_boxes.npy, SPLIT_ids.txt.

A line of the TSV is a picture: image_id image_w image_h num_boxes boxes features, the last two base64 float32
(num_boxes, 4) x1 y1 x2 y2 in pixels and (num_boxes, 2048). Lines may come in any order, pictures of no list are
passed over. Rows follow the id lists. A stopped run goes on where it was; --skip_bad finishes one that found bad lines.
"""

import argparse
import base64
import binascii
import os

import numpy as np
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.datasets.ids import SPLITS, canonical_id, split_ids
from lib.datasets.problems import Problems
from lib.datasets.writer import SplitWriter
from lib.errors import InputError, run
from lib.files import make_folder
from position import position_grid

FIELDS = "image_id,image_w,image_h,num_boxes,boxes,features"
SCORES = "objects_conf"  # a column of this name says how sure the detector was of each box
LONGEST = 1 << 26  # bytes in a line; 100 regions are 1.1 MB
GRID = 31


def read_tsv(paths, fields):
    """Yield (where, image id, list of fields as bytes) for every line. where: "FILE, line N"."""
    column = fields.index("image_id")
    total = sum(os.path.getsize(path) for path in paths)
    with tqdm(total=total, desc="TSV", unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            with open(path, "rb") as file:
                for number, line in enumerate(iter(lambda file=file: file.readline(LONGEST), b""), 1):
                    bar.update(len(line))
                    where = f"{path}, line {number}"
                    if len(line) == LONGEST and not line.endswith(b"\n"):
                        raise InputError(f"{where}: longer than {LONGEST} bytes, expected a picture a line")
                    values = line.rstrip(b"\r\n").split(b"\t")
                    if number == 1 and values[0] == fields[0].encode():
                        continue  # the columns' names
                    image_id = values[column] if column < len(values) else b""
                    yield where, image_id.decode("utf-8", "replace").strip(), values


def decode(values, fields, img_dim):
    """Fields of a line (list of bytes) → boxes (n, 4), features (n, img_dim) float32, (height, width), scores | None.

    Raises InputError saying what is malformed.
    """
    row = dict(zip(fields, values, strict=True))
    try:
        width, height, n = (int(row[name]) for name in ("image_w", "image_h", "num_boxes"))
    except ValueError:
        raise InputError("image_w, image_h or num_boxes is no integer") from None
    if n < 1 or width < 1 or height < 1:
        raise InputError(f"{n} boxes in a picture of {width}×{height}, expected at least one")
    boxes = _floats(row["boxes"], "boxes", n, 4)
    features = _floats(row["features"], "features", n, img_dim)
    scores = _floats(row[SCORES], SCORES, n, 1)[:, 0] if SCORES in row else None
    return boxes, features, (height, width), scores


def _floats(text, name, n, dim):
    text = text.strip()
    if text[:2] in (b"b'", b'b"'):  # bytes that Python 3 printed
        text = text[2:-1]
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise InputError(f"{name} are not base64") from None
    if len(data) != 4 * n * dim:
        raise InputError(f"{name}: {len(data)} bytes, expected {4 * n * dim} ({n} × {dim} float32)")
    values = np.frombuffer(data, dtype="<f4").reshape(n, dim)
    if not np.isfinite(values).all():
        raise InputError(f"{name}: NaN or infinite values")
    return values


def fit(boxes, features, scores, n_regions, regions):
    """Bring a picture to n_regions regions.

    regions: "fixed" takes no other number; "best" keeps the n_regions best (by scores where there are any, else the
    first) and pads with zero features and boxes without area; "all" pads alike but drops none.
    Returns boxes (n_regions, 4), features (n_regions, D). Raises InputError for a number that it does not take.
    """
    n = len(boxes)
    if (regions == "fixed" and n != n_regions) or (regions == "all" and n > n_regions):
        raise InputError(f"{n} regions, expected {n_regions} (--regions {regions})")
    if n > n_regions and scores is not None:
        best = np.argsort(-scores, kind="stable")[:n_regions]
        boxes, features = boxes[best], features[best]
    boxes, features = boxes[:n_regions], features[:n_regions]
    padding = ((0, n_regions - len(boxes)), (0, 0))
    return np.pad(boxes, padding), np.pad(features, padding)


def convert(tsv, writers, fields, opt, problems):
    """Fill the writers ({split: SplitWriter}) from the lines of the TSV files. Returns counts by name."""
    rows = {}  # id → where its picture goes: a picture may be in two splits (test and testall)
    for writer in writers.values():
        for row, image_id in enumerate(writer.ids):
            rows.setdefault(canonical_id(image_id), []).append((writer, row))
    seen, counts = {}, {"used": 0, "of other pictures": 0, "cut": 0, "padded": 0, "boxes without area": 0}
    for where, image_id, values in read_tsv(tsv, fields):
        name = canonical_id(image_id)
        if len(values) != len(fields):  # of other pictures too: a file of other columns is none of this kind
            problems.add("malformed", where, f"{len(values)} fields, expected {len(fields)}: {', '.join(fields)}")
            seen.setdefault(name, where)
            continue
        if not image_id:
            problems.add("malformed", where, "no image_id")
            continue
        if name not in rows:
            counts["of other pictures"] += 1
            continue
        if name in seen:
            problems.add("doubled", where, f"id {image_id} stands in {seen[name]} already")
            continue
        seen[name] = where
        targets = [(writer, row) for writer, row in rows[name] if not writer.done[row]]
        if not targets:
            continue
        try:
            boxes, features, size, scores = decode(values, fields, opt.img_dim)
            n = len(boxes)
            boxes, features = fit(boxes, features, scores, opt.n_regions, opt.regions)
            with np.errstate(over="raise"):
                features = features.astype(np.float16 if opt.float16 else np.float32)
            grid = position_grid(boxes, size)
        except (InputError, ArithmeticError) as error:  # float16 too small for a feature, float for a width
            problems.add("malformed", where, f"id {image_id}: {str(error).removeprefix('picture 0, ')}")
            continue
        counts["used"] += 1
        counts["cut"] += n > opt.n_regions
        counts["padded"] += n < opt.n_regions
        counts["boxes without area"] += int((grid[:n, -1] == 0).sum())
        for writer, row in targets:
            writer.write(row, ims=features, boxes=grid)
    for split, writer in writers.items():
        for row in np.flatnonzero(~writer.done):
            if canonical_id(writer.ids[row]) not in seen:
                problems.add("missing", f"{split}, id {writer.ids[row]}", "in none of the TSV files")
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python scripts/tsv_to_dataset.py karpathy_*.tsv.* --out data/coco_precomp "
        "--ids train=train_ids.txt dev=dev_ids.txt",
    )
    add = parser.add_argument
    add("tsv", nargs="+", help="the TSV file, or all its parts")
    add("--out", required=True, metavar="DIR", help="the dataset folder")
    add("--ids", nargs="+", metavar="SPLIT=FILE", help="id lists, one id a line (default: DIR's own SPLIT_ids.txt)")
    add("--all", choices=SPLITS, help="instead of id lists: every picture of the TSV, in its order, as this split")
    regions = "fixed: every picture has N; best: the N best of 10 to 100, padded if fewer; all: padded to N"
    add("--regions", choices=("fixed", "best", "all"), default="fixed", help=regions + " (default: %(default)s)")
    add("--n_regions", type=int, metavar="N", help="regions a picture (default: 36, with --regions all 100)")
    add("--img_dim", type=int, default=2048, help="size of a region's feature (default: %(default)s)")
    add("--float16", action="store_true", help="features in half the space")
    add("--fields", default=FIELDS, help=f"the columns' names; best goes by {SCORES}, if there (default: %(default)s)")
    add("--skip_bad", action="store_true", help="leave out what is missing or malformed; the first of doubles counts")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")
    opt = parser.parse_args()
    if opt.n_regions is None:
        opt.n_regions = 100 if opt.regions == "all" else 36
    for name in ("n_regions", "img_dim"):
        if getattr(opt, name) < 1:
            raise InputError(f"--{name} {getattr(opt, name)}: expected at least 1")
    fields = opt.fields.split(",")
    if not set(FIELDS.split(",")) <= set(fields):
        raise InputError(f"--fields {opt.fields}: expected {FIELDS} among them")
    for path in opt.tsv:
        if os.path.isfile(path) and not os.path.getsize(path):
            raise InputError(f"{path}: empty, expected lines of {', '.join(fields)}, tab-separated")
    make_folder(opt.out)
    problems = Problems(os.path.join(opt.out, "tsv_problems.txt"))
    if opt.all:
        splits = {opt.all: list(dict.fromkeys(image_id for _, image_id, _ in read_tsv(opt.tsv, fields) if image_id))}
        if not splits[opt.all]:
            raise InputError(f"{opt.tsv[0]}: no pictures, expected lines of {', '.join(fields)}, tab-separated")
    else:
        splits = split_ids(opt.out, opt.ids, problems)
    arrays = {
        "ims": ((opt.n_regions, opt.img_dim), np.float16 if opt.float16 else np.float32),
        "boxes": ((opt.n_regions, GRID), np.float32),
    }
    settings = {"tool": "tsv_to_dataset", "regions": opt.regions, "fields": opt.fields}
    writers = {
        split: SplitWriter(opt.out, split, ids, arrays, settings, opt.tsv, opt.overwrite)
        for split, ids in splits.items()
    }
    for split, writer in writers.items():
        if writer.finished:
            print(f"{split}: there already")
    writers = {split: writer for split, writer in writers.items() if not writer.finished}
    if not writers:
        return
    try:
        counts = convert(opt.tsv, writers, fields, opt, problems)
    finally:
        for writer in writers.values():
            writer.sync()
    print("lines: " + (", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none used"))
    if problems.total and not opt.skip_bad:
        raise InputError(f"{problems} (listed in {problems.path}); --skip_bad goes on without them")
    for split, writer in writers.items():
        kept = writer.finish()
        print(f"{split}: {kept} of {len(writer.ids)} pictures in {writer.prefix}_ims.npy, _boxes.npy and _ids.txt")


if __name__ == "__main__":
    run(main)
