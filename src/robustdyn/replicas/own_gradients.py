"""Estimates slope and noise from the replicas' own gradients, which no measurement at one point can show."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustdyn.replicas.point import MeasuredPoint

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnGradients:
    """The replicas' gradients at their own places, relative to the start; M recorded steps.

    Attributes:
        step: (M,), updates taken; the gradient belongs to the last of them, at the place before it.
        slope: (M,), Σ_i cov(g_i, x_i) over Σ_i (J Σ)_ii with J of the start and the measured Σ: the ratio of
            the gradient that pulls replicas back to the linear one.
        slope_error: (M,), standard error by the jackknife over replicas.
        noise: (M,), geometric mean over directions of the variance of g − J x, divided by a batch's variance
            at the start. It includes the difference between the mean gradient at x and J x.
        noise_error: (M,), standard error by the jackknife over replicas.
    """

    step: IntArray
    slope: Array
    slope_error: Array
    noise: Array
    noise_error: Array


def own_gradients(
    start: MeasuredPoint,
    batch_noise: Array,
    *,
    steps: IntArray,
    position: Array,
    gradient: Array,
    settled: int,
) -> OwnGradients:
    """Slope and noise at every recorded step whose predecessor was also recorded.

    Args:
        start: The starting point, with slopes J.
        batch_noise: γ (k,), variance of a batch's gradient at the start.
        steps: (S,), the recorded steps.
        position: (R, S, k).
        gradient: (R, S, k), of the update before each step; steps where it is NaN are left out.
        settled: First step that is used, because replicas have hardly separated before it.

    Raises:
        ValueError: The start has no slopes.
    """
    if not np.isfinite(start.slopes).all():
        raise ValueError("the start has no slopes; measure them with slope_batches > 0")
    listed = steps.tolist()
    rows = []
    for row, step in enumerate(listed):
        if step < settled or step - 1 not in listed:
            continue
        x, g = position[:, listed.index(step - 1)], gradient[:, row]
        if not np.isfinite(g).all():
            continue
        found = _slope_and_noise(x, g, start.slopes, batch_noise)
        left = [
            _slope_and_noise(np.delete(x, r, axis=0), np.delete(g, r, axis=0), start.slopes, batch_noise)
            for r in range(len(x))
        ]
        error = np.sqrt((len(x) - 1) * np.var(left, axis=0))
        rows.append((step, *found, *error))
    table = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    return OwnGradients(
        step=table[0].astype(np.int64),
        slope=table[1],
        noise=table[2],
        slope_error=table[3],
        noise_error=table[4],
    )


def _slope_and_noise(x: Array, g: Array, slopes: Array, gamma: Array) -> tuple[float, float]:
    x, g = x - x.mean(axis=0), g - g.mean(axis=0)
    pull = np.einsum("ri,ij,rj->", x, slopes, x)
    noise = ((g - x @ slopes.T) ** 2).sum(axis=0) / (len(x) - 1)
    return float((x * g).sum() / pull), float(np.exp(np.log(noise / gamma).mean()))
