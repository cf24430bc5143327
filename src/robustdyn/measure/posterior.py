"""Computes the posterior at every epoch from a run's recorded learning rates and measured spectra."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import lightning
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from robustdyn.errors import ConfigError
from robustdyn.methods import AdversarialTraining
from robustdyn.records import RunRecords, read_table
from robustdyn.records.schema import (
    GRADIENT_NOISE,
    INDEPENDENT,
    INJECTED_VARIANCE,
    POSTERIOR_VARIANCE,
    POSTERIOR_VARIANCE_STATIONARY,
    PROPAGATED_VARIANCE,
    REFRESHED_SLOPE,
)
from robustdyn.theory import (
    MeasuredSpectrum,
    is_stable,
    minibatch_noise_factor,
    propagated_variance,
    shuffled_covariance,
    stationary_state_covariance,
    sudden_decays,
)
from robustdyn.theory.trajectory import Interpolation

Array = NDArray[np.float64]

POSTERIOR_TABLES = ("epochs", "rates", "spectrum", "slopes", "bounds")
"""The tables of a run from which its posterior is computed."""


def posterior_rows(
    tables: dict[str, pd.DataFrame], *, momentum: float, weight_decay: float, interpolation: Interpolation
) -> Iterator[dict[str, Any]]:
    """σ² of every tracked direction after every epoch, propagated through the run's rates and spectra.

    There are two laws. One is the law of training: shuffled epochs with a short last batch, and the slope J
    of the gradient whose attack follows the weights. If J is not known at every epoch at which the spectrum
    was measured, it has the curvature λ at fixed adversarial examples instead. J is steeper, and the
    variances with λ are therefore too large. The other one is the papers' law, which has independent batches
    and λ.

    Directions are matched by rank between measurements. A law starts without variance, at the point where
    the run started. While a direction overshoots, η(J + ω) ≥ 2(1 + μ), or is flat, it has no stationary law
    and its variance is NaN. Afterwards it starts again from the stationary law of that moment. Before the
    first measurement, the values of the first measurement are used.

    The variance of either law is the sum of two parts. The propagated part is what would be left if the noise
    had ended with the last step before the learning rate last fell suddenly. The injected part is the rest,
    made at the rates since then. Before the first sudden fall, and with a smooth schedule throughout, all of
    the variance is injected. So it is where the law started again after the last fall.

    The standard errors are over the measured examples, to first order. All measured epochs have the same
    examples, and so the errors of all epochs are taken to have one sign. The errors of slope and noise are
    taken to be independent of each other. The two parts of a variance have no errors of their own.

    Args:
        tables: ``POSTERIOR_TABLES`` of one run.
        momentum: μ of every step. For a branch, or a run that went on with another one, this is the last one.
        weight_decay: ω of every step, in the same way.
        interpolation: How J, λ and γ run between measured epochs; see ``robustdyn.theory.MeasuredSpectrum``.

    Yields:
        Rows of the ``posterior`` table, epoch by epoch.
    """
    ends = tables["epochs"]["step"].to_numpy(dtype=int)
    if not len(ends) or tables["spectrum"].empty:
        return
    rates = rate_of_each_step(tables["rates"], int(ends[-1]))
    run = _Run(
        rates=rates,
        ends=ends,
        falls=_sudden_falls(rates, ends),
        sampling=_Sampling.of(tables["bounds"], ends),
        momentum=momentum,
        weight_decay=weight_decay,
        interpolation=interpolation,
    )
    slopes = tables["slopes"][["epoch", "index", REFRESHED_SLOPE, f"{REFRESHED_SLOPE}_se"]]
    spectrum = tables["spectrum"].merge(slopes, on=["epoch", "index"], how="left", validate="one_to_one")
    usable = spectrum[spectrum[GRADIENT_NOISE] > 0]
    follows = bool(usable[REFRESHED_SLOPE].notna().all())
    columns = [
        (int(str(index)), _columns(rows, run, REFRESHED_SLOPE if follows else "curvature"))
        for index, rows in usable.groupby("index", sort=True)
    ]
    for row, (epoch, step) in enumerate(zip(tables["epochs"]["epoch"], ends, strict=True)):
        for index, values in columns:
            found = {"epoch": int(epoch), "step": int(step), "index": index, "attack_follows": follows}
            yield found | {name: value[row] for name, value in values.items()}


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
    batch_size: NDArray[np.int_]  # (N,), a branch may have another one than its run
    factor: Array  # (N,), of the sampling noise
    sizes: Array  # (N,), where the last batch of an epoch may be smaller

    @classmethod
    def of(cls, bounds: pd.DataFrame, ends: NDArray[np.int_]) -> "_Sampling":
        n = int(bounds["train_examples"].iloc[-1])
        latest_first = bounds["batch_size"].astype(int).unique()[::-1].tolist()
        steps = np.diff(ends, prepend=0)
        by_steps = {count: _batch_size(n, count, latest_first) for count in steps.tolist()}
        factors = {b: minibatch_noise_factor(n, b, replacement=False) for b in by_steps.values()}
        batch_size = np.repeat([by_steps[count] for count in steps.tolist()], steps)
        sizes = batch_size.astype(float)
        last = batch_size[ends - 1]
        # the size of the last batch is what the others leave of an epoch
        sizes[ends - 1] = np.clip(n - (steps - 1) * last, 1, last)
        return cls(n, batch_size, np.array([factors[b] for b in batch_size.tolist()]), sizes)


def _batch_size(examples: int, steps: int, latest_first: Sequence[int]) -> int:
    """The size of the batches of an epoch: one that was recorded, if ``examples`` give so many steps."""
    for size in latest_first:
        if -(-examples // size) == steps:
            return size
    latest = latest_first[0]
    return latest if (steps - 1) * latest < examples else max(1, examples // steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """What the laws of all directions share, for a run of N steps and E epochs."""

    rates: Array  # (N,)
    ends: NDArray[np.int_]  # (E,), steps after which the epochs end
    falls: list[int]
    sampling: _Sampling
    momentum: float
    weight_decay: float
    interpolation: Interpolation

    def interpolated(self, step: NDArray[np.int_], value: Array) -> Array:
        """A measured slope or noise (N + 1,), before every step and after the last one."""
        known = MeasuredSpectrum(step, value[:, None], np.ones((len(step), 1)), self.interpolation)
        count = len(self.rates) + 1
        cuts = [0, *[int(s) for s in step if 0 < s < count], count]
        return np.concatenate([known.between(a, b)[0][:, 0] for a, b in pairwise(cuts) if b > a])

    def interpolated_share(self, step: NDArray[np.int_], share: Array) -> Array:
        """The same for a share, which may be 0."""
        every = np.arange(len(self.rates) + 1)
        if self.interpolation == "log_linear":
            return np.interp(every, step, share)
        return np.asarray(share[(np.searchsorted(step, every, side="right") - 1).clip(min=0)])


def _columns(measured: pd.DataFrame, run: _Run, slope_of_training: str) -> dict[str, Array]:
    """The columns (E,) of one direction.

    Args:
        measured: Its rows of the table ``spectrum``, with the columns of ``slopes``.
        run: The run.
        slope_of_training: The column that is the slope of training's law.
    """
    step = measured["step"].to_numpy(dtype=int)
    share = (measured["attack_noise"] / measured[GRADIENT_NOISE]).to_numpy(dtype=float).clip(0, 1)
    attack_share = run.interpolated_share(step, share)

    def law(slope: str, *, shuffled: bool, moved: str | None = None) -> _Law:
        """The law; or the law with one measured column larger by its standard errors."""
        values = {name: measured[name].to_numpy(dtype=float) for name in (slope, GRADIENT_NOISE)}
        if moved is not None:
            values[moved] = values[moved] + measured[f"{moved}_se"].to_numpy(dtype=float)
        steepness, noise = (run.interpolated(step, value)[:-1] for value in values.values())
        return _Law(run, steepness, noise, attack_share[:-1], shuffled)

    found = {
        "slope": run.interpolated(step, measured[slope_of_training].to_numpy(dtype=float))[run.ends],
        POSTERIOR_VARIANCE_STATIONARY: law("curvature", shuffled=False).stationary(),
    }
    for ending, slope, shuffled in (("", slope_of_training, True), (INDEPENDENT, "curvature", False)):
        whole, left = law(slope, shuffled=shuffled).propagated()
        changes = [
            law(slope, shuffled=shuffled, moved=moved).propagated()[0] - whole
            for moved in (slope, GRADIENT_NOISE)
        ]
        found |= {
            POSTERIOR_VARIANCE + ending: whole,
            f"{POSTERIOR_VARIANCE}{ending}_se": np.hypot(*changes),
            PROPAGATED_VARIANCE + ending: left,
            INJECTED_VARIANCE + ending: whole - left,
        }
    return found


@dataclass(frozen=True, eq=False)
class _Law:
    """The law of one direction through a run of N steps."""

    run: _Run
    slope: Array  # (N,)
    noise: Array  # (N,), γ
    attack_share: Array  # (N,), the part of γ that no shuffling takes back
    shuffled: bool  # whether epochs are, or else all batches are independent and of one size

    @cached_property
    def stable(self) -> NDArray[np.bool_]:
        """At which steps (N,) there is a stationary law."""
        return is_stable(self.slope, self.run.rates, self.run.momentum, self.run.weight_decay)

    def stationary(self) -> Array:
        """σ² (E,) that the last step of each epoch would settle to; NaN where there is none."""
        at = self.run.ends - 1
        settled = [self._settled(step)[0, 0] if self.stable[step] else np.nan for step in at]
        return np.array(settled)

    def propagated(self) -> tuple[Array, Array]:
        """σ² (E,) after each epoch; NaN without a law.

        Returns:
            All of it, and the part that noise before the last sudden fall of the rate left.
        """
        ends = self.run.ends
        whole, left = np.full((2, len(ends)), np.nan)
        edges = np.flatnonzero(np.diff(self.stable)) + 1
        for first, last in pairwise([0, *edges.tolist(), len(self.slope)]):
            inside = (ends > first) & (ends <= last)
            if self.stable[first] and inside.any():
                at = ends[inside] - first - 1
                states = self._states(first, last)
                whole[inside] = states[at, 0, 0]
                left[inside] = self._left(first, last, states)[at]
        return whole, left

    def _states(self, first: int, last: int) -> Array:
        """Cov (x, v) after each step of a stretch that is all stable."""
        run, now = self.run, slice(first, last)
        drawn, noise, attack = run.sampling, self.noise[now], self.attack_share[now] * self.noise[now]
        if self.shuffled:
            factor, no_noise = drawn.factor[now], np.zeros_like(noise)
            # a batch of all examples has no sampling noise
            examples = np.divide(noise - attack, factor, out=no_noise, where=factor > 0)
            attack, sizes = attack * drawn.batch_size[now], drawn.sizes[now]
        else:
            examples, attack, sizes = np.zeros_like(noise), noise, np.ones_like(noise)
        return shuffled_covariance(
            self.slope[now],
            examples,
            attack,
            run.rates[now],
            examples=drawn.examples,
            sizes=sizes,
            epoch_ends=run.ends - first,
            momentum=run.momentum,
            weight_decay=run.weight_decay,
            initial_covariance=self._settled(first) if first > 0 else np.zeros((2, 2)),
        )

    def _left(self, first: int, last: int, states: Array) -> Array:
        """What each step of a stretch leaves of the variance before the last sudden fall of the rate."""
        run, found = self.run, np.zeros(last - first)
        falls = [step for step in run.falls if first < step < last]
        for since, until in pairwise([*falls, last]):
            found[since - first : until - first] = propagated_variance(
                states[since - first - 1],
                self.slope[since:until],
                run.rates[since:until],
                momentum=run.momentum,
                weight_decay=run.weight_decay,
            )
        return found

    def _settled(self, step: int) -> Array:
        """The stationary covariance (2, 2) of (x, v) at a step, for independent batches."""
        return stationary_state_covariance(
            self.slope[step],
            self.noise[step],
            learning_rate=float(self.run.rates[step]),
            momentum=self.run.momentum,
            weight_decay=self.run.weight_decay,
        )


class RecordPosterior(Callback):
    """Writes the ``posterior`` table when training with momentum SGD ends; see ``posterior_rows``.

    Args:
        records: The run's record; only the first rank writes.
        interpolation: How (λ, γ) run between measured epochs.
    """

    def __init__(self, records: RunRecords, *, interpolation: Interpolation) -> None:
        self._records = records
        self._interpolation = interpolation

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuse a resumed run or a branch with fewer images, whose law would have two sizes of the data set.

        Raises:
            ConfigError: The training set is smaller than the one that was recorded.
        """
        assert isinstance(pl_module, AdversarialTraining)
        if not trainer.is_global_zero or not pl_module.plain_momentum:
            return
        spectrum, bounds = (read_table(self._records.run_dir, name) for name in ("spectrum", "bounds"))
        now = len(trainer.datamodule.split("train"))  # type: ignore[attr-defined]
        if not spectrum.empty and now < (before := int(bounds["train_examples"].iloc[-1])):
            raise ConfigError(
                f"data.train_size: the run was trained on {before} images and would continue with {now}, for "
                "which its posterior cannot be computed; leave data.train_size and data.validation_size as "
                "they were, or train a run of its own"
            )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Replace the whole table."""
        assert isinstance(pl_module, AdversarialTraining)
        if not trainer.is_global_zero or pl_module.last_step is None or not pl_module.last_step.plain:
            return
        tables = {name: read_table(self._records.run_dir, name) for name in POSTERIOR_TABLES}
        if tables["spectrum"].empty:
            return
        rows = posterior_rows(
            tables,
            momentum=pl_module.last_step.momentum,
            weight_decay=pl_module.last_step.weight_decay,
            interpolation=self._interpolation,
        )
        self._records.replace("posterior", rows)
