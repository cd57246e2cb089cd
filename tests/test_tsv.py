"""Bottom-up-attention TSV files → a dataset folder: order, bad lines, regions, restarts."""

import json

import numpy as np
import pytest
from dataset_commands import (
    D,
    R,
    base64_of,
    detected,
    fails,
    full_disk,
    lxmert_line,
    no_leftovers,
    ok,
    run_killed,
    tsv_line,
    vinvl_line,
)
from folders import write_lines

from position import position_grid


@pytest.fixture
def parts(tmp_path):
    """Two TSV parts with images 10…15 and 99 (of no list), an id list each for train and test; {id: image}."""
    rng = np.random.default_rng(0)
    images = {i: detected(rng) for i in (*range(10, 16), 99)}
    lines = {i: tsv_line(i, *images[i]) for i in images}
    write_lines(tmp_path / "a.tsv", [lines[i] for i in (12, 99, 10)])
    write_lines(tmp_path / "b.tsv", [lines[i] for i in (15, 11, 14, 13)])
    write_lines(tmp_path / "train.txt", [10, 11, 12, 13])
    write_lines(tmp_path / "test.txt", ["15.jpg", "COCO_val2014_000000000014.jpg"])
    return images


def tsv_args(folder, *more):
    lists = (f"train={folder}/train.txt", f"test={folder}/test.txt")
    return (folder / "a.tsv", folder / "b.tsv", "--out", folder / "out", "--img_dim", D, "--ids", *lists, *more)


def test_tsv_parts_become_a_dataset_in_the_order_of_the_id_lists(tmp_path, parts):
    out = ok("tsv_to_dataset", *tsv_args(tmp_path))
    assert "1 of other images" in out and "train: 4 of 4" in out
    for split, ids in (("train", (10, 11, 12, 13)), ("test", (15, 14))):
        images, boxes = (np.load(tmp_path / f"out/{split}_{name}.npy") for name in ("ims", "boxes"))
        assert images.dtype == boxes.dtype == np.float32
        np.testing.assert_array_equal(images, [parts[i][1] for i in ids])
        np.testing.assert_array_equal(
            boxes, position_grid(np.stack([parts[i][0] for i in ids]), [[375, 500]] * len(ids))
        )
    assert (tmp_path / "out/test_ids.txt").read_text() == "15.jpg\nCOCO_val2014_000000000014.jpg\n"
    assert no_leftovers(tmp_path / "out")
    assert "--overwrite" in fails("tsv_to_dataset", *tsv_args(tmp_path, "--float16"))
    ok("tsv_to_dataset", *tsv_args(tmp_path, "--float16", "--overwrite"))
    halves = np.load(tmp_path / "out/train_ims.npy")
    assert halves.dtype == np.float16
    np.testing.assert_allclose(halves, [parts[i][1] for i in (10, 11, 12, 13)], rtol=1e-3, atol=1e-3)


def test_bad_lines_are_listed_by_line_and_fail_the_run_unless_skipped(tmp_path, parts):
    boxes, features = parts[13]
    reversed_boxes = boxes[:, [2, 3, 0, 1]]
    nan = features.copy()
    nan[3, 2] = np.nan
    write_lines(
        tmp_path / "b.tsv",
        [
            tsv_line(15, *parts[15]),
            tsv_line(10, *parts[10]),  # doubled
            tsv_line(11, parts[11][0], nan),
            tsv_line(13, reversed_boxes, features),
            "14\t500\t375",
        ],
    )
    message = fails("tsv_to_dataset", *tsv_args(tmp_path))
    assert "3 malformed" in message and "1 doubled" in message and "--skip_bad" in message
    listed = (tmp_path / "out/tsv_problems.txt").read_text().splitlines()
    where = str(tmp_path / "b.tsv")
    assert [line for line in listed if line.startswith(f"{where}, line 2: doubled: id 10")]
    assert [line for line in listed if line.startswith(f"{where}, line 3: malformed") and "NaN" in line]
    assert [line for line in listed if line.startswith(f"{where}, line 4: malformed") and "reversed" in line]
    assert [line for line in listed if line.startswith(f"{where}, line 5: malformed") and "3 fields" in line]
    assert not (tmp_path / "out/train_ims.npy").exists()
    ok("tsv_to_dataset", *tsv_args(tmp_path, "--skip_bad"))
    np.testing.assert_array_equal(np.load(tmp_path / "out/train_ims.npy"), [parts[i][1] for i in (10, 12)])
    assert (tmp_path / "out/train_ids.txt").read_text() == "10\n12\n"


def test_missing_and_doubled_ids_of_a_list_are_named(tmp_path, parts):
    write_lines(tmp_path / "train.txt", [10, 11, 12, 777, 11, 13])
    message = fails("tsv_to_dataset", *tsv_args(tmp_path))
    assert "1 doubled" in message and "1 missing" in message
    listed = (tmp_path / "out/tsv_problems.txt").read_text()
    assert "train.txt, line 5: doubled: id 11 stands in line 2" in listed and "train, id 777: missing" in listed


def test_fields_of_ones_own_with_scores_choose_the_best_regions(tmp_path):
    rng = np.random.default_rng(1)
    boxes, features = detected(rng, 50)
    scores = rng.random(50)
    fields = "image_id,image_w,image_h,num_boxes,boxes,features,objects_conf"
    write_lines(tmp_path / "t.tsv", [tsv_line(1, boxes, features, 500, 375, scores)])
    args = (tmp_path / "t.tsv", "--all", "train", "--img_dim", D, "--fields", fields, "--out", tmp_path / "out")
    ok("tsv_to_dataset", *args, "--regions", "best", "--n_regions", 20)
    best = np.argsort(-scores.astype("<f4"), kind="stable")[:20]
    np.testing.assert_array_equal(np.load(tmp_path / "out/train_ims.npy"), [features[best]])


@pytest.mark.parametrize("same", [True, False])
def test_a_killed_run_leaves_no_half_file_and_the_next_one_goes_on_if_its_tsv_is_the_same(tmp_path, same):
    rng = np.random.default_rng(2)
    old, new = ([detected(rng) for _ in range(40)] for _ in range(2))
    args = (tmp_path / "t.tsv", "--out", tmp_path / "out", "--all", "train", "--img_dim", D)
    write_lines(tmp_path / "t.tsv", [tsv_line(i, *old[i]) for i in range(40)])
    run_killed("tsv_to_dataset", 25, *args)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train_ims.npy.part",
        "train_boxes.npy.part",
        "train_state.part",
    }
    images = old if same else new
    write_lines(tmp_path / "t.tsv", [tsv_line(i, *images[i]) for i in range(40)])
    assert ("15 used" if same else "begun anew") in ok("tsv_to_dataset", *args)
    np.testing.assert_array_equal(np.load(tmp_path / "out/train_ims.npy"), [features for _, features in images])
    assert no_leftovers(tmp_path / "out")


def test_a_tsv_extracted_again_is_not_taken_for_the_old_one(tmp_path, parts):
    """Of the same name and size; rows of both would stand in one split."""
    ok("tsv_to_dataset", *tsv_args(tmp_path))
    assert "there already" in ok("tsv_to_dataset", *tsv_args(tmp_path))
    write_lines(tmp_path / "a.tsv", [tsv_line(i, *parts[i + 1]) for i in (12, 14, 10)])
    message = fails("tsv_to_dataset", *tsv_args(tmp_path))
    assert "train_ims.npy: there already, and made otherwise; --overwrite" in message
    np.testing.assert_array_equal(np.load(tmp_path / "out/train_ims.npy"), [parts[i][1] for i in (10, 11, 12, 13)])


def test_files_with_a_record_of_an_older_version_are_kept_and_said_to_be_unproved(tmp_path, parts):
    ok("tsv_to_dataset", *tsv_args(tmp_path))
    path = tmp_path / "out/train_made.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps({**made, "inputs": [note[:2] for note in made["inputs"]]}))  # names and sizes
    assert "train: kept, though there is no digest" in ok("tsv_to_dataset", *tsv_args(tmp_path))
    path.write_text("[]")  # no record at all
    assert "made otherwise; --overwrite" in fails("tsv_to_dataset", *tsv_args(tmp_path))


def test_parts_that_come_later_join_a_stopped_run(tmp_path, parts):
    only_a = [tmp_path / "a.tsv", *tsv_args(tmp_path)[2:]]
    assert "4 missing" in fails("tsv_to_dataset", *only_a)
    assert "4 used" in ok("tsv_to_dataset", *tsv_args(tmp_path))


def test_inputs_and_outputs_of_another_kind_are_named(tmp_path, parts):
    (tmp_path / "empty").write_text("")
    (tmp_path / "spaces.tsv").write_text("1 500 375 36 AAAA AAAA\n")
    write_lines(tmp_path / "head.tsv", ["image_id\timage_w\timage_h\tnum_boxes\tboxes\tfeatures"])
    write_lines(tmp_path / "wide.tsv", [tsv_line(10, *parts[10], width=10**400)])
    out, ids = ("--out", tmp_path / "o"), ("--ids", f"train={tmp_path}/train.txt")
    for args, said in (
        ((tmp_path / "empty", *out, *ids), "empty: no images, expected lines of image_id"),
        ((tmp_path / "head.tsv", *out, "--all", "train"), "head.tsv: no images"),
        ((tmp_path / "wide.tsv", "--out", tmp_path / "w", *ids, "--img_dim", D), "1 malformed"),
        ((tmp_path / "spaces.tsv", *out, *ids), "spaces.tsv: lines of 1 fields, expected bottom-up-attention's 6"),
        ((tmp_path / "a.tsv", *out, *ids, "--n_regions", 0), "--n_regions 0: expected at least 1"),
        ((tmp_path / "a.tsv", "--out", tmp_path / "empty", *ids), "empty: is no folder"),
    ):
        assert said in fails("tsv_to_dataset", *args), args
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_named_with_the_file(tmp_path, parts):
    with full_disk(4096):
        message = fails("tsv_to_dataset", *tsv_args(tmp_path))
    assert f"{tmp_path}/out/train_ims.npy" in message
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".part"]


# ---------------------------------------------------------------- other people's columns


@pytest.mark.parametrize("line, said", [(lxmert_line, "LXMERT's columns"), (vinvl_line, "VinVL's columns")])
def test_other_peoples_columns_are_told_by_their_kinds(tmp_path, line, said):
    rng = np.random.default_rng(3)
    images = [(*detected(rng, n), rng.random(n).astype("<f4")) for n in (50, 10)]
    header = ["img_id\timg_h\timg_w\tobjects_id\tobjects_conf\tattrs_id\tattrs_conf\tnum_boxes\tboxes\tfeatures"]
    lines = [line(i, *one) for i, one in enumerate(images)]
    write_lines(tmp_path / "t.tsv", header + lines if line is lxmert_line else lines)
    args = [tmp_path / "t.tsv", "--out", tmp_path / "o", "--all", "test", "--img_dim", D, "--regions", "best"]
    assert said in ok("tsv_to_dataset", *args)
    written, grids = (np.load(tmp_path / f"o/test_{name}.npy") for name in ("ims", "boxes"))
    (boxes, features, scores), (few_boxes, few_features, _) = images
    best = np.argsort(-scores, kind="stable")[:R]
    np.testing.assert_array_equal(written[0], features[best])
    np.testing.assert_array_equal(grids[0], position_grid(boxes[best], (375, 500)))
    np.testing.assert_array_equal(written[1, :10], few_features)
    np.testing.assert_array_equal(grids[1, :10], position_grid(few_boxes, (375, 500)))


def test_vinvl_features_that_end_in_their_boxes(tmp_path):
    boxes, features = detected(np.random.default_rng(4))
    share = boxes / np.float32([500, 375, 500, 375])
    sides = share[:, 2:] - share[:, :2]
    value = {"num_boxes": R, "features": base64_of(np.concatenate([features, share, sides], 1))}
    write_lines(tmp_path / "t.tsv", ["7\t" + json.dumps(value)])
    args = [tmp_path / "t.tsv", "--out", tmp_path / "o", "--all", "test"]
    assert "VinVL's columns" in ok("tsv_to_dataset", *args, "--img_dim", D)
    np.testing.assert_array_equal(np.load(tmp_path / "o/test_ims.npy")[0], features)
    np.testing.assert_array_equal(np.load(tmp_path / "o/test_boxes.npy")[0], position_grid(share, (1, 1)))
    assert "1 malformed" in fails("tsv_to_dataset", *args, "--img_dim", D + 1, "--overwrite")


def test_vinvl_scores_of_some_objects_only_are_refused(tmp_path):
    line = vinvl_line(7, *detected(np.random.default_rng(4)), np.ones(R)).replace('"conf": 1.0, ', "", 1)
    write_lines(tmp_path / "t.tsv", [line])
    args = [tmp_path / "t.tsv", "--out", tmp_path / "o", "--all", "test", "--img_dim", D]
    assert "1 malformed" in fails("tsv_to_dataset", *args)
    assert "conf of some objects only" in (tmp_path / "o/tsv_problems.txt").read_text()


@pytest.mark.parametrize("first", [True, False])
def test_a_cut_line_is_no_loss_where_its_image_is_whole_elsewhere(tmp_path, parts, first):
    line = {i: tsv_line(i, *parts[i]) for i in parts}
    glued = line[11][:400] + line[14]
    assert glued.count("\t") == 9  # as many fields as LXMERT's
    write_lines(tmp_path / "a.tsv", [*([glued] * first), line[12], line[10], line[11]])
    write_lines(tmp_path / "b.tsv", [line[13], line[14], line[15], *([line[11][:20]] * (not first))])
    out = ok("tsv_to_dataset", *tsv_args(tmp_path))
    assert "1 damaged, whole in another line" in out and "train: 4 of 4" in out and "test: 2 of 2" in out
    np.testing.assert_array_equal(np.load(tmp_path / "out/train_ims.npy"), [parts[i][1] for i in (10, 11, 12, 13)])


@pytest.mark.parametrize("count, looked_at", [(3, 3), (120, 100)])
def test_swapped_sizes_are_refused_and_the_right_ones_are_not_mixed_with_them(tmp_path, count, looked_at):
    boxes, features = detected(np.random.default_rng(5))
    boxes[:, 2] = 499
    args = ("tsv_to_dataset", tmp_path / "t.tsv", "--out", tmp_path / "o", "--all", "train", "--img_dim", D)
    write_lines(tmp_path / "t.tsv", [tsv_line(i, boxes, features, width=375, height=500) for i in range(count)])
    message = fails(*args)
    assert f"of {looked_at * R} boxes reach well outside" in message and "expected height before width" in message
    write_lines(tmp_path / "t.tsv", [tsv_line(i, boxes, features) for i in range(count)])  # of the same length
    ok(*args)
    np.testing.assert_array_equal(np.load(tmp_path / "o/train_boxes.npy"), [position_grid(boxes, (375, 500))] * count)
