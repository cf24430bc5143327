"""Measures the leading Hessian directions, the gradient noise along them and the posterior they imply."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from robustdyn.measure.plan import TableRow
from robustdyn.measure.snapshot import Snapshot
from robustdyn.methods import OptimizerState
from robustdyn.records.schema import (
    BEST_RATE,
    BEST_RATE_SE,
    CURVATURE_TERM,
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    LOG_VARIANCE_TERM,
    NOISE_EIGENVALUE,
    POSTERIOR_VARIANCE_STATIONARY,
    TRACKED_DIRECTIONS,
)
from robustdyn.theory import bound_minimising_rate, is_stable, stationary_variance

Array = NDArray[np.float64]


class Spectrum:
    """Rows of the ``spectrum`` and ``bounds`` tables, over the k algebraically largest Hessian directions.

    Curvature and noise along the directions come from another attack than the directions themselves. The
    noise C is for a mini-batch drawn without replacement from the training set, as in the loader. The
    stationary law is for momentum SGD (docs/theory.md, section 2); with another optimiser its columns are
    null.
    """

    tables: ClassVar[tuple[str, ...]] = ("spectrum", "bounds")

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """First k ``spectrum`` rows, then one ``bounds`` row."""
        hessian, noise = snapshot.hessian, snapshot.noise
        along, size = snapshot.along, snapshot.batch
        # the solver's C₁ has the measured examples' denominator m
        examples = snapshot.risk.examples
        own = snapshot.noise_factor * examples / (examples - 1)
        gamma, attack = minibatch_noise(snapshot)
        law = StationaryLaw.of(snapshot, along.curvature, gamma)
        curvature, log_variance = law.curvature_terms(), law.log_variance_terms()
        best_rate = best_rate_terms(snapshot.optimizer, along.curvature, gamma)
        stable, plain = law.stable, snapshot.optimizer.plain

        def error(*terms: Term) -> float:
            """Standard error of the sum of some terms, to first order."""
            by_curvature, by_noise = np.sum([(term.by_curvature, term.by_noise) for term in terms], axis=0)
            # as if all noise came from the attack, which overstates it by a share of at most B / n
            return along.standard_error(by_curvature, by_noise * (1 + snapshot.added_noise) / size)

        for index in range(len(gamma)):
            yield (
                "spectrum",
                {
                    "epoch": snapshot.epoch,
                    "step": snapshot.step,
                    "index": index,
                    HESSIAN_EIGENVALUE: hessian.eigenvalues[index].item(),
                    "residual": hessian.residuals[index].item(),
                    "curvature": along.curvature[index],
                    "curvature_se": along.curvature_standard_errors[index],
                    GRADIENT_NOISE: gamma[index],
                    # as if all noise came from the attack, which overstates it by a share of at most B / n
                    "gradient_noise_se": along.variance_standard_errors[index]
                    * (1 + snapshot.added_noise)
                    / size,
                    "attack_noise": attack[index],
                    NOISE_EIGENVALUE: own * float(noise.eigenvalues[index]),
                    "noise_residual": own * float(noise.residuals[index]),
                    POSTERIOR_VARIANCE_STATIONARY: law.variances[index],
                    "posterior_variance_stationary_se": error(law.variance_terms().only(index)),
                    "stable": bool(stable[index]) if plain else None,
                    CURVATURE_TERM: curvature.values[index],
                    "curvature_term_se": error(curvature.only(index)),
                    LOG_VARIANCE_TERM: log_variance.values[index],
                    "log_variance_term_se": error(log_variance.only(index)),
                },
            )
        yield (
            "bounds",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                "train_examples": snapshot.train_examples,
                "batch_size": snapshot.batch_size,
                TRACKED_DIRECTIONS: len(gamma),
                "unstable_directions": int((~stable).sum()) if plain else None,
                # NaN, recorded as null, as soon as one direction has no variance: a sum over fewer directions
                # would be another quantity, and its curve would jump without any change of the network
                "curvature_term_top_k": float(curvature.values.sum()),
                "curvature_term_top_k_se": error(curvature),
                "log_variance_term_top_k": float(log_variance.values.sum()),
                "log_variance_term_top_k_se": error(log_variance),
                "dominant_terms_top_k": float(curvature.values.sum() + log_variance.values.sum()),
                "dominant_terms_top_k_se": error(curvature, log_variance),
                BEST_RATE: float(best_rate.values.sum()),
                BEST_RATE_SE: error(best_rate),
            },
        )


def minibatch_noise(snapshot: Snapshot) -> tuple[Array, Array]:
    """γ (k,) along the tracked directions, and the part (k,) that no shuffling takes back.

    That part is the noise of the attack's random start, and all of the added noise.
    """
    along, size, added = snapshot.along, snapshot.batch, snapshot.added_noise
    attack = along.attack_shares * along.variances
    gamma = snapshot.noise_factor * (along.variances - attack) + (1 + added) * attack / size
    return gamma, (attack + added * along.variances) / size


@dataclass(frozen=True, eq=False)
class Term:
    """A number for each direction, and its derivatives.

    Attributes:
        values: (k,), NaN where the direction has no stationary law.
        by_curvature: (k,), the derivative by the direction's λ.
        by_noise: (k,), the derivative by its γ.
    """

    values: Array
    by_curvature: Array
    by_noise: Array

    def only(self, index: int) -> "Term":
        """The term of one direction; derivatives by the others are 0."""
        chosen = np.arange(len(self.values)) == index
        return Term(self.values, *(np.where(chosen, d, 0.0) for d in (self.by_curvature, self.by_noise)))


def best_rate_terms(optimizer: OptimizerState, eigenvalues: Array, gamma: Array) -> Term:
    """Values that sum to the rate which minimises the dominating terms at β = 1, (37d) of docs/theory.md.

    A direction without positive curvature and noise has no best rate and adds 0. All values are NaN if no
    direction has one, or if the optimiser is not momentum SGD.
    """
    _, mu, omega, plain = optimizer
    counted = (eigenvalues > 0) & (gamma > 0)
    if not plain or not counted.any():
        nothing = np.full(eigenvalues.shape, np.nan)
        return Term(nothing, nothing, nothing)
    lam, noise = eigenvalues[counted], gamma[counted]
    best = bound_minimising_rate(lam, noise, beta=1.0, momentum=mu, weight_decay=omega)
    # η* is k over a sum of λγ / (2 (λ + ω) (1 − μ))
    by_summand = -(best**2) / (2 * (1 - mu) * len(lam))
    values, by_curvature, by_noise = np.zeros((3, len(eigenvalues)))
    values[counted] = best / len(lam)
    by_curvature[counted] = by_summand * noise * omega / (lam + omega) ** 2
    by_noise[counted] = by_summand * lam / (lam + omega)
    return Term(values, by_curvature, by_noise)


@dataclass(frozen=True, eq=False)
class StationaryLaw:
    """The variance along each direction that momentum SGD settles to, and the bound terms that it gives.

    Attributes:
        eigenvalues: λ (k,).
        noise: γ (k,); NaN where there is no law.
        stable: (k,), whether a stationary law is known along the direction.
        variances: σ² (k,), equation (10) of docs/theory.md; NaN where there is no law.
        by_curvature: (k,), ∂ ln σ² / ∂λ.
    """

    eigenvalues: Array
    noise: Array
    stable: NDArray[np.bool_]
    variances: Array
    by_curvature: Array

    @classmethod
    def of(cls, snapshot: Snapshot, eigenvalues: Array, gamma: Array) -> "StationaryLaw":
        """The law of the snapshot's optimiser; nowhere one, if it is not momentum SGD or γ is NaN."""
        eta, mu, omega, plain = snapshot.optimizer
        variances = np.full(eigenvalues.shape, np.nan)
        if not plain:
            return cls(eigenvalues, variances, np.zeros(eigenvalues.shape, dtype=bool), variances, variances)
        stable = is_stable(eigenvalues, eta, mu, omega) & (gamma > 0)
        if stable.any():
            variances[stable] = stationary_variance(
                eigenvalues[stable], gamma[stable], learning_rate=eta, momentum=mu, weight_decay=omega
            )
        slope = np.where(stable, eigenvalues + omega, np.nan)
        noise = np.where(stable, gamma, np.nan)
        return cls(eigenvalues, noise, stable, variances, eta / (2 * (1 + mu) - eta * slope) - 1 / slope)

    def variance_terms(self) -> Term:
        """σ²."""
        return Term(self.variances, self.variances * self.by_curvature, self.variances / self.noise)

    def curvature_terms(self) -> Term:
        """λσ²."""
        values = self.eigenvalues * self.variances
        return Term(values, self.variances + values * self.by_curvature, values / self.noise)

    def log_variance_terms(self) -> Term:
        """−ln σ²."""
        return Term(-np.log(self.variances), -self.by_curvature, -1 / self.noise)
