"""Caption files → SPLIT_caps.txt and SPLIT_ids.txt."""

import json
import os

import numpy as np
import pytest
from dataset_commands import D, R, fails, ok
from folders import write_lines


def karpathy(path, coco):
    images = []
    for i, (split, k) in enumerate([("train", 5), ("restval", 6), ("val", 5), ("test", 5), ("test", 5), ("train", 4)]):
        sentences = [{"raw": f"Caption {i} {j} é.\n", "tokens": ["x"]} for j in range(k)]
        names = {"filename": f"COCO_val2014_{i:012}.jpg", "cocoid": i} if coco else {"filename": f"{i}00.jpg"}
        images.append({**names, "split": split, "sentences": sentences})
    path.write_text(json.dumps({"dataset": "x", "images": images}))


def test_karpathy_splits(tmp_path):
    karpathy(tmp_path / "coco.json", True)
    out = ok("captions_to_dataset", "--karpathy", tmp_path / "coco.json", "--out", tmp_path / "c", "--test_images", 1)
    assert "1 with more than 5 captions" in out and "1 with fewer than 5 captions" in out
    read = {p.name: p.read_text().splitlines() for p in (tmp_path / "c").glob("*.txt")}
    assert read["train_ids.txt"] == ["0", "1"] and read["dev_ids.txt"] == ["2"]
    assert read["testall_ids.txt"] == ["3", "4"] and read["test_ids.txt"] == ["3"]
    assert read["train_caps.txt"] == [f"Caption {i} {j} é." for i in (0, 1) for j in range(5)]
    assert read["caption_problems.txt"] == [
        "1: with more than 5 captions: the first 5 of 6 are kept",
        "5: with fewer than 5 captions: 4; left out",
    ]
    karpathy(tmp_path / "f30k.json", False)
    ok("captions_to_dataset", "--karpathy", tmp_path / "f30k.json", "--out", tmp_path / "f")
    assert (tmp_path / "f/test_ids.txt").read_text() == "300.jpg\n400.jpg\n"
    assert not (tmp_path / "f/testall_ids.txt").exists()


def test_official_coco_captions(tmp_path):
    for name, ids in (("train", (7, 3)), ("val", (9,))):
        annotations = [{"id": 10 * i + j, "image_id": i, "caption": f"{i} {j}"} for j in (4, 1, 3, 2, 5) for i in ids]
        value = {"images": [{"id": i} for i in ids], "annotations": annotations}
        (tmp_path / f"captions_{name}.json").write_text(json.dumps(value))
    files = [tmp_path / f"captions_{name}.json" for name in ("train", "val")]
    write_lines(tmp_path / "tr.txt", ["COCO_train2014_000000000009.jpg", "7"])
    write_lines(tmp_path / "de.txt", ["3"])
    lists = (f"train={tmp_path}/tr.txt", f"dev={tmp_path}/de.txt")
    ok("captions_to_dataset", "--coco", *files, "--out", tmp_path / "o", "--ids", *lists)
    assert (tmp_path / "o/train_caps.txt").read_text().splitlines() == [f"{i} {j}" for i in (9, 7) for j in range(1, 6)]
    assert "--ids" in fails("captions_to_dataset", "--coco", *files, "--out", tmp_path / "o")
    write_lines(tmp_path / "de.txt", ["3", "444"])
    assert "1 without captions" in fails(
        "captions_to_dataset", "--coco", *files, "--out", tmp_path / "o", "--ids", f"dev={tmp_path}/de.txt"
    )


def test_captions_do_not_slip_under_features_in_another_order(tmp_path):
    write_lines(tmp_path / "caps.tsv", [f"{i}.jpg#{j}\tcaption {i} {j}" for i in range(6) for j in range(5)])
    args = ("captions_to_dataset", "--tsv", tmp_path / "caps.tsv", "--out", tmp_path / "o")
    ok(*args, "--sizes", "dev=1", "test=2", "--seed", 1)
    splits = {s: (tmp_path / f"o/{s}_ids.txt").read_text().split() for s in ("train", "dev", "test")}
    assert [len(ids) for ids in splits.values()] == [3, 1, 2] and len({i for s in splits.values() for i in s}) == 6
    for split, ids in splits.items():
        lines = (tmp_path / f"o/{split}_caps.txt").read_text().splitlines()
        assert lines == [f"caption {i[:-4]} {j}" for i in ids for j in range(5)]
        np.save(tmp_path / f"o/{split}_ims.npy", np.zeros((len(ids), R, D), np.float32))
    ok(*args, "--sizes", "dev=1", "test=2", "--seed", 1)
    assert "not known to be in the order" in fails(*args, "--sizes", "dev=1", "test=2", "--seed", 2)
    np.save(tmp_path / "o/test_ims.npy", np.zeros((2, R, D), np.float32))
    os.remove(tmp_path / "o/train_ims.npy")
    fails(*args, "--sizes", "dev=1", "test=2", "--seed", 2)  # train alone would fit; no split is written
    os.remove(tmp_path / "o/dev_ims.npy")
    os.rename(tmp_path / "o/test_ims.npy", tmp_path / "o/test_state.part")  # as while features are being written
    assert "test_state.part: there already" in fails(*args, "--sizes", "dev=1", "test=1")
    assert (tmp_path / "o/train_ids.txt").read_text().split() == splits["train"]
    write_lines(tmp_path / "caps.tsv", ["no tab here"])
    assert "no image has 5 captions" in fails(*args, "--split", "train")


@pytest.mark.parametrize(
    "item, found",
    [
        ({"split": "train", "filename": "x", "sentences": [{"raw": 3}]}, "Expected `str`, got `int`"),
        ({"split": "train", "filename": "x"}, "missing required field `sentences`"),
        ({"split": "test", "filename": "y", "sentences": []}, "'y' stands in train and in test"),
        ({"split": "odd", "filename": "x", "sentences": []}, "split 'odd', expected train, restval, val, test"),
    ],
)
def test_an_image_of_another_form_is_named(tmp_path, item, found):
    good = {"split": "train", "filename": "y", "sentences": [{"raw": "a"}] * 5}
    (tmp_path / "k.json").write_text(json.dumps({"images": [good, item]}))
    message = fails("captions_to_dataset", "--karpathy", tmp_path / "k.json", "--out", tmp_path / "o")
    assert "k.json: images 1" in message and found in message


def test_inputs_of_another_kind_are_named(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "none.json").write_text('{"images": []}')
    (tmp_path / "odd.json").write_text('{"images": [{"id": 3}], "annotations": [{"image_id": 3, "id": 1}]}')
    for args, said in (
        (("--karpathy", tmp_path / "list.json"), "list.json: found b'[]' (Expected `object`, got `array`"),
        (("--karpathy", tmp_path / "none.json"), "none.json: no image has 5 captions"),
        (("--coco", tmp_path / "none.json"), "none.json: no image has 5 captions"),
        (("--coco", tmp_path / "odd.json"), "odd.json: not an official captions file (KeyError: "),
        (("--tsv", tmp_path / "empty"), "empty: no image has 5 captions"),
    ):
        assert said in fails("captions_to_dataset", *args, "--out", tmp_path / "o"), args


def test_half_of_an_emoji_is_a_listed_problem(tmp_path):
    """A whole one, and an escaped backslash before the same letters, are text."""
    captions = ["one \ud83d\ude00", "two \ud83d", "three \\ud83d", *"456"]
    notes = [{"id": i, "image_id": 7, "caption": caption} for i, caption in enumerate(captions)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"id": 7}], "annotations": notes}))
    image = {"filename": "7.jpg", "sentences": [{"raw": caption} for caption in captions]}
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": [image]}))
    for name in ("coco", "karpathy"):
        args = (f"--{name}", tmp_path / f"{name}.json", "--out", tmp_path / name, "--split", "test")
        assert "1 malformed (listed in" in fails("captions_to_dataset", *args)
        assert "half of a character" in (tmp_path / name / "caption_problems.txt").read_text()
        ok("captions_to_dataset", *args, "--skip_bad")
        kept = (tmp_path / name / "test_caps.txt").read_text().splitlines()
        assert kept == ["one \U0001f600", "three \\ud83d", "4", "5", "6"]


FIVE = ("A dog , running", 'A "big" dog runs .', "Two dogs", "Dogs run ; fast", "It runs .")


def quoted(caption):
    """A cell of a CSV file as Kaggle's captions.txt has it."""
    return '"' + caption.replace('"', '""') + '"' if "," in caption or '"' in caption else caption


ROWS = [(f"{i}.jpg", j, text) for i in (7, 8) for j, text in enumerate(FIVE)]
TEXT_FORMS = {
    "token file of Flickr8k and Flickr30K": [f"{name}#{j}\t{text}" for name, j, text in ROWS],
    "Flickr8k-CN": [f"{name}#zhc#{j} {text}" for name, j, text in ROWS],
    "Kaggle's results.csv": [
        "image_name| comment_number| comment",
        *(f"{name}| {j}| {text}" for name, j, text in ROWS[:-1]),
        f"8.jpg| 4   {FIVE[4]}",
    ],
    "Kaggle's captions.txt": ["image,caption", *(f"{name},{quoted(text)}" for name, _, text in ROWS)],
    "commas that nobody quoted": ["image,caption", *(f"{name},{text}" for name, _, text in ROWS)],
    "caption first": ["caption\timage", *(f"{text}\t{name}" for name, _, text in ROWS)],
}


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_a_text_file_is_read_in_the_form_that_its_first_line_shows(tmp_path, form):
    (tmp_path / "captions.txt").write_bytes(("\ufeff" + "\r\n".join(TEXT_FORMS[form])).encode())
    args = ("--tsv", tmp_path / "captions.txt", "--split", "test", "--out", tmp_path / "o")
    assert f"{tmp_path}/captions.txt: " in ok("captions_to_dataset", *args)
    assert (tmp_path / "o/test_ids.txt").read_text().splitlines() == ["7.jpg", "8.jpg"]
    assert (tmp_path / "o/test_caps.txt").read_text().splitlines() == [*FIVE, *FIVE]


def test_malformed_lines_of_a_table_are_named_and_can_be_skipped(tmp_path):
    lines = ["image,caption"] + [f"{i}.jpg,caption {j}" for i in (7, 8) for j in range(5)]
    lines[7:7] = ['8.jpg,"a quote that does not end', "8.jpg", ",no name"]
    write_lines(tmp_path / "captions.txt", lines)
    args = ("--tsv", tmp_path / "captions.txt", "--split", "test", "--out", tmp_path / "o")
    assert "3 malformed" in fails("captions_to_dataset", *args)
    listed = (tmp_path / "o/caption_problems.txt").read_text().splitlines()
    where = tmp_path / "captions.txt"
    assert listed == [f"{where}, line {n}: malformed: expected: image, caption separated by commas" for n in (8, 9, 10)]
    assert "test: 2 images, 10 captions" in ok("captions_to_dataset", *args, "--skip_bad")


def test_a_split_that_the_source_lacks_is_cut_from_train(tmp_path):
    images = [
        {"filename": f"{i}.jpg", "split": "test" if i > 7 else "train", "sentences": [{"raw": f"{i}"}] * 5}
        for i in range(10)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    args = ("captions_to_dataset", "--karpathy", tmp_path / "k.json", "--out", tmp_path / "o")
    assert "no dev split in the source" in ok(*args)
    ok(*args, "--sizes", "dev=3")
    ids = {split: (tmp_path / f"o/{split}_ids.txt").read_text().split() for split in ("train", "dev", "test")}
    assert ids["test"] == ["8.jpg", "9.jpg"] and len(ids["dev"]) == 3 and len(ids["train"]) == 5
    assert sorted(ids["train"] + ids["dev"]) == [f"{i}.jpg" for i in range(8)]
    assert (tmp_path / "o/dev_caps.txt").read_text().split() == [i[0] for i in ids["dev"] for _ in range(5)]
    assert "8 images do not give train 0, dev 8" in fails(*args, "--sizes", "dev=8")
    assert "the source says which images are test" in fails(*args, "--sizes", "dev=3", "test=1")


def test_two_images_of_one_id_are_refused(tmp_path):
    """Else a.jpg would get the captions of a.png."""
    write_lines(tmp_path / "c", [f"{name}\tcaption {j}" for name in ("b.jpg", "a.jpg", "a.png") for j in range(5)])
    message = fails("captions_to_dataset", "--tsv", tmp_path / "c", "--split", "train", "--out", tmp_path / "o")
    assert f"{tmp_path}/c, line 11: 'a.jpg' and 'a.png' have the same id 'a'" in message
    assert not (tmp_path / "o").exists()
