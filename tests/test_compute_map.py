"""compute_map.py: the printed numbers against an independent count, the published output, and what a user is told."""

import json
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import processes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_server import compute_map

ROOT = Path(__file__).resolve().parents[1]
GOLDEN, REAL = ROOT.parent / "shared/golden/compute_map", ROOT.parent / "shared/real/tencent"
NAMES = ("dist_tag_t2i.json", "dist_sentence_t2i.json", "dist_tag_new_t2i.json")


def write_lines(path, objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))


def write_scores(path, items, t2i, i2t=None):
    """items: urls of each item; t2i and i2t: their scores (i2t: zeros where not given)."""
    i2t = i2t or [[0.0] * len(urls) for urls in items]
    write_lines(path, [{"urls": u, "dist_t2i": a, "dist_i2t": b} for u, a, b in zip(items, t2i, i2t, strict=True)])


def write_test_list(path, urls, flags):
    write_lines(
        path, [{"Img_urls": u, "Img_flags": f, "Tag": [], "Content": []} for u, f in zip(urls, flags, strict=True)]
    )


def run(folder, *args):
    return processes.run([sys.executable, ROOT / "test_server/compute_map.py", *map(str, args)], cwd=folder)


@pytest.mark.skipif(not (GOLDEN.is_dir() and REAL.is_dir()), reason="../shared with the published scores is absent")
def test_prints_the_published_lines_to_the_last_digit():
    done = run(REAL, "--test_list", GOLDEN / "test_list.json")
    assert done.stdout == (GOLDEN / "compute_map_expected.txt").read_text()
    assert done.stderr == "" and done.returncode == 0


def test_runs_inside_test_server_with_the_default_files(tmp_path):
    (tmp_path / "test_server").mkdir()
    (tmp_path / "data/tencent_data_meta").mkdir(parents=True)
    for name in ("compute_map.py", "_root.py"):
        shutil.copy(ROOT / "test_server" / name, tmp_path / "test_server")
    shutil.copytree(ROOT / "lib", tmp_path / "lib")
    write_test_list(tmp_path / "data/tencent_data_meta/test_list.json", [["a", "b"]], [[1, 0]])
    for name, scores in zip(NAMES, ([0.0, 1.0], [0.0, 0.4], [1.0, 0.0]), strict=True):
        write_scores(tmp_path / "test_server" / name, [["a", "b"]], [scores])
    done = processes.run([sys.executable, "compute_map.py"], cwd=tmp_path / "test_server")
    assert done.stderr == ""
    # a: 1.5 / 3.5, b: 1.4 / 3.5 – without the weight 1.5 the wrong picture would lead
    assert done.stdout.splitlines()[:3] == ["Len 1 1", f"MAP@1: {1 / 1.0000001} 1", f"Acc@1: {1 / 1.0000001} 1"]
    assert len(done.stdout.splitlines()) == 1 + 6 + 20 + 20


def expected(items, weights):
    """{line name: (exact value, denominator)} by counting; items: [(flag, [score or None per file])] per item."""
    ranked = []
    for item in items:
        mixed = []
        for flag, scores in item:
            held = [(w, Fraction(s)) for w, s in zip(weights, scores, strict=True) if s is not None]
            if held:
                mixed.append((sum(Fraction(w) * s for w, s in held) / sum(Fraction(w) for w, _ in held), flag))
        ranked.append(mixed)
    result = {}
    for k in (1, 2, 3):
        precisions, right = [], 0
        for mixed in ranked:
            if sum(flag for _, flag in mixed) < k:
                continue
            # rank of a right picture: one more than those above it, a wrong one with the same score among them;
            # equal right ones share out the places that follow
            ranks, taken = [], set()
            for score, flag in mixed:
                if flag:
                    rank = 1 + sum(s > score or (s == score and not f) for s, f in mixed)
                    while rank in taken:
                        rank += 1
                    taken.add(rank)
                    ranks.append(rank)
            hits = [sum(rank <= i for rank in ranks) for i in range(1, k + 1)]
            precisions.append(sum(Fraction(h, i) for i, h in enumerate(hits, 1)) / k)
            right += hits[-1]
        result[f"MAP@{k}"] = sum(precisions), len(precisions)
        result[f"Acc@{k}"] = right, k * len(precisions)
    pictures = [picture for mixed in ranked for picture in mixed]
    threshold = 1.0
    for _ in range(20):
        above = [flag for score, flag in pictures if score >= threshold]
        below = [flag for score, flag in pictures if score < threshold]
        result[f"Acc@{threshold}"] = above.count(1), len(above)
        result[f"Error rate@{threshold}"] = below.count(0), len(below)
        threshold -= 0.05
    return result


# eighths and weights that add up to powers of two: sums are exact, ties are many, no threshold is hit by rounding
score = st.none() | st.integers(-4, 12).map(lambda n: n / 8)
weighted_items = st.sampled_from([(1.0,), (1.0, 1.0), (1.0, 3.0), (1.0, 1.0, 2.0)]).flatmap(
    lambda weights: st.tuples(
        st.just(weights),
        st.lists(st.lists(st.tuples(st.integers(0, 1), st.tuples(*[score] * len(weights))), max_size=7), max_size=6),
    )
)


def complete(item):
    """A picture that only some files hold may be divided by three: keep it in one file or in all."""
    return [(flag, s if None not in s else (s[0], *[None] * (len(s) - 1))) for flag, s in item]


@settings(max_examples=150, deadline=None)
@given(weighted_items)
def test_numbers_are_those_of_an_independent_count(case):
    weights, items = case
    items = [complete(item) for item in items]
    mixed = []
    for item in items:
        files = [{f"u{i}": s[f] for i, (_, s) in enumerate(item) if s[f] is not None} for f in range(len(weights))]
        mixed.append(compute_map.mix([(f"u{i}", flag) for i, (flag, _) in enumerate(item)], files, weights))
    lines = dict(line.split(": ") for line in compute_map.report(mixed))
    want = expected(items, weights)
    assert lines.keys() == want.keys()
    for name, (total, count) in want.items():
        value, denominator = lines[name].split(" ")
        assert int(denominator) == count
        assert float(value) == pytest.approx(float(total / count) if count else 0.0, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(0, 1)), min_size=1, max_size=8), st.randoms())
def test_the_order_of_an_items_pictures_does_not_matter(pictures, random):
    item = [(f"u{i}", flag) for i, (_, flag) in enumerate(pictures)]
    files = [{f"u{i}": score for i, (score, _) in enumerate(pictures)}]
    shuffled = random.sample(item, len(item))
    report = [compute_map.report([compute_map.mix(order, files, [1.0])]) for order in (item, shuffled)]
    assert report[0] == report[1]


def test_empty_single_picture_and_all_wrong_items_print_zeros_or_are_left_out(tmp_path):
    urls = [[], ["a"], ["b", "c"], ["d", "e"]]
    write_test_list(tmp_path / "list.json", urls, [[], [1], [0, 0], [1, 1]])
    write_scores(tmp_path / "s_t2i.json", [[], ["a"], ["b", "c"], []], [[], [0.9], [0.2, 0.3], []])
    done = run(tmp_path, "s_t2i.json", "--test_list", "list.json")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0] == "Len 4 4"
    assert lines[1] == f"MAP@1: {1 / 1.0000001} 1"  # only the item with the one right picture counts
    assert lines[3:7] == ["MAP@2: 0.0 0", "Acc@2: 0.0 0", "MAP@3: 0.0 0", "Acc@3: 0.0 0"]
    assert lines[7] == "Acc@1.0: 0.0 0"
    assert done.stderr.strip() == "2 of 5 pictures are in no score file and were left out"


def test_an_empty_test_list_prints_zeros(tmp_path):
    (tmp_path / "list.json").write_text("")
    (tmp_path / "s.json").write_text("")
    done = run(tmp_path, "s.json", "--test_list", "list.json")
    assert done.returncode == 0 and done.stdout.startswith("Len 0 0\nMAP@1: 0.0 0\n")


@pytest.mark.parametrize(
    "name, values", [("s_t2i.json", [0.5, 0.75]), ("s_i2t.json", [1.0, 0.25]), ("s.json", [0.75, 0.5])]
)
def test_the_file_name_says_which_direction_counts(tmp_path, name, values):
    write_scores(tmp_path / name, [["a", "b"]], [[0.5, 0.75]], [[1.0, 0.25]])
    assert compute_map.read_scores(str(tmp_path / name)) == [{"a": values[0], "b": values[1]}]


def test_a_url_that_some_files_lack_is_weighted_over_the_others():
    ranked = compute_map.mix([("a", 1), ("b", 0), ("c", 1)], [{"a": 1.0}, {"a": 0.0, "b": 0.5}], [1.0, 3.0])
    assert ranked == [(0.5, 0), (0.25, 1)]


def test_the_weight_of_a_file_follows_its_name_unless_given(tmp_path):
    write_test_list(tmp_path / "list.json", [["a", "b"]], [[1, 0]])
    write_scores(tmp_path / "dist_tag_new_t2i.json", [["a", "b"]], [[0.5, 0.0]])
    write_scores(tmp_path / "other_t2i.json", [["a", "b"]], [[0.0, 0.6]])
    command = ("other_t2i.json", "dist_tag_new_t2i.json", "--test_list", "list.json")
    assert "MAP@1: 0.99" in run(tmp_path, *command).stdout  # 0.3 against 0.24
    assert "MAP@1: 0.0 1" in run(tmp_path, *command, "--weights", 1, 1).stdout  # 0.25 against 0.3


@pytest.mark.parametrize(
    "name, line, told",
    [
        ("list.json", '{"Img_urls": ["a"], "Img_flags": [1, 0]}', 'list.json:2: expected {"Img_urls"'),
        ("list.json", '{"Img_urls": ["a"], "Img_flags": [2]}', "[0 or 1, ...]"),
        ("list.json", '{"Img_urls": ["a"]', "list.json:2: expected"),
        ("s_t2i.json", "", "s_t2i.json:2: expected"),
        ("s_t2i.json", '{"urls": ["a"], "dist_t2i": [NaN], "dist_i2t": [1]}', "all finite"),
        ("s_t2i.json", '{"urls": ["a"], "dist_i2t": [1]}', '"dist_t2i": [number, ...]'),
        ("s_t2i.json", '{"urls": ["a", "b"], "dist_t2i": [1]}', "equally many of each"),
        ("s_t2i.json", "[]", "s_t2i.json:2: expected"),
    ],
)
def test_a_malformed_line_is_named_with_what_was_expected(tmp_path, name, line, told):
    write_test_list(tmp_path / "list.json", [["a"], ["b"]], [[1], [1]])
    write_scores(tmp_path / "s_t2i.json", [["a"], ["b"]], [[1.0], [1.0]])
    first = (tmp_path / name).read_text().splitlines()[0]
    (tmp_path / name).write_text(f"{first}\n{line}\n")
    done = run(tmp_path, "s_t2i.json", "--test_list", "list.json")
    assert done.returncode == 2 and done.stdout == ""
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_file_for_another_test_list_or_without_weight_is_refused(tmp_path):
    write_test_list(tmp_path / "list.json", [["a"], ["b"]], [[1], [1]])
    write_scores(tmp_path / "s.json", [["a"]], [[1.0]])
    done = run(tmp_path, "s.json", "--test_list", "list.json")
    assert (done.returncode, done.stderr) == (2, "error: s.json: 1 lines, expected 2, as in list.json\n")
    write_scores(tmp_path / "shifted.json", [["b"], ["c"]], [[1.0], [1.0]])
    done = run(tmp_path, "shifted.json", "--test_list", "list.json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: shifted.json:1: scores b, which is not in line 1 of list.json\n"
    done = run(tmp_path, "s.json", "--weights", 1, 2, "--test_list", "list.json")
    assert done.returncode == 2 and "2 weights for 1 files" in done.stderr
    assert run(tmp_path, "s.json", "--weights", 0).returncode == 2
    done = run(tmp_path, "absent.json", "--test_list", "list.json")
    assert (done.returncode, done.stderr) == (2, "error: absent.json: No such file or directory\n")
