"""Measures the leading Hessian directions, the gradient noise along them and the posterior they imply."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from robustdyn.measure.callback import Row
from robustdyn.measure.snapshot import Snapshot
from robustdyn.theory import dominant_terms, is_stable, minibatch_noise_factor, stationary_variance

Array = NDArray[np.float64]


class Spectrum:
    """Rows of the ``spectrum`` and ``bounds`` tables, over the k algebraically largest Hessian directions.

    The noise C is that of a mini-batch drawn without replacement from the training set, as the loader draws.
    The stationary law is momentum SGD's (docs/theory.md, section 2); with another optimiser its columns are
    null.
    """

    tables: ClassVar[tuple[str, ...]] = ("spectrum", "bounds")

    def measure(self, snapshot: Snapshot) -> Iterator[Row]:
        """First k ``spectrum`` rows, then one ``bounds`` row."""
        eigenvalues, noise = snapshot.hessian.eigenvalues.numpy(), snapshot.projected
        factor = minibatch_noise_factor(snapshot.train_examples, snapshot.batch_size, replacement=False)
        # the solver's C₁ has the measured examples' denominator m, the variances m − 1
        own = factor * noise.examples / (noise.examples - 1)
        gamma = factor * noise.variances.numpy()
        stable, variances = stationary(snapshot, eigenvalues, gamma)
        curvature, log_variance = _terms(eigenvalues, variances, stable)
        for index in range(len(eigenvalues)):
            yield (
                "spectrum",
                {
                    "epoch": snapshot.epoch,
                    "step": snapshot.step,
                    "index": index,
                    "hessian_eigenvalue": eigenvalues[index],
                    "residual": snapshot.hessian.residuals[index].item(),
                    "gradient_noise": gamma[index],
                    "gradient_noise_se": factor * float(noise.standard_errors[index]),
                    "noise_eigenvalue": own * float(snapshot.noise.eigenvalues[index]),
                    "noise_residual": own * float(snapshot.noise.residuals[index]),
                    "posterior_variance_stationary": variances[index],
                    "stable": bool(stable[index]) if snapshot.optimizer.plain else None,
                    "curvature_term": curvature[index],
                    "log_variance_term": log_variance[index],
                },
            )
        yield (
            "bounds",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                "tracked_directions": len(eigenvalues),
                "unstable_directions": int((~stable).sum()) if snapshot.optimizer.plain else None,
                # NaN, recorded as null, as soon as one direction has no variance: a sum over fewer directions
                # would be another quantity, and its curve would jump for no reason of the network's
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
