"""A collection on disk, its first stage, and the two-stage search against scoring every picture."""

import json
import os
import shutil

import numpy as np
import pytest
from dataset_commands import fails, ok
from folders import make_folder, save_model, write_lines

from evaluation import load_split
from lib.errors import InputError
from scripts.search import build as building
from scripts.search.build import build, open_or_build
from scripts.search.collection import Collection
from scripts.search.store import FILES, collection_folder, fingerprint, open_collection

FINISHED = FILES - {"by_item.npy", "progress.json"}
N = 60


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A t2i and an i2t checkpoint of a split of N pictures; (root, {cross_attn: path})."""
    root = tmp_path_factory.mktemp("index")
    where = make_folder(root, splits={"dev": 6, "test": N}, captions_per_image=2)
    for way in ("t2i", "i2t"):
        save_model(root / f"{way}.pth.tar", *where, cross_attn=way)
    return root, {way: str(root / f"{way}.pth.tar") for way in ("t2i", "i2t")}


def load(path):
    return load_split(path, None, None, "test")


@pytest.fixture(scope="module")
def built(toy):
    """(model, loader, folder) of a finished collection."""
    root, paths = toy
    model, loader = load(paths["t2i"])
    folder = str(root / "built")
    open_or_build(paths["t2i"], model, loader, "test", folder, n_centroids=32)
    return model, loader, folder


def test_a_collection_holds_what_the_model_encodes_in_half_precision(built):
    model, loader, folder = built
    assert set(os.listdir(folder)) == FINISHED
    collection, memory = open_collection(folder, model, loader.dataset.vocab), Collection.encode(model, loader)
    assert isinstance(collection.images, np.memmap) and collection.images.dtype == np.float16
    assert np.asarray(collection.images) == pytest.approx(memory.images.numpy(), abs=1e-3)
    assert np.asarray(collection.words) == pytest.approx(memory.words.numpy(), abs=1e-3)
    assert collection.lens.tolist() == memory.lens.tolist()


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_with_all_candidates_the_search_is_exhaustive(toy, way):
    root, paths = toy
    model, loader = load(paths[way])
    collection = open_or_build(paths[way], model, loader, "test", str(root / f"all_{way}"))
    memory = Collection.encode(model, loader)
    for sentence in loader.dataset.captions[:5]:
        images, scores = collection.search(sentence, 10, candidates=N)
        expected, exact = memory.search(sentence, 10)
        assert scores == pytest.approx(exact, abs=3e-3)  # half precision
        assert len(set(images) & set(expected)) >= 9
        captions = collection.score_captions(collection.image(3))
        assert captions == pytest.approx(memory.score_captions(memory.image(3)), abs=3e-3)


def test_a_search_for_images_or_captions_scores_its_candidates_exactly(built):
    model, loader, folder = built
    collection = open_collection(folder, model, loader.dataset.vocab)
    sentence = loader.dataset.captions[0]
    words, image = collection.embed(sentence), collection.image(3)
    for found, rows, exact in (
        (
            collection.search(sentence, 5, candidates=12),
            collection.first_stage.images(words, 12),
            collection.score_images(words),
        ),
        (
            collection.search_captions(image, 5, candidates=40),
            collection.first_stage.captions(image, 40),
            collection.score_captions(image),
        ),
    ):
        items, scores = found
        assert set(items) <= set(rows) and scores == pytest.approx(exact[items], abs=1e-6)
        assert scores == pytest.approx(np.sort(exact[rows])[::-1][:5], abs=1e-6)


def test_a_promising_first_stage_finds_most_of_the_top(built):
    """Even of an untrained model: of 20 of 60 candidates, more than the third that chance would give."""
    model, loader, folder = built
    collection, found = open_collection(folder, model, loader.dataset.vocab), []
    for sentence in loader.dataset.captions[:20]:
        words = collection.embed(sentence)
        best = np.argsort(-collection.score_images(words))[:5]
        found.append(np.isin(best, collection.first_stage.images(words, 20)).mean())
    assert np.mean(found) > 0.6


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_the_first_stage_is_the_mean_over_what_attends_of_the_best_that_is_attended_to(toy, built, way):
    """Pictures for a sentence and captions for a picture, against plain forms; what attends stands for its anchor."""
    root, paths = toy
    model, loader = load(paths[way])
    collection = open_or_build(paths[way], model, loader, "test", str(root / f"stage_{way}"), n_centroids=32)
    anchors = collection.first_stage.centroids.reconstruct_n(0, 32)
    images, words = (np.asarray(x, dtype=np.float32) for x in (collection.images, collection.words))
    captions = [words[start:stop] for start, stop in zip(collection.starts[:-1], collection.starts[1:], strict=True)]

    def worth(regions, sentence):
        attending, attended = (sentence, regions) if way == "t2i" else (regions, sentence)
        return (anchors[(attending @ anchors.T).argmax(1)] @ attended.T).max(1).mean()

    for number in (0, 7, 31):
        sentence, regions = collection.caption(number), collection.image(number)
        for rows, values in (
            (collection.first_stage.images(sentence, 20), [worth(image, sentence.numpy()) for image in images]),
            (collection.first_stage.captions(regions, 20), [worth(regions.numpy(), caption) for caption in captions]),
        ):
            assert len(rows) == 20 and np.all(np.diff(rows) > 0)
            assert np.array(values)[rows].min() >= np.sort(values)[-20] - 2e-3  # the table is of half precision


@pytest.mark.parametrize("stop_at", ["images.npy", "words.npy", "nearest.npy", "by_item.npy"])
def test_a_stopped_build_goes_on_where_it_was(toy, built, tmp_path, monkeypatch, stop_at):
    model, loader, finished = built
    made_from, steps = fingerprint(toy[1]["t2i"], loader.dataset, 32), []
    monkeypatch.setattr(building, "SYNC_EVERY", 1)
    monkeypatch.setattr(building, "TABLE_BLOCK", 8)
    monkeypatch.setattr(building, "NEAREST_BLOCK", 100)
    plain_write = building.ArrayWriter.write

    def write(file, row, values):
        if os.path.basename(file.path) == stop_at:
            steps.append(row)
            if len(steps) == 4 and "stopped" not in steps:
                raise KeyboardInterrupt
        plain_write(file, row, values)

    monkeypatch.setattr(building.ArrayWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        build(str(tmp_path), made_from, model, loader, 32)
    assert not (tmp_path / stop_at).exists() and not (tmp_path / "collection.json").exists()
    steps.append("stopped")
    build(str(tmp_path), made_from, model, loader, 32)
    assert steps[5] == steps[3]  # on it goes with what was not written, not from the start
    assert set(os.listdir(tmp_path)) == FINISHED
    for name in ("images.npy", "words.npy", "lens.npy"):
        assert (np.load(tmp_path / name) == np.load(os.path.join(finished, name))).all()
    assert np.load(tmp_path / "table.npy") == pytest.approx(np.load(os.path.join(finished, "table.npy")), abs=1e-3)


def test_a_finished_collection_is_opened_and_not_made_again(toy, built, monkeypatch):
    model, loader, folder = built
    monkeypatch.setattr(building, "build", lambda *args: pytest.fail("made again"))
    open_or_build(toy[1]["t2i"], model, loader, "test", folder)
    with pytest.raises(InputError, match="made from other anchors, --overwrite"):
        open_or_build(toy[1]["t2i"], model, loader, "test", folder, n_centroids=16)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("data/toy_precomp/test_boxes.npy", lambda rows: rows[::-1], "grids"),
        ("data/toy_precomp/test_ims.npy", lambda rows: rows + 1, "features"),
        ("data/toy_precomp/test_caps.txt", lambda lines: lines[::-1], "captions"),
        ("vocab/toy_precomp_vocab.json", lambda ids: {**ids, "ball": ids["red"], "red": ids["ball"]}, "vocabulary"),
        ("i2t.pth.tar", None, "checkpoint"),
    ],
)
def test_a_collection_of_another_model_or_of_other_data_of_the_same_shape_is_refused(
    toy, built, tmp_path, name, change, said
):
    for folder in ("data", "vocab"):
        shutil.copytree(toy[0] / folder, tmp_path / folder)
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, change(np.load(path)))
    elif name.endswith(".txt"):
        write_lines(path, change(path.read_text().splitlines()))
    elif name.endswith(".json"):
        path.write_text(json.dumps({"word2idx": change(json.loads(path.read_text())["word2idx"])}))
    checkpoint = toy[1]["i2t" if name.startswith("i2t") else "t2i"]
    where = {"data_path": str(tmp_path / "data"), "vocab_path": str(tmp_path / "vocab")}
    model, loader = load_split(checkpoint, split="test", **where)
    with pytest.raises(InputError, match=f"made from other {said}, --overwrite"):
        open_or_build(checkpoint, model, loader, "test", built[2])


def test_a_collection_made_before_vocabulary_and_grids_were_noted_is_opened(toy, built, tmp_path):
    model, loader, folder = built
    shutil.copytree(folder, tmp_path / "old")
    note = json.loads((tmp_path / "old" / "collection.json").read_text())
    old = {name: note[name] for name in ("checkpoint", "captions", "features", "anchors")}
    (tmp_path / "old" / "collection.json").write_text(json.dumps(old))
    open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path / "old"))
    (tmp_path / "old" / "collection.json").write_text(json.dumps({"anchors": 32}))
    with pytest.raises(InputError, match="made from other checkpoint"):
        open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path / "old"))


def test_files_that_are_no_collections_are_left_alone(toy, built, tmp_path):
    model, loader, _ = built
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that are no collection's"):
        open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_damaged_files_are_an_error_that_names_them(toy, built, tmp_path):
    model, loader, folder = built
    for name in FINISHED:
        (tmp_path / name).write_bytes(open(os.path.join(folder, name), "rb").read())
    for name, contents, said in (
        ("anchors.faiss", b"nothing", "not a faiss index"),
        ("table.npy", b"\x93NUMPY", "truncated or not an .npy"),
        ("collection.json", b"{", "not JSON"),
        ("collection.json", b"[" * 100_000, "not JSON"),
        ("collection.json", b"\xff", "not JSON"),
        ("collection.json", b"[1]", r"found \[1\], expected the notes of a collection; --overwrite"),
        ("collection.json", b'{"anchors": "x"}', "found {'anchors': 'x'}, expected the notes"),
    ):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(InputError, match=f"{name}: {said}"):
            open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path))
        (tmp_path / name).write_bytes(before)
    arrays = {name: np.load(tmp_path / f"{name}.npy") for name in ("images", "words", "lens", "nearest", "table")}
    n, regions, size = arrays["images"].shape
    for name, array in (
        ("table", np.zeros((3, 3), dtype=np.float16)),
        *(("images", np.zeros(shape, dtype=np.float16)) for shape in ((n, 0, size), (n, regions, 0), (0, 0, 0), (n,))),
        ("images", arrays["images"][..., 1:]),
        ("words", arrays["words"][:, 1:]),
        ("lens", arrays["lens"].astype(float)),
        ("lens", arrays["lens"][None]),
        ("lens", arrays["lens"][:0]),
        ("lens", arrays["lens"] * 0),
        ("nearest", arrays["nearest"].astype(float)),
        ("nearest", arrays["nearest"] + 32),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(InputError, match="do not fit together"):
            open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path))
        np.save(tmp_path / f"{name}.npy", arrays[name])


def test_a_note_of_other_things_is_refused_and_overwrite_goes_past_it(toy, built, tmp_path):
    model, loader, folder = built
    note = tmp_path / "collection.json"
    kept = json.loads(open(os.path.join(folder, "collection.json")).read())
    note.write_text(json.dumps({**kept, "more": 1}))
    with pytest.raises(InputError, match="made from other things, --overwrite"):
        open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path))
    note.write_text("[" * 100_000)
    open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path), n_centroids=32, overwrite=True)
    assert json.loads(note.read_text()) == kept


@pytest.mark.parametrize("note", ["[1]", "[" * 100_000, '{"done": 3}', '{"done": {"images.npy": "x"}}'])
def test_progress_of_another_form_is_named(toy, built, tmp_path, note):
    model, loader, _ = built
    (tmp_path / "progress.json").write_text(note)
    with pytest.raises(InputError, match="progress.json: .*, expected how far a stopped run was; delete it"):
        open_or_build(toy[1]["t2i"], model, loader, "test", str(tmp_path))


def test_the_command_builds_and_searches(toy):
    path = toy[1]["t2i"]
    printed = ok("build_index", "--model_path", path, "--query", "a red ball")
    folder = collection_folder(path, "toy_precomp", "test")
    assert set(os.listdir(folder)) == FINISHED
    assert f"{folder}: {N} images, {2 * N} captions" in printed and printed.count("  image ") == 10
    assert "not in the vocabulary" not in printed


# ---------------------------------------------------------------- words that the vocabulary lacks


@pytest.mark.parametrize(
    "sentence, said",
    [
        ("xyzzy plugh", "--query: none of its words is in the vocabulary (xyzzy, plugh), expected at least one"),
        ("xyzzy, xyzzy.", "--query: none of its words is in the vocabulary (xyzzy), expected at least one"),
        ("", "--query '': expected at least one word"),
        (" ", "--query ' ': expected at least one word"),
        ("…!", "--query '…!': expected at least one word"),
    ],
)
def test_a_query_without_a_known_word_is_refused_before_anything_is_built(toy, tmp_path, sentence, said):
    made = tmp_path / "made"
    assert fails("build_index", "--model_path", toy[1]["t2i"], "--out", made, "--query", sentence) == f"error: {said}"
    assert not made.exists()


def test_the_unknown_words_of_a_query_are_named(toy, built):
    words = "a red xyzzy plugh xyzzy"
    printed = ok("build_index", "--model_path", toy[1]["t2i"], "--out", built[2], "--query", words)
    assert "not in the vocabulary, read as <unk>: xyzzy, plugh\n" in printed and printed.count("  image ") == 10


# ---------------------------------------------------------------- pictures without captions


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_pictures_without_captions_are_encoded_and_searched(toy, tmp_path, way):
    shutil.copytree(toy[0] / "data", tmp_path / "data")
    os.remove(tmp_path / "data" / "toy_precomp" / "test_caps.txt")
    where = ("--data_path", tmp_path / "data", "--out", tmp_path / "made")
    printed = ok("build_index", "--model_path", toy[1][way], *where, "--query", "a red ball")
    assert f"{tmp_path / 'made'}: {N} images, 0 captions" in printed and printed.count("  image ") == 10
    model, loader = load_split(toy[1][way], str(tmp_path / "data"), None, "test", captions_optional=True)
    collection = open_collection(str(tmp_path / "made"), model, loader.dataset.vocab)
    with_captions = Collection.encode(*load(toy[1][way]))
    images, scores = collection.search("a red ball", 10, candidates=N)
    expected, exact = with_captions.search("a red ball", 10)
    assert scores == pytest.approx(exact, abs=3e-3) and len(set(images) & set(expected)) >= 9
    best = set(np.argsort(-collection.score_images(collection.embed("a red ball")))[:5])
    assert len(best & set(collection.search("a red ball", 20, candidates=20)[0])) >= 3  # of 20 of 60 candidates
    captions, scores = collection.search_captions(collection.image(3))
    assert len(captions) == len(scores) == 0
