"""Odd requests of all kinds: never a 5xx, always JSON with scores or one line that says why not.

FUZZ_REQUESTS=5000 pytest -s tests/test_server_fuzz.py makes that many (200 by default) and prints the answers' counts.
"""

import collections
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import IMG_DIM, encode, make_request, post, scorer_of, serve

counts = collections.Counter()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FLOATS = st.floats(width=32)
CORNERS = st.lists(st.floats(-500, 500, width=32) | FLOATS, min_size=4, max_size=4)
VALUES = (
    JSON
    | st.lists(FLOATS, max_size=40).map(encode)
    | CORNERS.map(lambda box: encode([box] * 36))
    | FLOATS.map(lambda x: encode([x] * 36 * IMG_DIM))
    | st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=IMG_DIM, max_size=IMG_DIM)
)


@st.composite
def bodies(draw):
    """The bytes of a request with up to four values changed or removed, and sometimes some bytes."""
    request = make_request(draw(st.integers(1, 3)), seed=draw(st.integers(0, 20)))
    image, wholes = request["boxes"][0], request["whole_items"]
    places = [(request, name) for name in (*request, "sentences")] + [(image, name) for name in image]
    places += [(request["boxes"], -1), (wholes, -1), (wholes[0], -1), (request["sentence"], -1)]
    for container, key in draw(st.lists(st.sampled_from(places), max_size=4)):
        if isinstance(container, dict) and draw(st.integers(0, 4)) == 0:
            container.pop(key, None)
        else:
            container[key] = draw(VALUES)
    body = json.dumps(request, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=4)) + body[at + draw(st.integers(0, 4)) :] * draw(st.integers(0, 1))
    return body


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with serve(scorer_of(str(tmp_path_factory.mktemp("model")))) as port:
        yield port
    print(f"\n{counts.total()} requests, answers by status: {dict(counts)}")


@settings(max_examples=int(os.environ.get("FUZZ_REQUESTS", "200")), suppress_health_check=list(HealthCheck))
@given(body=bodies())
def test_odd_bodies_get_scores_or_a_reason(port, body):
    status, answer, _ = post(port, body)
    counts[status] += 1
    if status == 200:
        assert set(answer) == {"sim_t2i", "sim_i2t"}
    else:
        assert status == 400 and set(answer) == {"error"} and answer["error"] and "\n" not in answer["error"]
