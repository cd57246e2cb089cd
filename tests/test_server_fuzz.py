"""Odd requests of all kinds: never a 5xx, always JSON with scores or one line that says why not.

FUZZ_REQUESTS=5000 pytest -s tests/test_server_fuzz.py makes that many (300 by default) and prints the answers' counts.
"""

import collections
import contextlib
import http.client
import json
import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import LIMIT
from serving import IMG_DIM, PATH, encode, make_request, post, scorer_of, serve

N_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "300"))
STATUSES = {200, 400, 405, 413, 415}  # what may be answered where no key is asked for and nobody else asks
counts = collections.Counter()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with serve(scorer_of(str(tmp_path_factory.mktemp("model"))), "--max_body_mb", "1") as port:
        yield port
    print(f"\n{counts.total()} requests, answers by status: {dict(counts)}")


def examine(status, answer):
    """Whether an answer to a scoring request is as promised."""
    counts[status] += 1
    assert status in STATUSES, answer
    if status == 200:
        assert set(answer) == {"sim_t2i", "sim_i2t"}
    else:
        assert set(answer) == {"error"} and answer["error"] and "\n" not in answer["error"]


# ---------------------------------------------------------------- bodies that are nearly right

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FLOATS = st.floats(width=32)
ODD_BASE64 = (
    st.text(max_size=40)
    | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1"))
    | st.lists(FLOATS, max_size=40).map(encode)
    | FLOATS.map(lambda x: encode([x] * 36 * 4))
    | FLOATS.map(lambda x: encode([x] * 36 * IMG_DIM))
)
CORNERS = st.lists(st.floats(-500, 500, width=32) | FLOATS, min_size=4, max_size=4).map(lambda box: encode([box] * 36))
SENTENCES = st.text(max_size=60) | st.lists(st.text(max_size=12), max_size=12)
FIELDS = {
    "image_id": JSON,
    "image_h": st.integers() | st.floats() | JSON,
    "image_w": st.integers() | st.floats() | JSON,
    "num_boxes": st.integers(30, 40) | JSON,
    "boxes": CORNERS | ODD_BASE64 | JSON,
    "features": ODD_BASE64 | JSON,
}
WHOLES = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=IMG_DIM, max_size=IMG_DIM)


@st.composite
def bodies(draw):
    """The bytes of a request with up to four things wrong, or odd."""
    request = make_request(draw(st.integers(1, 3)), seed=draw(st.integers(0, 20)))
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["sentence", "sentences", "image", "whole", "field", "remove"]))
        if kind == "sentence":
            request["sentence"] = draw(SENTENCES)
        elif kind == "sentences":
            request.pop("sentence", None)
            request["sentences"] = draw(st.lists(SENTENCES, max_size=4))
        elif kind == "field":
            request[draw(st.sampled_from(["sentence", "sentences", "boxes", "whole_items", "x"]))] = draw(JSON)
        elif kind == "remove":
            request.pop(draw(st.sampled_from(["sentence", "boxes", "whole_items"])), None)
        elif kind == "image" and isinstance(request.get("boxes"), list) and request["boxes"]:
            name = draw(st.sampled_from(list(FIELDS)))
            if isinstance(request["boxes"][0], dict):
                request["boxes"][0][name] = draw(FIELDS[name])
        elif kind == "whole" and isinstance(request.get("whole_items"), list) and request["whole_items"]:
            request["whole_items"][-1] = draw(WHOLES | JSON)
    body = json.dumps(request, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:  # cut, or with some bytes changed
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=4)) + body[at + draw(st.integers(0, 4)) :] * draw(st.integers(0, 1))
    return body


CONTENT_TYPES = st.sampled_from(["application/json"] * 20 + ["text/plain", "", "application/json; charset=utf-8"])
quick = settings(
    max_examples=N_REQUESTS // 2,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)


@quick
@given(body=bodies(), content_type=CONTENT_TYPES)
def test_odd_bodies_get_scores_or_a_reason(port, body, content_type):
    examine(*post(port, body, {"Content-Type": content_type})[:2])


# ---------------------------------------------------------------- what the OpenAPI document allows, and does not


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_requests_made_from_the_openapi_document_or_against_it_get_scores_or_a_reason(port, mode):
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")

    @settings(quick, max_examples=max(1, N_REQUESTS // 4))
    @given(case=schema[PATH]["POST"].as_strategy(generation_mode=mode))
    def check(case):
        response = case.call()
        examine(response.status_code, response.json())

    check()


# ---------------------------------------------------------------- bytes that are not HTTP


@settings(quick, max_examples=max(1, N_REQUESTS // 10))
@given(
    method=st.sampled_from(["POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
    path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map(lambda text: "/" + text),
    body=st.binary(max_size=40),
)
def test_odd_addresses_and_methods_get_an_answer(port, method, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        status = connection.getresponse().status
    counts[status] += 1
    assert status < 500
