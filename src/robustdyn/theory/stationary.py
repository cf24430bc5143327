"""The exact stationary distribution of momentum SGD at a constant learning rate."""

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory._validation import (
    Array,
    covariance_matrix,
    finite,
    momentum_range,
    non_negative,
    positive,
    vector,
)
from robustdyn.theory.momentum import MomentumDynamics, require_stable


def stationary_variance(
    eigenvalue: ArrayLike,
    noise: ArrayLike,
    *,
    learning_rate: ArrayLike,
    momentum: ArrayLike,
    weight_decay: ArrayLike,
) -> Array:
    """σ² = η γ (1+μ) / (λ (1−μ) (2(1+μ) − ηλ)) with λ + ω for λ; equation (10) of docs/theory.md.

    Exact for a quadratic loss and a constant noise covariance, whether or not H and C commute: γ_i = u_iᵀCu_i
    is all that a variance along u_i needs. All arguments broadcast against each other.

    Args:
        eigenvalue: λ (...), of the loss without weight decay.
        noise: γ (...) > 0, variance of the mini-batch gradient along u_i.
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        (...), squared unit of θ.

    Raises:
        ValueError: An unstable direction, γ ≤ 0, or a hyperparameter outside its range; the message has the
            offending value and the admissible range.

    Source: Liu, Ziyin & Ueda (ICML 2021); Mandt, Hoffman & Blei (JMLR 2017) in the limit η → 0.
    """
    gamma = positive("noise", noise)
    require_stable(eigenvalue, learning_rate, momentum, weight_decay)
    lam = finite("eigenvalue", eigenvalue) + non_negative("weight_decay", weight_decay)
    eta, mu = positive("learning_rate", learning_rate), momentum_range(momentum)
    return np.asarray(eta * gamma * (1 + mu) / (lam * (1 - mu) * (2 * (1 + mu) - eta * lam)))


def curvature_term_per_noise(
    eigenvalue: ArrayLike, *, learning_rate: float, momentum: float, weight_decay: float
) -> Array:
    """h(λ) = λσ²/γ where λ > 0 and a stationary law exists, 0 elsewhere; equation (46) of docs/theory.md.

    Tr(C h(H)) is the curvature term Σ λσ² over these directions, equation (45), and can be estimated without
    the eigenvectors.

    Args:
        eigenvalue: λ (...), of the loss without weight decay; any sign.
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        (...) ≥ 0, in the unit of η.

    Raises:
        ValueError: A λ that is not finite, or a hyperparameter outside its range.

    Source: ours, from (10), which is linear in γ.
    """
    lam = finite("eigenvalue", eigenvalue)
    counted = (lam > 0) & MomentumDynamics(learning_rate, momentum, weight_decay).is_stable(lam)
    terms = np.zeros_like(lam)
    terms[counted] = lam[counted] * stationary_variance(
        lam[counted], 1.0, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    return terms


def stationary_state_covariance(
    eigenvalue: ArrayLike, noise: ArrayLike, *, learning_rate: float, momentum: float, weight_decay: float
) -> Array:
    """Covariance of (x, v) for each direction, equations (10) to (12) of docs/theory.md.

    Args:
        eigenvalue: λ (...).
        noise: γ (...) > 0.
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        (..., 2, 2); entry [0, 0] is ``stationary_variance``, [1, 1] the buffer's variance.

    Raises:
        ValueError: As ``stationary_variance``.

    Source: ours, from the fixed point of the covariance recursion (9).
    """
    MomentumDynamics(learning_rate, momentum, weight_decay)  # one setting: no arrays
    variance = stationary_variance(
        eigenvalue, noise, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    lam = np.broadcast_to(finite("eigenvalue", eigenvalue) + weight_decay, variance.shape)
    return _with_buffer(variance, lam, lam, learning_rate, momentum)


def stationary_covariance(
    eigenvalue: ArrayLike,
    noise_covariance: ArrayLike,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Array:
    """Σ in the Hessian's eigenbasis for an arbitrary C, equation (14) of docs/theory.md.

    Nothing is assumed about H and C commuting. Its diagonal is ``stationary_variance``.

    Args:
        eigenvalue: λ (k,).
        noise_covariance: C_ij = u_iᵀ C u_j (k, k), symmetric and positive semi-definite.
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        (k, k), squared unit of θ.

    Raises:
        ValueError: An unstable direction, a C that is no covariance or of another size, or a hyperparameter
            outside its range.

    Source: ours (docs/theory.md, section 2.2); it removes the commuting assumption of Liu et al. (2021).
    """
    MomentumDynamics(learning_rate, momentum, weight_decay).require_stable(eigenvalue)
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue)) + weight_decay
    noise = covariance_matrix("noise_covariance", noise_covariance, lam.size)
    eta, mu = learning_rate, momentum
    left, right = lam[:, None], lam[None, :]
    # (14) divided by 1 − μ, its squares collected: no digits are lost as μ → 1
    own = (1 - mu) * ((1 + mu) * (left + right) - eta * left * right)
    return np.asarray(noise * eta * (1 + mu) / (own + eta * mu * (left - right) ** 2 / (1 - mu)))


def stationary_block_covariance(
    eigenvalue: ArrayLike,
    noise_covariance: ArrayLike,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Array:
    """Covariance of (x_i, v_i) with (x_j, v_j) for every pair, equations (14) to (16) of docs/theory.md.

    Args:
        eigenvalue: λ (k,).
        noise_covariance: C (k, k) in the Hessian's eigenbasis.
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        (k, k, 2, 2); [i, j, 0, 0] is Cov(x_i, x_j), [i, j, 0, 1] is Cov(x_i, v_j), [i, j, 1, 0] is
        Cov(v_i, x_j) and [i, j, 1, 1] is Cov(v_i, v_j).

    Raises:
        ValueError: As ``stationary_covariance``.
    """
    covariance = stationary_covariance(
        eigenvalue,
        noise_covariance,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    lam = finite("eigenvalue", eigenvalue) + weight_decay
    return _with_buffer(covariance, lam[:, None], lam[None, :], learning_rate, momentum)


def _with_buffer(position: Array, left: Array, right: Array, eta: float, mu: float) -> Array:
    """Add the momentum buffer to stationary Cov(x_i, x_j): equations (15) and (16)."""
    blocks = np.empty((*position.shape, 2, 2))
    blocks[..., 0, 0] = position
    apart = mu * (right - left) / (1 - mu)
    blocks[..., 0, 1] = position * (apart - left) / (1 + mu)
    blocks[..., 1, 0] = position * (-apart - right) / (1 + mu)
    blocks[..., 1, 1] = position * (left + right) / (eta * (1 + mu))
    return blocks


def total_correlation(covariance: ArrayLike) -> float:
    """TC = ½ (Σ ln Σ_ii − ln det Σ) ≥ 0 in nats, equation (17) of docs/theory.md.

    This is what correlations between directions add to the Kullback–Leibler term. It is 0 exactly when Σ is
    diagonal, and therefore when H and C commute and H's eigenvalues differ.

    Args:
        covariance: Σ (k, k), symmetric, positive definite on its diagonal.

    Returns:
        TC; infinite for a Σ that is singular in float64.

    Raises:
        ValueError: Not a covariance, in any units of its directions, or with a diagonal entry ≤ 0.

    Source: Watanabe (1960); non-negativity is Hadamard's inequality.
    """
    matrix = covariance_matrix("covariance", covariance)
    scale = np.sqrt(positive("diagonal of covariance", np.diag(matrix)))
    correlation = matrix / np.outer(scale, scale)
    np.fill_diagonal(correlation, 1.0)
    # in the covariance's own units a block of small variances could be anything
    spectrum = np.linalg.eigvalsh(covariance_matrix("correlation matrix of covariance", correlation))
    if spectrum[0] <= len(spectrum) * np.finfo(float).eps * spectrum[-1]:
        return float("inf")
    return max(0.0, -0.5 * float(np.linalg.slogdet(correlation)[1]))
