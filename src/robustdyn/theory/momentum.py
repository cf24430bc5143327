"""Momentum SGD in a quadratic basin: a linear system of two variables per curvature direction.

Along the eigenvector u_i of the Hessian, x = u_iᵀ(θ − θ*) and v is the component of PyTorch's momentum
buffer. The optimiser's lines ``v = μ v + g; θ = θ − η v`` become s⁺ = A s + b ξ with s = (x, v). The buffer
does not contain η, so (x, v) is continuous when the learning rate changes.

Shapes: ``...`` any shape of directions; the last axes (2,) and (2, 2) are (x, v).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robustdyn.theory._validation import (
    Array,
    finite,
    first_offender,
    momentum_range,
    non_negative,
    positive,
    scalar,
)


def is_stable(
    eigenvalue: ArrayLike, learning_rate: ArrayLike, momentum: ArrayLike, weight_decay: ArrayLike = 0.0
) -> NDArray[np.bool_]:
    """Whether the iteration forgets its start: 0 < η(λ + ω) < 2(1 + μ), equation (6) of docs/theory.md.

    All arguments broadcast against each other.

    Args:
        eigenvalue: λ, Hessian eigenvalues of the loss without weight decay.
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0, PyTorch's L2 term in the gradient.

    Returns:
        Boolean array of the broadcast shape.

    Raises:
        ValueError: η ≤ 0, μ outside [0, 1), ω < 0, or a non-finite entry.

    Source: Jury's criterion on z² − (1 + μ − ηλ) z + μ; Polyak (1964).
    """
    curvature = finite("eigenvalue", eigenvalue) + non_negative("weight_decay", weight_decay)
    step = positive("learning_rate", learning_rate) * curvature
    return np.asarray((step > 0) & (step < 2 * (1 + momentum_range(momentum))))


def require_stable(
    eigenvalue: ArrayLike, learning_rate: ArrayLike, momentum: ArrayLike, weight_decay: ArrayLike
) -> None:
    """Refuse directions without a stationary law.

    Raises:
        ValueError: Some direction violates equation (6); the message has its λ and the admissible interval.
    """
    ok = is_stable(eigenvalue, learning_rate, momentum, weight_decay)
    if ok.all():
        return
    lam, eta, mu, omega = np.broadcast_arrays(eigenvalue, learning_rate, momentum, weight_decay)
    where = tuple(np.argwhere(~ok)[0])
    low, high = -omega[where], 2 * (1 + mu[where]) / eta[where] - omega[where]
    raise ValueError(
        f"eigenvalue is {first_offender(np.asarray(lam, dtype=np.float64), ok)}; momentum SGD with "
        f"learning_rate={eta[where]:g}, momentum={mu[where]:g}, weight_decay={omega[where]:g} "
        f"is stable only for an eigenvalue in ({low:g}, {high:g})"
    )


def regularised_minimum(eigenvalue: ArrayLike, minimum: ArrayLike, weight_decay: float) -> Array:
    """Where weight decay moves the basin's minimum: λ x* / (λ + ω), equation (5) of docs/theory.md.

    Args:
        eigenvalue: λ (...), of the loss without weight decay.
        minimum: x* (...), coordinate of the unregularised minimum along u_i, measured from θ = 0.
        weight_decay: ω ≥ 0.

    Returns:
        (...), in the unit of θ.

    Raises:
        ValueError: λ + ω ≤ 0 somewhere: there is no minimum.
    """
    lam = finite("eigenvalue", eigenvalue)
    curvature = lam + non_negative("weight_decay", weight_decay)
    if not (curvature > 0).all():
        raise ValueError(
            f"eigenvalue is {first_offender(lam, curvature > 0)}; it must be > {-weight_decay:g}"
        )
    return lam * finite("minimum", minimum) / curvature


@dataclass(frozen=True)
class MomentumDynamics:
    """One setting of PyTorch's SGD (no Nesterov, dampening 0), and the linear system it makes.

    Attributes:
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0; enters as λ → λ + ω.

    Raises:
        ValueError: A value outside its range.

    Source: docs/theory.md, section 2; the update is ``torch.optim.SGD``'s.
    """

    learning_rate: float
    momentum: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        scalar("learning_rate", positive("learning_rate", self.learning_rate))
        scalar("momentum", momentum_range(self.momentum))
        scalar("weight_decay", non_negative("weight_decay", self.weight_decay))

    @property
    def noise_input(self) -> Array:
        """The vector b = (−η, 1), shape (2,): how gradient noise enters (x, v); equation (4)."""
        return np.array([-self.learning_rate, 1.0])

    @property
    def stable_eigenvalues(self) -> tuple[float, float]:
        """The open interval of Hessian eigenvalues with a stationary law, equation (6)."""
        return -self.weight_decay, 2 * (1 + self.momentum) / self.learning_rate - self.weight_decay

    def curvature(self, eigenvalue: ArrayLike) -> Array:
        """λ + ω (...), the curvature of the loss with weight decay."""
        return finite("eigenvalue", eigenvalue) + self.weight_decay

    def transition(self, eigenvalue: ArrayLike) -> Array:
        """A (..., 2, 2) for eigenvalues (...), equation (4); any finite λ, also λ ≤ 0."""
        lam = self.curvature(eigenvalue)
        matrix = np.empty((*lam.shape, 2, 2))
        matrix[..., 0, 0] = 1 - self.learning_rate * lam
        matrix[..., 0, 1] = -self.learning_rate * self.momentum
        matrix[..., 1, 0] = lam
        matrix[..., 1, 1] = self.momentum
        return matrix

    def is_stable(self, eigenvalue: ArrayLike) -> NDArray[np.bool_]:
        """Equation (6) for eigenvalues (...)."""
        return is_stable(eigenvalue, self.learning_rate, self.momentum, self.weight_decay)

    def require_stable(self, eigenvalue: ArrayLike) -> None:
        """Raise ValueError, with the admissible interval, unless every eigenvalue is stable."""
        require_stable(eigenvalue, self.learning_rate, self.momentum, self.weight_decay)

    def is_oscillating(self, eigenvalue: ArrayLike) -> NDArray[np.bool_]:
        """Whether A's two eigenvalues are a complex pair, (1 − √μ)² < η(λ + ω) < (1 + √μ)²."""
        root, step = np.sqrt(self.momentum), self.learning_rate * self.curvature(eigenvalue)
        return np.asarray(((1 - root) ** 2 < step) & (step < (1 + root) ** 2))

    def _rate(self, eigenvalue: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
        """1 − |z| with z the larger eigenvalue of A, free of cancellation at small steps; (...)."""
        step = self.learning_rate * self.curvature(eigenvalue)
        # z = 1 − g turns z² − (1+μ−h) z + μ = 0 into g² − (1−μ+h) g + h = 0.
        slope = 1 - self.momentum + step
        square = slope**2 - 4 * step
        root = np.sqrt(np.maximum(square, 0))
        with np.errstate(divide="ignore", invalid="ignore"):
            near = np.where(slope > 0, 2 * step / (slope + root), (slope - root) / 2)
        far = 2 - (slope + root) / 2  # 1 − |z| of the root that may pass −1
        real = np.minimum(near, far)
        complex_pair = (1 - self.momentum) / (1 + np.sqrt(self.momentum))  # 1 − √μ, also as μ → 1
        return np.where(square < 0, complex_pair, real), square < 0

    def spectral_radius(self, eigenvalue: ArrayLike) -> Array:
        """ρ(A) (...), equation (7): √μ for a complex pair, else the larger real root's size."""
        return np.asarray(1 - self._rate(eigenvalue)[0])

    def relaxation_steps(self, eigenvalue: ArrayLike) -> Array:
        """−1 / ln ρ (...), in optimiser steps: the mean falls by a factor e, a covariance by e².

        Infinite where ρ ≥ 1 (flat, negative or unstable directions); 0 where one step forgets everything.
        Equation (8) of docs/theory.md.
        """
        rate = self._rate(eigenvalue)[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = -1 / np.log1p(-np.minimum(rate, 1.0))
        return np.asarray(np.where(rate <= 0, np.inf, np.abs(steps)))
