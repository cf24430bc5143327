"""Every term of the PAC-Bayes bounds, by name.

Shapes: k directions. A bound evaluated on k < d directions is a statement about their span. The result
contains the number of directions, and ``covers`` puts it into words.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from robustdyn.theory._validation import (
    Array,
    count,
    finite,
    non_negative,
    positive,
    probability,
    vector,
    within,
)

PriorLocation = Literal["zero", "initialisation"]


@dataclass(frozen=True, eq=False)
class DominantTerms:
    """The two bound terms that move with the learning dynamics, over the tracked directions only.

    This is a truncation. The sums are statements about the span of the tracked directions, and not about the
    model's other parameters.

    Attributes:
        curvature: λ_i σ_i² (k,), in units of the loss (twice the direction's curvature term of the bound).
        log_variance: −ln σ_i² (k,), nats (twice the direction's log-determinant term of the KL).
        directions: k.
    """

    curvature: Array
    log_variance: Array
    directions: int

    @property
    def curvature_sum(self) -> float:
        """Σ λ_i σ_i² over the tracked directions."""
        return float(self.curvature.sum())

    @property
    def log_variance_sum(self) -> float:
        """−Σ ln σ_i² over the tracked directions."""
        return float(self.log_variance.sum())

    @property
    def total(self) -> float:
        """Sum of the two sums, over the tracked directions."""
        return self.curvature_sum + self.log_variance_sum


def dominant_terms(eigenvalues: ArrayLike, variances: ArrayLike) -> DominantTerms:
    """λσ² and −ln σ² of the tracked directions, equation (33) of docs/theory.md.

    A statement about the tracked subspace only, never the bound of the whole model.

    Args:
        eigenvalues: λ (k,), of the loss without weight decay (what the bound's loss has); any sign.
        variances: σ² (k,) > 0, posterior variances along the same directions.

    Returns:
        The terms by direction and their sums.

    Raises:
        ValueError: A variance ≤ 0, or vectors of different length.

    Source: "How Learning Dynamics Drive Adversarially Robust Generalization?" (arXiv 2410.07719 v3).
    """
    sigma2 = vector("variances", positive("variances", variances))
    lam = vector("eigenvalues", finite("eigenvalues", eigenvalues), sigma2.size)
    return DominantTerms(curvature=lam * sigma2, log_variance=-np.log(sigma2), directions=sigma2.size)


@dataclass(frozen=True)
class GaussianKL:
    """KL(Q‖P) of Gaussians, isotropic P, split as in equation (31); all in nats.

    Attributes:
        mean: ‖μ_Q − θ_P‖² / (2σ_P²).
        trace: ½ Σ (σ_i²/σ_P² − 1).
        log_determinant: −½ Σ ln(σ_i²/σ_P²).
        total_correlation: TC ≥ 0, the cost of correlated directions.
    """

    mean: float
    trace: float
    log_determinant: float
    total_correlation: float

    @property
    def total(self) -> float:
        """KL(Q‖P) ≥ 0; 0 where rounding makes the sum negative."""
        return max(self.mean + self.trace + self.log_determinant + self.total_correlation, 0.0)


def gaussian_kl(
    variances: ArrayLike,
    *,
    distance_sq: float,
    prior_variance: float,
    total_correlation: float = 0.0,
) -> GaussianKL:
    """KL(N(μ, Σ) ‖ N(θ_P, σ_P² I)) by parts, equation (31) of docs/theory.md.

    Args:
        variances: Σ_ii (k,) > 0, posterior variances along the directions.
        distance_sq: ‖μ − θ_P‖² ≥ 0, within the span of the same directions.
        prior_variance: σ_P² > 0.
        total_correlation: TC(Σ) ≥ 0 of ``robustdyn.theory.total_correlation``; 0 for a diagonal Σ.

    Returns:
        The four parts.

    Raises:
        ValueError: A variance ≤ 0, a negative distance or total correlation.

    Source: textbook; the split of the log-determinant is ours.
    """
    sigma2 = vector("variances", positive("variances", variances))
    sums = PosteriorSums(0.0, float(sigma2.sum()), float(np.log(sigma2).sum()), sigma2.size)
    return _kl_of_sums(
        sums, distance_sq, float(positive("prior_variance", prior_variance)), total_correlation
    )


@dataclass(frozen=True)
class PosteriorSums:
    """What the bound needs of a posterior: sums over the directions along which it is not the prior.

    Attributes:
        curvature: Σ λ_i σ_i², any sign.
        variance: Σ σ_i² > 0.
        log_variance: Σ ln σ_i².
        directions: How many; whole, unless it was estimated.
    """

    curvature: float
    variance: float
    log_variance: float
    directions: float


def _kl_of_sums(
    sums: PosteriorSums, distance_sq: float, prior: float, total_correlation: float
) -> GaussianKL:
    """Equation (31) from its sums."""
    return GaussianKL(
        mean=float(non_negative("distance_sq", distance_sq)) / (2 * prior),
        trace=0.5 * (sums.variance / prior - sums.directions),
        log_determinant=-0.5 * (sums.log_variance - sums.directions * math.log(prior)),
        total_correlation=float(non_negative("total_correlation", total_correlation)),
    )


@dataclass(frozen=True)
class CatoniBound:
    """Every term of the bound (29); ``total`` is their sum.

    Attributes:
        empirical_loss: L_S at the expansion point, in units of the loss, as the next four.
        gradient: Σ g_i m_i; 0 when expanded at the posterior mean or at a minimum.
        curvature: ½ Σ λ_i σ_i².
        mean_offset: ½ Σ λ_i m_i²; 0 when expanded at the posterior mean.
        confidence: ln(grid points / α) / β.
        complexity: β c² / (8n).
        kl: KL(Q‖P) by parts, in nats; it enters divided by β.
        beta: β of the grid at which the total is smallest.
        prior_variance: σ_P² of the grid at which the total is smallest.
        prior_location: Where the prior is centred.
        loss_range: c.
        alpha: The bound may fail with this probability.
        grid_points: β candidates times σ_P² candidates, paid for in ``confidence``.
        directions: k, directions summed over.
        parameters: d, parameters of the model.
    """

    empirical_loss: float
    gradient: float
    curvature: float
    mean_offset: float
    confidence: float
    complexity: float
    kl: GaussianKL
    beta: float
    prior_variance: float
    prior_location: PriorLocation
    loss_range: float
    alpha: float
    grid_points: int
    directions: int
    parameters: int

    @property
    def expected_loss(self) -> float:
        """E_Q L_S to second order, equation (30)."""
        return self.empirical_loss + self.gradient + self.curvature + self.mean_offset

    @property
    def total(self) -> float:
        """The right-hand side of (29), over the directions that ``covers`` names."""
        return self.expected_loss + self.kl.total / self.beta + self.confidence + self.complexity

    @property
    def covers(self) -> str:
        """The directions over which the sums run, in words for a label."""
        if self.directions == self.parameters:
            return f"all {self.parameters} parameters"
        return f"tracked subspace, {self.directions} of {self.parameters} directions"

    @property
    def is_vacuous(self) -> bool:
        """Whether the total is no better than the loss's largest value."""
        return self.total >= self.loss_range

    def as_row(self) -> dict[str, float | int | str]:
        """Every term as one flat row for a table."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "kl"}
        parts = {f"kl_{name}": part for name, part in asdict(self.kl).items()}
        return own | parts | {"kl": self.kl.total, "total": self.total, "covers": self.covers}


def catoni_bound(
    *,
    empirical_loss: float,
    eigenvalues: ArrayLike,
    variances: ArrayLike,
    distance_sq: float,
    prior_location: PriorLocation,
    prior_variance: ArrayLike,
    beta: ArrayLike,
    n: int,
    alpha: float,
    loss_range: float,
    parameters: int,
    mean_offset: ArrayLike | None = None,
    gradient: ArrayLike | None = None,
    total_correlation: float = 0.0,
) -> CatoniBound:
    """Catoni's bound with the loss expanded to second order, equations (29) to (32) of docs/theory.md.

    With probability ≥ 1 − α over S, E_Q R ≤ ``total`` up to the expansion's remainder, when the sums run over
    all parameters and the prior does not depend on S. β and σ_P² are chosen from their grids; the union bound
    is paid. Where the loss is expanded matters: at the posterior mean give no ``mean_offset`` (it would count
    twice); at another point θ̂ give m = Uᵀ(μ − θ̂), the loss there, and its gradient unless θ̂ is a minimum.

    Args:
        empirical_loss: L_S at the expansion point, in [0, c].
        eigenvalues: λ (k,) of L_S, without weight decay; any sign.
        variances: σ² (k,) > 0 along the same directions.
        distance_sq: ‖μ − θ_P‖² ≥ 0 in the span of the directions.
        prior_location: ``"zero"`` or ``"initialisation"``: what θ_P was in ``distance_sq``.
        prior_variance: σ_P² > 0, one value or a grid fixed before S was seen.
        beta: β > 0, one value or a grid fixed before S was seen.
        n: Examples in S.
        alpha: In (0, 1).
        loss_range: c > 0, the largest value of the loss. Cross-entropy has none: clip it, or use 0-1 loss.
        parameters: d, the number of parameters of the model, of which the k directions are a part.
        mean_offset: m (k,), default 0.
        gradient: g (k,), default 0.
        total_correlation: TC(Σ) ≥ 0.

    Returns:
        All terms at the best grid point.

    Raises:
        ValueError: A value outside its range (named with the range), or vectors of different length.

    Source: Catoni (2007); Alquier, User-friendly introduction to PAC-Bayes bounds, theorem 2.1.
    """
    sigma2 = vector("variances", positive("variances", variances))
    lam = vector("eigenvalues", finite("eigenvalues", eigenvalues), sigma2.size)
    offset, slope = (
        vector(name, finite(name, np.zeros_like(lam) if values is None else values), lam.size)
        for name, values in (("mean_offset", mean_offset), ("gradient", gradient))
    )
    if prior_location not in ("zero", "initialisation"):
        raise ValueError(f"prior_location is {prior_location!r}; it must be 'zero' or 'initialisation'")
    if count("parameters", parameters) < lam.size:
        raise ValueError(f"parameters is {parameters}; it must be >= {lam.size}, the number of directions")
    return bound_of_sums(
        PosteriorSums(
            float(lam @ sigma2), float(sigma2.sum()), float(np.log(sigma2).sum()), float(sigma2.size)
        ),
        empirical_loss=empirical_loss,
        distance_sq=distance_sq,
        prior_location=prior_location,
        prior_variance=prior_variance,
        beta=beta,
        n=n,
        alpha=alpha,
        loss_range=loss_range,
        directions=lam.size,
        parameters=parameters,
        mean_offset=0.5 * float(lam @ offset**2),
        gradient=float(slope @ offset),
        total_correlation=total_correlation,
    )


def bound_of_sums(
    sums: PosteriorSums,
    *,
    empirical_loss: float,
    distance_sq: float,
    prior_location: PriorLocation,
    prior_variance: ArrayLike,
    beta: ArrayLike,
    n: int,
    alpha: float,
    loss_range: float,
    directions: int,
    parameters: int,
    mean_offset: float = 0.0,
    gradient: float = 0.0,
    total_correlation: float = 0.0,
) -> CatoniBound:
    """``catoni_bound`` of a posterior of which only sums over its directions are known.

    Args:
        sums: Over the directions along which the posterior is not the prior; along others it adds nothing to
            the trace and the log-determinant.
        empirical_loss: L_S at the expansion point, in [0, c].
        distance_sq: ‖μ − θ_P‖² ≥ 0 in the span of the directions that are covered.
        prior_location: What θ_P was in ``distance_sq``.
        prior_variance: σ_P² > 0, one value or a grid fixed before S was seen.
        beta: β > 0, one value or a grid fixed before S was seen.
        n: Examples in S.
        alpha: In (0, 1).
        loss_range: c > 0, the largest value of the loss.
        directions: Directions that are covered, those along which the posterior is the prior included.
        parameters: d, the number of parameters of the model.
        mean_offset: ½ Σ λ_i m_i².
        gradient: Σ g_i m_i.
        total_correlation: TC(Σ) ≥ 0.

    Raises:
        ValueError: As ``catoni_bound``.
    """
    bound = float(positive("loss_range", loss_range))
    betas, priors = _grid("beta", beta), _grid("prior_variance", prior_variance)
    log_price = math.log(betas.size * priors.size / probability("alpha", alpha))
    complexity = betas * bound**2 / (8 * count("n", n))
    kls = [_kl_of_sums(sums, distance_sq, p, total_correlation) for p in priors.tolist()]
    kl = min(kls, key=lambda parts: parts.total)  # for every β the best σ_P² is the one of smallest KL
    best = int(np.argmin((kl.total + log_price) / betas + complexity))
    return CatoniBound(
        empirical_loss=_loss(empirical_loss, bound),
        gradient=gradient,
        curvature=0.5 * sums.curvature,
        mean_offset=mean_offset,
        confidence=log_price / float(betas[best]),
        complexity=float(complexity[best]),
        kl=kl,
        beta=float(betas[best]),
        prior_variance=float(priors[kls.index(kl)]),
        prior_location=prior_location,
        loss_range=bound,
        alpha=alpha,
        grid_points=betas.size * priors.size,
        directions=directions,
        parameters=parameters,
    )


def _grid(name: str, values: ArrayLike) -> Array:
    """One positive value or a vector of them."""
    return vector(name, np.atleast_1d(positive(name, values)))


def _loss(value: float, bound: float) -> float:
    """A loss inside its range [0, c]."""
    loss = within("empirical_loss", value, lambda x: (x >= 0) & (x <= bound), f"in [0, {bound:g}]")
    return float(loss)
