"""How much the Hessian H and the gradient covariance C share directions, and how well m examples show it.

Shapes: m examples, P parameters, k tracked eigenpairs (λ_i, u_i) of H, l eigenpairs (κ_i, v_i) of C. In the
tracked subspace H is diag(λ) and C is uᵀCu (k, k); what C does between this subspace and its complement is
not seen there. λ and u are taken as exact: the only randomness considered is which m examples C was measured
on.

C is normalised by m as in ``GradientCovariance``, not by m − 1.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from robustdyn.curvature.probes import rademacher, source
from robustdyn.defaults import default

_SLAB_ROWS = 2**16  # P-long blocks are turned into float64 this many rows at a time


@dataclass(frozen=True, eq=False)
class AlignmentEstimate:
    """H against C; tensors are float64 on the CPU.

    A commutator and an off-diagonal share are norms, and noise in C's off-diagonal entries makes them
    positive even where H and C commute. Compare them with their ``null``, in units of ``null_spread``.
    Standard errors are the jackknife's (``covariance_jackknife``); they assume a smooth statistic, which
    a norm is not at zero, and mean little for a commutator no larger than its null.

    Attributes:
        commutator: ‖HC − CH‖_F / (2 ‖H‖_F ‖C‖_F) in the tracked subspace; 0 when H and C commute. At most
            1/√2 for any symmetric pair (Böttcher & Wenzel, Linear Algebra Appl. 2008), and at most ½ here:
            C is positive semi-definite, so that its eigenvalues differ by no more than the largest. NaN where
            H or C vanishes.
        commutator_standard_error: Of the commutator, over examples.
        commutator_null: Mean commutator of the ``sign_flipped_covariances``: what sampling noise alone
            would give.
        commutator_null_spread: Standard deviation of these; for their mean divide it by √randomisations.
        cosine: ⟨H, C⟩_F / (‖H‖_F ‖C‖_F) in the tracked subspace; 1 when C is a positive multiple of H.
        cosine_standard_error: Of the cosine, over examples.
        off_diagonal_share: Share of ‖C‖²_F off the diagonal in H's eigenbasis. Unlike the commutator, it
            depends on the choice of basis where eigenvalues of H coincide.
        off_diagonal_share_standard_error: Of the share, over examples.
        off_diagonal_share_null: As for the commutator.
        off_diagonal_share_null_spread: As for the commutator.
        captured_noise: (min(k, l),), Σ_{j≤i} u_jᵀCu_j / Σ_{j≤i} κ_j: noise along the first i directions over
            the most that any i directions can have. At most 1 (Fan, PNAS 1949), up to the errors of κ. Empty
            without C's eigenvalues.
        angles: (min(k, l),), principal angles between span(u) and span(v), ascending. Empty without C's
            eigenvectors.
        examples: m.
        groups: Groups of the jackknife.
        randomisations: Random sets of signs.
        seconds: Wall time.
    """

    commutator: float
    commutator_standard_error: float
    commutator_null: float
    commutator_null_spread: float
    cosine: float
    cosine_standard_error: float
    off_diagonal_share: float
    off_diagonal_share_standard_error: float
    off_diagonal_share_null: float
    off_diagonal_share_null_spread: float
    captured_noise: Tensor
    angles: Tensor
    examples: int
    groups: int
    randomisations: int
    seconds: float

    @property
    def cosines(self) -> Tensor:
        """(min(k, l),), of the principal angles, descending."""
        return self.angles.cos()

    @property
    def subspace_overlap(self) -> float:
        """The ``subspace_overlap`` of span(u) and span(v); NaN without C's eigenvectors."""
        return float(self.cosines.square().mean())


def alignment(
    eigenvalues: Tensor,
    eigenvectors: Tensor,
    projections: Tensor,
    noise_eigenvalues: Tensor | None = None,
    noise_eigenvectors: Tensor | None = None,
    *,
    groups: int = default("measure/default", "measurements.alignment.groups"),
    randomisations: int = default("measure/default", "measurements.alignment.randomisations"),
    generator: torch.Generator | None = None,
) -> AlignmentEstimate:
    """How much H and C share directions, with standard errors and what sampling noise alone would give.

    The null comes from ``sign_flipped_covariances``.

    Args:
        eigenvalues: λ (k,).
        eigenvectors: u (P, k), orthonormal columns.
        projections: a_ij = g_iᵀ u_j (m, k), from ``gradient_projections``.
        noise_eigenvalues: κ (l,), C's largest, descending, normalised by m.
        noise_eigenvectors: v (P, l), orthonormal columns.
        groups: Groups of the jackknife, between 2 and m.
        randomisations: Random sets of signs, at least 2.
        generator: Source of the signs; None gives the same numbers at every call.

    Raises:
        ValueError: If shapes do not fit each other, or the numbers of groups or randomisations cannot work.
    """
    began = time.perf_counter()
    eigenvalues = _vector("eigenvalues", eigenvalues)
    k = len(eigenvalues)
    _check_columns("eigenvectors", eigenvectors)
    _check_equal("eigenvectors", "columns", eigenvectors.shape[1], k)
    projections = _projections(projections)
    _check_equal("projections", "columns", projections.shape[1], k)
    if randomisations < 2:
        raise ValueError(f"randomisations must be at least 2 to have a spread, not {randomisations}")

    captured = angles = torch.zeros(0, dtype=torch.float64)
    covariance = _covariance(projections)
    if noise_eigenvalues is not None:
        captured = _captured(covariance.diagonal(), _vector("noise_eigenvalues", noise_eigenvalues))
    if noise_eigenvectors is not None:
        angles = _angles("eigenvectors", eigenvectors, "noise_eigenvectors", noise_eigenvectors)
        if noise_eigenvalues is not None:
            _check_equal("noise_eigenvectors", "columns", noise_eigenvectors.shape[1], len(noise_eigenvalues))

    statistics = partial(_statistics, eigenvalues)
    commutator, cosine, share = statistics(covariance).tolist()
    commutator_error, cosine_error, share_error = covariance_jackknife(
        statistics, projections, groups
    ).tolist()
    null = torch.stack(
        [
            statistics(flipped)
            for flipped in sign_flipped_covariances(projections, randomisations, source(generator))
        ]
    )
    commutator_null, _, share_null = null.mean(dim=0).tolist()
    commutator_spread, _, share_spread = null.std(dim=0).tolist()
    return AlignmentEstimate(
        commutator=commutator,
        commutator_standard_error=commutator_error,
        commutator_null=commutator_null,
        commutator_null_spread=commutator_spread,
        cosine=cosine,
        cosine_standard_error=cosine_error,
        off_diagonal_share=share,
        off_diagonal_share_standard_error=share_error,
        off_diagonal_share_null=share_null,
        off_diagonal_share_null_spread=share_spread,
        captured_noise=captured,
        angles=angles,
        examples=len(projections),
        groups=groups,
        randomisations=randomisations,
        seconds=time.perf_counter() - began,
    )


def covariance_jackknife(
    statistic: Callable[[Tensor], Tensor | float], projections: Tensor, groups: int
) -> Tensor:
    """Standard error of any smooth function of the projected covariance, over examples.

    The delete-a-group jackknife; every ``groups``-th example is in the same group. Groups may differ in size
    by one, for which the weights of Busing, Meijer & van der Leeden (Stat. Comput. 1999) account. Its own
    relative error is about 1/√(2 (groups − 1)).

    Args:
        statistic: Takes a covariance (k, k), float64 on the CPU, to a number or a tensor; for instance to
            the total correlation of the posterior that it implies.
        projections: (m, k), from ``gradient_projections``.
        groups: Between 2 and m; the statistic is called groups + 1 times.

    Returns:
        Of the statistic's shape, float64 on the CPU.

    Raises:
        ValueError: If the projections' shape or the number of groups cannot work.
    """
    projections = _projections(projections)
    m = len(projections)
    if not 2 <= groups <= m:
        raise ValueError(f"groups must be between 2 and the {m} examples, not {groups}")
    centred = projections - projections.mean(dim=0)  # against cancellation in the differences below
    total = centred.T @ centred

    def evaluate(size: int, first: Tensor, second: Tensor) -> Tensor:
        mean = first / size
        return torch.as_tensor(statistic(second / size - mean.outer(mean)), dtype=torch.float64)

    whole = evaluate(m, torch.zeros_like(total[0]), total)
    pseudo, weights = [], []
    for part in (centred[start::groups] for start in range(groups)):
        without = evaluate(m - len(part), -part.sum(dim=0), total - part.T @ part)
        ratio = m / len(part)
        pseudo.append(ratio * whole - (ratio - 1) * without)
        weights.append(len(part) / m)
    values = torch.stack(pseudo)
    shape = (-1, *(1 for _ in whole.shape))
    weight = torch.tensor(weights, dtype=torch.float64).view(shape)
    deviations = values - (weight * values).sum(dim=0)
    return (deviations.square() * weight / (1 - weight)).mean(dim=0).sqrt()


def sign_flipped_covariances(
    projections: Tensor, randomisations: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Covariances that could have been measured if C were diagonal in H's eigenbasis.

    Every centred projection gets a random sign of its own. That keeps each example's magnitudes, hence C's
    diagonal and the sampling variance of its off-diagonal entries, but makes their expectation zero. Unlike a
    permutation it does not separate the projections of an example with a large gradient. True correlations
    make the null larger (for Gaussian projections the variance of C_ij by 1 + 2ρ²), so it is conservative.

    Args:
        projections: (m, k), from ``gradient_projections``.
        randomisations: Number of covariances.
        generator: Source of the signs.

    Yields:
        (k, k), float64 on the CPU.

    Raises:
        ValueError: If the projections' shape cannot work.
    """
    projections = _projections(projections)
    centred = projections - projections.mean(dim=0)
    for _ in range(randomisations):
        flipped = rademacher(tuple(centred.shape), generator, centred.dtype, centred.device) * centred
        yield flipped.T @ flipped / len(flipped)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two column spaces, accurate at both ends of [0, π/2].

    After Björck & Golub (Math. Comp. 1973). Above π/4 the angles come from their cosines, the singular values
    of UᵀV. Below π/4 a cosine loses digits of the angle, so they come from their sines, the singular values
    of V − U UᵀV.

    Args:
        first: U (P, k), orthonormal columns; the angles are as accurate as these are orthonormal.
        second: V (P, l), orthonormal columns. The work is done on its device, to which U is copied only a
            slab at a time.

    Returns:
        (min(k, l),) radians, ascending, float64 on the CPU.

    Raises:
        ValueError: If the shapes do not fit each other, or there are more columns than rows.
    """
    return _angles("first", first, "second", second)


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """‖UᵀV‖²_F / min(k, l): the mean squared cosine of the principal angles, in [0, 1].

    The measure by which Gur-Ari, Roberts & Dyer (arXiv 1812.04754) compare leading Hessian subspaces. For
    random subspaces its expectation is max(k, l)/P.

    Args:
        first: U (P, k), orthonormal columns.
        second: V (P, l), orthonormal columns.

    Raises:
        ValueError: As ``principal_angles``.
    """
    _check_pair("first", first, "second", second)
    cross = _cross(first, second, second.device)
    return min(1.0, float(cross.square().sum()) / min(cross.shape))


# ---------------------------------------------------------------------- in the tracked subspace


def _statistics(eigenvalues: Tensor, covariance: Tensor) -> Tensor:
    """Commutator, cosine and off-diagonal share (3,), NaN where their denominators vanish."""
    variances = covariance.diagonal()
    size = covariance.norm()
    sizes = eigenvalues.norm() * size
    commutator = (eigenvalues[:, None] - eigenvalues) * covariance
    return torch.stack(
        [
            commutator.norm() / (2 * sizes),
            eigenvalues @ variances / sizes,
            ((covariance - variances.diag()).norm() / size).square(),
        ]
    )


def _captured(variances: Tensor, noise_eigenvalues: Tensor) -> Tensor:
    count = min(len(variances), len(noise_eigenvalues))
    return variances[:count].cumsum(dim=0) / noise_eigenvalues[:count].cumsum(dim=0)


def _covariance(projections: Tensor) -> Tensor:
    centred = projections - projections.mean(dim=0)
    return centred.T @ centred / len(projections)


# ---------------------------------------------------------------------- in the whole space


def _angles(first_name: str, first: Tensor, second_name: str, second: Tensor) -> Tensor:
    _check_pair(first_name, first, second_name, second)
    device = second.device
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    cross = _cross(first, second, device)
    # The residual has the same singular values as its triangular factor, which can be computed slab by slab.
    # So can its Gram matrix, but that squares the sines and loses half of their digits.
    triangle = torch.zeros(0, second.shape[1], dtype=torch.float64, device=device)
    for u, v in _slabs(first, second, device):
        triangle = torch.linalg.qr(torch.cat([triangle, v - u @ cross]), mode="r").R
    cosines = torch.linalg.svdvals(cross.cpu()).clamp(max=1.0)
    sines = torch.linalg.svdvals(triangle.cpu()).flip(0).clamp(max=1.0)
    return torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())


def _cross(first: Tensor, second: Tensor, device: torch.device) -> Tensor:
    """UᵀV (k, l), float64 on the given device."""
    cross = torch.zeros(first.shape[1], second.shape[1], dtype=torch.float64, device=device)
    for u, v in _slabs(first, second, device):
        cross.addmm_(u.T, v)
    return cross


def _slabs(first: Tensor, second: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for u, v in zip(first.split(_SLAB_ROWS), second.split(_SLAB_ROWS), strict=True):
        yield u.to(device).double(), v.to(device).double()


# ---------------------------------------------------------------------- arguments


def _vector(name: str, value: Tensor) -> Tensor:
    if value.dim() != 1 or len(value) == 0:
        raise ValueError(f"{name} must be a vector of at least one number, got shape {tuple(value.shape)}")
    return value.detach().double().cpu()


def _projections(value: Tensor) -> Tensor:
    if value.dim() != 2 or value.shape[0] < 2 or value.shape[1] < 1:
        raise ValueError(f"projections must be (m, k) with m ≥ 2 and k ≥ 1, got {tuple(value.shape)}")
    return value.detach().double().cpu()


def _check_columns(name: str, value: Tensor) -> None:
    if value.dim() != 2 or not 1 <= value.shape[1] <= value.shape[0]:
        raise ValueError(
            f"{name} must be orthonormal columns (P, k) with 1 ≤ k ≤ P, got {tuple(value.shape)}"
        )


def _check_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    _check_columns(first_name, first)
    _check_columns(second_name, second)
    _check_equal(second_name, "rows", second.shape[0], first.shape[0])


def _check_equal(name: str, what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise ValueError(f"{name} must have {wanted} {what}, got {got}")
