"""Measures the leading Hessian directions, the gradient noise along them and the posterior they imply."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robustdyn.curvature import (
    GradientCovariance,
    Hessian,
    ProjectedCovariance,
    lanczos,
    projected_covariance,
)
from robustdyn.errors import ConfigError
from robustdyn.measure.callback import Row
from robustdyn.measure.snapshot import Snapshot
from robustdyn.theory import dominant_terms, is_stable, minibatch_noise_factor, stationary_variance

Array = NDArray[np.float64]


class Spectrum:
    """Rows of the ``spectrum`` and ``bounds`` tables, over the k algebraically largest Hessian directions.

    The noise C is that of a mini-batch drawn without replacement from the training set, as the loader draws.

    Args:
        directions: k.
        tolerance: Stop when every residual is below this share of the largest eigenvalue.
        max_products: Give up, and record the residuals reached, beyond this many products per operator.
        extra_vectors: Lanczos vectors held beyond the k directions, at least 2; each is a gradient large.
    """

    def __init__(self, *, directions: int, tolerance: float, max_products: int, extra_vectors: int) -> None:
        if directions < 1:
            raise ValueError(f"directions must be at least 1, got {directions}")
        if extra_vectors < 2:
            raise ValueError(f"extra_vectors must be at least 2, got {extra_vectors}")
        self._k = directions
        self._solver: dict[str, Any] = {
            "which": "largest",
            "tol": tolerance,
            "max_products": max_products,
            "max_basis": directions + extra_vectors,
        }

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """The stationary law is momentum SGD's (docs/theory.md, section 2).

        Raises:
            ConfigError: Another optimiser, Nesterov momentum or dampening.
        """
        plain = type(optimizer) is torch.optim.SGD
        if plain and not (optimizer.defaults["nesterov"] or optimizer.defaults["dampening"]):
            return
        kind = type(optimizer).__name__ + (" with nesterov or dampening" if plain else "")
        raise ConfigError(
            f"optimizer is {kind}, but measure.measurements.spectrum knows the posterior of plain momentum "
            "SGD only; choose optimizer=sgd or leave it out with ~measure.measurements.spectrum"
        )

    def measure(self, snapshot: Snapshot) -> Iterator[Row]:
        """First k ``spectrum`` rows, then one ``bounds`` row."""
        eigenvalues, residuals, noise = self._leading_directions(snapshot)
        top_noise = lanczos(
            GradientCovariance(snapshot.risk), self._k, generator=snapshot.generator("noise"), **self._solver
        )
        factor = minibatch_noise_factor(snapshot.train_examples, snapshot.batch_size, replacement=False)
        gamma = factor * noise.variances.numpy()
        stable, variances = _stationary(snapshot, eigenvalues, gamma)
        curvature, log_variance = _terms(eigenvalues, variances, stable)
        for index in range(self._k):
            yield (
                "spectrum",
                {
                    "epoch": snapshot.epoch,
                    "step": snapshot.step,
                    "index": index,
                    "hessian_eigenvalue": eigenvalues[index],
                    "residual": residuals[index],
                    "gradient_noise": gamma[index],
                    "gradient_noise_se": factor * float(noise.standard_errors[index]),
                    "noise_eigenvalue": factor * float(top_noise.eigenvalues[index]),
                    "posterior_variance_stationary": variances[index],
                    "stable": bool(stable[index]),
                    "curvature_term": curvature[index],
                    "log_variance_term": log_variance[index],
                },
            )
        yield (
            "bounds",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                "tracked_directions": self._k,
                "unstable_directions": int((~stable).sum()),
                # NaN, recorded as null, as soon as one direction has no variance: a sum over fewer directions
                # would be another quantity, and its curve would jump for no reason of the network's
                "curvature_term_top_k": float(curvature.sum()),
                "log_variance_term_top_k": float(log_variance.sum()),
                "dominant_terms_top_k": float(curvature.sum() + log_variance.sum()),
            },
        )

    def _leading_directions(self, snapshot: Snapshot) -> tuple[Array, Array, ProjectedCovariance]:
        """λ (k,), residuals (k,), and C₁ along the directions; these are let go: each is a gradient large."""
        top = lanczos(
            Hessian(snapshot.risk), self._k, generator=snapshot.generator("hessian"), **self._solver
        )
        noise = projected_covariance(snapshot.risk, top.eigenvectors)
        return top.eigenvalues.numpy(), top.residuals.numpy(), noise


def _stationary(snapshot: Snapshot, eigenvalues: Array, gamma: Array) -> tuple[NDArray[np.bool_], Array]:
    """Which directions (k,) have a stationary law, and its variance (k,), NaN elsewhere."""
    eta, mu, omega = snapshot.optimizer
    stable = is_stable(eigenvalues, eta, mu, omega) & (gamma > 0)
    variances = np.full(eigenvalues.shape, np.nan)
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
