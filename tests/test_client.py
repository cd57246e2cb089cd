"""test_server/test.py against a small server of the same form: order, skips, attempts, resumption, messages."""

import base64
import json
import os
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "test_server" / "test.py"


def floats(*numbers):
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


class Handler(BaseHTTPRequestHandler):
    """Scores picture i of a request with (id + 1000 * length of the sentence) / 1e4, after the planned mishaps.

    server.mishaps: what happens to the first requests: a status, (status, headers, body), or "drop".
    server.refuse: ids that make a request a bad one. server.seen: (words, ids) of each scored request.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.under_way += 1
        try:
            self.respond(request)
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def respond(self, request):
        time.sleep(self.server.delay(request))
        with self.server.lock:
            mishap = self.server.mishaps.pop(0) if self.server.mishaps else None
            self.server.times.append(time.monotonic())
        if mishap == "drop":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if mishap:
            status, headers, body = mishap if isinstance(mishap, tuple) else (mishap, {}, '{"error": "planned"}')
            return self.answer(status, body, headers)
        problem = self.problem(request)
        if problem:
            self.server.problems.append(problem)
        ids = [box["image_id"] for box in request["boxes"]]
        refused = [i for i in ids if i in self.server.refuse]
        if refused:
            return self.answer(400, json.dumps({"error": f"boxes: image_id {refused[0]} is odd"}))
        self.server.seen.append((request["sentence"], ids))
        t2i = [(i + 1000 * len(request["sentence"])) / 1e4 for i in ids]
        self.answer(200, json.dumps({"sim_t2i": t2i, "sim_i2t": [-x for x in t2i]}))

    def problem(self, request):
        """What does not fit the contract, or None. Picture i is i + 1 wide, i + 2 high; its features say i, too."""
        if self.path != "/scan_sentence_image_score" or self.headers["Content-Type"] != "application/json":
            return self.path, self.headers["Content-Type"]
        if self.headers["X-API-Key"] != self.server.api_key:
            return "key", self.headers["X-API-Key"]
        if set(request) != {"sentence", "boxes", "whole_items"} or len(request["boxes"]) != len(request["whole_items"]):
            return sorted(request)
        for box, whole in zip(request["boxes"], request["whole_items"], strict=True):
            i = box["image_id"]
            if box != row(i) or whole != [i / 8] * 4:
                return box, whole

    def answer(self, status, body, headers=()):
        body = body.encode()
        self.send_response(status)
        if self.server.model:
            self.send_header("X-Model", self.server.model)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock, server.delay = threading.Lock(), lambda request: 0
    server.mishaps, server.refuse, server.seen, server.times, server.problems = [], set(), [], [], []
    server.api_key, server.under_way, server.model = None, 0, None
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url(i):
    return f"http://pictures/{i}.jpg"


def row(i):
    boxes, features = floats(i, i, i, i), floats(*[i] * 4)
    return {"image_id": i, "image_w": i + 1, "image_h": i + 2, "num_boxes": 1, "boxes": boxes, "features": features}


def make_data(folder, items, regions=None, wholes=None, ids=None):
    """items: [(content, tag, [picture numbers])]; the rest: which pictures have what (default: all)."""
    every = sorted({i for _, _, pictures in items for i in pictures})
    with open(folder / "test_list.json", "w") as file:
        for content, tag, pictures in items:
            item = {"Tag": tag, "Content": content, "Img_urls": list(map(url, pictures))}
            file.write(json.dumps({**item, "Img_flags": [0] * len(pictures)}) + "\n")
    # rows in another order than the list, and some that no item needs
    rows = [map(str, row(i).values()) for i in [*reversed(every if regions is None else regions), 900]]
    (folder / "test_own.tsv.0").write_text("".join("\t".join(r) + "\n" for r in rows))
    wholes = [*reversed(every if wholes is None else wholes), 901]
    # the id is what stands before the first dot of the base name, wherever the picture lay
    lines = [json.dumps([f"x/{i}.0.jpg", [i / 8] * 4]) + "\n" for i in wholes]
    (folder / "test_features.json").write_text("".join(lines))
    ids = every if ids is None else ids
    (folder / "img_id.txt").write_text("".join(f"{url(i)}\t{i}\n" for i in [*ids, 902]))


def command(folder, port, *options, kind="sentence"):
    return [
        sys.executable,
        str(SCRIPT),
        str(folder / "out.json"),
        kind,
        str(port),
        "--data_path",
        str(folder),
        *map(str, options),
    ]


def run(folder, server, *options, **kind):
    port = server if isinstance(server, int) else server.server_port
    return processes.run(command(folder, port, *options, **kind), cwd=SCRIPT.parent)


def expect(words, pictures):
    t2i = [(i + 1000 * len(words)) / 1e4 for i in pictures]
    return {"urls": list(map(url, pictures)), "dist_t2i": t2i, "dist_i2t": [-x for x in t2i]}


def read(folder):
    return [json.loads(line) for line in (folder / "out.json").read_text().splitlines()]


@pytest.mark.parametrize("kind, key", [("sentence", 0), ("anything", 0), ("tag", 1)])
def test_one_line_per_item_in_the_lists_order(tmp_path, server, kind, key):
    items = [(["词"] * (i % 3 + 1), ["t"] * (i % 4 + 1), [2 * i, 2 * i + 1, 2]) for i in range(20)]
    make_data(tmp_path, items)
    server.delay = lambda request: 0.05 if request["boxes"][0]["image_id"] % 8 == 0 else 0  # answers overtake others
    server.api_key = "s3cret"
    done = run(tmp_path, server, "--api_key", "s3cret", kind=kind)
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path) == [expect(item[key], item[2]) for item in items]
    assert server.problems == [] and len(server.seen) == 20
    assert done.stdout == "scored 60 of 60 pictures, 20 of 20 items have scores\n"
    assert not (tmp_path / "out.json.part").exists()


def test_what_cannot_be_scored_is_left_out_and_counted(tmp_path, server):
    items = [(["a"], [], [1, 2, 3, 4]), (["b"], [], []), (["c"], [], [5, 3]), (["d"], [], [2, 3]), (["e"], [], [6])]
    make_data(tmp_path, items, regions=[1, 3, 4, 5, 6], wholes=[1, 2, 4, 5, 6], ids=[1, 2, 3, 5, 6])
    with open(tmp_path / "test_own.tsv.0", "a") as file:
        file.write("no number\tmore\n\n")
    server.refuse = {6}
    done = run(tmp_path, server)
    assert (done.returncode, done.stderr) == (0, "")
    nothing = expect([], [])
    assert read(tmp_path) == [expect(["a"], [1]), nothing, expect(["c"], [5]), nothing, nothing]
    assert sorted(done.stdout.splitlines()) == sorted(
        [
            "scored 2 of 9 pictures, 2 of 5 items have scores",
            "skipped 3: picture without a whole-image feature in test_features.json",
            "skipped 2: picture without region features in test_own.tsv.0",
            "skipped 1: picture without an id in img_id.txt",
            "skipped 1: item without pictures",
            "skipped 1: picture that the server refused: 400 boxes: image_id 6 is odd",
            "skipped 2: row of test_own.tsv.0 without an integer id",
        ]
    )


def test_one_refused_picture_does_not_cost_the_others_of_its_item(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1, 2, 3])])
    server.refuse = {2}
    assert "skipped 1: picture that the server refused: 400" in run(tmp_path, server).stdout
    assert read(tmp_path) == [expect(["a"], [1, 3])]


def test_errors_and_lost_connections_are_tried_again(tmp_path, server):
    items = [([str(i)], [], [i]) for i in range(4)]
    make_data(tmp_path, items)
    server.mishaps = [500, "drop", 503]
    done = run(tmp_path, server)
    assert done.returncode == 0 and "skipped" not in done.stdout
    assert read(tmp_path) == [expect(*item[::2]) for item in items]
    assert len(server.times) == 7 and len(server.seen) == 4


def test_waits_as_long_as_a_busy_server_asks(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1])])
    server.mishaps = [(429, {"Retry-After": "2"}, "busy")]
    assert run(tmp_path, server).returncode == 0
    assert read(tmp_path) == [expect(["a"], [1])]
    assert server.times[1] - server.times[0] >= 2


def test_an_item_that_fails_every_time_is_counted_and_a_wrong_key_stops_the_run(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1, 2]), (["b"], [], [3])])
    server.mishaps = [500, 500]
    done = run(tmp_path, server, "--retries", 1, "--workers", 1)
    assert "skipped 2: picture that the server refused: 500 planned" in done.stdout
    assert read(tmp_path) == [expect([], []), expect(["b"], [3])]
    server.mishaps = [(401, {}, '{"error": "wrong key"}')]
    done = run(tmp_path, server, "--workers", 1)
    address = f"127.0.0.1:{server.server_port}/scan_sentence_image_score"
    assert (done.returncode, done.stderr) == (2, f"error: {address} answered 401 wrong key\n")
    server.mishaps = [(200, {}, "<html>")]
    done = run(tmp_path, server, "--workers", 1)
    assert done.returncode == 2 and "expected sim_t2i and sim_i2t" in done.stderr
    server.mishaps = [(200, {}, '{"sim_t2i": [NaN, 1], "sim_i2t": [1, 1]}')]
    done = run(tmp_path, server, "--workers", 1)  # asked again, a picture at a time
    assert done.returncode == 0 and read(tmp_path)[0] == expect(["a"], [1, 2])


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, server):
    items = [([str(i)], [], [i]) for i in range(30)]
    make_data(tmp_path, items, regions=[i for i in range(30) if i != 2])
    part = tmp_path / "out.json.part"
    server.delay = lambda request: 0.05
    with processes.started(command(tmp_path, server.server_port, "--workers", 2), cwd=SCRIPT.parent):
        processes.wait_for(lambda: part.exists() and part.read_bytes().count(b"\n") >= 8)
    processes.wait_for(lambda: not server.under_way)
    kept = part.read_bytes().count(b"\n")
    assert 8 <= kept < 30 and not (tmp_path / "out.json").exists()
    part.write_bytes(part.read_bytes() + b'{"item": "cut o')
    first, server.seen = len(server.seen), []
    assert first <= kept + 2 * 2  # no more than the requests under way are lost

    server.mishaps = [None, (401, {}, "stop")]
    assert run(tmp_path, server, "--workers", 1).returncode == 2  # stopped a second time, one item later
    kept, server.seen = kept + 1, []
    assert part.read_bytes().count(b"\n") == kept
    done = run(tmp_path, server)
    assert done.returncode == 0
    assert [pictures for _, pictures in sorted(server.seen, key=lambda s: s[1])] == [[i] for i in range(kept, 30)]
    assert read(tmp_path) == [expect(words, [] if pictures == [2] else pictures) for words, _, pictures in items]
    assert done.stdout.splitlines() == [
        f"going on after item {kept} of 30, from {part}; remove that file to start over",
        "scored 29 of 30 pictures, 29 of 30 items have scores",
        "skipped 1: picture without region features in test_own.tsv.0",
    ]
    assert sorted(os.listdir(tmp_path)) == [
        "img_id.txt",
        "out.json",
        "test_features.json",
        "test_list.json",
        "test_own.tsv.0",
    ]


def test_a_server_that_goes_away_ends_the_run_and_keeps_what_was_scored(tmp_path, server):
    items = [([str(i)], [], [i]) for i in range(3)]
    make_data(tmp_path, items)
    server.delay = lambda request: 0.2 if server.seen else 0
    server.mishaps = [None, "drop", "drop"]
    done = run(tmp_path, server, "--workers", 1, "--retries", 1)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"127.0.0.1:{server.server_port} gave no scores in 2 attempts" in done.stderr
    assert len((tmp_path / "out.json.part").read_text().splitlines()) == 1
    assert run(tmp_path, server).returncode == 0
    assert read(tmp_path) == [expect(*item[::2]) for item in items]


def test_a_part_of_another_list_or_of_tags_is_not_continued(tmp_path, server):
    make_data(tmp_path, [(["a"], ["a"], [1]), (["b"], ["b"], [2])])
    server.mishaps = [None, (401, {}, "no")]
    assert run(tmp_path, server, "--workers", 1).returncode == 2
    done = run(tmp_path, server, kind="tag")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/out.json.part:1: expected a line for the same item")
    assert run(tmp_path, server).returncode == 0


def test_an_interrupted_run_goes_on_with_the_same_model_only(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1]), (["b"], [], [2]), (["c"], [], [3])])
    server.model, server.mishaps = "aaaa", [None, (401, {}, "no")]
    assert run(tmp_path, server, "--workers", 1).returncode == 2
    server.model = "bbbb"
    done = run(tmp_path, server)
    assert done.returncode == 2 and not (tmp_path / "out.json").exists()
    assert "answers with model bbbb, the items before were scored with aaaa" in done.stderr
    server.model = "aaaa"
    assert run(tmp_path, server).returncode == 0
    assert read(tmp_path) == [expect([word], [i + 1]) for i, word in enumerate("abc")]


def test_an_interrupted_run_goes_on_with_the_same_features_only(tmp_path, server):
    items = [(["a"], [], [1]), (["b"], [], [2])]
    make_data(tmp_path, items, regions=[2])
    server.mishaps = [(401, {}, "no")]
    assert run(tmp_path, server, "--workers", 1).returncode == 2
    make_data(tmp_path, items)
    done = run(tmp_path, server)
    assert done.returncode == 2 and "made with the same data files; remove the file to start over" in done.stderr


def test_a_run_that_scores_nothing_fails_and_writes_nothing(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1, 2])], ids=[])
    done = run(tmp_path, server)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no picture could be scored: 2 x picture without an id in img_id.txt" in done.stderr
    assert not list(tmp_path.glob("out.json*"))
    (tmp_path / "test_list.json").write_text("")
    done = run(tmp_path, server)
    assert done.returncode == 2 and "test_list.json: no items, expected one a line" in done.stderr


def test_ids_that_stand_twice_are_refused_or_told(tmp_path, server):
    make_data(tmp_path, [(["a"], [], [1])])
    for name in ("test_own.tsv.0", "test_features.json"):
        (tmp_path / name).write_text((tmp_path / name).read_text() * 2)
    done = run(tmp_path, server)
    assert done.returncode == 0
    for name in ("test_own.tsv.0", "test_features.json"):
        assert f"note: 1 rows of {name} repeat an id, whose last row counts" in done.stdout
    with open(tmp_path / "img_id.txt", "a") as file:
        file.write(f"{url(1)}\t7\n")
    done = run(tmp_path, server)
    assert done.returncode == 2 and "img_id.txt:3: id 7 for a url that has id 1 already" in done.stderr


def test_a_server_that_is_not_up_is_named_on_one_line(tmp_path):
    make_data(tmp_path, [(["a"], [], [1])])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can answer here
        port = free.getsockname()[1]
        done = run(tmp_path, port)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: no server at 127.0.0.1:{port} (") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "name, line, told",
    [
        (
            "test_list.json",
            '{"Content": "no list", "Img_urls": []}',
            'expected {"Content": [word, ...], "Img_urls": [url',
        ),
        ("img_id.txt", "http://a.jpg 5", "expected url<TAB>id"),
        ("test_own.tsv.0", "5\t10\t10\t36\tAAAA", "found 5 fields"),
        ("test_own.tsv.0", "5\t10\tten\t36\tAAAA\tAAAA", "expected image_id, image_w, image_h"),
        ("test_features.json", '["x/5.jpg", ["a"]]', "expected [url, [numbers]]"),
        ("test_features.json", '["x/a.jpg", [0.5]]', "starting with an integer"),
    ],
)
def test_a_malformed_line_is_named_with_what_was_expected(tmp_path, server, name, line, told):
    make_data(tmp_path, [(["a"], [], [1])])
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(f"{text}{line}\n")
    done = run(tmp_path, server)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"{tmp_path}/{name}:{len(text.splitlines()) + 1}: " in done.stderr and told in done.stderr
    assert server.seen == []
