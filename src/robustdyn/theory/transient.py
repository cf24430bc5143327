"""Mean and covariance at any time after a change of the learning rate, and what earlier rates left of it.

Shapes: k directions, T times. Covariances end in (2, 2) over (x, v); with a full noise covariance (k, k) they
are (..., k, k, 2, 2), one block for each pair of directions.
"""

from dataclasses import asdict, dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory import _evolution
from robustdyn.theory._validation import (
    Array,
    IntArray,
    finite,
    first_offender,
    momentum_range,
    non_negative,
    positive,
    scalar,
    state_covariances,
    vector,
    whole,
)
from robustdyn.theory.momentum import MomentumDynamics
from robustdyn.theory.stationary import (
    stationary_block_covariance,
    stationary_state_covariance,
    stationary_variance,
)

DECAY = 0.2  # a fall by more than this share is a decay ...
HELD = 0.02  # ... if the rate moved by less than this in the epoch before: the end of a cosine is no decay


def sudden_decays(rates: ArrayLike) -> list[int]:
    """Where a rate that was held falls by more than 20 %, so that smooth schedules have no such place.

    After the first epoch a fall counts if the new rate is held in the next.

    Args:
        rates: η (E,) of one epoch after the other.

    Returns:
        The first epochs at the lower rates, as indices into ``rates``.
    """
    eta = np.asarray(rates, dtype=np.float64)
    at = np.arange(1, len(eta))
    # no epoch before the first can tell; a schedule that continues to fall is a smooth one
    before = np.where(at > 1, at - 2, at)
    after = np.where(at > 1, at - 1, np.minimum(at + 1, len(eta) - 1))
    held = np.abs(eta[after] - eta[before]) <= HELD * eta[before]
    return [int(i) for i in at[held & (eta[at] < (1.0 - DECAY) * eta[at - 1])]]


def _times(steps: ArrayLike) -> IntArray:
    """Whole non-negative times as an integer vector (T,)."""
    return whole("steps", vector("steps", np.atleast_1d(non_negative("steps", steps))))


def _powers(dynamics: MomentumDynamics, eigenvalue: Array, times: IntArray) -> Array:
    matrix = _evolution.transition(
        eigenvalue + dynamics.weight_decay, dynamics.learning_rate, dynamics.momentum
    )
    return _evolution.powers(matrix, times)


def covariance_after(
    steps: ArrayLike,
    initial: ArrayLike,
    eigenvalue: ArrayLike,
    noise: ArrayLike,
    dynamics: MomentumDynamics,
) -> Array:
    """S_t = S_∞ + A^t (S_0 − S_∞) A^tᵀ, equation (18) of docs/theory.md.

    Exact for every t, with both real and complex roots. For λ ≤ 0, where S_∞ does not exist, use
    ``robustdyn.theory.propagate``.

    Args:
        steps: t (T,) or one number, optimiser steps at this constant setting.
        initial: S_0, (k, 2, 2), or (k, k, 2, 2) with a noise matrix. The buffer is PyTorch's, which a decay
            leaves as it is.
        eigenvalue: λ (k,).
        noise: γ (k,) > 0, or C (k, k).
        dynamics: η, μ, ω from t = 0 on.

    Returns:
        (T, k, 2, 2), or (T, k, k, 2, 2) with a noise matrix.

    Raises:
        ValueError: Unstable direction, invalid noise, negative or fractional time, or shapes that disagree.

    Source: ours; the fixed point form of the linear recursion (9).
    """
    times = _times(steps)
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue))
    limit = _limit(lam, finite("noise", noise), dynamics)
    start = state_covariances("initial", initial, limit.shape)
    power = _powers(dynamics, lam, times)
    return _carried(power, start - limit) + limit


def _carried(power: Array, block: Array) -> Array:
    """A^t S A^tᵀ (T, ..., 2, 2) of powers (2, 2, T, k) and one block for each direction or pair."""
    left, right = (power, power) if block.ndim == 3 else (power[..., :, None], power[..., None, :])
    first = np.moveaxis(block, (-2, -1), (0, 1))[:, :, None]
    return np.moveaxis(_evolution.congruence(left, first, right), (0, 1), (-2, -1))


def _limit(eigenvalue: Array, noise: Array, dynamics: MomentumDynamics) -> Array:
    """S_∞, of the directions or of all pairs."""
    if noise.ndim == 0:
        noise = np.broadcast_to(noise, eigenvalue.shape)
    elif noise.ndim == 1:
        vector("noise", noise, eigenvalue.size)
    stationary = stationary_state_covariance if noise.ndim == 1 else stationary_block_covariance
    return stationary(eigenvalue, noise, **asdict(dynamics))


def mean_after(
    steps: ArrayLike, initial: ArrayLike, eigenvalue: ArrayLike, dynamics: MomentumDynamics
) -> Array:
    """Mean of (x, v) after t steps, A^t m_0, equation (19) of docs/theory.md; any finite λ.

    Args:
        steps: t (T,) or one number.
        initial: m_0 (k, 2), offset from the minimum of the loss with weight decay, and buffer.
        eigenvalue: λ (k,).
        dynamics: η, μ, ω.

    Returns:
        (T, k, 2).

    Raises:
        ValueError: Negative or fractional time, shapes that disagree, or a direction that grew out of the
            range of float64.
    """
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue))
    start = finite("initial", initial)
    if start.shape != (lam.size, 2):
        raise ValueError(f"initial has shape {start.shape}; it must be ({lam.size}, 2)")
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.einsum("abtk,kb->tka", _powers(dynamics, lam, _times(steps)), start)
    good = np.isfinite(mean).all(axis=(0, 2))
    if not good.all():
        low, high = dynamics.stable_eigenvalues
        raise ValueError(
            f"eigenvalue is {first_offender(lam, good)} and the mean leaves the range of float64; it must be "
            f"in ({low:g}, {high:g}), or the times shorter"
        )
    return np.asarray(mean)


def propagated_variance(
    initial: ArrayLike,
    eigenvalue: ArrayLike,
    learning_rate: ArrayLike,
    *,
    momentum: float,
    weight_decay: float,
) -> Array:
    """What is left of one direction's variance after each of N steps, equation (18a) of docs/theory.md.

    It is the position's part of (A_t ⋯ A_1) S_0 (A_t ⋯ A_1)ᵀ: the law of ``propagate``, and of
    ``shuffled_covariance``, without any noise after the start. What these give beyond it is the part that the
    noise after the start injects.

    Args:
        initial: S_0 (2, 2) of (x, v), as it was before the first of the steps.
        eigenvalue: λ (N,) of each step, any finite number.
        learning_rate: η (N,) > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        (N,), squared unit of θ; never negative.

    Raises:
        ValueError: Invalid hyperparameter, a start that is no covariance, or shapes that disagree.
    """
    eta = vector("learning_rate", positive("learning_rate", learning_rate))
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue), eta.size)
    mu = scalar("momentum", momentum_range(momentum))
    pull = lam + scalar("weight_decay", non_negative("weight_decay", weight_decay))
    (a, p), (_, w) = state_covariances("initial", np.asarray(initial)[None], (1, 2, 2))[0].tolist()
    # two paths without noise, from the columns of a square root of S_0
    x, v = sqrt(a), p / sqrt(a) if a > 0 else 0.0
    y, u = 0.0, sqrt(max(w - v * v, 0.0))
    found = np.empty(eta.size)
    for step, (slope, rate) in enumerate(zip(pull.tolist(), eta.tolist(), strict=True)):
        v, u = mu * v + slope * x, mu * u + slope * y
        x, y = x - rate * v, y - rate * u
        found[step] = x * x + y * y
    return found


def slow_mode_variance(
    steps: ArrayLike,
    initial_variance: ArrayLike,
    eigenvalue: ArrayLike,
    noise: ArrayLike,
    dynamics: MomentumDynamics,
) -> Array:
    """σ_∞² + ρ^{2t} (σ_0² − σ_∞²), the papers' early-phase form, equation (20) of docs/theory.md.

    It keeps only A's larger eigenvalue and drops the momentum buffer. This is accurate for η(λ+ω) ≪ (1 −
    √μ)², and wrong by a factor where the roots are complex. ``covariance_after`` is exact at the same cost.

    Args:
        steps: t (T,) or one number.
        initial_variance: σ_0² (k,) > 0.
        eigenvalue: λ (k,).
        noise: γ (k,) > 0.
        dynamics: η, μ, ω from t = 0 on.

    Returns:
        (T, k), squared unit of θ.

    Raises:
        ValueError: As ``covariance_after``.

    Source: arXiv 2410.07719 v3, its theorem on the non-stationary transition.
    """
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue))
    limit = stationary_variance(lam, noise, **asdict(dynamics))
    shrink = dynamics.spectral_radius(lam) ** (2 * _times(steps)[:, None])
    return np.asarray(limit + shrink * (positive("initial_variance", initial_variance) - limit))


@dataclass(frozen=True, eq=False)
class DecayTransient:
    """What a single decay does to the posterior of each direction.

    Attributes:
        steps: t (T,), optimiser steps since the decay.
        covariance: (T, k, 2, 2) of (x, v), exact.
        propagated: (T, k), the part of σ_t² that the old rate left, equation (18a).
        slow_mode_variance: (T, k), the papers' approximation.
        stationary_before: (k,), σ² the run came from.
        stationary_after: (k,), σ² it goes to.
    """

    steps: Array
    covariance: Array
    propagated: Array
    slow_mode_variance: Array
    stationary_before: Array
    stationary_after: Array

    @property
    def variance(self) -> Array:
        """σ_t² (T, k), exact."""
        return self.covariance[..., 0, 0]

    @property
    def injected(self) -> Array:
        """The part of σ_t² (T, k) that the noise since the decay made."""
        return self.variance - self.propagated

    @property
    def slow_mode_relative_error(self) -> Array:
        """(approximate − exact) / exact (T, k)."""
        return self.slow_mode_variance / self.variance - 1


def decay_transient(
    steps: ArrayLike,
    eigenvalue: ArrayLike,
    noise: ArrayLike,
    *,
    before: MomentumDynamics,
    after: MomentumDynamics,
) -> DecayTransient:
    """From one stationary law towards another, exactly and by the slow mode, equations (18) and (20).

    λ and γ are held through the decay; when both are measured along the run, use
    ``robustdyn.theory.propagate``.

    Args:
        steps: t (T,) or one number, steps since the decay.
        eigenvalue: λ (k,).
        noise: γ (k,) > 0.
        before: η, μ, ω until the decay.
        after: η, μ, ω from it on.

    Returns:
        Frozen result; see ``DecayTransient``.

    Raises:
        ValueError: A direction unstable before or after, or as ``covariance_after``.
    """
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue))
    gamma = positive("noise", noise)
    gamma = np.broadcast_to(gamma, lam.shape) if gamma.ndim == 0 else vector("noise", gamma, lam.size)
    start, limit = _limit(lam, gamma, before), _limit(lam, gamma, after)
    return DecayTransient(
        steps=_times(steps).astype(np.float64),
        covariance=covariance_after(steps, start, lam, gamma, after),
        propagated=_carried(_powers(after, lam, _times(steps)), start)[..., 0, 0],
        slow_mode_variance=slow_mode_variance(steps, start[:, 0, 0], lam, gamma, after),
        stationary_before=start[:, 0, 0],
        stationary_after=limit[:, 0, 0],
    )
