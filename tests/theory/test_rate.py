import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from robustdyn.theory import bound_minimising_rate, stationary_variance
from tests.tolerances import EXACT64

# a minimum is flat: its place is known to the root of the value's digits, 1e-8, times what the terms cancel
FOUND = 1e-6


def exact_terms(eta, lam, gamma, beta, mu, omega):
    """½ Σ λσ² − Σ ln σ² / (2β) of the exact stationary law."""
    variance = stationary_variance(lam, gamma, learning_rate=eta, momentum=mu, weight_decay=omega)
    return 0.5 * (lam * variance).sum() - np.log(variance).sum() / (2 * beta)


def minimum(terms, low, high):
    """Where a function of the rate is smallest, searched in its logarithm."""
    found = minimize_scalar(
        lambda log: terms(np.exp(log)),
        bounds=(np.log(low), np.log(high)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(np.exp(found.x))


def exact_minimum(lam, gamma, beta, mu, omega):
    edge = 2 * (1 + mu) / (lam.max() + omega)
    return minimum(lambda eta: exact_terms(eta, lam, gamma, beta, mu, omega), 1e-9 * edge, (1 - 1e-12) * edge)


@st.composite
def problems(draw):
    """λ, γ, β, μ, ω with every direction's own best rate well below the edge of stability: one minimum."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, mu = draw(st.integers(1, 6)), draw(st.sampled_from([0.0, 0.5, 0.9]))
    lam, gamma = 10 ** rng.uniform(-1, 1, k), 10 ** rng.uniform(-2, 0, k)
    return lam, gamma, 10 ** draw(st.floats(2.5, 4)), mu, draw(st.sampled_from([0.0, 5e-4, 0.1]))


@given(problems())
def test_it_minimises_the_terms_of_continuous_time(problem):
    lam, gamma, beta, mu, omega = problem
    best = bound_minimising_rate(lam, gamma, beta=beta, momentum=mu, weight_decay=omega)

    def terms(eta):
        variance = eta * gamma / (2 * (lam + omega) * (1 - mu))  # Mandt, Hoffman & Blei
        return 0.5 * (lam * variance).sum() - np.log(variance).sum() / (2 * beta)

    assert best == pytest.approx(minimum(terms, best / 50, best * 70), rel=FOUND)


@given(problems())
def test_it_is_mandts_rate_where_sgd_has_neither_momentum_nor_decay(problem):
    lam, gamma, beta, *_ = problem
    best = bound_minimising_rate(lam, gamma, beta=beta, momentum=0.0, weight_decay=0.0)
    assert best == pytest.approx(2 * len(lam) / (beta * gamma.sum()), rel=EXACT64["rtol"])


@given(problems())
def test_the_posterior_is_then_the_closest_to_that_of_gibbs(problem):
    """KL(Q‖exp(−βL)) is smallest where the terms are: here of Gaussians with variances σ² and 1/(βλ)."""
    lam, gamma, beta, mu, omega = problem

    def divergence(eta):
        ratio = (
            beta * lam * stationary_variance(lam, gamma, learning_rate=eta, momentum=mu, weight_decay=omega)
        )
        return 0.5 * (ratio - 1 - np.log(ratio)).sum()

    edge = 2 * (1 + mu) / (lam.max() + omega)
    closest = minimum(divergence, 1e-9 * edge, (1 - 1e-12) * edge)
    assert closest == pytest.approx(exact_minimum(*problem), rel=FOUND)


@given(problems())
def test_of_one_direction_the_exact_minimum_is_known(problem):
    lam, gamma, beta, mu, omega = problem
    lam, gamma = lam[:1], gamma[:1]
    best = bound_minimising_rate(lam, gamma, beta=beta, momentum=mu, weight_decay=omega)
    exact = best / (1 + best * (lam[0] + omega) / (2 * (1 + mu)))  # (37f)
    assert exact == pytest.approx(exact_minimum(lam, gamma, beta, mu, omega), rel=FOUND)


@given(problems())
def test_how_far_the_exact_minimum_is_to_first_order(problem):
    """The remainder of (37g) is of second order in bη: a hundredth where β is ten times as large."""
    lam, gamma, beta, mu, omega = problem
    edges, own = (lam + omega) / (2 * (1 + mu)), lam * gamma / (2 * (lam + omega) * (1 - mu))

    def remainder(beta):
        best = bound_minimising_rate(lam, gamma, beta=beta, momentum=mu, weight_decay=omega)
        first = (edges * best * (2 * beta * own * best - 1)).mean()
        return exact_minimum(lam, gamma, beta, mu, omega) / best - (1 - first), (edges * best).max()

    for large in (1e2 * beta, 1e3 * beta):
        left, step = remainder(large)
        spread = (own / own.mean()).max()
        # the coefficient of the second order is at most a few times the square of the uneven noise
        assert abs(left) <= 10 * (spread * step) ** 2 + FOUND


@pytest.mark.parametrize("beta", [30.0, 90.0, 300.0])
def test_on_measured_values_a_dense_grid_finds_the_same(beta):
    """λ and γ of digits before a decay, and after it, where the loss is fitted and the noise small."""
    for lam, gamma in (
        ([11.8, 9.2, 6.7, 5.5, 4.5], [0.25, 0.31, 0.25, 0.30, 0.13]),
        ([6.95, 5.32, 4.17, 3.46, 1.33], [0.070, 0.053, 0.053, 0.056, 0.007]),
    ):
        lam, gamma = np.array(lam), np.array(gamma)
        best = bound_minimising_rate(lam, gamma, beta=beta, momentum=0.9, weight_decay=5e-4)
        grid = np.geomspace(1e-4, 0.999 * 3.8 / (lam.max() + 5e-4), 2001)
        values = [exact_terms(eta, lam, gamma, beta, 0.9, 5e-4) for eta in grid]
        exact = grid[int(np.argmin(values))]
        assert exact == pytest.approx(exact_minimum(lam, gamma, beta, 0.9, 5e-4), rel=5e-3)  # the grid's step
        # lower by at most the sharpest direction's share of its edge of stability, and never higher
        assert best / (1 + best * lam.max() / 3.8) <= exact <= best


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eigenvalues": [1.0, -2.0]}, "eigenvalues is -2 at index 1; it must be > 0"),
        ({"noise": [1.0, 0.0]}, "noise is 0 at index 1; it must be > 0"),
        ({"noise": [1.0]}, "noise has shape"),
        ({"beta": 0.0}, "beta is 0; it must be > 0"),
        ({"momentum": 1.0}, "momentum is 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
    ],
)
def test_refuses_values_outside_their_range(change, message):
    values = {
        "eigenvalues": [1.0, 2.0],
        "noise": [1.0, 1.0],
        "beta": 1.0,
        "momentum": 0.9,
        "weight_decay": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        bound_minimising_rate(**(values | change))
