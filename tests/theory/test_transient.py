import numpy as np
import pytest
from numpy.testing import assert_allclose

from robustdyn.theory import (
    MomentumDynamics,
    covariance_after,
    decay_transient,
    mean_after,
    propagated_variance,
    slow_mode_variance,
    stationary_block_covariance,
)
from tests.theory.reference import as_full, full_system, lyapunov, random_covariance
from tests.tolerances import EXACT64

TIMES = [0, 1, 2, 3, 10, 37, 200]


def plain_loop(lam, noise, start, eta, mu, omega, times):
    """Covariances (2k, 2k) at the times, by the full-size recursion."""
    a, b = full_system(np.diag(lam), eta, mu, omega)
    state, seen = start, {}
    for t in range(max(times) + 1):
        if t in times:
            seen[t] = state
        state = a @ state @ a.T + b @ noise @ b.T
    return [seen[t] for t in times]


def test_after_a_decay_every_pair_follows_the_recursion():
    rng = np.random.default_rng(3)
    lam = np.array([0.02, 0.4, 2.0, 9.0])  # real roots, near-double, complex
    noise = random_covariance(rng, 4)
    start = lyapunov(np.diag(lam), noise, 0.1, 0.9, 5e-4)
    expected = plain_loop(lam, noise, start, 0.01, 0.9, 5e-4, TIMES)
    blocks = stationary_block_covariance(lam, noise, learning_rate=0.1, momentum=0.9, weight_decay=5e-4)
    got = covariance_after(TIMES, blocks, lam, noise, MomentumDynamics(0.01, 0.9, 5e-4))
    for one, truth in zip(got, expected, strict=True):
        # the start is SciPy's: good to eps / (1 − ρ²) with 1 − ρ = 2e-3 · 10.
        assert_allclose(as_full(one), truth, rtol=1e-8, atol=1e-10 * np.abs(truth).max())


def test_diagonal_noise_gives_the_diagonal_blocks():
    lam, gamma = np.array([0.02, 2.0]), np.array([1.0, 3.0])
    dynamics = MomentumDynamics(0.01, 0.9)
    rng = np.random.default_rng(0)
    start = np.stack([random_covariance(rng, 2) for _ in lam])
    got = covariance_after(TIMES, start, lam, gamma, dynamics)
    assert got.shape == (len(TIMES), 2, 2, 2)
    for i in range(2):
        expected = plain_loop(lam[[i]], gamma[[i]][None], start[i], 0.01, 0.9, 0.0, TIMES)
        assert_allclose(got[:, i], expected, **EXACT64)


def test_a_decay_leaves_one_part_and_the_new_rate_injects_the_other():
    lam, gamma = np.array([0.02, 0.4, 2.0, 9.0]), np.array([1.0, 0.5, 3.0, 2.0])
    found = decay_transient(
        TIMES, lam, gamma, before=MomentumDynamics(0.1, 0.9, 5e-4), after=MomentumDynamics(0.01, 0.9, 5e-4)
    )
    for i in range(4):
        a, b = full_system(np.diag(lam[[i]]), 0.01, 0.9, 5e-4)
        old = lyapunov(np.diag(lam[[i]]), np.diag(gamma[[i]]), 0.1, 0.9, 5e-4)
        powers = [np.linalg.matrix_power(a, t) for t in range(max(TIMES) + 1)]
        kicks = [gamma[i] * (power @ b @ b.T @ power.T)[0, 0] for power in powers]
        left = [(powers[t] @ old @ powers[t].T)[0, 0] for t in TIMES]
        # SciPy's start is good to eps / (1 − ρ²) with 1 − ρ = 2e-3 · 10
        assert_allclose(found.propagated[:, i], left, rtol=1e-8)
        # the difference of two numbers near σ_0² at first, hence its scale
        injected = [sum(kicks[:t]) for t in TIMES]
        assert_allclose(found.injected[:, i], injected, rtol=1e-9, atol=1e-12 * old[0, 0])


def test_what_is_left_when_everything_changes_at_every_step():
    """λ through zero and η up and down, by the product of the dense matrices."""
    rng = np.random.default_rng(5)
    lam, eta = rng.uniform(-1, 9, 40), rng.uniform(0.01, 0.3, 40)
    for start in (random_covariance(rng, 2), np.diag([0.0, 2.0]), np.zeros((2, 2))):
        found = propagated_variance(start, lam, eta, momentum=0.9, weight_decay=0.01)
        state = start
        for t in range(40):
            a, _ = full_system(np.diag(lam[[t]]), eta[t], 0.9, 0.01)
            state = a @ state @ a.T
            # near complex roots x passes close by zero: the scale is that of the whole state
            assert_allclose(found[t], state[0, 0], rtol=1e-10, atol=1e-13 * np.trace(state))
    assert not found.any()  # of a start without variance


def test_long_times_reach_the_stationary_law():
    lam, gamma = np.array([0.1, 2.0]), np.array([1.0, 3.0])
    dynamics = MomentumDynamics(0.05, 0.9)
    late = covariance_after(10**7, np.zeros((2, 2, 2)), lam, gamma, dynamics)[0]
    for i in range(2):
        assert_allclose(late[i], lyapunov(np.diag(lam[[i]]), np.diag(gamma[[i]]), 0.05, 0.9), rtol=1e-9)


def test_the_mean_is_the_noiseless_iteration():
    lam = np.array([0.5, 3.0, 0.0, -0.2])
    start = np.array([[1.0, 0.2], [-1.0, 0.0], [0.3, 1.0], [1.0, 0.0]])
    got = mean_after(TIMES, start, lam, MomentumDynamics(0.1, 0.8, 0.01))
    x, v = start.T.copy()
    for t in range(max(TIMES) + 1):
        if t in TIMES:
            assert_allclose(got[TIMES.index(t)].T, [x, v], rtol=1e-10, atol=1e-12)
        v = 0.8 * v + (lam + 0.01) * x
        x = x - 0.1 * v


def test_the_slow_mode_is_fair_for_small_steps_and_off_by_two_for_complex_roots():
    before, after, curvatures = MomentumDynamics(0.1, 0.9), MomentumDynamics(0.01, 0.9), (0.001, 2.0)
    transient = decay_transient([10, 50], curvatures, 1.0, before=before, after=after)
    one = np.eye(1)
    starts = [lyapunov(lam * one, one, 0.1, 0.9) for lam in curvatures]
    ends = [lyapunov(lam * one, one, 0.01, 0.9)[0, 0] for lam in curvatures]
    paths = [
        plain_loop(np.array([lam]), one, start, 0.01, 0.9, 0.0, [10, 50])
        for lam, start in zip(curvatures, starts, strict=True)
    ]
    truth = np.array(paths)[..., 0, 0].T
    # SciPy's answers lose 1/(1 − ρ²) = 5e4 of their digits at λ = 0.001 and η = 0.01.
    assert_allclose(transient.variance, truth, rtol=1e-8)
    assert_allclose(transient.stationary_before, [s[0, 0] for s in starts], rtol=1e-8)
    assert_allclose(transient.stationary_after, ends, rtol=1e-8)
    error = transient.slow_mode_relative_error
    assert_allclose(error, transient.slow_mode_variance / truth - 1, rtol=1e-6)
    # λ = 0.001: only the buffer's memory is missing, 2 ηλμ/(1−μ)² = 2e-2 at most. λ = 2: complex roots.
    assert np.abs(error[:, 0]).max() < 2e-2
    assert abs(error[0, 1]) > 0.5


def test_the_slow_mode_is_exact_without_momentum():
    dynamics = MomentumDynamics(0.1, 0.0)
    got = slow_mode_variance(TIMES, [5.0], [3.0], [2.0], dynamics)[:, 0]
    variance, expected = 5.0, []
    for t in range(max(TIMES) + 1):
        if t in TIMES:
            expected.append(variance)
        variance = (1 - 0.1 * 3.0) ** 2 * variance + 0.1**2 * 2.0
    assert_allclose(got, expected, **EXACT64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [1, -1]}, r"steps is -1 at index 1; it must be >= 0"),
        ({"steps": 1.5}, r"steps is 1.5 at index 0; it must be a whole number"),
        ({"eigenvalue": [1.0, 0.0]}, r"eigenvalue is 0 at index 1; .* in \(-?0, 38\)"),
        ({"noise": [1.0, -2.0]}, r"noise is -2 at index 1; it must be > 0"),
        ({"noise": [1.0, 1.0, 1.0]}, r"noise has shape \(3,\); it must be \(2,\)"),
        ({"initial": np.zeros((3, 2, 2))}, r"initial has shape \(3, 2, 2\); it must be \(2, 2, 2\)"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {
        "steps": 3,
        "initial": np.zeros((2, 2, 2)),
        "eigenvalue": [1.0, 2.0],
        "noise": [1.0, 1.0],
        "dynamics": MomentumDynamics(0.1, 0.9),
    }
    with pytest.raises(ValueError, match=message):
        covariance_after(**(good | change))


def test_a_bad_mean_is_refused():
    with pytest.raises(ValueError, match=r"initial has shape \(2,\); it must be \(1, 2\)"):
        mean_after(1, [0.0, 0.0], [1.0], MomentumDynamics(0.1, 0.9))


def test_a_mean_beyond_float64_and_times_beyond_counting_are_refused():
    with pytest.raises(ValueError, match=r"eigenvalue is -1 at index 1 and the mean leaves the range"):
        mean_after(80_000, np.ones((2, 2)), [1.0, -1.0], MomentumDynamics(0.1, 0.9))
    with pytest.raises(ValueError, match=r"steps is 1e\+30 at index 0; it must be a whole number"):
        mean_after(1e30, np.ones((1, 2)), [1.0], MomentumDynamics(0.1, 0.9))
    with pytest.raises(ValueError, match=r"initial is .* at index 0; it must be a covariance"):
        covariance_after(1, [[[1.0, 2.0], [2.0, 1.0]]], [1.0], [1.0], MomentumDynamics(0.1, 0.9))
