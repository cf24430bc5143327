import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from robustdyn.theory import MomentumDynamics, is_stable, regularised_minimum
from tests.theory.reference import full_system, properties
from tests.tolerances import EXACT64

rates = st.floats(1e-4, 1.0)
momenta = st.floats(0.0, 0.99)
decays = st.floats(0.0, 0.1)


def test_transition_is_the_optimisers_two_lines():
    dynamics = MomentumDynamics(0.1, 0.9, 0.01)
    x, v, noise, lam = 0.7, -0.3, 0.2, 5.0
    v_next = 0.9 * v + (lam * x + 0.01 * x) + noise
    expected = [x - 0.1 * v_next, v_next]
    got = dynamics.transition(lam) @ [x, v] + dynamics.noise_input * noise
    assert_allclose(got, expected, **EXACT64)


def test_transition_is_vectorised_over_any_shape():
    lam = np.arange(6.0).reshape(2, 3)
    stacked = MomentumDynamics(0.1, 0.5).transition(lam)
    assert stacked.shape == (2, 3, 2, 2)
    assert_allclose(stacked[1, 2], full_system(np.array([[5.0]]), 0.1, 0.5)[0], **EXACT64)


@properties
@given(st.floats(-20, 200), rates, momenta, decays)
def test_spectral_radius_against_a_dense_eigensolver(lam, eta, mu, omega):
    dynamics = MomentumDynamics(eta, mu, omega)
    matrix = full_system(np.array([[lam]]), eta, mu, omega)[0]
    expected = np.abs(np.linalg.eigvals(matrix)).max()
    # At the double root the eigensolver is good to sqrt(eps) = 1.5e-8 of the matrix's size only.
    scale = np.abs(matrix).max()
    assert_allclose(dynamics.spectral_radius(lam), expected, rtol=1e-7, atol=1e-7 * scale)


@properties
@given(st.floats(-20, 200), rates, momenta, decays)
def test_stability_region_is_where_the_spectral_radius_is_below_one(lam, eta, mu, omega):
    radius = np.abs(np.linalg.eigvals(full_system(np.array([[lam]]), eta, mu, omega)[0])).max()
    stable = bool(is_stable(lam, eta, mu, omega))
    low, high = MomentumDynamics(eta, mu, omega).stable_eigenvalues
    assert stable == (low < lam < high) or np.isclose(lam, [low, high]).any()
    # The radius of a nearly double root is known to sqrt(eps) only: see above.
    assert stable == (radius < 1) or abs(radius - 1) < 1e-6


@pytest.mark.parametrize("step", [1e-12, 1e-9, 1e-7])
def test_relaxation_time_keeps_its_digits_at_tiny_steps(step):
    mu = 0.9
    # ρ ≈ 1 − h/(1−μ) − μ h²/(1−μ)³ from the characteristic polynomial, next term
    # 2 h³/(1−μ)⁵, relatively 2 h²/(1−μ)⁴ ≤ 2e-10.
    rate = step / (1 - mu) + mu * step**2 / (1 - mu) ** 3
    expected = -1 / np.log1p(-rate)
    assert_allclose(MomentumDynamics(1.0, mu).relaxation_steps(step), expected, rtol=1e-8)


def test_relaxation_time_of_oscillations_keeps_its_digits_as_momentum_goes_to_one():
    # ρ = √μ: −1 / ln ρ = −2 / ln μ
    assert_allclose(MomentumDynamics(0.1, 1 - 1e-12).relaxation_steps(1.0), -2 / np.log1p(-(1 - (1 - 1e-12))))


def test_relaxation_time_by_counting_steps():
    dynamics = MomentumDynamics(0.05, 0.8)
    steps = float(dynamics.relaxation_steps(0.05))
    state = np.linalg.matrix_power(dynamics.transition(0.05), 400)
    later = np.linalg.matrix_power(dynamics.transition(0.05), 500)
    # after 400 steps only the slow mode is left: the fast one fell by 0.8^400.
    assert_allclose(np.log(state[0, 0] / later[0, 0]), 100 / steps, rtol=1e-9)


def test_relaxation_time_at_the_edges():
    assert np.isinf(MomentumDynamics(0.1, 0.9).relaxation_steps([0.0, -1.0, 38.1, 50.0])).all()
    assert MomentumDynamics(0.5, 0.0).relaxation_steps(2.0) == 0.0  # one step forgets everything


def test_oscillation_is_where_the_roots_are_complex():
    dynamics = MomentumDynamics(0.1, 0.9)
    lam = np.linspace(-1, 40, 400)
    complex_roots = [np.iscomplex(np.linalg.eigvals(m)).any() for m in dynamics.transition(lam)]
    assert dynamics.is_oscillating(lam).tolist() == complex_roots


def test_weight_decay_moves_the_minimum():
    lam, start, omega = np.array([2.0, -0.005]), np.array([3.0, 1.0]), 0.01
    where = regularised_minimum(lam, start, omega)
    assert_allclose(lam * (where - start) + omega * where, 0, atol=1e-14)
    with pytest.raises(ValueError, match=r"eigenvalue is -0.01 at index 1; .* > -0.01"):
        regularised_minimum([1.0, -0.01], 0.0, omega)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.9), r"learning_rate is 0; it must be > 0"),
        ((np.nan, 0.9), r"learning_rate is nan; it must be finite"),
        ((0.1, 1.0), r"momentum is 1; it must be in \[0, 1\)"),
        ((0.1, -0.1), r"momentum is -0.1; it must be in \[0, 1\)"),
        ((0.1, 0.9, -1e-4), r"weight_decay is -0.0001; it must be >= 0"),
    ],
)
def test_bad_hyperparameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MomentumDynamics(*arguments)


def test_bad_eigenvalues_are_refused():
    dynamics = MomentumDynamics(0.1, 0.9)
    with pytest.raises(ValueError, match=r"eigenvalue is inf at index 1; it must be finite"):
        dynamics.transition([1.0, np.inf])
    with pytest.raises(ValueError, match=r"eigenvalue is 40 at index 1; .* in \(-?0, 38\)"):
        dynamics.require_stable([1.0, 40.0])
    dynamics.require_stable([1.0, 37.9])


def test_the_edges_of_the_stable_interval():
    edges = [-0.0101, -0.0099, 0.0, 37.9899, 37.9901]
    assert is_stable(edges, 0.1, 0.9, 0.01).tolist() == [False, True, True, True, False]
    assert is_stable([0.0, 1e-12, 38.0], 0.1, 0.9).tolist() == [False, True, False]
