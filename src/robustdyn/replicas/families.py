"""Splits the spread of parents' children into what their parents' places make and what noise makes.

Shapes: N parents with C children each, at S steps, along k directions. If replicas are Gaussian about one
place, the parents' share is forgotten. If every replica has a place of its own, it stays, and the
distribution is a mixture of the narrower ones about these places.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Families:
    """Children that continue from where some replicas were.

    Attributes:
        step: The step of the ensemble at which they start.
        learning_rate: η of all their steps.
        steps: (S,), numbers of steps since then.
        places: (N, C, S, k), x of every child, in the ensemble's coordinates.
    """

    step: int
    learning_rate: float
    steps: NDArray[np.int64]
    places: Array


def between(first: Array, second: Array, *, same: bool) -> Array:
    """Covariance (S, k) between parents of two families' places (N, C, S, k), without children's noise."""
    one, other = (x.mean(axis=1) - x.mean(axis=(0, 1)) for x in (first, second))
    found = (one * other).sum(axis=0) / (len(one) - 1)
    if same:
        found = found - within(first) / first.shape[1]
    return np.asarray(found)


def within(places: Array) -> Array:
    """Variance (S, k) of children about their parent's mean, of places (N, C, S, k)."""
    return np.asarray(places.var(axis=1, ddof=1).mean(axis=0))


def jackknifed(
    statistic: Callable[[dict[str, Array]], Array], found: dict[str, Array]
) -> tuple[Array, Array]:
    """A statistic of named places (N, C, S, k), and its standard error over parents."""
    parents = len(next(iter(found.values())))
    each = np.stack(
        [statistic({f: np.delete(x, p, axis=0) for f, x in found.items()}) for p in range(parents)]
    )
    spread = each - each.mean(axis=0)
    return statistic(found), np.sqrt((parents - 1) / parents * (spread**2).sum(axis=0))
