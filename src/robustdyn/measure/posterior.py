"""Computes the posterior at every epoch from a run's recorded learning rates and measured spectra."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import lightning
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from robustdyn.methods import AdversarialTraining
from robustdyn.records import RunRecords, read_table
from robustdyn.records.schema import (
    GRADIENT_NOISE,
    INJECTED_VARIANCE,
    POSTERIOR_VARIANCE,
    POSTERIOR_VARIANCE_STATIONARY,
    PROPAGATED_VARIANCE,
)
from robustdyn.theory import (
    MeasuredSpectrum,
    is_stable,
    minibatch_noise_factor,
    propagate,
    propagated_variance,
    shuffled_covariance,
    stationary_state_covariance,
    stationary_variance,
    sudden_decays,
)
from robustdyn.theory.trajectory import Interpolation

Array = NDArray[np.float64]

LAWS = ("", "_independent")  # endings of the columns: shuffled and independent batches


def posterior_rows(
    tables: dict[str, pd.DataFrame], *, momentum: float, weight_decay: float, interpolation: Interpolation
) -> Iterator[dict[str, Any]]:
    """σ² of every tracked direction after every epoch, propagated through the run's rates and spectra.

    There are two laws: one for batches as training draws them, with shuffled epochs and a short last batch,
    and one for the papers' independent batches. Both take the curvature at fixed adversarial examples. The
    gradient in training is steeper, because the attack follows the weights, and real variances are therefore
    smaller.

    Directions are matched by rank between measurements. The law starts without variance, at the point where
    the run started. While a direction overshoots, η(λ + ω) ≥ 2(1 + μ), or is flat, it has no stationary law
    and its variance is NaN. Afterwards it starts again from the stationary law of that moment. Before the
    first measurement, the values of the first measurement are used.

    The variance of either law is the sum of two parts. The propagated part is what would be left if the noise
    had ended with the last step before the learning rate last fell suddenly. The injected part is the rest,
    made at the rates since then. Before the first sudden fall, and with a smooth schedule throughout, all of
    the variance is injected. So it is where the law started again after the last fall.

    Args:
        tables: ``epochs``, ``rates``, ``spectrum`` and ``bounds`` of one run.
        momentum: μ of every step.
        weight_decay: ω of every step.
        interpolation: How (λ, γ) run between measured epochs; see ``robustdyn.theory.MeasuredSpectrum``.

    Yields:
        Rows of the ``posterior`` table, epoch by epoch.
    """
    ends = tables["epochs"]["step"].to_numpy(dtype=int)
    if not len(ends) or tables["spectrum"].empty:
        return
    rates = rate_of_each_step(tables["rates"], int(ends[-1]))
    sampling = _Sampling.of(tables["bounds"], ends)
    falls = _sudden_falls(rates, ends)
    columns = []
    for index, rows in tables["spectrum"].groupby("index", sort=True):
        usable = rows[rows[GRADIENT_NOISE] > 0]
        if len(usable):
            direction = _Direction(usable, rates, falls, momentum, weight_decay, interpolation, sampling)
            columns.append((int(str(index)), direction.stationary(ends), *direction.propagated(ends)))
    for row, (epoch, step) in enumerate(zip(tables["epochs"]["epoch"], ends, strict=True)):
        for index, stationary, variance, propagated in columns:
            found: dict[str, Any] = {"epoch": int(epoch), "step": int(step), "index": index}
            for law, whole, left in zip(LAWS, variance[:, row], propagated[:, row], strict=True):
                found[POSTERIOR_VARIANCE + law] = whole
                found[PROPAGATED_VARIANCE + law] = left
                found[INJECTED_VARIANCE + law] = whole - left
            yield found | {POSTERIOR_VARIANCE_STATIONARY: stationary[row]}


def rate_of_each_step(rates: pd.DataFrame, steps: int) -> Array:
    """η (N,) of a run's first N steps, from the ``rates`` table: the steps before N at which it changed."""
    starts = rates["step"].to_numpy(dtype=int)
    held = np.diff(np.append(starts, steps))
    return np.repeat(rates["lr"].to_numpy(dtype=float), held)


def _sudden_falls(rates: Array, ends: NDArray[np.int_]) -> list[int]:
    """The first steps at rates that fell suddenly, as ``sudden_decays`` finds them over the epochs."""
    found = []
    for epoch in sudden_decays(rates[ends - 1]):
        inside = slice(ends[epoch - 1] - 1, ends[epoch])
        found.append(int(inside.start + np.argmin(rates[inside][1:] / rates[inside][:-1]) + 1))
    return found


@dataclass(frozen=True, eq=False)
class _Sampling:
    """How a run of N steps drew its batches."""

    examples: int
    batch_size: int
    sizes: Array  # (N,)
    ends: NDArray[np.int_]  # steps after which the epochs end

    @classmethod
    def of(cls, bounds: pd.DataFrame, ends: NDArray[np.int_]) -> "_Sampling":
        n, size = (int(bounds[name].iloc[-1]) for name in ("train_examples", "batch_size"))
        sizes = np.full(ends[-1], float(size))
        steps = np.diff(ends, prepend=0)
        # the size of the last batch is what the others leave of an epoch
        sizes[ends - 1] = np.clip(n - (steps - 1) * size, 1, size)
        return cls(examples=n, batch_size=size, sizes=sizes, ends=ends)


@dataclass
class _Direction:
    """One direction's measured spectrum through a run of N steps."""

    rows: pd.DataFrame
    rates: Array
    falls: list[int]
    momentum: float
    weight_decay: float
    interpolation: Interpolation
    sampling: _Sampling

    def __post_init__(self) -> None:
        measured = self.rows["step"].to_numpy(dtype=int)
        spectrum = MeasuredSpectrum(
            step=measured,
            eigenvalue=self.rows[["curvature"]].to_numpy(dtype=float),
            noise=self.rows[[GRADIENT_NOISE]].to_numpy(dtype=float),
            interpolation=self.interpolation,
        )
        cuts = [0, *[int(s) for s in measured if 0 < s < len(self.rates)], len(self.rates)]
        parts = [spectrum.between(a, b) for a, b in pairwise(cuts) if b > a]
        self.eigenvalue = np.concatenate([part[0][:, 0] for part in parts])  # (N,), at every step
        self.noise = np.concatenate([part[1][:, 0] for part in parts])
        self.stable = is_stable(self.eigenvalue, self.rates, self.momentum, self.weight_decay)
        self.spectrum = spectrum
        share = (self.rows["attack_noise"] / self.rows[GRADIENT_NOISE]).to_numpy(dtype=float).clip(0, 1)
        step = np.arange(len(self.rates))
        if self.interpolation == "log_linear":
            self.attack_share = np.interp(step, measured, share)
        else:
            self.attack_share = share[(np.searchsorted(measured, step, side="right") - 1).clip(min=0)]

    def stationary(self, ends: NDArray[np.int_]) -> Array:
        """σ² (E,) that the last step before each of ``ends`` would settle to; NaN where there is none."""
        at = np.asarray(ends) - 1
        result = np.full(len(at), np.nan)
        good = self.stable[at]
        if good.any():
            at = at[good]
            result[good] = stationary_variance(
                self.eigenvalue[at],
                self.noise[at],
                learning_rate=self.rates[at],
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        return result

    def propagated(self, ends: NDArray[np.int_]) -> tuple[Array, Array]:
        """σ² (2, E) after ``ends`` steps, of shuffled and of independent batches; NaN without a law.

        Returns:
            All of it, and the part that noise before the last sudden fall of the rate left.
        """
        whole, left = np.full((2, 2, len(ends)), np.nan)
        edges = np.flatnonzero(np.diff(self.stable)) + 1
        for first, last in zip([0, *edges.tolist()], [*edges.tolist(), len(self.rates)], strict=True):
            inside = (ends > first) & (ends <= last)
            if self.stable[first] and inside.any():
                start = self._settled(first) if first > 0 else np.zeros((1, 2, 2))
                falls = [step for step in self.falls if first < step < last]
                at = np.union1d(ends[inside], falls).astype(int)
                laws = (self._shuffled(first, last, start)[at - first - 1], self._window(first, at, start))
                for law, states in enumerate(laws):
                    before = [states[np.searchsorted(at, step)] for step in falls]
                    whole[law, inside] = states[np.isin(at, ends), 0, 0]
                    left[law, inside] = self._left(first, last, falls, before)[ends[inside] - first - 1]
        return whole, left

    def _left(self, first: int, last: int, falls: list[int], states: list[Array]) -> Array:
        """What is left, after each step of a stretch, of the states (2, 2) before the rate's falls in it."""
        found = np.zeros(last - first)
        for (since, until), state in zip(pairwise([*falls, last]), states, strict=True):
            found[since - first : until - first] = propagated_variance(
                state,
                self.eigenvalue[since:until],
                self.rates[since:until],
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
        return found

    def _settled(self, step: int) -> Array:
        """The stationary covariance (1, 2, 2) of (x, v) at a step, for independent batches."""
        return stationary_state_covariance(
            self.eigenvalue[[step]],
            self.noise[[step]],
            learning_rate=float(self.rates[step]),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def _shuffled(self, first: int, last: int, start: Array) -> Array:
        """Cov (x, v) after each step of a stretch that is all stable."""
        drawn, now = self.sampling, slice(first, last)
        factor = minibatch_noise_factor(drawn.examples, drawn.batch_size, replacement=False)
        attack = self.attack_share[now] * self.noise[now]
        # a batch of all examples has no sampling noise
        examples = (self.noise[now] - attack) / factor if factor > 0 else np.zeros(last - first)
        return shuffled_covariance(
            self.eigenvalue[now],
            examples,
            attack * drawn.batch_size,
            self.rates[now],
            examples=drawn.examples,
            sizes=drawn.sizes[now],
            epoch_ends=drawn.ends - first,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            initial_covariance=start[0],
        )

    def _window(self, first: int, ends: NDArray[np.int_], start: Array) -> Array:
        """Cov (x, v) after ``ends`` steps, in a stretch of steps from ``first`` on that are all stable."""
        path = propagate(
            self.spectrum,
            self.rates,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            record_steps=ends,
            initial_covariance=start,
            first_step=first,
        )
        return path.covariance[:, 0]


class RecordPosterior(Callback):
    """Writes the ``posterior`` table when training with momentum SGD ends; see ``posterior_rows``.

    Args:
        records: The run's record; only the first rank writes.
        interpolation: How (λ, γ) run between measured epochs.
    """

    def __init__(self, records: RunRecords, *, interpolation: Interpolation) -> None:
        self._records = records
        self._interpolation = interpolation

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replace the whole table."""
        assert isinstance(pl_module, AdversarialTraining)
        if not trainer.is_global_zero or pl_module.last_step is None or not pl_module.last_step.plain:
            return
        tables = {
            name: read_table(self._records.run_dir, name)
            for name in ("epochs", "rates", "spectrum", "bounds")
        }
        if tables["spectrum"].empty:
            return
        rows = posterior_rows(
            tables,
            momentum=pl_module.last_step.momentum,
            weight_decay=pl_module.last_step.weight_decay,
            interpolation=self._interpolation,
        )
        self._records.replace("posterior", rows)
