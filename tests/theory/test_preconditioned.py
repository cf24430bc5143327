import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.linalg import solve_discrete_lyapunov

from robustdyn.theory import MomentumDynamics, adam_dynamics, adam_scale, preconditioned_covariance, whiten
from tests.theory.reference import random_covariance
from tests.tolerances import EXACT64


def preconditioned_lyapunov(hessian, noise, scale, eta, mu, omega):
    """Var θ for v ← μv + (H+ωI)θ + ξ, θ ← θ − η D v, in parameter coordinates by SciPy."""
    d = len(scale)
    unit, curved, pre = np.eye(d), hessian + omega * np.eye(d), np.diag(scale)
    a = np.block([[unit - eta * pre @ curved, -eta * mu * pre], [curved, mu * unit]])
    b = np.vstack([-eta * pre, unit])
    return solve_discrete_lyapunov(a, b @ noise @ b.T)[:d, :d]


@pytest.mark.parametrize("seed", range(20))
def test_any_fixed_diagonal_solves_the_full_lyapunov_equation(seed):
    rng = np.random.default_rng(seed)
    hessian, noise = random_covariance(rng, 4), random_covariance(rng, 4)
    scale, mu, omega = 10 ** rng.uniform(-1, 1, size=4), rng.uniform(0, 0.95), 0.01
    eta = 0.5 * 2 * (1 + mu) / np.linalg.eigvals(np.diag(scale) @ (hessian + omega * np.eye(4))).real.max()
    got = preconditioned_covariance(hessian, noise, scale, learning_rate=eta, momentum=mu, weight_decay=omega)
    truth = preconditioned_lyapunov(hessian, noise, scale, eta, mu, omega)
    deviation = np.sqrt(np.diag(truth))
    assert np.abs((got - truth) / np.outer(deviation, deviation)).max() < 1e-8


def test_adams_two_lines_are_the_dynamics_in_white_coordinates():
    rng = np.random.default_rng(1)
    hessian, noise = random_covariance(rng, 3), random_covariance(rng, 3)
    scale = adam_scale([0.04, 1.0, 9.0], 0.0)
    assert_allclose(scale, [5.0, 1.0, 1 / 3], **EXACT64)
    white = whiten(hessian, noise, scale, weight_decay=0.2)
    theta, m, xi = rng.normal(size=(3, 3))
    m_next = 0.9 * m + 0.1 * (hessian @ theta + 0.2 * theta + xi)
    theta_next = theta - 0.03 * scale * m_next
    dynamics = adam_dynamics(0.03, 0.9)
    z = white.to_coordinates(theta)
    assert_allclose(white.basis @ z, theta, **EXACT64)
    buffer, push = white.basis.T @ (m / 0.1), white.basis.T @ xi
    state = np.einsum("kab,kb->ka", dynamics.transition(white.eigenvalue), np.stack([z, buffer], 1))
    state += push[:, None] * dynamics.noise_input
    assert_allclose(state[:, 0], white.to_coordinates(theta_next), **EXACT64)
    assert_allclose(state[:, 1], white.basis.T @ (m_next / 0.1), **EXACT64)


def test_noise_and_hessian_are_diagonalised_together_with_the_scale():
    rng = np.random.default_rng(2)
    hessian, noise, scale = random_covariance(rng, 3), random_covariance(rng, 3), np.array([1.0, 4.0, 0.25])
    white = whiten(hessian, noise, scale, weight_decay=0.0)
    assert_allclose(white.basis.T @ hessian @ white.basis, np.diag(white.eigenvalue), **EXACT64)
    assert_allclose(white.basis @ white.basis.T, np.diag(scale), **EXACT64)
    assert_allclose(white.noise, white.basis.T @ noise @ white.basis, **EXACT64)


def test_adam_dynamics_names():
    assert adam_dynamics(0.1, 0.75) == MomentumDynamics(0.025, 0.75, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": np.eye(3)}, r"hessian has shape \(3, 3\); it must be \(2, 2\)"),
        ({"hessian": [[1.0, 2.0], [0.0, 1.0]]}, r"hessian differs from its transpose by 2"),
        ({"noise_covariance": -np.eye(2)}, r"noise_covariance has the eigenvalue -1"),
        ({"scale": [1.0, 0.0]}, r"scale is 0 at index 1; it must be > 0"),
        ({"weight_decay": -1.0}, r"weight_decay is -1; it must be >= 0"),
    ],
)
def test_bad_problems_are_refused(change, message):
    good = {"hessian": np.eye(2), "noise_covariance": np.eye(2), "scale": [1.0, 2.0], "weight_decay": 0.0}
    with pytest.raises(ValueError, match=message):
        whiten(**(good | change))


def test_bad_second_moments_are_refused():
    with pytest.raises(ValueError, match=r"second_moment is -1 at index 1; it must be >= 0"):
        adam_scale([1.0, -1.0], 1e-8)
    with pytest.raises(ValueError, match=r"\+ epsilon is 0 at index 0; it must be > 0"):
        adam_scale([0.0], 0.0)
