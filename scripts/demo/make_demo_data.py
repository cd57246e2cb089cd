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
import colorsys
import glob
import io
import json
import multiprocessing
import os
import signal

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

if not __package__:
    import _root  # noqa: F401
from lib.constants import N_REGIONS
from lib.errors import InputError, run
from position import position_grid

WIDTH, HEIGHT = 288, 216  # pixels; 3×3 places of 96×72
N_CAPTIONS = 5
SPLITS = ("train", "dev", "test")
FIRST_ID = {"train": 100000, "dev": 200000, "test": 300000}
CELLS = 12  # a crop is averaged to CELLS×CELLS colours before anything else is computed from it
IMG_DIM = 128

# ---- what there is to see, and its names (the first of each list is the one in SPLIT_scenes.json)

KINDS = (
    ("circle", "disc", "dot"),
    ("square", "box", "block"),
    ("triangle",),
    ("star",),
    ("cross", "plus"),
    ("diamond", "rhombus"),
    ("ring", "hoop"),
    ("heart",),
)
COLOURS = {  # hue in degrees, saturation, value
    ("red",): (0, 0.85, 0.85),
    ("orange",): (27, 0.9, 0.97),
    ("yellow",): (54, 0.85, 0.95),
    ("green",): (125, 0.75, 0.65),
    ("turquoise", "teal"): (178, 0.8, 0.8),
    ("blue",): (222, 0.8, 0.85),
    ("purple", "violet"): (273, 0.65, 0.75),
    ("pink", "magenta"): (322, 0.6, 0.97),
}
SIZES = {("small", "little", "tiny"): (30, 35), ("large", "big", "huge"): (52, 59)}  # pixels across
GROUNDS = {("white", "bright"): 235, ("grey", "gray"): 165, ("dark",): 70}
PLACES = {  # (row, column)
    (0, 0): ("in the top left corner", "at the top left", "in the upper left"),
    (0, 1): ("at the top", "near the top edge", "up at the top"),
    (0, 2): ("in the top right corner", "at the top right", "in the upper right"),
    (1, 0): ("on the left", "at the left edge", "on the left side"),
    (1, 1): ("in the middle", "in the centre", "at the center"),
    (1, 2): ("on the right", "at the right edge", "on the right side"),
    (2, 0): ("in the bottom left corner", "at the bottom left", "in the lower left"),
    (2, 1): ("at the bottom", "near the bottom edge", "down at the bottom"),
    (2, 2): ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
}
VERBS = ("is", "sits", "lies", "appears", "stands")
OPENERS = ("there is", "this picture shows", "the image shows", "we see", "a drawing of") + 5 * ("",)


def one_of(rng, options):
    return options[rng.integers(len(options))]


# ---- scenes


def make_group(rng, n_pictures):
    """Scenes of n_pictures pictures that show the same three or four shapes, each time arranged differently.

    A scene is a dict: background, lightness, arrangement (original, mirror, shuffle, scatter) and objects, each with
    kind, colour, rgb, size, pixels (its width), tilt (degrees), place (row, column) and centre (x, y).
    """
    n = int(rng.integers(3, 5))
    colours = list(COLOURS)
    grounds = list(GROUNDS)
    objects = []
    for pick in rng.choice(len(colours), n, replace=False):  # no colour twice, so every mention is unambiguous
        hue, saturation, value = COLOURS[colours[pick]]
        rgb = colorsys.hsv_to_rgb((hue + rng.uniform(-5, 5)) / 360 % 1, saturation, value + rng.uniform(-0.03, 0.03))
        size = one_of(rng, list(SIZES))
        objects.append(
            {
                "kind": one_of(rng, KINDS)[0],
                "colour": colours[pick][0],
                "rgb": [round(255 * c) for c in rgb],
                "size": size[0],
                "pixels": int(rng.integers(*SIZES[size], endpoint=True)),
            }
        )
    ground = one_of(rng, grounds)
    lightness = GROUNDS[ground] + int(rng.integers(-8, 9))
    scenes, seen = [], set()
    while len(scenes) < n_pictures:
        way = ("original", "mirror", "shuffle", "scatter")[min(len(scenes), 3)]
        if way == "mirror":
            first = scenes[0]["objects"]
            spots = [(o["place"][0], 2 - o["place"][1]) for o in first]
            poses = [([WIDTH - o["centre"][0], o["centre"][1]], -o["tilt"]) for o in first]
            if tuple(spots) in seen:  # all in the middle column
                way = "scatter"
        if way == "shuffle":
            order = np.roll(np.arange(n), int(rng.integers(1, n)))
            spots = [tuple(scenes[0]["objects"][i]["place"]) for i in order]
            way = "scatter" if tuple(spots) in seen else way
        if way in ("original", "scatter"):
            spots = [divmod(int(s), 3) for s in rng.choice(9, n, replace=False)]
            if tuple(spots) in seen:
                continue
        if way != "mirror":
            poses = [pose(rng, spot, o["pixels"]) for spot, o in zip(spots, objects, strict=True)]
        seen.add(tuple(spots))
        placed = [
            o | {"place": list(spot), "centre": centre, "tilt": tilt}
            for o, spot, (centre, tilt) in zip(objects, spots, poses, strict=True)
        ]
        scenes.append({"background": ground[0], "lightness": lightness, "arrangement": way, "objects": placed})
    return scenes


def pose(rng, spot, pixels):
    """Centre (x, y) somewhere in the place (row, column), and tilt, of a shape so many pixels wide."""
    room_x, room_y = WIDTH // 6 - pixels // 2 - 4, max(HEIGHT // 6 - pixels // 2 - 4, 1)
    x = WIDTH // 6 * (2 * spot[1] + 1) + int(rng.integers(-room_x, room_x, endpoint=True))
    y = HEIGHT // 6 * (2 * spot[0] + 1) + int(rng.integers(-room_y, room_y, endpoint=True))
    return [x, y], int(rng.integers(-8, 9))


# ---- pictures


def outline(kind):
    """Corners (n, 2) of a shape within the square from -1 to 1, y pointing down."""
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    if kind in ("circle", "ring"):
        return np.stack([np.sin(turn), -np.cos(turn)], 1)
    if kind == "star":
        turn = np.linspace(0, 2 * np.pi, 10, endpoint=False)
        return np.stack([np.sin(turn), -np.cos(turn)], 1) * np.tile([1, 0.42], 5)[:, None]
    if kind == "heart":
        x = np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x, -(y + 2.5) / 15], 1)
    a = 0.33
    return np.array(
        {
            "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
            "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
            "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
            "cross": [
                (-a, -1),
                (a, -1),
                (a, -a),
                (1, -a),
                (1, a),
                (a, a),
                (a, 1),
                (-a, 1),
                (-a, a),
                (-1, a),
                (-1, -a),
                (-a, -a),
            ],
        }[kind]
    )


def render(rng, scene):
    """Picture (HEIGHT, WIDTH, 3) uint8 of a scene; adds each object's tight "box" [x1, y1, x2, y2] to the scene."""
    picture = np.full((HEIGHT, WIDTH, 3), scene["lightness"], dtype=np.float32)
    for o in scene["objects"]:
        side = o["pixels"] + 16  # room for tilting
        angle = np.radians(o["tilt"])
        corners = outline(o["kind"]) @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        corners = corners * o["pixels"] / 2 + side / 2
        stencil = Image.new("L", (4 * side, 4 * side))
        draw = ImageDraw.Draw(stencil)
        draw.polygon([tuple(c) for c in 4 * corners], fill=255)
        if o["kind"] == "ring":
            hole = 4 * (side / 2 + 0.55 * (corners - side / 2))
            draw.polygon([tuple(c) for c in hole], fill=0)
        cover = np.asarray(stencil.resize((side, side), Image.Resampling.BOX), dtype=np.float32) / 255
        left, top = o["centre"][0] - side // 2, o["centre"][1] - side // 2
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + side, WIDTH), min(top + side, HEIGHT)
        cover = cover[y1 - top : y2 - top, x1 - left : x2 - left, None]
        picture[y1:y2, x1:x2] += cover * (np.array(o["rgb"], dtype=np.float32) - picture[y1:y2, x1:x2])
        low, high = np.floor(corners.min(0)) + (left, top), np.ceil(corners.max(0)) + (left, top)
        o["box"] = [int(v) for v in np.concatenate([np.maximum(low, 0), np.minimum(high, (WIDTH, HEIGHT))])]
    # The grain is the same everywhere: a gradient or a frame would tell a crop where it comes from.
    grain = rng.integers(-2, 3, (HEIGHT // 2, WIDTH // 2)) * 3
    picture += np.repeat(np.repeat(grain, 2, 0), 2, 1)[:, :, None]
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


# ---- regions


def propose(rng, scene):
    """Boxes (36, 4) in whole pixels as a detector would give them, best first.

    Near-duplicates around every shape, loose and partial ones, boxes over two shapes and over mere background.
    """
    tight = np.array([o["box"] for o in scene["objects"]], dtype=np.float64)
    n = len(tight)
    n_ground, n_pairs = 4, 3
    # around one shape: by how much of its size each side is moved, and the score that orders the boxes
    which = np.arange(N_REGIONS - n_ground - n_pairs) % n
    turn = np.arange(len(which)) // n
    around = tight[which]
    extent = np.tile(around[:, 2:] - around[:, :2], 2)
    spread = np.where(turn < 5, 0.05, 0.12)[:, None]
    shift = rng.uniform(-1, 1, (len(which), 4)) * spread
    shift[turn == 5] += 0.18 * np.array([-1, -1, 1, 1])
    partial = turn >= 6
    shift[partial, rng.integers(0, 4, partial.sum())] += 0.35  # cut one side; the sign below makes it inwards
    shift[:, 2:] *= np.where(partial, -1, 1)[:, None]
    boxes = [around + shift * extent]
    scores = [0.9 - 0.08 * turn + rng.normal(0, 0.1, len(turn))]
    # around two shapes
    first = rng.integers(0, n, n_pairs)
    second = (first + rng.integers(1, n, n_pairs)) % n
    both = np.concatenate(
        [np.minimum(tight[first, :2], tight[second, :2]), np.maximum(tight[first, 2:], tight[second, 2:])], 1
    )
    boxes.append(both + rng.uniform(-4, 4, both.shape))
    # anywhere
    size = rng.uniform(28, 90, (n_ground, 2))
    corner = rng.uniform(0, 1, (n_ground, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    boxes.append(np.concatenate([corner, corner + size], 1))
    scores.append(rng.uniform(0, 0.5, n_ground + n_pairs))
    boxes = np.rint(np.concatenate(boxes)[np.argsort(-np.concatenate(scores), kind="stable")])
    limit = np.array([WIDTH, HEIGHT])
    low = np.clip(boxes[:, :2], 0, limit - CELLS)
    high = np.clip(np.maximum(boxes[:, 2:], low + CELLS), 0, limit)  # at least a pixel for each of a crop's cells
    return np.concatenate([low, high], 1).astype(np.float32)


def region_features(picture, boxes):
    """Features (R, 128) float32 ≥ 0 of the crops boxes (R, 4), in whole pixels, of a picture (H, W, 3) uint8.

    The crop is averaged to 12×12 colours. From these: how colourful each of 8×8 spots is (64), the directions of
    its edges in each quarter (32), a histogram of hues (16) and of lightness (8), and, the crop's own size
    being lost in the averaging, one of its size (8).
    """
    boxes = np.asarray(boxes).astype(np.int64)
    size = boxes[:, 2:] - boxes[:, :2]
    total = np.zeros((picture.shape[0] + 1, picture.shape[1] + 1, 3), dtype=np.int64)
    total[1:, 1:] = picture.astype(np.int64).cumsum(0).cumsum(1)
    edges = boxes[:, None, :2] + np.arange(CELLS + 1)[None, :, None] * size[:, None] // CELLS  # (R, 13, 2) x, y
    corners = total[edges[:, :, None, 1], edges[:, None, :, 0]]  # (R, 13, 13, 3)
    sums = corners[:, 1:, 1:] - corners[:, 1:, :-1] - corners[:, :-1, 1:] + corners[:, :-1, :-1]
    step = np.diff(edges, axis=1)
    colour = sums / (255 * step[:, :, None, 1] * step[:, None, :, 0])[..., None]  # (R, 12, 12, 3) in 0…1
    high, low = colour.max(-1), colour.min(-1)
    chroma = high - low
    vivid = chroma / (chroma.max((1, 2), keepdims=True) + 0.1)  # (R, 12, 12)
    spots = smooth(vivid)
    dy, dx = np.gradient(vivid, axis=(1, 2))
    length = np.hypot(dx, dy)
    direction = soft_bins(np.arctan2(dy, dx) / (2 * np.pi) % 1, 8, wrap=True) * length[..., None]
    quarters = direction.reshape(-1, 2, CELLS // 2, 2, CELLS // 2, 8).mean((2, 4)).reshape(-1, 32)
    r, g, b = np.moveaxis(colour, -1, 0)
    hue = np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b) / (2 * np.pi) % 1
    weight = chroma**2 / ((chroma**2).sum((1, 2), keepdims=True) + 0.5)
    hues = (soft_bins(hue, 16, wrap=True) * weight[..., None]).sum((1, 2))
    lights = soft_bins((high + low) / 2, 8).mean((1, 2))
    sizes = soft_bins((np.log2(np.sqrt(size[:, 0] * size[:, 1])) - 4) / 4, 8)
    # Scaled so that each part counts, and to a length well above that of a fresh position feature (about 4), as a
    # detector's features have: with short ones PFAN-A's training settles on the same embedding for every region.
    parts = [2 * spots, 30 * quarters, 12 * hues, 4 * lights, 4 * sizes]
    return np.concatenate(parts, 1).astype(np.float32)


def smooth(vivid):
    """Average (R, 12, 12) over overlapping 2×2 windows at 8×8 spots: (R, 64)."""
    at = np.arange(8) * 10 // 7
    pairs = vivid[:, at] + vivid[:, at + 1]
    return ((pairs[:, :, at] + pairs[:, :, at + 1]) / 4).reshape(-1, 64)


def soft_bins(values, n, wrap=False):
    """One-hot (…, n) of values (…) in 0…1, shared linearly between the two nearest bins."""
    if wrap:
        distance = np.abs(values[..., None] * n - np.arange(n))
        distance = np.minimum(distance, n - distance)
    else:
        distance = np.abs(np.clip(values, 0, 1)[..., None] * (n - 1) - np.arange(n))
    return np.maximum(1 - distance, 0)


# ---- captions


def relation(a, b):
    """How object a lies to object b ("left", "right", "above", "below"), or None where it lies askew."""
    dx, dy = b["centre"][0] - a["centre"][0], b["centre"][1] - a["centre"][1]
    if abs(dx) > 1.6 * abs(dy):
        return "left" if dx > 0 else "right"
    if abs(dy) > 1.6 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def named(names, first):
    return next(words for words in names if words[0] == first)


def caption(rng, scene):
    """One sentence about three objects of a scene, most with the place where they are."""

    def noun(o, article="a"):
        words = [one_of(rng, named(COLOURS, o["colour"])), one_of(rng, named(KINDS, o["kind"]))]
        if rng.random() < 0.4:
            words.insert(0, one_of(rng, named(SIZES, o["size"])))
        if article == "a" and words[0] == "orange":
            article = "an"
        return " ".join([article, *words])

    def place(o):
        return one_of(rng, PLACES[tuple(o["place"])])

    def at(o):
        return f"{noun(o)} {place(o)}"

    def says(o):
        return f"{noun(o, one_of(rng, ('a', 'the')))} {one_of(rng, VERBS)} {place(o)}"

    objects = [scene["objects"][i] for i in rng.permutation(len(scene["objects"]))[:3]]
    pairs = [(a, b) for a in objects for b in objects if a is not b and relation(a, b)]
    form = rng.choice(4, p=(0.35, 0.2, 0.2, 0.25))
    if form == 0:
        parts = [at(o) for o in objects]
        text = f"{one_of(rng, OPENERS)} {', '.join(parts[:-1])} and {parts[-1]}"
    elif form == 1:
        parts = [says(o) for o in objects]
        text = f"{parts[0]}, {parts[1]} {one_of(rng, ('and', 'while'))} {parts[2]}"
    elif form == 2 or not pairs:
        first, *rest = objects
        parts = [at(o) for o in rest]
        text = f"{place(first)} {one_of(rng, ('there is', 'is', 'we see'))} {noun(first)}, with "
        text += ", ".join(parts[:-1]) + f" and {parts[-1]}"
    else:
        a, b = one_of(rng, pairs)
        c = next(o for o in objects if o is not a and o is not b)
        text = f"{noun(a, one_of(rng, ('a', 'the')))} {place(a)} {one_of(rng, VERBS)} "
        text += f"{one_of(rng, RELATIONS[relation(a, b)])} {noun(b)}, and {says(c)}"
    if rng.random() < 0.1:
        text += f" on a {one_of(rng, named(GROUNDS, scene['background']))} background"
    text = text.strip()
    return text[0].upper() + text[1:] + "."


# ---- files


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


def write(path, data):
    """Write bytes or an array under a temporary name, then move it into place: no reader ever sees half a file."""
    with open(path + ".tmp", "wb") as file:
        if isinstance(data, np.ndarray):
            np.save(file, data)
        else:
            file.write(data)
    os.replace(path + ".tmp", path)


def write_split(pool, options, split):
    folder = os.path.join(options.data_path, options.data_name)
    n = getattr(options, split)
    want_png = split != "train" or options.train_images
    images = os.path.join(folder, f"{split}_images")
    os.makedirs(images if want_png else folder, exist_ok=True)
    jobs = [
        (options.seed, split, start // options.group, min(options.group, n - start), want_png)
        for start in range(0, n, options.group)
    ]
    features = np.empty((n, N_REGIONS, IMG_DIM), dtype=np.float32)
    boxes = np.empty((n, N_REGIONS, 4), dtype=np.float32)
    captions, scenes, ids = [], [], [str(FIRST_ID[split] + i) for i in range(n)]
    with tqdm(total=n, desc=split, unit="picture") as bar:
        for group in pool.imap(picture_group, jobs, chunksize=4):
            for feature, box, texts, scene, png in group:
                i = len(scenes)
                features[i], boxes[i] = feature, box
                captions += texts
                scenes.append({"id": ids[i], "width": WIDTH, "height": HEIGHT} | scene)
                if want_png:
                    write(os.path.join(images, ids[i] + ".png"), png)
                bar.update()
    for stale in glob.glob(os.path.join(glob.escape(images), "*.png")):  # of an earlier, larger run
        if not want_png or os.path.basename(stale)[:-4] not in ids:
            os.remove(stale)
    for name, data in (
        ("scenes.json", json.dumps(scenes).encode()),
        ("ims.npy", features),
        ("boxes.npy", position_grid(boxes, np.tile([HEIGHT, WIDTH], (n, 1)))),
        ("pixel_boxes.npy", boxes),
        ("caps.txt", "".join(line + "\n" for line in captions).encode()),
        ("ids.txt", "".join(line + "\n" for line in ids).encode()),
    ):
        write(os.path.join(folder, f"{split}_{name}"), data)


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
