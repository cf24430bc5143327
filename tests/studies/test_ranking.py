"""Coefficients against loops over pairs written out, SciPy, and tables whose answers can be counted."""

import itertools
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robustdyn.studies.shared.ranking import (
    Design,
    average,
    concordance,
    conditional_information,
    granulated,
    hoeffding_weights,
    interval_over_seeds,
    interval_over_settings,
    sign_errors,
    tau,
    within_category,
)
from tests.tolerances import EXACT64

EXACT = {"rel": EXACT64["rtol"], "abs": EXACT64["atol"]}
FACTORS = {"method": ("at", "awp", "trades"), "batch": ("16", "64"), "decay": ("0", "5e-4")}


def crossed(seeds=2, **factors):
    """All combinations of the levels, with so many seeds each."""
    factors = factors or FACTORS
    rows = [(*levels, seed) for levels in itertools.product(*factors.values()) for seed in range(seeds)]
    frame = pd.DataFrame(rows, columns=[*factors, "seed"])
    return Design(frame[list(factors)], frame["seed"].tolist())


def noisy(design, rng, strength=1.0):
    """A measure and a target that share some of what moves them."""
    common = sum(design.codes([factor]) for factor in design.factors) + rng.normal(size=len(design.levels))
    measure = common + strength * rng.normal(size=len(common))
    return measure.round(1), (common + strength * rng.normal(size=len(common))).round(1)  # some are tied


def sign(difference):
    return int(difference > 0) - int(difference < 0)


def pairs_apart(design, factor):
    """Ordered pairs that differ in this factor only, by looking at every level."""
    rows = design.levels.to_dict("records")
    for i, j in itertools.permutations(range(len(rows)), 2):
        differing = [name for name in design.factors if rows[i][name] != rows[j][name]]
        if differing == [factor] and design.seeds[i] == design.seeds[j]:
            yield i, j


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture(params=[0, 1, 2])
def sample(request):
    design = crossed()
    return design, *noisy(design, np.random.default_rng(request.param))


# ---------------------------------------------------------------------- against loops written out


def test_tau_is_the_mean_over_pairs(sample):
    _, measure, target = sample
    pairs = list(itertools.combinations(range(len(measure)), 2))
    expected = mean(sign(measure[i] - measure[j]) * sign(target[i] - target[j]) for i, j in pairs)
    assert tau(concordance(measure, target)) == pytest.approx(expected, **EXACT)


def test_tau_without_ties_is_that_of_scipy():
    rng = np.random.default_rng(5)
    measure = rng.normal(size=40)
    target = measure + rng.normal(size=40)
    expected = stats.kendalltau(measure, target).statistic
    assert tau(concordance(measure, target)) == pytest.approx(expected, **EXACT)


def test_the_granulated_coefficient_averages_tau_over_the_settings_of_the_other_factors(sample):
    design, measure, target = sample
    frame = design.levels.assign(seed=design.seeds, measure=measure, target=target)
    found = granulated(design, concordance(measure, target))
    for factor in FACTORS:
        others = [name for name in (*FACTORS, "seed") if name != factor]
        expected = mean(
            mean(
                sign(a.measure - b.measure) * sign(a.target - b.target)
                for a, b in itertools.combinations(own.itertuples(), 2)
            )
            for _, own in frame.groupby(others)
        )
        assert found[factor] == pytest.approx(expected, **EXACT)
    assert average(found.values()) == pytest.approx(mean(found.values()), **EXACT)


def test_the_within_category_value_averages_tau_over_the_levels(sample):
    design, measure, target = sample
    found = within_category(design, concordance(measure, target))
    for factor, levels in FACTORS.items():
        inside = [np.flatnonzero(design.levels[factor] == level) for level in levels]
        expected = mean(
            mean(
                sign(measure[i] - measure[j]) * sign(target[i] - target[j])
                for i, j in itertools.combinations(rows, 2)
            )
            for rows in inside
        )
        assert found[factor] == pytest.approx(expected, **EXACT)


def entropy(counts):
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_conditional_information_is_the_least_share_of_entropy_explained(sample):
    design, measure, target = sample
    rows = design.levels.to_dict("records")
    shares = []
    for chosen in itertools.chain.from_iterable(itertools.combinations(FACTORS, size) for size in range(3)):
        seen = [
            (
                tuple((rows[i][name], rows[j][name]) for name in chosen),
                sign(measure[i] - measure[j]),
                sign(target[i] - target[j]),
            )
            for i, j in itertools.permutations(range(len(rows)), 2)
        ]
        given = entropy(Counter(u for u, _, _ in seen))
        of_target = entropy(Counter((u, g) for u, _, g in seen)) - given
        of_measure = entropy(Counter((u, v) for u, v, _ in seen)) - given
        shares.append((of_measure + of_target + given - entropy(Counter(seen))) / of_target)
    # differences of entropies of a few nats
    assert conditional_information(design, measure, target) == pytest.approx(min(shares), abs=1e-12)


def test_sign_errors_are_weighted_means_over_the_pairs_of_each_environment(sample):
    design, measure, target = sample
    error = (target - target.min()) / np.ptp(target)
    found = sign_errors(design, concordance(measure, error), hoeffding_weights(error, 1400), fewest=1.5)
    rows = design.levels.to_dict("records")
    expected = {}
    for factor, levels in FACTORS.items():
        for a, b in itertools.combinations(levels, 2):
            for other in FACTORS:
                for level in FACTORS[other] if other != factor else ():
                    weights, wrong = [], []
                    for i, j in pairs_apart(design, factor):
                        if (rows[i][factor], rows[j][factor], rows[i][other]) != (a, b, level):
                            continue
                        p = 2 * math.exp(-2 * 1400 * ((error[i] - error[j]) / 2) ** 2)
                        weights.append(max(max(0.0, 1 - p) ** 2 - 0.5, 0.0))
                        agree = sign(measure[i] - measure[j]) * sign(error[i] - error[j])
                        wrong.append((1 - agree) / 2)
                    if any(weights) and sum(weights) ** 2 / sum(w**2 for w in weights) >= 1.5:
                        of_pairs = sum(w * e for w, e in zip(weights, wrong, strict=True)) / sum(weights)
                        expected[factor, f"{a} → {b}", f"{other}={level}"] = of_pairs
    assert len(expected) > 10
    assert any(0 < value < 1 for value in expected.values())
    keys = list(zip(found["factor"], found["change"], found["given"], strict=True))
    assert dict(zip(keys, found["sign_error"], strict=True)) == pytest.approx(expected, rel=1e-12, abs=1e-12)


# ---------------------------------------------------------------------- tables whose answers can be counted


@pytest.mark.parametrize(("factor", "expected", "wrong"), [(1.0, 1.0, 0.0), (-1.0, -1.0, 1.0)])
def test_a_measure_that_knows_the_order_or_its_reverse(factor, expected, wrong):
    design = crossed()
    target = np.random.default_rng(0).permutation(len(design.levels)) / len(design.levels)
    concordant = concordance(factor * np.exp(target), target)
    assert tau(concordant) == expected
    assert set(granulated(design, concordant).values()) == {expected}
    assert set(within_category(design, concordant).values()) == {expected}
    assert conditional_information(design, factor * np.exp(target), target) == pytest.approx(1.0, rel=1e-12)
    errors = sign_errors(design, concordant, hoeffding_weights(target, 10_000), fewest=1.0)
    assert set(errors["sign_error"]) == {wrong}


def test_an_unrelated_measure_tells_almost_nothing():
    rng = np.random.default_rng(0)
    design = crossed(seeds=20)
    measure, target = rng.normal(size=(2, 240))
    # the standard deviation of tau over 240 independent pairs of values is 0.043
    assert abs(tau(concordance(measure, target))) < 0.13
    assert 0 <= conditional_information(design, measure, target) < 0.01
    levels = design.codes(["method"])
    # what a measure has from a factor alone is nothing once that factor is known, but for ties
    assert conditional_information(design, levels, levels + 0.001 * target) < 1e-12
    assert tau(concordance(levels, levels + 0.001 * target)) > 0.6


def test_a_measure_may_order_all_runs_well_and_each_seed_wrong():
    """Simpson's paradox: a seed moves measure and gap together, and the factor moves them apart."""
    design = crossed(seeds=3, method=("at", "awp"))
    measure, target = [0, 10, 20, 1, 11, 21], [1, 11, 21, 0, 10, 20]
    concordant = concordance(measure, target)
    assert tau(concordant) == pytest.approx((12 - 3) / 15)  # three pairs of one seed, twelve of two
    assert granulated(design, concordant) == {"method": -1.0}


def test_a_factor_may_carry_the_whole_order():
    """The method moves both by ten and the batch moves them apart by one, worked out by hand."""
    design = crossed(seeds=1, method=("at", "awp"), batch=("16", "64"))
    concordant = concordance([0, 1, 10, 11], [1, 0, 11, 10])
    assert tau(concordant) == pytest.approx(2 / 6)
    assert granulated(design, concordant) == {"method": 1.0, "batch": -1.0}
    assert average(granulated(design, concordant).values()) == 0.0
    assert within_category(design, concordant) == {"method": -1.0, "batch": 1.0}
    errors = sign_errors(design, concordant, np.ones((4, 4)), fewest=1.0)
    assert errors.values.tolist() == [
        ["method", "at → awp", "batch=16", 1.0, 0.0],
        ["method", "at → awp", "batch=64", 1.0, 0.0],
        ["batch", "16 → 64", "method=at", 1.0, 1.0],
        ["batch", "16 → 64", "method=awp", 1.0, 1.0],
    ]


def test_conditioning_takes_away_what_a_factor_explains():
    """Two runs: given both batch sizes the order of the gap is settled, and that set is left out."""
    design = crossed(seeds=1, batch=("16", "64"))
    assert conditional_information(design, [0, 1], [0, 1]) == pytest.approx(1.0, rel=1e-12)
    assert math.isnan(conditional_information(design, [0, 1], [2, 2]))  # no order to explain


def test_ties_count_as_neither():
    concordant = concordance([0, 0, 1], [0, 1, 2])
    assert tau(concordant) == pytest.approx(2 / 3)
    assert math.isnan(tau(concordance([1.0], [1.0])))


def test_hoeffding_weights_worked_out():
    """The least difference that counts on m images is sqrt(2 / m · ln(2 / (1 − √½)))."""
    least = math.sqrt(2 / 1400 * math.log(2 / (1 - math.sqrt(0.5))))
    assert least == pytest.approx(0.0524, abs=1e-4)
    weights = hoeffding_weights([0.0, 0.999 * least, 1.001 * least, 0.5], 1400)
    assert weights[0, 1] == 0
    assert 0 < weights[0, 2] < 0.01
    assert weights[0, 3] == pytest.approx(0.5)
    np.testing.assert_array_equal(weights, weights.T)


def test_with_one_factor_there_is_nothing_further_to_hold():
    errors = sign_errors(crossed(seeds=1, batch=("16", "64")), np.ones((2, 2)), np.ones((2, 2)), fewest=1.0)
    assert errors["given"].tolist() == [""]


def test_environments_with_few_pairs_are_left_out():
    design = crossed(seeds=2)
    ones = np.ones((24, 24))
    pairs = sign_errors(design, ones, ones, fewest=1.0)["pairs"]
    assert sorted(set(pairs)) == [4.0, 6.0]  # two seeds, and two or three settings
    assert set(sign_errors(design, ones, ones, fewest=5.0)["pairs"]) == {6.0}
    assert sign_errors(design, ones, ones).empty


# ---------------------------------------------------------------------- intervals


def test_the_bootstrap_draws_whole_seeds():
    """Two seeds have three distinct draws, of probability ¼, ½ and ¼: the interval is their range."""
    design = crossed(seeds=2)
    concordant = concordance(*noisy(design, np.random.default_rng(3)))
    seeds = np.array(design.seeds)
    alone = [float(tau(concordant[np.ix_(seeds == seed, seeds == seed)])) for seed in (0, 1)]
    low, high = interval_over_seeds(design, lambda weights: tau(concordant, weights))
    three = [*alone, float(tau(concordant))]
    assert (low, high) == pytest.approx((min(three), max(three)), **EXACT)
    one = design.of(seeds == 0)
    first = concordant[np.ix_(seeds == 0, seeds == 0)]
    assert np.isnan(interval_over_seeds(one, lambda weights: tau(first, weights))).all()


def test_the_bootstrap_of_many_seeds_is_that_of_their_mean():
    """A mean over seeds has the bootstrap's known standard deviation; 8 seeds, and a normal quantile."""
    design = crossed(seeds=8, method=("at", "awp"))
    own = np.random.default_rng(2).normal(size=8)
    values = own[np.array(design.seeds)]
    low, high = interval_over_seeds(design, lambda w: (w @ values) / w.sum(axis=-1))
    half = 1.96 * own.std() / np.sqrt(8)
    # 2,000 draws, and the mean of eight is not quite normal
    assert (low, high) == pytest.approx((own.mean() - half, own.mean() + half), abs=0.1 * half)


def test_the_jackknife_leaves_out_settings_with_all_their_seeds():
    """Of a mean it is Student's interval of the settings' own means."""
    design = crossed(seeds=2)
    values = np.random.default_rng(4).normal(size=24)
    of_settings = values.reshape(12, 2).mean(axis=1)
    expected = stats.t.interval(0.95, 11, of_settings.mean(), stats.sem(of_settings))
    found = interval_over_settings(design, lambda w: (w @ values) / w.sum(axis=-1))
    assert found == pytest.approx(expected, rel=1e-12)
    few = crossed(seeds=2, method=("at", "awp"))
    assert np.isnan(interval_over_settings(few, lambda w: w.mean(axis=-1))).all()


def test_a_weight_of_two_is_a_run_taken_twice_without_the_pair_of_its_copies():
    rng = np.random.default_rng(6)
    measure, target = rng.normal(size=(2, 5))
    weights = np.array([[2.0, 1, 0, 1, 1], [1, 1, 1, 1, 1]])
    rows = [0, 0, 1, 3, 4]
    kept = [(i, j) for i, j in itertools.combinations(range(5), 2) if rows[i] != rows[j]]
    expected = mean(
        sign(measure[rows[i]] - measure[rows[j]]) * sign(target[rows[i]] - target[rows[j]]) for i, j in kept
    )
    concordant = concordance(measure, target)
    assert tau(concordant, weights) == pytest.approx([expected, float(tau(concordant))], **EXACT)
