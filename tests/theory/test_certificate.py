import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.optimize import brentq
from scipy.stats import binom, multinomial

from robustdyn.theory import binary_kl, binary_kl_upper, finite_certificate, risk_certificate
from tests.theory.reference import properties
from tests.tolerances import EXACT64

# without subnormal numbers, whose inverse overflows in the arithmetic by hand
shares, budgets = st.floats(0.0, 1.0, allow_subnormal=False), st.floats(0.0, 20.0)
GOOD = {"kl": 5.0, "n": 1000, "alpha": 0.05, "alpha_sampling": 0.01}


def kl_by_hand(q, p):
    terms = [(q, p), (1 - q, 1 - p)]
    return sum(a * math.log(a / b) if b > 0 else math.inf for a, b in terms if a > 0)


@properties
@given(shares, shares)
def test_binary_kl_by_hand(q, p):
    assert_allclose(binary_kl(q, p), kl_by_hand(q, p), rtol=1e-9, atol=1e-12)


def test_zero_errors_have_a_closed_inverse():
    budget = np.array([0.0, 1e-6, 0.1, 3.0])
    assert_allclose(binary_kl_upper(0.0, budget), -np.expm1(-budget), **EXACT64)
    assert binary_kl_upper(1.0, 0.3) == 1.0


@properties
@given(st.floats(0.001, 0.9), st.floats(1e-6, 2.7))
def test_inverse_against_a_root_finder(q, budget):
    # for q ≤ 0.9, kl(q‖1 − 1e-15) ≥ 0.1 ln(1e15) − ln 2 > 2.7: the root is inside.
    truth = brentq(lambda p: kl_by_hand(q, p) - budget, q, 1 - 1e-15, xtol=1e-15)
    # kl is flat at q: its rounding of 1e-16 moves p by 1e-16 / kl', kl' ≥ √(2 · 1e-6).
    assert_allclose(binary_kl_upper(q, budget), truth, rtol=1e-9, atol=1e-11)


@properties
@given(shares, budgets, budgets)
def test_inverse_is_above_the_rate_and_grows_with_the_budget(q, budget, more):
    first = float(binary_kl_upper(q, budget))
    assert q <= first <= 1
    assert first <= binary_kl_upper(q, budget + more)
    # Pinsker: p ≤ q + √(budget/2), and an ulp of the halving.
    assert first <= q + math.sqrt(budget / 2) + 1e-7


def test_certificate_step_by_step():
    got = risk_certificate([0.1, 0.3], **GOOD)
    assert_allclose(got.sampled_error, 0.2, **EXACT64)
    upper = brentq(lambda p: kl_by_hand(0.2, p) - math.log(100) / 2, 0.2, 1 - 1e-15)
    assert_allclose(got.empirical_upper, upper, rtol=1e-9)
    budget = (5 + math.log(2 * math.sqrt(1000) / 0.05)) / 1000
    risk = brentq(lambda p: kl_by_hand(upper, p) - budget, upper, 1 - 1e-15)
    assert_allclose(got.risk_bound, risk, rtol=1e-9)
    assert (got.n, got.samples, got.alpha, got.alpha_sampling) == (1000, 2, 0.05, 0.01)


@properties
@given(st.integers(8, 10**5), st.integers(1, 10**6), st.floats(0.001, 0.4), st.floats(0.001, 0.4))
def test_more_data_less_confidence_or_smaller_kl_tighten(n, more, alpha, extra):
    def risk(**change):
        return risk_certificate([0.2] * 50, **GOOD | {"n": n, "alpha": alpha} | change).risk_bound

    # (ln √n + const) / n falls for n ≥ 8; up to an ulp of the halving.
    assert risk(n=n + more) <= risk() + 1e-15
    assert risk(alpha=alpha + extra) <= risk() + 1e-15
    assert risk(kl=4.0) <= risk() + 1e-15


def test_sampling_step_covers_as_often_as_it_says():
    """Coverage is exact by the binomial law for Bernoulli draws, the worst case of values in [0, 1]."""
    samples, alpha, truth = 30, 0.1, 0.25
    counts = np.arange(samples + 1)
    upper = binary_kl_upper(counts / samples, math.log(1 / alpha) / samples)
    missed = binom.pmf(counts, samples, truth)[upper < truth].sum()
    assert missed <= alpha
    assert missed > alpha / 20  # so that the bound is not trivial


def test_the_whole_certificate_covers_as_often_as_it_says():
    """For one classifier of known risk, Q = P: its error count on S is binomial, and each sample sees it."""
    n, alpha, truth = 40, 0.1, 0.25
    counts = np.arange(n + 1)
    certified = np.array(
        [
            risk_certificate([e] * 1000, kl=0.0, n=n, alpha=alpha, alpha_sampling=0.05).risk_bound
            for e in counts / n
        ]
    )
    missed = binom.pmf(counts, n, truth)[certified < truth].sum()
    assert missed <= alpha + 0.05


@pytest.mark.parametrize(
    ("errors", "change", "message"),
    [
        ([1.2], {}, r"sampled_errors is 1.2 at index 0; it must be in \[0, 1\]"),
        ([], {}, r"number of sampled_errors is 0; it must be a whole number >= 1"),
        ([0.1], {"n": 7}, r"n is 7; it must be a whole number >= 8"),
        ([0.1], {"alpha": 1.5}, r"alpha is 1.5; it must be in \(0, 1\)"),
        ([0.1], {"alpha_sampling": 0.0}, r"alpha_sampling is 0; it must be in \(0, 1\)"),
        ([0.1], {"alpha_sampling": 0.96}, r"alpha \+ alpha_sampling is 1.01; it must be in \(0, 1\)"),
        ([0.1], {"kl": -1.0}, r"kl is -1; it must be >= 0"),
    ],
)
def test_bad_input_is_refused(errors, change, message):
    with pytest.raises(ValueError, match=message):
        risk_certificate(errors, **GOOD | change)


def test_bad_budgets_are_refused():
    with pytest.raises(ValueError, match=r"budget is -1; it must be >= 0"):
        binary_kl_upper(0.1, -1.0)
    with pytest.raises(ValueError, match=r"p is 2; it must be in \[0, 1\]"):
        binary_kl(0.1, 2.0)


def test_the_prior_itself_has_chernoffs_bound_and_it_covers_as_often_as_it_says():
    n, alpha, alpha_sampling, risk = 60, 0.1, 0.05, 0.3
    draws = np.random.default_rng(11)
    failed = 0
    for _ in range(200):
        wrong = draws.random(n) < risk  # one classifier: its error on S is what Q has there
        found = risk_certificate(
            np.full(400, wrong.mean()), kl=None, n=n, alpha=alpha, alpha_sampling=alpha_sampling
        )
        failed += found.risk_bound < risk
        upper = float(binary_kl_upper(wrong.mean(), np.log(1 / alpha_sampling) / 400))
        assert_allclose(found.risk_bound, binary_kl_upper(upper, np.log(1 / alpha) / n), **EXACT64)
        assert found.kl == 0
    assert failed / 200 <= alpha + alpha_sampling
    paid = risk_certificate([0.3], kl=0.0, n=n, alpha=alpha, alpha_sampling=alpha_sampling)
    free = risk_certificate([0.3], kl=None, n=n, alpha=alpha, alpha_sampling=alpha_sampling)
    assert free.risk_bound < paid.risk_bound


def test_finite_certificate_step_by_step():
    losses = np.array([[1, 0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0], [0.5] * 8])
    got = finite_certificate(losses, alpha=0.1)
    assert_allclose(got.uniform_error, (2 / 8 + 1 / 8 + 1 / 2) / 3, **EXACT64)
    assert (got.best, got.best_error, got.networks, got.n, got.alpha) == (1, 1 / 8, 3, 8, 0.1)
    for bound, error, price in (
        (got.uniform_bound, got.uniform_error, math.log(2 / 0.1)),
        (got.best_bound, got.best_error, math.log(2 * 3 / 0.1)),
    ):
        assert_allclose(
            bound, brentq(lambda p, e=error, c=price: kl_by_hand(e, p) - c / 8, error, 1 - 1e-15), rtol=1e-9
        )


def test_both_finite_bounds_cover_together_as_often_as_they_say():
    """Exact, by all counts of the outcomes 00, 01, 10, 11 that two networks have together on ten examples."""
    n, alpha, outcomes = 10, 0.2, np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    chances = np.array([0.6, 0.12, 0.13, 0.15])
    risks = chances @ outcomes
    missed = 0.0
    for counts in itertools.product(range(n + 1), repeat=3):
        if sum(counts) > n:
            continue
        whole = (n - sum(counts), *counts)
        got = finite_certificate(np.repeat(outcomes, whole, axis=0).T, alpha=alpha)
        if got.uniform_bound < risks.mean() or got.best_bound < risks[got.best]:
            missed += multinomial.pmf(whole, n, chances)
    assert alpha / 20 < missed <= alpha


@properties
@given(st.integers(8, 2000), st.data())
def test_no_reweighting_beats_the_best_of_few_networks(n, data):
    """Where R ≤ 2 √n, Maurer's bound for any weights is above that of the best network, at equal α."""
    networks = data.draw(st.integers(1, math.floor(2 * math.sqrt(n))))
    errors = np.array(data.draw(st.lists(shares, min_size=networks, max_size=networks)))
    weights = np.exp(-data.draw(st.floats(0.0, 100.0)) * errors)
    weights /= weights.sum()
    kl = float((weights * np.log(np.maximum(weights, 1e-300) * networks)).sum())
    maurer = binary_kl_upper(weights @ errors, (max(kl, 0) + math.log(2 * math.sqrt(n) / 0.025)) / n)
    best = binary_kl_upper(errors.min(), math.log(networks / 0.025) / n)
    assert best <= maurer + 1e-12  # rounding of the mean error


@pytest.mark.parametrize(
    ("losses", "alpha", "message"),
    [
        ([0.1, 0.2], 0.1, r"losses must be \(R, n\) with R, n >= 1, got \(2,\)"),
        (np.empty((0, 3)), 0.1, r"got \(0, 3\)"),
        ([[2.0]], 0.1, r"losses is 2 at index \(0, 0\); it must be in \[0, 1\]"),
        ([[1.0]], 1.0, r"alpha is 1; it must be in \(0, 1\)"),
    ],
)
def test_bad_losses_are_refused(losses, alpha, message):
    with pytest.raises(ValueError, match=message):
        finite_certificate(losses, alpha=alpha)
