"""A 95 % interval for a share whose items come in clusters: questions about one video are not independent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 2000  # The ends then vary by about 0.2 points between seeds for 200 items.
Z95 = 1.959964  # 97.5 % quantile of the normal distribution.


def cluster_interval(
    hits: Sequence[bool], clusters: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS
) -> tuple[list[float] | None, str]:
    """The 95 % interval of sum(hits) / len(hits).

    Whole clusters are drawn with replacement (percentile bootstrap). Where that cannot vary (one cluster, or
    every item right or every item wrong) it would claim certainty; there Wilson's score interval is taken,
    with the number of clusters as the size of the sample.

    Args:
        hits: per item, whether it is right.
        clusters: per item, its cluster (the video).
        seed: of numpy's PCG64.
        draws: of the bootstrap.

    Returns:
        ([low, high], name of the method); (None, ...) without items.
    """
    if not len(hits):
        return None, "none: no items"
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([names[name] for name in clusters])
    right = np.bincount(index, weights=np.asarray(hits, float), minlength=len(names))
    size = np.bincount(index, minlength=len(names)).astype(float)
    if np.ptp(right / size) == 0:
        share = right.sum() / size.sum()
        return _wilson(share, len(names)), f"Wilson score, {len(names)} videos as sample size"
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.integers(len(names), size=(draws, len(names)))
    shares = right[drawn].sum(axis=1) / size[drawn].sum(axis=1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return [float(low), float(high)], f"bootstrap over {len(names)} videos, {draws} draws, seed {seed}"


def _wilson(share: float, count: int) -> list[float]:
    centre = share + Z95**2 / (2 * count)
    spread = Z95 * np.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    # Its ends at 0 and 1 are exact, up to rounding.
    low = 0.0 if share == 0 else (centre - spread) / scale
    high = 1.0 if share == 1 else (centre + spread) / scale
    return [float(low), float(high)]
