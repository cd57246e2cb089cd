"""ECCV Caption and CxC metrics, and the splits that they are refused for."""

import numpy as np
import pytest

from lib import eccv
from lib.errors import InputError

KEYS = ["eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_r1", "cxc_r5", "cxc_r10"]


def test_r1_is_that_of_the_packages_right_pairs_and_a_tie_counts_against_the_model():
    """Similarities of two values: where every right caption scores 1 and, in every second row, one wrong one too."""
    images, captions = eccv.testall_ids()
    right = eccv.package().eccv_gts["i2t"]
    column = {caption: i for i, caption in enumerate(captions.tolist())}
    sims = np.zeros((5000, 25000), np.float32)
    wins = []
    for row, image in enumerate(images.tolist()):
        own = [column[x] for x in right.get(image, ()) if x in column]
        sims[row, own] = 1
        if row % 2:
            sims[row, next(i for i in range(25000) if i not in own)] = 1
        if image in right:
            wins.append(bool(own) and row % 2 == 0)
    found = eccv.metrics(sims)
    assert list(found) == KEYS
    assert found["eccv_r1"][0] == pytest.approx(100 * np.mean(wins), abs=1e-9)
    assert all(value == 0 for pair in eccv.metrics(np.zeros((5000, 25000), np.float32)).values() for value in pair)


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
