import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from robustdyn.theory import binary_kl_upper, risk_certificate
from robustdyn.theory.certificate import subspace_kl
from tests.tolerances import EXACT64

GOOD = {"complement_variance": 0.3, "parameters": 7, "distance_sq": 1.3, "prior_variance": 0.5}


def problem(d, k, seed=0):
    draws = np.random.default_rng(seed)
    basis = np.linalg.qr(draws.normal(size=(d, d)))[0][:, :k]
    root = draws.normal(size=(k, k))
    return basis, root @ root.T + 0.1 * np.eye(k), draws.normal(size=d)


def dense(basis, covariance, complement_variance):
    along = basis @ basis.T
    return basis @ covariance @ basis.T + complement_variance * (np.eye(len(basis)) - along)


@pytest.mark.parametrize(("d", "k"), [(7, 3), (5, 5), (40, 1)])
@pytest.mark.parametrize("complement_variance", [0.2, 0.5, 3.0])
def test_against_dense_gaussians(d, k, complement_variance):
    basis, covariance, move = problem(d, k)
    got = subspace_kl(
        covariance,
        complement_variance=complement_variance,
        parameters=d,
        distance_sq=move @ move,
        prior_variance=0.5,
    )
    sigma = dense(basis, covariance, complement_variance)
    by_hand = 0.5 * (
        np.trace(sigma) / 0.5 + move @ move / 0.5 - d + d * math.log(0.5) - np.linalg.slogdet(sigma)[1]
    )
    assert_allclose(got.total, by_hand, **EXACT64)
    posterior, prior = (
        torch.distributions.MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(matrix))
        for mean, matrix in ((move, sigma), (np.zeros(d), 0.5 * np.eye(d)))
    )
    assert_allclose(got.total, float(torch.distributions.kl_divergence(posterior, prior)), **EXACT64)


def test_the_parts_are_what_they_are_called():
    _, covariance, move = problem(7, 3)
    squared = float(move @ move)
    full = subspace_kl(covariance, **GOOD | {"distance_sq": squared})
    assert_allclose(full.mean, squared / 1.0, **EXACT64)
    correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert_allclose(full.total_correlation, -0.5 * np.linalg.slogdet(correlation)[1], **EXACT64)
    assert_allclose(full.complement, 0.5 * 4 * (0.6 - 1 - math.log(0.6)), **EXACT64)
    diagonal = subspace_kl(np.diag(np.diag(covariance)), **GOOD)
    assert diagonal.total_correlation == 0
    assert_allclose(diagonal.variances, full.variances, **EXACT64)
    same = subspace_kl(0.5 * np.eye(3), **GOOD | {"complement_variance": 0.5, "distance_sq": 0.0})
    assert_allclose(same.total, 0, atol=1e-15)  # Q = P, up to an ulp of each term


def test_the_prior_itself_costs_nothing_and_never_less():
    for variance in np.random.default_rng(0).uniform(0.01, 2, 2000):  # some sums round to less than 0
        total = subspace_kl(
            variance * np.eye(1),
            complement_variance=variance,
            parameters=20,
            distance_sq=0.0,
            prior_variance=variance,
        ).total
        assert 0 <= total < 1e-15


@pytest.mark.parametrize("ratio", [1e-300, 1e-17, 1e-3, 1 - 1e-9, 1 + 1e-9, 1e3])
def test_the_complement_for_any_variance(ratio):
    kl = subspace_kl(np.eye(2), complement_variance=ratio, parameters=7, distance_sq=0.0, prior_variance=1.0)
    excess = Fraction(ratio) - 1
    series = float(excess**2 / 2 - excess**3 / 3)  # of x − ln(1 + x), for small x
    exact = series if abs(excess) < 1e-6 else ratio - 1 - math.log(ratio)
    assert_allclose(kl.complement, 2.5 * exact, rtol=1e-6)  # an ulp of 1e-9 against its square


def test_bad_input_is_refused():
    for covariance, change, message in (
        (np.eye(3), {"parameters": 2}, r"parameters is 2; it must be a whole number >= 3"),
        (np.eye(3), {"complement_variance": 0.0}, r"complement_variance is 0; it must be > 0"),
        (np.ones((2, 2)), {}, r"covariance is singular; it takes more replicas than directions"),
        (
            np.array([[1, 0, 0], [0, 1e-8, 2e-8], [0, 2e-8, 1e-8]]),
            {},
            "correlation matrix of covariance has the eigenvalue -1",
        ),
        (np.cov(np.random.default_rng(3).normal(size=(3, 6)), rowvar=False), {}, "covariance is singular"),
        (np.eye(3), {"prior_variance": -1.0}, r"prior_variance is -1; it must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            subspace_kl(covariance, **GOOD | change)


def certified(draws, d, n, *, price):
    """A certificate for linear classifiers on random labels with a posterior fitted to S: every risk is 1/2.

    As in ``robustdyn-certify``, the mean and the prior's width are chosen to make the bound small, and a
    network sees two examples.
    """
    inputs, labels = draws.normal(size=(n, d)), draws.choice([-1, 1], size=n)
    fitted = np.linalg.lstsq(inputs, labels, rcond=None)[0]
    priors, alpha, alpha_sampling = (0.03, 0.1, 0.3), 0.1, 0.05
    points = [(shift, prior) for shift in (0.0, 0.5, 1.0) for prior in priors]

    def sampled(shift, prior, networks):
        weights = shift * fitted + prior * draws.normal(size=(networks, d))
        which = (draws.integers(n, size=(networks, 1)) + np.arange(2)) % n
        return (np.sign(np.einsum("jd,jbd->jb", weights, inputs[which])) != labels[which]).mean(axis=1)

    def distance(shift, prior):
        kl = subspace_kl(
            prior**2 * np.eye(1),
            complement_variance=prior**2,
            parameters=d,
            distance_sq=shift**2 * fitted @ fitted,
            prior_variance=prior**2,
        )
        return price * kl.total

    screened = binary_kl_upper(
        [sampled(*point, 50).mean() for point in points], [distance(*point) / n for point in points]
    )
    best = points[int(np.argmin(screened))]
    return risk_certificate(
        sampled(*best, 300), kl=distance(*best), n=n, alpha=alpha / len(priors), alpha_sampling=alpha_sampling
    ).risk_bound


def test_the_certificate_holds_as_often_as_it_says_though_the_posterior_is_fitted():
    draws = np.random.default_rng(5)
    bounds = np.array([certified(draws, 20, 60, price=1.0) for _ in range(100)])
    assert (bounds < 0.5).mean() <= 0.15
    assert bounds.mean() < 0.9  # so that the bound is not trivial
    unpaid = np.array([certified(draws, 20, 60, price=0.0) for _ in range(100)])
    assert (unpaid < 0.5).mean() > 0.15  # it is the KL that makes it hold
