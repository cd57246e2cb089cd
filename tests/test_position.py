"""Pixel boxes → position grids: what a grid promises, for boxes that nobody chose by hand."""

import numpy as np
import pytest
import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import position
from lib.errors import InputError
from position import BoxError, position_grid

NO_CELL = 256
ROUNDING = 2**-24  # areas closer than this, relative to the largest, count as equal


def cells_of(grid):
    return grid[..., :15].astype(int)


def weights_of(grid):
    return grid[..., 15:30]


@st.composite
def boxes_in_images(draw, reach=0.0):
    """A box x1, y1, x2, y2 that may reach outside by a share of the image, and the image's height and width."""
    height, width = draw(st.integers(1, 2000)), draw(st.integers(1, 2000))
    span = st.floats(-reach, 1 + reach, allow_nan=False, width=32)
    x1, x2 = sorted([draw(span) * width, draw(span) * width])
    y1, y2 = sorted([draw(span) * height, draw(span) * height])
    # a hair's breadth is no region: below it areas sink into the rounding of the corners themselves
    assume((x2 - x1 > 1e-3 or x1 == x2) and (y2 - y1 > 1e-3 or y1 == y2))
    return [x1, y1, x2, y2], height, width


@settings(max_examples=100)
@given(boxes_in_images(reach=1.0))
def test_the_weights_are_the_shares_of_the_cells_covered_most_by_the_part_of_a_box_inside_its_image(image):
    box, height, width = image
    inside = np.clip(box, 0, [width, height, width, height])
    grid = position_grid([box], [height, width])[0]
    cells, weights = cells_of(grid), weights_of(grid)
    area = reference.cell_areas(inside, height, width)
    listed = cells < NO_CELL
    assert (area > 0).sum() >= listed.sum() >= min((area > 1e-6 * area.max()).sum(), 15) * (area.max() > 0)
    assert len(set(cells[listed])) == listed.sum(), "a cell is listed twice"
    assert not weights[~listed].any() and (weights[listed] > 0).all()
    assert (np.diff(weights) <= ROUNDING).all(), "weights must descend"
    if area.max() > 0:
        assert weights.sum() == pytest.approx(1, abs=1e-6)
        top = np.sort(area)[::-1][:15]
        np.testing.assert_allclose(weights, top / top.sum(), atol=2e-6)
        np.testing.assert_allclose(weights[listed], area[cells[listed]] / top.sum(), atol=2e-6)
    else:
        assert (cells == NO_CELL).all()
    assert grid[30] == pytest.approx(np.prod(inside[2:] - inside[:2]) / (height * width), abs=1e-6)


def test_nearness_is_measured_in_pixels_not_in_cells():
    """In an image four times as wide as high, cells above and below are nearer than those beside."""
    grid = position_grid([[0, 0, 640, 160]], [160, 640])[0]
    rows = cells_of(grid) % 16
    columns = cells_of(grid) // 16
    assert np.ptp(rows) > np.ptp(columns)


@pytest.mark.parametrize(
    "box",
    [[5, 5, 5, 9], [5, 5, 9, 5], [0, 0, 0, 0], [-9, -9, -1, -1], [100, 3, 120, 9], [-5, 2, 0, 9]],
    ids=["no width", "no height", "a point", "above and left", "to the right", "touching the edge"],
)
def test_a_box_without_area_in_the_image_covers_no_cell(box):
    grid = position_grid([box], [100, 100])[0]
    assert grid.tolist() == [NO_CELL] * 15 + [0] * 16


def test_any_leading_dimensions_give_the_same_grids():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 200, (2, 3, 4, 2, 2)), axis=-2)
    boxes, sizes = corners.reshape(2, 3, 4, 4), rng.integers(50, 300, (2, 3, 2))
    grids = position_grid(boxes, sizes)
    assert grids.shape == (2, 3, 4, 31) and grids.dtype == np.float32
    for i in np.ndindex(2, 3):
        np.testing.assert_array_equal(grids[i], position_grid(boxes[i], sizes[i]))
    assert position_grid(np.zeros((0, 36, 4)), np.ones((0, 2))).shape == (0, 36, 31)


def test_blocks_leave_no_trace(monkeypatch):
    rng = np.random.default_rng(1)
    boxes = np.sort(rng.uniform(-20, 220, (9, 5, 2, 2)) ** [[[1, 2]]] / [1, 200], axis=-2).reshape(9, 5, 4)
    sizes = rng.integers(50, 300, (9, 2))
    whole = position_grid(boxes, sizes)
    for n_regions in (1, 7, 44, 45):
        monkeypatch.setattr(position, "REGIONS_AT_ONCE", n_regions)
        np.testing.assert_array_equal(position_grid(boxes, sizes), whole)


@pytest.mark.parametrize(("n", "top_n"), [(1, 1), (2, 4), (16, 15), (16, 256)])
def test_cells_come_by_weight_then_nearness_then_index(n, top_n):
    """Boxes of whole cells, so that most of them are covered equally, against a sort in plain Python."""
    rng = np.random.default_rng(3)
    boxes = np.sort(rng.integers(-1, n + 2, (30, 2, 2)) * 8.0, axis=1).reshape(30, 4)
    grids = position_grid(boxes, (n * 8, n * 8), n, top_n)
    for grid, box in zip(grids, boxes, strict=True):
        x1, y1, x2, y2 = np.clip(box, 0, n * 8) / 8
        middle = ((x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2)
        cells = [(c, r) for c in range(n) for r in range(n) if x1 <= c < x2 and y1 <= r < y2]
        cells.sort(key=lambda cell: ((cell[0] - middle[0]) ** 2 + (cell[1] - middle[1]) ** 2, cell))
        expected = [c * n + r for c, r in cells[:top_n]]
        assert grid[:top_n].tolist() == expected + [n * n] * (top_n - len(expected))


def test_a_corner_that_rounding_puts_outside_the_last_cell():
    width = next(w for w in np.random.default_rng(0).uniform(1, 1000, 10_000) if w * 5 / w > 5)
    grid = position_grid([[0, 0, width, width]], (width, width), 5, 25)
    np.testing.assert_allclose(grid[0, 25:], [1 / 25] * 25 + [1], atol=1e-7)


@pytest.mark.parametrize(
    ("corners", "what"),
    [([0, 0, np.nan, 9], "corners must be numbers"), ([0, 9, 3, 2], "reversed")],
)
def test_a_broken_box_is_refused_by_image_and_number(corners, what):
    boxes = np.tile([0.0, 0.0, 5.0, 5.0], (3, 4, 1))
    boxes[2, 1] = corners
    with pytest.raises(BoxError, match=f"image 2, box 1: .*{what}"):
        position_grid(boxes, np.full((3, 2), 10))


@pytest.mark.parametrize(
    ("boxes", "sizes", "split_size", "top_n", "said"),
    [
        ((2, 3, 4), [[5, 5], [0, 5]], 16, 15, "image 1: .*expected positive"),
        ((2, 3, 4), [[5, 5], [5, np.inf]], 16, 15, "image 1: .*expected positive"),
        ((3, 5), [1, 1], 16, 15, r"boxes \(3, 5\) .*expected \(…, R, 4\)"),
        ((2, 3, 4), [1, 1], 16, 15, r"with image sizes \(2,\): expected \(…, R, 4\)"),
        ((1, 4), [5, 5], 3, 10, "split_size 3, top_n 10"),
        ((1, 4), [5, 5], 16, 0, "split_size 16, top_n 0"),
    ],
)
def test_what_has_no_grid_is_refused(boxes, sizes, split_size, top_n, said):
    with pytest.raises(InputError, match=said):
        position_grid(np.zeros(boxes), sizes, split_size, top_n)
