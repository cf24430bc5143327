"""The posterior over a whole run: measured curvature and noise, and the schedule the run used.

Shapes: T measurements, k directions, N optimiser steps, R recorded steps.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory import _evolution
from robustdyn.theory._validation import (
    Array,
    IntArray,
    count,
    covariance_matrix,
    finite,
    momentum_range,
    non_negative,
    positive,
    recorded_steps,
    scalar,
    state_covariances,
    vector,
    whole,
)

Interpolation = Literal["piecewise_constant", "log_linear"]
Method = Literal["auto", "doubling", "recurrence"]

_CHUNK = 256  # steps whose interpolated (λ, γ) are held at once
_WORTH_DOUBLING = 24  # equal steps from which O(log n) matrix products are cheaper than n plain steps


@dataclass(frozen=True, eq=False)
class MeasuredSpectrum:
    """(λ, γ) along fixed directions, known at some steps of a run and interpolated between them.

    Attributes:
        step: (T,) whole numbers, strictly increasing. A measurement at step s describes the weights that
            update number s (counted from 0) starts from.
        eigenvalue: λ (T, k), of the loss without weight decay; any sign.
        noise: γ (T, k) > 0, or C (T, k, k) in the same basis, for the covariance of every pair.
        gradient: g (T, k), mean gradient at the origin of the coordinate x, weight decay's part included; it
            pulls the mean, equation (21). Zero when x is measured from the minimum.
        interpolation: ``"piecewise_constant"`` holds the last measurement. ``"log_linear"`` draws straight
            lines in ln|λ| and ln γ, equation (24); where λ changes sign or is 0, and for g, the line is
            straight in the value itself. For C the logarithms of the diagonal and the correlations are drawn
            straight, equation (25), which keeps C positive. Both hold the ends outside the measured steps.

    Raises:
        ValueError: Shapes that disagree, unordered steps, γ ≤ 0, a C that is no covariance.
    """

    step: IntArray
    eigenvalue: Array
    noise: Array
    interpolation: Interpolation
    gradient: Array | None = None

    def __post_init__(self) -> None:
        step = vector("step", non_negative("step", self.step))
        eigenvalue = finite("eigenvalue", self.eigenvalue)
        if eigenvalue.ndim != 2 or eigenvalue.shape[0] != step.size or eigenvalue.size == 0:
            raise ValueError(f"eigenvalue has shape {eigenvalue.shape}; it must be ({step.size}, k)")
        if not (np.diff(step) > 0).all() or (step != np.rint(step)).any():
            raise ValueError(f"step is {step.tolist()}; it must be whole numbers, strictly increasing")
        if self.interpolation not in ("piecewise_constant", "log_linear"):
            raise ValueError(
                f"interpolation is {self.interpolation!r}; it must be 'piecewise_constant' or 'log_linear'"
            )
        gradient = finite("gradient", 0.0 if self.gradient is None else self.gradient)
        object.__setattr__(self, "step", whole("step", step))
        object.__setattr__(self, "eigenvalue", eigenvalue)
        object.__setattr__(self, "noise", _checked_noise(self.noise, eigenvalue))
        object.__setattr__(self, "gradient", np.broadcast_to(gradient, eigenvalue.shape))

    @property
    def directions(self) -> int:
        """K."""
        return int(self.eigenvalue.shape[1])

    @property
    def is_full(self) -> bool:
        """Whether the noise is a matrix, so that every pair of directions is followed."""
        return self.noise.ndim == 3

    def between(self, first: int, last: int) -> tuple[Array, Array, Array]:
        """(λ, γ or C, g) at steps first … last − 1, with no measurement between them.

        Returns:
            Arrays with a leading axis of last − first steps; read-only where they are constant.
        """
        n = last - first
        at = int(np.searchsorted(self.step, first, side="right")) - 1
        inside = 0 <= at < self.step.size - 1 and self.interpolation == "log_linear"
        at = max(at, 0)
        values = (self.eigenvalue, self.noise, np.asarray(self.gradient))
        if not inside:
            lam, noise, gradient = (np.broadcast_to(v[at], (n, *v.shape[1:])) for v in values)
            return lam, noise, gradient
        steps = np.arange(first, last, dtype=np.float64)
        share = (steps - self.step[at]) / (self.step[at + 1] - self.step[at])
        lam, noise, gradient = (v[at : at + 2] for v in values)
        mix = _log_linear_covariance if self.is_full else _log_linear
        return _log_linear(lam, share), mix(noise, share), _linear(gradient, share)

    def is_constant(self, first: int, last: int) -> bool:
        """Whether λ, γ and g are the same at all steps first … last − 1."""
        held = self.interpolation == "piecewise_constant"
        return held or first >= self.step[-1] or last <= self.step[0] + 1


def _checked_noise(noise: ArrayLike, eigenvalue: Array) -> Array:
    """γ (T, k) > 0 or C (T, k, k) with every slice a covariance of positive diagonal."""
    array = finite("noise", noise)
    if array.shape == eigenvalue.shape:
        return positive("noise", array)
    if array.shape != (*eigenvalue.shape, eigenvalue.shape[1]):
        wanted = f"{eigenvalue.shape} or {(*eigenvalue.shape, eigenvalue.shape[1])}"
        raise ValueError(f"noise has shape {array.shape}; it must be {wanted}")
    positive("diagonal of noise", np.einsum("tii->ti", array))
    return np.stack([covariance_matrix("noise", matrix) for matrix in array])


def _linear(ends: Array, share: Array) -> Array:
    """Straight line between ends (2, ...) at shares (N,): (N, ...)."""
    share = share.reshape(-1, *[1] * (ends.ndim - 1))
    return np.asarray(ends[0] + share * (ends[1] - ends[0]))


def _log_linear(ends: Array, share: Array) -> Array:
    """Equation (24): straight in the logarithm where both ends have the same sign, in the value elsewhere."""
    same = ends[0] * ends[1] > 0
    logs = np.log(np.abs(ends), where=same, out=np.zeros_like(ends))
    if same.all():
        return np.asarray(np.sign(ends[0]) * np.exp(_linear(logs, share)))
    return np.where(same, np.sign(ends[0]) * np.exp(_linear(logs, share)), _linear(ends, share))


def _log_linear_covariance(ends: Array, share: Array) -> Array:
    """Equation (25): standard deviations straight in the logarithm, correlations in the value; (N, k, k)."""
    deviation = np.sqrt(np.einsum("tii->ti", ends))
    correlation = ends / (deviation[:, :, None] * deviation[:, None, :])
    scale = _log_linear(deviation, share)
    return np.asarray(scale[:, :, None] * _linear(correlation, share) * scale[:, None, :])


@dataclass(frozen=True, eq=False)
class PosteriorTrajectory:
    """Mean and covariance of (x, v) at the recorded steps.

    Attributes:
        step: (R,); the state after that many updates, step 0 being the start.
        mean: (R, k, 2).
        covariance: (R, k, 2, 2), or (R, k, k, 2, 2) when the noise was a matrix.
    """

    step: IntArray
    mean: Array
    covariance: Array

    @property
    def position(self) -> Array:
        """Mean of x (R, k), in the unit of θ."""
        return self.mean[..., 0]

    @property
    def position_covariance(self) -> Array:
        """Cov of x: variances (R, k), or matrices Σ (R, k, k) when the noise was a matrix."""
        return self.covariance[..., 0, 0]

    @property
    def variance(self) -> Array:
        """σ² (R, k) in either case."""
        sigma = self.position_covariance
        return sigma if self.covariance.ndim == 4 else np.einsum("rii->ri", sigma)


def propagate(
    spectrum: MeasuredSpectrum,
    learning_rate: ArrayLike,
    *,
    momentum: float,
    weight_decay: float,
    record_steps: ArrayLike,
    initial_covariance: ArrayLike | None = None,
    initial_mean: ArrayLike | None = None,
    first_step: int = 0,
    method: Method = "auto",
    allow_unstable: bool = False,
) -> PosteriorTrajectory:
    """The exact law of (x, v) along a run, equations (9), (13), (21) and (22) of docs/theory.md.

    Stretches of equal steps are crossed by doubling, O(log n); where η, λ or γ change at every step the
    recurrence is followed. Flat (λ + ω = 0) and negative directions are allowed: they have no stationary law,
    but they do have a law at every step.

    Args:
        spectrum: λ, γ and g of the run, along fixed directions.
        learning_rate: η (N,) > 0, the rate each update used.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.
        record_steps: (R,) steps in [``first_step``, N], increasing, at which to report.
        initial_covariance: (k, 2, 2), or (k, k, 2, 2) with a noise matrix; default 0, a run from one point.
        initial_mean: (k, 2); default 0.
        first_step: Step in [0, N] at which the run has the initial state.
        method: ``"auto"`` takes the cheaper way for each stretch, ``"recurrence"`` single steps throughout,
            ``"doubling"`` doubling wherever λ and γ are held.
        allow_unstable: Accept η(λ + ω) ≥ 2(1 + μ), where the iteration diverges by overshooting.

    Returns:
        The state at the recorded steps.

    Raises:
        ValueError: Invalid hyperparameter, unstable step, shapes that disagree, or a direction that grew out
            of the range of float64; the message has the value and the admissible range.

    Source: ours (docs/theory.md, section 3).
    """
    rates = vector("learning_rate", positive("learning_rate", learning_rate))
    record = recorded_steps(record_steps, count("first_step", first_step, 0), rates.size)
    if method not in ("auto", "doubling", "recurrence"):
        raise ValueError(f"method is {method!r}; it must be 'auto', 'doubling' or 'recurrence'")
    mover = _Mover(
        spectrum, rates, scalar("momentum", momentum_range(momentum)), weight_decay, method, allow_unstable
    )
    mover.start(initial_mean, initial_covariance)
    cuts = np.union1d(np.union1d(record, spectrum.step), [first_step, rates.size])
    cuts = cuts[(cuts >= first_step) & (cuts <= rates.size)]
    wanted = set(record.tolist())
    kept = [mover.state()] if first_step in wanted else []
    for first, last in pairwise(cuts.tolist()):
        mover.advance(first, last)
        if last in wanted:
            kept.append(mover.state())
        if last == record[-1]:
            break
    means, covariances = zip(*kept, strict=True)
    return PosteriorTrajectory(step=record, mean=np.stack(means), covariance=np.stack(covariances))


class _Mover:
    """The state of ``propagate`` on its way, component-first as ``_evolution`` wants it."""

    def __init__(
        self,
        spectrum: MeasuredSpectrum,
        rates: Array,
        mu: float,
        weight_decay: float,
        method: Method,
        allow_unstable: bool,
    ) -> None:
        self.spectrum, self.rates, self.mu, self.method = spectrum, rates, mu, method
        self.decay = scalar("weight_decay", non_negative("weight_decay", weight_decay))
        self.allow_unstable = allow_unstable
        self.mean, self.block = np.zeros(()), np.zeros(())
        self.moving = False

    def start(self, mean: ArrayLike | None, covariance: ArrayLike | None) -> None:
        """Take the initial state, or zeros."""
        k = self.spectrum.directions
        wanted = (k, k, 2, 2) if self.spectrum.is_full else (k, 2, 2)
        block = (
            np.zeros(wanted)
            if covariance is None
            else state_covariances("initial_covariance", covariance, wanted)
        )
        centre = np.zeros((k, 2)) if mean is None else finite("initial_mean", mean)
        if centre.shape != (k, 2):
            raise ValueError(f"initial_mean has shape {centre.shape}; it must be {(k, 2)}")
        self.block = np.ascontiguousarray(np.moveaxis(block, (-2, -1), (0, 1)))
        self.mean = np.ascontiguousarray(centre.T)
        # A mean that starts at 0 and is never pulled stays there.
        self.moving = bool(centre.any() or np.any(self.spectrum.gradient))

    def state(self) -> tuple[Array, Array]:
        """Copies of mean (k, 2) and covariance (..., 2, 2)."""
        return self.mean.T.copy(), np.moveaxis(self.block, (0, 1), (-2, -1)).copy()

    def advance(self, first: int, last: int) -> None:
        """Updates first … last − 1, inside one measurement interval."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.spectrum.is_constant(first, last):
                self._advance_constant(first, last)
            else:
                for at in range(first, last, _CHUNK):
                    self._walk(at, min(at + _CHUNK, last))
        good = np.isfinite(self.block).all(axis=(0, 1)) & np.isfinite(self.mean).all(axis=0)
        if not good.all():
            index = int(np.argwhere(~good)[0][-1])
            lam = self.spectrum.between(first, first + 1)[0][0, index]
            highest = self._highest(self.rates[first])
            raise ValueError(
                f"direction {index} (eigenvalue {lam:g}) left the range of float64 before step {last}; "
                f"eigenvalue must be in ({-self.decay:g}, {highest:g}), or the run shorter"
            )

    def _highest(self, eta: Array) -> Array:
        """The eigenvalue at which steps of these rates begin to overshoot, equation (6)."""
        return 2 * (1 + self.mu) / eta - self.decay

    def _advance_constant(self, first: int, last: int) -> None:
        """As ``advance`` with λ, γ and g held: leap over stretches of one rate where that pays."""
        turns = np.flatnonzero(np.diff(self.rates[first:last])) + first + 1
        stretches = turns.size + 1
        leaping = (last - first) >= _WORTH_DOUBLING * stretches
        if self.method == "doubling" or (self.method == "auto" and leaping):
            edges = [first, *turns.tolist(), last]
            for start, end in pairwise(edges):
                self._leap(start, end)
            return
        for at in range(first, last, _CHUNK):
            self._walk(at, min(at + _CHUNK, last))

    def _sides(self, curvature: Array) -> tuple[Array, Array]:
        """A block's two curvatures (..., k) or, for all pairs, (..., k, 1) and (..., 1, k)."""
        if self.spectrum.is_full:
            return curvature[..., :, None], curvature[..., None, :]
        return curvature, curvature

    def _leap(self, first: int, last: int) -> None:
        lam, noise, force = (v[0] for v in self.spectrum.between(first, first + 1))
        eta, steps = float(self.rates[first]), last - first
        self._require_stable(lam[None], self.rates[first : first + 1])
        left, right = self._sides(lam + self.decay)
        self.block = _evolution.leap_covariance(
            self.block, left, right, noise, eta=eta, mu=self.mu, steps=steps
        )
        if self.moving:
            self.mean = _evolution.leap_mean(
                self.mean, lam + self.decay, force, eta=eta, mu=self.mu, steps=steps
            )

    def _walk(self, first: int, last: int) -> None:
        lam, noise, force = self.spectrum.between(first, last)
        eta = self.rates[first:last]
        self._require_stable(lam, eta)
        left, right = self._sides(lam + self.decay)
        self.block = _evolution.walk_covariance(self.block, left, right, noise, eta, self.mu)
        if self.moving:
            self.mean = _evolution.walk_mean(self.mean, lam + self.decay, force, eta, self.mu)

    def _require_stable(self, lam: Array, eta: Array) -> None:
        """Refuse overshooting steps; λ ≤ 0 passes."""
        highest = self._highest(eta)
        worst = lam.max(axis=1)
        if self.allow_unstable or (worst < highest).all():
            return
        at = int(np.argmin(worst < highest))
        raise ValueError(
            f"eigenvalue is {worst[at]:g}; with learning_rate={eta[at]:g}, momentum={self.mu:g}, "
            f"weight_decay={self.decay:g} it must be < {highest[at]:g} (or pass allow_unstable=True)"
        )
