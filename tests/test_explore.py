"""The explorer: its answers against plain computations, and its page in a real browser, used as a person does.

The browser is the system's Chromium (apt-get install chromium chromium-driver).
"""

import contextlib
import json
import os
import re
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from dataset_commands import call, fails, ok
from folders import make_whole_folder, save_model, write_lines
from PIL import Image
from processes import LIMIT, free_ports, serve_app, wait_for
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service

from evaluation import encode_data, load_split, shard_xattn
from lib.errors import InputError
from scripts import explore
from scripts.demo import make_demo_data
from scripts.explorer.answers import Explorer
from scripts.explorer.hard_cases import compare
from scripts.explorer.images import SplitImages, find_files
from Tencent_PFAN import model_whole
from vocab import SPECIAL, Vocabulary

N_IMAGES = 12

# ---------------------------------------------------------------- a served explorer


def options(*flags):
    return explore.get_parser().parse_args(["--model_path", *map(str, flags)])


@contextlib.contextmanager
def serve(explorer):
    """The address of a server of an Explorer on a free port."""
    with serve_app(explore.make_app(explorer)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Drawn images, their vocabulary and two untrained models of them; (root, checkpoints)."""
    root = tmp_path_factory.mktemp("explore")
    where = ("--data_path", str(root / "data"), "--data_name", "demo")
    counts = ("--train", "40", "--dev", "5", "--test", str(N_IMAGES), "--workers", "1")
    assert call(make_demo_data.main, "make_demo_data", *where, *counts).returncode == 0
    ok("vocab", *where, "--vocab_path", root / "vocab", "--threshold", "1")
    paths = [root / "first.pth.tar", root / "second.pth.tar"]
    for path, position in zip(paths, ("attention", "none"), strict=True):
        here = (str(root / "data"), str(root / "vocab"))
        save_model(path, *here, seed=1, data_name="demo", img_dim=128, position=position)
    return root, paths


@pytest.fixture(scope="module")
def explorer(made):
    return Explorer(options(*made[1]))


@pytest.fixture(scope="module")
def address(explorer):
    with serve(explorer) as address:
        yield address


def get(address, path, **parameters):
    """(status, object) of a GET under /api."""
    url = f"{address}api/{urllib.parse.quote(path)}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=LIMIT) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# ---------------------------------------------------------------- answers


@pytest.fixture(scope="module")
def embeddings(made):
    """Of each model: images, captions, their lengths, as evalrank encodes them, and opt."""
    splits = [load_split(str(path), None, None, "test") for path in made[1]]
    return [(*encode_data(model, loader), model.opt) for model, loader in splits]


def test_a_sentence_ranks_the_images_and_an_image_the_captions_as_evalrank_scores_them(embeddings, explorer, address):
    by_sentence = get(address, "search", sentence=explorer.captions[17], k=5)[1]
    by_image = get(address, "images/3", k=60)[1]
    assert by_sentence["positives"] == [3]
    found = zip(embeddings, by_sentence["models"], by_image["models"], strict=True)
    for (images, captions, lens, opt), of_sentence, of_image in found:
        scores = shard_xattn(images, captions, lens, opt)
        best = np.argsort(-scores[:, 17])
        results = [(result["image"], result["positive"]) for result in of_sentence["results"]]
        assert results == [(image, image == 3) for image in best[:5]]
        assert of_sentence["rank"] == 1 + best.tolist().index(3)
        for answer, expected in (of_sentence, scores[best[:5], 17]), (of_image, np.sort(scores[3])[::-1]):
            assert [result["score"] for result in answer["results"]] == pytest.approx(expected.tolist(), abs=1e-5)
        positives = [(rank, result["text"]) for rank, result in enumerate(of_image["results"], 1) if result["positive"]]
        assert sorted(text for _, text in positives) == sorted(explorer.captions[15:20])
        assert of_image["rank"] == positives[0][0]


def test_a_model_that_knows_no_word_shows_nothing_beside_one_that_does(made, explorer, monkeypatch):
    vocab = Vocabulary()
    for word in (*SPECIAL, "unicorn"):
        vocab.add_word(word)
    monkeypatch.setattr(explorer.collections[1], "vocab", vocab)
    first, second = explorer.search("a red ring", 3)["models"]
    assert len(first["results"]) == 3 and first["scored"] == N_IMAGES
    assert (second["results"], second["rank"], second["scored"]) == ([], None, 0)
    assert not any(token["known"] for token in second["tokens"][1:-1])


def test_attention_is_the_formulas(embeddings, explorer, address):
    """t2i: softmax over regions of λ · LeakyReLU(S) / ‖·‖ over words, and the same with the roles swapped."""
    sentence = explorer.captions[0]
    _, answer = get(address, "images/2/attention", sentence=sentence)
    for (images, captions, lens, opt), shown in zip(embeddings, answer["models"], strict=True):
        S = captions[0, : lens[0]] @ images[2].T  # words × regions
        clipped = torch.where(S > 0, S, 0.1 * S)
        t2i = (9 * clipped / clipped.norm(dim=0)).softmax(1)
        i2t = (9 * clipped / clipped.norm(dim=1, keepdim=True)).T.softmax(1)
        assert np.array(shown["t2i"]) == pytest.approx(t2i.numpy(), abs=1e-4)
        assert np.array(shown["i2t"]) == pytest.approx(i2t.numpy(), abs=1e-4)
        expected = shard_xattn(images[2:3], captions[:1], lens[:1], opt)[0, 0]
        assert shown["score"] == pytest.approx(float(expected), abs=1e-5)


def test_the_grid_shows_area_and_learned_weights(made, explorer, address):
    _, answer = get(address, "images/4", k=1)
    grids = np.load(made[0] / "data" / "demo" / "test_boxes.npy")[4]
    assert np.array(answer["cells"]) == pytest.approx(grids[:, :15])
    assert np.array(answer["area"]) == pytest.approx(grids[:, 15:30], abs=1e-4)
    encoder = explorer.collections[0].model.img_enc
    features = torch.from_numpy(np.load(made[0] / "data" / "demo" / "test_ims.npy")[4])
    logits = torch.tanh(
        (encoder.fc_att(features)[:, None] * encoder.position_embedding(torch.tensor(grids[:, :15]).long())).sum(2)
    ).softmax(1)
    learned = (torch.tensor(grids[:, 15:30]) * logits).softmax(1).detach().numpy()
    assert np.array(answer["learned"][0]) == pytest.approx(learned, abs=1e-4)
    assert answer["learned"][1] is None  # plain SCAN knows no positions


def test_hard_cases_are_the_queries_with_the_largest_ratio_of_ranks(explorer):
    hard = compare(explorer)
    assert (hard["images"], hard["captions"]) == (N_IMAGES, 5 * N_IMAGES)
    sentences, images = ([case for case in hard["cases"] if bool(case["sentence"]) == way] for way in (True, False))
    for cases in (sentences, images):
        ratios = [max(case["ranks"]) / min(case["ranks"]) for case in cases]
        assert ratios == sorted(ratios, reverse=True) and min(ratios) > 1
    found = explorer.search(sentences[0]["sentence"], 1)["models"], explorer.captions_for(images[0]["image"], 1)
    for models, case in zip(found, (sentences[0], images[0]), strict=True):
        assert [model["rank"] for model in models] == case["ranks"]


@pytest.mark.parametrize(
    "path, parameters, status, said",
    [
        ("search", {"sentence": "...", "k": 5}, 400, "Type a sentence first."),
        ("search", {"sentence": "a " * 240, "k": 5}, 400, "too long: shorten it to 500 characters and 100 words."),
        ("search", {"sentence": "a" * 501, "k": 5}, 400, "too long: shorten it to 500 characters and 100 words."),
        ("search", {"sentence": "Xyzzy, plugh!", "k": 5}, 400, "No model knows any of these words: xyzzy, plugh."),
        ("images/3/attention", {"sentence": "xyzzy"}, 400, "No model knows any of these words: xyzzy."),
        ("search", {"sentence": "a", "k": 101}, 400, "100"),
        ("search", {"k": 5}, 400, "sentence"),
        ("images/12", {"k": 5}, 404, "There is no image 12: expected 0 to 11"),
        ("images/²", {"k": 5}, 404, "There is no image ²: expected 0 to 11"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_a_reason(address, path, parameters, status, said):
    found, answer = get(address, path, **parameters)
    assert found == status and said in answer["error"]


def test_a_page_of_another_site_cannot_read_the_explorer_under_its_own_name(address):
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=LIMIT)


def test_more_images_than_index_above_are_searched_in_two_stages(made, explorer):
    two_stages = Explorer(options(*made[1], "--index_above", "5", "--candidates", str(N_IMAGES)))
    assert two_stages.about()["indexed"] and not explorer.about()["indexed"]
    answers = (known.search(explorer.captions[7], 5)["models"] for known in (explorer, two_stages))
    for fine, coarse in zip(*answers, strict=True):
        assert [r["score"] for r in coarse["results"]] == pytest.approx([r["score"] for r in fine["results"]], abs=3e-3)
    assert [model["scored"] for model in two_stages.captions_for(3, 2)] == [N_IMAGES, N_IMAGES]  # of 60


def other_model(made, root, change, **flags):
    """A checkpoint that reads a copy of the data in another folder, which change(folder) has changed."""
    change(shutil.copytree(made[0] / "data" / "demo", root / "data" / "other"))
    shutil.copytree(made[0] / "vocab", root / "vocab")
    (root / "vocab" / "demo_vocab.json").rename(root / "vocab" / "other_vocab.json")
    where = (str(root / "data"), str(root / "vocab"))
    save_model(root / "other.pth.tar", *where, data_name="other", **{"img_dim": 128, "seed": 2, **flags})
    return root / "other.pth.tar"


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("test_ids.txt", lambda rows: rows[::-1], "other.pth.tar: id 0 of .* is '300011', that of"),
        ("test_pixel_boxes.npy", lambda rows: rows[:, ::-1], "other regions than"),
        ("test_pixel_boxes.npy", lambda rows: rows[::-1], "not the regions of"),
        ("test_pixel_boxes.npy", lambda rows: rows * 1.7, "% of the boxes reach outside the images in"),
        ("test_caps.txt", lambda rows: rows[::-1], "other.pth.tar: caption 0 of"),
    ],
)
def test_models_whose_splits_differ_in_more_than_shapes_are_refused(made, tmp_path, name, change, said):
    def rewrite(folder):
        if name.endswith(".npy"):
            np.save(folder / name, change(np.load(folder / name)))
        else:
            write_lines(folder / name, change((folder / name).read_text().splitlines()))

    with pytest.raises(InputError, match=said):
        Explorer(options(made[1][0], other_model(made, tmp_path, rewrite, position="none")))


def test_models_of_one_split_in_two_folders_are_shown_side_by_side(made, tmp_path):
    """The other folder has features of another extractor; each model's position weights come from its own features."""

    def narrow(folder):
        np.save(folder / "test_ims.npy", np.load(folder / "test_ims.npy")[..., :64])

    learned = Explorer(options(made[1][0], other_model(made, tmp_path, narrow, img_dim=64))).image(4, 1)["learned"]
    assert np.shape(learned) == (2, 36, 15) and not np.allclose(learned[0], learned[1])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--split", "nosuch"], "nosuch_ims.npy: no such file"),
        (["--images", "nowhere"], "nowhere: no file of the images, expected names such as 300000.jpg"),
        (["--candidates", "0"], "--candidates of 1 or more"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(made, flags, said):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "address already in use" in fails("explore", "--model_path", "nosuch.pth.tar", "--port", port)
    assert said in fails("explore", "--model_path", made[1][0], "--port", port, *flags)


def test_a_whole_image_model_is_refused_with_what_the_explorer_takes(tmp_path):
    news, model = make_whole_folder(tmp_path), tmp_path / "whole.pth.tar"
    save_model(model, *news, data_name="toy", make_model=model_whole.SCAN, position="area")
    (port,) = free_ports(1)
    assert "explorer, search and figures take train.py's" in fails("explore", "--model_path", model, "--port", port)


# ---------------------------------------------------------------- image files and boxes


def test_image_files_are_found_by_listed_name_and_by_id(tmp_path):
    files = {"17": "17.png", "beach.JPG": "beach.JPG", "391895": "COCO_val2014_000000391895.jpg", "5": "five.png"}
    images = tmp_path / "images"
    (images / "val").mkdir(parents=True)
    for name in (*files.values(), "val/six.png", "a.jpg", "a.png", "5.jpg", "notes.txt", "../secret.png"):
        (images / name).touch()
    # a listed file lies in its folder or without it; one that is not there, or outside, is as none
    names = {"5": "val/five.png", "6": "val/six.png", "17": "lost.png", "18": "../secret.png"}
    found = find_files(images, [*files, "6", "18", "notes", "a.png"], names)
    files |= {"6": "val/six.png", "a.png": "a.png"}
    assert found == {image_id: str(images / name) for image_id, name in files.items()}
    with pytest.raises(InputError, match="a.jpg and a.png for image a, expected one file"):
        find_files(images, ["a"], {})


@pytest.fixture
def shown(made, tmp_path):
    """A copy of the data's folder, and the SplitImages of its test split."""
    shutil.copytree(made[0] / "data" / "demo", tmp_path / "demo")
    _, loader = load_split(str(made[1][0]), str(tmp_path), None, "test")
    return tmp_path / "demo", lambda *folder: SplitImages(loader.dataset, *folder)


@pytest.mark.parametrize(
    "name, listed",
    [
        ("id_mapping.json", {"300000": "photo.png"}),
        ("dataset_demo.json", {"images": [{"cocoid": 300000, "filepath": "val", "filename": "photo.png"}]}),
    ],
)
def test_images_are_shown_by_the_file_names_that_come_with_the_data(shown, name, listed):
    folder, images = shown
    (folder / "test_images" / "300000.png").rename(folder / "test_images" / "photo.png")
    (folder / name).write_text(json.dumps(listed))
    names = {number: os.path.basename(path) for number, path in images().files.items() if number < "300002"}
    assert names == {"300000": "photo.png", "300001": "300001.png"}
    (folder / "dataset_more.json").write_text('{"images": []}')
    with pytest.raises(InputError, match="dataset_more.json, expected one list of the images' file names"):
        images()


def test_an_image_that_lies_on_its_side_is_shown_with_its_regions_upright(shown):
    folder, images = shown
    first = sorted((folder / "test_images").iterdir())[0]
    with Image.open(first) as image:
        turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        turned.save(first, exif=exif)
    assert turned.size == (216, 288) and images().size(0) == (288, 216)


def test_without_ids_no_file_belongs_to_an_image(shown):
    folder, images = shown
    os.remove(folder / "test_ids.txt")
    assert not images().files
    with pytest.raises(InputError, match="no file of the images, expected their ids in .*test_ids.txt"):
        images(folder / "test_images")


def test_boxes_come_from_pixels_or_else_from_grid_cells(shown):
    folder, images = shown
    pixels = np.load(folder / "test_pixel_boxes.npy")[5] / [288, 216, 288, 216]
    assert images().boxes(5) == pytest.approx(pixels, abs=1e-6)
    os.remove(folder / "test_pixel_boxes.npy")
    small = np.prod(pixels[:, 2:] - pixels[:, :2], axis=1) < 0.02  # covers at most 15 cells
    assert small.sum() > 5 and images().boxes(5)[small] == pytest.approx(pixels[small], abs=1 / 16)
    os.remove(folder / "test_boxes.npy")
    assert images().boxes(5) is None


# ---------------------------------------------------------------- the page, in a browser


@pytest.fixture(scope="module")
def browser():
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} on this machine: apt-get install chromium chromium-driver")
    settings = webdriver.ChromeOptions()
    settings.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        settings.add_argument(flag)
    settings.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=settings, service=Service(shutil.which("chromedriver"))) as driver:
        yield driver


class Person:
    """Someone at the page: looks, waits, points, types."""

    def __init__(self, driver, address, size=(1280, 900), scheme="light"):
        self.driver, self.address, self.run = driver, address, driver.execute_script
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        driver.get("about:blank")
        driver.get_log("browser")  # of the page before
        driver.get(address)
        self.until(lambda: "images" in self.text("#about"))
        self.until(lambda: "no captions" in self.text("#about") or self.has_searched())

    def until(self, what):
        try:
            return wait_for(what)
        except AssertionError:
            raise AssertionError(f"waited in vain; the page says: {self.text('body')[:600]}") from None

    def has_searched(self):
        return "ranked in" in self.text("#status") and not self.all(".waiting")

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.until(lambda: self.all(selector))[0]

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def value(self, selector):
        return self.run("return document.querySelector(arguments[0]).value", selector)

    def visible(self, selector):
        return self.run("return document.querySelector(arguments[0]).checkVisibility()", selector)

    def places(self, selector):
        """[x, y, width, height] of all elements."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
        return [[place[name] for name in ("x", "y", "width", "height")] for place in self.run(script, selector)]

    def click(self, element):
        self.run("arguments[0].click()", element)

    def point(self, element):
        ActionChains(self.driver, duration=20).move_to_element(element).perform()

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def search(self, sentence):
        self.run("document.getElementById('sentence').value = ''")
        self.one("#sentence").send_keys(sentence)
        self.until(lambda: self.has_searched() and self.text(".tokens").split()[:2] == sentence.lower().split()[:2])

    def open_first(self):
        self.one(".card").click()
        return self.until(lambda: self.all("#views .word"))

    def fills(self):
        """{region: its share of the largest weight} of the rectangles of the first model's image."""
        script = """return [...document.querySelectorAll('#views > .view:first-child rect')].map(rect =>
            [Number(rect.dataset.region), Number(rect.style.getPropertyValue('--weight'))])"""
        return dict(self.run(script))

    def complaints(self):
        """What the browser's console holds, but for answers that the page turns into sentences."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "/api/" not in entry["message"]]


@pytest.fixture
def person(browser, address):
    return Person(browser, address)


def test_the_page_opens_with_a_caption_of_the_split_and_keeps_its_history(person, explorer):
    assert person.value("#sentence") == explorer.captions[0] and person.all(".card")
    person.one("#example").click()
    person.until(lambda: person.value("#sentence") == explorer.captions[5] and person.has_searched())
    person.driver.back()
    person.until(lambda: person.value("#sentence") == explorer.captions[0] and person.has_searched())


def test_type_read_open_point_and_see_the_overlay_change(person, explorer):
    sentence = explorer.captions[17]
    person.search(sentence)
    expected = explorer.search(sentence, 1)["models"][0]["results"][0]
    first = person.text(".card")
    assert f"{expected['score']:.3f}" in first and expected["caption"][:20] in first
    assert [column.text for column in person.all("#results h2")] == ["PFAN-A t2i", "SCAN t2i"]
    words = person.open_first()
    assert person.text("#detail-title").endswith(f"“{sentence}”")
    attention = explorer.attention(expected["image"], sentence)["models"][0]
    for at in (2, 5):
        person.point(words[at])
        person.until(lambda at=at: words[at].get_attribute("class") == "word chosen")
        weights = np.array(attention["t2i"][at])
        shown = person.fills()
        assert [shown[r] for r in range(36)] == pytest.approx((weights / weights.max()).tolist(), abs=2e-3)
        assert f"region {weights.argmax() + 1}" in person.text("#detail-status")
    strongest = f"#views rect[data-region='{weights.argmax()}']"
    colour = "return getComputedStyle(document.querySelector(arguments[0])).fill"
    lit = person.run(colour, strongest)
    person.point(person.one("#detail-title"))
    person.until(lambda: person.run(colour, strongest) != lit)
    assert set(person.fills().values()) == {0}
    loaded = person.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 8 and all(name.startswith(person.address) for name in loaded)
    assert person.complaints() == []


def test_pointing_at_a_region_lights_words_and_shows_its_grid(person, explorer):
    words = person.open_first()
    image = int(person.one(".card").get_attribute("data-image"))
    top = person.all("#views > .view:first-child rect")[-1]  # the smallest, which nothing hides
    region = int(top.get_attribute("data-region"))
    person.point(top)
    person.until(lambda: "chosen" in top.get_attribute("class"))
    weights = explorer.attention(image, explorer.captions[0])["models"][0]["i2t"][region]
    assert [word.text.split("\n")[-1] for word in words[: len(weights)]] == [f"{100 * w:.0f} %" for w in weights]
    assert person.text("#region-name").startswith(f"{region + 1} of 36")
    cells = np.array(explorer.image(image, 1)["cells"][region])
    assert [title.text for title in person.all(".grid h4")] == ["Area weights", "Learned, PFAN-A t2i"]
    for drawn in person.all(".grid svg"):
        assert len(drawn.find_elements("css selector", "rect")) == (cells < 256).sum()
    assert "SCAN t2i does not know positions." in person.text("#grids")


def test_everything_can_be_done_with_the_keyboard(person, explorer):
    person.press("/")
    assert person.run("return document.activeElement.id") == "sentence"
    person.press(explorer.captions[3], Keys.ENTER)  # in place of what was there
    person.until(lambda: person.value("#sentence") == explorer.captions[3] and person.has_searched())
    person.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    chosen = person.run("return document.activeElement.dataset.image")
    assert chosen == person.all(".card")[1].get_attribute("data-image")
    person.press(Keys.ENTER)
    words = person.until(lambda: person.all("#views .word"))
    person.run("arguments[0].focus()", words[1])
    assert "chosen" in words[1].get_attribute("class") and max(person.fills().values()) == 1
    person.press(Keys.ARROW_RIGHT)
    assert "chosen" in words[2].get_attribute("class") and "chosen" not in words[1].get_attribute("class")
    person.run("document.getElementById('close').focus()")
    title = person.text("#detail-title")
    person.press(Keys.ARROW_RIGHT)
    person.until(lambda: person.text("#detail-title") != title)
    person.press(Keys.ESCAPE)
    person.until(lambda: not person.visible("#detail") and "open=" not in person.driver.current_url)


def test_a_caption_of_the_image_can_be_looked_at_instead(person):
    person.open_first()
    other = next(b for b in person.all("#captions button") if "now" not in b.get_attribute("class"))
    text = other.find_element("css selector", "span:last-child").text.removesuffix(" ✓ its own")
    person.click(other)
    person.until(lambda: person.text("#detail-title").endswith(f"“{text}”"))
    person.one("#find").click()
    person.until(lambda: person.value("#sentence") == text and person.has_searched())


def test_unknown_words_are_marked_and_errors_are_sentences(person):
    person.search("a purple unicorn")
    assert [word.text for word in person.all(".model:first-child .unknown")] == ["unicorn"]
    assert "(1 unknown to the model)" in person.text(".tokens")
    person.open_first()[2].click()  # the failure hides what has the focus
    person.run("location.hash = 'q=a+ring&open=99999'")
    person.until(lambda: "There is no image 99999: expected 0 to 11." in person.text("#detail-status"))
    assert not person.visible("#region")  # nothing to point at
    person.one("#close").click()
    person.until(lambda: "open" not in person.driver.current_url)
    person.one("#sentence").send_keys(" red" * 120)
    person.until(lambda: "The sentence is too long" in person.text("#status"))
    assert not person.all(".card")


def test_hard_cases_lead_to_the_query(person):
    person.one("#tab-hard").click()
    cases = person.until(lambda: person.all(".hard"))
    assert "rank 1" in cases[0].text
    case = next(case for case in cases if "“" in case.text)
    sentence = case.text.split("“")[1].split("”")[0]
    person.click(case)
    person.until(lambda: person.value("#sentence") == sentence and person.has_searched())
    assert person.all(".card.positive")


def test_three_models_fit_a_narrow_dark_screen_and_nothing_jumps(browser, made):
    first, second = made[1]
    with serve(Explorer(options(first, second, first))) as address:
        person = Person(browser, address, (360, 740), "dark")
        assert person.run("return document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth") == 0
        cards = person.places(".model li:first-child .card")
        assert len(cards) == 3 and min(width for _, _, width, _ in cards) > 120
        assert all(one[0] + one[2] <= other[0] for one, other in zip(cards, cards[1:], strict=False))
        words = person.open_first()
        assert person.run("const d = document.getElementById('detail'); return d.scrollWidth - d.clientWidth") == 0
        one, other, *_ = person.places(".grid")
        assert one[1] == other[1] and one[0] + one[2] <= other[0]
        person.run("arguments[0].focus()", words[1])
        person.until(lambda: "attends" in person.text("#detail-status"))
        selector = ".word, #views .frame, .grid .map, #captions button"
        on_word = person.places(selector)
        person.run("region.value = 3; region.oninput()")
        person.until(lambda: person.text("#detail-status").startswith("Region 3"))
        assert person.places(selector) == on_word
        shades = person.run("const s = getComputedStyle(detail); return [s.color, s.backgroundColor]")
        ink, ground = (sum(map(int, re.findall(r"\d+", shade)[:3])) for shade in shades)
        assert ink > 600 > 150 > ground


def test_without_image_files_boxes_stand_on_a_blank_frame(browser, made, tmp_path):
    """As with the published Flickr30K files: features, grids and captions alone."""
    shutil.copytree(made[0] / "data" / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("*images", "*pixel*"))
    with serve(Explorer(options(made[1][0], "--data_path", tmp_path))) as address:
        person = Person(browser, address)
        assert "No image files" in person.text("#about")
        assert not person.all(".card img") and len(person.one(".card").find_elements("css selector", "rect")) == 36
        assert person.text(".card .caption")
        assert not person.visible("#tab-hard")  # one model: nothing to compare
        person.point(person.open_first()[2])
        person.until(lambda: max(person.fills().values()) == 1)
        (view,), (grids,), (captions,) = map(person.places, ("#views", "#grids", "#captions"))
        assert view[0] + view[2] <= min(grids[0], captions[0]) and grids[1] < view[1] + view[3]  # beside it
        assert person.complaints() == []


def test_images_without_captions_are_searched(browser, made, explorer, tmp_path):
    shutil.copytree(made[0] / "data" / "demo", tmp_path / "demo")
    os.remove(tmp_path / "demo" / "test_caps.txt")
    shown = Explorer(options(*made[1], "--data_path", tmp_path))
    found, expected = (known.search("a red ring", 5)["models"] for known in (shown, explorer))
    for one, other in zip(found, expected, strict=True):
        assert [result["score"] for result in one["results"]] == [result["score"] for result in other["results"]]
    assert [model["results"] for model in shown.captions_for(3, 5)] == [[], []]
    with serve(shown) as address:
        person = Person(browser, address)
        assert "12 images, no captions" in person.text("#about")
        assert not person.visible("#example") and not person.visible("#tab-hard")
        person.search("a red ring")
        person.open_first()
        assert not person.visible("#captions")
        person.run("location.hash = 'open=3'")
        person.until(lambda: "This split has no captions" in person.text("#detail-status"))
        assert person.complaints() == []


def test_a_stopped_explorer_is_said_on_the_page(browser, explorer):
    with serve(explorer) as address:
        person = Person(browser, address)
    person.one("#sentence").send_keys("a ring")
    person.until(lambda: "does not answer" in person.text("#status"))
