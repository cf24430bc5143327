import numpy as np
import pytest

from robustdyn.errors import RecordError
from robustdyn.replicas.agreement import agreement
from robustdyn.replicas.own_gradients import own_gradients
from robustdyn.replicas.prediction import Law, predicted_laws, refreshed_with_error
from robustdyn.theory import (
    MeasuredSpectrum,
    MomentumDynamics,
    propagate,
    slow_mode_variance,
    stationary_variance,
)
from tests.replicas.ensembles import BATCH, EXAMPLES, MU, OMEGA, point, recorded, simulate
from tests.tolerances import EXACT64, MC_SIGMAS

LAM = np.array([20.0, 8.0, 3.0, 1.0])
RATES = np.array([0.01] * 60 + [0.001] * 40)
STEPS = [0, 1, 10, 59, 60, 61, 70, 100]
WITH_PAIRS = [0, 1, 9, 10, 59, 60, 61, 69, 70, 99, 100]
ROTATED = np.array([[24.0, 3.0, 0.0, 0.0], [1.0, 12.0, 0.5, 0.0], [0.0, 1.0, 5.0, 0.3], [0.0, 0.0, 0.2, 2.0]])
GRADIENT = np.array([0.3, -0.1, 0.05, 0.02])


def noise(scale=1.0):
    """C₁ with correlations."""
    correlation = np.full((4, 4), 0.3) + 0.7 * np.eye(4)
    deviation = np.sqrt(0.6 * LAM * scale)
    return correlation * np.outer(deviation, deviation)


def ensemble(position=None, **changes):
    start = changes.pop("start", None) or point(np.diag(LAM), noise(), GRADIENT, slopes=ROTATED)
    position = np.zeros((5, len(STEPS), 4)) if position is None else position
    return recorded(start, position, STEPS, RATES, **changes)


def test_laws_of_the_hessian_are_those_of_the_theory():
    laws = predicted_laws(ensemble())
    assert list(laws) == ["stationary", "slow_mode", "exact", "refreshed"]
    gamma = np.diag(noise()) / BATCH
    spectrum = MeasuredSpectrum(
        np.array([0]), LAM[None], noise()[None] / BATCH, "piecewise_constant", gradient=GRADIENT[None]
    )
    law = propagate(spectrum, RATES, momentum=MU, weight_decay=OMEGA, record_steps=STEPS)
    np.testing.assert_allclose(laws["exact"].covariance, law.position_covariance, **EXACT64)
    np.testing.assert_allclose(laws["exact"].mean, law.position, **EXACT64)

    def stationary(rate):
        return stationary_variance(LAM, gamma, learning_rate=rate, momentum=MU, weight_decay=OMEGA)

    for row, rate in ((1, 0.01), (4, 0.01), (5, 0.001), (7, 0.001)):  # step 60 still had the first rate
        np.testing.assert_allclose(laws["stationary"].variance[row], stationary(rate), **EXACT64)
    before, after = (MomentumDynamics(rate, MU, OMEGA) for rate in (0.01, 0.001))
    slow = np.zeros(4)
    rise = stationary(0.01) * (1 - before.spectral_radius(LAM) ** (2 * 60))
    np.testing.assert_allclose(laws["slow_mode"].variance[4], rise, **EXACT64)
    slow = slow_mode_variance([10], rise, LAM, gamma, after)[0]
    np.testing.assert_allclose(laws["slow_mode"].variance[6], slow, **EXACT64)
    assert np.isnan(laws["slow_mode"].covariance[3, 0, 1])


def test_the_path_replaces_what_was_measured_at_the_start():
    """Equal numbers along the path change nothing, and other slopes change only the laws along the path."""
    start = point(np.diag(LAM), noise(), GRADIENT, slopes=ROTATED)
    same = predicted_laws(ensemble(start=start, path=[start, start], path_steps=[30, 60]))
    np.testing.assert_allclose(same["refreshed_path"].covariance, same["refreshed"].covariance, **EXACT64)
    steeper = point(np.diag(LAM), noise(4.0), GRADIENT, slopes=ROTATED)
    moved = predicted_laws(ensemble(start=start, path=[start, steeper], path_steps=[59, 60]))
    np.testing.assert_allclose(moved["refreshed_path"].variance[:4], moved["refreshed"].variance[:4])
    assert (moved["refreshed_path"].variance[6] > moved["refreshed"].variance[6]).all()


def test_a_perturbed_ensemble_uses_sampled_batches():
    draws = np.random.default_rng(0)
    sampled = draws.multivariate_normal([1.0, 0, 0, 0], noise() / BATCH, size=64)
    start = point(np.diag(LAM), 100 * noise(), GRADIENT, slopes=ROTATED, sampled=sampled)
    laws = predicted_laws(ensemble(start=start, perturbation={"_target_": "AWP"}))
    spectrum = MeasuredSpectrum(
        np.array([0]),
        LAM[None],
        np.cov(sampled, rowvar=False)[None],
        "piecewise_constant",
        gradient=sampled.mean(axis=0)[None],
    )
    law = propagate(spectrum, RATES, momentum=MU, weight_decay=OMEGA, record_steps=STEPS)
    np.testing.assert_allclose(laws["exact"].covariance, law.position_covariance, **EXACT64)
    np.testing.assert_allclose(laws["exact"].mean, law.position, **EXACT64)
    # without replacement the factor that turns a batch's noise into an example's is another, and undone
    shuffled = predicted_laws(
        ensemble(start=start, perturbation={"_target_": "AWP"}, **{"sampling.replacement": False})
    )
    assert EXAMPLES % BATCH  # the last batch of an epoch is short
    np.testing.assert_allclose(shuffled["exact"].variance[1], laws["exact"].variance[1], rtol=1e-9)


def test_no_perturbation_is_none_however_it_is_configured():
    """conf/perturbation/none.yaml is empty, not absent."""
    start = point(np.diag(LAM), noise(), GRADIENT, slopes=ROTATED, attack=noise(0.5))
    settings = {"sampling.replacement": False}
    absent = predicted_laws(ensemble(start=start, perturbation=None, **settings))
    empty = predicted_laws(ensemble(start=start, perturbation={}, **settings))
    for name, law in absent.items():
        np.testing.assert_array_equal(empty[name].covariance, law.covariance)
        np.testing.assert_array_equal(empty[name].mean, law.mean)


def test_the_mean_gradient_is_that_of_sampled_batches_where_there_are_any():
    sampled, again = np.random.default_rng(2).standard_normal((2, 8, 4))
    start = point(np.diag(LAM), noise(), GRADIENT, sampled=sampled, again=again)
    law = predicted_laws(ensemble(start=start, perturbation={}))["exact"]
    first = -RATES[0] * (sampled.mean(axis=0) + again.mean(axis=0)) / 2
    np.testing.assert_allclose(law.mean[STEPS.index(1)], first, **EXACT64)


def test_sampled_batches_tell_the_attack_s_noise_from_the_examples():
    """Only the examples' noise cancels within an epoch; the reference is the law of the true parts."""
    draws = np.random.default_rng(0)
    of_examples, of_attack = 0.2 * noise(), noise()
    factor = (EXAMPLES - BATCH) / (BATCH * (EXAMPLES - 1))
    batches = draws.multivariate_normal(np.zeros(4), factor * of_examples, size=4000)
    sampled, again = batches + draws.multivariate_normal(np.zeros(4), of_attack / BATCH, size=(2, 4000))
    start = point(
        np.diag(LAM), np.full((4, 4), np.nan), GRADIENT, slopes=ROTATED, sampled=sampled, again=again
    )
    settings = {"perturbation": {"_target_": "AWP"}, "sampling.replacement": False}
    found = predicted_laws(ensemble(start=start, **settings))["refreshed"].variance
    known = point(np.diag(LAM), of_examples, GRADIENT, slopes=ROTATED, attack=of_attack)
    expected = predicted_laws(ensemble(start=known, **settings | {"perturbation": None}))[
        "refreshed"
    ].variance
    np.testing.assert_allclose(found[1:], expected[1:], rtol=MC_SIGMAS * np.sqrt(2 / 4000))
    # counting all noise as the examples' would be far off
    joined = point(np.diag(LAM), start.sampled_noise / factor, GRADIENT, slopes=ROTATED)
    wrong = predicted_laws(ensemble(start=joined, **settings | {"perturbation": None}))["refreshed"].variance
    assert (wrong[-1] < 0.7 * expected[-1]).all()


def test_a_perturbed_ensemble_without_sampled_batches_is_refused():
    with pytest.raises(RecordError, match=r"start\.noise_batches=256"):
        predicted_laws(ensemble(perturbation={"_target_": "AWP"}))


def test_adam_is_momentum_sgd_with_another_rate():
    optimizer = {"_target_": "torch.optim.Adam", "betas": [MU, 0.999], "weight_decay": OMEGA}
    adam = recorded(
        point(np.diag(LAM), noise(), GRADIENT),
        np.zeros((5, len(STEPS), 4)),
        STEPS,
        RATES * 10,
        optimizer=optimizer,
    )
    found, expected = predicted_laws(adam), predicted_laws(ensemble())
    for name in ("stationary", "slow_mode", "exact"):
        np.testing.assert_allclose(found[name].variance, expected[name].variance, **EXACT64)
    assert "refreshed" not in found  # no slopes were measured


def test_directions_without_a_stationary_law_have_none():
    start = point(np.diag([5.0, -1.0, 500.0, 0.5]), noise(), GRADIENT)  # negative; beyond 2 (1 + μ) / η
    laws = predicted_laws(ensemble(start=start))
    assert np.isnan(laws["stationary"].variance[:5, 1:3]).all()
    assert np.isfinite(laws["stationary"].variance[:, [0, 3]]).all()
    assert np.isfinite(laws["exact"].variance).all()


def test_the_error_of_slopes_is_carried_through():
    """In one stationary direction σ² ∝ 1/λ to leading order, so that 5 % of λ are 5 % of σ²."""
    start = point([[2.0]], np.array([[1.0]]), [0.0], slopes=[[2.0]], errors=0.1)
    lone = recorded(start, np.zeros((5, 1, 1)), [150], np.full(150, 5e-3))
    found = refreshed_with_error(lone, draws=100, seed=0)[:, 0, 0]
    assert found.std() / found.mean() == pytest.approx(0.05, rel=0.25)  # a deviation of 100 draws: 7 %


@pytest.fixture(scope="module")
def replicas():
    return simulate(ROTATED, noise() / BATCH, GRADIENT, RATES, STEPS, replicas=400, seed=1)[0]


def compared(replicas, name, **changes):
    law = predicted_laws(ensemble(replicas))[name]
    return agreement(replicas, law, **({"confidence": 0.95, "resamples": 200, "seed": 0} | changes))


def test_the_right_law_agrees(replicas):
    found = compared(replicas, "refreshed")
    rows = slice(1, None)
    assert np.isnan(found.geometric_mean[0])  # nothing has moved at step 0
    assert (found.directions[rows] == 4).all()
    error = np.sqrt(2 / 399 / 4)  # of four independent log-variances; correlated ones have up to twice that
    assert (np.abs(np.log(found.geometric_mean[rows])) < 4 * 2 * error).all()
    assert (found.geometric_low < found.geometric_high)[rows].all()
    # 28 intervals of 95 %, correlated in time
    inside = (found.low < found.predicted) & (found.predicted < found.high)
    assert inside[rows].mean() > 0.75
    assert (np.abs(found.offset[rows]) < 5 * found.offset_error).all()
    assert (found.correlation_misfit[rows] < 4).all()
    assert (found.commuting_misfit[rows] > 20).any()
    surprise = (found.total_correlation - found.total_correlation_expected) / found.total_correlation_spread
    assert (np.abs(surprise[rows]) < 5).all()
    assert (found.total_correlation_commuting < found.total_correlation)[rows].all()


def test_the_wrong_law_does_not(replicas):
    found = compared(replicas, "exact")
    assert (found.geometric_high[3:] < 0.95).all()  # held back more than the Hessian says
    stationary = compared(replicas, "stationary")
    assert stationary.geometric_mean[5] > 3  # right after the decay
    assert np.isnan(stationary.correlation_misfit).all()


def test_replicas_that_see_other_slopes_and_noise_say_so():
    """The replicas' gradients have 0.6 of the start's slope and twice its noise."""
    x, g = simulate(0.6 * ROTATED, 2 * noise() / BATCH, GRADIENT, RATES, WITH_PAIRS, replicas=400, seed=5)
    start = point(np.diag(LAM), noise(), GRADIENT, slopes=ROTATED)
    seen = recorded(start, x, WITH_PAIRS, RATES, gradient=g)
    own = own_gradients(seen)
    assert own.step.tolist() == [10, 60, 61, 70, 100]
    # 0.4 of J x is taken for noise, which is small beside the noise
    assert (np.abs(own.noise - 2) < 5 * own.noise_error).all()
    assert (np.abs(own.slope - 0.6) < 5 * own.slope_error).all()
    assert (own.noise_error < 0.12).all()
    assert (own.slope_error < 0.2).all()


def test_gradients_in_a_row_are_needed():
    assert own_gradients(ensemble()).empty  # no gradients recorded
    x, g = simulate(ROTATED, noise() / BATCH, GRADIENT, RATES, WITH_PAIRS, replicas=20, seed=5)
    start = point(np.diag(LAM), noise(), GRADIENT, slopes=ROTATED)
    shuffled = recorded(start, x, WITH_PAIRS, RATES, gradient=g, **{"sampling.replacement": False})
    assert own_gradients(shuffled).empty
    without = point(np.diag(LAM), noise(), GRADIENT)
    assert own_gradients(recorded(without, x, WITH_PAIRS, RATES, gradient=g)).empty


def test_statistics_of_known_samples():
    """Independent Gaussian replicas of the law itself: intervals have their confidence, the ratio no bias."""
    draws = np.random.default_rng(3)
    k, few, repeats = 6, 8, 100
    law = Law(name="known", mean=np.zeros((1, k)), covariance=np.diag(np.arange(1.0, k + 1))[None])
    ratios, inside, covered = [], [], []
    for seed in range(repeats):
        x = draws.standard_normal((few, 1, k)) * np.sqrt(np.arange(1.0, k + 1))
        found = agreement(x, law, confidence=0.9, resamples=50, seed=seed)
        ratios.append(np.log(found.geometric_mean[0]))
        inside.append((found.low < found.predicted) & (found.predicted < found.high))
        covered.append(found.geometric_low[0] < 1 < found.geometric_high[0])
    assert np.mean(ratios) == pytest.approx(0, abs=4 * np.std(ratios) / np.sqrt(repeats))
    assert np.mean(inside) == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / (k * repeats)))
    # the bootstrap of eight replicas is known to be narrow
    assert 0.7 < np.mean(covered) <= 1


def test_three_replicas_have_an_interval():
    """One resample in nine repeats a single replica, which has no variance."""
    x = np.random.default_rng(0).standard_normal((3, 1, 2))
    law = Law(name="known", mean=np.zeros((1, 2)), covariance=np.eye(2)[None])
    found = agreement(x, law, confidence=0.9, resamples=100, seed=0)
    assert 0 < found.geometric_low[0] < found.geometric_mean[0] < found.geometric_high[0] < np.inf


def test_too_few_replicas_are_refused(replicas):
    law = predicted_laws(ensemble())["exact"]
    with pytest.raises(ValueError, match="at least 3"):
        agreement(replicas[:2], law, confidence=0.95, resamples=10, seed=0)
    with pytest.raises(ValueError, match="the law"):
        agreement(replicas[:, 1:], law, confidence=0.95, resamples=10, seed=0)
