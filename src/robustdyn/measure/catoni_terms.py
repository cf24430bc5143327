"""Measures every term of Catoni's bound over the whole parameter space."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from robustdyn.curvature import EmpiricalRisk
from robustdyn.defaults import default
from robustdyn.measure.alignment import stationary_total_correlation
from robustdyn.measure.plan import TableRow
from robustdyn.measure.posterior import rate_of_each_step
from robustdyn.measure.snapshot import Snapshot
from robustdyn.records.schema import GRADIENT_NOISE, POSTERIOR_VARIANCE, RITZ_VALUE
from robustdyn.theory import (
    CatoniBound,
    CurvatureCells,
    PosteriorSums,
    SpectralMeasure,
    WholeSpaceLaw,
    bound_of_sums,
    cell_edges,
    whole_space_law,
)
from robustdyn.theory.trajectory import Interpolation

Array = NDArray[np.float64]


class CatoniTerms:
    """Rows of the tables ``catoni`` and ``curvature_cells``: docs/theory.md, section 8.

    The bound is on the expectation of the loss clipped at c. It contains the empirical loss without clipping,
    which is never smaller, so that the curvature is that of the other tables and the bound still holds. What
    negative curvature takes from the loss to second order is recorded, but not taken off the bound. The
    posterior is centred at the present weights, the prior at zero. The variance along a direction is a
    function of its curvature, and follows the law of momentum SGD with independent batches through the rates
    of the run so far. Parameters along which no example's gradient varies keep the variance of the prior.

    It takes the nodes that ``Density`` has measured, which must come before it in the plan, and from the past
    of the run its own last rows and the rates. There is no row of ``catoni`` where the run's rates are not
    known, where a direction is too sharp for the rate, or where the loss is beyond c.

    Args:
        loss_range: c, where the loss is clipped, in nats.
        alpha: The bound may fail with this probability.
        prior_variance: Grid of σ_P²; it must not depend on the training set.
        beta_per_example: Grid of β / n.
        interpolation: How λ and γ run between measured epochs.
    """

    tables: ClassVar[tuple[str, ...]] = ("catoni", "curvature_cells")
    needs: ClassVar[tuple[str, ...]] = ("density", "whole_space")
    """The tables that measurements before it must give."""

    def __init__(
        self,
        *,
        loss_range: float = default("measure/full", "measurements.bound.loss_range"),
        alpha: float = default("measure/full", "measurements.bound.alpha"),
        prior_variance: Sequence[float] = default("measure/full", "measurements.bound.prior_variance"),
        beta_per_example: Sequence[float] = default("measure/full", "measurements.bound.beta_per_example"),
        interpolation: Interpolation = default("measure/default", "interpolation"),
    ) -> None:
        for name, value in (("loss_range", loss_range), ("alpha", alpha)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, grid in (("prior_variance", prior_variance), ("beta_per_example", beta_per_example)):
            if not grid or min(grid) <= 0:
                raise ValueError(f"{name} must be a list of positive numbers, got {list(grid)}")
        self._loss_range, self._alpha, self._interpolation = loss_range, alpha, interpolation
        self._prior_variance, self._beta_per_example = list(prior_variance), np.array(beta_per_example)

    def measure(self, snapshot: Snapshot) -> Iterator[TableRow]:
        """The ``curvature_cells`` rows, and one ``catoni`` row if there is a bound.

        Raises:
            ValueError: The density was not measured before.
        """
        loss, loss_error = _losses(snapshot.risk)  # on all processes
        if not snapshot.rows.get("density"):
            raise ValueError("the bound needs the density: measurements.density must come before it")
        if math.isnan(snapshot.batch):
            return
        noise_free = int(snapshot.rows["whole_space"][-1]["noise_free_parameters"])
        plain, noise = (_measure_of(snapshot.rows["density"], kind) for kind in ("hessian", "noise"))
        if not noise.mass.any():
            return
        plain = plain.without_zeros(noise_free)
        rates, before, wider = _past(snapshot)
        optimizer = snapshot.optimizer
        if not (optimizer.plain and rates.size):
            return

        def law(
            plain: SpectralMeasure,
            noise: SpectralMeasure,
            edges: Array,
            before: CurvatureCells | None = before,
        ) -> WholeSpaceLaw:
            return whole_space_law(
                plain,
                noise,
                edges,
                rates,
                momentum=optimizer.momentum,
                weight_decay=optimizer.weight_decay,
                interpolation=self._interpolation,
                before=before,
            )

        edges = cell_edges(plain, noise)
        whole = law(plain, noise, edges)
        fewer = plain.shortened(), noise.shortened()
        coarse = law(*fewer, cell_edges(*fewer))
        errors_of = _Errors(
            whole=whole,
            replicates=(
                [law(plain.without(probe), noise, edges) for probe in plain.probes],
                [law(plain, noise.without(probe), edges) for probe in noise.probes],
            ),
            wider=law(plain, noise, edges, wider),
        )
        when = {"epoch": snapshot.epoch, "step": snapshot.step}
        for index, row in enumerate(_cell_rows(whole.cells, errors_of)):
            yield "curvature_cells", when | {"cell": index} | row
        if math.isnan(whole.log_variance_sum + whole.variance_sum) or loss > self._loss_range:
            return  # the mean loss is beyond c, and so is the bound
        correlation = math.nan
        if "hessian" in snapshot.solved:
            # no pass that other processes would have to join: the density has projected the noise
            correlation = stationary_total_correlation(snapshot)
        counted = correlation if math.isfinite(correlation) else 0.0

        def bound(law: WholeSpaceLaw, prior_variance: Any, beta: Any) -> CatoniBound:
            return bound_of_sums(
                PosteriorSums(law.curvature_sum, law.variance_sum, law.log_variance_sum, law.directions),
                empirical_loss=loss,
                distance_sq=float(snapshot.risk.theta().double().square().sum()),
                prior_location="zero",
                prior_variance=prior_variance,
                beta=beta,
                n=snapshot.train_examples,
                alpha=self._alpha,
                loss_range=self._loss_range,
                directions=snapshot.risk.numel,
                parameters=snapshot.risk.numel,
                total_correlation=counted,
            )

        found = bound(whole, self._prior_variance, self._beta_per_example * snapshot.train_examples)

        def terms(law: WholeSpaceLaw) -> Array:
            own = bound(law, found.prior_variance, found.beta)
            values = (own.curvature, own.kl.trace, own.kl.log_determinant, own.kl.total, own.total)
            return np.array([*values, law.negative_curvature_sum / 2])

        errors, changes = errors_of(terms), np.abs(terms(coarse) / terms(whole) - 1)
        total = _ESTIMATED.index("total")
        errors[total] = math.hypot(errors[total], loss_error)
        flat = found.as_row()
        yield (
            "catoni",
            {
                **when,
                **{name: flat[name] for name in _RECORDED},
                "kl_total_correlation": correlation,
                "negative_curvature": whole.negative_curvature_sum / 2,
                "empirical_loss_se": loss_error,
                "kl_over_beta": found.kl.total / found.beta,
                "noise_free_parameters": noise_free,
                "negative_directions": float(plain.share[plain.curvature < 0].sum()),
                "vacuous": found.is_vacuous,
                **{f"{name}_se": error for name, error in zip(_ESTIMATED, errors, strict=True)},
                **{f"{name}_truncation": change for name, change in zip(_ESTIMATED, changes, strict=True)},
            },
        )


_ESTIMATED = ("curvature", "kl_trace", "kl_log_determinant", "kl", "total", "negative_curvature")
_RECORDED = (
    "empirical_loss",
    "curvature",
    "kl_mean",
    "kl_trace",
    "kl_log_determinant",
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
    "covers",
)


def _measure_of(rows: Iterable[Mapping[str, Any]], kind: str) -> SpectralMeasure:
    """The nodes of one kind."""
    own = [row for row in rows if row["kind"] == kind]
    curvature, mass, probe = (np.array([row[name] for row in own]) for name in (RITZ_VALUE, "mass", "probe"))
    return SpectralMeasure(curvature, mass, probe)


def _past(snapshot: Snapshot) -> tuple[Array, CurvatureCells | None, CurvatureCells | None]:
    """η of each step since the last rows of the cells, or since the start, and these cells if there are any.

    The cells once more, with all variances wider by their standard error. No rates if they are not known.
    """
    unknown = np.zeros(0), None, None
    if snapshot.past is None:
        return unknown
    rates = snapshot.past("rates")
    rates = rates[rates["step"] < snapshot.step]
    if rates.empty or rates["step"].iloc[0] != 0:
        return unknown
    every = rate_of_each_step(rates, snapshot.step)
    rows = snapshot.past("curvature_cells")
    rows = rows[rows["step"] < snapshot.step]
    rows = rows[rows["step"] == rows["step"].max()]
    if rows.empty:
        return every, None, None
    names = ("directions", "curvature", GRADIENT_NOISE, POSTERIOR_VARIANCE, *_BUFFER)
    count, curvature, noise, x, xv, v = (rows[name].to_numpy(dtype=float) for name in names)
    covariance = np.stack([x, xv, xv, v], axis=1).reshape(-1, 2, 2)
    cells = CurvatureCells(count, curvature, noise, covariance)
    share = rows["posterior_variance_se"].to_numpy(dtype=float) / x
    wider = replace(cells, covariance=covariance * (1 + share)[:, None, None])
    return every[int(rows["step"].iloc[0]) :], cells, wider


_BUFFER = ("buffer_covariance", "buffer_variance")


@dataclass(frozen=True, eq=False)
class _Errors:
    """Standard errors of functions of the law.

    Attributes:
        whole: The law itself.
        replicates: The law without each of the random vectors, for both kinds.
        wider: The law if all variances of the last measured epoch had been wider by their standard errors.
    """

    whole: WholeSpaceLaw
    replicates: tuple[Sequence[WholeSpaceLaw], Sequence[WholeSpaceLaw]]
    wider: WholeSpaceLaw

    def __call__(self, function: Callable[[WholeSpaceLaw], Array]) -> Array:
        """A jackknife over each kind of vectors, and what the past adds, as if all its errors were one."""
        squared = (function(self.wider) - function(self.whole)) ** 2
        for left_out in self.replicates:
            values = np.array([function(law) for law in left_out])
            squared = squared + (len(values) - 1) * values.var(axis=0)
        return np.asarray(np.sqrt(squared))


def _cell_rows(cells: CurvatureCells, errors_of: _Errors) -> Iterator[dict[str, float]]:
    """A row for each cell."""
    noise_errors = errors_of(lambda law: law.cells.noise)
    variance_errors = errors_of(lambda law: law.cells.covariance[:, 0, 0])
    for index, block in enumerate(cells.covariance):
        yield {
            "directions": cells.directions[index],
            "curvature": cells.curvature[index],
            GRADIENT_NOISE: cells.noise[index],
            "gradient_noise_se": noise_errors[index],
            POSTERIOR_VARIANCE: block[0, 0],
            "posterior_variance_se": variance_errors[index],
            _BUFFER[0]: block[0, 1],
            _BUFFER[1]: block[1, 1],
        }


def _losses(risk: EmpiricalRisk) -> tuple[float, float]:
    """Mean loss over the examples of all processes, and its standard error."""
    with risk.guard(), torch.no_grad():
        parameters = risk.parameters()
        own = torch.cat([risk.losses(parameters, *chunk) for chunk in risk.chunks()])
    losses = risk.shards.rows(own).double()
    return float(losses.mean()), float(losses.std() / len(losses) ** 0.5)
