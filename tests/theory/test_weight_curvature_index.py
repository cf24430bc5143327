import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.optimize import minimize_scalar

from robustdyn.theory import optimal_layer_variance, weight_curvature_index
from tests.theory.reference import properties
from tests.tolerances import EXACT64

# large enough that a product of two does not underflow
norm_values = st.floats(1e-3, 1e4)
trace_values = st.one_of(st.floats(-10.0, -1e-3), st.just(0.0), st.floats(1e-3, 1e5))
layers = st.lists(st.tuples(norm_values, trace_values), min_size=1, max_size=20)


def test_by_hand():
    got = weight_curvature_index([4.0, 9.0], [25.0, 1.0], standard_error=[5.0, 0.5])
    assert_allclose(got.terms, [10.0, 3.0], **EXACT64)
    assert_allclose(got.value, 13.0, **EXACT64)
    assert_allclose(got.cauchy_schwarz_bound, math.sqrt(13 * 26), **EXACT64)
    assert_allclose([got.weight_factor, got.curvature_factor], [math.sqrt(13), math.sqrt(26)], **EXACT64)
    # ∂/∂t √(wt) = ½ √(w/t): 0.2 and 1.5, times the errors 5 and 0.5.
    assert_allclose(got.standard_error, math.hypot(1.0, 0.75), **EXACT64)
    assert got.clamped_layers == 0


def test_a_negative_trace_is_clamped_and_counted():
    got = weight_curvature_index([4.0, 9.0, 1.0], [25.0, -1.0, 0.0], standard_error=1.0)
    assert got.terms.tolist() == [10.0, 0.0, 0.0]
    assert got.clamped_layers == 1
    assert_allclose(got.standard_error, 0.2, **EXACT64)
    assert got.hessian_trace.tolist() == [25.0, 0.0, 0.0]
    assert np.isinf(got.optimal_layer_variance(2.0)).tolist() == [False, True, True]


@properties
@given(layers)
def test_cauchy_schwarz(pairs):
    norms, traces = np.array(pairs).T
    got = weight_curvature_index(norms, traces)
    assert got.value <= got.cauchy_schwarz_bound * (1 + 1e-12)  # rounding of sums of 20 terms
    assert got.clamped_layers == sum(t < 0 for _, t in pairs)
    assert math.isnan(got.standard_error)


def test_equality_holds_for_proportional_layers():
    norms = np.array([1.0, 2.0, 5.0])
    got = weight_curvature_index(norms, 3 * norms)
    assert_allclose(got.value, got.cauchy_schwarz_bound, **EXACT64)


@properties
@given(layers, st.floats(0.1, 10.0))
def test_rescaling_a_layer_changes_nothing(pairs, factor):
    """W → aW in front of a scale-invariant layer turns H into H / a²."""
    norms, traces = np.array(pairs).T
    before = weight_curvature_index(norms, traces).value
    assert_allclose(weight_curvature_index(norms * factor**2, traces / factor**2).value, before, rtol=1e-12)


def test_covariance_generalises_independent_errors():
    norms, traces, errors = [4.0, 9.0], [25.0, 1.0], np.array([5.0, 0.5])
    alone = weight_curvature_index(norms, traces, standard_error=errors)
    diagonal = weight_curvature_index(norms, traces, covariance=np.diag(errors**2))
    assert_allclose(diagonal.standard_error, alone.standard_error, **EXACT64)
    together = weight_curvature_index(norms, traces, covariance=np.outer(errors, errors))
    assert_allclose(together.standard_error, 1.75, **EXACT64)


def test_examples_give_the_error_of_repeated_data_sets():
    """Gamma contributions shared between layers; the truth is the spread of the index over data sets."""
    rng = np.random.default_rng(0)
    m, repeats = 400, 1000
    norms = np.array([1.0, 4.0, 2.0])
    common = rng.gamma(2.0, size=(repeats, m, 1))
    traces = common * np.array([1.0, 3.0, 0.5]) + rng.gamma(1.0, size=(repeats, m, 3))
    results = [weight_curvature_index(norms, t.mean(0), example_traces=t) for t in traces]
    spread = np.std([r.value for r in results], ddof=1)
    predicted = math.sqrt(np.mean([r.standard_error**2 for r in results]))
    # a spread over 1,000 data sets has a relative error of 1/√2000 = 2.2 %; four of them.
    assert abs(predicted / spread - 1) < 0.09
    independent = weight_curvature_index(
        norms, traces[0].mean(0), standard_error=traces[0].std(0, ddof=1) / math.sqrt(m)
    )
    assert independent.standard_error < 0.85 * spread  # what ignoring the correlation would have said


def test_examples_by_hand():
    # two layers with ½√(w/t) = 1 and ½; contributions per example 1·t_1 + ½·t_2 = (1.5, 3.5), std √2, /√2.
    got = weight_curvature_index([4.0, 2.0], [1.0, 2.0], example_traces=[[0.5, 2.0], [1.5, 2.0]])
    assert_allclose(got.standard_error, 0.5, **EXACT64)


@properties
@given(st.floats(0.01, 1e3), st.floats(0.01, 1e4), st.floats(0.1, 1e4))
def test_the_optimal_variance_minimises_its_layers_two_terms(norm, trace, beta):
    def objective(log_variance):
        return norm / (2 * beta * math.exp(log_variance)) + 0.5 * math.exp(log_variance) * trace

    best = minimize_scalar(objective, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9})
    # a minimum is found to √eps in its argument.
    assert_allclose(optimal_layer_variance([norm], [trace], beta)[0], math.exp(best.x), rtol=1e-5)
    index = weight_curvature_index([norm], [trace]).value
    assert_allclose(index / math.sqrt(beta), best.fun, rtol=1e-9)


@pytest.mark.parametrize(
    ("norms", "traces", "options", "message"),
    [
        ([-1.0], [1.0], {}, r"weight_norm_sq is -1 at index 0; it must be >= 0"),
        ([1.0], [np.nan], {}, r"hessian_trace is nan at index 0; it must be finite"),
        ([1.0], [1.0, 2.0], {}, r"hessian_trace has shape \(2,\); it must be \(1,\)"),
        ([1.0], [1.0], {"standard_error": [-1.0]}, r"standard_error is -1 at index 0; it must be >= 0"),
        ([1.0], [1.0], {"covariance": [[-1.0]]}, r"covariance has the eigenvalue -1"),
        ([1.0], [1.0], {"covariance": np.eye(2)}, r"covariance has shape \(2, 2\); it must be \(1, 1\)"),
        ([1.0], [1.0], {"example_traces": [[1.0]]}, r"shape \(1, 1\); it must be \(m, 1\), m >= 2"),
        ([1.0], [1.0], {"example_traces": [[1.0], [3.0]]}, r"is 1 away from hessian_trace"),
        ([1.0], [1.0], {"standard_error": 1.0, "covariance": [[1.0]]}, r"2 error descriptions were given"),
    ],
)
def test_bad_input_is_refused(norms, traces, options, message):
    with pytest.raises(ValueError, match=message):
        weight_curvature_index(norms, traces, **options)


def test_bad_beta_is_refused():
    with pytest.raises(ValueError, match=r"beta is 0; it must be > 0"):
        optimal_layer_variance([1.0], [1.0], 0.0)
