"""Mean average precision of scored test lists: mixes score files, ranks each item's pictures, prints MAP@1-3 and A@1-3.

`python test.py` writes the score files, one line per line of the test list.
"""

import argparse
import functools
import math
import operator
import os
import sys

if not __package__:
    import _root  # noqa: F401

from lib import errors
from lib.datasets.news import read_flags, read_json_lines

WEIGHTS = {"dist_tag_t2i.json": 1.0, "dist_sentence_t2i.json": 1.0, "dist_tag_new_t2i.json": 1.5}  # as published
EPS = 1e-7  # added to every count that is divided by, so that no item at all gives 0.0; part of the published digits


def total(numbers):
    """Their plain sum, left to right: sum() compensates from Python 3.12 on, which changes the last printed digit."""
    return functools.reduce(operator.add, numbers, 0)


def read_scores(path):
    """A list of {url: score}, one per item.

    The score is dist_t2i in a file named *_t2i.json, dist_i2t in *_i2t.json, the mean of both in any other.
    """
    keys = [key for key in ("dist_t2i", "dist_i2t") if path.endswith(f"_{key[-3:]}.json")] or ["dist_t2i", "dist_i2t"]

    def parse(line):
        columns = [[float(score) for score in line[key]] for key in keys]
        scores = {url: sum(row) / len(row) for url, *row in zip(line["urls"], *columns, strict=True)}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError
        return scores

    lists = "".join(f', "{key}": [number, ...]' for key in keys)
    return read_json_lines(path, f'{{"urls": [url, ...]{lists}}}, equally many of each, all finite', parse)


def check_urls(path, scores, items, test_list):
    """InputError where most of a score file's pictures are not in the same lines of the test list."""
    foreign = [
        (number, url)
        for number, (line, item) in enumerate(zip(scores, items, strict=True), 1)
        for url in line.keys() - dict(item).keys()
    ]
    if 2 * len(foreign) > sum(map(len, scores)):
        number, url = foreign[0]
        raise errors.InputError(f"{path}:{number}: scores {url[:60]}, which is not in line {number} of {test_list}")


def mix(item, scores, weights):
    """One item's pictures as [(score, flag)], best first: the weighted mean over the files that hold the url.

    scores is one {url: score} per file. A picture that no file holds is left out.
    A tie counts against the model: the wrong picture goes first.
    """
    ranked = []
    for url, flag in item:
        held = [(weight, file[url]) for weight, file in zip(weights, scores, strict=True) if url in file]
        if held:
            ranked.append((total(w * score for w, score in held) / total(w for w, _ in held), flag))
    return sorted(ranked, key=lambda picture: (-picture[0], picture[1]))


def average_precision(flags, k):
    """(1/k) * sum over ranks i <= k of hits(i)/i, where hits(i) is how many of the first i flags are 1."""
    return total(sum(flags[:i]) / i for i in range(1, k + 1)) / k


def report(items):
    """The lines to print about items, each a list of (score, flag), best first. Each ends with its denominator.

    MAP@k, Acc@k: over the items with at least k right pictures, mean AP@k and the share of right ones in the top k.
    Acc@t: the share of right ones among all pictures scored t or more; Error rate@t: of wrong ones among the rest.
    """
    lines = []

    def add(name, value, count):
        lines.append(f"{name}: {value / (count + EPS)} {count}")

    ranked = [[flag for _, flag in item] for item in items]
    for k in (1, 2, 3):
        counted = [flags for flags in ranked if sum(flags) >= k]
        add(f"MAP@{k}", total(average_precision(flags, k) for flags in counted), len(counted))
        add(f"Acc@{k}", sum(sum(flags[:k]) for flags in counted), k * len(counted))

    thresholds = [1.0]
    while thresholds[-1] - 0.05 > 0:  # 0.05 is taken off again and again, as the printed digits show
        thresholds.append(thresholds[-1] - 0.05)
    pictures = [picture for item in items for picture in item]
    for threshold in thresholds:
        above = [flag for score, flag in pictures if score >= threshold]
        add(f"Acc@{threshold}", sum(above), len(above))
    for threshold in thresholds:
        below = [flag for score, flag in pictures if score < threshold]
        add(f"Error rate@{threshold}", len(below) - sum(below), len(below))
    return lines


def positive(text):
    """A finite number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python compute_map.py dist_tag_t2i.json dist_sentence_t2i.json --weights 1 2",
    )
    parser.add_argument(
        "files",
        nargs="*",
        default=list(WEIGHTS),
        metavar="FILE",
        help="score files: *_t2i.json gives dist_t2i, *_i2t.json dist_i2t, any other the mean "
        f"of both (default: {' '.join(WEIGHTS)})",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=positive,
        metavar="W",
        help="one per file (default: 1.5 for dist_tag_new_t2i.json, 1 for any other)",
    )
    parser.add_argument(
        "--test_list",
        default="../data/tencent_data_meta/test_list.json",
        help="one item a line, with Img_urls and Img_flags (default: %(default)s)",
    )
    args = parser.parse_args()
    weights = args.weights or [WEIGHTS.get(os.path.basename(path), 1.0) for path in args.files]
    if len(weights) != len(args.files):
        parser.error(f"{len(weights)} weights for {len(args.files)} files")

    items = read_flags(args.test_list)
    files = [read_scores(path) for path in args.files]
    for path, file in zip(args.files, files, strict=True):
        if len(file) != len(items):
            raise errors.InputError(f"{path}: {len(file)} lines, expected {len(items)}, as in {args.test_list}")
        check_urls(path, file, items, args.test_list)
    mixed = [mix(item, [file[i] for file in files], weights) for i, item in enumerate(items)]
    print("Len", len(items), len(mixed))
    print(*report(mixed), sep="\n")
    unscored = sum(map(len, items)) - sum(map(len, mixed))
    if unscored:
        print(f"{unscored} of {sum(map(len, items))} pictures are in no score file and were left out", file=sys.stderr)


if __name__ == "__main__":
    errors.run(main)
