"""compute_map.py: the printed numbers against an independent count, the published output, and what a user is told."""

import contextlib
import json
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import processes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_server.compute_map import (
    compute_correct_num,
    compute_correct_score,
    compute_incorrect_score,
    compute_map,
    get_right_count,
    load_data_from_PFAN,
    load_dist_from_file,
    report,
)

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


def test_without_arguments_the_published_files_beside_it_are_mixed_with_their_weights(tmp_path):
    (tmp_path / "test_server").mkdir()
    (tmp_path / "data/tencent_data_meta").mkdir(parents=True)
    write_test_list(tmp_path / "data/tencent_data_meta/test_list.json", [["a", "b"]], [[1, 0]])
    for name, scores in zip(NAMES, ([0.0, 1.0], [0.0, 0.4], [1.0, 0.0]), strict=True):
        write_scores(tmp_path / "test_server" / name, [["a", "b"]], [scores])
    done = run(tmp_path / "test_server")
    assert done.stderr == ""
    # a: 1.5 / 3.5, b: 1.4 / 3.5 – without the weight 1.5 the incorrect image would lead
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
            # rank of a correct image: one more than those above it, an incorrect one with the same score among them;
            # equal correct ones share out the places that follow
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
    """An image that only some files hold may be divided by three: keep it in one file or in all."""
    return [(flag, s if None not in s else (s[0], *[None] * (len(s) - 1))) for flag, s in item]


@settings(max_examples=150)
@given(weighted_items)
def test_numbers_are_those_of_an_independent_count(case):
    weights, items = case[0], [complete(item) for item in case[1]]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(None):
        paths = [Path(folder, f"{n}_t2i.json") for n in range(len(weights))]
        for n, path in enumerate(paths):
            held = [[(f"u{i}", s[n]) for i, (_, s) in enumerate(item) if s[n] is not None] for item in items]
            write_scores(path, [[url for url, _ in item] for item in held], [[s for _, s in item] for item in held])
        urls = [[f"u{i}" for i in range(len(item))] for item in items]
        write_test_list(Path(folder, "list.json"), urls, [[flag for flag, _ in item] for item in items])
        _, dists, flags = load_data_from_PFAN(list(map(str, paths)), weights, Path(folder, "list.json"))
    lines = dict(line.split(": ") for line in report(dists, flags))
    want = expected(items, weights)
    assert lines.keys() == want.keys()
    for name, (total, count) in want.items():
        value, denominator = lines[name].split(" ")
        assert int(denominator) == count
        assert float(value) == pytest.approx(float(total / count) if count else 0.0, abs=1e-6)


def test_the_published_functions_keep_their_signatures_and_results():
    dists, flags = [0.2, 0.9, 0.5], [1, 1, 0]
    assert compute_map(dists, flags, 7) == (pytest.approx((1 + 1 / 2 + 2 / 3) / 3), 7)
    assert compute_map(dists, flags, 7, Top=2)[0] == pytest.approx((1 + 1 / 2) / 2)
    assert compute_map([0.4, 0.6], [1, 0], 7) == (pytest.approx((0 + 1 / 2) / 2), -1)  # fewer images than Top
    assert compute_map([0.5, 0.5], [1, 0], 7, 1) == (0.0, -1)  # a tie counts against the model
    assert compute_correct_num(dists, flags) == (2, 3) and compute_correct_num(dists, flags, Top=1) == (1, 1)
    assert compute_correct_score(dists, flags) == (1, 1) and compute_correct_score(dists, flags, score=0.5) == (1, 2)
    assert compute_incorrect_score(dists, flags) == (1, 2) and compute_incorrect_score(dists, flags, 0.5) == (0, 1)
    assert get_right_count(flags) == 2


def test_items_without_enough_correct_images_are_not_counted(tmp_path):
    urls = [[], ["a"], ["b", "c"], ["d", "e"]]
    write_test_list(tmp_path / "list.json", urls, [[], [1], [0, 0], [1, 1]])
    write_scores(tmp_path / "s_t2i.json", [[], ["a"], ["b", "c"], []], [[], [0.9], [0.2, 0.3], []])
    done = run(tmp_path, "s_t2i.json", "--test_list", "list.json")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0] == "Len 4 4"
    assert lines[1] == f"MAP@1: {1 / 1.0000001} 1"  # only the item with the one correct image counts
    assert lines[3:7] == ["MAP@2: 0.0 0", "Acc@2: 0.0 0", "MAP@3: 0.0 0", "Acc@3: 0.0 0"]
    assert lines[7] == "Acc@1.0: 0.0 0"


def test_an_empty_test_list_prints_zeros(tmp_path):
    (tmp_path / "list.json").write_text("")
    (tmp_path / "s.json").write_text("")
    done = run(tmp_path, "s.json", "--test_list", "list.json")
    assert done.returncode == 0 and done.stdout.startswith("Len 0 0\nMAP@1: 0.0 0\n")


@pytest.mark.parametrize(
    "name, values", [("s_t2i.json", [0.5, 0.75]), ("s_i2t.json", [1.0, 0.25]), ("s.json", [0.75, 0.5])]
)
def test_the_file_name_says_which_direction_counts(tmp_path, name, values):
    write_scores(tmp_path / name, [[], ["a", "b"]], [[], [0.5, 0.75]], [[], [1.0, 0.25]])
    assert load_dist_from_file(str(tmp_path / name)) == {"a@2": values[0], "b@2": values[1]}


def test_scores_are_the_weighted_mean_over_the_files_that_hold_the_url(tmp_path, capsys):
    write_test_list(tmp_path / "list.json", [["a", "b", "c"]], [[1, 0, 1]])
    write_scores(tmp_path / "1_t2i.json", [["a"]], [[1.0]])
    write_scores(tmp_path / "2_t2i.json", [["a", "b"]], [[0.0, 0.5]])
    paths = [str(tmp_path / "1_t2i.json"), str(tmp_path / "2_t2i.json")]
    found = load_data_from_PFAN(paths, [1.0, 3.0], tmp_path / "list.json")
    assert found == ([["a", "b"]], [[0.25, 0.5]], [[1, 0]])
    assert capsys.readouterr().err == "1 of 3 images are in no score file and are left out\n"


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
