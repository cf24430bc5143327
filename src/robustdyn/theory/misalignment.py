"""What becomes of the bound's terms when the gradient noise C is turned against the Hessian H.

Everything is written in H's eigenbasis: C_ij = u_iᵀ C u_j (k, k), and ``...`` is any shape of angles. An
angle acts in planes, pairs of H's eigenvectors that share none; directions outside the planes stay as they
are.

Turning C while its spectrum is held changes its diagonal as well, hence every variance. So there are two
families: ``rotated_noise`` holds the spectrum, ``correlated_noise`` the diagonal. In the second only
the total correlation moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory._validation import Array, count, finite, non_negative, positive, vector
from robustdyn.theory.stationary import stationary_covariance, total_correlation

Held = Literal["spectrum", "diagonal"]
Planes = Sequence[tuple[int, int]]


def rotated_noise(noise_eigenvalues: ArrayLike, angle: ArrayLike, planes: Planes) -> Array:
    """C with a known spectrum and eigenvectors turned by φ against H's, in every plane (i, j) given.

    In the plane C has the eigenvectors cos φ u_i + sin φ u_j, with the i-th eigenvalue a, and −sin φ u_i +
    cos φ u_j, with the j-th, b: C_ii = a cos²φ + b sin²φ, C_jj = a sin²φ + b cos²φ, C_ij = (a − b) sin φ cos
    φ. At φ = 0 it commutes with H; at π/2 it does again, with a and b exchanged.

    Args:
        noise_eigenvalues: (k,) ≥ 0.
        angle: φ (...), radians.
        planes: Pairs (i, j) of directions, none in two pairs.

    Returns:
        (..., k, k).

    Raises:
        ValueError: A negative eigenvalue, an angle that is not finite, or planes that overlap or do not
            exist.

    Source: ours; a product of Givens rotations.
    """
    spectrum = vector("noise_eigenvalues", non_negative("noise_eigenvalues", noise_eigenvalues))
    phi = finite("angle", angle)
    cos2, sin2 = np.cos(phi) ** 2, np.sin(phi) ** 2
    noise = _diagonal(spectrum, phi.shape)
    for i, j in _checked_planes(planes, spectrum.size):
        a, b = spectrum[i], spectrum[j]
        noise[..., i, i], noise[..., j, j] = a * cos2 + b * sin2, a * sin2 + b * cos2
        noise[..., i, j] = noise[..., j, i] = (a - b) * np.sin(phi) * np.cos(phi)
    return noise


def correlated_noise(diagonal: ArrayLike, angle: ArrayLike, planes: Planes) -> Array:
    """C with a known diagonal, and correlation sin 2φ between the two directions of every plane given.

    The noise of either direction leans by φ towards the other's: √C_ii (cos φ z_i + sin φ z_j) and √C_jj (sin
    φ z_i + cos φ z_j), z independent. At φ = π/4 they coincide and C is singular; at π/2 they have changed
    places and C is diagonal again.

    Args:
        diagonal: C_ii (k,) ≥ 0.
        angle: φ (...), radians.
        planes: Pairs (i, j) of directions, none in two pairs.

    Returns:
        (..., k, k).

    Raises:
        ValueError: As ``rotated_noise``.

    Source: ours.
    """
    variances = vector("diagonal", non_negative("diagonal", diagonal))
    phi = finite("angle", angle)
    noise = _diagonal(variances, phi.shape)
    for i, j in _checked_planes(planes, variances.size):
        noise[..., i, j] = noise[..., j, i] = np.sin(2 * phi) * np.sqrt(variances[i] * variances[j])
    return noise


@dataclass(frozen=True, eq=False)
class CovarianceTerms:
    """The bound's terms of posteriors whose covariances need not be diagonal, over k directions only.

    Attributes:
        curvature: Σ λ_i Σ_ii (...), in units of the loss (twice the bound's curvature term).
        log_variance: −Σ ln Σ_ii (...), nats: what −ln det Σ would be if H and C commuted.
        total_correlation: TC (...), nats, equation (17).
        variance: Tr Σ (...), squared unit of θ.
        directions: k.
    """

    curvature: Array
    log_variance: Array
    total_correlation: Array
    variance: Array
    directions: int

    @property
    def log_determinant(self) -> Array:
        """−ln det Σ = −Σ ln Σ_ii + 2 TC (...), nats (twice the log-determinant and TC terms of the KL)."""
        return self.log_variance + 2 * self.total_correlation

    @property
    def commuting_sum(self) -> Array:
        """Σ λ_i Σ_ii − Σ ln Σ_ii (...), the dominant terms (33), which assume that H and C commute."""
        return self.curvature + self.log_variance

    @property
    def total(self) -> Array:
        """Σ λ_i Σ_ii − ln det Σ (...), the same without that assumption."""
        return self.curvature + self.log_determinant

    def kl(self, *, distance_sq: float, prior_variance: float | None) -> Array:
        """KL(N(μ, Σ) ‖ N(θ_P, σ_P² I)), all parts of equation (31).

        Args:
            distance_sq: ‖μ − θ_P‖² ≥ 0 within the span of the directions.
            prior_variance: σ_P² > 0; None for the one of smallest KL, (‖μ − θ_P‖² + Tr Σ) / k, chosen for
                each Σ. Choosing it on the training set has a cost, equation (32).

        Returns:
            (...), nats.

        Raises:
            ValueError: A negative distance or a prior variance ≤ 0.
        """
        spread = float(non_negative("distance_sq", distance_sq)) + self.variance
        best = spread / self.directions
        prior = best if prior_variance is None else positive("prior_variance", prior_variance)
        k = self.directions
        return np.asarray(0.5 * (spread / prior - k + k * np.log(prior) + self.log_determinant))


def covariance_terms(eigenvalue: ArrayLike, covariance: ArrayLike) -> CovarianceTerms:
    """The bound's terms for any Σ in H's eigenbasis, predicted or measured.

    Args:
        eigenvalue: λ (k,), of the loss without weight decay; any sign.
        covariance: Σ (..., k, k), symmetric, with positive diagonal.

    Returns:
        Terms of shape (...).

    Raises:
        ValueError: A Σ that is no covariance, has an entry ≤ 0 on its diagonal, or is not (..., k, k).

    Source: equations (17) and (33) of docs/theory.md.
    """
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue))
    sigma = finite("covariance", covariance)
    if sigma.ndim < 2 or sigma.shape[-2:] != (lam.size, lam.size):
        raise ValueError(f"covariance has shape {sigma.shape}; it must be (..., {lam.size}, {lam.size})")
    variances = positive("diagonal of covariance", np.diagonal(sigma, axis1=-2, axis2=-1))
    stack = sigma.reshape(-1, lam.size, lam.size)
    correlations = np.array([total_correlation(matrix) for matrix in stack])
    return CovarianceTerms(
        curvature=np.asarray(variances @ lam),
        log_variance=np.asarray(-np.log(variances).sum(axis=-1)),
        total_correlation=correlations.reshape(sigma.shape[:-2]),
        variance=np.asarray(variances.sum(axis=-1)),
        directions=lam.size,
    )


def bound_terms_under_rotation(
    eigenvalue: ArrayLike,
    noise: ArrayLike,
    angle: ArrayLike,
    planes: Planes,
    *,
    held: Held,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> CovarianceTerms:
    """The terms of the stationary posterior as C is turned against H, in closed form by equation (14).

    Two things hold for every angle, rate and momentum; both are Oppenheim's inequality, since Σ is the
    entry-wise product of C with the positive semi-definite matrix F of ``largest_total_correlation``.
    With C's spectrum held, −ln det Σ is largest where C commutes with H: what a rotation adds in total
    correlation is at most what it takes from −Σ ln Σ_ii. With C's diagonal held, only the total correlation
    moves, by no more than C's own.

    Args:
        eigenvalue: λ (k,), of the loss without weight decay.
        noise: (k,) > 0, C's eigenvalues, or its diagonal.
        angle: φ (...), radians.
        planes: Pairs (i, j) of directions, none in two pairs.
        held: ``"spectrum"`` turns by ``rotated_noise``, ``"diagonal"`` by ``correlated_noise``.
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        Terms of shape (...).

    Raises:
        ValueError: As ``rotated_noise`` and ``robustdyn.theory.stationary_covariance``; another
            ``held``.

    Source: ours; Oppenheim (J. London Math. Soc. 1930) for the inequality.
    """
    if held not in ("spectrum", "diagonal"):
        raise ValueError(f"held is {held!r}; it must be 'spectrum' or 'diagonal'")
    turn = rotated_noise if held == "spectrum" else correlated_noise
    matrices = turn(positive("noise", noise), angle, planes)
    shape = matrices.shape
    options = {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    covariances = [
        stationary_covariance(eigenvalue, matrix, **options) for matrix in matrices.reshape(-1, *shape[-2:])
    ]
    return covariance_terms(eigenvalue, np.reshape(covariances, shape))


def largest_total_correlation(
    eigenvalue: ArrayLike, *, learning_rate: float, momentum: float, weight_decay: float
) -> float:
    """The most total correlation that any gradient noise can give the stationary posterior, in nats.

    It is TC(F) with F_ij = Σ_ij / C_ij from equation (14). Noise of rank one that reaches all directions
    attains it. In general TC(Σ) ≤ min(TC(C), TC(F)). For small steps, ηλ ≪ (1 − μ)², it is −Σ_{i<j} ln(|λ_i −
    λ_j| / (λ_i + λ_j)), by Cauchy's determinant. Correlations survive between similar curvatures, and not
    between different ones.

    Args:
        eigenvalue: λ (k,).
        learning_rate: η > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        TC(F); infinite if two curvatures are equal in float64.

    Raises:
        ValueError: As ``robustdyn.theory.stationary_covariance``.

    Source: ours, from Oppenheim's inequality det(A ∘ B) ≥ det A Π B_ii for correlation matrices.
    """
    lam = vector("eigenvalue", finite("eigenvalue", eigenvalue))
    options = {"learning_rate": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    return total_correlation(stationary_covariance(lam, np.ones((lam.size, lam.size)), **options))


def _diagonal(values: Array, shape: tuple[int, ...]) -> Array:
    """One diagonal matrix (k, k) for each entry of ``shape``, writable."""
    return np.broadcast_to(np.diag(values), (*shape, values.size, values.size)).copy()


def _checked_planes(planes: Planes, directions: int) -> list[tuple[int, int]]:
    """Pairs of directions that exist, each direction at most once."""
    pairs = [(count("planes", i, 0), count("planes", j, 0)) for i, j in planes]
    used = [index for pair in pairs for index in pair]
    if len(set(used)) < len(used) or any(index >= directions for index in used):
        raise ValueError(
            f"planes is {pairs}; it must be pairs of different directions below {directions}, each used once"
        )
    return pairs
