"""From raw photos to features; tests/test_flickr8k.py has the way from images and captions to a recall table."""

import json
import os
import pickle
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from dataset_commands import Calls, coco, fails, ok, run_killed, tool
from folders import write_lines
from PIL import Image, ImageDraw
from torchvision.ops import FrozenBatchNorm2d

from position import position_grid
from scripts import extract_features
from scripts.features import given_boxes, region_networks
from scripts.features.images import read_image

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "white": (235, 235, 235)}
SMALL = ("--image_size", 64, "--device", "cpu", "--workers", 2)
LITE = ("--backbone", "efficientnet_lite0", *SMALL)  # whose weights lie in a package
D = 1280


def extract(*args):
    """What extract_features.py prints, called in this process."""
    return ok("extract_features", *args)


def refused(*args):
    """Its one line where it refuses what it is given."""
    return fails("extract_features", *args)


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
    return given(photos, out, "windows", *more)


def given(photos, out, boxes, *more):
    return ("--images", photos, "--out", out, "--regions", boxes, *LITE, *more)


def test_windows_become_a_dataset_with_whole_image_features(tmp_path, photos):
    out = extract(*windows_args(photos, tmp_path / "o", "--whole"))
    assert "train: 12 of 12 images" in out
    images, boxes, whole = (np.load(tmp_path / f"o/train_{name}.npy") for name in ("ims", "boxes", "who_ims"))
    assert images.shape == (12, 36, D) and images.dtype == np.float32 and whole.shape == (12, D)
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
    assert "--overwrite" in refused(*windows_args(photos, tmp_path / "o", "--whole", "--float16"))


def test_proposals_give_36_regions_and_the_tsv_the_same_dataset(tmp_path, photos):
    for path in sorted(photos.iterdir())[2:]:
        path.unlink()
    args = ("--images", photos, "--out", tmp_path / "o", "--detector_weights", "random", *SMALL)
    extract(*args)
    images, boxes = (np.load(tmp_path / f"o/train_{name}.npy") for name in ("ims", "boxes"))
    assert images.shape == (2, 36, 2048) and np.isfinite(images).all()
    assert (boxes[..., 30] > 0).all()
    extract(*args, "--tsv", tmp_path / "t.tsv")
    ids = f"train={tmp_path}/o/train_ids.txt"
    ok("tsv_to_dataset", tmp_path / "t.tsv", "--out", tmp_path / "from_tsv", "--ids", ids)
    np.testing.assert_allclose(np.load(tmp_path / "from_tsv/train_ims.npy"), images, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "from_tsv/train_boxes.npy")[..., 30], boxes[..., 30], atol=1e-4)


@pytest.mark.parametrize("form", ["pixels", "pixels_and_sizes", "annotations"])
def test_windows_given_as_boxes_of_a_file_have_the_features_and_grids_of_windows(tmp_path, photos, form):
    paths = sorted(photos.iterdir())[::-1]  # matched by id, not by place
    ids, sizes = [path.name for path in paths], np.array([Image.open(path).size[::-1] for path in paths])
    boxes = np.stack([region_networks.windows(*size) for size in sizes])
    file = tmp_path / ("boxes.json" if form == "annotations" else "boxes.npz")
    if form == "annotations":
        value = json.loads(coco(file, boxes, sizes, range(12)).read_text())
        for image, name in zip(value["images"], ids, strict=True):
            image["file_name"] = name
        found = [{**item, "score": -i} for i, item in enumerate(value["annotations"])]
        file.write_text(json.dumps({**value, "annotations": found[::-1]}))  # the best stand last: scores decide
    elif form == "pixels_and_sizes":  # found on photos twice as large
        np.savez(file, ids=ids, boxes=2 * boxes, image_sizes=2 * sizes)
    else:
        np.savez(file, ids=ids, boxes=boxes)
    said = extract(*given(photos, tmp_path / "given", file, "--pixel_boxes"))
    assert f"36 boxes {'in pixels' if form == 'pixels' else 'from 0 to 1'} for each of 12 images" in said
    extract(*windows_args(photos, tmp_path / "windows"))
    for name in ("ims", "boxes"):
        first, second = (np.load(tmp_path / f"{folder}/train_{name}.npy") for folder in ("given", "windows"))
        np.testing.assert_allclose(first[..., -16:], second[..., -16:], rtol=1e-4, atol=1e-4 * np.abs(second).max())
    np.testing.assert_allclose(np.load(tmp_path / "given/train_pixel_boxes.npy"), boxes[::-1], atol=1e-3)
    assert "train: there already" in extract(*given(photos, tmp_path / "given", file, "--pixel_boxes"))


def test_any_number_of_boxes_and_images_without_boxes_are_named(tmp_path, photos):
    names = sorted(path.name for path in photos.iterdir())
    boxes = np.tile([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0], [0.2, 0.3, 1.01, 1.0]], (10, 1, 1))
    np.savez(tmp_path / "boxes.npz", ids=np.array([name.removesuffix(".png") for name in names[2:]]), boxes=boxes)
    args = given(photos, tmp_path / "o", tmp_path / "boxes.npz")
    said = extract(*args)
    assert "train: 10 of 12 images" in said and "3 regions of 1280" in said and "2 without boxes" in said
    assert "10 boxes without area" in said
    listed = (tmp_path / "o/image_problems.txt").read_text()
    assert names[0] in listed and names[1] in listed and names[2] not in listed
    assert (tmp_path / "o/train_ids.txt").read_text().split() == names[2:]
    images = np.load(tmp_path / "o/train_ims.npy")
    assert images.shape == (10, 3, D) and not images[:, 1].any() and images[:, [0, 2]].any(-1).all()
    np.savez(tmp_path / "boxes.npz", ids=np.array(names), boxes=np.tile(boxes[:1, :, ::-1] * 0, (12, 1, 1)))
    assert "--overwrite" in refused(*args)


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
    reversed_one = boxes.copy()
    reversed_one[3, 1] = 0.6, 0.1, 0.1, 0.6
    for arrays, said in (
        ({"boxes": boxes}, "holds boxes without ids, expected ids and boxes"),
        ({"ids": names[:5], "boxes": boxes}, r"ids \(5,\) of .*, expected \(12,\)"),
        ({"ids": np.repeat(names[:6], 2), "boxes": boxes}, "stands in rows 0 and 1"),
        ({"ids": names, "boxes": reversed_one}, f"image 3 .id '{names[3]}'., box 1: .*corners are reversed"),
        ({"ids": names.astype(object), "boxes": boxes}, "expected an array of names or numbers"),
        ({"ids": names, "boxes": 90 * boxes, "image_sizes": np.full((12, 2), 30)}, "reach well outside"),
        ({"ids": np.char.add("x", names), "boxes": boxes}, "boxes of none of the 12 images of train"),
        ({"ids": names, "boxes": 1000 * boxes}, "none of the 12 images could be used"),
    ):
        np.savez(tmp_path / "boxes.npz", **arrays)
        assert re.search(said, refused(*given(photos, tmp_path / "o", tmp_path / "boxes.npz")))
    assert "boxes of another size" in (tmp_path / "o/image_problems.txt").read_text()
    (tmp_path / "boxes.json").write_text('[{"bbox": [0, 0, 1, 1]}]')
    message = refused(*given(photos, tmp_path / "o", tmp_path / "boxes.json"))
    assert "detection 0: found " in message and "missing required field `image_id`" in message
    message = refused(*given(photos, tmp_path / "o", tmp_path / "no.npz"))
    assert "no.npz: no such file, expected proposals, windows, or an .npz or .json file" in message
    assert not list((tmp_path / "o").glob("*.npy"))


def test_the_best_boxes_differ_and_windows_follow():
    torch.manual_seed(0)
    corner = torch.rand(50, 2) * 50
    boxes = torch.cat([corner, corner + 20], 1)
    twice = torch.cat([boxes, boxes + 0.1])
    scores = torch.cat([torch.linspace(1, 0.5, 50), torch.linspace(0.4, 0.3, 50)])
    best = region_networks.best_boxes(twice, scores, (100, 100))
    assert best.shape == (36, 4) and torch.equal(best[0], boxes[0]) and not torch.isin(boxes[:1] + 0.1, best).all()
    few = region_networks.best_boxes(boxes[:1], scores[:1], (100, 100))
    np.testing.assert_array_equal(few.numpy(), [boxes[0].numpy(), *region_networks.windows(100, 100)[:35]])


def test_weights_may_come_from_a_file_as_published_ones_are_stored(tmp_path):
    network = torchvision.models.resnet50(weights=None)
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "resnet50.pth")
    loaded = region_networks._torchvision("resnet50", str(tmp_path / "resnet50.pth"), "")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


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


def test_a_broken_exif_block_counts_for_none(tmp_path):
    draw(tmp_path / "x.jpg", exif=b"Exif\0\0 not a block of EXIF", size=(96, 64))
    pixels, size = read_image(tmp_path / "x.jpg", 64, 96)
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
    assert np.load(out / "dev_ims.npy").shape == (2, 36, D)


def test_features_that_float16_cannot_hold_are_named_and_left_out(tmp_path, photos):
    real = extract_features.Extractor.extract

    def large(extractor, pixels, sizes, boxes):
        features, boxes, wholes = real(extractor, pixels, sizes, boxes)
        return features * (1e9 if sizes[0][0] > 64 else 1), boxes, wholes

    with patch.object(extract_features.Extractor, "extract", large):
        said = extract(*windows_args(photos, tmp_path / "o", "--float16"))
    assert "train: 8 of 12 images" in said and "4 malformed" in said
    assert "a feature is too large for float16" in (tmp_path / "o/image_problems.txt").read_text()


def test_images_that_were_changed_are_not_taken_for_those_of_the_features(tmp_path, photos):
    args = windows_args(photos, tmp_path / "o")
    extract(*args)
    draw(photos / "white_red.png", "blue", "red")
    assert "train_ims.npy: there already, and made otherwise; --overwrite" in refused(*args)
    (photos / "white_red.png").unlink()  # images may go once their features are there
    assert "train: 12" not in extract(*args, "--ids", f"train={tmp_path}/o/train_ids.txt")


def test_a_killed_run_goes_on_where_it_was_and_features_do_not_depend_on_the_batch(tmp_path, photos):
    run_killed("extract_features", 7, *windows_args(photos, tmp_path / "o", "--batch_size", 2))
    assert all(path.name.endswith(".part") for path in (tmp_path / "o").iterdir())
    extract(*windows_args(photos, tmp_path / "o", "--batch_size", 2))
    extract(*windows_args(photos, tmp_path / "at_once", "--batch_size", 5))
    first, second = (np.load(tmp_path / f"{name}/train_ims.npy") for name in ("o", "at_once"))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5 * np.abs(first).max())
    assert (tmp_path / "o/train_ids.txt").read_text() == (tmp_path / "at_once/train_ids.txt").read_text()


def test_the_first_boxes_the_largest_windows_and_the_whole_image_may_be_the_regions(tmp_path, photos):
    boxes = np.random.default_rng(0).random((12, 9, 2)) / 3
    names = sorted(path.name for path in photos.iterdir())
    np.savez(tmp_path / "boxes.npz", ids=np.array(names), boxes=np.concatenate([boxes, boxes + 0.5], 2))
    alike = ["--backbone", "efficientnet_lite2", "--pixel_boxes"]  # the larger packaged one
    more = ["--boxes", 4, "--windows", 10, "--whole_region", "--whole"]
    extract(*given(photos, tmp_path / "all", tmp_path / "boxes.npz", *alike))
    extract(*windows_args(photos, tmp_path / "windows", *alike))
    extract(*given(photos, tmp_path / "some", tmp_path / "boxes.npz", *alike, *more))
    for name in ("train_ims.npy", "train_boxes.npy", "train_pixel_boxes.npy"):
        every, windows, some = (np.load(tmp_path / folder / name) for folder in ("all", "windows", "some"))
        assert some.shape[1] == 15
        np.testing.assert_allclose(some[:, :4], every[:, :4], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(some[:, 4:14], windows[:, 25:35], rtol=1e-4, atol=1e-6)
        if name != "train_ims.npy":
            np.testing.assert_array_equal(some[:, 14], windows[:, 35])  # the whole image
    np.testing.assert_array_equal(
        np.load(tmp_path / "some/train_ims.npy")[:, 14], np.load(tmp_path / "some/train_who_ims.npy")
    )


def test_a_tsv_of_other_settings_is_not_gone_on_with(tmp_path, photos):
    args = windows_args(photos, tmp_path / "o", "--weights", "random", "--tsv", tmp_path / "t.tsv")
    real = extract_features.Extractor.extract
    calls = []

    def dies(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    with patch.object(extract_features.Extractor, "extract", dies):
        assert tool("extract_features", *args).returncode == 130
    assert not (tmp_path / "t.tsv").exists()
    extract(*args, "--seed", 1)
    with patch.object(extract_features.Extractor, "extract", dies):
        assert "there already" in extract(*args, "--seed", 1)
        assert "t.tsv: there already, and made otherwise; --overwrite" in refused(*args)
        (tmp_path / "t.tsv.made.json").unlink()
        assert "kept, though there is no record" in extract(*args)
        assert len(calls) == 5
        (tmp_path / "t.tsv").rename(tmp_path / "seed1.tsv")
        extract(*args)
    assert len(calls) == 5 + 8  # 4 of the 12 photos lay in the stopped run's file
    one, other = ((tmp_path / f"{name}.tsv").read_text().splitlines() for name in ("t", "seed1"))
    assert {line.split("\t")[0] for line in one} == {line.split("\t")[0] for line in other} and len(one) == 12
    assert not set(one) & set(other)


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, FrozenBatchNorm2d])
def test_folded_norms_give_the_same_maps(kind):
    torch.manual_seed(0)
    norms = kind(8), kind(4)
    for norm in norms:
        for name, value in norm.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + (0.5 if name in ("weight", "running_var") else -0.5))
    inner = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3, bias=False), norms[1])
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norms[0], torch.nn.ReLU(), inner).eval()
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        expected = body(images)
        found = region_networks.fold_norms(body)(images)
    assert not [module for module in body.modules() if isinstance(module, kind)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_would_run_code_are_refused_and_run_none(tmp_path, photos):
    torch.save({"model": Calls(open, str(tmp_path / "ran"), "w")}, tmp_path / "zip.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Calls(open, str(tmp_path / "ran"), "w"), protocol=4))
    for name in ("zip.pth", "plain.pth"):
        done = tool("extract_features", *windows_args(photos, tmp_path / "o", "--weights", tmp_path / name))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"{name}: not the weights of eff" in done.stderr and "no file of tensors alone" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_refused_and_leaves_no_file(tmp_path, photos):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    broken = ("--images", tmp_path / "broken", "--out", tmp_path / "broken_out")
    (tmp_path / "text.txt").write_text("no image, no weights\n")
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    for more, said in (
        (("--images", tmp_path / "no"), "no: no such folder, expected one of images"),
        (("--out", tmp_path / "text.txt"), "text.txt: Not a directory"),
        (("--backbone", "detector"), "--regions windows has no detector"),
        (("--whole_region",), "--whole_region: the last of the windows is the whole image"),
        (("--windows", 3), "--boxes and --windows: go with a file of boxes"),
        (("--windows", 36), "--windows 36: expected 0 to 35"),
        (("--image_size", 0), "--image_size 0: expected 32 to"),
        (("--seed", 2**64), "--seed 18446744073709551616: expected"),
        (("--device", "nonsense"), "--device nonsense"),
        (("--tsv", photos), "photos: is no file"),
        (("--weights", tmp_path / "no.pth"), "no such file"),
        (("--weights", tmp_path / "text.txt"), "text.txt: not the weights of eff"),
        (("--weights", tmp_path / "shape.pth"), "(Error(s) in loading state_dict for EfficientNet: Missing key(s)"),
        (broken, "none of the 1 images could be used"),
        ((*broken, "--tsv", tmp_path / "t.tsv"), "none of the 1 images could be used"),
    ):
        assert said in refused(*windows_args(photos, tmp_path / "o", *more))
    assert not (tmp_path / "o").exists() and not (tmp_path / "t.tsv").exists()
    assert not list((tmp_path / "broken_out").glob("*.npy"))
