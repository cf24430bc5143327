"""Adam and every other fixed diagonal preconditioner, as momentum SGD in other coordinates.

With D = diag(d) held fixed, θ ← θ − η D v is plain momentum SGD for y = D^{−1/2} θ, whose Hessian is
D^{1/2} H D^{1/2} and whose noise is D^{1/2} C D^{1/2}. So ``whiten`` a problem, call any function of this
package on the result, and map the covariance back.

Shapes: P parameters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory._validation import (
    Array,
    covariance_matrix,
    finite,
    momentum_range,
    non_negative,
    positive,
    scalar,
    vector,
)
from robustdyn.theory.momentum import MomentumDynamics
from robustdyn.theory.stationary import stationary_covariance


def adam_scale(second_moment: ArrayLike, epsilon: float) -> Array:
    """The diagonal of D, 1 / (√v̂ + ε), equation (27) of docs/theory.md.

    Args:
        second_moment: v̂ (P,) ≥ 0, bias-corrected: PyTorch's ``exp_avg_sq / (1 − β₂^step)``.
        epsilon: ε ≥ 0, ``torch.optim.Adam``'s ``eps``.

    Returns:
        d (P,).

    Raises:
        ValueError: v̂ < 0, ε < 0, or both 0 somewhere.

    Source: Kingma & Ba (2015), algorithm 1.
    """
    root = np.sqrt(vector("second_moment", non_negative("second_moment", second_moment)))
    return np.asarray(1 / positive("sqrt(second_moment) + epsilon", root + non_negative("epsilon", epsilon)))


def adam_dynamics(learning_rate: float, beta1: float) -> MomentumDynamics:
    """Momentum SGD that moves as Adam does in the whitened coordinates: μ = β₁, rate η (1 − β₁).

    Adam averages, m ← β₁ m + (1 − β₁) g, where SGD sums. So v = m / (1 − β₁), and the buffer covariance of
    the dynamics is the covariance of m divided by (1 − β₁)². Weight decay belongs in ``whiten``.

    Args:
        learning_rate: Adam's η > 0.
        beta1: β₁ in [0, 1).

    Raises:
        ValueError: η or β₁ outside its range.

    Source: equation (27) of docs/theory.md, after Adam's bias correction of m has died out.
    """
    mu = scalar("beta1", momentum_range(beta1))
    return MomentumDynamics(scalar("learning_rate", positive("learning_rate", learning_rate)) * (1 - mu), mu)


@dataclass(frozen=True, eq=False)
class WhitenedProblem:
    """A quadratic problem in the eigenbasis of D^{1/2} (H + ωI) D^{1/2}.

    Attributes:
        eigenvalue: (P,), ascending; it includes ω, so use it with ``weight_decay=0``.
        noise: (P, P), covariance of the mini-batch gradient in that basis.
        basis: (P, P), θ = basis @ z for coordinates z in that basis.
        scale: d (P,), the diagonal of D.
    """

    eigenvalue: Array
    noise: Array
    basis: Array
    scale: Array

    def to_parameters(self, covariance: ArrayLike) -> Array:
        """Covariance (..., P, P) of z as the covariance of θ, equation (28)."""
        return np.asarray(self.basis @ finite("covariance", covariance) @ self.basis.T)

    def to_coordinates(self, theta: ArrayLike) -> Array:
        """Coordinates z (..., P) of parameters or offsets θ (..., P)."""
        return np.asarray(finite("theta", theta) @ (self.basis / self.scale[:, None]))


def whiten(
    hessian: ArrayLike, noise_covariance: ArrayLike, scale: ArrayLike, *, weight_decay: float
) -> WhitenedProblem:
    """Change to the coordinates in which the preconditioner is the identity, equation (26).

    Args:
        hessian: H (P, P), symmetric, of the loss without weight decay; any signs.
        noise_covariance: C (P, P), of the mini-batch gradient, in parameter coordinates.
        scale: d (P,) > 0, the diagonal of D, held fixed.
        weight_decay: ω ≥ 0, L2 in the gradient (``torch.optim.Adam``). AdamW's decay bypasses D and is not
            of this form.

    Returns:
        The problem in its own eigenbasis.

    Raises:
        ValueError: Shapes that disagree, an asymmetric H, a C that is no covariance, d ≤ 0 or ω < 0.

    Source: ours (docs/theory.md, section 4).
    """
    diagonal = vector("scale", positive("scale", scale))
    matrix = finite("hessian", hessian)
    if matrix.shape != (diagonal.size, diagonal.size):
        raise ValueError(f"hessian has shape {matrix.shape}; it must be {(diagonal.size, diagonal.size)}")
    asymmetry = float(np.abs(matrix - matrix.T).max())
    if asymmetry > 1e-5 * float(np.abs(matrix).max()):
        raise ValueError(f"hessian differs from its transpose by {asymmetry:g}; it must be symmetric")
    noise = covariance_matrix("noise_covariance", noise_covariance, diagonal.size)
    root = np.sqrt(diagonal)
    curved = (matrix + matrix.T) / 2 + float(non_negative("weight_decay", weight_decay)) * np.eye(root.size)
    eigenvalue, vectors = np.linalg.eigh(root[:, None] * curved * root)
    basis = root[:, None] * vectors
    return WhitenedProblem(eigenvalue, basis.T @ noise @ basis, basis, diagonal)


def preconditioned_covariance(
    hessian: ArrayLike,
    noise_covariance: ArrayLike,
    scale: ArrayLike,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Array:
    """Stationary Cov θ under a fixed diagonal preconditioner, equation (28) of docs/theory.md.

    For Adam: ``scale=adam_scale(v_hat, eps)``, ``momentum=beta1``, ``learning_rate=lr * (1 - beta1)``.

    Args:
        hessian: H (P, P), of the loss without weight decay.
        noise_covariance: C (P, P) in parameter coordinates.
        scale: d (P,) > 0, the diagonal of D.
        learning_rate: Rate of the equivalent momentum SGD, > 0.
        momentum: Its momentum, in [0, 1).
        weight_decay: ω ≥ 0, L2 on θ inside the gradient.

    Returns:
        (P, P), squared unit of θ.

    Raises:
        ValueError: As ``whiten``, or an unstable direction.

    Source: ours (docs/theory.md, section 4).
    """
    problem = whiten(hessian, noise_covariance, scale, weight_decay=weight_decay)
    covariance = stationary_covariance(
        problem.eigenvalue,
        problem.noise,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=0.0,
    )
    return problem.to_parameters(covariance)
