"""Measures every term of Catoni's bound over the tracked directions."""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch

from robustdyn.curvature import EmpiricalRisk
from robustdyn.curvature.vectors import inner
from robustdyn.defaults import default
from robustdyn.measure.plan import TableRow
from robustdyn.measure.snapshot import Snapshot
from robustdyn.measure.spectrum import StationaryLaw, minibatch_noise
from robustdyn.theory import catoni_bound


class CatoniTerms:
    """One row of the ``catoni`` table: equation (29) of docs/theory.md, over the k tracked directions.

    The posterior is the stationary law of momentum SGD about the present weights, and the prior is centred at
    zero. The bound is on the expectation of the loss clipped at c. It contains the empirical loss without
    clipping, which is never smaller, so that the curvature is that of the other tables and the bound still
    holds. It covers the tracked directions only, and is no bound of the whole model.

    There is no row where a direction has no stationary law.

    Args:
        loss_range: c, where the loss is clipped, in nats.
        alpha: The bound may fail with this probability.
        prior_variance: Grid of σ_P²; it must not depend on the training set.
        beta_per_example: Grid of β / n.
    """

    tables: ClassVar[tuple[str, ...]] = ("catoni",)

    def __init__(
        self,
        *,
        loss_range: float = default("measure/full", "measurements.bound.loss_range"),
        alpha: float = default("measure/full", "measurements.bound.alpha"),
        prior_variance: Sequence[float] = default("measure/full", "measurements.bound.prior_variance"),
        beta_per_example: Sequence[float] = default("measure/full", "measurements.bound.beta_per_example"),
    ) -> None:
        for name, value in (("loss_range", loss_range), ("alpha", alpha)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, grid in (("prior_variance", prior_variance), ("beta_per_example", beta_per_example)):
            if not grid or min(grid) <= 0:
                raise ValueError(f"{name} must be a list of positive numbers, got {list(grid)}")
        self._loss_range, self._alpha = loss_range, alpha
        self._prior_variance, self._beta_per_example = list(prior_variance), np.array(beta_per_example)

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """Yield one ``catoni`` row, if every direction has a stationary law."""
        along, n = snapshot.along, snapshot.train_examples
        law = StationaryLaw.of(snapshot, along.curvature, minibatch_noise(snapshot)[0])
        if not law.stable.all():
            return
        mean, error = _losses(snapshot.risk)
        if mean > self._loss_range:
            return  # the mean loss is beyond c, and so is the bound
        directions = snapshot.hessian.eigenvectors
        coordinates = inner(directions.T, snapshot.risk.theta())
        bound = catoni_bound(
            empirical_loss=mean,
            eigenvalues=law.eigenvalues,
            variances=law.variances,
            distance_sq=float(coordinates.square().sum()),
            prior_location="zero",
            prior_variance=self._prior_variance,
            beta=self._beta_per_example * n,
            n=n,
            alpha=self._alpha,
            loss_range=self._loss_range,
            parameters=snapshot.risk.numel,
        )
        terms, variances, beta = bound.as_row(), law.variance_terms(), bound.beta
        # the bound is ½ Σ λσ² + (Σ σ²/σ_P² − Σ ln σ²) / 2β and what depends on neither λ nor γ
        by_variance = 0.5 * law.eigenvalues + (1 / bound.prior_variance - 1 / law.variances) / (
            2 * bound.beta
        )
        rest = along.standard_error(
            0.5 * law.variances + by_variance * variances.by_curvature,
            by_variance * variances.by_noise / snapshot.batch,
        )
        yield (
            "catoni",
            {
                "epoch": snapshot.epoch,
                "step": snapshot.step,
                **{name: terms[name] for name in _RECORDED},
                "empirical_loss_se": error,
                "kl_over_beta": bound.kl.total / beta,
                "total_se": math.hypot(error, rest),
            },
        )


_RECORDED = (
    "empirical_loss",
    "curvature",
    "kl_mean",
    "kl_trace",
    "kl_log_determinant",
    "kl_total_correlation",
    "kl",
    "confidence",
    "complexity",
    "total",
    "beta",
    "prior_variance",
    "loss_range",
    "alpha",
    "directions",
    "parameters",
)


def _losses(risk: EmpiricalRisk) -> tuple[float, float]:
    """Mean loss over the examples of all processes, and its standard error."""
    with risk.guard(), torch.no_grad():
        parameters = risk.parameters()
        own = torch.cat([risk.losses(parameters, *chunk) for chunk in risk.chunks()])
    losses = risk.shards.rows(own).double()
    return float(losses.mean()), float(losses.std() / len(losses) ** 0.5)
