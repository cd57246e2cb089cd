"""Feature files with an image a line (TSV) → SPLIT_ims.npy, SPLIT_boxes.npy, SPLIT_ids.txt.

The first lines tell the form:
  bottom-up-attention's   image_id image_w image_h num_boxes boxes features, the last two base64 float32 (num_boxes, 4)
                          x1 y1 x2 y2 in pixels and (num_boxes, 2048)
  LXMERT's                img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features
  VinVL's                 a key, and JSON with objects (rect, feature, conf) or with num_boxes and features
--fields names other columns. Lines may come in any order, images of no list are passed over. Rows follow the id
lists. A stopped run goes on where it was; --skip_bad finishes one that found bad lines. A line that was cut off is no
loss where the same image stands whole in another.

example: python scripts/tsv_to_dataset.py karpathy_*.tsv.* --out data/coco_precomp --ids train=train_ids.txt
"""

import argparse
import os

if not __package__:
    import _root  # noqa: F401

from lib.datasets.ids import SPLITS, canonical_id, split_ids
from lib.datasets.problems import Problems
from lib.datasets.tsv_files import FIELDS, FORMS, SCORES, decode, find_form, image_id, parse_fields, read_lines
from lib.datasets.writer import Origin
from lib.errors import InputError, run
from scripts.features.feature_job import FeatureJob, add_flags, default_n_regions


def convert(paths, fields, job, opt):
    """Write the images of the TSV files, and report what is malformed, doubled or missing."""
    whole, damaged = {}, []  # {canonical id: where}, [(canonical id, where, what)]
    for where, values in read_lines(paths):
        id_text = image_id(values, fields)
        name = canonical_id(id_text)
        try:
            if len(values) != len(fields):
                raise InputError(f"{len(values)} fields, expected {len(fields)}: {', '.join(fields)}")
            if not id_text:
                raise InputError("no image_id")
            regions = decode(values, fields, opt.img_dim) if name in job.rows else None
            if regions is None:
                job.counts["of other images"] += 1
            elif name in whole:
                job.problems.add("doubled", where, f"id {id_text} stands in {whole[name]} already")
            else:
                job.write(name, regions)
        except InputError as error:
            damaged.append((name, where, f"id {id_text}: {error}" if id_text else str(error)))
        else:
            whole.setdefault(name, where)
            job.check_early()
    for name, where, what in damaged:
        if name in whole:
            job.counts["damaged, whole in another line"] += 1
        else:
            job.problems.add("malformed", where, what)
    job.report_missing({*whole, *(name for name, _, _ in damaged)}, "in none of the TSV files")


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tsv", nargs="+", help="the TSV file, or all its parts")
    add_flags(add)
    add("--all", choices=SPLITS, help="instead of id lists: every image of the TSV, in its order, as this split")
    add("--n_regions", type=int, metavar="N", help="regions an image (default: 36, with --regions all 100)")
    add("--img_dim", type=int, default=2048, help="size of a region's feature (default: %(default)s)")
    add("--fields", help=f"the columns' names, {','.join(FIELDS)} among them; best goes by {SCORES}, if there")
    return parser


def main():
    opt = get_parser().parse_args()
    opt.n_regions = default_n_regions(opt)
    form = "--fields" if opt.fields else find_form(opt.tsv)
    fields = parse_fields(opt.fields) if opt.fields else FORMS[form]
    print(f"{opt.tsv[0]}: {form} columns: {', '.join(fields)}")
    problems = Problems(os.path.join(opt.out, "tsv_problems.txt"))
    if opt.all:
        ids = dict.fromkeys(image_id(values, fields) for _, values in read_lines(opt.tsv))
        splits = {opt.all: [name for name in ids if name]}
        if not splits[opt.all]:
            raise InputError(f"{opt.tsv[0]}: no images, expected lines of {', '.join(fields)}, tab-separated")
    else:
        splits = split_ids(opt.out, opt.ids, problems)
    settings = {"tool": "tsv_to_dataset", "regions": opt.regions, "fields": ",".join(fields)}
    origin = Origin(settings, opt.tsv)
    with FeatureJob(opt, problems, splits, ("ims", "boxes"), origin, opt.regions, source=opt.tsv[0]) as job:
        if job.writers:
            convert(opt.tsv, fields, job, opt)
            job.finish("lines")


if __name__ == "__main__":
    run(main)
