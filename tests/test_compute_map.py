"""compute_map.py: the published output and functions, numbers counted by hand, and what a user is told."""

import contextlib
import json

import pytest
from dataset_commands import call

from test_server.compute_map import (
    compute_correct_num,
    compute_correct_score,
    compute_incorrect_score,
    compute_map,
    get_right_count,
    load_data_from_PFAN,
    load_dist_from_file,
    main,
    report,
)


def write_lines(path, objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects))


def write_scores(path, items, t2i, i2t=None):
    """items: urls of each item; t2i and i2t: their scores (i2t: zeros where not given)."""
    i2t = i2t or [[0.0] * len(urls) for urls in items]
    write_lines(path, [{"urls": u, "dist_t2i": a, "dist_i2t": b} for u, a, b in zip(items, t2i, i2t, strict=True)])


def write_test_list(path, urls, flags):
    write_lines(path, [{"Img_urls": u, "Img_flags": f} for u, f in zip(urls, flags, strict=True)])


def run(folder, *args):
    with contextlib.chdir(folder):
        return call(main, "compute_map.py", *args)


def test_prints_the_published_lines_to_the_last_digit(shared):
    golden = shared / "golden" / "compute_map"
    done = run(shared / "real" / "tencent", "--test_list", golden / "test_list.json")
    assert done.stdout == (golden / "compute_map_expected.txt").read_text()
    assert done.stderr == "" and done.returncode == 0


def test_without_arguments_the_published_files_beside_it_are_mixed_with_their_weights(tmp_path):
    (tmp_path / "test_server").mkdir()
    (tmp_path / "data/tencent_data_meta").mkdir(parents=True)
    write_test_list(tmp_path / "data/tencent_data_meta/test_list.json", [["a", "b"]], [[1, 0]])
    for name, scores in {"tag": [0.0, 1.0], "sentence": [0.0, 0.4], "tag_new": [1.0, 0.0]}.items():
        write_scores(tmp_path / "test_server" / f"dist_{name}_t2i.json", [["a", "b"]], [scores])
    done = run(tmp_path / "test_server")
    assert done.stderr == ""
    # a: 1.5 / 3.5, b: 1.4 / 3.5 – without the weight 1.5 the incorrect image would lead
    assert done.stdout.splitlines()[:3] == ["Len 1 1", f"MAP@1: {1 / 1.0000001} 1", f"Acc@1: {1 / 1.0000001} 1"]
    assert "MAP@1: 0.0 1" in run(tmp_path / "test_server", "--weights", 1, 1, 1).stdout


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


def test_only_items_with_enough_correct_images_count():
    dists = [[], [0.9], [0.2, 0.3], [0.7, 0.96, 0.8]]
    flags = [[], [1], [0, 0], [1, 1, 0]]
    lines = dict(line.split(": ") for line in report(dists, flags))
    assert len(lines) == 6 + 20 + 20
    of_rank = [("MAP@1", 2, 2), ("Acc@1", 2, 2), ("MAP@2", 3 / 4, 1), ("Acc@2", 1, 2), ("MAP@3", 0, 0), ("Acc@3", 0, 0)]
    above = [("Acc@1.0", 0, 0), ("Acc@0.95", 1, 1), ("Acc@0.7999999999999998", 2, 3)]
    below = [("Error rate@1.0", 3, 6), ("Error rate@0.95", 3, 5), ("Error rate@0.7999999999999998", 2, 3)]
    for name, total, count in (*of_rank, *above, *below):
        assert lines[name] == f"{total / (count + 1e-7)} {count}", name


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


@pytest.mark.parametrize(
    "name, line, told",
    [
        ("list.json", '{"Img_urls": ["a"], "Img_flags": [1, 0]}', 'list.json:2: expected {"Img_urls"'),
        ("list.json", '{"Img_urls": ["a"], "Img_flags": [2]}', "[0 or 1, ...]"),
        ("list.json", '{"Img_urls": ["a"]', "list.json:2: expected"),
        ("s_t2i.json", '{"urls": ["a"], "dist_t2i": [NaN], "dist_i2t": [1]}', "all finite"),
        ("s_t2i.json", '{"urls": ["a"], "dist_i2t": [1]}', '"dist_t2i": [number, ...]'),
        ("s_t2i.json", '{"urls": ["a", "b"], "dist_t2i": [1]}', "equally many of each"),
        ("s_t2i.json", None, "error: s_t2i.json: 1 lines, expected 2, as in list.json\n"),
        ("s_t2i.json", '{"urls": ["b", "c"], "dist_t2i": [1, 2]}', "scores c, which is not in line 2 of list.json"),
    ],
)
def test_what_is_malformed_or_of_another_test_list_is_named(tmp_path, name, line, told):
    write_test_list(tmp_path / "list.json", [["a"], ["b"]], [[1], [1]])
    write_scores(tmp_path / "s_t2i.json", [["a"], ["b"]], [[1.0], [1.0]])
    first = (tmp_path / name).read_text().splitlines()[0]
    (tmp_path / name).write_text(first + "\n" + ("" if line is None else line + "\n"))
    done = run(tmp_path, "s_t2i.json", "--test_list", "list.json")
    assert done.returncode == 2 and done.stdout == ""
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "args, told",
    [
        (["s.json", "--weights", 1, 2], "--weights [1.0, 2.0]: expected 1 above 0"),
        (["s.json", "--weights", 0], "--weights [0.0]: expected 1 above 0"),
        (["absent.json", "--test_list", "list.json"], "error: absent.json: No such file or directory\n"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, args, told):
    write_test_list(tmp_path / "list.json", [], [])
    done = run(tmp_path, *args)
    assert done.returncode == 2 and told in done.stderr
