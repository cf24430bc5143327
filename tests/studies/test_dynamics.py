import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.report.plotting import decay_epochs
from robustdyn.studies.dynamics import STUDY
from robustdyn.studies.shared.tracked import moments, tracked_quantities
from tests.studies.tracked_runs import STEEPER, K, drawn, row_of, write_run
from tests.tolerances import EXACT64

GROWTH = {"at": (3.0, 4.0, 5.0), "awp": (1.2, 1.5, 1.3)}
LEVEL = {"at": (8.0, 9.0, 10.0), "awp": (4.0, 3.0, 5.0)}


def grown(method, seed):
    """Curvature that jumps by a factor of the seed's own at the first decay."""
    return lambda epoch: LEVEL[method][seed] * (GROWTH[method][seed] if epoch >= 4 else 1.0)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    for method in GROWTH:
        for seed in range(3):
            write_run(
                path / f"{method}{seed}",
                method,
                seed,
                curvature=grown(method, seed),
                loss=lambda epoch, seed=seed: 1.0 + 0.01 * (seed + 1) * epoch,
                above=lambda epoch: 3.0 if epoch >= 8 else 1.0,
            )
    return path


@pytest.fixture(scope="module")
def answered(sweep):
    return STUDY.answer(find_runs(sweep))


def geometric(factors):
    """Geometric mean and Student's 95 % interval, by SciPy."""
    logs = np.log(factors)
    low, high = stats.t.interval(0.95, len(logs) - 1, loc=logs.mean(), scale=stats.sem(logs))
    return np.exp([logs.mean(), low, high])


@pytest.mark.parametrize(
    "quantity", ["hessian_eigenvalue_top", "gradient_noise_mean", "curvature_term_stationary"]
)
def test_a_factor_is_the_geometric_mean_of_the_seeds_with_its_interval(answered, quantity):
    row = row_of(
        answered.tables["changes"], method="AT", quantity=quantity, **{"from": "before", "to": "after"}
    )
    expected = geometric(GROWTH["at"]) * (0.1 if quantity.startswith("curvature") else 1.0)  # σ² falls with η
    np.testing.assert_allclose(row[["mean", "low", "high"]].astype(float), expected, **EXACT64)
    assert (row["change"], row["seeds"]) == ("factor", 3)


def test_a_loss_changes_by_a_difference_between_evaluated_epochs_on_either_side(answered):
    row = row_of(
        answered.tables["changes"],
        method="AT",
        quantity="test_robust_loss",
        **{"from": "before", "to": "after"},
    )
    rise = np.array([0.02, 0.04, 0.06])  # from epoch 3 to 5, 0.01 (seed + 1) an epoch
    low, high = stats.t.interval(0.95, 2, loc=rise.mean(), scale=stats.sem(rise))
    np.testing.assert_allclose(
        row[["mean", "low", "high"]].astype(float), [rise.mean(), low, high], **EXACT64
    )


def test_the_rate_s_own_part_leaves_nothing_where_only_the_rate_changes(answered):
    changes = answered.tables["changes"]
    where = {"method": "AT", "from": "before", "to": "late"}
    assert row_of(changes, quantity="log_variance_term_stationary", **where)["mean"] == pytest.approx(
        K * math.log(10)
    )
    assert row_of(changes, quantity="log_variance_term_without_rate", **where)["mean"] == pytest.approx(
        0.0, abs=1e-12
    )


def test_methods_are_compared_seed_by_seed(answered):
    row = row_of(
        answered.tables["against_at"], moment="late", quantity="hessian_eigenvalue_mean", method="AWP"
    )
    ratio = np.array(LEVEL["awp"]) * GROWTH["awp"] / (np.array(LEVEL["at"]) * GROWTH["at"])
    np.testing.assert_allclose(row[["mean", "low", "high"]].astype(float), geometric(ratio), **EXACT64)


def test_sums_and_means_are_over_the_tracked_directions(tmp_path):
    (run,) = find_runs(write_run(tmp_path / "run", curvature=lambda epoch: 6.0))
    at_3 = tracked_quantities(run).query("epoch == 3").set_index("quantity")["value"]
    sigma = 0.5 * 0.1
    assert at_3["hessian_eigenvalue_top"] == pytest.approx(12.0)
    assert at_3["hessian_eigenvalue_mean"] == pytest.approx(6.0)
    assert at_3["curvature_term_stationary"] == pytest.approx(15.0 * sigma)
    assert at_3["curvature_term_resolved"] == pytest.approx(STEEPER * 15.0 * 2 * sigma)
    assert at_3["dominant_terms_resolved"] == pytest.approx(STEEPER * 30.0 * sigma - 2 * math.log(2 * sigma))
    assert at_3["resolved_variance_mean"] == pytest.approx(2 * sigma)
    assert at_3["curvature_term_independent"] == pytest.approx(15.0 * 3 * sigma)
    assert at_3["dominant_terms_independent"] == pytest.approx(45.0 * sigma - 2 * math.log(3 * sigma))
    assert at_3["independent_variance_mean"] == pytest.approx(3 * sigma)


def test_moments_are_about_the_decays(tmp_path):
    (run,) = find_runs(write_run(tmp_path / "run"))
    found = moments(tracked_quantities(run), run.path).set_index(["quantity", "moment"])["epoch"]
    assert found["hessian_eigenvalue_top"].to_dict() == {"before": 3, "after": 4, "late": 7, "end": 11}
    assert found["test_robust_loss"].to_dict() == {"before": 3, "after": 5, "late": 7, "end": 11}
    assert found["lr"].to_dict() == {"before": 3, "after": 4, "late": 7, "end": 11}


def test_a_moment_is_the_nearest_epoch_that_has_the_sum(tmp_path):
    (run,) = find_runs(write_run(tmp_path / "run", unstable=(7,)))
    found = moments(tracked_quantities(run), run.path).set_index(["quantity", "moment"])["epoch"]
    assert found["dominant_terms_stationary", "late"] == 4
    assert found["hessian_eigenvalue_top", "late"] == 7


def test_the_commutator_is_counted_against_its_null(answered):
    counted = row_of(answered.tables["alignment"], method="AT", quantity="commutator")
    assert (counted["measurements"], counted["above"]) == (18, 6)  # two of six epochs in each of three seeds
    assert row_of(answered.tables["alignment"], method="AT", quantity="total_correlation")["above"] == 0


def test_an_epoch_that_one_seed_lacks_is_left_out_of_the_curve(tmp_path):
    for seed in range(2):
        write_run(tmp_path / str(seed), seed=seed, unstable=(3,) if seed else ())
    found = STUDY.answer(find_runs(tmp_path))
    (terms,) = (picture.data for picture in found.pictures if picture.name == "bound_terms")
    epochs = terms[terms["quantity"] == "dominant_terms_stationary"]["epoch"]
    assert list(epochs) == [0, 4, 7, 8, 11]
    lacking = found.tables["no_stationary_law"]
    assert lacking.to_dict("records") == [
        {"method": "AT", "lacking": 1, "measurements": 12, "law": "papers"},
        {"method": "AT", "lacking": 0, "measurements": 12, "law": "training"},
    ]
    assert "against_at" not in found.tables


def test_findings_say_what_rises_and_what_falls(answered):
    across, against = answered.findings
    training, papers = across.removeprefix("From before the first decay to late: ").split(
        " By the papers' law: "
    )
    at, awp = training.split("; ")
    rises, falls = at.removeprefix("AT rises (").split("), falls (")
    assert rises.startswith("leading λ, leading noise eigenvalue")
    assert falls.startswith("σ², ")
    assert awp.startswith("AWP rises (")
    assert papers.startswith("AT rises (−Σ ln σ²")
    assert "falls (stationary σ², " in papers
    assert against.startswith("Late, compared with AT seed by seed: AWP lower (leading λ")


def test_what_is_drawn_is_the_table(answered):
    names = {"alignment", "bound_terms", "curvature_and_noise", "posterior_variance"}
    assert {picture.name for picture in answered.pictures} == names
    for picture in answered.pictures:
        data = picture.data[picture.data["quantity"] != "lr"]
        np.testing.assert_allclose(drawn(picture.draw(picture.data)), np.sort(data["mean"]), **EXACT64)
        if picture.name != "posterior_variance":
            assert set(data["seeds"]) == {3}
        for method, rows in picture.data[picture.data["quantity"] == "lr"].groupby("method"):
            assert decay_epochs(pd.DataFrame({"epoch": rows["epoch"], "lr": rows["mean"]})) == [4, 8], method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lacking": ("spectrum",)}, "no spectrum recorded; train with measure=default"),
        ({"lacking": ("alignment",)}, "no alignment recorded; train with measure=default"),
        ({"lacking": ("epochs",)}, "no epochs recorded; finish the run"),
        ({"lr": lambda epoch: 0.1}, "no learning-rate decay"),
        ({"measured": (0, 3)}, "measured on one side of the decay at epoch 4 only"),
        ({"measured": (5, 11)}, "measured on one side of the decay at epoch 4 only"),
        ({"variance": float("nan")}, "no stationary posterior recorded; train with optimizer=sgd"),
    ],
)
def test_what_a_run_lacks_is_said(tmp_path, options, message):
    with pytest.raises(RecordError, match=message):
        STUDY.answer(find_runs(write_run(tmp_path / "run", **options)))


def test_runs_of_several_settings_are_refused(tmp_path):
    for size in (100, 200):
        write_run(tmp_path / str(size), data__train_size=size)
    with pytest.raises(RecordError, match=r"measure.inputs: data\.train_size \(100, 200\)"):
        STUDY.answer(find_runs(tmp_path))


def test_two_strengths_are_no_seeds(tmp_path):
    for gamma in (0.01, 0.02):
        write_run(tmp_path / str(gamma), "awp", perturbation__gamma=gamma)
    with pytest.raises(RecordError, match=r"runs of AWP differ in .*: perturbation\.gamma \(0\.01, 0\.02\)"):
        STUDY.answer(find_runs(tmp_path))


def test_the_same_run_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name)
    with pytest.raises(RecordError, match=r"b: seed 0 of AT is that of .*a too"):
        STUDY.answer(find_runs(tmp_path))
