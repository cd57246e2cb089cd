"""From raw photos to features, and from a folder of images and a captions file to a recall table."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from contextlib import redirect_stdout
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from dataset_commands import ROOT, Calls, command, ok, run_killed
from folders import write_lines
from PIL import Image, ImageDraw
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from lib.errors import InputError
from position import position_grid
from scripts import extract_features
from scripts.features import given_boxes, region_networks
from scripts.features.images import read_image

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "white": (235, 235, 235)}
SMALL = ("--weights", "random", "--detector_weights", "random", "--image_size", 64, "--device", "cpu", "--workers", 2)


def extract(*args):
    """What extract_features.py prints, called in this process."""
    with patch.object(sys, "argv", ["extract_features.py", *map(str, args)]), redirect_stdout(io.StringIO()) as out:
        extract_features.main()
    return out.getvalue()


def draw(path, ground="white", shape="red", size=(96, 64), mode="RGB", **options):
    """An image of a block on a ground."""
    image = Image.new("RGB", size, COLOURS[ground])
    width, height = size
    ImageDraw.Draw(image).rectangle((width // 8, height // 8, width // 3, height // 2), fill=COLOURS[shape])
    image.convert(mode).save(path, **options)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (ground, shape) in enumerate((g, s) for g in COLOURS for s in COLOURS if g != s):
        draw(folder / f"{ground}_{shape}.png", ground, shape, size=(96, 64) if i % 3 else (64, 80))
    return folder


def windows_args(photos, out, *more):
    return ("--images", photos, "--out", out, "--regions", "windows", *SMALL, *more)


def test_windows_become_a_dataset_with_whole_image_features(tmp_path, photos):
    out = extract(*windows_args(photos, tmp_path / "o", "--whole"))
    assert "train: 12 of 12 images" in out
    images, boxes, whole = (np.load(tmp_path / f"o/train_{name}.npy") for name in ("ims", "boxes", "who_ims"))
    assert images.shape == (12, 36, 2048) and images.dtype == np.float32 and whole.shape == (12, 2048)
    assert np.isfinite(images).all() and images.std(0).max() > 0
    names = sorted(path.name for path in photos.iterdir())
    assert (tmp_path / "o/train_ids.txt").read_text().split() == names
    sizes = [Image.open(photos / name).size[::-1] for name in names]
    expected = position_grid(np.stack([region_networks.windows(*size) for size in sizes]), sizes)
    np.testing.assert_allclose(boxes[..., 15:], expected[..., 15:], atol=1e-5)
    assert len(np.unique(images[0], axis=0)) == 36 and (boxes[:, -1, 30] == 1).all()  # the whole image stands last
    before = os.stat(tmp_path / "o/train_ims.npy").st_mtime_ns
    assert "train: there already" in extract(*windows_args(photos, tmp_path / "o", "--whole"))
    assert os.stat(tmp_path / "o/train_ims.npy").st_mtime_ns == before
    with pytest.raises(InputError, match="--overwrite"):
        extract(*windows_args(photos, tmp_path / "o", "--whole", "--float16"))


def test_features_do_not_depend_on_the_batch(tmp_path, photos):
    for size in (1, 5):
        extract(*windows_args(photos, tmp_path / f"o{size}", "--batch_size", size, "--float16"))
    one, five = (np.load(tmp_path / f"o{size}/train_ims.npy").astype(np.float32) for size in (1, 5))
    np.testing.assert_allclose(one, five, rtol=2e-3, atol=1e-3 * np.abs(one).max())


def test_proposals_give_36_regions_and_the_tsv_the_same_dataset(tmp_path, photos):
    for path in sorted(photos.iterdir())[4:]:
        path.unlink()
    args = ("--images", photos, "--out", tmp_path / "o", *SMALL)
    extract(*args)
    images, boxes = (np.load(tmp_path / f"o/train_{name}.npy") for name in ("ims", "boxes"))
    assert images.shape == (4, 36, 2048) and np.isfinite(images).all()
    assert (boxes[..., 30] > 0).all()
    extract(*args, "--tsv", tmp_path / "t.tsv")
    assert "there already" in extract(*args, "--tsv", tmp_path / "t.tsv")
    ids = f"train={tmp_path}/o/train_ids.txt"
    ok("tsv_to_dataset", tmp_path / "t.tsv", "--out", tmp_path / "from_tsv", "--ids", ids)
    np.testing.assert_allclose(np.load(tmp_path / "from_tsv/train_ims.npy"), images, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "from_tsv/train_boxes.npy")[..., 30], boxes[..., 30], atol=1e-4)


def given(photos, out, boxes, *more):
    return ("--images", photos, "--out", out, "--regions", boxes, "--backbone", "resnet50", *SMALL, *more)


def sizes_of(paths):
    return np.array([Image.open(path).size[::-1] for path in paths])


def write_coco(path, paths, boxes, described):
    """COCO JSON of boxes (n, R, 4) in pixels, x1 y1 x2 y2: a list of detections, or an object that describes images."""
    found = [
        {"image_id": i + 1 if described else p.name, "bbox": [x, y, u - x, v - y], "score": 0.9 - 0.01 * r}
        for i, (p, each) in enumerate(zip(paths, boxes.tolist(), strict=True))
        for r, (x, y, u, v) in enumerate(each)
    ]
    sizes = sizes_of(paths).tolist()
    images = [
        {"id": i + 1, "file_name": path.name, "height": height, "width": width}
        for i, (path, (height, width)) in enumerate(zip(paths, sizes, strict=True))
    ]
    found.reverse()  # an image's best stand last: scores decide
    path.write_text(json.dumps({"images": images, "annotations": found} if described else found))


@pytest.mark.parametrize(
    "form", ["shares", "pixels", "pixels_and_sizes", "shares_and_sizes", "detections", "annotations"]
)
def test_windows_given_as_boxes_of_a_file_have_the_features_and_grids_of_windows(tmp_path, photos, form):
    paths = sorted(photos.iterdir())
    sizes = sizes_of(paths)
    boxes = np.stack([region_networks.windows(*size) for size in sizes])
    sides = np.tile(sizes[:, None, ::-1], 2)
    file = tmp_path / ("boxes.json" if form in ("detections", "annotations") else "boxes.npz")
    order = np.random.default_rng(0).permutation(len(paths))  # matched by id, not by place
    ids = np.array([paths[i].name for i in order])
    if form in ("detections", "annotations"):
        write_coco(file, [paths[i] for i in order], boxes[order], form == "annotations")
    elif form == "pixels_and_sizes":  # found on photos twice as large
        np.savez(file, ids=ids, boxes=2 * boxes[order], image_sizes=2 * sizes[order])
    elif form == "shares_and_sizes":
        np.savez(file, ids=ids, boxes=(boxes / sides)[order], image_sizes=sizes[order])
    else:
        np.savez(file, ids=ids, boxes=(boxes / sides if form == "shares" else boxes)[order])
    said = extract(*given(photos, tmp_path / "given", file, "--pixel_boxes"))
    relative = form not in ("pixels", "detections")
    assert f"36 boxes {'from 0 to 1' if relative else 'in pixels'} for each of 12 images" in said
    extract(*windows_args(photos, tmp_path / "windows"))
    for name in ("ims", "boxes"):
        first, second = (np.load(tmp_path / f"{folder}/train_{name}.npy") for folder in ("given", "windows"))
        np.testing.assert_allclose(first[..., -16:], second[..., -16:], rtol=1e-4, atol=1e-4 * np.abs(second).max())
    pixels = np.load(tmp_path / "given/train_pixel_boxes.npy")
    np.testing.assert_allclose(pixels, boxes, atol=1e-3)
    assert "train: there already" in extract(*given(photos, tmp_path / "given", file, "--pixel_boxes"))


def test_any_number_of_boxes_and_images_without_boxes_are_named(tmp_path, photos):
    names = sorted(path.name for path in photos.iterdir())
    boxes = np.tile([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [0.2, 0.3, 1.01, 1.0]], (10, 1, 1))
    np.savez(tmp_path / "boxes.npz", ids=np.array([name.removesuffix(".png") for name in names[2:]]), boxes=boxes)
    args = given(photos, tmp_path / "o", tmp_path / "boxes.npz")
    said = extract(*args)
    assert "train: 10 of 12 images" in said and "3 regions of 2048" in said and "2 without boxes" in said
    assert "10 boxes without area" in said
    listed = (tmp_path / "o/image_problems.txt").read_text()
    assert names[0] in listed and names[1] in listed and names[2] not in listed
    assert (tmp_path / "o/train_ids.txt").read_text().split() == names[2:]
    images = np.load(tmp_path / "o/train_ims.npy")
    assert images.shape == (10, 3, 2048) and not images[:, 1].any() and images[:, [0, 2]].any(-1).all()
    np.savez(tmp_path / "boxes.npz", ids=np.array(names), boxes=np.tile(boxes[:1, :, ::-1] * 0, (12, 1, 1)))
    with pytest.raises(InputError, match="--overwrite"):
        extract(*args)


def test_the_best_36_boxes_of_json_count_and_fewer_are_padded(tmp_path, photos):
    for path in sorted(photos.iterdir())[2:]:
        path.unlink()
    first, second = sorted(path.name for path in photos.iterdir())
    many = [{"image_id": first, "bbox": [i, 1, 5, 5], "score": i / 50} for i in range(50)]
    few = [{"image_id": second, "bbox": [1, 1, 9, 9], "score": 0.5}]
    (tmp_path / "boxes.json").write_text(json.dumps(many + few))
    extract(*given(photos, tmp_path / "o", tmp_path / "boxes.json"))
    boxes = given_boxes.GivenBoxes(str(tmp_path / "boxes.json"))
    assert boxes.n_regions == 36 and boxes.boxes[0, :, 0].tolist() == list(range(49, 13, -1))
    images, grids = (np.load(tmp_path / f"o/train_{name}.npy") for name in ("ims", "boxes"))
    assert images[1, 0].any() and not images[1, 1:].any()
    assert (grids[1, 1:, :15] == 256).all() and not grids[1, 1:, 15:].any()


def test_boxes_that_do_not_fit_are_one_line(tmp_path, photos):
    names = np.array(sorted(path.name for path in photos.iterdir()))
    boxes = np.tile([0.1, 0.1, 0.6, 0.6], (12, 2, 1))
    reversed_one, nan = boxes.copy(), boxes.copy()
    reversed_one[3, 1], nan[3, 1] = (0.6, 0.1, 0.1, 0.6), np.nan
    for arrays, said in (
        ({"boxes": boxes}, "holds boxes without ids, expected ids and boxes"),
        ({"ids": names[:5], "boxes": boxes}, r"ids \(5,\) of .*, expected \(12,\)"),
        ({"ids": names, "boxes": boxes[:, 0]}, r"boxes \(12, 4\), expected \(n, R, 4\)"),
        ({"ids": np.repeat(names[:6], 2), "boxes": boxes}, "stands in rows 0 and 1"),
        ({"ids": names, "boxes": reversed_one}, f"image 3 .id '{names[3]}'., box 1: .*corners are reversed"),
        ({"ids": names, "boxes": nan}, "box 1: .*corners must be numbers"),
        ({"ids": names, "boxes": boxes.astype("U3")}, "boxes are <U3, expected numbers"),
        ({"ids": names.astype(object), "boxes": boxes}, "not an .npz file of names and numbers"),
        ({"ids": names, "boxes": boxes, "image_sizes": np.zeros((12, 2))}, "expected positive numbers"),
        ({"ids": names, "boxes": 90 * boxes, "image_sizes": np.full((12, 2), 30)}, "expected sizes in the pixels"),
        ({"ids": np.char.add("x", names), "boxes": boxes}, "boxes of none of the 12 images of train"),
        ({"ids": names, "boxes": 1000 * boxes}, "none of the 12 images could be used"),
    ):
        np.savez(tmp_path / "boxes.npz", **arrays)
        with pytest.raises(InputError, match=said):
            extract(*given(photos, tmp_path / "o", tmp_path / "boxes.npz"))
    assert "boxes of another size" in (tmp_path / "o/image_problems.txt").read_text()
    (tmp_path / "boxes.json").write_text('[{"bbox": [0, 0, 1, 1]}]')
    with pytest.raises(InputError, match="detection 0: .* expected an object with image_id"):
        extract(*given(photos, tmp_path / "o", tmp_path / "boxes.json"))
    with pytest.raises(InputError, match="no.npz: no such file, expected proposals, windows, or an .npz or .json file"):
        extract(*given(photos, tmp_path / "o", tmp_path / "no.npz"))
    assert not list((tmp_path / "o").glob("*.npy"))


def test_the_best_boxes_differ_and_are_filled_up():
    torch.manual_seed(0)
    corner = torch.rand(50, 2) * 50
    boxes = torch.cat([corner, corner + 20], 1)
    twice = torch.cat([boxes, boxes + 0.1])
    scores = torch.cat([torch.linspace(1, 0.5, 50), torch.linspace(0.4, 0.3, 50)])
    best = region_networks.best_boxes(twice, scores, (100, 100))
    assert best.shape == (36, 4)
    few = region_networks.best_boxes(boxes[:3], scores[:3], (100, 100))
    assert torch.equal(few[:3].sort(0)[0], boxes[:3].sort(0)[0])
    np.testing.assert_array_equal(few[3:].numpy(), region_networks.windows(100, 100)[:33])


def test_weights_may_come_from_a_file_as_published_ones_are_stored(tmp_path):
    torch.manual_seed(1)
    network = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "detector.pth")
    loaded = region_networks._torchvision(detection.fasterrcnn_resnet50_fpn, str(tmp_path / "detector.pth"), "COCO_V1")
    for name, value in loaded.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, state[name])
    with pytest.raises(InputError, match="not the weights of resnet50"):
        region_networks.load_backbone("resnet50", str(tmp_path / "detector.pth"))
    with pytest.raises(InputError, match="no such file"):
        region_networks.load_backbone("resnet50", str(tmp_path / "nothing.pth"))


def test_greyscale_palette_cmyk_16_bit_and_transparent_images_are_read(tmp_path):
    for mode in ("L", "P", "CMYK", "1", "LA", "RGBA"):
        path = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
        draw(path, "green", "white", mode=mode)
        pixels, size = read_image(path, 64, 96)
        assert pixels.shape == (64, 96, 3) and size == (64, 96)
        if mode in ("P", "CMYK", "RGBA"):
            apart = np.abs(pixels[50, 80].astype(int) - COLOURS["green"]).max()
            assert apart < (48 if mode == "P" else 12), mode  # a palette has few colours
    Image.fromarray(np.full((64, 96), 51400, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", 64, 96)[0] == 200).all()
    Image.new("RGBA", (96, 64), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 64, 96)[0] == 255).all()


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
def test_a_broken_exif_block_counts_for_none(tmp_path, name):
    draw(tmp_path / name, exif=b"Exif\0\0 not a block of EXIF", size=(96, 64))
    pixels, size = read_image(tmp_path / name, 64, 96)
    assert pixels.shape == (64, 96, 3) and size == (64, 96)


def test_exif_orientation_turns_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    draw(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels, size = read_image(tmp_path / "turned.jpg", 64, 96)
    assert size == (96, 64) and pixels.shape == (96, 64, 3)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 100)
    rows, columns = np.nonzero(red)
    assert rows.mean() < 48 and columns.mean() > 32  # the block was top left, and is top right now


def test_unreadable_and_absent_images_are_named_and_skipped_with_their_captions(tmp_path, photos):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    whole = (photos / "red_blue.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("not an image")
    out = tmp_path / "o"
    out.mkdir()
    ids = ["red_blue.png", "broken.jpg", "cut.png", "nowhere.png", "blue_red"]
    write_lines(out / "dev_ids.txt", ids)
    write_lines(out / "dev_caps.txt", [f"{name} {j}" for name in ids for j in range(5)])
    said = extract(*windows_args(photos, out))
    assert "dev: 2 of 5" in said and "2 unreadable" in said and "1 missing" in said
    listed = (out / "image_problems.txt").read_text()
    assert all(name in listed for name in ("broken.jpg", "cut.png", "nowhere.png"))
    assert (out / "dev_ids.txt").read_text().split() == ["red_blue.png", "blue_red"]
    assert (out / "dev_caps.txt").read_text().splitlines() == [
        f"{n} {j}" for n in ("red_blue.png", "blue_red") for j in range(5)
    ]
    assert np.load(out / "dev_ims.npy").shape == (2, 36, 2048)


def test_features_that_float16_cannot_hold_are_named_and_left_out(tmp_path, photos):
    real = extract_features.extract

    def large(pixels, sizes, *more):
        features, boxes, wholes = real(pixels, sizes, *more)
        return features * (1e9 if sizes[0][0] > 64 else 1), boxes, wholes

    with patch.object(extract_features, "extract", large):
        said = extract(*windows_args(photos, tmp_path / "o", "--float16"))
    assert "train: 8 of 12 images" in said and "4 malformed" in said
    assert "a feature is too large for float16" in (tmp_path / "o/image_problems.txt").read_text()


def test_images_that_were_changed_are_not_taken_for_those_of_the_features(tmp_path, photos):
    args = windows_args(photos, tmp_path / "o")
    extract(*args)
    draw(photos / "white_red.png", "blue", "red")
    with pytest.raises(InputError, match="train_ims.npy: there already, and made otherwise; --overwrite"):
        extract(*args)
    (photos / "white_red.png").unlink()  # images may go once their features are there
    assert "train: 12" not in extract(*args, "--ids", f"train={tmp_path}/o/train_ids.txt")


def test_a_killed_run_goes_on_where_it_was(tmp_path, photos):
    run_killed("extract_features", 7, *windows_args(photos, tmp_path / "o", "--batch_size", 2))
    assert all(path.name.endswith(".part") for path in (tmp_path / "o").iterdir())
    extract(*windows_args(photos, tmp_path / "o", "--batch_size", 2))
    extract(*windows_args(photos, tmp_path / "at_once", "--batch_size", 2))
    first, second = (np.load(tmp_path / f"{name}/train_ims.npy") for name in ("o", "at_once"))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5 * np.abs(first).max())
    assert (tmp_path / "o/train_ids.txt").read_text() == (tmp_path / "at_once/train_ids.txt").read_text()


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "efficientnet_lite2"])
def test_the_packaged_backbone_needs_no_download(tmp_path, photos, backbone):
    flags = ["--regions", "windows", "--backbone", backbone, "--image_size", 64, "--device", "cpu"]
    extract("--images", photos, "--out", tmp_path / "o", *flags)
    images = np.load(tmp_path / "o/train_ims.npy")
    assert images.shape == (12, 36, 1280) and np.isfinite(images).all()
    assert len(np.unique(images[:, -1], axis=0)) == 12  # no two photos are alike as a whole


def test_the_first_boxes_and_the_largest_windows_may_be_the_regions(tmp_path, photos):
    boxes = np.random.default_rng(0).random((12, 9, 2)) / 3
    names = sorted(path.name for path in photos.iterdir())
    np.savez(tmp_path / "boxes.npz", ids=np.array(names), boxes=np.concatenate([boxes, boxes + 0.5], 2))
    args = ["--images", photos, "--backbone", "efficientnet_lite0", "--weights", "random", "--image_size", 64]
    args += ["--device", "cpu", "--pixel_boxes"]
    extract(*args, "--regions", tmp_path / "boxes.npz", "--out", tmp_path / "all")
    extract(*args, "--regions", "windows", "--out", tmp_path / "windows")
    more = ["--boxes", 4, "--windows", 10, "--whole_region"]
    extract(*args, "--regions", tmp_path / "boxes.npz", *more, "--out", tmp_path / "some")
    for name in ("train_ims.npy", "train_boxes.npy", "train_pixel_boxes.npy"):
        given, windows, some = (np.load(tmp_path / folder / name) for folder in ("all", "windows", "some"))
        np.testing.assert_allclose(some[:, :4], given[:, :4], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(some[:, 4:14], windows[:, 25:35], rtol=1e-4, atol=1e-6)
        assert some.shape[1] == 15


def test_the_whole_image_may_be_one_more_region(tmp_path, photos):
    boxes = np.tile(np.array([0.2, 0.2, 0.6, 0.7], dtype=np.float32), (12, 5, 1))
    names = sorted(path.name for path in photos.iterdir())
    np.savez(tmp_path / "boxes.npz", ids=np.array(names), boxes=boxes)
    args = ["--images", photos, "--regions", tmp_path / "boxes.npz", "--backbone", "efficientnet_lite0"]
    args += ["--image_size", 64, "--device", "cpu", "--whole", "--pixel_boxes"]
    extract(*args, "--out", tmp_path / "six", "--whole_region")
    extract(*args, "--out", tmp_path / "five")
    six, five, wholes, grids, corners = (
        np.load(tmp_path / name)
        for name in (
            *("six/train_ims.npy", "five/train_ims.npy", "six/train_who_ims.npy"),
            *("six/train_boxes.npy", "six/train_pixel_boxes.npy"),
        )
    )
    assert six.shape == (12, 6, 1280)
    np.testing.assert_array_equal(six[:, :5], five)
    np.testing.assert_array_equal(six[:, 5], wholes)
    assert (grids[:, 5, -1] == 1).all() and (grids[:, :5, -1] < 1).all()  # the share of the image that a box covers
    for name, corner in zip(names, corners[:, 5], strict=True):
        with Image.open(photos / name) as image:
            assert corner.tolist() == [0, 0, *image.size]


PEAK = """
import runpy, sys
runpy.run_path(sys.argv.pop(1), run_name="__main__")
print(open("/proc/self/status").read())  # getrusage's peak would count the process that started this one
"""


def test_proposals_of_full_size_take_less_than_1_4_gigabytes(tmp_path, photos):
    for path in sorted(photos.iterdir())[2:]:
        path.unlink()
    draw(photos / "long.png", size=(1000, 600))
    flags = ["--detector_weights", "random", "--device", "cpu"]
    args = (ROOT / "scripts/extract_features.py", "--images", photos, "--out", tmp_path / "o", *flags)
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024 < 1.4e9


def test_a_tsv_of_other_settings_is_not_gone_on_with(tmp_path, photos):
    args = windows_args(photos, tmp_path / "o", "--tsv", tmp_path / "t.tsv")
    real = extract_features.extract
    calls = []

    def dies(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    with patch.object(extract_features, "extract", dies), pytest.raises(KeyboardInterrupt):
        extract(*args)
    assert not (tmp_path / "t.tsv").exists()
    extract(*args, "--seed", 1)
    with patch.object(extract_features, "extract", dies):
        assert "there already" in extract(*args, "--seed", 1)
        with pytest.raises(InputError, match="t.tsv: there already, and made otherwise; --overwrite"):
            extract(*args)
        (tmp_path / "t.tsv.made.json").unlink()
        assert "kept, though there is no record" in extract(*args)
        assert len(calls) == 5
        (tmp_path / "t.tsv").rename(tmp_path / "seed1.tsv")
        extract(*args)
    assert len(calls) == 5 + 8  # 4 of the 12 photos lay in the stopped run's file
    one, other = ((tmp_path / f"{name}.tsv").read_text().splitlines() for name in ("t", "seed1"))
    assert {line.split("\t")[0] for line in one} == {line.split("\t")[0] for line in other} and len(one) == 12
    assert not set(one) & set(other)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d, FrozenBatchNorm2d])
def test_folded_norms_give_the_same_maps(norm):
    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None, norm_layer=norm).eval()
    for module in network.modules():
        if isinstance(module, norm):
            for name, value in module.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape) + (0.5 if name in ("weight", "running_var") else -0.5))
    images = torch.rand(2, 3, 64, 96)
    body = torch.nn.Sequential(*list(network.children())[:-2])
    with torch.no_grad():
        expected = body(images)
        found = region_networks.fold_norms(body)(images)
    assert not [module for module in body.modules() if isinstance(module, norm)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_weights_that_would_run_code_are_refused_and_run_none(tmp_path, photos):
    torch.save({"model": Calls(open, str(tmp_path / "ran"), "w")}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Calls(open, str(tmp_path / "ran"), "w"), protocol=4))
    for name, says in (("zip.pth", "refused, it names io.open"), ("plain.pth", "refused|not a file of weights")):
        for more in (("--weights", tmp_path / name), ("--regions", "proposals", "--detector_weights", tmp_path / name)):
            with pytest.raises(InputError, match=f"{name}: not the weights of .*({says})"):
                extract(*windows_args(photos, tmp_path / "o", *more))
    done = command("extract_features", *windows_args(photos, tmp_path / "o", "--weights", tmp_path / "plain.pth"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "o").iterdir())


def test_images_none_of_which_can_be_read_leave_no_file(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    for more in ((), ("--tsv", tmp_path / "t.tsv")):
        with pytest.raises(InputError, match="none of the 1 images could be used"):
            extract(*windows_args(tmp_path / "broken", tmp_path / "o", *more))
    assert not (tmp_path / "t.tsv").exists() and not list((tmp_path / "o").glob("*.npy"))


def test_what_does_not_fit_is_one_line(tmp_path, photos):
    (tmp_path / "empty").touch()
    (tmp_path / "text.txt").write_text("no image, no weights\n")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    for args, said in (
        ((tmp_path / "no", tmp_path / "o"), "no such folder"),
        ((photos, tmp_path / "o", "--backbone", "detector"), "--regions windows has no detector"),
        ((photos, tmp_path / "o", "--whole_region"), "--whole_region: the last of the windows is the whole image"),
        ((photos, tmp_path / "o", "--windows", 3), "--boxes and --windows: go with a file of boxes"),
        ((photos, tmp_path / "o", "--tsv", tmp_path / "no/t.tsv"), "No such file"),
        ((photos, tmp_path / "o", "--weights", tmp_path / "no.pth"), "no such file"),
        ((tmp_path / "text.txt", tmp_path / "o"), "text.txt: is no folder"),
        ((photos, tmp_path / "o", "--weights", tmp_path / "empty"), "empty: not the weights of resnet50"),
        ((photos, tmp_path / "o", "--weights", tmp_path / "text.txt"), "text.txt: not the weights of resnet50"),
        ((photos, tmp_path / "o", "--weights", tmp_path / "list.pth"), "list.pth: .*a list, expected a dict"),
        ((photos, tmp_path / "o", "--weights", tmp_path / "shape.pth"), "shape.pth: not .*size mismatch for conv1"),
        ((photos, tmp_path / "o", "--image_size", 0), "--image_size 0: expected at least 32"),
        ((photos, tmp_path / "o", "--seed", 2**64), "--seed 18446744073709551616: expected"),
        ((photos, tmp_path / "empty"), "empty: is no folder"),
        ((photos, tmp_path / "o", "--tsv", photos), "photos: is no file"),
        ((photos, tmp_path / "o", "--device", "nonsense"), "--device nonsense"),
        ((photos, tmp_path / "o", "--batch_size", 0), "--batch_size 0"),
    ):
        with pytest.raises((InputError, OSError), match=said):
            extract(*windows_args(*args))
    done = command("extract_features", *windows_args(tmp_path / "no", tmp_path / "o"))
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path}/no: no such folder, expected one of images"


def test_from_images_and_captions_to_a_recall_table(tmp_path, photos):
    """The worked example of docs/data.md with random weights at tiny sizes."""
    lines = []
    for path in sorted(photos.iterdir()):
        ground, shape = path.stem.split("_")
        lines += [f"{path.name}\tA {shape} block on a {ground} ground {word} ." for word in ("here", "there")]
    write_lines(tmp_path / "captions.tsv", lines)
    out, runs = tmp_path / "data/mine", tmp_path / "runs"
    paths = ("--data_path", tmp_path / "data", "--data_name", "mine", "--vocab_path", tmp_path / "vocab")
    sizes = "--captions_per_image 2 --sizes dev=2 test=3".split()
    ok("captions_to_dataset", "--tsv", tmp_path / "captions.tsv", *sizes, "--out", out)
    extract("--images", photos, "--out", out, *SMALL)
    ok("vocab", *paths, "--threshold", 1)
    ok("check_data", out, "--vocab_path", tmp_path / "vocab")
    flags = (
        "--img_dim 2048 --embed_size 16 --word_dim 8 --num_epochs 1 --batch_size 4 --workers 0 --max_violation --bi_gru"
    )
    flags += " --agg_func Mean --device cpu --model_name"
    ok("train", *paths, *flags.split(), runs, "--logger_name", runs)
    table = ok("evaluation", "--model_path", runs / "model_best.pth.tar", "--split", "test", "--device", "cpu")
    assert "Images: 3, Captions: 6" in table and re.search(r"Image to text: [\d.]+ [\d.]+ [\d.]+ ", table)
