"""Pictures of feature files → the arrays of the splits that list them. The TSV and the npz tool share it."""

import argparse
import contextlib

import numpy as np

from lib.constants import N_REGIONS
from lib.datasets.boxes import Reach
from lib.datasets.ids import canonical_id
from lib.datasets.problems import Problems
from lib.datasets.regions import REGION_CHOICES, Regions, fit
from lib.datasets.writer import SplitWriter
from lib.errors import InputError
from position import position_grid

GRID_VALUES = 31
MOST_REGIONS = 100  # what --regions all pads to, where nothing else is said
EARLY = 100  # pictures after which boxes are compared with the pictures' sizes, and again at the end


def add_flags(add):
    """Declare the flags that the tools share. add: an ArgumentParser's add_argument."""
    add("--out", required=True, metavar="DIR", help="the dataset folder")
    add("--ids", nargs="+", metavar="SPLIT=FILE", help="id lists, one id a line (default: DIR's own SPLIT_ids.txt)")
    choices = "fixed: every picture has N; best: the N best of 10 to 100, padded if fewer; all: padded to N"
    add("--regions", choices=REGION_CHOICES, default="fixed", help=choices + " (default: %(default)s)")
    add("--float16", action="store_true", help="features in half the space")
    add("--skip_bad", action="store_true", help="leave out what is missing or malformed; the first of doubles counts")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")


def default_n_regions(opt: argparse.Namespace) -> int:
    if opt.n_regions is not None:
        return opt.n_regions
    return MOST_REGIONS if opt.regions == "all" else N_REGIONS


class FeatureJob(contextlib.AbstractContextManager):
    """Writes each picture to the rows of the splits that list it, a picture may be in two (test and testall).

    source: the files' name for messages. splits: {split: ids}. settings: what decides the values, for the next run.
    inputs: paths, whose sizes are noted.
    opt: out, regions, n_regions, img_dim, float16, overwrite, skip_bad.
    rows: {canonical id: [(SplitWriter, row)]} of the splits that are not finished.
    """

    def __init__(self, source, splits, settings, inputs, opt, problems: Problems, with_boxes: bool = True):
        self.opt, self.problems, self.with_boxes = opt, problems, with_boxes
        self.reach = Reach(source, "image_h and image_w", read_as_widths=False)
        self.number = np.float16 if opt.float16 else np.float32
        arrays = {"ims": ((opt.n_regions, opt.img_dim), self.number)}
        if with_boxes:
            arrays["boxes"] = ((opt.n_regions, GRID_VALUES), np.float32)
        self.stack, self.writers, self.rows = contextlib.ExitStack(), {}, {}
        for split, ids in splits.items():
            writer = SplitWriter(opt.out, split, ids, arrays, settings, inputs, opt.overwrite)
            if writer.finished:
                print(f"{split}: there already")
                continue
            self.writers[split] = self.stack.enter_context(writer)
            for row, image_id in enumerate(ids):
                self.rows.setdefault(canonical_id(image_id), []).append((writer, row))
        self.counts = {"used": 0, "of other pictures": 0, "cut": 0, "padded": 0, "boxes without area": 0}

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def is_done(self, name: str) -> bool:
        """Whether all rows of a picture are written."""
        return all(writer.done[row] for writer, row in self.rows[name])

    def write(self, name: str, regions: Regions) -> None:
        """Write a picture's rows that are not written yet. Raises InputError saying what is malformed."""
        if self.is_done(name):
            return
        n, n_regions = len(regions.features), self.opt.n_regions
        regions = fit(regions, n_regions, self.opt.regions)
        with np.errstate(over="raise"):
            try:
                values = {"ims": regions.features.astype(self.number)}
            except FloatingPointError:
                raise InputError("a feature is too large for float16") from None
        if self.with_boxes:
            try:
                values["boxes"] = position_grid(regions.boxes, regions.size)
            except InputError as error:
                raise InputError(str(error).removeprefix("picture 0, ")) from None
            except ArithmeticError as error:  # a width of hundreds of digits
                raise InputError(str(error)) from None
            self.reach.add(regions.boxes[None], np.array([regions.size]))
            self.counts["boxes without area"] += int((values["boxes"][:n, -1] == 0).sum())
        self.counts["used"] += 1
        self.counts["cut"] += n > n_regions
        self.counts["padded"] += n < n_regions
        for writer, row in self.rows[name]:
            if not writer.done[row]:
                writer.write(row, **values)

    def check_early(self) -> None:
        """After the first EARLY pictures, raise InputError where boxes do not fit the pictures' sizes."""
        if self.counts["used"] == EARLY:
            self._check_reach()

    def _check_reach(self):
        """A note about boxes outside their pictures, or "". Where many are, the next run keeps no row of this one."""
        try:
            return self.reach.check()
        except InputError:
            for writer in self.writers.values():
                writer.done[:] = False
            raise

    def report_missing(self, seen, where: str) -> None:
        """Report the pictures that are neither written nor among seen, a collection of canonical ids."""
        for split, writer in self.writers.items():
            for row in np.flatnonzero(~writer.done):
                if canonical_id(writer.ids[row]) not in seen:
                    self.problems.add("missing", f"{split}, id {writer.ids[row]}", where)

    def finish(self, unit: str) -> None:
        """Print what was read and give the files their names.

        Raises InputError for problems, unless --skip_bad, and for boxes that do not fit the pictures' sizes.
        """
        print(
            f"{unit}: " + (", ".join(f"{count} {name}" for name, count in self.counts.items() if count) or "none used")
        )
        problems = self.problems
        if problems.notes:
            print(f"notes: {problems.notes} (listed in {problems.path})")
        if problems.total and not self.opt.skip_bad:
            raise InputError(f"{problems} (listed in {problems.path}); --skip_bad goes on without them")
        if note := self._check_reach():
            print(f"note: {note}")
        for split, writer in self.writers.items():
            kept = writer.finish()
            names = "_ims.npy, _boxes.npy and _ids.txt" if self.with_boxes else "_ims.npy and _ids.txt"
            print(f"{split}: {kept} of {len(writer.ids)} pictures in {writer.prefix}{names}")
