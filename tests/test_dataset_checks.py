"""The checks that training and the data tools share."""

import numpy as np
import pytest

from lib.datasets.checks import rows_per_image, same_as_previous


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
