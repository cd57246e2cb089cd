"""Draw the demo dataset: images of coloured shapes, 36 regions each, five captions each, in f30k_precomp's format.

Images come in groups that show the very same shapes in different places (one is the mirror image of the first),
so what is seen narrows the search down to a group and only where it is seen finds the image in it.
A region's feature is computed from the pixels of its crop alone: it knows nothing of labels or of where the crop lies.

For each split it writes, under DATA_PATH/DATA_NAME:
  SPLIT_ims.npy (n, 36, 128) float32, SPLIT_boxes.npy (n, 36, 31) float32, SPLIT_caps.txt (5 lines an image),
  SPLIT_ids.txt, SPLIT_pixel_boxes.npy (n, 36, 4) float32 x1 y1 x2 y2 in images of 288×216,
  SPLIT_scenes.json (what was drawn where) and, except for train, SPLIT_images/ID.png.
Every file depends on the seed and the counts alone, not on the number of processes.

example: python scripts/demo/make_demo_data.py --seed 1
"""

import argparse
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401

from lib.errors import InputError, run
from lib.files import make_folder, replace, write_lines
from position import position_grid
from scripts.demo.regions import propose, region_features
from scripts.demo.scenes import HEIGHT, WIDTH, make_group, render
from scripts.demo.sentences import caption

N_CAPTIONS = 5
GROUP = 5  # images of the same shapes
SPLITS = {"train": 3000, "dev": 300, "test": 500}  # images by default
FIRST_ID = {"train": 100000, "dev": 200000, "test": 300000}


def draw_group(job):
    """Draw the images of a group and write their PNGs to folder, unless it is None.

    Returns (features, boxes, captions, description) of each.
    """
    seed, split, group, ids, folder = job
    rng = np.random.default_rng([seed, list(SPLITS).index(split), group])
    made = []
    for image_id, scene in zip(ids, make_group(rng, len(ids)), strict=True):
        image, boxes = render(rng, scene), propose(rng, scene)
        captions = []
        while len(captions) < N_CAPTIONS:
            text = caption(rng, scene)
            if text not in captions:
                captions.append(text)
        if folder:
            Image.fromarray(image).save(f"{folder}/{image_id}.png", compress_level=1)
        description = {"id": image_id, "width": WIDTH, "height": HEIGHT} | scene | {"group": group}
        made.append((region_features(image, boxes), boxes, captions, description))
    return made


def write_split(pool, opt, split):
    """Draw a split with a pool of processes and write its files."""
    ids = [str(FIRST_ID[split] + i) for i in range(getattr(opt, split))]
    prefix = os.path.join(opt.data_path, opt.data_name, split)
    images = f"{prefix}_images" if split != "train" else None
    if images:
        make_folder(images)
        for stale in Path(images).glob(f"{FIRST_ID[split] // 100000}?????.png"):  # of an earlier, larger run
            stale.unlink()
    jobs = [(opt.seed, split, i // GROUP, ids[i : i + GROUP], images) for i in range(0, len(ids), GROUP)]
    groups = tqdm(pool.imap(draw_group, jobs, chunksize=4), split, len(jobs), unit="group")
    features, boxes, captions, descriptions = zip(*(image for group in groups for image in group), strict=True)
    grids = position_grid(boxes, np.tile([HEIGHT, WIDTH], (len(ids), 1)))
    for name, array in (("ims", features), ("boxes", grids), ("pixel_boxes", boxes)):
        replace(f"{prefix}_{name}.npy", lambda file, array=array: np.save(file, np.stack(array)))
    replace(prefix + "_scenes.json", lambda file: file.write(json.dumps(descriptions).encode()))
    write_lines(prefix + "_caps.txt", [text for texts in captions for text in texts])
    write_lines(prefix + "_ids.txt", ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_path", default="./data", help="folder of datasets (default: %(default)s)")
    add("--data_name", default="demo_precomp", help="the dataset's folder in it (default: %(default)s)")
    add("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    for split, count in SPLITS.items():
        add(f"--{split}", type=int, default=count, help=f"{split} images (default: {count})")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    opt = parser.parse_args()
    if min(opt.train, opt.dev, opt.test, opt.workers, opt.seed + 1) < 1:
        raise InputError("expected --train, --dev, --test, --workers of 1 and more, --seed of 0 and more")
    folder = os.path.join(opt.data_path, opt.data_name)
    make_folder(folder)
    for split in SPLITS:
        path = os.path.join(folder, split)
        if os.path.exists(path + "_ims.npy") and not os.path.exists(path + "_scenes.json"):
            raise InputError(f"{path}_ims.npy is not of this script's making: choose another --data_name")
    # Ctrl-C is the parent's business; workers would each print a traceback
    with multiprocessing.Pool(opt.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for split in SPLITS:
            write_split(pool, opt, split)


if __name__ == "__main__":
    run(main)
