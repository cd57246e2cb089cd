"""ECCV Caption and CxC metrics against the package that defines them, and the splits that they are refused for."""

import warnings

import numpy as np
import pytest

from lib import eccv
from lib.errors import InputError

KEYS = ["eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_r1", "cxc_r5", "cxc_r10"]
LONGEST = 50


def package_metrics(sims):
    """What the package eccv_caption computes from the ids in each query's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ujson is missing
        from eccv_caption import Metrics

    images, captions = eccv.testall_ids()

    def ranked(scores, queries, candidates):  # no query has more than LONGEST right candidates
        best = [np.argpartition(row, -LONGEST)[-LONGEST:] for row in scores]
        order = [top[np.argsort(-row[top])] for top, row in zip(best, scores, strict=True)]
        return {int(q): candidates[top].tolist() for q, top in zip(queries, order, strict=True)}

    i2t, t2i = ranked(sims, images, captions), ranked(sims.T, captions, images)
    names = ("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_recalls")
    found = Metrics().compute_all_metrics(i2t, t2i, target_metrics=names, Ks=(1, 5, 10))
    return {key: (100 * found[key]["i2t"], 100 * found[key]["t2i"]) for key in KEYS}


def similarities(seed, skill):
    """Random similarities in which right pairs score higher by skill. No right one ties with a wrong one."""
    rng = np.random.default_rng(seed)
    sims = rng.standard_normal((5000, 25000), dtype=np.float32)
    for pairs in eccv.right_pairs("eccv"), eccv.right_pairs("cxc"):
        for image, captions in pairs[0].items():
            sims[image, captions[captions >= 0]] += skill
    sims += np.arange(5000, dtype=np.float32)[:, None] * 1e-4  # some images score higher for every caption
    return sims


def test_the_numbers_are_those_of_the_package():
    sims = similarities(seed=1, skill=2.0)
    found, expected = eccv.metrics(sims), package_metrics(sims)
    assert list(found) == KEYS
    for key in KEYS:
        assert found[key] == pytest.approx(expected[key], abs=1e-9), key
    assert all(1 < value < 99.9 for pair in found.values() for value in pair)


def test_a_tie_counts_against_the_model():
    assert all(value == 0 for pair in eccv.metrics(np.zeros((5000, 25000), np.float32)).values() for value in pair)


def test_precisions_of_one_query_by_hand():
    """Right ones at ranks 1, 3 and 7 of R = 3: P@1 = 1 and P@3 = 2/3 count, their mean over R is 5/9."""
    ranks = eccv.right_ranks(np.array([9.0, 8, 7, 6, 5, 4, 3]), np.array([6, 0, 2]))
    assert ranks.tolist() == [1, 3, 7]
    assert eccv.precisions(ranks) == pytest.approx((5 / 9, 2 / 3, 1))
    assert eccv.right_ranks(np.array([1.0, 2]), np.array([-1, 1])).tolist() == [1, np.inf]


def test_similarities_of_another_split_are_refused():
    with pytest.raises(InputError, match=r"similarities \(1000, 5000\), expected those of testall"):
        eccv.metrics(np.zeros((1000, 5000)))


def test_ids_of_testall_are_accepted_as_people_write_them():
    images, captions = (list(map(str, ids.tolist())) for ids in eccv.testall_ids())
    repeated = [image for image in images for _ in range(5)]
    for ids in (None, images, repeated, captions, [str(i) for i in range(5000)]):
        eccv.check_split("data/coco_precomp/testall", 5000, 25000, ids)


def test_another_split_or_order_is_refused_with_the_line():
    with pytest.raises(InputError, match="test: 1000 images and 5000 captions, --eccv expects MS-COCO's testall"):
        eccv.check_split("test", 1000, 5000, None)
    images = list(map(str, eccv.testall_ids()[0].tolist()))
    images[41], images[42] = images[42], images[41]
    with pytest.raises(InputError, match=f"testall_ids.txt, line 42: found {images[41]}, expected {images[42]}"):
        eccv.check_split("testall", 5000, 25000, images)
    with pytest.raises(InputError, match="testall_ids.txt: 7 ids, expected 5000 or 25000"):
        eccv.check_split("testall", 5000, 25000, ["7"] * 7)
