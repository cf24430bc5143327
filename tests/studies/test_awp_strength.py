import math

import numpy as np
import pytest
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.studies.awp_strength import STUDY, gamma_of
from tests.studies.tracked_runs import row_of, write_run
from tests.tolerances import EXACT64

STRENGTHS = (0.0, 0.0025, 0.005, 0.01, 0.02)
STEEP = 0.7


def write_strength(path, gamma, seed):
    """Curvature that falls by exp(−0.7) per 0.01 of γ; a loss that is lowest at γ = 0.01 before the end."""
    best = abs(gamma - 0.01)
    return write_run(
        path / f"{gamma}_{seed}",
        "awp",
        seed,
        curvature=lambda epoch: 10 * math.exp(0.1 * seed - STEEP * gamma / 0.01),
        variance=0.5 * math.exp(STEEP * gamma / 0.01),
        loss=lambda epoch: 0.5 + best + 0.001 * seed + (0.2 if epoch == 11 else 0.0),
        perturbation__gamma=gamma,
    )


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    path = tmp_path_factory.mktemp("strengths")
    for gamma in STRENGTHS:
        for seed in (0, 1):
            write_strength(path, gamma, seed)
    return STUDY.answer(find_runs(path))


def test_the_slope_of_what_changes_by_factors_is_a_factor(answered):
    row = row_of(answered.tables["trends"], quantity="hessian_eigenvalue_top", moment="late")
    assert row["slope"] == pytest.approx(math.exp(-STEEP))
    # two seeds apart by 0.1 at each strength: residuals ±0.05, eight degrees of freedom
    gamma = np.repeat(STRENGTHS, 2) / 0.01
    error = math.sqrt(10 * 0.05**2 / 8 / ((gamma - gamma.mean()) ** 2).sum())
    low, high = -STEEP + error * np.array(stats.t.interval(0.95, 8))
    np.testing.assert_allclose(row[["low", "high"]].astype(float), np.exp([low, high]), **EXACT64)
    assert row["runs"] == 10
    assert row["spearman"] < -0.9


def test_the_slope_of_what_changes_by_differences_is_a_difference(answered):
    row = row_of(answered.tables["trends"], quantity="log_variance_term_stationary", moment="end")
    assert row["slope"] == pytest.approx(-2 * STEEP)  # two tracked directions
    assert row["spearman"] == pytest.approx(-1.0)


def test_means_are_over_seeds(answered):
    row = row_of(answered.tables["strengths"], quantity="hessian_eigenvalue_top", moment="late", gamma=0.0)
    assert row["mean"] == pytest.approx(20 * math.exp(0.05))
    row = row_of(answered.tables["strengths"], quantity="test_robust_loss", moment="best", gamma=0.01)
    assert row["mean"] == pytest.approx(0.5005)
    row = row_of(answered.tables["strengths"], quantity="test_robust_loss", moment="end", gamma=0.01)
    assert row["mean"] == pytest.approx(0.7005)


def test_terms_and_robustness_are_correlated_over_runs(answered):
    row = row_of(
        answered.tables["agreement"],
        moment="late",
        term="log_variance_term_stationary",
        robustness="test_robust_loss",
    )
    x = [-2 * math.log(0.5 * 0.01) - 2 * STEEP * gamma / 0.01 for gamma in STRENGTHS for _ in (0, 1)]
    y = [0.5 + abs(gamma - 0.01) + 0.001 * seed for gamma in STRENGTHS for seed in (0, 1)]
    expected = stats.pearsonr(x, y)
    assert row["pearson"] == pytest.approx(expected.statistic)
    assert row["p"] == pytest.approx(expected.pvalue)
    assert row["runs"] == 10


def test_findings_name_the_strength_each_would_choose(answered):
    late, end = answered.findings
    assert end.startswith("At the end, the mean is lowest at γ = ")
    parts = late.removeprefix("Late, the mean is lowest ").split("; ")
    of_gamma = dict(part.removeprefix("at ").split(" for ") for part in parts)
    assert "−Σ ln σ² (nats)" in of_gamma["γ = 0.02"]
    assert "test robust loss (nats)" in of_gamma["γ = 0.01"]


def test_what_is_drawn_is_the_table(answered):
    pictures = {picture.name: picture for picture in answered.pictures}
    for name, scaled in (("terms", []), ("robustness", ["test_robust_error"])):
        data = pictures[name].data
        heights = np.where(data["quantity"].isin(scaled), 100.0, 1.0) * data["value"]
        lines = [line for ax in pictures[name].draw(data).axes for line in ax.get_lines()]
        seen = np.sort(np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines]))
        np.testing.assert_allclose(seen, np.sort(heights), **EXACT64)
    pairs = pictures["terms_and_robustness"].data
    figure = pictures["terms_and_robustness"].draw(pairs)
    seen = np.sort(np.concatenate([line.get_xdata() for line in figure.axes[0].get_lines()]))
    np.testing.assert_allclose(seen, np.sort(pairs["curvature_term_stationary"]), **EXACT64)


def test_plain_adversarial_training_is_strength_zero(tmp_path):
    (run,) = find_runs(write_run(tmp_path / "at"))
    assert gamma_of(run) == 0.0
    (run,) = find_runs(write_strength(tmp_path, 0.005, 0))
    assert gamma_of(run) == 0.005


def test_other_perturbations_are_refused(tmp_path):
    sam = {"_target_": "robustdyn.methods.SAM", "rho": 0.05}
    (run,) = find_runs(write_run(tmp_path / "sam", "awp", perturbation=sam))
    with pytest.raises(RecordError, match="perturbation is not AWP"):
        gamma_of(run)


def test_two_strengths_show_no_trend(tmp_path):
    for gamma in (0.0, 0.01):
        write_strength(tmp_path, gamma, 0)
    with pytest.raises(RecordError, match="2 strengths"):
        STUDY.answer(find_runs(tmp_path))


def test_runs_of_several_settings_are_refused(tmp_path):
    for size in (100, 200):
        write_run(tmp_path / str(size), "awp", data__train_size=size)
    with pytest.raises(RecordError, match=r"their seed, perturbation: data\.train_size \(100, 200\)"):
        STUDY.answer(find_runs(tmp_path))
