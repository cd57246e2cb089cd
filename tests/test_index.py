"""A collection on disk, its first stage, and the two-stage search against scoring every image."""

import os
import shutil

import numpy as np
import pytest
from dataset_commands import fails, ok
from folders import make_folder, save_model

from evaluation import load_split
from lib.errors import InputError
from scripts.search import build as building
from scripts.search.build import FINISHED, collection_folder, open_or_build
from scripts.search.collection import Collection

N = 60


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A t2i and an i2t checkpoint of a split of N images; (root, {cross_attn: path})."""
    root = tmp_path_factory.mktemp("index")
    where = make_folder(root, splits={"dev": 6, "test": N}, captions_per_image=2)
    for way in ("t2i", "i2t"):
        save_model(root / f"{way}.pth.tar", *where, cross_attn=way)
    return root, {way: str(root / f"{way}.pth.tar") for way in ("t2i", "i2t")}


@pytest.fixture(scope="module", params=["t2i", "i2t"])
def built(toy, request):
    """A finished collection, the same in memory, its folder, and the sentences."""
    path = toy[1][request.param]
    model, loader = load_split(path, split="test")
    folder = toy[0] / f"built_{request.param}"
    collection = open_or_build(path, model, loader, "test", str(folder), n_centroids=32)
    return collection, Collection.encode(model, loader), folder, loader.dataset.captions


@pytest.fixture(scope="module")
def split(toy):
    """What open_or_build is given of the t2i checkpoint."""
    path = toy[1]["t2i"]
    return path, *load_split(path, split="test"), "test"


@pytest.fixture
def copied(toy, split, tmp_path):
    """A copy of the t2i checkpoint's collection."""
    folder = toy[0] / "kept"
    open_or_build(*split, str(folder), n_centroids=32)
    return shutil.copytree(folder, tmp_path / "copied")


def test_a_collection_holds_what_the_model_encodes_in_half_precision(built):
    collection, memory, folder, _ = built
    assert set(os.listdir(folder)) == FINISHED
    assert isinstance(collection.images, np.memmap) and collection.images.dtype == np.float16
    assert np.asarray(collection.images) == pytest.approx(memory.images.numpy(), abs=1e-3)
    assert np.asarray(collection.words) == pytest.approx(memory.words.numpy(), abs=1e-3)
    assert collection.lens.tolist() == memory.lens.tolist()
    captions = collection.score_captions(collection.image(3))
    assert captions == pytest.approx(memory.score_captions(memory.image(3)), abs=3e-3)


def test_a_search_for_images_or_captions_scores_its_candidates_exactly(built):
    collection, _, _, sentences = built
    words, image, stage = collection.embed(sentences[0]), collection.image(3), collection.first_stage
    found = collection.search(sentences[0], 5, candidates=12), collection.search_captions(image, 5, candidates=40)
    rows = stage.images(words, 12), stage.captions(image, 40)
    exact = collection.score_images(words), collection.score_captions(image)
    for (items, scores), chosen, all_scores in zip(found, rows, exact, strict=True):
        assert set(items) <= set(chosen) and scores == pytest.approx(all_scores[items], abs=1e-6)
        assert scores == pytest.approx(np.sort(all_scores[chosen])[::-1][:5], abs=1e-6)


def test_the_first_stage_is_the_mean_over_what_attends_of_the_best_that_is_attended_to(built):
    """Images for a sentence and captions for an image, against plain forms; what attends stands for its centroid."""
    collection, stage = built[0], built[0].first_stage
    images, words = (np.asarray(x, dtype=np.float32) for x in (collection.images, collection.words))
    captions = np.split(words, collection.starts[1:-1])

    def score(regions, sentence):
        query, context = (sentence, regions) if stage.t2i else (regions, sentence)
        return (stage.centroids[(query @ stage.centroids.T).argmax(1)] @ context.T).max(1).mean()

    for number in (0, 7, 31):
        sentence, regions = collection.words_of([number]), collection.image(number)
        for rows, values in (
            (stage.images(sentence, 20), [score(image, sentence.numpy()) for image in images]),
            (stage.captions(regions, 20), [score(regions.numpy(), caption) for caption in captions]),
        ):
            assert len(rows) == 20 and np.all(np.diff(rows) > 0)
            assert np.array(values)[rows].min() >= np.sort(values)[-20] - 2e-3  # the table is of half precision


@pytest.mark.parametrize("stop_at", ["words", "table"])
def test_a_stopped_build_keeps_the_files_that_it_finished(split, copied, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(building, "TABLE_BLOCK", 8)  # several blocks
    made = tmp_path / "made"

    def stop(blocks, name, **options):
        for block in blocks:
            yield block
            if name == stop_at:
                raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(building, "tqdm", stop)
        open_or_build(*split, str(made), n_centroids=32)
    finished = {path: path.stat().st_mtime_ns for path in made.glob("*.npy")}
    assert made / "lens.npy" in finished and made / f"{stop_at}.npy" not in finished
    (made / f"{stop_at}.npy.part").touch()  # of a build that was killed
    open_or_build(*split, str(made), n_centroids=32)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert all((made / name).read_bytes() == (copied / name).read_bytes() for name in FINISHED)


def test_what_a_build_of_other_inputs_left_is_made_anew(split, copied):
    os.remove(copied / "table.npy")
    (copied / "collection.json").write_text('{"checkpoint": "another"}')
    np.save(copied / "images.npy", np.zeros((3, 3, 3)))
    assert len(open_or_build(*split, str(copied), n_centroids=32).images) == N
    assert set(os.listdir(copied)) == FINISHED


def test_a_finished_collection_is_opened_and_not_made_again(split, copied, monkeypatch):
    monkeypatch.setattr(building, "build", lambda *args: pytest.fail("made again"))
    open_or_build(*split, str(copied))
    with pytest.raises(InputError, match="made from other anchors, --overwrite"):
        open_or_build(*split, str(copied), n_centroids=16)


@pytest.mark.parametrize(
    "said, change",
    [
        ("grids", lambda data: vars(data).update(boxes=data.boxes[::-1])),
        ("features", lambda data: vars(data).update(images=data.images + 1)),
        ("captions", lambda data: data.captions.reverse()),
        ("vocabulary", lambda data: data.vocab.word2idx.update(ball=data.vocab.word2idx["red"])),
    ],
)
def test_a_collection_of_another_model_or_of_other_data_of_the_same_shape_is_refused(toy, split, copied, said, change):
    path, model, loader, name = split
    with pytest.raises(InputError, match="made from other checkpoint, --overwrite"):
        open_or_build(toy[1]["i2t"], model, loader, name, str(copied))
    _, loader = load_split(path, split=name)
    change(loader.dataset)
    with pytest.raises(InputError, match=f"made from other {said}, --overwrite"):
        open_or_build(path, model, loader, name, str(copied))


def test_files_that_are_no_collections_are_left_alone(split, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that are no collection's"):
        open_or_build(*split, str(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_damaged_files_are_an_error_that_names_them_and_overwrite_makes_them_anew(split, copied):
    for name, contents, said in (
        ("table.npy", b"\x93NUMPY", "table.npy: truncated or not an .npy"),
        ("collection.json", b"[" * 100_000, "collection.json: found .* expected the notes of a collection"),
        ("collection.json", b"[1]", r"collection.json: found b'\[1\]', expected the notes .*; --overwrite"),
    ):
        before = (copied / name).read_bytes()
        (copied / name).write_bytes(contents)
        with pytest.raises(InputError, match=said):
            open_or_build(*split, str(copied))
        (copied / name).write_bytes(before)
    arrays = {path.stem: np.load(path) for path in copied.glob("*.npy")}
    for name, array in (
        ("table", arrays["table"][:3]),
        ("images", arrays["images"][:, :0]),
        ("words", arrays["words"][:, 1:]),
        ("lens", arrays["lens"].astype(float)),
        ("lens", arrays["lens"] * 0),
        ("centroids", arrays["centroids"][0]),
        ("nearest", arrays["nearest"] + 32),
    ):
        np.save(copied / f"{name}.npy", array)
        with pytest.raises(InputError, match="do not fit together, --overwrite"):
            open_or_build(*split, str(copied))
        np.save(copied / f"{name}.npy", arrays[name])
    os.rename(copied / "centroids.npy", copied / "anchors.faiss")  # as in older versions
    with pytest.raises(InputError, match="do not fit together, --overwrite"):
        open_or_build(*split, str(copied))
    open_or_build(*split, str(copied), n_centroids=32, overwrite=True)
    assert set(os.listdir(copied)) == FINISHED


# ---------------------------------------------------------------- the command


def test_the_command_builds_and_searches(toy):
    printed = ok("build_index", "--model_path", toy[1]["t2i"], "--query", "a red xyzzy plugh xyzzy")
    folder = collection_folder(toy[1]["t2i"], "toy_precomp", "test")
    assert set(os.listdir(folder)) == FINISHED
    assert f"{folder}: {N} images, {2 * N} captions" in printed and printed.count("  image ") == 10
    assert "not in the vocabulary, read as <unk>: xyzzy, plugh\n" in printed


@pytest.mark.parametrize("sentence, said", [("xyzzy, plugh xyzzy.", "found xyzzy, plugh,"), ("…!", "found no word,")])
def test_a_query_without_a_known_word_is_refused_before_anything_is_built(toy, tmp_path, sentence, said):
    made = tmp_path / "made"
    last = fails("build_index", "--model_path", toy[1]["t2i"], "--out", made, "--query", sentence)
    assert last == f"error: --query: {said} expected at least one word of the vocabulary" and not made.exists()


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_images_without_captions_are_encoded_and_searched(toy, tmp_path, way):
    shutil.copytree(toy[0] / "data", tmp_path / "data")
    os.remove(tmp_path / "data" / "toy_precomp" / "test_caps.txt")
    where = ("--data_path", tmp_path / "data", "--out", tmp_path / "made")
    printed = ok("build_index", "--model_path", toy[1][way], *where, "--query", "a red ball")
    assert f"{tmp_path / 'made'}: {N} images, 0 captions" in printed and printed.count("  image ") == 10
    model, loader = load_split(toy[1][way], str(tmp_path / "data"), None, "test", captions_optional=True)
    collection = open_or_build(toy[1][way], model, loader, "test", str(tmp_path / "made"))
    images, scores = collection.search("a red ball", 10, candidates=N)
    expected, exact = Collection.encode(*load_split(toy[1][way], split="test")).search("a red ball", 10)
    assert scores == pytest.approx(exact, abs=3e-3) and len(set(images) & set(expected)) >= 9
    best = set(np.argsort(-collection.score_images(collection.embed("a red ball")))[:5])
    assert len(best & set(collection.search("a red ball", 20, candidates=20)[0])) >= 3  # of 20 of 60 candidates
    captions, scores = collection.search_captions(collection.image(3))
    assert len(captions) == len(scores) == 0
