"""The checks that training and the data tools share."""

import numpy as np
import pytest

from lib.datasets.checks import rows_per_image, same_as_previous, unequal_repeats


def naive_rows_per_image(images):
    lengths, run = [], 1
    for before, row in zip(images, images[1:], strict=False):
        run = run + 1 if np.array_equal(before, row) else (lengths.append(run), 1)[1]
    return int(np.gcd.reduce([*lengths, run]))


@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (3, 3), (2, 4, 2), (6,), (2, 3), (5, 5, 10)])
def test_rows_per_image_is_what_counting_runs_gives(counts):
    images = np.random.default_rng(0).standard_normal((len(counts), 4, 8)).repeat(counts, axis=0)
    same = same_as_previous(images)
    assert same.tolist() == [np.array_equal(a, b) for a, b in zip(images, images[1:], strict=False)]
    assert rows_per_image(same) == naive_rows_per_image(images) == np.gcd.reduce(counts)


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ((2, 3, 2, 3), "rows 0 to 1 are one image and rows 2 to 4 another, 2 and 3 times"),
        ((5, 5, 4, 5, 6), "rows 5 to 9 are one image and rows 10 to 13 another, 5 and 4 times"),
        ((2, 4, 2, 4), "rows 0 to 1 are one image and rows 2 to 5 another, 2 and 4 times"),
        ((1, 1, 1, 3, 1), "rows 2 to 2 are one image and rows 3 to 5 another, 1 and 3 times"),
    ],
)
def test_images_that_stand_unequally_often_are_named_by_row(counts, named):
    images = np.random.default_rng(0).standard_normal((len(counts), 4, 8)).repeat(counts, axis=0)
    assert unequal_repeats(same_as_previous(images)).startswith(named)


@pytest.mark.parametrize("counts", [(1,), (5,), (5,) * 9, (1,) * 20 + (2,), (5,) * 19 + (10,)])
def test_equal_repeats_and_a_few_equal_images_are_legal(counts):
    images = np.random.default_rng(0).standard_normal((len(counts), 4, 8)).repeat(counts, axis=0)
    assert unequal_repeats(same_as_previous(images)) is None
