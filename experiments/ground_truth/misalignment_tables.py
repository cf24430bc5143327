"""The tables of misalignment.py: the bound's terms of measured and of predicted covariances."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from misalignment_problems import FAMILIES, Family, Problem
from numpy.typing import NDArray
from scipy import stats

from robustdyn.theory import (
    CovarianceTerms,
    bound_terms_under_rotation,
    covariance_terms,
    largest_total_correlation,
)

Array = NDArray[np.float64]

LEVEL = 0.95  # of all intervals
RANDOM_ORIENTATIONS = 200
ANY = "any (upper limit)"


TERMS: dict[str, str] = {
    "curvature": "Σ λσ²",
    "log_variance": "−Σ ln σ²",
    "log_determinant": "−ln det Σ",
    "twice_total_correlation": "2 TC",
    "total": "Σ λσ² − ln det Σ",
    "kl_prior_at_minimum": "KL, prior at the minimum",
    "kl_prior_at_start": "KL, prior at the start",
}
"""Columns ``term`` of the tables, and how they are shown. σ_P² is always the optimal one."""


def by_name(terms: CovarianceTerms, distance_sq: float) -> dict[str, Array]:
    """Every term of ``TERMS``."""
    return {
        "curvature": terms.curvature,
        "log_variance": terms.log_variance,
        "log_determinant": terms.log_determinant,
        "twice_total_correlation": 2 * terms.total_correlation,
        "total": terms.total,
        "kl_prior_at_minimum": terms.kl(distance_sq=0.0, prior_variance=None),
        "kl_prior_at_start": terms.kl(distance_sq=distance_sq, prior_variance=None),
    }


@dataclass(frozen=True, eq=False)
class Estimate:
    """A statistic of the replicas (), and of each resample of them (B,)."""

    value: Array
    resampled: Array

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.resampled - other.resampled)

    def row(self, names: Sequence[str]) -> dict[str, float]:
        """The estimate less its bias, and the ends of the basic bootstrap interval, which has none either."""
        tail = (1 - LEVEL) / 2
        found = (np.mean(self.resampled), *np.quantile(self.resampled, [1 - tail, tail]))
        return {name: float(2 * self.value - x) for name, x in zip(names, found, strict=True)}


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Replicas drawn with replacement, the same draws for every angle: counts (B, R)."""

    counts: Array

    @classmethod
    def of(cls, replicas: int, resamples: int, seed: int) -> "Bootstrap":
        """Of so many replicas."""
        rng = np.random.default_rng(seed)
        return cls(rng.multinomial(replicas, np.full(replicas, 1 / replicas), size=resamples).astype(float))

    def covariances(self, positions: Array) -> Array:
        """(B, k, k) of positions (R, k), with the sample covariance for their mean."""
        replicas, k = positions.shape
        shares = self.counts / replicas
        mean = shares @ positions
        products = (positions[:, :, None] * positions[:, None, :]).reshape(replicas, -1)
        second = (shares @ products).reshape(-1, k, k)
        # n / (n − 1) once as in the sample covariance, once for the resample's own mean
        return np.asarray((second - mean[:, :, None] * mean[:, None, :]) * (replicas / (replicas - 1)) ** 2)

    def estimates(self, problem: Problem, positions: Array) -> dict[str, Estimate]:
        """Every term, measured."""
        matrices = np.concatenate([np.asarray([np.cov(positions.T)]), self.covariances(positions)])
        found = by_name(covariance_terms(problem.eigenvalue, matrices), problem.distance_sq)
        return {name: Estimate(values[0], values[1:]) for name, values in found.items()}


@dataclass(frozen=True, eq=False)
class Tables:
    """Tidy results, a row for each number, as written.

    Attributes:
        terms: Of the bound, measured and predicted, with their change from angle 0.
        curves: Predicted change of the terms, every 1.5 degrees.
        variances: Along H's eigenvectors.
        pairs: Correlations in the planes.
        references: Terms for other orientations of the noise, predicted.
    """

    terms: pd.DataFrame
    curves: pd.DataFrame
    variances: pd.DataFrame
    pairs: pd.DataFrame
    references: pd.DataFrame


def compare(problem: Problem, degrees: Sequence[float], resamples: int, seed: int) -> Tables:
    """Measured against predicted for one problem, all families and angles; angle 0 is simulated once."""
    settings = [(family, angle) for family in FAMILIES for angle in degrees]
    noises = [family.noise(problem.noise, np.radians(angle)) for family, angle in settings]
    distinct = {noise.tobytes(): noise for noise in noises}
    positions = problem.simulate(np.stack([root(noise) for noise in distinct.values()]))
    if not np.isfinite(positions).all():
        raise SystemExit(f"replicas of the {problem.name} problem diverged; lower its learning rate")
    bootstrap = Bootstrap.of(positions.shape[1], resamples, seed)
    where = {key: index for index, key in enumerate(distinct)}
    estimated = [bootstrap.estimates(problem, found) for found in positions]
    terms: list[dict[str, Any]] = []
    variances: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    for (family, angle), noise in zip(settings, noises, strict=True):
        index = where[noise.tobytes()]
        head = {"problem": problem.name, "family": family.name, "angle_deg": angle}
        terms += (head | row for row in term_rows(problem, family, angle, estimated[index], estimated[0]))
        variances += (head | row for row in variance_rows(problem, noise, positions[index]))
        pairs += (head | row for row in pair_rows(problem, family, noise, positions[index]))
    curves = [row for family in FAMILIES for row in curve_rows(problem, family)]
    other = references(problem, seed)
    return Tables(*(pd.DataFrame(rows) for rows in (terms, curves, variances, pairs, other)))


def root(matrix: Array) -> Array:
    """The symmetric square root, which moves continuously with the angle and exists for singular noise."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(values.clip(min=0)) @ vectors.T)


def predicted(problem: Problem, family: Family, degrees: Sequence[float]) -> dict[str, Array]:
    """Every term (n,) at n angles, in closed form."""
    planes = family.planes(len(problem.noise))
    terms = bound_terms_under_rotation(
        problem.eigenvalue,
        problem.noise,
        np.radians(degrees),
        planes,
        held=family.held,
        **problem.options,
    )
    return by_name(terms, problem.distance_sq)


def curve_rows(problem: Problem, family: Family) -> Iterator[dict[str, Any]]:
    degrees = [1.5 * step for step in range(61)]
    for name, values in predicted(problem, family, degrees).items():
        for angle, value in zip(degrees, values, strict=True):
            yield {
                "problem": problem.name,
                "family": family.name,
                "angle_deg": angle,
                "term": name,
                "predicted_change": value - values[0],
            }


def term_rows(
    problem: Problem,
    family: Family,
    angle: float,
    found: dict[str, Estimate],
    aligned: dict[str, Estimate],
) -> Iterator[dict[str, Any]]:
    for name, (now, before) in predicted(problem, family, [angle, 0.0]).items():
        level, change = found[name], found[name] - aligned[name]
        row: dict[str, Any] = {"term": name, "predicted": now} | level.row(("measured", "low", "high"))
        row["predicted_change"] = now - before
        yield row | change.row(("measured_change", "change_low", "change_high"))


def variance_rows(problem: Problem, noise: Array, positions: Array) -> Iterator[dict[str, Any]]:
    """Variances along H's eigenvectors with the interval of χ²."""
    closed, found = np.diag(problem.covariance(noise)), np.asarray(np.var(positions, axis=0, ddof=1))
    freedom = len(positions) - 1
    high, low = (freedom / stats.chi2.ppf(tail, freedom) for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    for i, (expected, value) in enumerate(zip(closed, found, strict=True)):
        yield {
            "direction": i + 1,
            "eigenvalue": problem.eigenvalue[i],
            "noise": noise[i, i],
            "predicted": expected,
            "measured": value,
            "low": low * value,
            "high": high * value,
        }


def pair_rows(problem: Problem, family: Family, noise: Array, positions: Array) -> Iterator[dict[str, Any]]:
    """Correlations of the posterior in the planes, with Fisher's interval."""
    sigma, found = problem.covariance(noise), np.asarray(np.corrcoef(positions.T))
    width = float(stats.norm.ppf((1 + LEVEL) / 2)) / np.sqrt(len(positions) - 3)
    for i, j in family.planes(len(noise)):
        z = np.arctanh(found[i, j])
        yield {
            "first": i + 1,
            "second": j + 1,
            "noise_correlation": noise[i, j] / np.sqrt(noise[i, i] * noise[j, j]),
            "predicted": sigma[i, j] / np.sqrt(sigma[i, i] * sigma[j, j]),
            "measured": found[i, j],
            "low": np.tanh(z - width),
            "high": np.tanh(z + width),
        }


def references(problem: Problem, seed: int) -> Iterator[dict[str, Any]]:
    """The closed form for other orientations of the same noise, to see the angles' effects in proportion."""
    noises = {"aligned": [np.diag(problem.noise)]}
    spectrum = problem.noise
    if problem.own is not None:
        spectrum = np.asarray(np.linalg.eigvalsh(problem.own)[::-1], dtype=np.float64)
        noises["own noise"] = [problem.own]
        noises["own spectrum, aligned"] = [np.diag(spectrum)]
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.normal(size=2 * (len(spectrum),)))[0] for _ in range(RANDOM_ORIENTATIONS)]
    name = "aligned" if problem.own is None else "own"
    noises[f"{name} spectrum, random orientation (mean)"] = [b * spectrum @ b.T for b in bases]
    for case, matrices in noises.items():
        sigma = np.stack([problem.covariance(matrix) for matrix in matrices])
        found = by_name(covariance_terms(problem.eigenvalue, sigma), problem.distance_sq)
        yield {"problem": problem.name, "noise": case} | {key: float(np.mean(v)) for key, v in found.items()}
    largest = largest_total_correlation(problem.eigenvalue, **problem.options)
    yield {"problem": problem.name, "noise": ANY, "twice_total_correlation": 2 * largest}
