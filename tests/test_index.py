"""A collection on disk, its first stage, and the two-stage search against scoring every picture."""

import json
import os
import shutil

import faiss
import numpy as np
import pytest
import torch
from folders import make_folder, save_model, write_lines

from evaluation import load_split
from lib.errors import InputError, run
from scripts import benchmark_search, build_index
from scripts.search import build as building
from scripts.search.build import build, open_or_build
from scripts.search.collection import Collection
from scripts.search.first_stage import FirstStage
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


def test_a_search_scores_its_candidates_exactly(built):
    model, loader, folder = built
    collection = open_collection(folder, model, loader.dataset.vocab)
    words = collection.embed(loader.dataset.captions[0])
    rows = collection.first_stage.images(words, 12)
    images, scores = collection.search(loader.dataset.captions[0], 5, candidates=12)
    assert len(rows) == 12 and set(images) <= set(rows)
    assert scores == pytest.approx(np.sort(collection.score_images(words)[rows])[::-1][:5], abs=1e-6)
    assert sorted(scores, reverse=True) == scores.tolist()


def test_some_captions_are_scored_as_in_the_whole(built):
    model, loader, folder = built
    collection = open_collection(folder, model, loader.dataset.vocab)
    rows = np.array([3, 90, 17, 18])
    some = collection.score_captions(collection.image(1), rows)
    assert some == pytest.approx(collection.score_captions(collection.image(1))[rows], abs=1e-6)


def test_the_first_stage_takes_each_words_nearest_anchor():
    anchors = faiss.IndexFlatIP(2)
    anchors.add(np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32))
    table = np.array([[9, 0, 1, 1], [0, 9, 1, 5], [7, 7, 7, 0]], dtype=np.float16)
    nearest, starts = np.array([0, 0, 1, 2, 1], dtype=np.uint16), np.array([0, 1, 4, 5])
    stage = FirstStage(True, anchors, nearest, starts, table)
    words = torch.tensor([[0.9, 0.1], [0.2, 0.8]])  # the first two anchors: sums 9, 9, 2, 6
    assert stage.images(words, 2).tolist() == [0, 1]
    assert stage.images(words, 3).tolist() == [0, 1, 3]
    assert stage.images(words, 99).tolist() == [0, 1, 2, 3]
    # strengths of the anchors .6, .8 and 0: captions of .6, (.6 + .8 + 0) / 3 and .8 a word
    regions = torch.tensor([[0.6, 0.0], [0.0, 0.8]])
    assert stage.captions(regions, 1).tolist() == [2]
    assert stage.captions(regions, 2).tolist() == [0, 2]
    swapped = FirstStage(False, anchors, nearest, starts, table)  # i2t: the same with the roles swapped
    assert swapped.captions(words, 3).tolist() == [0, 1, 3] and swapped.images(regions, 2).tolist() == [0, 2]


def test_the_table_is_the_largest_product_of_anchors_and_regions(built):
    model, loader, folder = built
    collection = open_collection(folder, model, loader.dataset.vocab)
    anchors = collection.first_stage.centroids.reconstruct_n(0, collection.first_stage.centroids.ntotal)
    images = np.asarray(collection.images, dtype=np.float32)
    expected = np.einsum("nrd,kd->knr", images, anchors).max(2)
    assert np.asarray(collection.first_stage.table, dtype=np.float32) == pytest.approx(expected, abs=1e-3)
    assert np.linalg.norm(anchors, axis=1) == pytest.approx(1, abs=1e-4)


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


def test_captions_are_searched_in_two_stages_too(built):
    model, loader, folder = built
    collection = open_collection(folder, model, loader.dataset.vocab)
    image = collection.image(3)
    exact, rows = collection.score_captions(image), collection.first_stage.captions(image, 40)
    captions, scores = collection.search_captions(image, 5, candidates=40)
    assert set(captions) <= set(rows) and scores == pytest.approx(np.sort(exact[rows])[::-1][:5], abs=1e-6)
    assert scores == pytest.approx(exact[captions], abs=1e-6)


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


def test_a_collection_of_another_model_is_refused(toy, built):
    _, loader, folder = built
    with pytest.raises(InputError, match="made from other checkpoint"):
        open_or_build(toy[1]["i2t"], load(toy[1]["i2t"])[0], loader, "test", folder)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("test_boxes.npy", lambda rows: rows[::-1], "grids"),
        ("test_ims.npy", lambda rows: rows + 1, "features"),
        ("test_caps.txt", lambda lines: lines[::-1], "captions"),
    ],
)
def test_a_collection_of_other_data_of_the_same_shape_is_refused(toy, built, tmp_path, name, change, said):
    shutil.copytree(toy[0] / "data", tmp_path / "data")
    path = tmp_path / "data" / "toy_precomp" / name
    if name.endswith(".npy"):
        np.save(path, change(np.load(path)))
    else:
        write_lines(path, change(path.read_text().splitlines()))
    model, loader = load_split(toy[1]["t2i"], str(tmp_path / "data"), None, "test")
    with pytest.raises(InputError, match=f"made from other {said}, --overwrite"):
        open_or_build(toy[1]["t2i"], model, loader, "test", built[2])


def test_a_collection_of_another_vocabulary_of_the_same_size_is_refused(toy, built):
    model, loader = load(toy[1]["t2i"])
    words = loader.dataset.vocab.word2idx
    words["ball"], words["red"] = words["red"], words["ball"]
    with pytest.raises(InputError, match="made from other vocabulary, --overwrite"):
        open_or_build(toy[1]["t2i"], model, loader, "test", built[2])


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


@pytest.mark.parametrize("rows", ["{}", "[1]", '[{"pictures": 3}]', "[" * 100_000])
def test_the_benchmark_refuses_rows_of_another_form_before_it_measures(toy, tmp_path, monkeypatch, rows):
    (tmp_path / "x.json").write_text(rows)
    with pytest.raises(InputError, match="x.json: .*, expected the rows of an earlier run; delete it"):
        measured(monkeypatch, toy[1]["t2i"], tmp_path / "x.png")


def test_the_command_builds_and_searches(toy, monkeypatch, capsys):
    _, paths = toy
    monkeypatch.setattr("sys.argv", ["build_index.py", "--model_path", paths["t2i"], "--query", "a red ball"])
    build_index.main()
    folder, printed = collection_folder(paths["t2i"], "toy_precomp", "test"), capsys.readouterr().out
    assert set(os.listdir(folder)) == FINISHED
    assert f"{folder}: {N} pictures, {2 * N} captions" in printed and printed.count("  picture ") == 10


def measured(monkeypatch, path, out, *flags):
    """The rows that benchmark_search.py leaves in out's JSON."""
    command = ["benchmark_search.py", "--model_path", path, "--out", str(out), "--queries", "3", "--threads", "1"]
    monkeypatch.setattr("sys.argv", [*command, *flags])
    benchmark_search.main()
    return json.loads(out.with_suffix(".json").read_text())


def test_the_benchmark_measures_recall_and_times_by_size_and_candidates(toy, built, monkeypatch):
    root, paths = toy
    out, where = root / "measured.png", ("--collection", built[2], "--sizes", "30", "55", "60")
    rows = measured(monkeypatch, paths["t2i"], out, *where, "--parts", "recall")
    assert [(row["pictures"], row["stage"], row["candidates"]) for row in rows] == [
        (n, stage, 50) for n in (55, 60) for stage in ("anchors", "mean region")
    ]
    assert all(0.5 < row["recall"] <= 1 and row["queries"] == 3 for row in rows)  # 50 of 60 by chance: 0.83
    both = measured(monkeypatch, paths["t2i"], out, *where, "--parts", "times", "--exhaustive", "2")
    assert [row["recall"] for row in both if "recall" in row] == [row["recall"] for row in rows]
    alone = [row for row in both if row["stage"] == "exhaustive"]
    assert [(row["pictures"], row["candidates"], row["timed"]) for row in alone] == [
        (30, 30, 2),
        (55, 55, 2),
        (60, 60, 2),
    ]
    assert all(0 < row["median_ms"] <= row["p95_ms"] for row in both)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_says_what_is_found_of_the_exhaustive_top(toy, monkeypatch):
    """A first stage that knows all answers but three has a recall of 70 %."""
    model, loader = load(toy[1]["t2i"])
    collection = Collection.encode(model, loader)
    best = np.argsort(-collection.score_images(collection.embed(loader.dataset.captions[0])), kind="stable")

    knows = benchmark_search.Stage(lambda words, count: np.concatenate([best[:7], best[10 : count + 3]]))
    (row,) = benchmark_search.measure_recall(collection, loader.dataset.captions[:1], {"x": lambda n: knows}, [N])
    assert row == {"pictures": N, "stage": "x", "candidates": 50, "recall": 0.7, "worst_recall": 0.7, "queries": 1}


def test_the_benchmark_adds_no_rows_of_another_model_to_a_file(toy, built, tmp_path, monkeypatch):
    flags = ("--collection", built[2], "--sizes", "55", "--parts", "recall")
    rows = measured(monkeypatch, toy[1]["t2i"], tmp_path / "x.png", *flags)
    (tmp_path / "x.json").write_text(json.dumps([{**row, "made_from": "another"} for row in rows]))
    with pytest.raises(InputError, match="x.json: t2i rows of another checkpoint or other data"):
        measured(monkeypatch, toy[1]["t2i"], tmp_path / "x.png", *flags)


def test_the_benchmark_refuses_sizes_that_the_split_has_not(toy, built, monkeypatch):
    with pytest.raises(InputError, match="--sizes 61: the split test has 60 pictures; --drawn"):
        measured(monkeypatch, toy[1]["t2i"], toy[0] / "x.png", "--collection", built[2], "--sizes", "61")


def test_pictures_are_drawn_once(tmp_path):
    benchmark_search.draw_pictures(str(tmp_path), 7)
    features = tmp_path / "demo_precomp" / "train_ims.npy"
    captions = (tmp_path / "demo_precomp" / "train_caps.txt").read_text()
    assert captions.count("\n") == 7 and len(set(captions.splitlines())) == 7
    assert np.load(features).shape == (7, 36, 128) and not (tmp_path / "demo_precomp" / "train_images").exists()
    before = features.stat().st_mtime_ns
    benchmark_search.draw_pictures(str(tmp_path), 7)
    assert features.stat().st_mtime_ns == before


# ---------------------------------------------------------------- words that the vocabulary lacks


def query(monkeypatch, path, out, sentence):
    """Run build_index.py --query as a command."""
    line = ["build_index.py", "--model_path", path, "--out", str(out), "--query", sentence]
    monkeypatch.setattr("sys.argv", line)
    run(build_index.main)


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
def test_a_query_without_a_known_word_is_refused_before_anything_is_built(
    toy, tmp_path, monkeypatch, capsys, sentence, said
):
    with pytest.raises(SystemExit) as left:
        query(monkeypatch, toy[1]["t2i"], tmp_path / "made", sentence)
    assert left.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "made").exists()


def test_the_unknown_words_of_a_query_are_named(toy, built, monkeypatch, capsys):
    query(monkeypatch, toy[1]["t2i"], built[2], "a red xyzzy plugh xyzzy")
    printed = capsys.readouterr().out
    assert "not in the vocabulary, read as <unk>: xyzzy, plugh\n" in printed and printed.count("  picture ") == 10
    query(monkeypatch, toy[1]["t2i"], built[2], "a red ball")
    assert "not in the vocabulary" not in capsys.readouterr().out


# ---------------------------------------------------------------- pictures without captions


@pytest.mark.parametrize("way", ["t2i", "i2t"])
def test_pictures_without_captions_are_encoded_and_searched(toy, tmp_path, monkeypatch, capsys, way):
    shutil.copytree(toy[0] / "data", tmp_path / "data")
    os.remove(tmp_path / "data" / "toy_precomp" / "test_caps.txt")
    line = ["build_index.py", "--model_path", toy[1][way], "--data_path", str(tmp_path / "data")]
    monkeypatch.setattr("sys.argv", [*line, "--out", str(tmp_path / "made"), "--query", "a red ball"])
    run(build_index.main)
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'made'}: {N} pictures, 0 captions" in printed and printed.count("  picture ") == 10
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
