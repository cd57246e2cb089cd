"""Draw the README's two figures: workflow.png (picture and sentence to score) and position_attention.png.

python scripts/demo/draw_workflow.py [--out docs]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.transforms import Affine2D

if not __package__:
    import _root  # noqa: F401

from lib.errors import run
from position import position_grid

WIDTH, HEIGHT, CELLS = 640, 480, 16  # the example picture in pixels, and the grid over it
CELL_X, CELL_Y = WIDTH / CELLS, HEIGHT / CELLS
DOG = (205, 285, 363, 388)  # x1, y1, x2, y2
OTHERS = [(40, 92, 190, 372), (512, 30, 602, 120), (426, 364, 482, 420)]  # tree, sun, ball
IMAGE, TEXT, BOTH = ("#e8f0fb", "#2f66b3"), ("#fdf0e1", "#c2701b"), ("#e9f5ec", "#2f8a4e")  # fill, edge
INK, PALE, GREY, HIT = "#1f2933", "#3e4c59", "#66717d", "#d42a5b"
SHADE = plt.get_cmap("Blues")
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
    lines = [(line, 0.18, {"size": size, "weight": "bold"}) for line in title.split("\n")]
    lines += [(line, 0.17, {"size": size - 1.5, "color": PALE}) for line in note.split("\n") if line]
    baseline = y + (sum(step for _, step, _ in lines) + (0.04 if note else 0)) / 2 + 0.04
    for number, (line, step, style) in enumerate(lines):
        baseline -= step + (0.04 if number == title.count("\n") + 1 else 0)
        axis.text(x, baseline, line, ha="center", va="baseline", **style)


def arrow(axis, start, end, bend=None, colour=GREY):
    style = {"arrowstyle": "-|>", "mutation_scale": 12, "lw": 1.5, "color": colour, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, connectionstyle=bend, **style))


def draw_scene(axis):
    """A dog with a ball on the grass: WIDTH×HEIGHT pixels, y downwards."""
    axis.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), xticks=[], yticks=[])
    scenery = (
        Rectangle((0, 0), WIDTH, HEIGHT, fc="#cfe6f7"),
        Circle((557, 75), 40, fc="#f9cf52"),
        Ellipse((500, 420), 760, 330, fc="#a9d18b"),
        Ellipse((120, 470), 800, 300, fc="#8fc270"),
        Rectangle((102, 250), 26, 120, fc="#7d5a3c"),
        Circle((115, 200), 68, fc="#4f9457"),
        Circle((90, 155), 48, fc="#5ba463"),
        Circle((142, 150), 48, fc="#5ba463"),
        Circle((116, 140), 44, fc="#66b06d"),
        Circle((454, 392), 25, fc="#d8443c"),
        Circle((446, 384), 7, fc="#ec8a83"),
    )
    fur, dark = "#9a6a3f", "#6e4726"
    dog = (
        Polygon([(26, 46), (4, 8), (14, 4), (44, 34)], fc=dark),  # tail
        *(Rectangle((x, 66), 14, 60, fc=dark) for x in (50, 124)),
        *(Rectangle((x, 66), 14, 60, fc=fur) for x in (34, 108)),
        Ellipse((84, 60), 124, 56, fc=fur),
        Ellipse((146, 34), 62, 54, fc=fur),  # head
        Ellipse((170, 44), 36, 24, fc="#b98a5c"),
        Circle((183, 40), 5, fc="#2d1c10"),
        Circle((155, 27), 4, fc="#2d1c10"),
        Ellipse((128, 32), 20, 46, angle=12, fc=dark),  # ear
    )
    for patch in scenery + dog:
        if patch in dog:
            patch.set_transform(Affine2D().scale(0.8).translate(DOG[0] + 4, DOG[1]) + axis.transData)
        axis.add_patch(patch)


def frame(axis, region, colour, width, **style):
    x1, y1, x2, y2 = region
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fc="none", ec=colour, lw=width, **style))


def draw_workflow():
    figure, axis = canvas(11, 4.9)
    top, middle, low, cross = 4.15, 2.85, 0.8, 2.475

    picture = figure.add_axes((0.25 / 11, 2.9 / 4.9, 1.6 / 11, 1.2 / 4.9))
    draw_scene(picture)
    for region in OTHERS:
        frame(picture, region, IMAGE[1], 1.3)
    frame(picture, DOG, HIT, 1.6)
    axis.text(1.05, 4.22, "picture", ha="center", size=10.5, weight="bold")
    axis.text(1.05, 2.66, "36 regions", ha="center", size=9, color=PALE)
    arrow(axis, (1.9, 3.75), (2.2, top))
    arrow(axis, (1.9, 3.25), (2.2, middle))
    box(axis, 2.92, top, 1.36, 0.95, "features", "36 × 2048")
    box(axis, 2.92, middle, 1.36, 0.95, "boxes", "36 × 4 pixels")
    arrow(axis, (3.63, top), (3.93, top))
    arrow(axis, (3.63, middle), (3.93, middle))
    box(axis, 4.75, top, 1.56, 0.95, "position\nattention", "PFAN-A or PFAN-P")
    box(axis, 4.75, middle, 1.56, 0.95, "16×16 grid", "15 cells + weights")
    arrow(axis, (4.75, middle + 0.5), (4.75, top - 0.5))
    arrow(axis, (5.56, top), (5.86, top))
    box(axis, 6.6, top, 1.4, 0.95, "region\nembeddings", "36 × 1024")

    axis.text(1.05, low + 0.5, "sentence", ha="center", size=10.5, weight="bold")
    sentence = "A brown dog\nplays with a ball\non the grass"
    axis.text(1.05, low - 0.02, sentence, ha="center", va="center", size=10, style="italic", linespacing=1.35)
    arrow(axis, (1.9, low), (2.2, low))
    box(axis, 2.92, low, 1.36, 0.95, "words", "n × 300", TEXT)
    arrow(axis, (3.63, low), (3.93, low))
    box(axis, 4.75, low, 1.56, 0.95, "bi-GRU", "both directions\naveraged", TEXT)
    arrow(axis, (5.56, low), (5.86, low))
    box(axis, 6.6, low, 1.4, 0.95, "word\nembeddings", "n × 1024", TEXT)

    arrow(axis, (7.33, top), (8.1, cross + 0.52), "angle,angleA=0,angleB=90,rad=6")
    arrow(axis, (7.33, low), (8.1, cross - 0.52), "angle,angleA=0,angleB=90,rad=6")
    box(axis, 8.1, cross, 1.4, 0.95, "cross\nattention", "t2i or i2t", BOTH)
    arrow(axis, (8.83, cross), (9.13, cross))
    box(axis, 9.92, cross, 1.5, 0.95, "similarity", "of picture\nand sentence", BOTH)
    arrow(axis, (9.92, cross + 0.5), (9.92, top - 0.5))
    arrow(axis, (9.92, cross - 0.5), (9.92, low + 0.5))
    box(axis, 9.92, top, 1.5, 0.95, "hinge loss", "training", BOTH)
    box(axis, 9.92, low, 1.5, 0.95, "ranking", "recall@1, 5, 10", BOTH)
    return figure


def draw_position_attention():
    figure, axis = canvas(11, 6.3)
    grid = position_grid(np.array([DOG]), np.array([HEIGHT, WIDTH]))[0]
    cells, weights = grid[:15].astype(int), grid[15:30]
    draw_region(figure, axis, cells)
    draw_cells(figure, axis, cells, weights)
    draw_slots(figure, axis, cells, weights)
    draw_formulas(axis)
    return figure


def draw_region(figure, axis, cells):
    """Panel 1: the region on the grid."""
    heading(axis, 0.3, 6.0, "1", "a region on the 16×16 grid")
    picture = figure.add_axes((0.3 / 11, 3.0 / 6.3, 3.68 / 11, 2.76 / 6.3))
    draw_scene(picture)
    for line in range(1, CELLS):
        picture.axvline(line * CELL_X, color="white", lw=0.7, alpha=0.8)
        picture.axhline(line * CELL_Y, color="white", lw=0.7, alpha=0.8)
    for cell in cells:
        column, row = divmod(cell, CELLS)
        corner = (column * CELL_X, row * CELL_Y)
        picture.add_patch(Rectangle(corner, CELL_X, CELL_Y, fc=IMAGE[1] + "38", ec=IMAGE[1], lw=0.9))
    frame(picture, DOG, HIT, 2)


def draw_cells(figure, axis, cells, weights):
    """Panel 2: the listed cells, with their indices and weights."""
    heading(axis, 4.4, 6.0, "2", "the 15 cells it covers most")
    columns, rows = (np.array([DOG[0], DOG[2]]) / CELL_X, np.array([DOG[1], DOG[3]]) / CELL_Y)
    left, right, above, below = int(columns[0]), int(columns[1]) + 1, int(rows[0]), int(rows[1]) + 1
    zoom = figure.add_axes((4.4 / 11, 3.62 / 6.3, 3.5 / 11, 2.1 / 6.3))
    zoom.set(xlim=(left - 0.03, right + 0.03), ylim=(below + 0.03, above - 0.03))
    zoom.axis("off")
    listed = dict(zip(cells.tolist(), weights.tolist(), strict=True))
    for column in range(left, right):
        for row in range(above, below):
            cell = column * CELLS + row
            weight = listed.get(cell)
            fill = "#f1f3f5" if weight is None else SHADE(0.12 + 4 * weight)
            zoom.add_patch(Rectangle((column, row), 1, 1, fc=fill, ec="white", lw=2))
            middle = column + 0.5
            zoom.text(middle, row + 0.25, str(cell), ha="center", va="center", size=8.5, color=PALE)
            amount = "–" if weight is None else f"{weight:.3f}"
            zoom.text(middle, row + 0.71, amount, ha="center", va="center", size=10, weight="bold")
    frame(zoom, (columns[0], rows[0], columns[1], rows[1]), HIT, 2)
    note = "small: cell index = column · 16 + row\nbold: area weight $a_j$, the 15 sum to 1"
    axis.text(4.4, 3.25, note, va="center", size=9.5, color=PALE, linespacing=1.5)


def draw_slots(figure, axis, cells, weights):
    """Panel 3: cells and weights in the order in which they are stored."""
    heading(axis, 8.3, 6.0, "3", "as stored, largest first")
    bars = figure.add_axes((8.75 / 11, 3.0 / 6.3, 1.95 / 11, 2.76 / 6.3))
    bars.barh(np.arange(15), weights, color=[SHADE(0.12 + 4 * weight) for weight in weights], height=0.82)
    bars.set(ylim=(14.6, -0.6), xlim=(0, 1.35 * weights.max()))
    bars.axis("off")
    for slot, (cell, weight) in enumerate(zip(cells, weights, strict=True)):
        bars.text(-0.003, slot, cell, ha="right", va="center", size=8.5, color=PALE)
        bars.text(weight + 0.002, slot, f"{weight:.3f}", va="center", size=8.5)


def draw_formulas(axis):
    """Panel 4: from the region's feature and cells to its embedding."""
    heading(axis, 0.3, 2.5, "4", "position attention")
    high, low, middle = 1.75, 0.6, 1.175
    box(axis, 1.15, high, 1.7, 0.8, "$v$", "region feature, 2048")
    box(axis, 1.15, low, 1.7, 0.8, "$e_j$", "cell embeddings, 200")
    axis.text(2.75, high + 0.52, "PFAN-A: feature and area decide", size=9.5, weight="bold", color=HIT)
    arrow(axis, (2.05, high), (2.7, high))
    arrow(axis, (2.05, low + 0.15), (2.7, high - 0.2))
    attend = r"$\alpha = \mathrm{softmax}_j(\tanh(\mathrm{fc\_att}(v)\cdot e_j))$"
    box(axis, 4.02, high, 2.54, 0.8, attend, "which cells suit the feature?", BOTH)
    arrow(axis, (5.34, high), (5.59, high))
    box(axis, 6.5, high, 1.74, 0.8, r"$\beta = \mathrm{softmax}_j(a_j\,\alpha_j)$", "weighted by area", BOTH)
    arrow(axis, (7.42, high), (7.67, high))
    box(axis, 8.3, high, 1.18, 0.8, r"$p = \Sigma_j\,\beta_j\,e_j$", "position", BOTH)
    axis.text(2.75, low + 0.1, "PFAN-P: the area weights alone", size=9.5, weight="bold", color=HIT)
    arrow(axis, (2.05, low), (7.67, low))
    box(axis, 8.3, low, 1.18, 0.8, r"$p = \Sigma_j\,a_j\,e_j$", "position", BOTH)
    arrow(axis, (8.94, high), (9.25, middle + 0.15))
    arrow(axis, (8.94, low), (9.25, middle - 0.15))
    box(axis, 10.02, middle, 1.46, 0.8, r"$\mathrm{l2norm}(\mathrm{fc}([v;\,p]))$", "region embedding")


def heading(axis, x, y, number, text):
    axis.add_patch(Circle((x + 0.12, y), 0.13, fc=INK))
    axis.text(x + 0.12, y - 0.005, number, ha="center", va="center_baseline", size=10, weight="bold", color="white")
    axis.text(x + 0.35, y, text, va="center_baseline", size=11, weight="bold")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python scripts/demo/draw_workflow.py --out docs"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the two PNG files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("workflow", draw_workflow), ("position_attention", draw_position_attention)):
        path = out / f"{name}.png"
        draw().savefig(path, metadata={"Software": None})
        print(path)


if __name__ == "__main__":
    run(main)
