"""Images of the demo's scenes."""

import numpy as np
from PIL import Image, ImageDraw

from scripts.demo.scenes import HEIGHT, WIDTH

ARM = 0.33  # half the width of a cross's arms
POLYGONS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)]
    + [(ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
}


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
