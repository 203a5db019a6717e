"""Means with intervals over beginnings and seeds, and curves over the divergence.

S seeds   N beginnings   R resamples, of which the first is the data itself
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000
_SEED = 0


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


class Resamples(NamedTuple):
    """The weight of each seed and each beginning in each resample.

    Drawn for all arms alike, so differences between arms are paired.
    """

    seeds_RS: np.ndarray
    beginnings_RN: np.ndarray

    def means(self, values_SN: np.ndarray) -> np.ndarray:
        """The mean of each resample, f64 [R]."""
        by_seed_RS = self.beginnings_RN @ values_SN.astype(np.float64).T
        return (by_seed_RS * self.seeds_RS).sum(axis=1) / values_SN.size


def resample(S: int, N: int, count: int = _RESAMPLES) -> Resamples:
    """Draws seeds and beginnings with replacement: the bootstrap, in both.

    A resample of few seeds varies too little, by (S - 1) / S in variance; the weights
    of seeds are therefore spread by the inverse of its root.
    """
    rng = np.random.default_rng(_SEED)

    def draw(size: int) -> np.ndarray:
        counts = rng.multinomial(size, np.full(size, 1 / size), count)
        counts[0] = 1
        return counts.astype(np.float64)

    spread = (S / max(S - 1, 1)) ** 0.5
    return Resamples(1 + spread * (draw(S) - 1), draw(N))


def interval(values_R: np.ndarray) -> Interval:
    """The first value, and the 2.5th and 97.5th percentile of the others."""
    low, high = np.percentile(values_R[1:], (2.5, 97.5))
    return Interval(float(values_R[0]), float(low), float(high))


def at_kl(
    kl_R: np.ndarray, points: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Values of a curve at a divergence, linear in its square root, f64 [R].

    Beyond the points, the curve is constant.

    Args:
      kl_R: in nats; below 0, as an estimate near 0 can be, it counts as 0.
      points: divergence and value of each point, [R] each, in any order.
    """
    root_R, roots_PR = np.sqrt(np.maximum(kl_R, 0)), []
    for kl, _ in points:
        roots_PR.append(np.sqrt(np.maximum(kl, 0)))
    values_PR = np.array([value for _, value in points])
    found = []
    for r, root in enumerate(root_R):
        x_P = np.array([roots[r] for roots in roots_PR])
        order = np.argsort(x_P)
        found.append(np.interp(root, x_P[order], values_PR[order, r]))
    return np.array(found)
