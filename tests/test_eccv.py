"""ECCV Caption and CxC metrics, and the splits that they are refused for."""

import numpy as np
import pytest

from lib import eccv
from lib.errors import InputError


def r1(sims, queries, candidates, positives):
    """R@1 in percent: a query counts where none but its positives reaches its largest similarity."""
    row_of = {query: i for i, query in enumerate(queries.tolist())}
    rows = [(sims[row_of[query]], set(ids)) for query, ids in positives.items()]
    return 100 * np.mean([set(candidates[row == row.max()].tolist()) <= ids for row, ids in rows])


def test_r1_is_that_of_the_packages_positives_and_a_tie_counts_against_the_model(capsys):
    """Positives have similarity 1, and so have a few other pairs: about one an image."""
    images, captions = eccv.testall_ids()
    positives = eccv.package().eccv_gts
    column = {caption: i for i, caption in enumerate(captions.tolist())}
    sims = (np.random.default_rng(0).random((5000, 25000), np.float32) < 4e-5).astype(np.float32)
    for row, image in enumerate(images.tolist()):
        sims[row, [column[x] for x in positives["i2t"].get(image, ()) if x in column]] = 1
    i2t, t2i = eccv.print_metrics(sims)["eccv_r1"]
    assert 20 < i2t < 60 and i2t == pytest.approx(r1(sims, images, captions, positives["i2t"]))
    assert f"ECCV R@1: {i2t:.1f} {t2i:.1f}\n" in capsys.readouterr().out
    assert 20 < t2i < 90 and t2i == pytest.approx(r1(sims.T, captions, images, positives["t2i"]))


def test_ids_of_testall_are_accepted_as_people_write_them():
    images, captions = (list(map(str, ids.tolist())) for ids in eccv.testall_ids())
    repeated = [image for image in images for _ in range(5)]
    for ids in (None, images, repeated, captions, [str(i) for i in range(5000)]):
        eccv.check_split("data/coco_precomp/testall", 5000, 25000, ids)


def test_another_order_is_refused_with_the_line():
    images = list(map(str, eccv.testall_ids()[0].tolist()))
    images[41], images[42] = images[42], images[41]
    with pytest.raises(InputError, match=f"testall_ids.txt, line 42: found {images[41]}, expected {images[42]}"):
        eccv.check_split("testall", 5000, 25000, images)
