"""Tests whether replicas are Gaussian: Mardia's skewness and kurtosis, joint and of single directions.

Shapes: R replicas, k directions. Neither statistic changes under an affine map of the data, so under
normality their law depends on R and k alone. It is drawn rather than approximated: the asymptotic law is
poor at as few replicas as can be afforded.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 4999  # of Gaussian data; no p-value is below 1 / (DRAWS + 1)
_PAIRS = 400_000  # of replicas, over the samples drawn at once: a few MB


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A statistic of R replicas beside its law under normality.

    Attributes:
        value: Measured.
        expected: Its mean over as many Gaussian replicas.
        spread: Its standard deviation over these.
        p: Probability that Gaussian replicas are at least as far out.
    """

    value: float
    expected: float
    spread: float
    p: float


def mardia(x: Array) -> tuple[Array, Array]:
    """Mardia's skewness b₁ and kurtosis b₂ of samples (..., R, k).

    With centred z of unit covariance (denominator R), b₁ is the mean of (z_i · z_j)³ over all pairs and b₂
    the mean of (z_i · z_i)². For one direction they are the squared skewness and the kurtosis.

    Args:
        x: Samples of more than k + 1 replicas, (..., R, k).

    Raises:
        ValueError: Too few replicas, or no variance along some combination of the directions.

    Source: Mardia, Biometrika 57, 519-530, 1970.
    """
    replicas, k = x.shape[-2:]
    if replicas < k + 2:
        raise ValueError(f"{replicas} replicas are too few for {k} directions; at least {k + 2} are needed")
    centred = x - x.mean(axis=-2, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-2, keepdims=True))
    if not (scale > 0).all():
        raise ValueError("the replicas have no variance along some direction")
    basis, factor = np.linalg.qr(centred / scale)
    size = np.abs(np.einsum("...ii->...i", factor))
    if not (size > 1e-10 * np.sqrt(replicas)).all():
        raise ValueError("the replicas have no variance along some combination of the directions")
    inner = replicas * basis @ np.swapaxes(basis, -1, -2)  # z_i · z_j
    cubed = inner * inner * inner  # a power would take ten times as long
    return cubed.mean(axis=(-2, -1)), (np.einsum("...ii->...i", inner) ** 2).mean(axis=-1)


@lru_cache(maxsize=64)
def gaussian_law(replicas: int, k: int) -> tuple[Array, Array]:
    """b₁ and b₂ (DRAWS,) of Gaussian samples, ascending; from a fixed seed."""
    draws = np.random.default_rng([replicas, k])
    chunk = max(1, _PAIRS // replicas**2)
    sizes = [min(chunk, DRAWS - first) for first in range(0, DRAWS, chunk)]
    found = [mardia(draws.standard_normal((size, replicas, k))) for size in sizes]
    skewness, kurtosis = (np.sort(np.concatenate(parts)) for parts in zip(*found, strict=True))
    return skewness, kurtosis


def joint(x: Array) -> tuple[Moment, Moment]:
    """Mardia's tests of a sample (R, k): skewness, by its upper tail, and kurtosis, by both.

    Raises:
        ValueError: As ``mardia``.
    """
    values = [float(value) for value in mardia(x)]
    return _beside(values[0], values[1], *gaussian_law(*x.shape))


def of_directions(x: Array) -> list[tuple[Moment, Moment]]:
    """The same for every direction of (R, k) alone; the first value is the skewness with its sign.

    Raises:
        ValueError: As ``mardia``.
    """
    found = []
    for one in x.T:
        skewness, kurtosis = (float(value) for value in mardia(one[:, None]))
        squared, other = _beside(skewness, kurtosis, *gaussian_law(len(one), 1))
        sign = np.sign(((one - one.mean()) ** 3).sum())
        spread = float(np.sqrt(squared.expected))  # the law is symmetric about 0
        signed = Moment(value=float(sign * np.sqrt(skewness)), expected=0.0, spread=spread, p=squared.p)
        found.append((signed, other))
    return found


def _beside(skewness: float, kurtosis: float, skewnesses: Array, kurtoses: Array) -> tuple[Moment, Moment]:
    above, high, low = (
        (1 + int(np.count_nonzero(beyond))) / (DRAWS + 1)
        for beyond in (skewnesses >= skewness, kurtoses >= kurtosis, kurtoses <= kurtosis)
    )
    return (
        Moment(value=skewness, expected=float(skewnesses.mean()), spread=float(skewnesses.std()), p=above),
        Moment(
            value=kurtosis,
            expected=float(kurtoses.mean()),
            spread=float(kurtoses.std()),
            p=min(1.0, 2 * min(high, low)),
        ),
    )


def corrected(p: Array) -> Array:
    """p-values (m,) corrected for testing m hypotheses, whatever their dependence.

    Source: Holm, Scandinavian Journal of Statistics 6, 65-70, 1979.
    """
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    found = np.empty(len(p))
    found[order] = stepped
    return found
