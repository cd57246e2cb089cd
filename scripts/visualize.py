"""Figures of what models find and learn, as PNG files.

python scripts/visualize.py search    --model_path M --sentence "a red ring" --out found.png
python scripts/visualize.py positions --model_path M --out positions.png
python scripts/visualize.py curves    runs/demo/attention_seed0 runs/demo/none_seed0 --out curves.png
python scripts/visualize.py ablation  --model_path A B C --split test --out ablation.png
"""

import argparse
import glob
import os
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.patches import Rectangle
from matplotlib.text import Text

if not __package__:
    import _root  # noqa: F401

from evaluation import evalrank, load_split
from lib.checkpoint import load_checkpoint
from lib.constants import N_CELLS
from lib.errors import InputError, run
from lib.events import METRICS
from lib.files import check_output, read_lines, replace
from lib.options import add_options
from scripts.explorer.images import SIDE, SplitImages
from scripts.explorer.logs import read_events, read_metrics
from scripts.explorer.names import name_models
from scripts.features.images import read_image
from scripts.search.collection import Collection, check_query

HEAT, FRAME = "#ff7a00", "#e7eaee"
CURVES = {
    "Le": "loss of a batch, running mean",
    "rsum": "rsum on dev",
    "r1": "R@1 on dev, image to text",
    "r1i": "R@1 on dev, text to image",
}
SMOOTH = 20  # steps of the running mean
MAX_RESULTS, MAX_WORDS_SHOWN = 10, 8
FONT, PLACEHOLDERS = "DejaVu Sans", "Last Resort High-Efficiency"  # the second has a box for every character
plt.rcParams.update({"font.family": FONT, "font.size": 9, "text.parse_math": False})

# ---------------------------------------------------------------- a sentence's images


def draw_search(opt):
    """The best images for a sentence, a row each: the image, then what each of its words attends to."""
    model, loader = load_split(
        opt.model_path, opt.data_path, opt.vocab_path, opt.split, captions_optional=True, device=opt.device
    )
    split, vocab = SplitImages(loader.dataset, opt.images), loader.dataset.vocab
    check_query(vocab, opt.sentence, "--sentence")
    collection = Collection.encode(model, loader)
    found, scores = collection.search(opt.sentence, opt.top)
    words, tokens = collection.embed(opt.sentence), vocab.tokenize(opt.sentence)
    # the longest words, in their order: small ones say little
    shown = sorted(sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))[:MAX_WORDS_SHOWN])
    size = 1.75 * (1 + len(shown)), 0.5 + 1.4 * len(found)
    figure, axes = plt.subplots(len(found), 1 + len(shown), figsize=size, squeeze=False, layout="constrained")
    for row, (image, score) in enumerate(zip(found, scores, strict=True)):
        draw_image(axes[row, 0], split, image)
        name = split.ids[image]
        axes[row, 0].set_ylabel(f"{row + 1}. {score:.3f}\n{name}", fontsize=9 if len(name) < 16 else 5.5)
        t2i = collection.attention(collection.image(image), words)[0]
        if not np.isfinite(t2i).all():
            what = f"image {image} of {split.prefix}_ims.npy gives NaN or infinite numbers"
            raise InputError(f"{opt.model_path}: {what}, expected smaller features or weights")
        for axis, word in zip(axes[row, 1:], shown, strict=True):
            draw_image(axis, split, image, t2i[word + 1])  # word 0 is <start>
    for axis, word in zip(axes[0, 1:], shown, strict=True):
        axis.set_title(tokens[word] + " (unknown)" * (tokens[word] not in vocab.word2idx), fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(f"“{opt.sentence}”", 110)), fontsize=11)
    return figure


def draw_image(axis, split, number, weights=None):
    """An image (the 16×16 cells where it has no file) with its regions, lit by weights (R,) where given."""
    width, height = split.size(number)
    axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal", facecolor=FRAME)
    path = split.files.get(split.ids[number])
    if path is None:
        lines = np.arange(1, SIDE) / SIDE
        axis.vlines(width * lines, 0, height, color="white", lw=0.4)
        axis.hlines(height * lines, 0, width, color="white", lw=0.4)
    else:
        try:
            pixels, _ = read_image(path, 480, 800)
        except Exception:  # Pillow's readers raise whatever a broken file leads them to
            raise InputError(f"{path}: not an image that can be read") from None
        axis.imshow(pixels, extent=(0, width, height, 0), alpha=1 if weights is None else 0.6)
    boxes = split.boxes(number)
    if boxes is None or (weights is None and path is not None):
        return
    shares = np.zeros(len(boxes)) if weights is None else weights / weights.max()
    for region in np.argsort(shares):
        x1, y1, x2, y2 = boxes[region] * np.tile([width, height], 2)
        style = {"ec": "#66717d", "lw": 0.6, "alpha": 0.7}
        if weights is not None:
            style = {"ec": HEAT, "lw": 0.3 + 2 * shares[region], "alpha": float(shares[region])}
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


# ---------------------------------------------------------------- what position attention learned


def draw_positions(opt):
    """For each cell of the 16×16 grid, how like its part in a region's embedding is to every cell's, as a small map.

    A cell's part is what fc makes of its embedding, less the mean over the cells: the embeddings themselves stay close
    to their random start, what is learned shows in what reaches the scores.
    """
    state = load_checkpoint(opt.model_path)["model"][0]
    table, fc = state.get("position_embedding.weight"), state.get("fc.weight", state.get("fc.weight_v"))
    if table is None or fc is None or len(table) != N_CELLS + 1:
        raise InputError(f"{opt.model_path}: holds no position embedding, expected --position attention or area")
    parts = table[:N_CELLS].float() @ fc[:, -table.shape[1] :].float().T
    parts = parts - parts.mean(0)
    parts = parts / parts.norm(dim=1, keepdim=True)
    cosines = (parts @ parts.T).numpy()
    limit = float(np.percentile(np.abs(cosines[~np.eye(N_CELLS, dtype=bool)]), 99.5))
    mosaic = np.full((SIDE, SIDE + 2, SIDE, SIDE + 2), np.nan)  # row, row in the map, column, column in the map
    # a cell's index is column·16 + row
    mosaic[:, 1:-1, :, 1:-1] = cosines.reshape(SIDE, SIDE, SIDE, SIDE).transpose(1, 3, 0, 2)
    figure, axis = plt.subplots(figsize=(8.6, 8), layout="constrained")
    shown = axis.imshow(mosaic.reshape(SIDE * (SIDE + 2), -1), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.axis("off")
    figure.colorbar(shown, shrink=0.6, label="cosine")
    figure.suptitle("What position adds to a region: each small map compares its cell with all cells")
    return figure


# ---------------------------------------------------------------- learning curves, ablation


def read_runs(folder):
    """{label: {name: {step: value}}} of the runs in a folder's metrics.csv, or in older versions' TensorBoard files."""
    table = os.path.join(folder, METRICS)
    events = sorted(glob.glob(os.path.join(glob.escape(folder), "*tfevents*")))
    if not events and not os.path.isfile(table):
        raise InputError(f"{folder}: no {METRICS} and no TensorBoard files (names with tfevents) in it")
    runs = read_metrics(table) if os.path.isfile(table) else list(map(read_events, events))
    logged = sorted({name for scalars in runs for name in scalars})
    if not CURVES.keys() & {*logged}:
        found = ", ".join(logged[:5]) or "nothing"
        raise InputError(f"{folder}: logs {found}, expected {', '.join(CURVES)} of train.py")
    return {folder + f", run {number}" * (len(runs) > 1): scalars for number, scalars in enumerate(runs, 1)}


def draw_curves(opt):
    """Loss, rsum and R@1 of one or more runs against the training step."""
    runs = {label: scalars for folder in opt.runs for label, scalars in read_runs(folder).items()}
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for axis, (curve, title) in zip(axes.flat, CURVES.items(), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        for label, scalars in runs.items():
            if curve in scalars:
                steps, values = np.array(sorted(scalars[curve].items()), dtype=float).T
                n = min(SMOOTH, len(values)) if curve == "Le" else 1
                means = np.convolve(values, np.full(n, 1 / n), "valid")
                axis.plot(steps[n - 1 :], means, "-" if curve == "Le" else "o-", label=label)
        if axis.lines:
            axis.legend(axis.lines, [line.get_label() for line in axis.lines], fontsize=8)  # those with _ as well
    return figure


def draw_ablation(opt):
    """Recalls of several models as bars with 95 % bootstrap intervals."""
    options = [load_checkpoint(path)["opt"] for path in opt.model_path]
    folders = [os.path.join(opt.data_path or one.data_path, one.data_name) for one in options]
    captions = [read_lines(os.path.join(folder, f"{opt.split}_caps.txt")) for folder in folders]
    for path, folder, found in zip(opt.model_path, folders, captions, strict=True):
        if found != captions[0]:
            where = f"the {opt.split} split of {folder}"
            raise InputError(f"{path}: ranks {where}, other captions than {opt.model_path[0]}")
    names = name_models(opt.model_path, options)
    figure, axis = plt.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(names)
    for i, (name, path) in enumerate(zip(names, opt.model_path, strict=True)):
        print(f"{name}: {path}")
        result = evalrank(path, opt.data_path, opt.split, vocab_path=opt.vocab_path, intervals=True, device=opt.device)
        measures = [(key, row) for key, row in result["intervals"].items() if key != "rsum"]
        mean, low, high = np.array([row for _, row in measures]).T
        places = np.arange(len(measures)) + (i - (len(names) - 1) / 2) * width
        errors = np.maximum([mean - low, high - mean], 0)
        bars = axis.bar(places, mean, 0.92 * width, yerr=errors, capsize=3, label=f"{name}, rsum {result['rsum']:.1f}")
        axis.bar_label(bars, fmt="%.1f", fontsize=min(7, 28 / len(names)), label_type="center", color="white")
    axis.set_xticks(range(len(measures)), [key for key, _ in measures])
    axis.set(ylabel="recall in percent", ylim=(0, 108))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(3, len(names)), frameon=False)
    size = f"{result['n_images']} images, {result['n_captions']} captions"
    axis.set_title(f"{opt.split}: {size}; whiskers: 95 % intervals, bootstrap over images", fontsize=10)
    return figure


# ---------------------------------------------------------------- command line


def get_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="FIGURE")

    def command(draw, help_text):
        sub = commands.add_parser(draw.__name__.removeprefix("draw_"), help=help_text, description=draw.__doc__)
        sub.set_defaults(draw=draw)
        sub.add_argument("--out", required=True, metavar="FILE", help="the PNG to write")
        sub.add_argument("--dpi", type=int, default=110, help="pixels an inch (default: %(default)s)")
        return sub

    search = command(draw_search, "a sentence's best images, and what its words attend to in them")
    search.add_argument("--sentence", required=True)
    search.add_argument("--images", metavar="DIR", help="image files (default: SPLIT_images beside the data, if there)")
    top = f"images shown, 1 to {MAX_RESULTS} (default: %(default)s)"
    search.add_argument("--top", type=int, default=4, choices=range(1, MAX_RESULTS + 1), metavar="N", help=top)
    positions = command(draw_positions, "what position attention learned: how alike the cells are to the model")
    for sub in (search, positions):
        sub.add_argument("--model_path", required=True, help="checkpoint")
    command(draw_curves, "learning curves").add_argument("runs", nargs="+", help="train.py's --logger_name folders")
    ablation = command(draw_ablation, "recalls of several models with 95 %% intervals")
    ablation.add_argument("--model_path", required=True, nargs="+", help="checkpoints")
    for sub in (search, ablation):
        sub.add_argument("--split", default="test", help="dev, test, … (default: %(default)s)")
        add_options(sub, ("data_path", "vocab_path", "device"), data_path=None, vocab_path=None)
    return parser


def show_as_typed(texts):
    """Have every character drawn that an installed font has; of half an emoji, which is no character, the escape."""
    for text in texts:
        text.set_text(text.get_text().encode("utf-8", "backslashreplace").decode())
    missing, families = {ord(character) for text in texts for character in text.get_text()} - {ord("\n")}, []
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name != FONT):
        if missing and font.name != PLACEHOLDERS:
            there = missing & {*font_manager.get_font(font.fname).get_charmap()}
            families += [font.name] * bool(there)
            missing -= there
    for text in texts:
        text.set_family(families or FONT)


def main():
    parser = get_parser()
    opt = parser.parse_args()
    if not 20 <= opt.dpi <= 1000:
        parser.error("expected --dpi 20 to 1000")
    check_output(opt.out)
    figure = opt.draw(opt)
    show_as_typed(figure.findobj(Text))
    replace(opt.out, lambda file: figure.savefig(file, format="png", dpi=opt.dpi))
    print(opt.out)


if __name__ == "__main__":
    run(main)
