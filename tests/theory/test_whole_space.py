"""Tests the law along all directions against every direction followed by itself, and against a dense law."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from robustdyn.theory import (
    CurvatureCells,
    MeasuredSpectrum,
    SpectralMeasure,
    cell_edges,
    propagate,
    stationary_state_covariance,
    stationary_variance,
    total_correlation,
    whole_space_law,
)
from robustdyn.theory.whole_space import cells_of
from tests.theory.reference import random_covariance
from tests.tolerances import EXACT64

MU, OMEGA = 0.9, 5e-4
SETTING = {"momentum": MU, "weight_decay": OMEGA, "interpolation": "log_linear"}
RATES = np.repeat([0.1, 0.01], 150)
DIRECTIONS = 240


@pytest.fixture(scope="module")
def spectrum():
    """λ and γ as of a network: outliers, a bulk on both sides of zero, flat directions; γ grows with |λ|."""
    rng = np.random.default_rng(0)
    positive, negative = 10.0 ** rng.uniform(-4, 0, 120), -(10.0 ** rng.uniform(-5, -0.7, 70))
    lam = np.concatenate([[12.0, 7.0, 3.0, 2.5], positive, negative, np.zeros(46)])
    lam = np.sort(lam)[::-1]
    return lam, 1e-3 * np.abs(lam) + 1e-7


def exact(lam, mass):
    """The measure itself, twice: what chains through the whole space give."""
    return SpectralMeasure(np.tile(lam, 2), np.tile(mass, 2), np.repeat([0, 1], lam.size))


def followed(lam, gamma, rates):
    """σ² of each direction, a negative one taken to be flat."""
    held = MeasuredSpectrum(np.array([0]), lam.clip(min=0)[None], gamma[None], "piecewise_constant")
    return propagate(held, rates, momentum=MU, weight_decay=OMEGA, record_steps=[rates.size]).variance[0]


def law(plain, noise, rates=RATES, before=None, edges=None):
    edges = cell_edges(plain, noise) if edges is None else edges
    return whole_space_law(plain, noise, edges, rates, before=before, **SETTING)


def test_sums_are_those_over_all_directions(spectrum):
    lam, gamma = spectrum
    plain, noise = exact(lam, np.ones(lam.size)), exact(lam, gamma)
    edges = cell_edges(plain, noise)
    found = law(plain, noise)
    variance = followed(lam, gamma, RATES)
    # exact whatever the noise is, because a variance is linear in its own noise
    assert_allclose(found.curvature_sum, lam.clip(min=0) @ variance, rtol=1e-9)
    assert_allclose(found.negative_curvature_sum, lam.clip(max=0) @ variance, rtol=1e-9)
    assert_allclose(found.variance_sum, variance.sum(), rtol=1e-9)
    # of noise that is the same for all directions of a cell
    cell = cells_of(lam, edges)
    mean = np.bincount(cell, weights=gamma) / np.bincount(cell)
    assert_allclose(found.cells.noise, mean, rtol=1e-9)
    assert_allclose(found.log_variance_sum, np.log(followed(lam, mean[cell], RATES)).sum(), rtol=1e-9)
    # which is larger than the sum over directions, by Jensen's inequality
    assert found.log_variance_sum > np.log(variance).sum()
    assert found.directions == DIRECTIONS
    assert len(found.cells.noise) > 20


def test_the_price_of_noise_that_is_no_function_of_the_curvature():
    """Against the dense law of all pairs: both traces are its own, its log-determinant is smaller."""
    rng = np.random.default_rng(2)
    lam = np.sort(10.0 ** rng.uniform(-2, 0.5, 24))[::-1]
    scale = 0.03 * np.sqrt(lam)
    covariance = scale[:, None] * random_covariance(rng, lam.size) * scale
    gamma = np.diag(covariance)
    found = law(exact(lam, np.ones(lam.size)), exact(lam, gamma))
    pairs = MeasuredSpectrum(np.array([0]), lam[None], covariance[None], "piecewise_constant")
    path = propagate(pairs, RATES, momentum=MU, weight_decay=OMEGA, record_steps=[RATES.size])
    true = path.position_covariance[0]
    assert_allclose(found.curvature_sum, np.trace(lam[:, None] * true), rtol=1e-9)
    assert_allclose(found.variance_sum, np.trace(true), rtol=1e-9)
    price = (found.log_variance_sum - np.linalg.slogdet(true)[1]) / 2
    spread = (found.log_variance_sum - np.log(np.diag(true)).sum()) / 2
    assert price == pytest.approx(spread + total_correlation(true))
    assert spread > 0
    assert total_correlation(true) > 1


def test_directions_are_followed_by_rank(spectrum):
    """Between two measurements every λ and γ changes; the directions keep their order."""
    lam, gamma = spectrum
    later, louder = 1.7 * lam, 0.6 * gamma
    first = law(exact(lam, np.ones(lam.size)), exact(lam, gamma), RATES[:150])
    second = law(exact(later, np.ones(lam.size)), exact(later, louder), RATES[150:], before=first.cells)
    path = MeasuredSpectrum(
        np.array([150, 300]),
        np.stack([lam, later]).clip(min=0),
        np.stack([gamma, louder]),
        "log_linear",
    )
    variance = propagate(path, RATES, momentum=MU, weight_decay=OMEGA, record_steps=[300]).variance[0]
    # cells are a quarter of a decade wide, and what is carried on is their mean
    assert_allclose(second.curvature_sum, later.clip(min=0) @ variance, rtol=0.02)
    assert_allclose(second.variance_sum, variance.sum(), rtol=0.02)
    assert abs(second.log_variance_sum - np.log(variance).sum()) < 0.02 * DIRECTIONS


def test_a_rank_that_was_in_a_louder_cell_does_not_make_the_sum():
    """Twenty loud directions and a quiet bulk. A noise node of the bulk has the rank of a loud direction now.

    Every σ² is linear in its noise, which did not change: the sum is that of the nodes by themselves.
    """
    loud, quiet = np.array([1.0, 2e-2]), np.array([1e-3, 1e-6])
    before = CurvatureCells(
        np.array([20.0, 1e5]),
        *np.stack([loud, quiet], axis=1),
        stationary_state_covariance(
            *np.stack([loud, quiet], axis=1), learning_rate=0.1, momentum=MU, weight_decay=OMEGA
        ),
    )
    plain = SpectralMeasure(np.array([0.9, 0.25, 1e-3]), np.array([8.0, 70.0, 1e5 - 58]), np.zeros(3, int))
    noise = SpectralMeasure(np.array([0.9, 0.57]), np.array([0.16, 0.1]), np.zeros(2, int))
    after = np.full(10, 0.01)
    found = law(plain, noise, after, before, np.array([np.inf, 0.67, -np.inf]))
    variance = stationary_state_covariance(
        noise.curvature, noise.share, learning_rate=0.1, momentum=MU, weight_decay=OMEGA
    )
    path = propagate(
        MeasuredSpectrum(np.array([0]), noise.curvature[None], noise.share[None], "piecewise_constant"),
        after,
        momentum=MU,
        weight_decay=OMEGA,
        record_steps=[after.size],
        initial_covariance=variance,
    )
    # the cells' means of γ before and now differ by up to a half
    assert found.curvature_sum == pytest.approx(noise.curvature @ path.variance[0], rel=0.5)


def test_a_direction_too_sharp_for_the_rate_has_no_law_until_it_is_stable(spectrum):
    lam, gamma = spectrum
    edge = 2 * (1 + MU) / 0.1
    sharp = np.r_[edge + 1, lam[1:]]
    plain, noise = exact(sharp, np.ones(lam.size)), exact(sharp, gamma)
    during = law(plain, noise, RATES[:150])
    assert np.isnan(during.log_variance_sum)
    assert np.isnan(during.cells.covariance[0]).all()
    assert np.isfinite(during.cells.covariance[1:]).all()
    after = law(plain, noise, RATES[150:], before=during.cells)
    expected = stationary_variance(
        sharp[0], after.cells.noise[0], learning_rate=0.01, momentum=MU, weight_decay=OMEGA
    )
    assert_allclose(after.cells.covariance[0, 0, 0], expected, **EXACT64)


def test_flat_and_negative_directions_have_a_finite_variance_of_their_own_noise():
    lam = np.array([1.0, 0.0, -2.0])
    plain, noise = exact(lam, np.ones(3)), exact(lam, np.array([1e-3, 1e-4, 1e-3]))
    found = whole_space_law(
        plain,
        noise,
        cell_edges(plain, noise),
        np.full(5000, 0.1),
        momentum=MU,
        weight_decay=0.0,
        interpolation="log_linear",
    )
    variance = found.cells.covariance[:, 0, 0]
    # t η² γ / (1 − μ)², equation (23), up to the first steps
    assert_allclose(variance[1:], 5000 * np.array([1e-4, 1e-3]), rtol=0.005)
    assert_allclose(found.curvature_sum, variance[0], rtol=1e-12)
    assert_allclose(found.negative_curvature_sum, -2.0 * variance[2], rtol=1e-12)


def test_known_zeros_are_taken_from_the_middle_of_each_vector():
    measure = SpectralMeasure(
        np.array([5.0, 0.01, -0.02, 4.0, 0.1]), np.array([1.0, 3.0, 6.0, 2.0, 8.0]), np.array([0, 0, 0, 1, 1])
    )
    assert measure.without_zeros(4).mass.tolist() == [1, 0, 5, 2, 4]


def test_cells_can_be_told_without_any_one_vector(spectrum):
    lam, gamma = spectrum
    rng = np.random.default_rng(1)
    # each vector sees its own part of the spectrum
    parts = [np.sort(rng.choice(lam.size, 60, replace=False)) for _ in range(6)]
    measures = [
        SpectralMeasure(
            np.concatenate([lam[part] for part in chosen]),
            np.concatenate([4.0 * weight[part] for part in chosen]),
            np.repeat(np.arange(3), 60),
        )
        for chosen, weight in ((parts[:3], np.ones(lam.size)), (parts[3:], gamma))
    ]
    edges = cell_edges(*measures)
    assert (np.diff(edges) < 0).all()
    for measure in measures:
        for probe in measure.probes:
            assert (measure.without(probe).in_cells(edges) > 0).all()
    assert measures[0].in_cells(edges).sum() == pytest.approx(lam.size)


def test_half_the_steps_keep_half_the_moments():
    """Gauss quadrature with k nodes is exact up to degree 2k − 1 (Golub & Meurant)."""
    nodes, masses = np.linspace(-0.2, 1.0, 12), np.linspace(3.0, 1.0, 12)
    half = SpectralMeasure(nodes, masses, np.zeros(12)).shortened()
    assert half.curvature.size == 6
    for degree in range(12):
        assert_allclose(half.mass @ half.curvature**degree, masses @ nodes**degree, rtol=1e-9)
    assert not np.isclose(half.mass @ half.curvature**12, masses @ nodes**12, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mass": np.array([1.0, -1.0])}, "mass is -1 at index 1; it must be >= 0"),
        ({"curvature": np.array([np.nan, 1.0])}, "curvature is nan at index 0"),
        ({"mass": np.array([1.0])}, r"mass has shape \(1,\); it must be \(2,\)"),
    ],
)
def test_refuses_what_is_no_measure(change, message):
    good = {"curvature": np.array([1.0, 2.0]), "mass": np.array([1.0, 1.0]), "probe": np.array([0, 0])}
    with pytest.raises(ValueError, match=message):
        SpectralMeasure(**good | change)
