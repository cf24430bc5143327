import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from robustdyn.theory import (
    curvature_term_per_noise,
    stationary_block_covariance,
    stationary_covariance,
    stationary_state_covariance,
    stationary_variance,
    total_correlation,
)
from tests.theory.reference import (
    as_full,
    exact_pair,
    lyapunov,
    properties,
    random_covariance,
    random_orthogonal,
    rotate,
)
from tests.tolerances import EXACT64

DRAWS = 300


def draw(rng):
    """A random problem in the stable region, away from its edges so that SciPy's answer is accurate.

    The Lyapunov solve loses 1/(1 − ρ²) digits: 0.02 ≤ η(λ+ω)/(2(1+μ)) ≤ 0.95 and μ ≤ 0.95 keep it below 1e4.
    """
    d = int(rng.integers(2, 6))
    eta, mu, omega = 10 ** rng.uniform(-3, 0), rng.uniform(0, 0.95), rng.choice([0.0, 0.01])
    lam = rng.uniform(0.02, 0.95, size=d) * 2 * (1 + mu) / eta - omega
    basis = random_orthogonal(rng, d)
    return lam, basis, random_covariance(rng, d), eta, mu, omega


@pytest.mark.parametrize("seed", range(3))
def test_every_pair_solves_the_full_lyapunov_equation(seed):
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS // 3):
        lam, basis, noise, eta, mu, omega = draw(rng)
        truth = rotate(lyapunov(basis * lam @ basis.T, noise, eta, mu, omega), basis)
        blocks = stationary_block_covariance(
            lam, basis.T @ noise @ basis, learning_rate=eta, momentum=mu, weight_decay=omega
        )
        # 1e-8 relative, entry by entry, each against the scale of its own two variables.
        scale = np.sqrt(np.outer(np.diag(truth), np.diag(truth)))
        assert np.abs((as_full(blocks) - truth) / scale).max() < 1e-8


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_pairs_keep_their_digits_as_momentum_goes_to_one(gap):
    lam, mu, eta = np.array([0.3, 0.3000001, 0.7, 5.0]), 1 - gap, 0.1
    noise = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    blocks = stationary_block_covariance(lam, noise, learning_rate=eta, momentum=mu, weight_decay=0.0)
    for i in range(4):
        for j in range(4):
            exact = exact_pair(lam[i], lam[j], eta, mu, noise[i, j])
            # entry by entry; one exact zero crossing apart, each is a sum of two terms of either sign
            assert_allclose(blocks[i, j], exact, rtol=1e-13, err_msg=f"{i}, {j}")
    state = stationary_state_covariance(lam, 1.0, learning_rate=eta, momentum=mu, weight_decay=0.0)
    for i in range(4):
        assert_allclose(state[i], exact_pair(lam[i], lam[i], eta, mu, 1.0), rtol=1e-13)


def test_position_blocks_are_the_closed_form_and_variances_need_the_diagonal_only():
    rng = np.random.default_rng(7)
    for _ in range(50):
        lam, basis, noise, eta, mu, omega = draw(rng)
        options = {"learning_rate": eta, "momentum": mu, "weight_decay": omega}
        truth = rotate(lyapunov(basis * lam @ basis.T, noise, eta, mu, omega), basis)
        gamma = np.diag(basis.T @ noise @ basis)
        state = stationary_state_covariance(lam, gamma, **options)
        d = lam.size
        for i in range(d):
            own = truth[np.ix_([i, i + d], [i, i + d])]
            assert_allclose(state[i], own, rtol=1e-8, atol=1e-8 * np.abs(own).max())
        sigma = stationary_covariance(lam, basis.T @ noise @ basis, **options)
        assert_allclose(np.diag(sigma), stationary_variance(lam, gamma, **options), **EXACT64)


def test_the_curvature_term_needs_the_noise_along_each_direction_only():
    rng = np.random.default_rng(3)
    for _ in range(50):
        lam, basis, noise, eta, mu, omega = draw(rng)
        d = lam.size
        hessian = basis * lam @ basis.T
        truth = np.trace(hessian @ lyapunov(hessian, noise, eta, mu, omega)[:d, :d])
        terms = curvature_term_per_noise(lam, learning_rate=eta, momentum=mu, weight_decay=omega)
        # through any function of the matrix, without its eigenvectors: Tr(C h(H)); 1e-8 as above
        assert_allclose(np.trace(noise @ (basis * terms @ basis.T)), truth, rtol=1e-8)


def test_the_curvature_term_is_over_positive_and_stable_directions():
    eta, mu, omega = 0.1, 0.9, 0.01
    edge = 2 * (1 + mu) / eta - omega
    lam = np.array([-1.0, -omega, -omega / 2, 0.0, 1e-9, 1.0, 0.999 * edge, edge * 1.001, 1e3])
    terms = curvature_term_per_noise(lam, learning_rate=eta, momentum=mu, weight_decay=omega)
    assert ((terms > 0) == [False] * 4 + [True] * 3 + [False] * 2).all()
    for value, term in zip(lam[4:7], terms[4:7], strict=True):
        own = stationary_variance(value, 1.0, learning_rate=eta, momentum=mu, weight_decay=omega)
        assert_allclose(term, value * own, **EXACT64)
    # between weight decay and the edge it is η / (2 (1 − μ)), to ω/λ and ηλ / (2 (1 + μ))
    middle = curvature_term_per_noise(0.01, learning_rate=1e-3, momentum=mu, weight_decay=1e-6)
    assert_allclose(middle, 1e-3 / (2 * (1 - mu)), rtol=2e-4)
    assert middle.shape == ()


def test_without_momentum_the_variance_is_the_textbook_one():
    lam, gamma, eta = np.array([0.5, 3.0, 12.0]), np.array([1.0, 2.0, 0.1]), 0.1
    got = stationary_variance(lam, gamma, learning_rate=eta, momentum=0.0, weight_decay=0.0)
    assert_allclose(got, eta * gamma / (lam * (2 - eta * lam)), **EXACT64)


def test_small_steps_give_the_continuous_time_variance():
    lam, gamma, eta, mu = 3.0, 2.0, 1e-7, 0.9
    got = stationary_variance(lam, gamma, learning_rate=eta, momentum=mu, weight_decay=0.0)
    # Mandt et al.: η γ / (2 λ (1 − μ)); the next order is ηλ / (2(1+μ)) = 8e-8 of it.
    assert_allclose(got, eta * gamma / (2 * lam * (1 - mu)), rtol=1e-7)


@properties
@given(
    st.floats(1e-3, 0.99),
    st.floats(1e-3, 1.0),
    st.floats(0.0, 0.98),
    st.floats(0.0, 0.01),
    st.floats(1e-6, 1e3),
)
def test_the_state_covariance_is_a_fixed_point(share, eta, mu, omega, gamma):
    lam = share * 2 * (1 + mu) / eta - omega
    options = {"learning_rate": eta, "momentum": mu, "weight_decay": omega}
    s = stationary_state_covariance(lam, gamma, **options)
    a = np.array([[1 - eta * (lam + omega), -eta * mu], [lam + omega, mu]])
    b = np.array([[-eta], [1.0]])
    scale = np.sqrt(np.outer(np.diag(s), np.diag(s)))
    # products of numbers up to (ηλ)² ≤ 16 times the scale: a few hundred ulp.
    assert np.abs((a @ s @ a.T + gamma * b @ b.T - s) / scale).max() < 1e-12


def test_noise_of_low_rank_still_gives_a_full_posterior():
    lam = np.array([1.0, 2.0, 5.0])
    noise = np.outer([1.0, -1.0, 0.5], [1.0, -1.0, 0.5])
    sigma = stationary_covariance(lam, noise, learning_rate=0.1, momentum=0.9, weight_decay=0.0)
    assert np.linalg.eigvalsh(sigma)[0] > 0
    assert 0 < total_correlation(sigma) < np.inf


@properties
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_total_correlation_obeys_hadamard_and_ignores_units(seed, d):
    rng = np.random.default_rng(seed)
    sigma, units = random_covariance(rng, d), np.diag(10 ** rng.uniform(-3, 3, size=d))
    value = total_correlation(sigma)
    assert value >= 0
    # the determinant of a correlation matrix with condition number < 1e3.
    assert_allclose(total_correlation(units @ sigma @ units), value, rtol=1e-9, atol=1e-10)
    direct = 0.5 * (np.log(np.diag(sigma)).sum() - np.log(np.linalg.eigvalsh(sigma)).sum())
    assert_allclose(value, direct, rtol=1e-9, atol=1e-10)


def test_total_correlation_of_two_by_hand():
    assert_allclose(total_correlation([[4.0, 1.0], [1.0, 1.0]]), -0.5 * np.log(1 - 0.25), **EXACT64)
    assert total_correlation(np.diag([1.0, 2.0])) == 0
    assert total_correlation([[1.0, 1.0], [1.0, 1.0]]) == np.inf


def test_commuting_noise_costs_nothing_and_misaligned_noise_does():
    lam = np.array([0.5, 2.0, 8.0])
    options = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    aligned = stationary_covariance(lam, np.diag([1.0, 2.0, 3.0]), **options)
    assert total_correlation(aligned) == 0
    tilted = stationary_covariance(lam, np.diag([1.0, 2.0, 3.0]) + 0.5, **options)
    assert total_correlation(tilted) > 0
    # equal curvatures let C's own correlation through whole: Σ ∝ C there.
    noise = np.array([[1.0, 0.6], [0.6, 1.0]])
    degenerate = stationary_covariance([2.0, 2.0], noise, **options)
    assert_allclose(total_correlation(degenerate), -0.5 * np.log(1 - 0.6**2), **EXACT64)


def test_hyperparameters_broadcast():
    eta = np.array([[0.1], [0.01]])
    got = stationary_variance([1.0, 2.0], 1.0, learning_rate=eta, momentum=0.9, weight_decay=0.0)
    one = stationary_variance(2.0, 1.0, learning_rate=0.01, momentum=0.9, weight_decay=0.0)
    assert got.shape == (2, 2)
    assert_allclose(got[1, 1], one, **EXACT64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eigenvalue": [1.0, 50.0]}, r"eigenvalue is 50 at index 1; .*in \(-0.0005, 37.9995\)"),
        ({"eigenvalue": [1.0, -0.001]}, r"eigenvalue is -0.001 at index 1; .*in \(-0.0005, 37.9995\)"),
        ({"noise": [1.0, 0.0]}, r"noise is 0 at index 1; it must be > 0"),
        ({"noise": [-1.0, 1.0]}, r"noise is -1 at index 0; it must be > 0"),
        ({"noise": [np.nan, 1.0]}, r"noise is nan at index 0; it must be finite"),
        ({"learning_rate": 0.0}, r"learning_rate is 0; it must be > 0"),
        ({"momentum": 1.0}, r"momentum is 1; it must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay is -1; it must be >= 0"),
    ],
)
def test_bad_variance_input_is_refused(change, message):
    good = {
        "eigenvalue": [1.0, 2.0],
        "noise": [1.0, 1.0],
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
    }
    with pytest.raises(ValueError, match=message):
        stationary_variance(**(good | change))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (np.diag([1.0, -0.5]), r"noise_covariance has the eigenvalue -0.5; all must be >= 0"),
        ([[1.0, 0.3], [0.1, 1.0]], r"noise_covariance differs from its transpose by 0.2"),
        (np.eye(3), r"noise_covariance has shape \(3, 3\); it must be \(2, 2\)"),
        ([1.0, 1.0], r"noise_covariance has shape \(2,\); it must be \(2, 2\)"),
    ],
)
def test_bad_noise_covariance_is_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        stationary_covariance([1.0, 2.0], noise, learning_rate=0.1, momentum=0.9, weight_decay=0.0)


def test_bad_total_correlation_input_is_refused():
    with pytest.raises(ValueError, match=r"diagonal of covariance is 0 at index 1; it must be > 0"):
        total_correlation(np.diag([1.0, 0.0]))


def test_a_block_of_small_variances_must_be_a_covariance_as_well():
    covariance = np.diag([1.0, *[1e-8] * 4])
    covariance[1:, 1:] += 2e-8 * (1 - np.eye(4))  # correlations of 2
    with pytest.raises(ValueError, match=r"correlation matrix of covariance has the eigenvalue -1; all must"):
        total_correlation(covariance)
    covariance[1:, 1:] = 1e-8 * (0.5 + 0.5 * np.eye(4))
    # 4 directions of equal correlation r: det = (1 − r)³ (1 + 3 r)
    assert_allclose(total_correlation(covariance), -0.5 * np.log(0.5**3 * 2.5), **EXACT64)


@pytest.mark.parametrize("seed", range(20))
def test_fewer_samples_than_directions_are_singular_whatever_rounding_says(seed):
    samples = np.random.default_rng(seed).normal(size=(3, 6)) * 10.0 ** np.arange(-3, 3)
    assert total_correlation(np.cov(samples, rowvar=False)) == np.inf


@pytest.mark.parametrize(
    "law", [stationary_covariance, stationary_block_covariance, stationary_state_covariance]
)
@pytest.mark.parametrize("name", ["learning_rate", "momentum", "weight_decay"])
def test_one_setting_at_a_time_where_directions_are_paired(law, name):
    noise = np.ones(2) if law is stationary_state_covariance else np.eye(2)
    setting = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=rf"{name} has shape \(2,\); it must be one number"):
        law([1.0, 2.0], noise, **setting | {name: np.full(2, setting[name])})
    with pytest.raises(ValueError, match=rf"{name} has shape \(2,\); it must be one number"):
        curvature_term_per_noise([1.0, 2.0], **setting | {name: np.full(2, setting[name])})
