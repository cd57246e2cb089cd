"""test_server/test.py against a small server of the same form: order, skips, attempts, resumption, messages."""

import base64
import json
import os
import socket
import struct
import sys
import threading
from argparse import Namespace
from pathlib import Path

import processes
import pytest
from dataset_commands import call
from fastapi import FastAPI, Request, Response

from test_server import test as client

SCRIPT = Path(__file__).resolve().parents[1] / "test_server" / "test.py"

# ---------------------------------------------------------------- a server and its data


@pytest.fixture
def server():
    """Scores image i of a request with (id + 1000 * length of the sentence) / 1e4, after the planned mishaps.

    mishaps: what happens to the first requests: a status, (status, headers, body), or "drop". refuse: ids that make a
    request a bad one. hold: called with each request before it is answered. model: X-Model of the answers.
    seen: (words, ids) of each scored request; asked: headers and body of each.
    """
    server = Namespace(mishaps=[], refuse=set(), hold=lambda request: None, model=None, seen=[], asked=[])
    app = FastAPI()

    @app.post("/scan_sentence_image_score")
    def score(request: Request, body: dict):
        server.asked.append((request.headers, body))
        server.hold(body)
        mishap = server.mishaps.pop(0) if server.mishaps else None
        ids = [box["image_id"] for box in body["boxes"]]
        if mishap == "drop":
            return Response(headers={"Content-Length": "9"})  # nothing comes: the connection ends
        if refused := [i for i in ids if i in server.refuse]:
            mishap = 400, {}, json.dumps({"error": f"boxes: image_id {refused[0]} is odd"})
        if mishap:
            status, headers, text = mishap if isinstance(mishap, tuple) else (mishap, {}, '{"error": "planned"}')
        else:
            server.seen.append((body["sentence"], ids))
            t2i = [(i + 1000 * len(body["sentence"])) / 1e4 for i in ids]
            status, headers, text = 200, {}, json.dumps({"sim_t2i": t2i, "sim_i2t": [-x for x in t2i]})
        return Response(text, status, {**headers, **({"X-Model": server.model} if server.model else {})})

    with processes.serve_app(app) as server.port:
        yield server


def url(i):
    return f"http://images/{i}.jpg"


def row(i):
    boxes, features = (base64.b64encode(struct.pack("<4f", *[i * k] * 4)).decode() for k in (1, 2))
    return {"image_id": i, "image_w": i + 1, "image_h": i + 2, "num_boxes": 1, "boxes": boxes, "features": features}


def make_data(folder, items, regions=None, wholes=None, ids=None):
    """items: [(content, tag, [image numbers])]; the rest: which images have what (default: all)."""
    every = sorted({i for _, _, images in items for i in images})
    with open(folder / "test_list.json", "w") as file:
        for content, tag, images in items:
            item = {"Tag": tag, "Content": content, "Img_urls": list(map(url, images))}
            file.write(json.dumps({**item, "Img_flags": [0] * len(images)}) + "\n")
    # rows in another order than the list, and some that no item needs
    rows = [map(str, row(i).values()) for i in [*reversed(every if regions is None else regions), 900]]
    (folder / "test_own.tsv.0").write_text("".join("\t".join(r) + "\n" for r in rows))
    wholes = [*reversed(every if wholes is None else wholes), 901]
    # the id is what stands before the first dot of the base name, wherever the image lay
    lines = [json.dumps([f"x/{i}.0.jpg", [i / 8] * 4]) + "\n" for i in wholes]
    (folder / "test_features.json").write_text("".join(lines))
    ids = every if ids is None else ids
    (folder / "img_id.txt").write_text("".join(f"{url(i)}\t{i}\n" for i in [*ids, 902]))


def command(folder, server, *options, kind="sentence", out=None):
    port = server if isinstance(server, int) else server.port
    return [SCRIPT, out or folder / "out.json", kind, port, "--data_path", folder, *options]


def start(folder, server, *options):
    """The client in a process of its own."""
    return processes.started([sys.executable, *map(str, command(folder, server, *options))])


def run(folder, server, *options, **names):
    """The client in this process: a CompletedProcess."""
    return call(client.main, *command(folder, server, *options, **names))


def expect(words, images):
    t2i = [(i + 1000 * len(words)) / 1e4 for i in images]
    return {"urls": list(map(url, images)), "dist_t2i": t2i, "dist_i2t": [-x for x in t2i]}


def read(folder):
    return [json.loads(line) for line in (folder / "out.json").read_text().splitlines()]


def is_refused(done, *said):
    """Whether a command ended with status 2 and one line that says so."""
    (line,) = done.stderr.splitlines()
    return done.returncode == 2 and line.startswith("error: ") and all(words in line for words in said)


# ---------------------------------------------------------------- what is scored


@pytest.mark.parametrize("kind, key", [("anything", 0), ("tag", 1)])
def test_one_line_per_item_in_the_lists_order(tmp_path, server, kind, key):
    items = [(["词"] * (i % 3 + 1), ["t"] * (i % 4 + 1), [2 * i, 2 * i + 1, 2]) for i in range(20)]
    make_data(tmp_path, items)
    for name in os.listdir(tmp_path):  # files may begin with a byte order mark
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())

    def overtake(request):
        """Every fourth item is answered after the one that follows."""
        first = request["boxes"][0]["image_id"]
        processes.wait_for(lambda: first % 8 or any(ids[0] == first + 2 for _, ids in server.seen))

    server.hold = overtake
    (tmp_path / "out.json").symlink_to(tmp_path / "target.json")
    done = run(tmp_path, server, "--api_key", "s3cret", kind=kind)
    assert (done.returncode, done.stderr, (tmp_path / "out.json").is_symlink()) == (0, "", True)
    assert read(tmp_path) == [expect(item[key], item[2]) for item in items]
    assert len(server.asked) == 20
    for headers, request in server.asked:
        assert (headers["Content-Type"], headers["X-API-Key"]) == ("application/json", "s3cret")
        assert set(request) == {"sentence", "boxes", "whole_items"}
        ids = [box["image_id"] for box in request["boxes"]]
        assert request["boxes"] == list(map(row, ids)) and request["whole_items"] == [[i / 8] * 4 for i in ids]
    assert done.stdout == "scored 60 of 60 images, 20 of 20 items have scores\n"
    assert not (tmp_path / "out.json.part").exists()


def test_what_cannot_be_scored_is_left_out_and_counted(tmp_path, server):
    items = [(["a"], [], [1, 2, 3, 4]), (["b"], [], []), (["c"], [], [5, 6, 3]), (["d"], [], [2, 3]), (["e"], [], [6])]
    make_data(tmp_path, items, regions=[1, 3, 4, 5, 6], wholes=[1, 2, 4, 5, 6], ids=[1, 2, 3, 5, 6])
    with open(tmp_path / "test_own.tsv.0", "a") as file:
        file.write("no number\tmore\n2018_1\t1\t1\t1\tAA==\tAA==\n")  # rows without an integer id
    server.refuse = {6}
    done = run(tmp_path, server)
    assert (done.returncode, done.stderr) == (0, "")
    nothing = expect([], [])
    assert read(tmp_path) == [expect(["a"], [1]), nothing, expect(["c"], [5]), nothing, nothing]
    assert sorted(done.stdout.splitlines()) == [
        "scored 2 of 10 images, 2 of 5 items have scores",
        "skipped 1: image without an id in img_id.txt",
        "skipped 1: item without images",
        "skipped 2: image that the server refused: 400 boxes: image_id 6 is odd",
        "skipped 2: image without region features in test_own.tsv.0",
        "skipped 3: image without a whole-image feature in test_features.json",
    ]


def test_the_published_functions_keep_their_signatures_and_results(tmp_path, server, monkeypatch):
    folder = tmp_path / "data" / "tencent_data_meta"
    folder.mkdir(parents=True)
    make_data(folder, [(["a", "b"], ["c"], [3, 4])])
    rows = client.process_tsv_file(str(folder / "test_own.tsv.0"))
    assert list(rows) == rows[:] == [row(4), row(3), row(900)]
    assert len(client.process_tsv_file(str(folder / "test_own.tsv.0"), topn=2)) == 2
    assert client.load_img_url_to_id(str(folder / "img_id.txt")) == {url(3): 3, url(4): 4, url(902): 902}
    wholes = client.process_json_file(str(folder / "test_features.json"))
    assert dict(wholes) == {i: [i / 8] * 4 for i in (4, 3, 901)}
    (tmp_path / "test_server").mkdir()
    monkeypatch.chdir(tmp_path / "test_server")
    monkeypatch.setattr(client, "g_port", server.port)
    monkeypatch.setattr(client, "g_output_path", "out.json")
    client.process()
    assert read(tmp_path / "test_server") == [expect(["c"], [3, 4])]
    client.process(text_input_flag="sentence")
    assert read(tmp_path / "test_server") == [expect(["a", "b"], [3, 4])]
    answer = json.loads(client.get_sim({"sentence": ["a"], "boxes": [rows[0]], "whole_items": [wholes[4]]}))
    assert answer == {"sim_t2i": [0.1004], "sim_i2t": [-0.1004]}


# ---------------------------------------------------------------- attempts


def test_errors_and_lost_connections_are_tried_again(tmp_path, server):
    items = [([str(i)], [], [i]) for i in range(4)]
    make_data(tmp_path, items)
    server.mishaps = [500, "drop", 503]
    done = run(tmp_path, server)
    assert done.returncode == 0 and "skipped" not in done.stdout
    assert read(tmp_path) == [expect(*item[::2]) for item in items]
    assert len(server.asked) == 7 and len(server.seen) == 4


def test_waits_as_long_as_a_busy_server_asks_and_says_long_waits_once(server, capsys):
    asked, delays = client.Server(port=server.port), []
    asked.stop = Namespace(wait=delays.append)
    server.mishaps = [(429, {"Retry-After": after}, '{"error": "busy"}') for after in ("2", "soon", "7200", "1800")]
    asked.ask(json.dumps({"sentence": [], "boxes": [], "whole_items": []}).encode())
    assert delays == [2, pytest.approx(1.1, abs=0.1), 3600, 1800]
    assert capsys.readouterr().err == f"waiting 3600 s: 127.0.0.1:{server.port} answered 429 busy\n"


def test_an_item_that_fails_every_time_is_counted(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1, 2]), (["b"], [], [3])])
    server.mishaps = [500, 500]
    done = run(tmp_path, server, "--retries", 1, "--workers", 1)
    assert "skipped 2: image that the server refused: 500 planned" in done.stdout
    assert read(tmp_path) == [expect([], []), expect(["b"], [3])]
    for answer in ('{"sim_t2i": [NaN, 1], "sim_i2t": [1, 1]}', "<html>"):
        server.mishaps = [(200, {}, answer)]
        assert run(tmp_path, server, "--workers", 1).returncode == 0  # asked again, an image at a time
        assert read(tmp_path)[0] == expect(["a"], [1, 2])


def test_a_server_that_will_score_nothing_ends_the_run(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1, 2]), (["b"], [], [3])])
    server.mishaps = [(401, {}, '{"error": "wrong key"}')]
    address = f"127.0.0.1:{server.port}"
    done = run(tmp_path, server, "--workers", 1)
    assert is_refused(done, f"{address}/scan_sentence_image_score answered 401 wrong key")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can answer here
        port = free.getsockname()[1]
        assert is_refused(run(tmp_path, port), f"no server at 127.0.0.1:{port} (")


def test_the_key_is_read_from_the_environment_and_must_be_ascii(tmp_path, server, monkeypatch):
    make_data(tmp_path, [(["a"], [], [1])])
    monkeypatch.setenv("PFAN_API_KEY", "s3cret")
    assert run(tmp_path, server).returncode == 0
    assert [headers["X-API-Key"] for headers, _ in server.asked] == ["s3cret"]
    assert is_refused(run(tmp_path, server, "--api_key", "schlüssel"), "--api_key or PFAN_API_KEY", "ASCII")
    assert len(server.asked) == 1


# ---------------------------------------------------------------- interrupted runs


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, server):
    items = [([str(i)], [], [i]) for i in range(30)]
    make_data(tmp_path, items, regions=[i for i in range(30) if i != 2])
    part, go_on = tmp_path / "out.json.part", threading.Event()
    server.hold = lambda request: request["boxes"][0]["image_id"] < 10 or go_on.wait(processes.LIMIT)
    with start(tmp_path, server, "--workers", 2):
        processes.wait_for(lambda: part.exists() and part.read_bytes().count(b"\n") == 10)
    go_on.set()
    processes.wait_for(lambda: len(server.seen) == len(server.asked))
    assert len(server.asked) <= 10 - 1 + 2 and not (tmp_path / "out.json").exists()  # two were under way
    part.write_bytes(part.read_bytes() + b'{"item": "cut o')
    server.mishaps = [None, "drop", "drop"]
    done = run(tmp_path, server, "--workers", 1, "--retries", 1)  # stopped a second time, one item later
    assert is_refused(done, f"127.0.0.1:{server.port} gave no scores in 2 attempts")
    assert part.read_bytes().count(b"\n") == 11
    server.seen = []
    done = run(tmp_path, server)
    assert sorted(images for _, images in server.seen) == [[i] for i in range(11, 30)]
    assert read(tmp_path) == [expect(words, [] if images == [2] else images) for words, _, images in items]
    assert done.stdout.splitlines() == [
        f"going on after item 11 of 30, from {part}; remove that file to start over",
        "scored 29 of 30 images, 29 of 30 items have scores",
        "skipped 1: image without region features in test_own.tsv.0",
    ]
    assert not list(tmp_path.glob("out.json.*"))


def test_an_interrupted_run_goes_on_with_the_same_words_features_and_model_only(tmp_path, server):
    items = [(["a"], ["b"], [1]), (["b"], ["a"], [2]), (["c"], ["c"], [3])]
    make_data(tmp_path, items)
    server.model, server.mishaps = "aaaa", [None, (401, {}, "no")]
    assert run(tmp_path, server, "--workers", 1).returncode == 2
    other = "out.json.part: expected lines of the same test list, words and data files; remove the file to start over"
    assert is_refused(run(tmp_path, server, kind="tag"), other)
    server.model = "bbbb"
    assert is_refused(run(tmp_path, server), "answers with model bbbb, the items before were scored with aaaa")
    server.model = "aaaa"
    features = tmp_path / "test_features.json"
    text = features.read_text()
    features.write_text(text.replace("0.125", "0.250"))  # extracted anew, of the same size
    assert is_refused(run(tmp_path, server), other)
    assert not (tmp_path / "out.json").exists()
    features.write_text(text)
    assert run(tmp_path, server).returncode == 0
    assert read(tmp_path) == [expect(words, images) for words, _, images in items]


# ---------------------------------------------------------------- what cannot be read or written


def test_a_run_that_scores_nothing_fails_and_writes_nothing(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1, 2])], ids=[])
    assert is_refused(run(tmp_path, server), "no image could be scored: 2 x image without an id in img_id.txt")
    assert not list(tmp_path.glob("out.json*"))
    (tmp_path / "test_list.json").write_text("")
    assert is_refused(run(tmp_path, server), "test_list.json: no items, expected one a line")


def test_two_runs_do_not_write_one_file(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1])])
    go_on = threading.Event()
    server.hold = lambda request: go_on.wait(processes.LIMIT)
    with start(tmp_path, server) as first:
        processes.wait_for(lambda: server.asked)
        assert is_refused(run(tmp_path, server), "out.json.part: another run is writing it, expected another OUT")
        go_on.set()
        assert first.wait(processes.LIMIT) == 0
    assert read(tmp_path) == [expect(["a"], [1])] and len(server.seen) == 1


def test_an_output_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1])])
    for out, said in (
        ("nowhere/out.json", "nowhere/out.json: No such file or directory"),
        (tmp_path, "is no file, expected one or a free name"),
        (tmp_path / "test_list.json", "test_list.json: is read or written as well, expected another file"),
    ):
        assert is_refused(run(tmp_path, server, out=out), said)
    assert server.asked == []


@pytest.mark.parametrize(
    "name, line, told",
    [
        ("test_list.json", '{"Content": "no list", "Img_urls": []}', '{"Content": [word, ...], "Img_urls": [url'),
        ("img_id.txt", "http://a.jpg 5", "expected url<TAB>id"),
        ("img_id.txt", "http://a.jpg\t2018_1", "the id an integer"),
        ("img_id.txt", f"{url(1)}\t7", "id 7 for a url that has id 1 already"),
        ("test_own.tsv.0", "5\t10\t10\t36\tAAAA", "features (base64) with tabs between"),
        ("test_own.tsv.0", "5\t10\tten\t36\tAAAA\tAAAA", "expected image_id, image_w, image_h"),
        ("test_features.json", '["x/5.jpg", ["a"]]', "expected [url, [numbers]]"),
        ("test_features.json", '["x/2018_1.jpg", [0.5]]', "an integer up to its first dot"),
    ],
)
def test_a_malformed_line_is_named_with_what_was_expected(tmp_path, server, name, line, told):
    make_data(tmp_path, [(["a"], [], [1])])
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(f"{text}{line}\n")
    assert is_refused(run(tmp_path, server), f"{tmp_path}/{name}:{len(text.splitlines()) + 1}: ", told)
    assert server.seen == []
