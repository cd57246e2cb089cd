"""Boxes, and features that belong to them: regions that overlap look alike, as those of photographs do."""

import numpy as np

from position import position_grid


def boxes_with_features(n, n_regions=36, img_dim=256, seed=0):
    """Position grids (n, n_regions, 31), and features (n, n_regions, img_dim) float32.

    An image's cells have random features; a region's are the mean of its cells', and noise.
    """
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 320, (n, n_regions, 2, 2)), axis=2).reshape(n, n_regions, 4)
    grids = position_grid(corners, np.full((n, 2), 320))
    area = np.zeros((n, n_regions, 257), np.float32)
    np.put_along_axis(area, grids[..., :15].astype(int), grids[..., 15:30], 2)
    features = area[..., :256] @ rng.standard_normal((n, 256, img_dim))
    return grids, (features + 0.1 * rng.standard_normal(features.shape)).astype(np.float32)
