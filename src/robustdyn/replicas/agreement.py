"""Compares a measured ensemble with a predicted law: ratios, intervals, offsets, correlations.

Shapes: R replicas, S recorded steps, k directions. A sample variance s² of R Gaussian numbers follows σ² χ²_ν
/ ν with ν = R − 1. Its logarithm is too small by ln(ν/2) − ψ(ν/2) on average, which is corrected.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import digamma

from robustdyn.replicas.prediction import Law

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreement:
    """Measured variances compared with predicted ones, step by step.

    Intervals have the requested confidence. Those of variances are χ² intervals, which assume that each
    coordinate is Gaussian. Those of the geometric mean are basic bootstrap intervals over replicas, which do
    not. Entries are NaN where the law or the replicas have no variance.

    Attributes:
        variance: s² (S, k), measured.
        low: (S, k), lower end of the interval for σ².
        high: (S, k), its upper end.
        predicted: σ² (S, k).
        geometric_mean: (S,), of s² / σ² over the directions that have a ratio, corrected for the mean of
            ln χ².
        geometric_low: (S,), lower end of its interval.
        geometric_high: (S,), its upper end.
        directions: (S,), number of directions in the mean.
        offset: (S, k), (mean of x − predicted mean) / σ, with the predicted σ.
        offset_error: Standard error 1/√R of each.
        move: (S, k), mean of x / σ: how far the mean moved in total.
        correlation_misfit: (S,), mean over pairs of z², z = (r_ij − ρ_ij) √ν / (1 − ρ_ij²) with the measured
            correlation r and the law's ρ: about 1 where the law is right.
        commuting_misfit: (S,), the same with ρ = 0: the misfit if H and C are assumed to commute.
        total_correlation: (S,), of the measured covariance, nats; biased upwards if there are few replicas.
        total_correlation_expected: (S,), its mean over as many Gaussian replicas of this law.
        total_correlation_spread: (S,), its standard deviation over these.
        total_correlation_commuting: (S,), its mean over replicas without any correlation.
    """

    variance: Array
    low: Array
    high: Array
    predicted: Array
    geometric_mean: Array
    geometric_low: Array
    geometric_high: Array
    directions: NDArray[np.int64]
    offset: Array
    offset_error: float
    move: Array
    correlation_misfit: Array
    commuting_misfit: Array
    total_correlation: Array
    total_correlation_expected: Array
    total_correlation_spread: Array
    total_correlation_commuting: Array


def agreement(position: Array, law: Law, *, confidence: float, resamples: int, seed: int) -> Agreement:
    """Compare replicas with a law.

    Args:
        position: x (R, S, k), R ≥ 3.
        law: The law at the same steps.
        confidence: Confidence of the intervals, in (0, 1).
        resamples: Number of bootstrap samples, and of simulated ensembles for the total correlation.
        seed: Seed of both.

    Raises:
        ValueError: Too few replicas, or shapes that disagree.
    """
    replicas = len(position)
    if replicas < 3:
        raise ValueError(f"position has {replicas} replicas; at least 3 have a spread to compare")
    if position.shape[1:] != law.mean.shape:
        raise ValueError(f"position is {position.shape}, the law {law.mean.shape}")
    nu = replicas - 1
    variance = position.var(axis=0, ddof=1)
    tail = (1 - confidence) / 2
    upper, lower = (float(stats.chi2.ppf(p, nu)) / nu for p in (1 - tail, tail))
    predicted = np.where(law.variance > 0, law.variance, np.nan)
    measured = np.where(variance > 0, variance, np.nan)
    sigma = np.sqrt(predicted)
    centre, low, high, count = _geometric_mean(position, predicted, confidence, resamples, seed)
    right, commuting = _correlations(position, law)
    total = [
        _total_correlations(position[:, s], law.covariance[s], resamples, seed) for s in range(len(sigma))
    ]
    seen, expected, spread, independent = np.array(total).T
    return Agreement(
        variance=variance,
        low=measured / upper,
        high=measured / lower,
        predicted=predicted,
        geometric_mean=centre,
        geometric_low=low,
        geometric_high=high,
        directions=count,
        offset=(position.mean(axis=0) - law.mean) / sigma,
        offset_error=1 / np.sqrt(replicas),
        move=position.mean(axis=0) / sigma,
        correlation_misfit=right,
        commuting_misfit=commuting,
        total_correlation=seen,
        total_correlation_expected=expected,
        total_correlation_spread=spread,
        total_correlation_commuting=independent,
    )


def _geometric_mean(
    position: Array, predicted: Array, confidence: float, resamples: int, seed: int
) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """Centre, low, high (S,) and number of directions of each step."""
    nu = len(position) - 1
    bias = digamma(nu / 2) - np.log(nu / 2)
    found = np.full((3, len(predicted)), np.nan)
    count = np.zeros(len(predicted), dtype=np.int64)
    for step, sigma in enumerate(predicted):
        x = position[:, step]
        used = np.isfinite(sigma) & (x.var(axis=0) > 0)
        count[step] = used.sum()
        if not used.any():
            continue

        def log_ratio(x: Array, axis: int, expected: Array = sigma[used]) -> Array:
            # scipy moves the replicas to the last axis: (directions, ..., R)
            logs = np.log(x.var(axis=axis, ddof=1))
            shape = (-1, *[1] * (logs.ndim - 1))
            return np.asarray((logs - np.log(expected).reshape(shape)).mean(axis=0) - bias)

        chosen = x[:, used]
        centre = float(log_ratio(chosen.T, axis=-1))
        # whole replicas are resampled, which keeps the correlations between directions
        draws = np.random.default_rng([seed, step])
        resampled = np.empty(resamples)
        for number in range(resamples):
            rows = draws.integers(len(chosen), size=len(chosen))
            while len(np.unique(rows)) == 1:  # the same replica again and again has no variance
                rows = draws.integers(len(chosen), size=len(chosen))
            resampled[number] = log_ratio(chosen[rows].T, axis=-1)
        tail = (1 - confidence) / 2
        # basic intervals, centred on the resamples' own mean because repeated replicas bias a logarithm
        around = resampled - resampled.mean()
        found[:, step] = centre, centre - np.quantile(around, 1 - tail), centre - np.quantile(around, tail)
    centre, low, high = np.exp(found)
    return centre, low, high, count


def _correlations(position: Array, law: Law) -> tuple[Array, Array]:
    """Mean z² over pairs with the law's covariances, and without; NaN for laws that have only variances."""
    replicas, steps, k = position.shape
    first, second = np.triu_indices(k, 1)
    found = np.full((2, steps), np.nan)
    for step in range(steps):
        expected = law.covariance[step]
        if k < 2 or not np.isfinite(expected).all() or not (np.diag(expected) > 0).all():
            continue
        correlation = _normalised(expected)
        seen = np.atleast_2d(np.corrcoef(position[:, step], rowvar=False))
        for row, wanted in enumerate((correlation, np.eye(k))):
            r = wanted[first, second]
            # the standard error of a sample correlation, to leading order
            error = (1 - r**2) / np.sqrt(replicas - 1)
            found[row, step] = np.mean(((seen[first, second] - r) / error) ** 2)
    return found[0], found[1]


def _total_correlations(
    x: Array, covariance: Array, resamples: int, seed: int
) -> tuple[float, float, float, float]:
    """The measured one; mean and spread for Gaussian replicas of the law; mean for independent replicas."""
    replicas, k = x.shape
    none = (float("nan"),) * 4
    usable = np.isfinite(covariance).all() and (np.diag(covariance) > 0).all()
    if not 2 <= k < replicas or not usable or not (x.var(axis=0) > 0).all():
        return none
    normal = np.random.default_rng([seed, 1]).standard_normal((min(resamples, 200), replicas, k))
    values, vectors = np.linalg.eigh(_normalised(covariance))
    root = vectors * np.sqrt(np.clip(values, 0, None))
    drawn = np.array([_sample_total_correlation(part @ root.T) for part in normal])
    independent = np.array([_sample_total_correlation(part) for part in normal])
    return (
        _sample_total_correlation(x),
        float(drawn.mean()),
        float(drawn.std(ddof=1)),
        float(independent.mean()),
    )


def _normalised(covariance: Array) -> Array:
    """The correlation matrix of a covariance (k, k)."""
    deviation = np.sqrt(np.diag(covariance))
    return np.asarray(covariance / np.outer(deviation, deviation))


def _sample_total_correlation(x: Array) -> float:
    """−½ ln det of the correlation matrix of rows x (R, k)."""
    return float(-0.5 * np.linalg.slogdet(np.corrcoef(x, rowvar=False))[1])
