"""Draw the README's two figures: workflow.png (picture and sentence to score) and position_attention.png.

python scripts/draw_workflow.py [--out docs]
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import run
from position import position_grid

WIDTH, HEIGHT, CELLS = 640, 480, 16  # the example picture in pixels, and the grid over it
DOG = (188, 284, 377, 412)  # x1, y1, x2, y2
OTHERS = [(40, 92, 190, 372), (512, 30, 602, 120), (426, 364, 482, 420)]  # tree, sun, ball
IMAGE, TEXT, BOTH = ("#e8f0fb", "#2f66b3"), ("#fdf0e1", "#c2701b"), ("#e9f5ec", "#2f8a4e")  # fill, edge
INK, GREY, HIT = "#1f2933", "#66717d", "#d42a5b"
plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "text.color": INK})


def canvas(width, height):
    """A figure whose one axis is measured in inches."""
    figure = plt.figure(figsize=(width, height), dpi=200, facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def box(axis, x, y, width, height, title, note="", colours=IMAGE, size=10.5):
    """A rounded box centred at x, y, its title in bold over a smaller note."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.09"
    axis.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colours[0], ec=colours[1], lw=1.5))
    rise = 0.105 * (note.count("\n") + 1) if note else 0
    axis.text(x, y + rise, title, ha="center", va="center", size=size, weight="bold", linespacing=1.15)
    if note:
        drop = 0.105 * (title.count("\n") + 1)
        axis.text(x, y - drop, note, ha="center", va="center", size=size - 1.5, color="#3e4c59", linespacing=1.25)


def arrow(axis, start, end, bend=None, colour=GREY):
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "lw": 1.5, "color": colour, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, connectionstyle=bend, **style))


def draw_scene(axis):
    """A dog with a ball on the grass: WIDTH×HEIGHT pixels, y downwards."""
    axis.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), xticks=[], yticks=[])
    fur, dark = "#9a6a3f", "#6e4726"
    for patch in (
        Rectangle((0, 0), WIDTH, HEIGHT, fc="#cfe6f7"),
        Circle((557, 75), 40, fc="#f9cf52"),
        Ellipse((500, 420), 760, 330, fc="#a9d18b"),
        Ellipse((120, 470), 800, 300, fc="#8fc270"),
        Rectangle((102, 250), 26, 120, fc="#7d5a3c"),
        Circle((115, 200), 68, fc="#4f9457"),
        Circle((90, 155), 48, fc="#5ba463"),
        Circle((142, 150), 48, fc="#5ba463"),
        Circle((116, 140), 44, fc="#66b06d"),
        Polygon([(214, 330), (192, 292), (202, 288), (232, 318)], fc=dark),  # tail
        *(Rectangle((x, 350), 14, 60, fc=dark) for x in (238, 312)),
        *(Rectangle((x, 350), 14, 60, fc=fur) for x in (222, 296)),
        Ellipse((272, 344), 124, 56, fc=fur),
        Ellipse((334, 318), 62, 54, fc=fur),  # head
        Ellipse((358, 328), 36, 24, fc="#b98a5c"),
        Circle((372, 323), 5, fc="#2d1c10"),
        Circle((343, 311), 4, fc="#2d1c10"),
        Ellipse((316, 316), 20, 46, angle=12, fc=dark),  # ear
        Circle((454, 392), 25, fc="#d8443c"),
        Circle((446, 384), 7, fc="#ec8a83"),
    ):
        axis.add_patch(patch)


def frame(axis, region, colour, width, **style):
    x1, y1, x2, y2 = region
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fc="none", ec=colour, lw=width, **style))


def draw_workflow():
    figure, axis = canvas(11, 5.3)
    top, middle, low = 4.35, 3.05, 0.95

    # The picture's lane.
    picture = figure.add_axes((0.25 / 11, 3.1 / 5.3, 1.6 / 11, 1.2 / 5.3))
    draw_scene(picture)
    for region in OTHERS:
        frame(picture, region, IMAGE[1], 1.3)
    frame(picture, DOG, HIT, 1.6)
    axis.text(1.05, 4.45, "picture", ha="center", size=10.5, weight="bold")
    axis.text(1.05, 2.9, "36 regions", ha="center", size=9, color="#3e4c59")
    box(axis, 2.95, top, 1.35, 0.8, "features", "36 × 2048")
    box(axis, 2.95, middle, 1.35, 0.8, "boxes", "36 × 4 pixels")
    box(axis, 4.75, middle, 1.55, 0.8, "16×16 grid", "15 cells + weights")
    box(axis, 4.75, top, 1.55, 0.8, "position\nattention", "")
    box(axis, 6.55, top, 1.4, 0.8, "regions", "36 × 1024")
    arrow(axis, (1.88, 3.85), (2.25, top))
    arrow(axis, (1.88, 3.55), (2.25, middle))
    arrow(axis, (3.65, top), (3.95, top))
    arrow(axis, (3.65, middle), (3.95, middle))
    arrow(axis, (4.75, middle + 0.42), (4.75, top - 0.42))
    arrow(axis, (5.55, top), (5.83, top))

    # The sentence's lane.
    words = "A brown dog\nplays with a\nred ball on\nthe grass"
    axis.text(1.05, low, words, ha="center", va="center", size=10, style="italic", linespacing=1.3)
    axis.text(1.05, low + 0.58, "sentence", ha="center", size=10.5, weight="bold")
    box(axis, 2.95, low, 1.35, 0.8, "tokens", "word → 300", TEXT)
    box(axis, 4.75, low, 1.55, 0.8, "bi-GRU", "mean of directions", TEXT)
    box(axis, 6.55, low, 1.4, 0.8, "words", "n × 1024", TEXT)
    arrow(axis, (1.75, low), (2.25, low))
    arrow(axis, (3.65, low), (3.95, low))
    arrow(axis, (5.55, low), (5.83, low))

    # Both.
    cross = (top + low) / 2
    box(axis, 7.75, cross, 1.5, 1.05, "cross\nattention", "t2i or i2t", BOTH)
    box(axis, 9.75, cross, 1.3, 0.8, "similarity", "picture × sentence", BOTH)
    figure_box = {"colours": BOTH}
    box(axis, 9.75, top, 1.6, 0.8, "hinge loss", "training", **figure_box)
    box(axis, 9.75, low, 1.6, 0.8, "ranking", "recall@1, 5, 10", **figure_box)
    return figure


def draw_position_attention():
    figure, axis = canvas(11, 6)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the two PNG files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("workflow", draw_workflow), ("position_attention", draw_position_attention)):
        path = out / f"{name}.png"
        draw().savefig(path, metadata={"Software": None})
        print(path)


if __name__ == "__main__":
    run(main)
