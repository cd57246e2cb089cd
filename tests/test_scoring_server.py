"""The scoring server: the published contract, many clients at once, refusals, limits, the end."""

import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from dataset_commands import call
from processes import LIMIT, free_ports, run, started, wait_for
from serving import IMG_DIM, PATH, encode, get, make_boxes, make_model, make_request, metric, post, scorer_of, serve

from lib import web
from lib.errors import InputError
from Tencent_PFAN import bodies
from Tencent_PFAN.scan_server_whole import main
from Tencent_PFAN.scoring import Scorer, caption

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return scorer_of(str(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def port(scorer):
    with serve(scorer, "--max_body_mb", "2") as port:
        yield port


def scores(port, request):
    """(2, P) or (2, S, P): sim_t2i and sim_i2t."""
    status, answer, _ = post(port, request)
    assert status == 200, answer
    assert set(answer) == {"sim_t2i", "sim_i2t"}
    return np.array([answer["sim_t2i"], answer["sim_i2t"]])


def pack(body):
    """A gzip file without its time, which would stand in the names of tests and differ between pytest's processes."""
    return gzip.compress(body, mtime=0)


# ---------------------------------------------------------------- scores


def test_published_requests_get_the_published_scores(shared):
    folder = shared / "golden" / "server"
    published = Scorer(str(folder / "sentence_t2i.pth.tar"), str(folder / "vocab"))
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert lines
    with serve(published) as port:
        for line in lines:
            ours = scores(port, line["request"])
            expected = [line["response"]["sim_t2i"], line["response"]["sim_i2t"]]
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_a_published_model_without_its_vocabulary_is_refused_with_the_flag_that_names_it(shared, tmp_path):
    with pytest.raises(InputError, match="no such vocabulary; name its folder with --vocab_path, or make it with"):
        Scorer(str(shared / "golden/server/sentence_t2i.pth.tar"), str(tmp_path))


def test_clients_at_once_get_the_scores_that_they_get_alone(port, tmp_path):
    requests = [make_request(1 + i % 5, seed=i % 20, sentence=["足球"] * (1 + i % 7)) for i in range(60)]
    expected = [scores(port, request) for request in requests]
    fresh = Scorer(make_model(str(tmp_path)), cache_bytes=0)
    with serve(fresh) as other_port, ThreadPoolExecutor(16) as pool:
        for got, wanted in zip(pool.map(lambda r: scores(other_port, r), requests), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
        assert metric(other_port, "pfan_batch_requests_sum") == len(requests)
        assert metric(other_port, "pfan_batch_requests_count") < len(requests)  # some came together


def test_several_sentences_and_any_number_of_images_get_the_scores_of_each_alone(port):
    several, sentences = changed(300, sentence=None), [["上海", "新闻"], ["足球"], "红色 汽车"]
    together = scores(port, {**several, "sentences": sentences})
    assert together.shape == (2, 3, 300)
    for image in (0, 150, 299):
        one = {name: values[image : image + 1] for name, values in several.items()}
        for i, sentence in enumerate(sentences):
            ours = scores(port, {**one, "sentence": sentence})[:, 0]
            np.testing.assert_allclose(ours, together[:, i, image], rtol=0, atol=1e-5)


def test_a_plain_string_is_cut_into_words_where_it_is_chinese(port):
    assert caption("上海新闻,足球iPhone 12.5", "sentence").split() == ["上海", "新闻", ",", "足球", "iPhone", "12.5"]
    assert caption("U.S. news", "sentence") == "U.S. news"
    request = make_request()
    cut, whole = (scores(port, {**request, "sentence": s}) for s in (["上海", "新闻"], "上海新闻"))
    np.testing.assert_array_equal(cut, whole)


def test_what_does_not_matter_does_not_change_the_scores(scorer, port):
    request = make_request()
    expected = scores(port, request)
    features = request["boxes"][0]["features"]
    broken = "\r\n".join(features[i : i + 76] for i in range(0, len(features), 76)) + "\n"
    changed = {**request, "more": {"surplus": [1]}, "boxes": [{**box, "also": None} for box in request["boxes"]]}
    changed["boxes"][0]["features"] = broken
    np.testing.assert_array_equal(scores(port, changed), expected)
    body = json.dumps(request).encode()
    for sent, headers in (
        (b"\xef\xbb\xbf" + body, {"Content-Type": "Application/JSON; charset=UTF-8"}),
        (pack(body), {"Content-Encoding": "gzip"}),
    ):
        status, answer, headers = post(port, sent, headers)
        assert (status, answer["sim_t2i"]) == (200, expected[0].tolist())
        assert headers["X-Model"] == scorer.digest


def test_a_box_that_reaches_outside_is_clipped(port):
    inside, outside = (scores(port, changed_boxes(50, 40, *corner)) for corner in ((200, 100), (999, 1e30)))
    np.testing.assert_array_equal(inside, outside)


def test_images_that_come_again_are_not_encoded_again_and_the_cache_has_an_end(tmp_path):
    scorer = Scorer(make_model(str(tmp_path)), cache_bytes=20_000)

    def score(request):
        """The scores, without a server, and how many images were encoded for them."""
        job = scorer.read(json.dumps(request).encode())
        return *scorer.score([job])[0].values(), len(job.new)

    first = make_request(4)
    before = score(first)
    assert before[2] == 4 and score(first) == (*before[:2], 0)
    moved = make_request(4)
    moved["boxes"][0]["image_h"] = 101  # the same features elsewhere in the image: another embedding
    assert score(moved)[2] == 1
    for seed in range(1, 9):
        score(make_request(4, seed=seed))
    assert 0 < scorer.cache.currsize <= 20_000
    assert score(first) == (*map(pytest.approx, before[:2]), 4)


# ---------------------------------------------------------------- refusals


def changed_image(**fields):
    """A request whose image 1 has other fields; None removes one."""
    request = make_request(3)
    image = {**request["boxes"][1], **fields}
    request["boxes"][1] = {name: value for name, value in image.items() if value is not None}
    return request


def changed_boxes(*corners):
    boxes = make_boxes(np.random.default_rng(0))
    boxes[7] = corners
    return changed_image(boxes=encode(boxes))


def changed_features(value):
    return changed_image(features=encode([[0] * IMG_DIM] * 5 + [[value] * IMG_DIM] * 31))


def changed_whole(value):
    return changed(whole_items=[[0.5] * IMG_DIM, value])


def changed(n_images=2, **fields):
    """A request with other fields; None removes one."""
    return {name: value for name, value in {**make_request(n_images), **fields}.items() if value is not None}


BAD = {
    "not JSON": (b"{", "body: not JSON"),
    "not UTF-8": (b'{"sentence": "\xff\xff", "boxes": [], "whole_items": []}', "body: not JSON"),
    "NaN in JSON": (json.dumps(changed_whole([float("nan")] * IMG_DIM)).encode(), "body: not JSON"),
    "too deep": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body: not JSON (maximum recursion depth"),
    "an array": ([1], "body: expected `object`"),
    "no sentence": (changed(sentence=None), "sentence: missing"),
    "both sentences": (changed(sentences=[["上海"]]), "sentence: beside sentences"),
    "empty sentence": (changed(sentence=[]), "sentence: empty"),
    "blank words": (changed(sentence=[" ", ""]), "sentence: empty"),
    "odd words": (changed(sentence=["a", 3]), "sentence[1]: expected `str`, got `int`"),
    "long sentence": (changed(sentence=["a"] * 1001), "sentence: 1001 words"),
    "very long sentence": (changed(sentence="a" * 20_001), "sentence: 20001 characters"),
    "no sentences": (changed(sentence=None, sentences=[]), "sentences: expected `array` of length >= 1"),
    "many sentences": (changed(sentence=None, sentences=["a"] * 101), "sentences: expected `array` of length <= 100"),
    "empty sentences": (changed(sentence=None, sentences=[["a"], ""]), "sentences[1]: empty"),
    "no images": (changed(boxes=[], whole_items=[]), "boxes: expected `array` of length >= 1"),
    "fewer wholes": (changed(whole_items=make_request(1)["whole_items"]), "whole_items: 1, but 2 boxes"),
    "no image_id": (changed_image(image_id=None), "boxes[1]: object missing required field `image_id`"),
    "height 0": (changed_image(image_h=0), "boxes[1].image_h: expected `float` >= 1"),
    "huge width": (changed_image(image_w=1e7), "boxes[1].image_w: expected `float` <= 1000000"),
    "width a string": (changed_image(image_w="200"), "boxes[1].image_w: expected `float`, got `str`"),
    "35 boxes": (changed_image(num_boxes=35), "boxes[1].num_boxes: expected `int` >= 36"),
    "wrong base64": (changed_image(features="!" + encode(np.zeros(288))[1:]), "boxes[1].features: not base64"),
    "base64 not ASCII": (changed_image(boxes="上海"), "boxes[1].boxes: not base64"),
    "few features": (changed_image(features=encode([1])), "boxes[1].features: 4 bytes, expected 1152"),
    "many boxes": (changed_image(boxes=encode(np.ones((37, 4)))), "boxes[1].boxes: 592 bytes, expected 576"),
    "NaN feature": (changed_features(np.nan), "boxes[1].features, region 5: NaN"),
    "huge feature": (changed_features(1e30), "boxes[1].features, region 5: NaN, infinite or beyond 1e+09"),
    "NaN box": (changed_boxes(np.nan, 0, 1, 1), "boxes[1].boxes: box 7 [nan, 0.0, 1.0, 1.0]: corners must be"),
    "reversed box": (changed_boxes(50, 10, 40, 20), "boxes[1].boxes: box 7 [50.0, 10.0, 40.0, 20.0]: corners are"),
    "flat box": (changed_boxes(50, 10, 50, 20), "boxes[1].boxes: box 7 [50.0, 10.0, 50.0, 20.0] has no area"),
    "box outside": (changed_boxes(201, 10, 300, 20), "boxes[1].boxes: box 7 [201.0, 10.0, 300.0, 20.0] has no area"),
    "boxes from 0 to 1": (
        changed_image(boxes=encode(make_boxes(np.random.default_rng(0)) / [200, 100, 200, 100])),
        "boxes[1].boxes: none reaches beyond 1 in an image of 100 x 200, expected pixels",
    ),
    "short whole": (changed_whole([0.5]), "whole_items[1]: 1 numbers, expected 8"),
    "whole of strings": (changed_whole([0.5] * 7 + ["x"]), "whole_items[1][7]: expected `float`, got `str`"),
    "huge whole": (changed_whole([1e300] * 8), "whole_items[1]: NaN, infinite or beyond"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_one_line_that_names_field_and_index(port, case):
    body, reason = BAD[case]
    status, answer, _ = post(port, body)
    assert status == 400
    assert set(answer) == {"error"}
    assert answer["error"].startswith(reason)
    assert "\n" not in answer["error"]


class Stub:
    """A scorer whose score() is another: score(jobs, the real one)."""

    def __init__(self, scorer, score):
        self.img_dim, self.read, self.digest = scorer.img_dim, scorer.read, scorer.digest
        self.score = lambda jobs: score(jobs, scorer.score)


def test_a_bad_request_costs_those_beside_it_nothing(scorer):
    """A model that fails for one job of a batch: the others get their scores."""

    def fail(jobs, score):
        if any(len(job.keys) == 3 for job in jobs):
            raise RuntimeError("planned")
        return score(jobs)

    requests = [make_request(3 if i == 5 else 1, seed=i) for i in range(12)]
    with serve(Stub(scorer, fail)) as port, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: post(port, request), requests))
    assert [answer[0] for answer in answers] == [500 if i == 5 else 200 for i in range(12)]
    assert answers[5][1] == {"error": "internal error"}


def test_other_addresses_methods_and_content_types_are_refused_as_json(port):
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": ""}):
        status, answer, _ = post(port, make_request(), headers)
        assert (status, answer) == (415, {"error": "Content-Type: expected application/json"})
    assert get(port, "/nothing") == (404, '{"error":"Not Found"}')
    assert get(port, PATH) == (405, '{"error":"Method Not Allowed"}')
    assert get(port, "/health", method="HEAD") == (200, "")  # load balancers ask so


HEAD = f"POST {PATH} HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"


def begin(port, head, body=b""):
    """A connection over which the head of a request was sent, and so much of its body."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
    connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    return connection


def rest(connection):
    """What a server sends to the connection's end."""
    return connection.makefile("rb").read()


def test_a_body_over_the_limit_is_refused_before_it_is_read(port):
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    for head, body in (
        ("Content-Length: 900000000000\n", b""),  # none of it was sent
        ("Transfer-Encoding: chunked\n", 2 * chunk + b"1\r\n \r\n"),
    ):
        with begin(port, HEAD + head, body) as connection:
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 413 ") and answer.endswith(b'{"error":"body: over 2 MB (--max_body_mb)"}')
    status, answer, _ = post(port, b" " * (3 << 20))  # a client that sends all before it reads hears the reason
    assert (status, answer) == (413, {"error": "body: over 2 MB (--max_body_mb)"})


@pytest.mark.parametrize(
    "body, encoding, expected",
    [
        (pack(b" " * (3 << 20)), "gzip", (413, "body: over 2 MB (--max_body_mb)")),
        (pack(b" " * (3 << 20))[:-4] + b"\0\1\0\0", "gzip", (400, "body: gzip that is cut off, or more")),
        (pack(b"{") * 2, "gzip", (400, "body: gzip that is cut off, or more than one file")),
        (pack(b"{")[:-9] + b"\0" * 9, "gzip", (400, "body: ")),
        (b"{}", "gzip", (400, "body: not gzip, though Content-Encoding says so")),
        (b"{}", "br", (415, "Content-Encoding: br, expected gzip or none")),
    ],
)
def test_packed_bodies_have_the_limit_of_others_and_a_reason(port, body, encoding, expected):
    status, answer, _ = post(port, body, {"Content-Encoding": encoding})
    assert status == expected[0] and answer["error"].startswith(expected[1])


@pytest.mark.parametrize(
    "head, status",
    [
        (f"POST {PATH} HTTP/1.1\nHost: localhost\nContent-Length: 9\nExpect: 100-continue\n", 415),
        ("POST / HTTP/1.1\nHost: elsewhere.example\nTransfer-Encoding: chunked\n", 400),
    ],
)
def test_an_answer_before_the_body_ends_the_connection(port, head, status, monkeypatch):
    monkeypatch.setattr(web, "LINGER_SECONDS", 0.1)
    with begin(port, head) as connection:
        answer = rest(connection)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and answer.endswith(b"}")


def test_only_local_names_reach_a_server_on_a_local_address(scorer, port):
    status, answer, _ = post(port, make_request(), {"Host": "elsewhere.example"})
    assert status == 400 and answer["error"].startswith("Host: elsewhere.example, expected 127.0.0.1, ")
    for path in ("/", "/health", "/metrics", "/demo/items"):
        assert get(port, path, {"Host": "elsewhere.example:5091"})[0] == 400
    for host in ("localhost", "LOCALHOST:5091", "127.0.0.1:5091", "[::1]:5091"):
        assert get(port, "/health", {"Host": host})[0] == 200
    for host in ("localhost@elsewhere.example", "localhost.elsewhere.example", "127.0.0.1.", "[::1", "a:b:c"):
        assert get(port, "/health", {"Host": host})[0] == 400
    with serve(scorer, "--allowed_hosts", "Scores.example", "b.example") as port:
        assert get(port, "/health", {"Host": "scores.example"})[0] == 200
        assert get(port, "/health", {"Host": "c.example"})[0] == 400
    with serve(scorer, "--host", "0.0.0.0") as port:  # of a network: its names are not known here
        assert get(port, "/health", {"Host": "elsewhere.example"})[0] == 200


# ---------------------------------------------------------------- limits


@contextlib.contextmanager
def unfinished_bodies(port, n, begun=b"{"):
    """n connections over which a body has begun to arrive."""
    with contextlib.ExitStack() as stack:
        head = HEAD + f"Content-Length: {len(begun) + 1000}\n"
        connections = [stack.enter_context(begin(port, head, begun)) for _ in range(n)]
        wait_for(lambda: metric(port, "pfan_bodies") == n)
        yield connections


@pytest.mark.parametrize(
    "flags, reason",
    [
        (("--timeout", "0.3", "--min_rate", "0"), b"body: not complete after 0.3 seconds"),
        (("--min_rate", "50"), b"body: slower than 50 KB a second (--min_rate)"),
    ],
)
def test_a_body_that_does_not_come_in_time_is_given_up(scorer, monkeypatch, flags, reason):
    monkeypatch.setattr(bodies, "FREE_SECONDS", 0.1)
    with serve(scorer, *flags) as port:
        with begin(port, HEAD + "Content-Length: 1000\n", b"{") as connection:
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 408 ") and reason in answer
        begin(port, HEAD + "Content-Length: 1000\n", b"{").close()
        wait_for(lambda: post(port, make_request())[0] == 200)


def test_bodies_that_do_not_come_take_no_place_in_the_queue(scorer):
    with serve(scorer, "--queue", "1") as port, unfinished_bodies(port, 8):
        for seed in range(3):
            assert scores(port, make_request(seed=seed)).shape == (2, 2)
        assert metric(port, "pfan_bodies") == 8 and '"waiting":8' in get(port, "/health")[1]


def test_where_no_more_bodies_may_arrive_the_slowest_gives_way(scorer, monkeypatch):
    monkeypatch.setattr(bodies, "YOUNG_SECONDS", 0)
    with serve(scorer, "--bodies", "2") as port, unfinished_bodies(port, 2) as connections:
        connections[0].sendall(b" " * 500)
        assert scores(port, make_request()).shape == (2, 2)
        answer = rest(connections[1])
        assert answer.startswith(b"HTTP/1.1 429 ") and b"the slowest; others needed its place" in answer
        assert metric(port, "pfan_bodies") == 1


def test_bodies_whose_rates_are_not_known_yet_are_not_given_up_for_another(scorer, monkeypatch):
    monkeypatch.setattr(bodies, "YOUNG_SECONDS", 1000)
    with serve(scorer, "--bodies", "2") as port, unfinished_bodies(port, 2):
        status, answer, headers = post(port, make_request())
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer == {"error": "2 bodies arrive, come back later"}


def test_bodies_of_too_many_bytes_together_give_way(scorer, monkeypatch):
    monkeypatch.setattr(bodies, "YOUNG_SECONDS", 0)
    with (
        serve(scorer, "--bodies_mb", "1", "--timeout", "1000") as port,
        unfinished_bodies(port, 1, b"{" + b" " * 300_000) as slow,
        unfinished_bodies(port, 1, b"{" + b" " * 900_000),
    ):
        assert slow[0].recv(1000).startswith(b"HTTP/1.1 429 ")
        assert scores(port, make_request()).shape == (2, 2)


@contextlib.contextmanager
def held(scorer):
    """scorer, which waits until it may go on, at the latest when the context ends; and the event to set."""
    go_on = threading.Event()

    def wait(jobs, score):
        assert go_on.wait(LIMIT)
        return score(jobs)

    try:
        yield Stub(scorer, wait), go_on
    finally:
        go_on.set()


def test_a_full_queue_answers_429_and_when_to_come_back(scorer):
    with held(scorer) as (slow, go_on), serve(slow, "--queue", "3") as port, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(scores, port, make_request(seed=i)) for i in range(3)]
        wait_for(lambda: metric(port, "pfan_waiting") == 3)
        status, answer, headers = post(port, make_request())
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer == {"error": "3 requests wait, come back later"}
        go_on.set()
        assert all(answer.result().shape == (2, 2) for answer in answers)
        assert scores(port, make_request()).shape == (2, 2)


def test_scores_that_take_too_long_are_answered_503_and_health_says_that_they_hang(scorer):
    with held(scorer) as (slow, go_on), serve(slow, "--timeout", "0.3") as port:
        status, answer, headers = post(port, make_request())
        assert (status, headers["Retry-After"]) == (503, "1")
        assert answer == {"error": "not scored within 0.3 seconds"}
        wait_for(lambda: post(port, make_request())[0] == get(port, "/health")[0] == 503)
        assert get(port, "/health")[1] == '{"error":"a batch has been scored for over 0.3 seconds (--timeout)"}'
        go_on.set()
        wait_for(lambda: post(port, make_request())[0] == get(port, "/health")[0] == 200)


def test_an_api_key_is_asked_for_where_one_is_set(scorer):
    with serve(scorer, "--api_key", "geheim") as port:
        for headers in ({}, {"X-API-Key": "falsch"}, {"X-API-Key": "ü".encode().decode("latin-1")}):
            assert post(port, make_request(), headers)[:2] == (401, {"error": "X-API-Key: missing or wrong"})
        assert post(port, make_request(), {"X-API-Key": "geheim"})[0] == 200
        assert get(port, "/metrics")[0] == 401
        assert get(port, "/health")[0] == 200


@pytest.mark.parametrize(
    "flags, key, said",
    [
        (["--api_key", ""], "geheim", "--api_key or PFAN_API_KEY: expected printable ASCII"),
        ([], "schlüssel", "--api_key or PFAN_API_KEY: expected printable ASCII"),
        (["--timeout", "inf"], None, "--timeout inf: expected a number, at least 0.1"),
        (["--queue", "0"], None, "--queue 0: expected a whole number, at least 1"),
        (["--host", "a..b"], None, "--host a..b --port 1: "),
    ],
)
def test_flags_that_no_server_can_keep_are_refused(monkeypatch, flags, key, said):
    monkeypatch.setenv("PFAN_API_KEY", key or "")
    done = call(main, "scan_server_whole.py", "model.pth.tar", "1", *flags)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- what people look at


def test_metrics_count_requests_errors_latency_and_batches(scorer):
    with serve(scorer) as port:
        post(port, make_request(4))
        post(port, b"{")
        post(port, b"{}", {"Content-Type": "text/plain"})
        for name, value in {
            'pfan_requests_total{status="200"}': 1,
            'pfan_requests_total{status="400"}': 1,
            'pfan_requests_total{status="415"}': 1,
            "pfan_errors_total": 2,
            "pfan_latency_seconds_count": 3,
            "pfan_batch_requests_count": 1,
            "pfan_batch_pictures_sum": 4,
            'pfan_pictures_total{source="new"}': 4,
        }.items():
            assert metric(port, name) == value, name


def test_page_and_documentation_load_nothing_from_elsewhere(port):
    status, page = get(port, "/")
    assert status == 200 and "<form" in page
    status, documentation = get(port, "/docs")
    assert status == 200
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page + documentation)
    document = json.loads(get(port, "/openapi.json")[1])
    body = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["boxes", "whole_items"]


# ---------------------------------------------------------------- processes


def answers(port, host="127.0.0.1"):
    try:
        return get(port, "/health", host=host)[0] == 200
    except OSError:
        return False


def test_sigterm_lets_what_has_begun_finish(tmp_path):
    """Also without stderr, and with a stdout that cannot encode the model's path."""
    (tmp_path / "modèle").mkdir()
    model, (port,) = make_model(str(tmp_path / "modèle")), free_ports(1)
    script = str(ROOT / "Tencent_PFAN/scan_server_whole.py")
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, script, model, str(port), "--threads", "1"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    with started(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert "mod\\xe8le/model.pth.tar: http://127.0.0.1:" in process.stdout.readline()
        wait_for(lambda: answers(port))
        body = json.dumps(make_request()).encode()
        with begin(port, HEAD + f"Content-Length: {len(body)}\nConnection: close\n", body[:-10]) as connection:
            wait_for(lambda: metric(port, "pfan_waiting") == 1)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: not answers(port))
            connection.sendall(body[-10:])
            assert rest(connection).startswith(b"HTTP/1.1 200 ")
        assert process.wait(LIMIT) == 0


HANGING = """
import threading
from Tencent_PFAN import scan_server_whole
scan_server_whole.Scorer.score = lambda self, jobs: threading.Event().wait()
scan_server_whole.run(scan_server_whole.main)
"""


def test_sigterm_ends_a_server_whose_scoring_hangs(tmp_path):
    model, (port,) = make_model(str(tmp_path)), free_ports(1)
    command = [sys.executable, "-c", HANGING, model, str(port), "--threads", "1", "--timeout", "1"]
    with started(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: answers(port))
        wait_for(lambda: post(port, make_request())[0] == get(port, "/health")[0] == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 1
        assert process.stderr.read() == "error: a batch was still being scored\n"


def test_run_server_starts_both_models_and_stops_both(tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        host, address = "::1", "[::1]"
    except OSError:  # a machine without IPv6
        host = address = "127.0.0.1"
    model, ports = make_model(str(tmp_path)), free_ports(2)
    names = {"SENTENCE_PORT": str(ports[0]), "TAG_PORT": str(ports[1])}
    command = ["sh", str(ROOT / "Tencent_PFAN" / "run_server.sh"), model, model, "--threads", "1", "--host", host]
    environment = {**ENVIRONMENT, **names}
    with started(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        ready = next(line for line in process.stdout if line.startswith("ready: "))
        assert all(f"http://{address}:{port}" in ready for port in ports)
        assert all(answers(port, host) for port in ports)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT) == 0
        assert not any(answers(port, host) for port in ports)


def test_run_server_prints_the_servers_flags():
    done = run(["sh", str(ROOT / "Tencent_PFAN" / "run_server.sh"), "--help"], env=ENVIRONMENT)
    assert done.returncode == 0 and "--queue_mb" in done.stdout


def test_run_server_says_in_one_line_what_is_wrong_with_a_model(tmp_path):
    (tmp_path / "damaged").write_text("no checkpoint")
    model, (sentence, tag) = make_model(str(tmp_path)), map(str, free_ports(2))
    environment = {**ENVIRONMENT, "SENTENCE_PORT": sentence, "TAG_PORT": tag}
    for name, said in (
        ("none", "none: no such checkpoint, expected one"),
        ("damaged", "damaged: truncated or not a checkpoint"),
    ):
        command = ["sh", str(ROOT / "Tencent_PFAN" / "run_server.sh"), model, str(tmp_path / name), "--threads", "1"]
        done = run(command, env=environment)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("error: ") and said in line
