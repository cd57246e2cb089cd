"""Mean average precision of scored test lists: mixes score files, ranks each item's images, prints MAP@1-3 and A@1-3.

`python test.py` writes the score files, one line per line of the test list. An image counts as correct where the test
list flags it 1.
"""

import argparse
import math
import os
import sys

if not __package__:
    import _root  # noqa: F401

from lib import errors
from lib.datasets.news import read_flags, read_json_lines

WEIGHTS = {"dist_tag_t2i.json": 1.0, "dist_sentence_t2i.json": 1.0, "dist_tag_new_t2i.json": 1.5}  # as published
EPS = 1e-7  # added to every count that is divided by, so that no item at all gives 0.0; part of the published digits

# ---------------------------------------------------------------- files


def read_scores(dist_file):
    """[{url: score}] of a score file, a dict a line. Raises InputError for a line of another form.

    The score is dist_t2i in a file named *_t2i.json, dist_i2t in *_i2t.json, the mean of both in any other.
    """
    ways = [way for way in ("t2i", "i2t") if dist_file.endswith(f"_{way}.json")] or ["t2i", "i2t"]

    def parse(line):
        columns = [[float(score) for score in line[f"dist_{way}"]] for way in ways]
        scores = {url: sum(row) / len(row) for url, *row in zip(line["urls"], *columns, strict=True)}
        if not all(map(math.isfinite, scores.values())):
            raise ValueError
        return scores

    lists = "".join(f', "dist_{way}": [number, ...]' for way in ways)
    return read_json_lines(dist_file, f'{{"urls": [url, ...]{lists}}}, equally many of each, all finite', parse)


def load_dist_from_file(dist_file):
    """{"URL@LINE": score} of a score file, whose lines count from 1; see read_scores."""
    lines = enumerate(read_scores(dist_file), 1)
    return {f"{url}@{number}": score for number, line in lines for url, score in line.items()}


def load_data_from_PFAN(dist_paths, weights, flag_path):
    """Urls, scores and flags, each a list per item, of the images that at least one score file holds.

    An image's score is the weighted mean over the files that hold it. flag_path: the test list. How many images are in
    no file is said on stderr. Raises InputError for a malformed file, or a score file of another test list.
    """
    items = read_flags(flag_path)
    files = [read_scores(path) for path in dist_paths]
    for path, lines in zip(dist_paths, files, strict=True):
        if len(lines) != len(items):
            raise errors.InputError(f"{path}: {len(lines)} lines, expected {len(items)}, as in {flag_path}")
        for number, (line, item) in enumerate(zip(lines, items, strict=True), 1):
            foreign = line.keys() - dict(item).keys()
            if foreign:
                found = f"{path}:{number}: scores {min(foreign)[:60]}"
                raise errors.InputError(f"{found}, which is not in line {number} of {flag_path}")
    url_list, dist_list, flag_list = [], [], []
    for item, *lines in zip(items, *files, strict=True):
        scored = []
        for url, flag in item:
            total = held = 0.0
            for weight, line in zip(weights, lines, strict=True):
                if url in line:
                    total, held = total + weight * line[url], held + weight
            if held:
                scored.append((url, total / held, flag))
        url_list.append([url for url, _, _ in scored])
        dist_list.append([dist for _, dist, _ in scored])
        flag_list.append([flag for _, _, flag in scored])
    total, scored = sum(map(len, items)), sum(map(len, url_list))
    if scored < total:
        print(f"{total - scored} of {total} images are in no score file and are left out", file=sys.stderr)
    return url_list, dist_list, flag_list


# ---------------------------------------------------------------- one item


def ranked_flags(dist_list, flag_list):
    """The flags by score, best first. A tie counts against the model: the incorrect image goes first."""
    images = sorted(zip(dist_list, flag_list, strict=True), key=lambda image: (-image[0], image[1]))
    return [flag for _, flag in images]


def get_right_count(flag_list):
    """How many images are correct."""
    return sum(flag_list)


def compute_map(dist_list, flag_list, line_num, Top=3):
    """AP@Top, (1/Top) * sum over ranks i <= Top of hits(i)/i, and line_num where the best image is correct, else -1.

    hits(i) is how many of the first i images are correct; of fewer images than Top, all count.
    """
    flags = ranked_flags(dist_list, flag_list)[:Top]
    hits, precisions = 0, 0.0
    for rank, flag in enumerate(flags, 1):
        hits += flag
        precisions += hits / rank
    return precisions / max(1, len(flags)), line_num if flags[:1] == [1] else -1


def compute_correct_num(dist_list, flag_list, Top=3):
    """How many of the best Top images are correct, and how many of these there are."""
    flags = ranked_flags(dist_list, flag_list)[:Top]
    return sum(flags), len(flags)


def compute_correct_score(dist_list, flag_list, score=0.65):
    """How many of the images scored `score` or more are correct, and how many of these there are."""
    flags = [flag for dist, flag in zip(dist_list, flag_list, strict=True) if dist >= score]
    return sum(flags), len(flags)


def compute_incorrect_score(dist_list, flag_list, score=0.65):
    """How many of the images scored below `score` are incorrect, and how many of these there are."""
    flags = [flag for dist, flag in zip(dist_list, flag_list, strict=True) if dist < score]
    return len(flags) - sum(flags), len(flags)


# ---------------------------------------------------------------- all items


def report(dist_list, flag_list):
    """The lines to print about items, given as load_data_from_PFAN does. Each ends with its denominator.

    MAP@k, Acc@k: over the items with at least k correct images, mean AP@k and the share of correct ones in the top k.
    Acc@t: the share of correct ones among all images scored t or more; Error rate@t: of incorrect ones below t.
    """
    lines, items = [], list(zip(dist_list, flag_list, strict=True))

    def add(name, value, count):
        lines.append(f"{name}: {value / (count + EPS)} {count}")

    def add_counts(name, pairs):
        counts, totals = zip((0, 0), *pairs, strict=True)
        add(name, sum(counts), sum(totals))

    for k in (1, 2, 3):
        counted = [(dists, flags) for dists, flags in items if get_right_count(flags) >= k]
        precisions = 0.0  # added one by one: sum() compensates from Python 3.12 on, which changes the last digit
        for number, item in enumerate(counted, 1):
            precisions += compute_map(*item, number, k)[0]
        add(f"MAP@{k}", precisions, len(counted))
        add_counts(f"Acc@{k}", [compute_correct_num(*item, k) for item in counted])

    thresholds = [1.0]
    while thresholds[-1] - 0.05 > 0:  # 0.05 is taken off again and again, as the printed digits show
        thresholds.append(thresholds[-1] - 0.05)
    for name, count in ("Acc", compute_correct_score), ("Error rate", compute_incorrect_score):
        for threshold in thresholds:
            add_counts(f"{name}@{threshold}", [count(*item, threshold) for item in items])
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python compute_map.py dist_tag_t2i.json dist_sentence_t2i.json --weights 1 2",
    )
    add, beside = parser.add_argument, f"(default: {' '.join(WEIGHTS)})"
    mixed = f"score files: *_t2i.json gives dist_t2i, *_i2t.json dist_i2t, any other the mean of both {beside}"
    add("files", nargs="*", default=list(WEIGHTS), metavar="FILE", help=mixed)
    one_each = "one per file (default: 1.5 for dist_tag_new_t2i.json, 1 for any other)"
    add("--weights", nargs="+", type=float, metavar="W", help=one_each)
    lines = "one item a line, with Img_urls and Img_flags (default: %(default)s)"
    add("--test_list", default="../data/tencent_data_meta/test_list.json", help=lines)
    args = parser.parse_args()
    weights = args.weights or [WEIGHTS.get(os.path.basename(path), 1.0) for path in args.files]
    if len(weights) != len(args.files) or not all(0 < weight < math.inf for weight in weights):
        parser.error(f"--weights {weights}: expected {len(args.files)} above 0, one for each file")
    _, dists, flags = load_data_from_PFAN(args.files, weights, args.test_list)
    print("Len", len(dists), len(flags))
    print(*report(dists, flags), sep="\n")


if __name__ == "__main__":
    errors.run(main)
