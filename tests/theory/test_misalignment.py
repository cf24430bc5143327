"""Tests noise that is rotated against the Hessian with arithmetic, SciPy's Lyapunov solver, determinants."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from robustdyn.theory import (
    bound_terms_under_rotation,
    correlated_noise,
    covariance_terms,
    dominant_terms,
    gaussian_kl,
    largest_total_correlation,
    rotated_noise,
    stationary_covariance,
    total_correlation,
)
from tests.theory.reference import lyapunov, properties, random_covariance, random_orthogonal, rotate
from tests.tolerances import EXACT64

LAM = np.array([40.0, 13.0, 10.0, 6.0, 4.0])
NOISE = np.array([0.5, 0.12, 0.11, 0.04, 0.05])
PLANES = [(0, 3), (2, 1)]  # direction 4 is in none
OPTIONS = {"learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
FAMILIES = {"spectrum": rotated_noise, "diagonal": correlated_noise}
ANGLES = np.radians([-70.0, -20.0, 0.0, 10.0, 45.0, 80.0, 90.0])


@pytest.mark.parametrize("held", FAMILIES)
def test_at_angle_zero_all_is_as_if_they_commuted(held):
    assert (FAMILIES[held](NOISE, 0.0, PLANES) == np.diag(NOISE)).all()
    terms = bound_terms_under_rotation(LAM, NOISE, 0.0, PLANES, held=held, **OPTIONS)
    assert terms.total_correlation == 0
    assert terms.log_determinant == terms.log_variance
    assert terms.total == terms.commuting_sum
    both = dominant_terms(LAM, np.diag(stationary_covariance(LAM, np.diag(NOISE), **OPTIONS)))
    assert_allclose([terms.curvature, terms.log_variance], [both.curvature_sum, both.log_variance_sum])


@pytest.mark.parametrize("held", FAMILIES)
def test_either_sense_of_rotation_is_the_same(held):
    there, back = (
        bound_terms_under_rotation(LAM, NOISE, sign * ANGLES, PLANES, held=held, **OPTIONS)
        for sign in (1, -1)
    )
    for name in ("curvature", "log_variance", "total_correlation", "variance", "log_determinant", "total"):
        assert_allclose(getattr(there, name), getattr(back, name), **EXACT64)
    signs = np.diag([1.0, 1.0, -1.0, -1.0, 1.0])  # one direction of every plane mirrored
    turned = FAMILIES[held](NOISE, 0.3, PLANES)
    assert_allclose(FAMILIES[held](NOISE, -0.3, PLANES), signs @ turned @ signs, **EXACT64)
    assert (np.abs(turned[[0, 2], [3, 1]]) > 0.002).all()


def test_a_right_angle_exchanges_the_two_noises():
    swapped = NOISE[[3, 2, 1, 0, 4]]
    assert_allclose(rotated_noise(NOISE, np.pi / 2, PLANES), np.diag(swapped), **EXACT64)
    quarter, aligned, exchanged = (
        bound_terms_under_rotation(LAM, noise, angle, PLANES, held="spectrum", **OPTIONS)
        for noise, angle in ((NOISE, np.pi / 2), (NOISE, 0.0), (swapped, 0.0))
    )
    assert quarter.total_correlation < EXACT64["atol"]
    assert_allclose(quarter.curvature, exchanged.curvature, **EXACT64)
    # the log-determinant of a commuting pair does not say which noise is where; the two other terms do
    assert_allclose(quarter.log_determinant, aligned.log_determinant, **EXACT64)
    assert quarter.curvature < aligned.curvature
    assert quarter.variance > aligned.variance
    assert_allclose(correlated_noise(NOISE, np.pi / 2, PLANES), np.diag(NOISE), **EXACT64)


def test_rotated_noise_has_the_spectrum_and_the_angle_it_was_given():
    for phi, noise in zip(ANGLES, rotated_noise(NOISE, ANGLES, PLANES), strict=True):
        assert_allclose(np.linalg.eigvalsh(noise), np.sort(NOISE), **EXACT64)
        for i, j in PLANES:
            axis = np.zeros(5)
            axis[[i, j]] = np.cos(phi), np.sin(phi)
            assert_allclose(noise @ axis, NOISE[i] * axis, **EXACT64)
        assert noise[4, 4] == NOISE[4]


def test_correlated_noise_has_the_diagonal_and_the_lean_it_was_given():
    for phi, noise in zip(ANGLES, correlated_noise(NOISE, ANGLES, PLANES), strict=True):
        assert (np.diag(noise) == NOISE).all()
        for i, j in PLANES:
            leaning = np.array([[np.cos(phi), np.sin(phi)], [np.sin(phi), np.cos(phi)]])
            factor = np.sqrt(NOISE[[i, j]])[:, None] * leaning
            assert_allclose(noise[np.ix_([i, j], [i, j])], factor @ factor.T, **EXACT64)
        assert np.count_nonzero(np.abs(noise - np.diag(NOISE)) > 1e-9) == (
            4 if np.sin(2 * phi) ** 2 > 1e-9 else 0
        )


def test_two_directions_by_hand():
    # μ = 0: Σ_ij = η C_ij / (λ_i + λ_j − η λ_i λ_j); η = 0.1, λ = (4, 1) makes the denominators 6.4, 4.6, 1.9
    options = {"learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    turned = bound_terms_under_rotation(
        [4.0, 1.0], [3.0, 1.0], np.pi / 6, [(0, 1)], held="spectrum", **options
    )
    # cos² 30° = 3/4: C = [[2.5, √3/2], [√3/2, 1.5]]
    v0, v1, cross = 0.25 / 6.4, 0.15 / 1.9, 0.1 * np.sqrt(0.75) / 4.6
    assert_allclose(turned.curvature, 4 * v0 + v1, **EXACT64)
    assert_allclose(turned.log_variance, -np.log(v0 * v1), **EXACT64)
    assert_allclose(turned.log_determinant, -np.log(v0 * v1 - cross**2), **EXACT64)
    assert_allclose(turned.total_correlation, -0.5 * np.log(1 - 0.2 * 6.4 * 1.9 / 4.6**2), **EXACT64)
    leaning = bound_terms_under_rotation(
        [4.0, 1.0], [3.0, 1.0], np.pi / 12, [(0, 1)], held="diagonal", **options
    )
    assert_allclose(leaning.curvature, 4 * 0.3 / 6.4 + 0.1 / 1.9, **EXACT64)
    assert_allclose(leaning.total_correlation, -0.5 * np.log(1 - 0.25 * 6.4 * 1.9 / 4.6**2), **EXACT64)


@pytest.mark.parametrize("held", FAMILIES)
def test_terms_are_those_of_the_full_coupled_system(held):
    rng = np.random.default_rng(5)
    basis = random_orthogonal(rng, 5)
    hessian = basis * LAM @ basis.T
    terms = bound_terms_under_rotation(LAM, NOISE, ANGLES, PLANES, held=held, **OPTIONS)
    assert terms.total.shape == ANGLES.shape
    for index, noise in enumerate(FAMILIES[held](NOISE, ANGLES, PLANES)):
        truth = lyapunov(hessian, basis @ noise @ basis.T, 0.01, 0.9, 5e-4)[:5, :5]
        variances = np.diag(rotate(np.kron(np.eye(2), truth), basis))[:5]
        # 1e-8: the Lyapunov solve, as in test_stationary
        assert_allclose(terms.curvature[index], np.trace(hessian @ truth), rtol=1e-8)
        assert_allclose(terms.log_determinant[index], -np.linalg.slogdet(truth)[1], rtol=1e-8)
        assert_allclose(terms.log_variance[index], -np.log(variances).sum(), rtol=1e-8)
        assert_allclose(terms.variance[index], np.trace(truth), rtol=1e-8)
        assert terms.directions == 5


@properties
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.0, 0.95), st.floats(-4, 0))
def test_misalignment_never_raises_the_log_determinant_term(seed, d, mu, log_rate):
    rng, eta = np.random.default_rng(seed), 10**log_rate
    options = {"learning_rate": eta, "momentum": mu, "weight_decay": 0.0}
    lam = np.sort(rng.uniform(0.01, 0.99, size=d))[::-1] * 2 * (1 + mu) / eta
    spectrum = 10 ** rng.uniform(-2, 0, size=d)
    basis = random_orthogonal(rng, d)
    noise = basis * spectrum @ basis.T
    aligned, turned = (
        covariance_terms(lam, stationary_covariance(lam, c, **options)) for c in (np.diag(spectrum), noise)
    )
    # 1e-8: determinants of matrices with a condition number up to 1e4
    assert turned.log_determinant <= aligned.log_determinant + 1e-8
    assert turned.total_correlation <= total_correlation(noise) + 1e-8
    assert turned.total_correlation <= largest_total_correlation(lam, **options) + 1e-8
    same_diagonal = covariance_terms(lam, stationary_covariance(lam, np.diag(np.diag(noise)), **options))
    assert_allclose(turned.curvature, same_diagonal.curvature, **EXACT64)
    assert_allclose(turned.log_variance, same_diagonal.log_variance, **EXACT64)


def test_the_largest_total_correlation_is_cauchys_determinant_and_attained():
    lam = np.array([8.0, 5.0, 1.0])
    pairs = [(8, 5), (8, 1), (5, 1)]
    cauchy = -sum(np.log((a - b) / (a + b)) for a, b in pairs)
    small = {"learning_rate": 1e-8, "momentum": 0.9, "weight_decay": 0.0}
    # the next order is ηλ/(1 − μ)² = 1e-5 of it
    assert_allclose(largest_total_correlation(lam, **small), cauchy, rtol=1e-4)
    reach = np.array([0.3, -2.0, 1.0])
    attained = total_correlation(stationary_covariance(lam, np.outer(reach, reach), **OPTIONS))
    assert_allclose(largest_total_correlation(lam, **OPTIONS), attained, rtol=1e-9)  # condition number 1e3
    assert largest_total_correlation([2.0, 2.0], **OPTIONS) == np.inf


def test_small_steps_a_rotation_of_noise_proportional_to_curvature():
    options = {"learning_rate": 1e-8, "momentum": 0.9, "weight_decay": 0.0}
    ratio = (1 + np.sqrt(2)) ** 2
    angles = np.radians(np.arange(0.0, 91.0, 5.0))
    highest = []
    for r in (1.5, ratio, 30.0):
        lam = np.array([r, 1.0])
        terms = bound_terms_under_rotation(lam, lam, angles, [(0, 1)], held="spectrum", **options)
        cross = (r - 1) / 2 * np.sin(2 * angles)
        gain = np.log1p(((r - 1) / (r + 1)) ** 2 * cross**2 / r)  # ln(1 + (1 − q) C_12² / det C)
        # 1e-4: ηλ/(1 − μ)² = 3e-5
        assert_allclose(terms.log_determinant[0] - terms.log_determinant, gain, rtol=1e-4, atol=1e-8)
        assert_allclose(terms.curvature, terms.curvature[0], rtol=1e-6)
        highest.append(2 * terms.total_correlation.max())
    # ρ²q = (1 − q) q is at most 1/4, at the ratio of curvatures (1 + √2)²
    assert_allclose(highest[1], np.log(4 / 3), rtol=1e-4)
    assert max(highest) == highest[1]


def test_kl_is_the_sum_of_its_parts_and_the_best_prior_is_best():
    rng = np.random.default_rng(0)
    sigma = random_covariance(rng, 4)
    terms = covariance_terms([1.0, 2.0, 3.0, 4.0], sigma)
    parts = gaussian_kl(
        np.diag(sigma), distance_sq=0.7, prior_variance=0.3, total_correlation=total_correlation(sigma)
    )
    assert_allclose(terms.kl(distance_sq=0.7, prior_variance=0.3), parts.total, **EXACT64)
    best = terms.kl(distance_sq=0.7, prior_variance=None)
    scale = (0.7 + np.trace(sigma)) / 4
    assert_allclose(terms.kl(distance_sq=0.7, prior_variance=scale), best, **EXACT64)
    assert best < min(terms.kl(distance_sq=0.7, prior_variance=scale * factor) for factor in (0.99, 1.01))
    round_posterior = covariance_terms([1.0, 2.0], 0.3 * np.eye(2))
    assert_allclose(round_posterior.kl(distance_sq=0.0, prior_variance=None), 0.0, atol=EXACT64["atol"])


def test_terms_of_a_stack_are_those_of_its_matrices():
    rng = np.random.default_rng(1)
    stack = np.array([[random_covariance(rng, 3) for _ in range(2)] for _ in range(4)])
    terms = covariance_terms([1.0, -2.0, 3.0], stack)
    assert terms.curvature.shape == (4, 2)
    one = covariance_terms([1.0, -2.0, 3.0], stack[2, 1])
    for name in ("curvature", "log_variance", "total_correlation", "variance", "commuting_sum"):
        assert_allclose(getattr(terms, name)[2, 1], getattr(one, name), **EXACT64)
    kl = terms.kl(distance_sq=1.0, prior_variance=None)
    assert_allclose(kl[2, 1], one.kl(distance_sq=1.0, prior_variance=None), **EXACT64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planes": [(0, 3), (3, 1)]}, r"planes is \[\(0, 3\), \(3, 1\)\]; it must be pairs of different"),
        ({"planes": [(1, 1)]}, r"pairs of different directions below 5, each used once"),
        ({"planes": [(0, 5)]}, r"pairs of different directions below 5, each used once"),
        ({"planes": [(-1, 0)]}, r"planes is -1; it must be a whole number >= 0"),
        ({"held": "trace"}, r"held is 'trace'; it must be 'spectrum' or 'diagonal'"),
        ({"noise": [1.0, 1.0, 0.0, 1.0, 1.0]}, r"noise is 0 at index 2; it must be > 0"),
        ({"noise": [1.0, 1.0]}, r"pairs of different directions below 2"),
        ({"angle": np.nan}, r"angle is nan; it must be finite"),
        ({"learning_rate": 1.0}, r"eigenvalue is 40 at index 0; momentum SGD"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"eigenvalue": LAM, "noise": NOISE, "angle": 0.3, "planes": PLANES, "held": "spectrum", **OPTIONS}
    with pytest.raises(ValueError, match=message):
        bound_terms_under_rotation(**(good | change))


def test_bad_covariances_are_refused():
    with pytest.raises(ValueError, match=r"covariance has shape \(2, 2\); it must be \(..., 3, 3\)"):
        covariance_terms([1.0, 2.0, 3.0], np.eye(2))
    with pytest.raises(ValueError, match=r"diagonal of covariance is 0 at index 1; it must be > 0"):
        covariance_terms([1.0, 2.0], np.diag([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"covariance has the eigenvalue -1; all must be >= 0"):
        covariance_terms([1.0, 2.0], [[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match=r"noise_eigenvalues is -1 at index 0; it must be >= 0"):
        rotated_noise([-1.0, 1.0], 0.1, [(0, 1)])
    with pytest.raises(ValueError, match=r"prior_variance is 0; it must be > 0"):
        covariance_terms([1.0], [[1.0]]).kl(distance_sq=0.0, prior_variance=0.0)
