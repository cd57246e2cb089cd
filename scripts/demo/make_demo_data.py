"""Render the demo dataset: pictures of coloured shapes, 36 regions each, five captions each, in f30k_precomp's format.

Pictures come in groups that show the very same shapes in different places (one is the mirror image of the first),
so what is seen narrows the search down to a group and only where it is seen finds the picture in it.
A region's feature is computed from the pixels of its crop alone: it knows nothing of labels or of where the crop lies.

For each split it writes, under DATA_PATH/DATA_NAME:
  SPLIT_ims.npy (n, 36, 128) float32, SPLIT_boxes.npy (n, 36, 31) float32, SPLIT_caps.txt (5 lines a picture),
  SPLIT_ids.txt, SPLIT_pixel_boxes.npy (n, 36, 4) float32 x1 y1 x2 y2 in pictures of 288×216,
  SPLIT_scenes.json (what was drawn where) and SPLIT_images/ID.png (train: only with --train_images).
Every file depends on the seed and the counts alone, not on the number of processes.
"""

import argparse
import glob
import io
import json
import multiprocessing
import os
import signal

import numpy as np
from PIL import Image
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.constants import N_REGIONS
from lib.errors import InputError, run
from lib.files import replace, write_lines
from position import position_grid
from scripts.demo.drawing import render
from scripts.demo.regions import IMG_DIM, propose, region_features
from scripts.demo.scenes import HEIGHT, WIDTH, make_group
from scripts.demo.sentences import caption

N_CAPTIONS = 5
SPLITS = ("train", "dev", "test")
FIRST_ID = {"train": 100000, "dev": 200000, "test": 300000}


def picture_group(job):
    """Everything about one group: a list of (feature, boxes, captions, scene, PNG bytes or None)."""
    seed, split, group, n_pictures, want_png = job
    rng = np.random.default_rng([seed, SPLITS.index(split), group])
    made = []
    for scene in make_group(rng, n_pictures):
        picture = render(rng, scene)
        boxes = propose(rng, scene)
        captions = []
        while len(captions) < N_CAPTIONS:
            text = caption(rng, scene)
            if text not in captions:
                captions.append(text)
        png = None
        if want_png:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "png", compress_level=1)
            png = file.getvalue()
        made.append((region_features(picture, boxes), boxes, captions, scene | {"group": group}, png))
    return made


def write_split(pool, options, split):
    """Draw a split with a pool of processes and write its files."""
    folder = os.path.join(options.data_path, options.data_name)
    n = getattr(options, split)
    want_png = split != "train" or options.train_images
    images = os.path.join(folder, f"{split}_images")
    os.makedirs(images if want_png else folder, exist_ok=True)
    features = np.empty((n, N_REGIONS, IMG_DIM), dtype=np.float32)
    boxes = np.empty((n, N_REGIONS, 4), dtype=np.float32)
    captions, scenes, ids = [], [], [str(FIRST_ID[split] + i) for i in range(n)]
    for feature, box, texts, scene, png in draw_pictures(pool, options, split, want_png):
        i = len(scenes)
        features[i], boxes[i] = feature, box
        captions += texts
        scenes.append({"id": ids[i], "width": WIDTH, "height": HEIGHT} | scene)
        if want_png:
            write(os.path.join(images, ids[i] + ".png"), png)
    for stale in glob.glob(os.path.join(glob.escape(images), "*.png")):  # of an earlier, larger run
        if not want_png or os.path.basename(stale)[:-4] not in ids:
            os.remove(stale)
    prefix = os.path.join(folder, split)
    write(prefix + "_scenes.json", json.dumps(scenes).encode())
    grids = position_grid(boxes, np.tile([HEIGHT, WIDTH], (n, 1)))
    for name, array in (("ims", features), ("boxes", grids), ("pixel_boxes", boxes)):
        replace(f"{prefix}_{name}.npy", lambda file, array=array: np.save(file, array))
    write_lines(prefix + "_caps.txt", captions)
    write_lines(prefix + "_ids.txt", ids)


def draw_pictures(pool, options, split, want_png):
    """picture_group's tuples of a whole split, in order, with a progress bar."""
    n = getattr(options, split)
    jobs = [
        (options.seed, split, start // options.group, min(options.group, n - start), want_png)
        for start in range(0, n, options.group)
    ]
    with tqdm(total=n, desc=split, unit="picture") as bar:
        for group in pool.imap(picture_group, jobs, chunksize=4):
            bar.update(len(group))
            yield from group


def write(path, data):
    replace(path, lambda file: file.write(data))


def parse(argv=None):
    """Flags as a namespace. Raises InputError for bad ones."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="example: python scripts/demo/make_demo_data.py --seed 1",
    )
    parser.add_argument("--data_path", default="./data", help="folder of datasets (default: %(default)s)")
    parser.add_argument("--data_name", default="demo_precomp", help="the dataset's folder in it (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    for split, count in zip(SPLITS, (3000, 300, 500), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"{split} pictures (default: {count})")
    parser.add_argument("--group", type=int, default=5, help="pictures of the same shapes (default: %(default)s)")
    parser.add_argument("--train_images", action="store_true", help="write the PNGs of the train split, too")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")

    def fail(message):
        raise InputError(message)

    parser.error = fail  # one line, without the usage
    options = parser.parse_args(argv)
    for flag, low, high in (
        ("seed", 0, 2**32 - 1),
        ("train", 1, 99999),
        ("dev", 1, 99999),
        ("test", 1, 99999),
        ("group", 1, 100),
        ("workers", 1, 256),
    ):
        if not low <= getattr(options, flag) <= high:
            fail(f"--{flag} is {getattr(options, flag)}: expected {low} to {high}")
    return options


def main():
    options = parse()
    for split in SPLITS:
        path = os.path.join(options.data_path, options.data_name, split)
        if os.path.exists(path + "_ims.npy") and not os.path.exists(path + "_scenes.json"):
            raise InputError(f"{path}_ims.npy is not of this script's making: choose another --data_name")
    # Ctrl-C is the parent's business; workers would each print a traceback
    with multiprocessing.Pool(options.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for split in SPLITS:
            write_split(pool, options, split)


if __name__ == "__main__":
    run(main)
