"""The demo dataset: f30k_precomp's files, features from pixels alone, true captions, the same bytes for a seed."""

import json
import re

import numpy as np
import pytest
from dataset_commands import command
from PIL import Image

from position import position_grid
from scripts.demo import regions, scenes, sentences

COUNTS = {"train": 24, "dev": 8, "test": 12}


def make(path, *flags):
    counts = [word for split, n in COUNTS.items() for word in (f"--{split}", n)]
    return command("demo/make_demo_data", "--data_path", path, "--data_name", "d", *counts, *flags)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo")
    result = make(path, "--workers", "1")
    assert result.returncode == 0, result.stderr
    return path / "d"


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def scenes_of(made, split):
    return json.loads((made / f"{split}_scenes.json").read_text())


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_have_the_format_of_f30k_precomp(made, split):
    n = COUNTS[split]
    features, grids = np.load(made / f"{split}_ims.npy"), np.load(made / f"{split}_boxes.npy")
    boxes = np.load(made / f"{split}_pixel_boxes.npy")
    assert (features.dtype, features.shape) == (np.float32, (n, 36, regions.IMG_DIM))
    assert (boxes[..., :2] >= 0).all() and (boxes[..., 2:] <= (scenes.WIDTH, scenes.HEIGHT)).all()
    np.testing.assert_array_equal(grids, position_grid(boxes, np.tile([scenes.HEIGHT, scenes.WIDTH], (n, 1))))
    captions, ids = lines(made / f"{split}_caps.txt"), lines(made / f"{split}_ids.txt")
    assert len(captions) == 5 * n and all(captions)
    assert all(len(set(captions[i : i + 5])) == 5 for i in range(0, 5 * n, 5))
    assert ids == [scene["id"] for scene in scenes_of(made, split)]
    images = {path.stem for path in made.glob(f"{split}_images/*.png")}
    assert images == (set() if split == "train" else {*ids})


def test_features_are_those_of_the_images_pixels(made):
    features, boxes = np.load(made / "test_ims.npy"), np.load(made / "test_pixel_boxes.npy")
    for i, name in enumerate(lines(made / "test_ids.txt")):
        image = np.asarray(Image.open(made / "test_images" / f"{name}.png"))
        assert image.shape == (scenes.HEIGHT, scenes.WIDTH, 3)
        np.testing.assert_array_equal(regions.region_features(image, boxes[i]), features[i])
    assert (features >= 0).all() and np.isfinite(features).all()


def test_a_feature_does_not_know_where_its_crop_lies():
    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
    image = rng.integers(0, 256, (scenes.HEIGHT, scenes.WIDTH, 3), dtype=np.uint8)
    corners = [(0, 0), (100, 120), (scenes.WIDTH - 40, scenes.HEIGHT - 50)]
    for x, y in corners:
        image[y : y + 50, x : x + 40] = crop
    first, *others = regions.region_features(image, [(x, y, x + 40, y + 50) for x, y in corners])
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_a_seed_gives_the_same_bytes_with_any_number_of_processes_and_after_a_larger_run(made, tmp_path):
    assert make(tmp_path, "--test", "15", "--seed", "1").returncode == 0
    larger = contents(tmp_path / "d")
    assert {name for name, data in contents(made).items() if larger[name] == data} == {"train_ids.txt", "dev_ids.txt"}
    (tmp_path / "d/test_images/mine.jpg").write_bytes(b"")
    assert make(tmp_path, "--workers", "3").returncode == 0
    (tmp_path / "d/test_images/mine.jpg").unlink()
    assert contents(tmp_path / "d") == contents(made)


def test_groups_show_the_same_shapes_in_different_places(made):
    groups = {}
    for scene in scenes_of(made, "test"):
        groups.setdefault(scene["group"], []).append(scene)
    assert [len(group) for group in groups.values()] == [5, 5, 2]
    for group in groups.values():
        shown = {tuple((o["colour"], o["kind"], o["size"], *o["rgb"]) for o in s["objects"]) for s in group}
        assert len(shown) == len({(s["background"], s["lightness"]) for s in group}) == 1
        placed = {tuple(tuple(o["place"]) for o in s["objects"]) for s in group}
        assert len(placed) == len(group)
    mirrored = [(g[0], s) for g in groups.values() for s in g if s["arrangement"] == "mirror"]
    assert mirrored
    for first, mirror in mirrored:
        for a, b in zip(first["objects"], mirror["objects"], strict=True):
            assert b["centre"] == [scenes.WIDTH - a["centre"][0], a["centre"][1]]


WORDS = {
    "colour": {w: names[0] for names in scenes.COLOURS for w in names},
    "kind": {w: names[0] for names in scenes.KINDS for w in names},
    "size": {w: names[0] for names in scenes.SIZES for w in names},
}
PLACES = {text: list(place) for place, texts in sentences.PLACES.items() for text in texts}
RELATIONS = {text: relation for relation, texts in sentences.RELATIONS.items() for text in texts}


def any_of(texts):
    return f"(?:{'|'.join(sorted(texts, key=len, reverse=True))})"


NOUN = rf"(?:an?|the) (?:{any_of(WORDS['size'])} )?{any_of(WORDS['colour'])} \w+"
PLACE, VERB = any_of(PLACES), any_of(sentences.VERBS)


def check_caption(text, scene):
    """Assert that each shape named is in the scene, where and as the caption says. Returns how many claims it makes."""
    text = text.lower()

    def find(noun):
        said = {what: names[w] for w in noun.split() for what, names in WORDS.items() if w in names}
        (found,) = (o for o in scene["objects"] if all(o[what] == name for what, name in said.items()))
        return found

    placed = re.findall(f"({NOUN}) (?:{VERB} )?({PLACE})", text)
    placed += [pair[::-1] for pair in re.findall(f"^({PLACE}) (?:there is|is|we see) ({NOUN})", text)]
    for noun, place in placed:
        assert find(noun)["place"] == PLACES[place], text
    related = re.findall(f"({NOUN}) {PLACE} {VERB} ({any_of(RELATIONS)}) ({NOUN})", text)
    for first, relation, second in related:
        (ax, ay), (bx, by) = find(first)["centre"], find(second)["centre"]
        across = "left" if ax < bx else "right"
        assert RELATIONS[relation] == (across if abs(ax - bx) > abs(ay - by) else "above" if ay < by else "below"), text
    return len(placed) + len(related)


def test_captions_are_true(made):
    captions, shown = lines(made / "train_caps.txt"), np.repeat(scenes_of(made, "train"), 5)
    claims = {check_caption(text, scene) for text, scene in zip(captions, shown, strict=True)}
    assert claims == {3}  # every caption says three times where something is
    assert all(re.fullmatch(r"[A-Z][a-z, ]+\.", text) for text in captions)


@pytest.mark.parametrize("flag, value", [("--test", "0"), ("--seed", "-1"), ("--data_path", __file__)])
def test_bad_flags_give_one_line_and_status_2(tmp_path, flag, value):
    result = make(tmp_path / "no", flag, value)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert (value if value == __file__ else flag) in result.stderr and not (tmp_path / "no").exists()


def test_other_peoples_features_are_not_overwritten(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "test_ims.npy").write_bytes(b"hours of work")
    result = make(tmp_path)
    assert result.returncode == 2 and "test_ims.npy" in result.stderr and result.stderr.count("\n") == 1
    assert contents(tmp_path / "d") == {"test_ims.npy": b"hours of work"}
