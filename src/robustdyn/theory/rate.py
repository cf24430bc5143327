"""The learning rate that minimises the terms of the PAC-Bayes bound that depend on it."""

from numpy.typing import ArrayLike

from robustdyn.theory._validation import momentum_range, non_negative, positive, vector


def bound_minimising_rate(
    eigenvalues: ArrayLike, noise: ArrayLike, *, beta: float, momentum: float, weight_decay: float
) -> float:
    """η* = k / (β Σ λγ / (2 (λ + ω) (1 − μ))), equation (37d) of docs/theory.md.

    The rate at which ½ Σ λσ² − (1/2β) Σ ln σ² of the stationary posterior is smallest, to leading order in
    η(λ + ω). The exact minimum is at a lower rate where directions are sharp. How fast the loss itself falls
    at that rate is not in these terms.

    Args:
        eigenvalues: λ (k,) > 0, of the loss without weight decay. A direction with λ ≤ 0 has no best rate.
        noise: γ (k,) > 0, variance of the mini-batch gradient along the same directions.
        beta: β > 0.
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0.

    Returns:
        η* > 0.

    Raises:
        ValueError: A value outside its range, or vectors of different length.

    Source: Mandt, Hoffman & Blei (JMLR 2017), theorem 1, for β = n and μ = ω = 0.
    """
    lam = vector("eigenvalues", positive("eigenvalues", eigenvalues))
    gamma = vector("noise", positive("noise", noise), lam.size)
    decay, friction = float(non_negative("weight_decay", weight_decay)), 1 - float(momentum_range(momentum))
    curvature_terms_per_rate = lam * gamma / (2 * (lam + decay) * friction)
    return lam.size / (float(positive("beta", beta)) * float(curvature_terms_per_rate.sum()))
