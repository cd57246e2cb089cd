"""Bootstrap confidence intervals of recalls, and of the paired difference of two models.

The candidates stay the same. The queries are drawn again with replacement, each image together with its captions: the
captions of one image succeed and fail together, so that they are not independent draws.
"""

import numpy as np

MEASURES = ("i2t R@1", "i2t R@5", "i2t R@10", "t2i R@1", "t2i R@5", "t2i R@10", "rsum")
RECALL_AT = (1, 5, 10)
SAMPLES = 10_000
BLOCK = 1 << 22  # drawn indices that are held at once


def group_hits(i2t_ranks: np.ndarray, t2i_ranks: np.ndarray) -> np.ndarray:
    """Recalls of each group of an image and its captions (or a caption and its images).

    i2t_ranks (n_images,), t2i_ranks (n_captions,), from 0, as evaluation.i2t and t2i return them.
    Returns (groups, 7) float64 in percent, columns as MEASURES; the mean over groups is the split's recall.
    """
    groups = min(len(i2t_ranks), len(t2i_ranks))
    sides = [np.asarray(ranks).reshape(groups, -1) for ranks in (i2t_ranks, t2i_ranks)]
    columns = [100.0 * (ranks < k).mean(1) for ranks in sides for k in RECALL_AT]
    return np.stack([*columns, np.sum(columns, axis=0)], axis=1)


def bootstrap(values: np.ndarray, level: float = 95, samples: int = SAMPLES, seed: int = 0) -> tuple:
    """Percentile interval of the mean over rows: values (groups, K) → low (K,), high (K,).

    For the paired difference of two models on the same split, values is the difference of their group_hits.
    level in percent. The same values, samples and seed give the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    rng, n = np.random.default_rng(seed), len(values)
    means = np.empty((samples, values.shape[1]))
    step = max(1, BLOCK // n)
    for start in range(0, samples, step):
        count = min(step, samples - start)
        drawn = rng.integers(0, n, (count, n)) + np.arange(count)[:, None] * n
        means[start : start + count] = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n) @ values / n
    tail = (100 - level) / 2
    return tuple(np.percentile(means, [tail, 100 - tail], axis=0))


def print_summary(title: str, values: np.ndarray, signed: bool = False) -> dict:
    """Print title and a line `measure: mean [low, high]` for each column of values (groups, 7).

    values: group_hits, or the difference of two of these. signed: print + before positive numbers. Returns {measure:
    (mean, low, high)}.
    """
    rows = zip(MEASURES, values.mean(0), *bootstrap(values), strict=True)
    result = {name: tuple(map(float, row)) for name, *row in rows}
    number = "{:+.1f}" if signed else "{:.1f}"
    form = f"  {{}}: {number} [{number}, {number}]"
    print(title + ":", *(form.format(name, *row) for name, row in result.items()), sep="\n")
    return result
