"""Measures how much the Hessian and the gradient noise share directions, and what that costs the bound."""

from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
from torch import Tensor

from robustdyn.curvature import alignment, covariance_jackknife, sign_flipped_covariances
from robustdyn.defaults import default
from robustdyn.measure.plan import TableRow
from robustdyn.measure.snapshot import Snapshot
from robustdyn.measure.spectrum import StationaryLaw
from robustdyn.records.schema import (
    CAPTURED_NOISE,
    COMMUTATOR_NULL,
    SUBSPACE_OVERLAP,
    TOTAL_CORRELATION,
    TOTAL_CORRELATION_NULL,
    TRACKED_DIRECTIONS,
)
from robustdyn.theory import stationary_covariance, total_correlation


class Alignment:
    """One row of the ``alignment`` table, over the k algebraically largest Hessian directions.

    The total correlation is for the stationary law of momentum SGD; with another optimiser it is null.

    Args:
        groups: Groups of examples in the jackknife that gives the standard errors.
        randomisations: Random sets of signs that give the values expected of commuting H and C.
    """

    tables: ClassVar[tuple[str, ...]] = ("alignment",)

    def __init__(
        self,
        *,
        groups: int = default("measure/default", "measurements.alignment.groups"),
        randomisations: int = default("measure/default", "measurements.alignment.randomisations"),
    ) -> None:
        if groups < 2:
            raise ValueError(f"groups must be at least 2, got {groups}")
        if randomisations < 2:
            raise ValueError(f"randomisations must be at least 2, got {randomisations}")
        self._groups, self._randomisations = groups, randomisations

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """Yield one ``alignment`` row."""
        hessian, noise, projections = snapshot.hessian, snapshot.noise, snapshot.projected.projections
        groups = min(self._groups, len(projections))
        result = alignment(
            hessian.eigenvalues,
            hessian.eigenvectors,
            projections,
            noise.eigenvalues,
            noise.eigenvectors,
            groups=groups,
            randomisations=self._randomisations,
            generator=snapshot.generator("alignment"),
        )
        correlation = _total_correlation(snapshot)
        flipped = sign_flipped_covariances(
            projections, self._randomisations, snapshot.generator("total-correlation")
        )
        null = np.array([correlation(covariance) for covariance in flipped])
        yield (
            "alignment",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                TRACKED_DIRECTIONS: len(hessian.eigenvalues),
                "commutator": result.commutator,
                "commutator_se": result.commutator_standard_error,
                COMMUTATOR_NULL: result.commutator_null,
                "commutator_null_spread": result.commutator_null_spread,
                "cosine": result.cosine,
                "cosine_se": result.cosine_standard_error,
                SUBSPACE_OVERLAP: result.subspace_overlap,
                CAPTURED_NOISE: float(result.captured_noise[-1]),
                TOTAL_CORRELATION: correlation(snapshot.projected.covariance),
                "total_correlation_se": float(covariance_jackknife(correlation, projections, groups)),
                TOTAL_CORRELATION_NULL: float(null.mean()),
                "total_correlation_null_spread": float(null.std(ddof=1)),
                "examples": result.examples,
            },
        )


def stationary_total_correlation(snapshot: Snapshot) -> float:
    """Total correlation of the stationary posterior in the tracked directions; NaN if it does not exist."""
    return _total_correlation(snapshot)(snapshot.projected.covariance)


def _total_correlation(snapshot: Snapshot) -> Callable[[Tensor], float]:
    """The stationary posterior's total correlation as a function of C₁ (k, k); NaN if it does not exist."""
    eta, mu, omega, _ = snapshot.optimizer
    eigenvalues = snapshot.hessian.eigenvalues.numpy()
    factor = snapshot.noise_factor
    stable = StationaryLaw.of(snapshot, eigenvalues, factor * snapshot.projected.variances.numpy()).stable

    def of(covariance: Tensor) -> float:
        if not stable.all():
            return float("nan")
        noise = factor * covariance.numpy()
        return total_correlation(
            stationary_covariance(eigenvalues, noise, learning_rate=eta, momentum=mu, weight_decay=omega)
        )

    return of
