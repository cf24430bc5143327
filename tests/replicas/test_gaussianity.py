"""Tests Mardia's statistics against a dense double loop and their laws against Mardia's moments."""

import numpy as np
import pytest
from scipy import stats

from robustdyn.replicas.gaussianity import DRAWS, corrected, gaussian_law, joint, mardia, of_directions

LEVEL = 0.05


def by_the_definition(x):
    """b₁ and b₂ of (R, k) with the inverse of the covariance, pair by pair."""
    n = len(x)
    centred = x - x.mean(axis=0)
    inverse = np.linalg.inv(centred.T @ centred / n)
    skewness = kurtosis = 0.0
    for one in centred:
        for other in centred:
            skewness += (one @ inverse @ other) ** 3 / n**2
        kurtosis += (one @ inverse @ one) ** 2 / n
    return skewness, kurtosis


def rejected(samples):
    """How often each joint test rejects at the 5 % level."""
    p = np.array([[moment.p for moment in joint(x)] for x in samples])
    return np.count_nonzero(p <= LEVEL, axis=0)


def test_the_statistics_are_those_of_the_definition():
    x = np.random.default_rng(0).gamma(2.0, size=(13, 4)) @ np.random.default_rng(1).normal(size=(4, 4))
    np.testing.assert_allclose(mardia(x), by_the_definition(x), rtol=1e-10)


def test_one_direction_is_scipy_s_skewness_and_kurtosis():
    x = np.random.default_rng(2).gamma(2.0, size=(40, 3)) * [1.0, -1.0, 5.0]
    for (skewness, kurtosis), one in zip(of_directions(x), x.T, strict=True):
        assert skewness.value == pytest.approx(stats.skew(one), rel=1e-10)
        assert kurtosis.value == pytest.approx(stats.kurtosis(one, fisher=False), rel=1e-10)
        asymptotic = stats.skewtest(one).pvalue
        if asymptotic > 0.01:  # D'Agostino's approximation of the same law, good to a few per cent at R = 40
            assert skewness.p == pytest.approx(asymptotic, rel=0.2)


def test_affine_maps_change_nothing():
    rng = np.random.default_rng(3)
    x = rng.standard_t(4, size=(32, 5))
    moved = x @ rng.normal(size=(5, 5)) * 1e-4 + rng.normal(size=5)
    # the map's condition number times eps
    np.testing.assert_allclose(mardia(moved), mardia(x), rtol=1e-8)


@pytest.mark.parametrize(("replicas", "k"), [(32, 20), (64, 5), (16, 1)])
def test_the_drawn_law_has_mardia_s_exact_moments(replicas, k):
    n = replicas
    mean_skewness = k * (k + 2) * ((n + 1) * (k + 1) - 6) / ((n + 1) * (n + 3))
    mean_kurtosis = k * (k + 2) * (n - 1) / (n + 1)
    variance = 8 * k * (k + 2) * (n - 3) * (n - k - 1) * (n - k + 1) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    skewness, kurtosis = gaussian_law(n, k)
    error = 4 / np.sqrt(DRAWS)  # four standard errors, in deviations
    assert abs(skewness.mean() - mean_skewness) < error * skewness.std()
    assert abs(kurtosis.mean() - mean_kurtosis) < error * kurtosis.std()
    # that of a variance is (kurtosis of the statistic − 1)^½ / √DRAWS of it
    heavy = np.sqrt(stats.kurtosis(kurtosis, fisher=False) - 1)
    assert kurtosis.var() == pytest.approx(variance, rel=error * heavy)


def test_gaussian_replicas_are_rejected_as_often_as_the_level_says():
    draws, count = np.random.default_rng(4), 400
    shape = draws.normal(size=(6, 6))
    low, high = stats.binom.interval(0.999, count, LEVEL)
    for found in rejected(draws.normal(size=(count, 24, 6)) @ shape):
        assert low <= found <= high


def test_a_mixture_of_two_places_is_found():
    """Two tight groups along one of three directions: its kurtosis is 1.2, the joint one hardly moves."""
    draws, count = np.random.default_rng(5), 40
    x = 0.5 * draws.normal(size=(count, 48, 3))
    x[..., 1] += np.where(draws.random((count, 48)) < 0.5, -2.0, 2.0)
    found = 0
    for one in x:
        p = corrected(np.array([[moment.p for moment in pair] for pair in of_directions(one)]).ravel())
        found += p[3] <= LEVEL
    assert found >= 0.9 * count
    x += np.where(draws.random((count, 48, 3)) < 0.5, -2.0, 2.0) * [1, 0, 1]  # eight places
    assert rejected(x)[1] >= 0.9 * count


def test_groups_of_different_widths_are_found():
    """A mixture with one centre: heavy tails."""
    draws, count = np.random.default_rng(6), 40
    x = draws.normal(size=(count, 48, 3)) * np.where(draws.random((count, 48, 1)) < 0.3, 4.0, 1.0)
    assert rejected(x)[1] >= 0.9 * count


def test_many_tests_are_corrected_as_holm_says():
    np.testing.assert_allclose(corrected(np.array([0.02, 0.01, 0.5, 0.04])), [0.06, 0.04, 0.5, 0.08])
    np.testing.assert_allclose(corrected(np.array([0.9, 0.8])), [1.0, 1.0])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((5, 4)), "5 replicas are too few for 4 directions; at least 6 are needed"),
        (np.ones((9, 2)), "no variance along some direction"),
        (np.arange(9.0)[:, None] * [1.0, 2.0], "no variance along some combination"),
    ],
)
def test_what_has_no_statistic_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        joint(x)
