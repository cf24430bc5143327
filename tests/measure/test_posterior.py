"""Tests the run's posterior against the recursion of momentum SGD's covariance, step by step."""

import numpy as np
import pandas as pd
import pytest

from robustdyn.measure import posterior_rows
from robustdyn.replicas import Sampling
from robustdyn.theory import (
    MeasuredDrift,
    propagate_coupled,
    shuffled_covariance,
    stationary_state_covariance,
)
from tests.tolerances import EXACT64

MU, OMEGA = 0.9, 5e-4
STEPS_PER_EPOCH = 10
EXAMPLES, BATCH = 145, 15  # the last batch has ten
ERROR = 1e-4  # standard errors, relative


def tables(epochs, rates, spectrum, attack=0.3, slopes=()):
    """``rates`` as (first epoch, lr), measured at an epoch's end: ``spectrum`` as (epoch, index, λ, γ).

    ``slopes`` as (epoch, index, J).
    """
    ends = [(e + 1) * STEPS_PER_EPOCH for e in range(epochs)]
    return {
        "epochs": pd.DataFrame({"epoch": range(epochs), "step": ends}),
        "rates": pd.DataFrame([{"epoch": e, "step": e * STEPS_PER_EPOCH, "lr": lr} for e, lr in rates]),
        "spectrum": pd.DataFrame(
            [
                {
                    "epoch": e,
                    "step": ends[e],
                    "index": i,
                    "curvature": lam,
                    "curvature_se": ERROR * abs(lam),
                    "gradient_noise": gamma,
                    "gradient_noise_se": ERROR * gamma,
                    "attack_noise": attack * gamma,
                }
                for e, i, lam, gamma in spectrum
            ]
        ),
        "slopes": pd.DataFrame(
            [(e, i, slope, ERROR * slope) for e, i, slope in slopes],
            columns=["epoch", "index", "refreshed_slope", "refreshed_slope_se"],
        ),
        "bounds": pd.DataFrame([{"train_examples": EXAMPLES, "batch_size": BATCH}]),
    }


def posterior(given, interpolation="piecewise_constant"):
    rows = posterior_rows(given, momentum=MU, weight_decay=OMEGA, interpolation=interpolation)
    return pd.DataFrame(rows).pivot(index="epoch", columns="index")


def recursion(lam, gamma, eta, state=None, first=0):
    """σ² at the epochs' ends from λ, γ, η of each step, as theory.md writes SGD: v ← μv + g, θ ← θ − ηv."""
    state, variances = np.zeros((2, 2)) if state is None else state, []
    for value, g, h in zip(lam, gamma, eta, strict=True):
        c = value + OMEGA
        move = np.array([[1 - h * c, -h * MU], [c, MU]])
        kick = np.array([-h, 1.0])
        state = move @ state @ move.T + g * np.outer(kick, kick)
        variances.append(state[0, 0])
    return np.array(variances)[STEPS_PER_EPOCH - 1 - first % STEPS_PER_EPOCH :: STEPS_PER_EPOCH]


def test_follows_every_step_of_the_run():
    given = tables(30, [(0, 0.1), (12, 0.01)], [(0, 0, 5.0, 0.2), (9, 0, 8.0, 0.3), (20, 0, 6.0, 0.1)])
    step = np.arange(300)
    # a measurement after epoch e holds from step 10 (e + 1) on; before the first one its values are held
    lam = np.select([step < 100, step < 210], [5.0, 8.0], 6.0)
    gamma = np.select([step < 100, step < 210], [0.2, 0.3], 0.1)
    truth = recursion(lam, gamma, np.where(step < 120, 0.1, 0.01))
    found = posterior(given)["posterior_variance_independent"][0]
    np.testing.assert_allclose(found, truth, rtol=EXACT64["rtol"])


def test_log_linear_draws_straight_lines_in_the_logarithm():
    given = tables(20, [(0, 0.05)], [(4, 0, 2.0, 0.1), (14, 0, 8.0, 0.4)])
    step = np.arange(200)
    share = np.clip((step - 50) / 100, 0, 1)
    truth = recursion(2.0 * 4.0**share, 0.1 * 4.0**share, np.full(200, 0.05))
    found = posterior(given, "log_linear")["posterior_variance_independent"][0]
    np.testing.assert_allclose(found, truth, rtol=EXACT64["rtol"])


def test_log_linear_lines_are_the_measurements_own_after_a_change_of_sign():
    """λ from 0.2 through -0.1 to 0.31: straight in the value, equation (24), also once positive again."""
    given = tables(30, [(0, 0.05)], [(0, 0, 0.2, 0.1), (9, 0, -0.1, 0.2), (19, 0, 0.31, 0.4)])
    step = np.arange(300)
    lam = np.interp(step, [10, 100, 200], [0.2, -0.1, 0.31])
    gamma = np.exp(np.interp(step, [10, 100, 200], np.log([0.1, 0.2, 0.4])))
    first = int(np.argmax((step > 100) & (lam + OMEGA > 0)))
    found = posterior(given, "log_linear")["posterior_variance_independent"][0]
    settled = stationary_state_covariance(
        lam[first], gamma[first], learning_rate=0.05, momentum=MU, weight_decay=OMEGA
    )
    truth = recursion(lam[first:], gamma[first:], np.full(300 - first, 0.05), settled, first)
    assert found[5:13].isna().any()
    later = slice(first // STEPS_PER_EPOCH + 1, None)
    np.testing.assert_allclose(found[later], truth[-len(found[later]) :], rtol=1e-9)


def test_lags_behind_the_stationary_law_after_a_decay_and_reaches_it():
    given = tables(200, [(0, 0.1), (50, 0.01)], [(0, 0, 2.0, 0.2)])
    found = posterior(given)
    exact, stationary = (found[f"posterior_variance_{law}"][0] for law in ("independent", "stationary"))
    curvature = 2.0 + OMEGA
    for epoch, eta in ((49, 0.1), (199, 0.01)):
        law = eta * 0.2 * (1 + MU) / (curvature * (1 - MU) * (2 * (1 + MU) - eta * curvature))
        assert stationary[epoch] == pytest.approx(law, rel=1e-12)
        assert exact[epoch] == pytest.approx(law, rel=1e-6)  # 500 steps of a memory of 50 or fewer
    assert stationary[50] < exact[50] < stationary[49]


@pytest.mark.parametrize("attack", [0.0, 0.3, 1.0])
def test_batches_of_shuffled_epochs_are_those_of_the_coupled_law(attack):
    given = tables(12, [(0, 0.1), (7, 0.01)], [(0, 0, 2.0, 0.2)], attack)
    factor = (EXAMPLES - BATCH) / (BATCH * (EXAMPLES - 1))
    drift = MeasuredDrift(
        step=[0],
        slope=np.full((1, 1, 1), 2.0),
        example_noise=np.full((1, 1, 1), (1 - attack) * 0.2 / factor),
        attack_noise=np.full((1, 1, 1), attack * 0.2 * BATCH),
        gradient=[0.0],
        interpolation="piecewise_constant",
    )
    law = propagate_coupled(
        drift,
        [0.1] * 70 + [0.01] * 50,
        sampling=Sampling(examples=EXAMPLES, batch_size=BATCH, replacement=False, drop_last=False).batches(
            120
        ),
        momentum=MU,
        weight_decay=OMEGA,
        record_steps=np.arange(10, 121, 10),
    )
    found = posterior(given)
    np.testing.assert_allclose(found["posterior_variance"][0], law.variance[:, 0], rtol=1e-9)
    if attack < 1:  # with the small rate an epoch is short, and shuffling takes back most of its noise
        slow = found[7:]
        assert (slow["posterior_variance"] < slow["posterior_variance_independent"]).all(axis=None)


@pytest.mark.parametrize("later", [29, 145, 10])
def test_a_branch_with_another_batch_size_keeps_that_of_its_run_before_the_fork(later):
    given = tables(12, [(0, 0.1)], [(0, 0, 2.0, 0.2)])
    steps = np.array([10] * 6 + [-(-EXAMPLES // later)] * 6)
    given["epochs"]["step"] = steps.cumsum()
    given["bounds"] = pd.DataFrame({"train_examples": EXAMPLES, "batch_size": [BATCH, BATCH, later]})
    batch = np.repeat([BATCH] * 6 + [later] * 6, steps)
    sizes = batch.copy()
    sizes[steps.cumsum() - 1] -= steps * batch[steps.cumsum() - 1] - EXAMPLES
    factor = (EXAMPLES - batch) / (batch * (EXAMPLES - 1))
    law = shuffled_covariance(
        np.full(len(batch), 2.0),
        np.divide(0.7 * 0.2, factor, out=np.zeros(len(batch)), where=factor > 0),
        0.3 * 0.2 * batch,
        np.full(len(batch), 0.1),
        examples=EXAMPLES,
        sizes=sizes,
        epoch_ends=steps.cumsum(),
        momentum=MU,
        weight_decay=OMEGA,
        initial_covariance=np.zeros((2, 2)),
    )
    found = posterior(given)["posterior_variance"][0]
    np.testing.assert_allclose(found, law[steps.cumsum() - 1, 0, 0], rtol=EXACT64["rtol"])


def test_epochs_of_a_batch_size_that_is_not_recorded_take_no_example_twice():
    """Batches of 100 give an epoch of 145 examples two steps, and it had ten: of 14 examples each."""
    found, wanted = (tables(3, [(0, 0.1)], [(0, 0, 2.0, 0.2)]) for _ in range(2))
    found["bounds"]["batch_size"], wanted["bounds"]["batch_size"] = 100, 14
    pd.testing.assert_frame_equal(posterior(found), posterior(wanted))


def test_the_part_of_each_law_that_is_left_is_the_law_without_later_noise():
    """Two decays; from the last one before an epoch's end on, the truth draws no noise."""
    given = tables(30, [(0, 0.1), (12, 0.01), (20, 0.001)], [(0, 0, 1.0, 0.2), (15, 0, 2.0, 0.3)])
    found, step = posterior(given), np.arange(300)
    lam, gamma = np.where(step < 160, 1.0, 2.0), np.where(step < 160, 0.2, 0.3)
    eta = np.select([step < 120, step < 200], [0.1, 0.01], 0.001)
    factor = (EXAMPLES - BATCH) / (BATCH * (EXAMPLES - 1))
    sizes = np.where(step % 10 == 9, 10, 15)
    for since, epochs in ((0, slice(0, 12)), (120, slice(12, 20)), (200, slice(20, 30))):
        noise = gamma * (step < since)
        independent = recursion(lam, noise, eta)[epochs]
        np.testing.assert_allclose(
            found["propagated_variance_independent"][0][epochs], independent, rtol=EXACT64["rtol"]
        )
        shuffled = shuffled_covariance(
            lam,
            0.7 * noise / factor,
            0.3 * noise * BATCH,
            eta,
            examples=EXAMPLES,
            sizes=sizes,
            epoch_ends=np.arange(10, 301, 10),
            momentum=MU,
            weight_decay=OMEGA,
            initial_covariance=np.zeros((2, 2)),
        )
        left = shuffled[9::10, 0, 0][epochs]
        np.testing.assert_allclose(found["propagated_variance"][0][epochs], left, rtol=EXACT64["rtol"])
    for law in ("", "_independent"):
        parts = found["propagated_variance" + law] + found["injected_variance" + law]
        # a difference and a sum, each rounded once
        np.testing.assert_allclose(parts, found["posterior_variance" + law], rtol=2e-16)
        assert (found["injected_variance" + law] > 0).all(axis=None)


def test_smooth_schedules_inject_all_of_the_variance():
    cosine = [(e, 0.05 * (1 + np.cos(np.pi * e / 20))) for e in range(20)]
    found = posterior(tables(20, cosine, [(0, 0, 5.0, 0.2)]))
    assert (found["propagated_variance"] == 0).all(axis=None)
    np.testing.assert_array_equal(found["injected_variance"], found["posterior_variance"])


def test_a_fall_within_an_epoch_is_found_at_its_step():
    """A short last epoch of the old rate: the fall after 124 of 300 steps."""
    given = tables(30, [(0, 0.1)], [(0, 0, 1.0, 0.2)])
    given["rates"] = pd.DataFrame({"epoch": [0, 12], "step": [0, 124], "lr": [0.1, 0.01]})
    step = np.arange(300)
    truth = recursion(np.full(300, 1.0), 0.2 * (step < 124), np.where(step < 124, 0.1, 0.01))
    found = posterior(given)["propagated_variance_independent"][0]
    np.testing.assert_allclose(found[12:], truth[12:], rtol=EXACT64["rtol"])
    assert (found[:12] == 0).all()


def test_training_has_the_slope_where_it_was_measured_and_the_papers_have_the_curvature():
    rates, measured = [(0, 0.1), (7, 0.01)], [(0, 0, 2.0, 0.2), (5, 0, 2.5, 0.3)]
    plain = posterior(tables(12, rates, measured))
    found = posterior(tables(12, rates, measured, slopes=[(0, 0, 3.0), (5, 0, 4.0)]))
    steep = posterior(tables(12, rates, [(0, 0, 3.0, 0.2), (5, 0, 4.0, 0.3)]))
    for part in ("posterior_variance", "propagated_variance", "injected_variance"):
        np.testing.assert_array_equal(found[part], steep[part])
        np.testing.assert_array_equal(found[f"{part}_independent"], plain[f"{part}_independent"])
    np.testing.assert_array_equal(
        found["posterior_variance_stationary"], plain["posterior_variance_stationary"]
    )
    assert list(found["slope"][0]) == [3.0] * 5 + [4.0] * 7
    assert list(plain["slope"][0]) == [2.0] * 5 + [2.5] * 7
    assert found["attack_follows"].all(axis=None)
    assert not plain["attack_follows"].any(axis=None)


def test_slopes_of_some_epochs_only_are_not_mixed_with_curvature():
    measured = [(0, 0, 2.0, 0.2), (5, 0, 2.5, 0.3)]
    pd.testing.assert_frame_equal(
        posterior(tables(12, [(0, 0.1)], measured, slopes=[(0, 0, 3.0)])),
        posterior(tables(12, [(0, 0.1)], measured)),
    )


def test_a_slope_too_steep_for_the_rate_takes_the_variance_from_training_alone():
    found = posterior(tables(4, [(0, 0.1)], [(0, 0, 2.0, 0.2)], slopes=[(0, 0, 50.0)]))
    assert found["posterior_variance"].isna().all(axis=None)
    assert found["posterior_variance_independent"].notna().all(axis=None)


def test_standard_errors_are_those_of_slope_and_noise():
    """After 2,000 steps the papers' law is the stationary one, whose derivatives are known."""
    curvature, eta, gamma = 2.0, 0.05, 0.2
    found = posterior(tables(200, [(0, eta)], [(0, 0, curvature, gamma)]))
    pull = curvature + OMEGA
    by_slope = eta / (2 * (1 + MU) - eta * pull) - 1 / pull
    relative = np.hypot(by_slope * ERROR * curvature, ERROR)
    last = found.loc[199]
    assert last["posterior_variance_independent_se", 0] == pytest.approx(
        relative * last["posterior_variance_independent", 0],
        rel=1e-3,  # a difference over 1e-4 of the curvature
    )
    # the variance is proportional to the noise, whose errors alone are that large
    assert (found["posterior_variance_se"] >= ERROR * found["posterior_variance"] * (1 - 1e-9)).all(axis=None)


def test_directions_go_their_own_ways():
    given = tables(5, [(0, 0.1)], [(0, 0, 5.0, 0.2), (0, 1, 1.0, 0.1)])
    found = posterior(given)["posterior_variance"]
    for index, lam, gamma in ((0, 5.0, 0.2), (1, 1.0, 0.1)):
        alone = posterior(tables(5, [(0, 0.1)], [(0, index, lam, gamma)]))["posterior_variance"]
        np.testing.assert_array_equal(found[index], alone[index])


def test_a_direction_without_a_law_has_no_variance_and_comes_back_settled():
    # λ = 50 overshoots at η = 0.1 (limit 38) and is stable at 0.01.
    given = tables(40, [(0, 0.1), (20, 0.01)], [(0, 0, 5.0, 0.2), (9, 0, 50.0, 0.2)])
    found = posterior(given)
    exact, stationary = (found[f"posterior_variance_{law}"][0] for law in ("independent", "stationary"))
    assert exact[:10].notna().all()
    assert exact[10:20].isna().all()
    assert stationary[10:20].isna().all()
    assert found["injected_variance"][0][10:20].isna().all()
    assert (found["propagated_variance"][0][20:] == 0).all()  # the law began again with the new rate
    np.testing.assert_allclose(exact[20:], stationary[20:], rtol=EXACT64["rtol"])


def test_nothing_measured_gives_nothing():
    given = tables(3, [(0, 0.1)], [(0, 0, 5.0, 0.0)])  # no noise, hence no variance and no law
    assert list(posterior_rows(given, momentum=MU, weight_decay=0.0, interpolation="log_linear")) == []
