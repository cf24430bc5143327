import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from robustdyn.theory import catoni_bound, dominant_terms, gaussian_kl, total_correlation
from tests.theory.reference import properties, random_covariance
from tests.tolerances import EXACT64

GOOD = {
    "empirical_loss": 0.5,
    "eigenvalues": [10.0, 1.0, -0.1],
    "variances": [1e-3, 1e-2, 2e-2],
    "distance_sq": 0.3,
    "prior_location": "initialisation",
    "prior_variance": 0.1,
    "beta": 500.0,
    "n": 1000,
    "alpha": 0.05,
    "loss_range": 2.0,
    "parameters": 100,
}


def test_dominant_terms_by_hand():
    terms = dominant_terms([4.0, -1.0], [0.5, math.e])
    assert_allclose(terms.curvature, [2.0, -math.e], **EXACT64)
    assert_allclose(terms.log_variance, [math.log(2), -1.0], **EXACT64)
    assert terms.directions == 2
    assert_allclose([terms.curvature_sum, terms.log_variance_sum], [2 - math.e, math.log(2) - 1], **EXACT64)
    assert_allclose(terms.total, 1 - math.e + math.log(2), **EXACT64)


def test_gaussian_kl_by_hand():
    # N((3, 0), diag(2, 8)) against N(0, 4 I): ½ [9/4 + (½ − 1 + ln 2) + (2 − 1 − ln 2)].
    kl = gaussian_kl([2.0, 8.0], distance_sq=9.0, prior_variance=4.0)
    assert_allclose([kl.mean, kl.trace, kl.log_determinant], [9 / 8, 0.25, 0.0], **EXACT64)
    assert_allclose(kl.total, 0.5 * (9 / 4 + 0.5 - 1 + 2 - 1), **EXACT64)
    assert gaussian_kl([4.0, 4.0], distance_sq=0.0, prior_variance=4.0).total == 0


def test_kl_of_the_prior_itself_is_never_negative():
    for variance in np.random.default_rng(0).uniform(0.01, 2, 2000):  # some sums round to less than 0
        total = gaussian_kl([variance] * 5, distance_sq=0.0, prior_variance=variance).total
        assert 0 <= total < 1e-14


@properties
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.1, 10.0))
def test_gaussian_kl_against_pytorch(seed, d, prior):
    rng = np.random.default_rng(seed)
    sigma, offset = random_covariance(rng, d), rng.normal(size=d)
    kl = gaussian_kl(
        np.diag(sigma),
        distance_sq=float(offset @ offset),
        prior_variance=prior,
        total_correlation=total_correlation(sigma),
    )
    posterior = torch.distributions.MultivariateNormal(torch.tensor(offset), torch.tensor(sigma))
    zero = torch.zeros(d, dtype=torch.float64)
    reference = torch.distributions.MultivariateNormal(zero, prior * torch.eye(d, dtype=torch.float64))
    truth = torch.distributions.kl_divergence(posterior, reference).item()
    assert_allclose(kl.total, truth, rtol=1e-9, atol=1e-10)
    assert min(kl.mean, kl.total_correlation, kl.trace + kl.log_determinant + 1e-12) >= 0


def test_every_term_by_hand():
    bound = catoni_bound(
        **GOOD, mean_offset=[0.1, 0.0, 0.2], gradient=[0.5, 9.0, -1.0], total_correlation=0.07
    )
    assert_allclose(bound.gradient, 0.05 - 0.2, **EXACT64)
    assert_allclose(bound.curvature, 0.5 * (0.01 + 0.01 - 0.002), **EXACT64)
    assert_allclose(bound.mean_offset, 0.5 * (0.1 - 0.004), **EXACT64)
    assert_allclose(bound.kl.mean, 0.3 / 0.2, **EXACT64)
    assert_allclose(bound.kl.trace, 0.5 * (0.01 + 0.1 + 0.2 - 3), **EXACT64)
    assert_allclose(bound.kl.log_determinant, -0.5 * math.log(0.01 * 0.1 * 0.2), **EXACT64)
    assert bound.kl.total_correlation == 0.07
    assert_allclose(bound.confidence, math.log(20) / 500, **EXACT64)
    assert_allclose(bound.complexity, 500 * 4 / 8000, **EXACT64)
    parts = [bound.empirical_loss, bound.gradient, bound.curvature, bound.mean_offset]
    assert_allclose(bound.expected_loss, sum(parts), **EXACT64)
    price = bound.kl.total / 500 + bound.confidence + bound.complexity
    assert_allclose(bound.total, sum(parts) + price, **EXACT64)
    assert not bound.is_vacuous
    row = bound.as_row()
    assert row["total"] == bound.total
    assert row["prior_location"] == "initialisation"


def test_the_expected_loss_is_exact_for_a_quadratic_wherever_it_is_expanded():
    rng = np.random.default_rng(0)
    lam, sigma2 = np.array([3.0, 0.5]), np.array([0.2, 0.7])
    minimum, mean = rng.normal(size=(2, 2))
    problem = GOOD | {"eigenvalues": lam, "variances": sigma2, "loss_range": 50.0}

    def loss(x):
        return 0.1 + 0.5 * (lam * (x - minimum) ** 2).sum(-1)

    # Gauss-Hermite quadrature of order 3 is exact for degree 5.
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(nodes, nodes))) * np.sqrt(sigma2) + mean
    truth = (loss(grid) * np.outer(weights, weights).ravel()).sum() / (2 * math.pi)
    for point in (mean, minimum, rng.normal(size=2)):
        bound = catoni_bound(
            **problem | {"empirical_loss": float(loss(point))},
            mean_offset=mean - point,
            gradient=lam * (point - minimum),
        )
        assert_allclose(bound.expected_loss, truth, **EXACT64)
    at_mean = catoni_bound(**problem | {"empirical_loss": float(loss(mean))})
    assert_allclose(at_mean.expected_loss, truth, **EXACT64)


def test_the_grid_is_searched_whole_and_paid_for():
    betas, priors = [30.0, 200.0, 900.0], [0.001, 0.05, 7.0]
    grid = catoni_bound(**GOOD | {"beta": betas, "prior_variance": priors})
    assert grid.grid_points == 9
    each = {}
    for beta, prior in itertools.product(betas, priors):
        alone = catoni_bound(**GOOD | {"beta": beta, "prior_variance": prior, "alpha": 0.05 / 9})
        each[beta, prior] = alone.total
    assert_allclose(grid.total, min(each.values()), **EXACT64)
    assert (grid.beta, grid.prior_variance) == min(each, key=each.get)
    assert_allclose(grid.confidence * grid.beta, math.log(9 / 0.05), **EXACT64)


@properties
@given(st.integers(8, 10**6), st.integers(1, 10**6), st.floats(1e-6, 0.5), st.floats(1e-6, 0.49))
def test_more_data_and_less_confidence_tighten(n, more, alpha, extra):
    def total(n, alpha):
        return catoni_bound(**GOOD | {"n": n, "alpha": alpha, "beta": np.geomspace(1, 1e6, 30)}).total

    assert total(n + more, alpha) <= total(n, alpha)
    assert total(n, alpha + extra) <= total(n, alpha)


def test_total_correlation_is_paid_in_nats_over_beta():
    base = catoni_bound(**GOOD).total
    assert_allclose(catoni_bound(**GOOD, total_correlation=2.0).total - base, 2 / 500, **EXACT64)


def test_it_says_what_it_covers():
    assert catoni_bound(**GOOD).covers == "tracked subspace, 3 of 100 directions"
    assert catoni_bound(**GOOD | {"parameters": 3}).covers == "all 3 parameters"


def test_a_vacuous_bound_says_so():
    assert catoni_bound(**GOOD | {"n": 10}).is_vacuous


def test_the_bound_holds_on_a_problem_whose_risk_is_known():
    """ℓ(θ, x) = 1[x < θ] with x uniform on (0, 1) has R(θ) = θ."""
    rng = np.random.default_rng(0)
    n, trials, alpha, beta = 50, 400, 0.2, 40.0
    thetas = np.array([0.2, 0.4, 0.6])
    failures = 0
    for _ in range(trials):
        x = rng.uniform(size=n)
        empirical = (x[:, None] < thetas).mean(0)
        # posterior = prior = uniform over three thresholds, KL = 0; a flat quadratic has E_Q L_S = L_S.
        bound = catoni_bound(
            **GOOD
            | {
                "empirical_loss": float(empirical.mean()),
                "eigenvalues": [0.0],
                "variances": [1.0],
                "prior_variance": 1.0,
                "distance_sq": 0.0,
                "beta": beta,
                "n": n,
                "alpha": alpha,
                "loss_range": 1.0,
            }
        )
        failures += bound.total < thetas.mean()
    assert failures <= alpha * trials


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0; it must be in \(0, 1\)"),
        ({"alpha": 1.0}, r"alpha is 1; it must be in \(0, 1\)"),
        ({"n": 0}, r"n is 0; it must be a whole number >= 1"),
        ({"beta": [1.0, -1.0]}, r"beta is -1 at index 1; it must be > 0"),
        ({"prior_variance": 0.0}, r"prior_variance is 0; it must be > 0"),
        ({"variances": [1.0, 1.0, 0.0]}, r"variances is 0 at index 2; it must be > 0"),
        ({"eigenvalues": [1.0]}, r"eigenvalues has shape \(1,\); it must be \(3,\)"),
        ({"mean_offset": [1.0]}, r"mean_offset has shape \(1,\); it must be \(3,\)"),
        ({"distance_sq": -1.0}, r"distance_sq is -1; it must be >= 0"),
        ({"total_correlation": -0.1}, r"total_correlation is -0.1; it must be >= 0"),
        ({"loss_range": 0.0}, r"loss_range is 0; it must be > 0"),
        ({"empirical_loss": 2.5}, r"empirical_loss is 2.5; it must be in \[0, 2\]"),
        ({"parameters": 2}, r"parameters is 2; it must be >= 3"),
        ({"prior_location": "ones"}, r"prior_location is 'ones'; it must be 'zero' or 'initialisation'"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        catoni_bound(**GOOD | change)


def test_bad_dominant_terms_are_refused():
    with pytest.raises(ValueError, match=r"variances is -1 at index 0; it must be > 0"):
        dominant_terms([1.0], [-1.0])
    with pytest.raises(ValueError, match=r"eigenvalues has shape \(2,\); it must be \(1,\)"):
        dominant_terms([1.0, 2.0], [1.0])
