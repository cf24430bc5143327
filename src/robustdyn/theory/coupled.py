"""The law of momentum SGD if curvature couples directions and the batches of an epoch are correlated.

``robustdyn.theory.propagate`` follows eigenvectors of a symmetric Hessian. In adversarial training the attack
moves with the weights, and the slope J of the gradient need be neither diagonal in the Hessian's eigenbasis
nor symmetric. Shapes: T measurements, k directions, N steps, S recorded steps.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

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
    shuffled_sizes,
    vector,
    whole,
)
from robustdyn.theory.trajectory import PosteriorTrajectory


@dataclass(frozen=True, eq=False)
class MeasuredDrift:
    """Slopes, noise and gradient along fixed directions, known at some steps and interpolated between them.

    Attributes:
        step: (T,) whole numbers, strictly increasing. A measurement at step s describes the weights that
            update number s (counted from 0) starts from.
        slope: J (T, k, k), ∂g_i/∂x_j of the mean gradient without weight decay; of any sign and symmetry.
        example_noise: C₁ (T, k, k), population covariance (denominator n) over examples of the gradient, mean
            over starts of the attack.
        attack_noise: C_a (T, k, k), mean over examples of the covariance over starts of the attack.
        gradient: g (k,), mean gradient at x = 0, weight decay's part included.
        interpolation: ``"piecewise_constant"`` holds the last measurement, ``"linear"`` draws straight lines
            entry by entry, which keeps covariances positive. Both hold the ends outside the measured steps.

    Raises:
        ValueError: Shapes that disagree, unordered steps, noise that is no covariance.
    """

    step: IntArray
    slope: Array
    example_noise: Array
    attack_noise: Array
    gradient: Array
    interpolation: Literal["piecewise_constant", "linear"]

    def __post_init__(self) -> None:
        step = vector("step", non_negative("step", self.step))
        if not (np.diff(step) > 0).all() or (step != np.rint(step)).any():
            raise ValueError(f"step is {step.tolist()}; it must be whole numbers, strictly increasing")
        slope = finite("slope", self.slope)
        if slope.ndim != 3 or slope.shape[0] != step.size or slope.shape[1] != slope.shape[2]:
            raise ValueError(f"slope has shape {slope.shape}; it must be ({step.size}, k, k)")
        if self.interpolation not in ("piecewise_constant", "linear"):
            raise ValueError(
                f"interpolation is {self.interpolation!r}; it must be 'piecewise_constant' or 'linear'"
            )
        object.__setattr__(self, "step", whole("step", step))
        object.__setattr__(self, "slope", slope)
        for name in ("example_noise", "attack_noise"):
            noise = finite(name, getattr(self, name))
            if noise.shape != slope.shape:
                raise ValueError(f"{name} has shape {noise.shape}; it must be {slope.shape}")
            # an estimate of one part may have negative eigenvalues; their sum must not
            object.__setattr__(self, name, (noise + noise.transpose(0, 2, 1)) / 2)
        for part in self.example_noise + self.attack_noise:
            covariance_matrix("example_noise + attack_noise", part)
        gradient = finite("gradient", self.gradient)
        object.__setattr__(self, "gradient", vector("gradient", gradient, slope.shape[1]))

    def at(self, step: int) -> tuple[Array, Array, Array]:
        """(J, C₁, C_a), each (k, k), of an update."""
        values = (self.slope, self.example_noise, self.attack_noise)
        if self.interpolation == "piecewise_constant":
            left = max(int(np.searchsorted(self.step, step, side="right")) - 1, 0)
            return values[0][left], values[1][left], values[2][left]
        first, second, third = (interpolated(self.step, v, step) for v in values)
        return first, second, third


def interpolated(known_at: IntArray, values: Array, step: int) -> Array:
    """Values at T increasing steps, interpolated linearly at another step; constant beyond the ends.

    Args:
        known_at: (T,).
        values: (T, ...).
        step: Which.
    """
    right = int(np.searchsorted(known_at, step, side="right"))
    if right in (0, known_at.size):
        return np.asarray(values[max(right - 1, 0)])
    share = (step - known_at[right - 1]) / (known_at[right] - known_at[right - 1])
    return np.asarray(values[right - 1] + share * (values[right] - values[right - 1]))


@dataclass(frozen=True, eq=False)
class BatchSampling:
    """How batches are drawn.

    Attributes:
        examples: n.
        sizes: B (N,), examples in the batch of each step.
        epoch: Steps of an epoch, within which no example comes twice; None for batches drawn with
            replacement, which are independent.

    Raises:
        ValueError: A number of examples, a size or an epoch that is no whole number ≥ 1, or an epoch of more
            examples than there are.
    """

    examples: int
    sizes: IntArray
    epoch: int | None

    def __post_init__(self) -> None:
        count("examples", self.examples)
        sizes = whole("sizes", vector("sizes", finite("sizes", self.sizes)), minimum=1)
        object.__setattr__(self, "sizes", sizes)
        if self.epoch is not None:
            starts = np.arange(0, sizes.size, count("epoch", self.epoch))
            shuffled_sizes(sizes, starts, self.examples)


def propagate_coupled(
    drift: MeasuredDrift,
    learning_rate: ArrayLike,
    *,
    sampling: BatchSampling,
    momentum: float,
    weight_decay: float,
    record_steps: ArrayLike,
    initial_mean: ArrayLike | None = None,
    allow_unstable: bool = False,
) -> PosteriorTrajectory:
    """The exact law of (x, v) from one point, for any slope and either sampling.

    With s = (x, v), A_t = [[1 − η(J + ω), −ημ], [J + ω, μ]] and b = (−η, 1) in blocks,

        m ← A m + b g,    S ← A S Aᵀ + b V bᵀ,    Cov s = S − E

    where V = C₁ / B + C_a / B and E = 0 with replacement. Without, two batches of an epoch have covariance
    −C₁ / (n − 1), so that V = n C₁ / ((n − 1) B) + C_a / B, and E is the sum over epochs of G Gᵀ / (n − 1), G
    the response of s to one noise vector of covariance C₁ in all steps of an epoch: G ← A G + b C₁^{1/2}
    within it, G ← A G after it. Where C₁ changes within an epoch an example's gradient is taken to change
    with its symmetric root.

    Args:
        drift: J, C₁, C_a and g.
        learning_rate: η (N,) > 0, the rate each update used.
        sampling: How batches are drawn.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.
        record_steps: (S,) steps in [0, N], increasing, at which to report.
        initial_mean: (k, 2), x and v of the point; default 0.
        allow_unstable: Accept an eigenvalue of J + ω with positive real part along which (x, v) grows. Those
            whose real part is not positive are accepted always.

    Returns:
        Mean (S, k, 2) and covariance (S, k, k, 2, 2).

    Raises:
        ValueError: Invalid hyperparameter, unstable step, shapes that disagree, or a law that grew out of the
            range of float64.

    Source: equations (25a) to (25c) of docs/theory.md. (25c) extends Kühn & Rosenow (2023) to any rates,
    batch sizes and coupled directions; sampling without replacement: Cochran, Sampling Techniques (1977),
    section 2.5.
    """
    rates = vector("learning_rate", positive("learning_rate", learning_rate))
    sizes = vector("sizes", sampling.sizes.astype(np.float64), rates.size)
    mu = scalar("momentum", momentum_range(momentum))
    omega = scalar("weight_decay", non_negative("weight_decay", weight_decay))
    record = recorded_steps(record_steps, 0, rates.size)
    k, n, epoch = drift.slope.shape[1], sampling.examples, sampling.epoch
    unit, none = np.eye(k), np.zeros((2 * k, 2 * k))
    covariance, repaid, response = none, none, np.zeros((2 * k, 2 * k))
    start = np.zeros((k, 2)) if initial_mean is None else finite("initial_mean", initial_mean)
    if start.shape != (k, 2):
        raise ValueError(f"initial_mean has shape {start.shape}; it must be ({k}, 2)")
    mean = start.T.reshape(-1)
    wanted, means, covariances = set(record.tolist()), [], []
    checked: Array | None = None
    for step in range(int(record[-1]) + 1):
        if step in wanted:
            means.append(mean.reshape(2, k).T)
            now = covariance - repaid - _repaid(response, n)
            if not (np.isfinite(now).all() and np.isfinite(mean).all()):
                raise ValueError(
                    f"the law left the range of float64 before step {step}; the eigenvalues of slope + "
                    "weight_decay must have positive real parts, or the run be shorter"
                )
            covariances.append(now.reshape(2, k, 2, k).transpose(1, 3, 0, 2))
        if step == record[-1]:
            break
        eta, (slope, examples, attack) = rates[step], drift.at(step)
        pull = slope + omega * unit
        if not allow_unstable and (checked is None or not np.array_equal(checked, eta * pull)):
            checked = eta * pull
            _require_no_growth(checked, mu, step)
        move = np.block([[unit - eta * pull, -eta * mu * unit], [pull, mu * unit]])
        kick = np.concatenate([-eta * unit, unit])
        noise = examples + attack
        if epoch is not None and n > 1:  # a single example leaves nothing to draw
            noise = examples * n / (n - 1) + attack
            repaid, response = move @ repaid @ move.T, move @ response + kick @ _roots(examples)
        elif epoch is not None:
            noise = attack
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # an overflow is reported above, when a step is recorded
            mean = move @ mean + kick @ drift.gradient
            covariance = move @ covariance @ move.T + kick @ noise @ kick.T / sizes[step]
        if epoch is not None and (step + 1) % epoch == 0:
            repaid, response = repaid + _repaid(response, n), np.zeros((2 * k, 2 * k))
    return PosteriorTrajectory(step=record, mean=np.stack(means), covariance=np.stack(covariances))


def _require_no_growth(scaled: Array, mu: float, step: int) -> None:
    """Refuse η(J + ω) (k, k) with an eigenvalue of positive real part whose roots of (7) reach size 1."""
    values = np.linalg.eigvals(scaled).astype(complex)
    middle = 1 + mu - values
    root = np.sqrt(middle**2 - 4 * mu)
    size = np.maximum(np.abs(middle + root), np.abs(middle - root)) / 2
    bad = (values.real > 0) & (size >= 1)
    if bad.any():
        worst = values[np.argmax(np.where(bad, size, 0))]
        raise ValueError(
            f"learning_rate times slope has the eigenvalue {worst:.3g} at step {step}, along which momentum "
            f"SGD with momentum={mu:g} grows; lower the rate (or pass allow_unstable=True)"
        )


def _roots(noise: Array) -> Array:
    """(R₊, R₋) (k, 2k), symmetric, with C₁ = R₊² − R₋²: the estimate of C₁ may have negative eigenvalues."""
    values, vectors = np.linalg.eigh(noise)
    parts = (np.sqrt(np.maximum(sign * values, 0.0)) for sign in (1, -1))
    return np.hstack([vectors * root @ vectors.T for root in parts])


def _repaid(response: Array, examples: int) -> Array:
    """G Gᵀ / (n − 1), the negative part of C₁ with the other sign."""
    positive_part, negative_part = np.hsplit(response, 2)
    return (positive_part @ positive_part.T - negative_part @ negative_part.T) / max(examples - 1, 1)
