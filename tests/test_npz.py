"""Folders of .npz and .npy files, one an image, → a dataset folder; pickles of plain types that run nothing."""

import json
import os
import pickle
import resource

import numpy as np
import pytest
from dataset_commands import Calls, D, R, detected, fails, no_leftovers, ok
from folders import write_lines

from lib.datasets import plain_pickle
from lib.datasets.npz_files import read_regions
from lib.errors import InputError
from position import position_grid

SIZE = 375, 500


def images_of(count, n=R, seed=0):
    """[(boxes (n, 4), features (n, D))]"""
    rng = np.random.default_rng(seed)
    return [detected(rng, n) for _ in range(count)]


def save(path, **arrays):
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)


def write_info(folder, images):
    for i, (boxes, features) in enumerate(images):
        info = {"bbox": boxes, "num_boxes": len(boxes), "image_h": np.int64(375), "image_w": 500, "image_id": f"{i}"}
        save(folder / f"{i}.npz", x=features, info=info)


def write_transposed(folder, images):
    for i, (boxes, features) in enumerate(images):
        save(folder / f"{i}.npz", x=features.T, bbox=boxes, image_h=375, image_w=500)


def write_npy_with_info(folder, images):
    folder.mkdir()
    for i, (boxes, features) in enumerate(images):
        np.save(folder / f"{i}.npy", features)
        info = {"bbox": boxes, "num_boxes": len(boxes), "image_height": 375, "image_width": 500, "cls_prob": features}
        np.save(folder / f"{i}_info.npy", np.array(info, dtype=object))


LAYOUTS = [write_info, write_transposed, write_npy_with_info]


@pytest.mark.parametrize("write", LAYOUTS)
def test_files_of_extractors_become_a_dataset(tmp_path, write):
    images = images_of(3, 20)
    write(tmp_path / "in", images)
    out = ok("npz_to_dataset", tmp_path / "in", "--out", tmp_path / "o", "--split", "test")
    assert f"features (20, {D}), boxes" in out and "test: 3 of 3 images" in out
    features, grids = (np.load(tmp_path / f"o/test_{name}.npy") for name in ("ims", "boxes"))
    np.testing.assert_array_equal(features, [features for _, features in images])
    np.testing.assert_array_equal(grids, [position_grid(boxes, SIZE) for boxes, _ in images])
    assert [name.split(".")[0][-1] for name in (tmp_path / "o/test_ids.txt").read_text().split()] == ["0", "1", "2"]
    assert no_leftovers(tmp_path / "o")


def test_boxes_and_sizes_may_stand_apart(tmp_path):
    images = images_of(3)
    (tmp_path / "boxes").mkdir()
    for i, (boxes, features) in enumerate(images):
        save(tmp_path / f"att/{i}.npz", feat=features)
        np.save(tmp_path / f"boxes/{i}.npy", boxes)
    folders = (tmp_path / "att", "--boxes", tmp_path / "boxes", "--out", tmp_path / "o")
    args = ("npz_to_dataset", *folders, "--split", "train")
    assert "att/0.npz: no image_h and image_w in it, and boxes in pixels; --sizes gives them" in fails(*args)
    described = [  # the id of each is the file name of another one, whose size is another
        {"id": i + 1, "file_name": f"COCO_train2014_{i:012}.jpg", "height": 375 + (i > 2), "width": 500}
        for i in range(6)
    ]
    (tmp_path / "instances.json").write_text(json.dumps({"images": described}))
    for sizes in (tmp_path / "instances.json", "375x500"):
        ok(*args, "--sizes", sizes, "--overwrite")
        grids = [position_grid(boxes, SIZE) for boxes, _ in images]
        np.testing.assert_array_equal(np.load(tmp_path / "o/train_boxes.npy"), grids)
    for i, (boxes, _) in enumerate(images):  # shares of the image need no size
        np.save(tmp_path / f"boxes/{i}.npy", boxes / np.float32([500, 375, 500, 375]))
    ok(*args, "--overwrite")
    np.testing.assert_allclose(np.load(tmp_path / "o/train_boxes.npy")[..., 15:], np.stack(grids)[..., 15:], atol=1e-5)
    np.save(tmp_path / "boxes/1.npy", np.array({"boxes": 1}), allow_pickle=True)
    assert "made otherwise; --overwrite" in fails(*args)  # and nothing is lost
    os.remove(tmp_path / "boxes/2.npy")
    assert "2 malformed" in fails(*args, "--overwrite")
    problems = (tmp_path / "o/npz_problems.txt").read_text()
    assert "boxes/2.npy: no such file" in problems and "boxes/1.npy: boxes are Array({'boxes': 1}" in problems


def test_features_without_boxes_are_written_alone(tmp_path):
    for i in range(2):
        save(tmp_path / f"in/{i}.npz", x=np.ones((49, D), np.float32))
    assert "--position none" in ok("npz_to_dataset", tmp_path / "in", "--out", tmp_path / "o", "--split", "train")
    assert np.load(tmp_path / "o/train_ims.npy").shape == (2, 49, D)
    assert not (tmp_path / "o/train_boxes.npy").exists()


@pytest.mark.parametrize("choice, n_regions", [("best", 36), ("all", 100)])
def test_10_to_100_regions_are_cut_or_padded(tmp_path, choice, n_regions):
    (boxes, features), (few_boxes, few_features) = images_of(1, 50) + images_of(1, 10)
    scores = np.random.default_rng(2).random(50).astype(np.float32)
    size = {"image_h": 375, "image_w": 500}
    save(tmp_path / "in/0.npz", x=features, bbox=boxes, **size, info={"objects_conf": scores})
    padded = [np.concatenate([x, np.zeros((90, x.shape[1]), np.float32)]) for x in (few_features, few_boxes)]
    save(tmp_path / "in/1.npz", x=padded[0], bbox=padded[1], **size, num_bbox=10)
    args = ("npz_to_dataset", tmp_path / "in", "--split", "train", "--out")
    out = ok(*args, tmp_path / "o", "--regions", choice)
    assert "padded" in out and ("1 cut" in out) == (choice == "best")
    images, grids = (np.load(tmp_path / f"o/train_{name}.npy") for name in ("ims", "boxes"))
    best = np.argsort(-scores, kind="stable")[:36] if choice == "best" else np.arange(50)
    assert images.shape == (2, n_regions, D)
    np.testing.assert_array_equal(images[0, : len(best)], features[best])
    np.testing.assert_array_equal(grids[0, : len(best)], position_grid(boxes[best], SIZE))
    np.testing.assert_array_equal(images[1, :10], few_features)
    assert (images[1, 10:] == 0).all() and (grids[1, 10:, :15] == 256).all() and (grids[1, 10:, 15:] == 0).all()
    assert "1 malformed" in fails(*args, tmp_path / "fixed")
    assert "10 regions, expected 50 (--regions fixed)" in (tmp_path / "fixed/npz_problems.txt").read_text()


def test_damaged_missing_and_doubled_images_are_named_and_can_be_left_out(tmp_path):
    images = images_of(5)
    write_info(tmp_path / "in", images)
    (tmp_path / "in/1.npz").write_bytes((tmp_path / "in/1.npz").read_bytes()[:-40])
    np.savez(tmp_path / "in/2.npz", x=images[2][1] * np.nan, bbox=images[2][0], image_h=375, image_w=500)
    np.savez(tmp_path / "in/3.npz", x=images[3][1][:, 1:], bbox=images[3][0], image_h=375, image_w=500)
    write_lines(tmp_path / "ids.txt", ["4.jpg", "3", "2", "1", "0", "77"])
    args = ("npz_to_dataset", tmp_path / "in", "--ids", f"dev={tmp_path}/ids.txt", "--out", tmp_path / "o")
    message = fails(*args)
    assert "3 malformed, 1 missing" in message and "--skip_bad" in message
    listed = (tmp_path / "o/npz_problems.txt").read_text()
    assert f"{tmp_path}/in/1.npz: malformed: truncated or not an .npz file" in listed
    assert f"{tmp_path}/in/2.npz: malformed: features: NaN or infinite values" in listed
    assert f"{tmp_path}/in/3.npz: malformed: features (36, 7), expected (R, 8) as in the first file" in listed
    assert "dev, id 77: missing: no file of this name" in listed
    ok(*args, "--skip_bad")
    assert (tmp_path / "o/dev_ids.txt").read_text() == "4.jpg\n0\n"
    np.testing.assert_array_equal(np.load(tmp_path / "o/dev_ims.npy"), [images[4][1], images[0][1]])
    (tmp_path / "in/below").mkdir()
    save(tmp_path / "in/below/0.jpg.npz", x=images[0][1])
    assert "1 doubled" in fails("npz_to_dataset", tmp_path / "in", "--split", "test", "--out", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    assert "empty: no .npz and no .npy" in fails(
        "npz_to_dataset", tmp_path / "empty", "--split", "test", "--out", tmp_path
    )


def test_linked_folders_are_followed_once_and_names_that_are_not_utf8_are_named(tmp_path):
    write_info(tmp_path / "disk", images_of(3))
    write_transposed(tmp_path / "in", images_of(1, seed=1))
    (tmp_path / "in/0.npz").rename(tmp_path / "in/3.npz")
    (tmp_path / "in/link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/round").symlink_to(tmp_path / "in")
    os.rename(tmp_path / "disk/2.npz", os.fsencode(tmp_path / "disk") + b"/caf\xe9.npz")
    args = ("npz_to_dataset", tmp_path / "in", "--out", tmp_path / "o", "--split", "train")
    assert "1 unreadable" in fails(*args)
    assert r"caf\udce9.npz: unreadable: the name is not UTF-8" in (tmp_path / "o/npz_problems.txt").read_text()
    ok(*args, "--skip_bad")
    assert (tmp_path / "o/train_ids.txt").read_text() == "3\n0\n1\n"


def test_what_is_no_folder_and_files_of_another_kind_are_named(tmp_path):
    write_info(tmp_path / "in", images_of(1))
    (tmp_path / "boxes").mkdir()
    np.save(tmp_path / "boxes/0.npy", np.array({"bbox": [1]}, dtype=object))
    args = ("--out", tmp_path / "o", "--split", "train")
    message = fails("npz_to_dataset", tmp_path / "in/0.npz", *args)
    assert "in/0.npz: is a file, expected a folder" in message
    message = fails("npz_to_dataset", tmp_path / "in", "--boxes", tmp_path / "boxes", *args)
    assert f"{tmp_path}/boxes/0.npy: boxes are" in message
    assert not (tmp_path / "o").exists()


# ---------------------------------------------------------------- boxes and sizes of SCAN's kind


@pytest.mark.parametrize("protocol", [2, 5])
def test_sizes_in_an_object_array_of_dicts_are_read_and_a_missing_one_is_named(tmp_path, protocol):
    boxes = np.stack([boxes for boxes, _ in images_of(4)])
    sizes = np.array([{"image_w": 500, "image_h": np.int64(375)} for _ in range(4)], dtype=object)
    np.save(tmp_path / "train_ims_bbx.npy", boxes)
    path = tmp_path / "train_ims_size.npy"
    save_pickle(path, pickle.dumps(sizes, protocol=protocol), (4,))
    args = ("position", tmp_path / "train_ims_bbx.npy", "--sizes", path, "--out", tmp_path / "o.npy")
    ok(*args)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), position_grid(boxes, [SIZE] * 4))
    sizes[1] = {"image_w": 5}
    save_pickle(path, pickle.dumps(sizes, protocol=protocol), (4,))
    assert "train_ims_size.npy: image 1: found" in fails(*args)


# ---------------------------------------------------------------- hostile files


def save_pickle(path, data, shape=()):
    """An .npy file of objects, with a pickle of one's own."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": shape})
        file.write(data)


def refusal(tmp_path, data):
    """What is said of an image whose NAME_info.npy holds this pickle."""
    np.save(tmp_path / "1.npy", np.ones((2, 3)))
    save_pickle(tmp_path / "1_info.npy", data)
    with pytest.raises(InputError, match=r"/1(_info)?\.npy: ") as caught:
        read_regions(str(tmp_path / "1.npy"))
    return str(caught.value)


@pytest.mark.parametrize("name", ["bbox", "num_boxes", "image_h", "objects_conf"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_that_a_pickle_repeats_do_not_fill_the_memory(tmp_path, name, kind):
    """2^40 values in a few bytes."""
    value = [1.0]
    for _ in range(40):
        value = kind([value, value])
    info = {"bbox": np.ones((2, 4)), "num_boxes": 2, "image_h": 9, "image_w": 9, name: value}
    refusal(tmp_path, pickle.dumps(np.array(info, dtype=object)))


HOSTILE_PICKLES = {
    "an index of the memo": b"\x80\x04]r\xff\xff\xff\xff.",
    "an index of the memo as text": b"\x80\x02]p4000000000\n.",
    "a size beyond the end": b"\x80\x05\x96" + (10**11).to_bytes(8, "little") + b".",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a state for a class": b"\x80\x02cnumpy\ndtype\n}X\x05\x00\x00\x00dtypeK\x01sb.",
    "slots of a class": b"\x80\x02cnumpy\ndtype\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.",
    "an array without values": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "a class": b"\x80\x02cnumpy\nndarray\n.",
    "a persistent id": b"Pabc\n.",
    "an attribute of a class": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
    "a frame that cuts a value": b"\x80\x05\x95\x0c" + bytes(7) + b"\x96\x08" + bytes(7) + b"abcd.",
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_pickles_made_to_do_harm_are_refused(tmp_path, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(tmp_path, HOSTILE_PICKLES[name])
    assert plain_pickle.load(pickle.dumps(np.arange(3))).tolist() == [0, 1, 2]  # later ones are read as before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


PLAIN = {
    "numbers": [1, -(2**70), 2.5, True, None],
    "texts": ("é", b"bytes", b""),
    "arrays": [np.arange(6, dtype=">i4").reshape(2, 3), np.asfortranarray(np.eye(3)), np.array(["a", "bc"])],
    "scalars": [np.float32(1.5), np.int64(3), np.bool_(True)],
    "objects": np.array([{"a": 1}, [2]], dtype=object),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_from_a_pickle(protocol):
    read = plain_pickle.load(pickle.dumps(PLAIN, protocol=protocol))
    assert repr(read).replace("'>i4'", "int32").replace("Array(", "array(") == repr(PLAIN).replace("'>i4'", "int32")


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_pickle_is_run(tmp_path, protocol):
    marker = tmp_path / "it ran"
    for value in (Calls(os.mkdir, str(marker)), {"x": [Calls(eval, f"__import__('os').mkdir({str(marker)!r})")]}, eval):
        assert "expected numbers, texts, lists, dicts and arrays" in refusal(tmp_path, pickle.dumps(value, protocol))
    assert not marker.exists()


def test_an_array_that_promises_more_than_it_holds_is_refused(tmp_path):
    with open(tmp_path / "1.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 3)})
    with pytest.raises(InputError, match=r"1\.npy: truncated array, expected 12000000000000 bytes"):
        read_regions(str(tmp_path / "1.npy"))
