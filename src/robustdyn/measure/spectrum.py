"""Measures the leading Hessian directions, the gradient noise along them and the posterior they imply."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from robustdyn.measure.callback import TableRow
from robustdyn.measure.snapshot import Snapshot
from robustdyn.records.schema import (
    CURVATURE_TERM,
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    LOG_VARIANCE_TERM,
    NOISE_EIGENVALUE,
    POSTERIOR_VARIANCE_STATIONARY,
    TRACKED_DIRECTIONS,
)
from robustdyn.theory import dominant_terms, is_stable, minibatch_noise_factor, stationary_variance

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
        along, n, size = snapshot.along, snapshot.train_examples, snapshot.batch_size
        factor = minibatch_noise_factor(n, size, replacement=False)
        # the solver's C₁ has the measured examples' denominator m
        examples = snapshot.risk.examples
        own = factor * examples / (examples - 1)
        attack = along.attack_shares * along.variances
        gamma, attack = factor * (along.variances - attack) + attack / size, attack / size
        stable, variances = stationary(snapshot, along.curvature, gamma)
        curvature, log_variance = _terms(along.curvature, variances, stable)
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
                    "gradient_noise_se": along.variance_standard_errors[index] / size,
                    "attack_noise": attack[index],
                    NOISE_EIGENVALUE: own * float(noise.eigenvalues[index]),
                    "noise_residual": own * float(noise.residuals[index]),
                    POSTERIOR_VARIANCE_STATIONARY: variances[index],
                    "stable": bool(stable[index]) if snapshot.optimizer.plain else None,
                    CURVATURE_TERM: curvature[index],
                    LOG_VARIANCE_TERM: log_variance[index],
                },
            )
        yield (
            "bounds",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                "train_examples": n,
                "batch_size": size,
                TRACKED_DIRECTIONS: len(gamma),
                "unstable_directions": int((~stable).sum()) if snapshot.optimizer.plain else None,
                # NaN, recorded as null, as soon as one direction has no variance: a sum over fewer directions
                # would be another quantity, and its curve would jump without any change of the network
                "curvature_term_top_k": float(curvature.sum()),
                "log_variance_term_top_k": float(log_variance.sum()),
                "dominant_terms_top_k": float(curvature.sum() + log_variance.sum()),
            },
        )


def stationary(snapshot: Snapshot, eigenvalues: Array, gamma: Array) -> tuple[NDArray[np.bool_], Array]:
    """Which directions (k,) have a known stationary law, and its variance (k,), NaN elsewhere."""
    eta, mu, omega, plain = snapshot.optimizer
    variances = np.full(eigenvalues.shape, np.nan)
    if not plain:
        return np.zeros(eigenvalues.shape, dtype=bool), variances
    stable = is_stable(eigenvalues, eta, mu, omega) & (gamma > 0)
    if stable.any():
        variances[stable] = stationary_variance(
            eigenvalues[stable], gamma[stable], learning_rate=eta, momentum=mu, weight_decay=omega
        )
    return stable, variances


def _terms(eigenvalues: Array, variances: Array, stable: NDArray[np.bool_]) -> tuple[Array, Array]:
    """λσ² (k,) and −ln σ² (k,), NaN where there is no variance."""
    curvature, log_variance = np.full_like(variances, np.nan), np.full_like(variances, np.nan)
    if stable.any():
        terms = dominant_terms(eigenvalues[stable], variances[stable])
        curvature[stable], log_variance[stable] = terms.curvature, terms.log_variance
    return curvature, log_variance
