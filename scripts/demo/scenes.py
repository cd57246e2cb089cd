"""Scenes of the demo's images, coloured shapes and where they lie, and how they are drawn.

A scene is a dict: background, lightness, arrangement (original, mirror, shuffle, scatter) and objects, each with kind,
colour, rgb, size, pixels (its width), tilt (degrees), place (row, column) and centre (x, y).
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 288, 216  # pixels; 3×3 places of 96×72

# What there is to see, and its names; the first of each tuple is the one in SPLIT_scenes.json.
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
ARM = 0.33  # half the width of a cross's arms
POLYGONS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)]
    + [(ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
}


def one_of(rng, options):
    return options[rng.integers(len(options))]


def make_group(rng, n_images):
    """Scenes of n_images images that show the same three or four shapes, each time arranged differently."""
    objects = choose_objects(rng)
    ground = one_of(rng, list(GROUNDS))
    background = {"background": ground[0], "lightness": GROUNDS[ground] + int(rng.integers(-8, 9))}
    scenes, seen = [], set()
    while len(scenes) < n_images:
        first = scenes[0]["objects"] if scenes else []
        arrangement = ("original", "mirror", "shuffle", "scatter")[min(len(scenes), 3)]
        places, poses = None, None
        if arrangement == "mirror":
            places = tuple((o["place"][0], 2 - o["place"][1]) for o in first)
            poses = [([WIDTH - o["centre"][0], o["centre"][1]], -o["tilt"]) for o in first]
        elif arrangement == "shuffle":
            shift = int(rng.integers(1, len(first)))
            places = tuple(tuple(o["place"]) for o in first[-shift:] + first[:-shift])
        if places is None or places in seen:
            arrangement = "scatter" if scenes else "original"
            places = tuple(divmod(int(place), 3) for place in rng.choice(9, len(objects), replace=False))
            poses = None
        if places in seen:
            continue
        seen.add(places)
        poses = poses or [pose(rng, *pair) for pair in zip(places, objects, strict=True)]
        placed = [
            o | {"place": list(place), "centre": centre, "tilt": tilt}
            for o, place, (centre, tilt) in zip(objects, places, poses, strict=True)
        ]
        scenes.append({**background, "arrangement": arrangement, "objects": placed})
    return scenes


def choose_objects(rng):
    """Three or four shapes, without their places."""
    n, colours, objects = int(rng.integers(3, 5)), list(COLOURS), []
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
    return objects


def pose(rng, place, o):
    """Centre (x, y) and tilt of an object in a place (row, column)."""
    room_x, room_y = WIDTH // 6 - o["pixels"] // 2 - 4, max(HEIGHT // 6 - o["pixels"] // 2 - 4, 1)
    x = WIDTH // 6 * (2 * place[1] + 1) + int(rng.integers(-room_x, room_x, endpoint=True))
    y = HEIGHT // 6 * (2 * place[0] + 1) + int(rng.integers(-room_y, room_y, endpoint=True))
    return [x, y], int(rng.integers(-8, 9))


# ---------------------------------------------------------------- images


def outline(kind):
    """Corners (n, 2) of a shape within the square from -1 to 1, y pointing down."""
    if kind in POLYGONS:
        return np.array(POLYGONS[kind])
    angle = np.linspace(0, 2 * np.pi, 10 if kind == "star" else 60, endpoint=False)
    circle = np.stack([np.sin(angle), -np.cos(angle)], 1)
    if kind == "star":
        return circle * np.tile([1, 0.42], 5)[:, None]
    if kind == "heart":
        y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        return np.stack([np.sin(angle) ** 3, -(y + 2.5) / 15], 1)
    return circle


def render(rng, scene):
    """Image (HEIGHT, WIDTH, 3) uint8 of a scene; adds each object's tight "box" [x1, y1, x2, y2] to the scene."""
    image = np.full((HEIGHT, WIDTH, 3), scene["lightness"], dtype=np.float32)
    for o in scene["objects"]:
        draw_object(image, o)
    # The grain is the same everywhere: a gradient or a frame would tell a crop where it comes from.
    grain = rng.integers(-2, 3, (HEIGHT // 2, WIDTH // 2)) * 3
    image += np.repeat(np.repeat(grain, 2, 0), 2, 1)[:, :, None]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def draw_object(image, o):
    """Blend an object into image (HEIGHT, WIDTH, 3) float32, and add its "box"."""
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
    image[y1:y2, x1:x2] += cover * (np.array(o["rgb"], dtype=np.float32) - image[y1:y2, x1:x2])
    low, high = np.floor(corners.min(0)) + (left, top), np.ceil(corners.max(0)) + (left, top)
    o["box"] = [int(v) for v in np.concatenate([np.maximum(low, 0), np.minimum(high, (WIDTH, HEIGHT))])]
