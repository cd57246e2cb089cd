"""Regions of images → the arrays of the splits that list the images. All tools that write features share it."""

import argparse
import contextlib
from collections import Counter

import numpy as np

from lib.constants import N_REGIONS, N_SLOTS
from lib.datasets.boxes import BoxCheck
from lib.datasets.ids import canonical_id
from lib.datasets.problems import Problems
from lib.datasets.regions import REGION_CHOICES, Regions, fit
from lib.datasets.writer import Origin, SplitWriter
from lib.errors import InputError
from position import BoxError, position_grid

MOST_REGIONS = 100  # what --regions all pads to, where nothing else is said
EARLY = 100  # images after which boxes are compared with the images' sizes, and again at the end


def add_flags(add):
    """Declare the flags that converters share. add: an ArgumentParser's add_argument."""
    add("--out", required=True, metavar="DIR", help="the dataset folder")
    add("--ids", nargs="+", metavar="SPLIT=FILE", help="id lists, one id a line (default: DIR's own SPLIT_ids.txt)")
    choices = "fixed: every image has N; best: the N best of 10 to 100, padded if fewer; all: padded to N"
    add("--regions", choices=REGION_CHOICES, default="fixed", help=choices + " (default: %(default)s)")
    add("--float16", action="store_true", help="features in half the space")
    add("--skip_bad", action="store_true", help="leave out what is missing or malformed; the first of doubles counts")
    add("--overwrite", action="store_true", help="start afresh and replace what is there")


def default_n_regions(opt: argparse.Namespace) -> int:
    if opt.n_regions is not None:
        return opt.n_regions
    return MOST_REGIONS if opt.regions == "all" else N_REGIONS


class FeatureJob(contextlib.ExitStack):
    """Writes each image to the rows of the splits that list it, an image may be in two (test and testall).

    opt: out, n_regions, img_dim, float16, overwrite, skip_bad. splits: {split: ids}. arrays: names of "ims" and what
    else there is: "boxes" (grids), "who_ims", "pixel_boxes". origin: a lib.datasets.writer.Origin. choice: of
    lib.datasets.regions.REGION_CHOICES. key: id → what images are told apart by, None for those that are not there.
    source: the files' name for messages.
    rows: {key: [(SplitWriter, row)]} of the splits that are not finished.
    """

    def __init__(
        self, opt, problems: Problems, splits, arrays, origin: Origin, choice="fixed", key=canonical_id, source=""
    ):
        super().__init__()
        for name in ("n_regions", "img_dim"):
            if getattr(opt, name) < 1:
                raise InputError(f"--{name} {getattr(opt, name)}: expected at least 1")
        self.opt, self.choice, self.problems, self.check = opt, choice, problems, BoxCheck(source)
        self.number = np.float16 if opt.float16 else np.float32
        shapes = {
            "ims": ((opt.n_regions, opt.img_dim), self.number),
            "boxes": ((opt.n_regions, 2 * N_SLOTS + 1), np.float32),
            "who_ims": ((opt.img_dim,), self.number),
            "pixel_boxes": ((opt.n_regions, 4), np.float32),
        }
        self.arrays = {name: shapes[name] for name in arrays}
        self.writers, self.rows = {}, {}
        for split, ids in splits.items():
            writer = SplitWriter(opt.out, split, ids, self.arrays, origin, opt.overwrite)
            if writer.finished:
                print(f"{split}: there already")
                continue
            self.writers[split] = self.enter_context(writer)
            for row, image_id in enumerate(ids):
                if (name := key(image_id)) is not None:
                    self.rows.setdefault(name, []).append((writer, row))
        self.counts: Counter[str] = Counter()

    def todo(self) -> list:
        """The keys of the images of which a row is not written yet, in the order of the splits."""
        return [name for name in self.rows if not self.is_done(name)]

    def is_done(self, name) -> bool:
        return all(writer.done[row] for writer, row in self.rows[name])

    def write(self, name, regions: Regions, **values: np.ndarray) -> None:
        """Write an image's rows that are not written yet; values: its rows of who_ims and pixel_boxes.

        Raises InputError saying what is malformed.
        """
        if self.is_done(name):
            return
        n, n_regions = len(regions.features), self.opt.n_regions
        regions = fit(regions, n_regions, self.choice)
        with np.errstate(over="raise"):
            try:
                values["ims"] = regions.features.astype(self.number)
            except FloatingPointError:
                raise InputError("a feature is too large for float16") from None
        if "boxes" in self.arrays:
            sizes = np.array([regions.size], dtype=np.float64)
            boxes = self.check.in_pixels(regions.boxes[None].astype(np.float64), sizes)
            try:
                values["boxes"] = position_grid(boxes, sizes)[0]
            except BoxError as error:
                raise InputError(f"box {error.box}: {error.reason}") from None
            self.check.add(boxes[:, :n], sizes)
        self.counts["used"] += 1
        self.counts["cut"] += n > n_regions
        self.counts["padded"] += n < n_regions
        for writer, row in self.rows[name]:
            if not writer.done[row]:
                writer.write(row, **{array: values[array] for array in self.arrays})

    def check_early(self) -> None:
        """After the first EARLY images, raise InputError where boxes do not fit the images' sizes."""
        if self.counts["used"] == EARLY:
            self._check_boxes()

    def _check_boxes(self):
        """A note about the boxes, or "". Where many lie outside their images, the next run keeps no row of this one."""
        try:
            return self.check.note()
        except InputError:
            for writer in self.writers.values():
                writer.done[:] = False
            raise

    def report_missing(self, seen, where: str) -> None:
        """Report the images that are neither written nor among seen, a collection of canonical ids."""
        for split, writer in self.writers.items():
            for row in np.flatnonzero(~writer.done):
                if canonical_id(writer.ids[row]) not in seen:
                    self.problems.add("missing", f"{split}, id {writer.ids[row]}", where)

    def finish(self, unit: str) -> None:
        """Print what was read and give the files their names.

        Raises InputError for problems, unless --skip_bad, and for boxes that do not fit the images' sizes.
        """
        counts = {**self.counts, "boxes without area": self.check.empty}
        print(f"{unit}: " + (", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none used"))
        problems = self.problems
        if problems.total and not self.opt.skip_bad:
            raise InputError(f"{problems} (listed in {problems.path}); --skip_bad goes on without them")
        if note := self._check_boxes():
            print(f"note: {note}")
        for split, writer in self.writers.items():
            kept = writer.finish()
            names = ", ".join(f"_{name}.npy" for name in self.arrays)
            print(f"{split}: {kept} of {len(writer.ids)} images in {writer.prefix}{names} and _ids.txt")
