from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml

from robustdyn.errors import RecordError
from robustdyn.records.reader import find_runs
from robustdyn.replicas import MeanPaths
from robustdyn.replicas.ensemble_record import write_families
from robustdyn.replicas.families import Families
from robustdyn.replicas.prediction import predicted_laws
from robustdyn.studies import ground_truth
from robustdyn.studies.shared.normality import normality
from robustdyn.studies.shared.study import conduct, load
from tests.replicas.ensembles import BATCH, point, recorded, simulate, write
from tests.tolerances import MC_SIGMAS

LAM = np.array([20.0, 8.0, 3.0])
SLOPES = np.array([[30.0, 2.0, 0.0], [2.0, 12.0, 0.5], [0.0, 0.5, 4.5]])
NOISE = np.diag(0.6 * LAM)
RATES = np.array([0.01] * 60 + [0.001] * 40)
STEPS = [0, 1, 9, 10, 59, 60, 61, 70, 99, 100]


def run_directory(path):
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"seed": 0}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run with two ensembles: plain, and with a weight perturbation."""
    run = run_directory(tmp_path_factory.mktemp("runs") / "run")
    x, g = simulate(SLOPES, NOISE / BATCH, np.zeros(3), RATES, STEPS, replicas=200, seed=2)
    draws = np.random.default_rng(0)
    sampled = draws.multivariate_normal(np.zeros(3), NOISE / BATCH, size=256)
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=SLOPES, errors=0.1, sampled=sampled)
    steeper = point(2 * np.diag(LAM), 3 * NOISE, np.zeros(3), slopes=1.5 * SLOPES, sampled=sampled)
    plain = recorded(start, x, STEPS, RATES, gradient=g, path=[start, steeper], path_steps=[60, 100])
    write(run / "replicas" / "last", plain)
    write(
        run / "replicas" / "awp",
        recorded(start, x, STEPS, RATES, gradient=g),
        perturbation={"_target_": "x.AWP"},
    )
    return run


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    """Enough to see that intervals are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_truth, "RESAMPLES", 60)
        patch.setattr(ground_truth, "DRAWS", 8)
        yield


@pytest.fixture(scope="module")
def answer(runs, few_resamples):
    return load("ground_truth").answer(find_runs(runs))


def test_the_law_that_made_the_replicas_agrees_and_the_other_does_not(answer):
    steps = answer.tables["agreement"]
    assert set(steps["ensemble"]) == {"Digits, AT", "Digits, AWP"}
    late = steps[(steps["ensemble"] == "Digits, AT") & (steps["step"] >= 10)].set_index(["law", "step"])
    assert late.loc["refreshed", "geometric_mean"].between(0.85, 1.15).all()  # 200 replicas: ± 6 %
    assert (late.loc["exact", "high"] < 0.9).any()
    assert late.loc[("stationary", 61), "geometric_mean"] > 3
    assert (late.loc["refreshed", "prediction_error"] > 0).all()
    assert late.loc["exact", "prediction_error"].isna().all()
    assert "refreshed_path" in late.index.get_level_values("law")


def test_replicas_of_a_linear_problem_are_gaussian(answer):
    """200 replicas of two ensembles that share their places."""
    tested = answer.tables["gaussianity"]
    own = tested[tested["ensemble"] == "Digits, AT"].set_index("step")
    assert own.index.tolist() == STEPS[1:]
    assert (own[["replicas", "directions"]] == [200, 3]).all(axis=None)
    # nine steps: the smallest of nine p-values is below this in 1 of 100 trials at most
    assert (own[["skewness_p", "kurtosis_p"]] > 0.01 / 9).all(axis=None)
    # Mardia's exact mean; the drawn one is off by 2 % of the spread
    assert own.loc[100, "kurtosis_expected"] == pytest.approx(15 * 199 / 201, abs=0.1)
    each = answer.tables["gaussianity_of_directions"]
    assert set(zip(each["step"], each["direction"], strict=True)) == {
        (s, d) for s in (60, 100) for d in (1, 2, 3)
    }
    smallest = each[each["ensemble"] == "Digits, AT"].groupby("step")[["skewness_p", "kurtosis_p"]].min()
    np.testing.assert_array_equal(own.loc[[60, 100], "smallest_p"], smallest.min(axis=1))
    assert "gaussianity" in {picture.name for picture in answer.pictures}
    assert any(
        text.startswith("Mardia's joint tests reject") and "of 18 recorded" in text
        for text in answer.findings
    )


def test_replicas_with_two_places_are_not(runs, tmp_path):
    run = run_directory(tmp_path / "run")
    draws = np.random.default_rng(7)
    x = draws.standard_normal((40, 3, 3)) * 0.2
    x += np.where(draws.random((40, 1, 3)) < 0.5, -1.0, 1.0)
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=SLOPES)
    write(run / "replicas" / "last", recorded(start, x, [1, 10, 20], np.full(20, 0.01)))
    tested = load("ground_truth").answer(find_runs(run)).tables["gaussianity"]
    assert (tested["kurtosis"] < tested["kurtosis_expected"]).all()
    assert (tested["kurtosis_p"] < 0.01).all()
    assert (tested["rejected"] >= 3).all()  # the kurtosis of each direction


def test_replicas_that_diverged_or_did_not_spread_have_no_test():
    places = np.random.default_rng(9).standard_normal((8, 3, 3))
    places[:, 0], places[2, 2] = 1.0, np.inf
    assert normality(places)["kurtosis"].notna().tolist() == [False, True, False]
    assert normality(places[:4])["kurtosis"].isna().all()  # four replicas of three directions
    assert normality(places[:4])["rejected"].notna().tolist() == [False, True, False]
    assert normality(places[:2])["rejected"].isna().all()


def test_children_tell_the_parents_places_from_noise(tmp_path):
    """Places with deviations 2 and noise with 0.5: 4 and 0.25 by direction, times its scale."""
    run = run_directory(tmp_path / "run")
    draws, scale = np.random.default_rng(8), np.array([1.0, 3.0, 0.1])
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=SLOPES)
    x = draws.standard_normal((8, 2, 3))
    write(run / "replicas" / "last", recorded(start, x, [1, 20], np.full(20, 0.01)))
    parents = 2 * draws.standard_normal((60, 1, 1, 3))
    places = (parents + 0.5 * draws.standard_normal((60, 4, 2, 3))) * scale
    families = Families(step=20, learning_rate=0.001, steps=np.array([0, 50]), places=places)
    write_families(run / "replicas" / "last", families)
    table = load("ground_truth").answer(find_runs(run)).tables["between_and_within"]
    assert table["direction"].tolist() == [1, 2, 3] * 2
    assert table["steps_after"].tolist() == [0] * 3 + [50] * 3
    for name, truth in (("between", 4.0), ("within", 0.25)):
        away = np.abs(table[name] - truth * np.tile(scale**2, 2)) / table[f"{name}_error"]
        assert (away < MC_SIGMAS).all()
    # of a variance from 60 parents, and from 60 times 3 degrees of freedom
    assert (table["between_error"] / table["between"]).between(0.1, 0.3).all()
    assert (table["within_error"] / table["within"]).between(0.05, 0.2).all()


def test_the_mean_and_the_mixture_stand_beside_the_other_laws(tmp_path):
    """Paths that are off the mean by a known number of deviations, and children that are far apart."""
    run = run_directory(tmp_path / "run")
    draws = np.random.default_rng(10)
    x, g = simulate(SLOPES, NOISE / BATCH, np.zeros(3), RATES, STEPS, replicas=30, seed=5)
    child = np.where(np.array(STEPS)[:, None] > 60, 9.0 * draws.standard_normal((30, 1, 3)), np.nan)
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=SLOPES, errors=0.1)
    plain = x.mean(axis=0) + np.array([1.0, -1.0])[:, None, None]
    e = recorded(start, x, STEPS, RATES, gradient=g)
    paths = MeanPaths(plain=plain, drifting=np.repeat(x.mean(axis=0)[None], 2, axis=0))
    write(run / "replicas" / "last", replace(e, mean_paths=paths, child=child))
    answered = load("ground_truth").answer(find_runs(run))
    table = answered.tables["agreement"].set_index(["law", "step"])
    sigma = np.sqrt(predicted_laws(e)["refreshed"].variance[STEPS.index(100)])
    assert table.loc[("noise_free", 100), "rms_mean_error"] == pytest.approx(np.sqrt(np.mean(1 / sigma**2)))
    assert table.loc[("drift", 100), "rms_offset"] == pytest.approx(0, abs=1e-9)
    assert table.loc[("mixture", 100), "geometric_mean"] < 0.01
    assert table.loc[("mixture", 100), "prediction_error"] == pytest.approx(np.sqrt(2 / 29 / 3), rel=0.5)
    assert table.loc[("mixture", 10), "geometric_mean"] == table.loc[("refreshed", 10), "geometric_mean"]
    assert table.loc[("injected", 100), "posterior_of"] == "one run"
    assert table.loc[("mixture", 100), "posterior_of"] == "runs"
    assert {"drift", "noise_free"}.isdisjoint(answered.tables["within_goal"]["law"])
    assert any("0.00 to 0.00 by noise-free path with third-order drift" in f for f in answered.findings)


def test_what_drifts_is_told_from_what_replicas_see(answer):
    path = answer.tables["along_the_path"]
    end = path[(path["ensemble"] == "Digits, AT") & (path["step"] == 100)].iloc[0]
    assert (end["curvature"], end["slope"], end["noise"]) == pytest.approx((2, 1.5, 3))
    seen = answer.tables["at_the_replicas"]
    own = seen[seen["ensemble"] == "Digits, AT"]
    assert own["step"].tolist() == [10, 60, 61, 100]  # the step before each was recorded, too
    # the simulation's slopes and noise are the start's
    assert (np.abs(own["noise"] - 1) < 4 * own["noise_error"]).all()
    assert (np.abs(own["slope"] - 1) < 4 * own["slope_error"]).all()
    assert (own["noise_error"] < 0.12).all()


def test_ensembles_with_and_without_a_decay_go_together(runs, tmp_path):
    """A cosine has no decay to stop at; beside an ensemble that has one its missing step is no number."""
    run = run_directory(tmp_path / "run")
    cosine = 0.005 * (1 + np.cos(np.linspace(0, 3, 40)))
    steps = [0, 1, 10, 39, 40]
    x, g = simulate(SLOPES, NOISE / BATCH, np.zeros(3), cosine, steps, replicas=30, seed=4)
    start = point(np.diag(LAM), NOISE, np.zeros(3), slopes=SLOPES)
    write(run / "replicas" / "cosine", recorded(start, x, steps, cosine, gradient=g))
    written = conduct("ground_truth", [run, runs], tmp_path / "out")
    tables = {path.stem: pd.read_csv(path) for path in written.tables}
    described = tables["ensembles"].set_index("ensemble").loc["Digits, AT, rate falls smoothly"]
    assert described[["replicas", "steps"]].tolist() == [30, 40]
    assert np.isnan(described["decay_step"])
    remembered = tables["memory"].set_index("ensemble").loc["Digits, AT, rate falls smoothly"]
    assert set(remembered["reference"]) == {40}


def test_labels_tell_apart_what_differs(tmp_path):
    run = run_directory(tmp_path / "run")
    start = point(np.diag(LAM), NOISE, np.zeros(3))
    cosine = 0.01 * np.cos(np.linspace(0, 1, 20))
    rates = {
        "a": np.full(20, 0.01),
        "b": np.full(30, 0.01),
        "c": np.full(20, 0.02),
        "d": cosine,
        "e": np.minimum(cosine, cosine[::-1]),
        "f": np.full(20, 0.01),
    }
    for name, rate in rates.items():
        write(run / "replicas" / name, recorded(start, np.zeros((5, 2, 3)), [0, 1], rate))
    assert list(ground_truth.find_ensembles(find_runs(run))) == [
        "Digits, AT, first rate 0.01, steps 20",
        "Digits, AT, first rate 0.01, steps 30",
        "Digits, AT, first rate 0.02, steps 20",
        "Digits, AT, rate falls smoothly",
        "Digits, AT, rate rises and falls",
        "Digits, AT, first rate 0.01, steps 20 (run f)",
    ]


def test_everything_is_written(runs, tmp_path):
    written = conduct("ground_truth", runs, tmp_path)
    said = written.findings.read_text(encoding="utf-8")
    assert "\n\nMeasured / predicted variance lies within 0.9 to 1.11 at these of the recorded steps" in said
    assert "| Digits, AT | exact | " in said
    assert "![ratio](figures/ratio.png)" in said
    assert "| ensemble | replicas | steps | directions |" in said
    assert "| Digits, AT | 200 | 100 | 3 | 0.01 | 60 | 0.001 |" in said
    names = {path.name for path in written.figures}
    for stem in (
        "ratio",
        "ratio_by_eigenvalue",
        "mean",
        "drift",
        "memory",
        "variance_digits_at",
        "variance_digits_awp",
    ):
        assert {f"{stem}.png", f"{stem}.csv"} <= names


def test_runs_without_replicas_say_how_to_make_some(tmp_path):
    with pytest.raises(RecordError, match="robustdyn-replicas"):
        load("ground_truth").answer(find_runs(run_directory(tmp_path / "run")))
