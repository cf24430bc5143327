"""Risk certificates without any expansion: count errors, invert the binary kl.

The certificates bound the risk under the attack that was used, no other. The prior may depend on data, for
instance on a half of the training set, as long as n counts only the examples that the prior has not seen.
``finite_certificate`` is for a prior of finitely many networks, ``risk_certificate`` for one of a density,
from which weights have to be drawn.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr

from robustdyn.theory._validation import (
    Array,
    count,
    covariance_matrix,
    non_negative,
    positive,
    probability,
    vector,
    within,
)
from robustdyn.theory.bounds import gaussian_kl
from robustdyn.theory.stationary import total_correlation

_HALVINGS = 64  # of an interval of length <= 1: down to half an ulp


def _share(name: str, values: ArrayLike) -> Array:
    return within(name, values, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")


def binary_kl(q: ArrayLike, p: ArrayLike) -> Array:
    """kl(q‖p) = q ln(q/p) + (1−q) ln((1−q)/(1−p)), equation (34) of docs/theory.md.

    Args:
        q: (...) in [0, 1].
        p: (...) in [0, 1].

    Returns:
        Nats ≥ 0, infinite where p excludes what q allows.

    Raises:
        ValueError: A value outside [0, 1].
    """
    first, second = _share("q", q), _share("p", p)
    return np.asarray(rel_entr(first, second) + rel_entr(1 - first, 1 - second))


def binary_kl_upper(q: ArrayLike, budget: ArrayLike) -> Array:
    """The largest p with kl(q‖p) ≤ budget, equation (35) of docs/theory.md.

    Found by halving [q, 1]; of the last two numbers the larger is returned.

    Args:
        q: (...) in [0, 1], an observed error rate.
        budget: (...) ≥ 0, nats; broadcasts against ``q``.

    Returns:
        (...) in [q, 1].

    Raises:
        ValueError: q outside [0, 1] or a negative budget.

    Source: Langford & Caruana (2001), Maurer (2004).
    """
    rate, limit = np.broadcast_arrays(_share("q", q), non_negative("budget", budget))
    low, high = rate.copy(), np.ones_like(rate)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        inside = binary_kl(rate, middle) <= limit
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.asarray(high)


@dataclass(frozen=True)
class SubspaceKL:
    """KL(Q‖P) over all d parameters of a Q that has a shape of its own in k directions only; all in nats.

    Attributes:
        mean: ‖μ − θ_P‖² / (2σ_P²).
        variances: Trace and log-determinant of the k variances along the directions, correlations left out.
        total_correlation: TC ≥ 0, the price of correlations between the directions.
        complement: Trace and log-determinant of the d − k other dimensions.
    """

    mean: float
    variances: float
    total_correlation: float
    complement: float

    @property
    def total(self) -> float:
        """KL(Q‖P) ≥ 0; 0 where rounding makes the sum negative."""
        return max(self.mean + self.variances + self.total_correlation + self.complement, 0.0)


def subspace_kl(
    covariance: ArrayLike,
    *,
    complement_variance: float,
    parameters: int,
    distance_sq: float,
    prior_variance: float,
) -> SubspaceKL:
    """KL(N(μ, U Σ Uᵀ + σ²(I − U Uᵀ)) ‖ N(θ_P, σ_P² I)) by parts, from equation (31) of docs/theory.md.

    U (d, k) has orthonormal columns; which ones does not matter, as P is isotropic.

    Args:
        covariance: Σ (k, k), positive definite.
        complement_variance: σ² > 0, of each of the d − k dimensions that U leaves.
        parameters: d ≥ k.
        distance_sq: ‖μ − θ_P‖² ≥ 0 in all d dimensions.
        prior_variance: σ_P² > 0.

    Returns:
        The four parts.

    Raises:
        ValueError: A value outside its range, or Σ singular, as of fewer replicas than directions.

    Source: textbook; the split is ours.
    """
    sigma = covariance_matrix("covariance", covariance)
    variances = positive("diagonal of covariance", np.diag(sigma))
    others = count("parameters", parameters, minimum=len(sigma)) - len(sigma)
    prior = float(positive("prior_variance", prior_variance))
    ratio = float(positive("complement_variance", complement_variance)) / prior
    correlated = total_correlation(sigma)
    if not math.isfinite(correlated):
        raise ValueError("covariance is singular; it takes more replicas than directions")
    shape = gaussian_kl(
        variances,
        distance_sq=distance_sq,
        prior_variance=prior,
        total_correlation=correlated,
    )
    return SubspaceKL(
        mean=shape.mean,
        variances=shape.trace + shape.log_determinant,
        total_correlation=shape.total_correlation,
        complement=0.5 * others * (ratio - 1 - math.log(ratio)),
    )


@dataclass(frozen=True)
class RiskCertificate:
    """A bound on the robust 0-1 risk of θ ~ Q, and the steps to it.

    Attributes:
        risk_bound: E_Q R is at most this with probability ≥ 1 − α − α_sampling.
        empirical_upper: Upper limit of E_Q of the empirical error, from the sampled weights.
        sampled_error: Mean of the sampled errors.
        kl: KL(Q‖P), nats.
        n: Examples of S, those the prior has seen left out.
        samples: Weights drawn from Q.
        alpha: Failure probability of the PAC-Bayes step.
        alpha_sampling: Failure probability of the sampling step.
    """

    risk_bound: float
    empirical_upper: float
    sampled_error: float
    kl: float
    n: int
    samples: int
    alpha: float
    alpha_sampling: float


def risk_certificate(
    sampled_errors: ArrayLike, *, kl: float | None, n: int, alpha: float, alpha_sampling: float
) -> RiskCertificate:
    """Maurer's bound on top of a sampled empirical risk, equations (36) to (37a) of docs/theory.md.

    Args:
        sampled_errors: (m,) in [0, 1], robust 0-1 error of weights drawn independently from Q, each on all of
            S or on examples of S that are drawn uniformly for these weights alone: all that is used is that
            they are independent and that their mean is the empirical error of Q.
        kl: KL(Q‖P) ≥ 0 over all parameters, nats; None where Q is the prior itself, for which Chernoff's
            bound does without 2√n. The two may fail apart: claimed together they share α.
        n: Examples in S, at least 8 (Maurer's condition), those the prior has seen left out.
        alpha: In (0, 1), for the draw of S.
        alpha_sampling: In (0, 1), for the draw of the weights.

    Returns:
        The certificate and its intermediate values.

    Raises:
        ValueError: A value outside its range, or α + α_sampling ≥ 1.

    Source: Langford & Caruana (2001) for the sampling step and for Q = P; Maurer (2004) for 2√n.
    """
    errors = np.atleast_1d(_share("sampled_errors", sampled_errors))
    samples = count("number of sampled_errors", errors.size)
    vector("sampled_errors", errors)
    n = count("n", n, minimum=8)
    distance = 0.0 if kl is None else float(non_negative("kl", kl))
    probability(
        "alpha + alpha_sampling", probability("alpha", alpha) + probability("alpha_sampling", alpha_sampling)
    )
    mean = float(errors.mean())
    upper = float(binary_kl_upper(mean, math.log(1 / alpha_sampling) / samples))
    budget = (distance + math.log((1 if kl is None else 2 * math.sqrt(n)) / alpha)) / n
    return RiskCertificate(
        risk_bound=float(binary_kl_upper(upper, budget)),
        empirical_upper=upper,
        sampled_error=mean,
        kl=distance,
        n=n,
        samples=samples,
        alpha=alpha,
        alpha_sampling=alpha_sampling,
    )


@dataclass(frozen=True)
class FiniteCertificate:
    """Bounds on the robust 0-1 risk of finitely many networks; they hold together with probability ≥ 1 − α.

    Attributes:
        uniform_error: Errors on S, mean over the networks.
        uniform_bound: The risk of a network drawn uniformly, for every example, is at most this.
        best: Number of the network with the fewest errors on S, the first among equals.
        best_error: Its error on S.
        best_bound: Its risk is at most this.
        networks: R.
        n: Examples of S.
        alpha: Probability with which one of the bounds may fail; each has a half of it.
    """

    uniform_error: float
    uniform_bound: float
    best: int
    best_error: float
    best_bound: float
    networks: int
    n: int
    alpha: float


def finite_certificate(losses: ArrayLike, *, alpha: float) -> FiniteCertificate:
    """Chernoff's bound for the mean of R networks and for the best, (37a) and (37a') of docs/theory.md.

    Args:
        losses: (R, n) in [0, 1], loss of each network on each example of S. The networks were fixed before S
            was seen. Given them, the columns are independent, and each depends on its example and on random
            numbers such as the attack's start; the risk is an expectation over both.
        alpha: In (0, 1).

    Returns:
        The certificate.

    Raises:
        ValueError: A value outside its range, or no losses.

    Source: Langford (2005), sections 3 and 4: the Chernoff test set bound, and Occam's razor for the best.
    """
    values = _share("losses", losses)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"losses must be (R, n) with R, n >= 1, got {values.shape}")
    networks, n = values.shape
    share = float(probability("alpha", alpha)) / 2
    errors = values.mean(axis=1)
    best, uniform = int(errors.argmin()), float(values.mean())
    return FiniteCertificate(
        uniform_error=uniform,
        uniform_bound=float(binary_kl_upper(uniform, math.log(1 / share) / n)),
        best=best,
        best_error=float(errors[best]),
        best_bound=float(binary_kl_upper(errors[best], math.log(networks / share) / n)),
        networks=networks,
        n=n,
        alpha=alpha,
    )
