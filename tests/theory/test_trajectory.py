import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from robustdyn.theory import MeasuredSpectrum, propagate
from tests.theory.reference import as_full, full_system, lyapunov, properties, random_covariance
from tests.tolerances import EXACT64

MU = 0.9


def plain_loop(rates, lam, noise, force, mu, omega, record, covariance=None, mean=None):
    """Mean (2k,) and covariance (2k, 2k) by the full-size recursion; lam (N, k), noise (N, k, k)."""
    k = lam.shape[1]
    state = np.zeros((2 * k, 2 * k)) if covariance is None else covariance
    centre = np.zeros(2 * k) if mean is None else mean
    seen = {0: (centre, state)}
    for t, eta in enumerate(rates):
        a, b = full_system(np.diag(lam[t]), eta, mu, omega)
        centre, state = a @ centre + b @ force[t], a @ state @ a.T + b @ noise[t] @ b.T
        seen[t + 1] = centre, state
    return [seen[r] for r in record]


def held(values, knots, n):
    """For each step the last of ``values`` (T, ...) measured by then, or the first if there is none."""
    return np.array([values[max(0, sum(s <= t for s in knots) - 1)] for t in range(n)])


@pytest.fixture
def run():
    """A run with a decay, a warm-up, every sign of λ, and a drifting noise covariance."""
    rng = np.random.default_rng(5)
    rates = np.concatenate([np.linspace(0.01, 0.1, 7), np.full(60, 0.1), np.full(50, 0.01)])
    knots = [3, 40, 90]
    lam = np.array([[3.0, -0.01, 0.0, 20.0], [2.0, 0.02, 0.0, 9.0], [1.0, 0.02, 0.1, 30.0]])
    noise = np.stack([random_covariance(rng, 4) for _ in knots])
    return rates, knots, lam, noise, rng.normal(size=lam.shape)


RECORD = [0, 1, 5, 40, 66, 67, 90, 117]


@pytest.mark.parametrize("method", ["auto", "doubling", "recurrence"])
def test_every_pair_and_the_mean_follow_the_plain_loop(run, method):
    rates, knots, lam, noise, force = run
    spectrum = MeasuredSpectrum(knots, lam, noise, "piecewise_constant", force)
    n = rates.size
    expected = plain_loop(
        rates, held(lam, knots, n), held(noise, knots, n), held(force, knots, n), MU, 1e-3, RECORD
    )
    got = propagate(spectrum, rates, momentum=MU, weight_decay=1e-3, record_steps=RECORD, method=method)
    assert got.step.tolist() == RECORD
    for mean, blocks, (centre, state) in zip(got.mean, got.covariance, expected, strict=True):
        assert_allclose(as_full(blocks), state, rtol=1e-10, atol=1e-12 * max(1, np.abs(state).max()))
        assert_allclose(mean.T.ravel(), centre, rtol=1e-10, atol=1e-12 * max(1, np.abs(centre).max()))


@pytest.mark.parametrize("method", ["auto", "doubling", "recurrence"])
def test_the_diagonal_alone_gives_the_same_variances(run, method):
    rates, knots, lam, noise, _ = run
    options = {"momentum": MU, "weight_decay": 1e-3, "record_steps": RECORD, "method": method}
    gamma = np.einsum("tii->ti", noise)
    full = propagate(MeasuredSpectrum(knots, lam, noise, "piecewise_constant"), rates, **options)
    diagonal = propagate(MeasuredSpectrum(knots, lam, gamma, "piecewise_constant"), rates, **options)
    assert diagonal.variance.shape == (len(RECORD), 4)
    assert_allclose(diagonal.variance, full.variance, **EXACT64)
    assert_allclose(full.variance, np.einsum("rii->ri", full.position_covariance), **EXACT64)
    assert not diagonal.position.any()


def test_log_linear_interpolation_step_by_step(run):
    rates, knots, lam, noise, force = run
    gamma = np.einsum("tii->ti", noise)
    n = rates.size
    t = np.arange(n)
    between = np.empty((3, n, 4))
    for i in range(4):
        between[1, :, i] = np.exp(np.interp(t, knots, np.log(gamma[:, i])))
        between[2, :, i] = np.interp(t, knots, force[:, i])
    between[0, :, 0] = np.exp(np.interp(t, knots, np.log(lam[:, 0])))
    # direction 1 changes sign in the first interval: straight there, constant after it.
    between[0, :, 1] = np.interp(t, knots, lam[:, 1])
    between[0, :, 2] = np.interp(t, knots, lam[:, 2])  # from zero: straight
    between[0, :, 3] = np.exp(np.interp(t, knots, np.log(lam[:, 3])))
    expected = plain_loop(rates, between[0], [np.diag(g) for g in between[1]], between[2], MU, 0.0, RECORD)
    spectrum = MeasuredSpectrum(knots, lam, gamma, "log_linear", force)
    got = propagate(spectrum, rates, momentum=MU, weight_decay=0.0, record_steps=RECORD)
    for i, (centre, state) in enumerate(expected):
        assert_allclose(got.variance[i], np.diag(state)[:4], rtol=1e-10, atol=1e-12)
        assert_allclose(got.position[i], centre[:4], rtol=1e-10, atol=1e-12)


def test_interpolated_noise_matrices_stay_covariances_with_log_linear_variances():
    rng = np.random.default_rng(11)
    vector = rng.normal(size=3)
    noise = np.stack([np.outer(vector, vector), 100 * random_covariance(rng, 3)])  # the first is singular
    spectrum = MeasuredSpectrum([0, 10], np.ones((2, 3)), noise, "log_linear")
    matrices = spectrum.between(0, 10)[1]
    assert matrices.shape == (10, 3, 3)
    assert np.linalg.eigvalsh(matrices).min() > -1e-12
    expected = np.exp(np.linspace(*np.log([noise[0, 1, 1], noise[1, 1, 1]]), 11))[:10]
    assert_allclose(matrices[:, 1, 1], expected, **EXACT64)
    assert_allclose(matrices[0], noise[0], **EXACT64)


def test_a_per_step_cosine_crosses_measurements_exactly():
    rng = np.random.default_rng(2)
    n, knots = 700, [0, 300, 600]
    rates = 0.05 * (1 + np.cos(np.pi * np.arange(n) / n)) + 1e-6
    lam, gamma = rng.uniform(0.1, 30, size=(3, 2)), rng.uniform(0.1, 2, size=(3, 2))
    spectrum = MeasuredSpectrum(knots, lam, gamma, "piecewise_constant")
    got = propagate(spectrum, rates, momentum=MU, weight_decay=0.0, record_steps=[n])
    noise = [np.diag(g) for g in held(gamma, knots, n)]
    truth = plain_loop(rates, held(lam, knots, n), noise, np.zeros((n, 2)), MU, 0.0, [n])[0][1]
    # the entries of one 4 x 4 state differ by 1e4; compare each on the scale of its own variables.
    assert_allclose(got.variance[0], np.diag(truth)[:2], rtol=1e-10)


@properties
@given(st.integers(1, 1000), st.floats(-1e-4, 0.99), st.floats(1e-3, 0.1), st.floats(0.0, 0.95))
def test_doubling_equals_recurrence_for_any_number_of_steps(n, share, eta, mu):
    lam = share * 2 * (1 + mu) / eta  # a share of the stable interval, or a little below it
    spectrum = MeasuredSpectrum([0], [[lam]], [[1.0]], "piecewise_constant", [[0.3]])
    by = {
        method: propagate(
            spectrum, np.full(n, eta), momentum=mu, weight_decay=0.0, record_steps=[n], method=method
        )
        for method in ("doubling", "recurrence")
    }
    # n ulp of accumulated rounding; cov(x, v) may cancel, so each on the scale of its own variables.
    scale = np.sqrt(np.diag(by["recurrence"].covariance[0, 0]))
    difference = by["doubling"].covariance[0, 0] - by["recurrence"].covariance[0, 0]
    assert np.abs(difference / np.outer(scale, scale)).max() < 1e-9
    drift = np.abs(by["recurrence"].mean[0, 0]) + scale
    assert (np.abs(by["doubling"].mean - by["recurrence"].mean)[0, 0] / drift).max() < 1e-9


@pytest.mark.parametrize("method", ["doubling", "recurrence"])
def test_a_flat_direction_is_a_random_walk(method):
    n, eta, gamma = 5000, 0.02, 3.0
    spectrum = MeasuredSpectrum([0], [[0.0]], [[gamma]], "piecewise_constant")
    got = propagate(
        spectrum, np.full(n, eta), momentum=MU, weight_decay=0.0, record_steps=[100, n], method=method
    )
    # each draw of noise is finally carried Σ_{s<j} μ^s = (1 − μ^j)/(1 − μ) times, j steps after it came.
    carried = ((1 - MU ** np.arange(1, n + 1)) / (1 - MU)) ** 2
    assert_allclose(got.variance[:, 0], eta**2 * gamma * np.cumsum(carried)[[99, n - 1]], **EXACT64)
    # t η² γ / (1−μ)² less the start-up, which is below 2/(1−μ) = 20 steps.
    assert_allclose(got.variance[1, 0], n * eta**2 * gamma / (1 - MU) ** 2, rtol=20 / n)


def test_many_steps_reach_the_stationary_law():
    lam, gamma = np.array([[0.05, 2.0, 20.0]]), np.array([[1.0, 0.2, 5.0]])
    spectrum = MeasuredSpectrum([0], lam, gamma, "piecewise_constant")
    got = propagate(spectrum, np.full(50_000, 0.1), momentum=MU, weight_decay=5e-4, record_steps=[50_000])
    for i in range(3):
        truth = lyapunov(np.diag(lam[:, i]), np.diag(gamma[:, i]), 0.1, MU, 5e-4)
        assert_allclose(got.covariance[0, i], truth, rtol=1e-9)


def test_the_pulled_mean_settles_at_the_minimum():
    spectrum = MeasuredSpectrum([0], [[2.0]], [[1.0]], "piecewise_constant", [[-3.0]])
    got = propagate(spectrum, np.full(4000, 0.1), momentum=MU, weight_decay=0.5, record_steps=[4000])
    assert_allclose(got.mean[0, 0], [3.0 / 2.5, 0.0], **EXACT64)


def test_the_initial_state_is_where_it_starts():
    spectrum = MeasuredSpectrum([0], [[2.0]], [[1.0]], "piecewise_constant")
    start, centre = np.array([[[2.0, -0.1], [-0.1, 1.0]]]), np.array([[1.0, -2.0]])
    got = propagate(
        spectrum,
        [0.1, 0.2],
        momentum=MU,
        weight_decay=0.0,
        record_steps=[0, 2],
        initial_covariance=start,
        initial_mean=centre,
    )
    lam, noise = np.full((2, 1), 2.0), np.ones((2, 1, 1))
    truth = plain_loop([0.1, 0.2], lam, noise, np.zeros((2, 1)), MU, 0.0, [2], start[0], centre[0])[0]
    assert_allclose(got.covariance[:, 0], [start[0], truth[1]], **EXACT64)
    assert_allclose(got.mean[:, 0], [centre[0], truth[0]], **EXACT64)


GOOD_SPECTRUM = {
    "step": [0, 10],
    "eigenvalue": [[1.0, 2.0], [1.0, 2.0]],
    "noise": [[1.0, 1.0], [1.0, 1.0]],
    "interpolation": "piecewise_constant",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": [10, 0]}, r"step is \[10.0, 0.0\]; it must be whole numbers, strictly increasing"),
        ({"step": [0, 1.5]}, r"it must be whole numbers"),
        ({"step": [-1, 1]}, r"step is -1 at index 0; it must be >= 0"),
        ({"eigenvalue": [1.0, 2.0]}, r"eigenvalue has shape \(2,\); it must be \(2, k\)"),
        ({"noise": [[1.0, 1.0], [1.0, 0.0]]}, r"noise is 0 at index \(1, 1\); it must be > 0"),
        ({"noise": [1.0, 1.0]}, r"noise has shape \(2,\); it must be \(2, 2\) or \(2, 2, 2\)"),
        ({"noise": np.array([np.eye(2), [[1.0, 2.0], [2.0, 1.0]]])}, r"noise has the eigenvalue -1"),
        ({"interpolation": "cubic"}, r"interpolation is 'cubic'; it must be 'piecewise_constant' or"),
    ],
)
def test_bad_spectra_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MeasuredSpectrum(**(GOOD_SPECTRUM | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": [0.1, 0.0]}, r"learning_rate is 0 at index 1; it must be > 0"),
        ({"momentum": 1.0}, r"momentum is 1; it must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, r"weight_decay is -0.1; it must be >= 0"),
        ({"record_steps": [3]}, r"record_steps is 3 at index 0; it must be a whole number in \[0, 2\]"),
        ({"record_steps": [2, 1]}, r"record_steps is .*; it must be strictly increasing"),
        ({"method": "magic"}, r"method is 'magic'"),
        ({"learning_rate": [0.1, 3.0]}, r"eigenvalue is 2; with learning_rate=3, .* it must be < 1.26667"),
        # 2 (1 + μ)/η = 2.1 less the weight decay is below λ = 2.
        ({"learning_rate": [3.8 / 2.1] * 2, "weight_decay": 0.2}, r"weight_decay=0.2 it must be < 1.9 "),
        ({"initial_mean": [0.0]}, r"initial_mean has shape \(1,\); it must be \(2, 2\)"),
        ({"initial_covariance": np.eye(2)}, r"initial_covariance has shape \(2, 2\); it must be \(2, 2, 2\)"),
    ],
)
def test_bad_runs_are_refused(change, message):
    good = {"learning_rate": [0.1, 0.1], "momentum": 0.9, "weight_decay": 0.0, "record_steps": [2]}
    with pytest.raises(ValueError, match=message):
        propagate(MeasuredSpectrum(**GOOD_SPECTRUM), **(good | change))


def test_growth_is_followed_and_its_overflow_named():
    rising = MeasuredSpectrum([0], [[1.0, -2.0]], [[1.0, 1.0]], "piecewise_constant")
    options = {"momentum": MU, "weight_decay": 0.0}
    fine = propagate(rising, np.full(20, 0.1), record_steps=[20], **options)
    assert fine.variance[0, 1] > 100 * fine.variance[0, 0]
    with pytest.raises(ValueError, match=r"direction 1 \(eigenvalue -2\) left the range of float64"):
        propagate(rising, np.full(5000, 0.1), record_steps=[5000], **options)
    too_fast = propagate(rising, [3.0] * 2, record_steps=[2], allow_unstable=True, **options)
    assert np.isfinite(too_fast.covariance).all()


@pytest.mark.parametrize("interpolation", ["piecewise_constant", "log_linear"])
def test_a_run_may_be_entered_at_any_step(interpolation):
    spectrum = MeasuredSpectrum([10, 60, 90], [[2.0], [-0.1], [0.3]], [[1.0], [2.0], [0.5]], interpolation)
    rates = np.array([0.1] * 50 + [0.01] * 70)
    options = {"momentum": 0.9, "weight_decay": 0.0}
    whole = propagate(spectrum, rates, record_steps=[37, 100, 120], **options)
    rest = propagate(
        spectrum,
        rates,
        record_steps=[37, 100, 120],
        first_step=37,
        initial_covariance=whole.covariance[0],
        initial_mean=whole.mean[0],
        **options,
    )
    assert_allclose(rest.covariance, whole.covariance, **EXACT64)


def test_overshooting_out_of_range_is_said_to_be_that():
    spectrum = MeasuredSpectrum([0], [[100.0]], [[1.0]], "piecewise_constant")
    with pytest.raises(ValueError, match=r"eigenvalue must be in \(-?0, 38\), or the run shorter"):
        propagate(
            spectrum,
            np.full(5000, 0.1),
            momentum=0.9,
            weight_decay=0.0,
            record_steps=[5000],
            allow_unstable=True,
        )


@pytest.mark.parametrize("block", [[[-1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.5], [0, 1]]])
def test_a_start_that_is_no_covariance_is_refused(block):
    flat = MeasuredSpectrum([0], [[1.0]], [[1.0]], "piecewise_constant")
    full = MeasuredSpectrum([0], [[1.0]], [[[1.0]]], "piecewise_constant")
    for spectrum, start in ((flat, [block]), (full, [[block]])):
        with pytest.raises(ValueError, match="initial_covariance"):
            propagate(
                spectrum,
                [0.1] * 9,
                momentum=0.9,
                weight_decay=0.0,
                record_steps=[9],
                initial_covariance=start,
            )
