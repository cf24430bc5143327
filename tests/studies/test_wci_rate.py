import numpy as np
import pytest
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.studies.shared import study
from robustdyn.studies.wci_rate import (
    STATIC,
    STUDY,
    damping,
    draw_rate_and_wci,
    draw_thresholds,
    draw_trend,
    trends,
)
from tests.runs import compose
from tests.studies.rates import START, error, interval, write, write_fixed_rate, write_wci_rate
from tests.tolerances import EXACT64

EXACT = EXACT64["rtol"]
SEEDS = (0, 1, 2)
SLOPES = {10: 0.0, 100: 0.001, 1e9: 0.003}  # of the robust error since the decay, an epoch


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    for threshold, slope in SLOPES.items():
        for seed in SEEDS:
            write_wci_rate(path / f"{threshold:g}_{seed}", threshold, seed, slope=slope)
    return path


@pytest.fixture(scope="module")
def answer(sweep):
    return STUDY.answer(find_runs(sweep))


def test_the_damping_is_the_papers_rule(sweep):
    found = damping(find_runs(sweep))
    assert found["epoch"].min() == START
    own = found[(found["threshold"] == 10) & (found["seed"] == 1)].set_index("epoch")
    assert own.loc[START, "damping"] == pytest.approx(10 / 101, rel=EXACT)
    assert own.loc[START + 5, "damping"] == pytest.approx(10 / own.loc[START + 4, "wci"], rel=EXACT)
    assert found.loc[found["threshold"] == 1e9, "damping"].to_numpy() == pytest.approx(1.0, rel=EXACT)


def test_best_and_final_over_seeds(answer):
    table = answer.tables["thresholds"]
    assert list(dict.fromkeys(table["setting"])) == ["τ = 10", "τ = 100", STATIC]
    found = table.set_index(["setting", "metric", "moment"])
    best = [100 * error(11, SLOPES[100], seed) for seed in SEEDS]  # the first evaluated epoch since the decay
    final = [100 * error(39, SLOPES[100], seed) for seed in SEEDS]
    row = found.loc["τ = 100", "test_robust_error", "best"]
    assert row["mean"] == pytest.approx(np.mean(best), rel=EXACT)
    assert row["high"] - row["mean"] == pytest.approx(interval(best), rel=1e-8)  # the t table's digits
    assert (row["seeds"], row["unit"]) == (3, "%")
    assert found.loc["τ = 100", "test_robust_error", "final"]["mean"] == pytest.approx(
        np.mean(final), rel=EXACT
    )
    rise = found.loc["τ = 100", "test_robust_loss", "final − best"]
    assert rise["mean"] == pytest.approx(3 * 28 * SLOPES[100], rel=1e-10)  # a difference of rounded numbers


def test_differences_from_the_static_rate_are_paired_by_seed(answer):
    found = answer.tables["against_static"].set_index(["setting", "metric", "moment"])
    row = found.loc["τ = 10", "test_robust_error", "final"]
    assert row["mean"] == pytest.approx(-100 * 29 * SLOPES[1e9], rel=1e-10)
    assert row["high"] - row["low"] == pytest.approx(0.0, abs=1e-10)  # seeds differ by as much in both
    assert STATIC not in found.index.get_level_values("setting")


def test_trends_are_the_slopes_since_the_decay(answer):
    found = answer.tables["trend"].set_index(["setting", "metric"])["mean"]
    for setting, threshold in (("τ = 10", 10), ("τ = 100", 100), (STATIC, 1e9)):
        assert found[setting, "test_robust_error"] == pytest.approx(1000 * SLOPES[threshold], abs=1e-9)
        assert found[setting, "test_robust_loss"] == pytest.approx(30 * SLOPES[threshold], abs=1e-9)


@pytest.mark.parametrize("start", [3, START])
def test_trends_count_from_the_first_epoch_given(sweep, start):
    runs = [run for run in find_runs(sweep) if run.config["schedule"]["threshold"] == 100]
    found = trends(runs, {run.label: "τ = 100" for run in runs}, start).set_index(["seed", "metric"])
    epochs = range(start + (start + 1) % 2, 40, 2)  # evaluated: the odd ones
    slope, intercept = np.polyfit(epochs, [100 * error(epoch, SLOPES[100], 2) for epoch in epochs], 1)
    row = found.loc[2, "test_robust_error"]
    assert (row["slope"], row["intercept"]) == pytest.approx((10 * slope, intercept), rel=1e-9)  # polyfit's


def test_what_the_rule_did(answer):
    found = answer.tables["rule"].set_index(["setting", "quantity"])["mean"]
    last = 100 + np.array(SEEDS) + 2 * 29  # measured at the end of epoch 38, two from 100 on for each epoch
    assert found["τ = 10", "final η / η₁"] == pytest.approx(stats.gmean(10 / last), rel=EXACT)
    assert found["τ = 10", "last WCI"] == pytest.approx(last.mean(), rel=EXACT)
    assert found[STATIC, "final η / η₁"] == pytest.approx(1.0, rel=EXACT)
    assert found[STATIC, "share of epochs with a lowered rate"] == 0
    assert found["τ = 10", "share of epochs with a lowered rate"] == 1


def drawn(ax):
    """Every point of every line of a panel."""
    return {(float(x), float(y)) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)}


def test_figures_show_their_tables_and_nothing_else(answer):
    pictures = {picture.name: picture for picture in answer.pictures}
    assert list(pictures) == ["thresholds", "best_and_final", "trend", "rate_and_wci"]

    table = pictures["thresholds"].data
    for ax, metric in zip(
        draw_thresholds(table).axes, ("test_robust_error", "test_robust_loss"), strict=True
    ):
        own = table[table["metric"] == metric]
        curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
        assert len(curves) == 3
        assert {p for line in curves for p in zip(*map(list, line.get_data()), strict=True)} == set(
            zip(own["epoch"], own["mean"], strict=True)
        )

    table = pictures["best_and_final"].data
    for ax, metric in zip(
        pictures["best_and_final"].draw(table).axes,
        ("test_robust_error", "test_robust_loss", "robust_loss_gap"),
        strict=True,
    ):
        own = table[table["metric"] == metric]
        assert {x for x, _ in drawn(ax)} == set(own["mean"]) | set(own["low"]) | set(own["high"])

    table = pictures["trend"].data
    left, right = draw_trend(table).axes
    own = table[table["kind"] != "slope"]
    assert set(own["setting"]) == {"τ = 100", STATIC}
    assert drawn(left) == set(zip(own["epoch"].astype(float), own["mean"], strict=True))
    slopes = table[table["kind"] == "slope"]
    assert {x for x, _ in drawn(right)} - {0.0} <= set(slopes[["mean", "low", "high"]].to_numpy().ravel())
    assert set(slopes["mean"]) <= {x for x, _ in drawn(right)}
    lines = table[table["kind"] == "line"].merge(table[table["kind"] == "measured"], on=["setting", "epoch"])
    assert len(lines) == 4  # first and last epoch: these curves are lines
    assert lines["mean_x"].to_numpy() == pytest.approx(lines["mean_y"].to_numpy(), rel=1e-10)

    table = pictures["rate_and_wci"].data
    for ax, name in zip(draw_rate_and_wci(table).axes, ("lr", "wci"), strict=True):
        own = table[table["metric"] == name]
        assert set(zip(own["epoch"].astype(float), own["mean"], strict=True)) <= drawn(ax)
        assert len(drawn(ax)) == len(set(zip(own["epoch"], own["mean"], strict=True))) + 2  # and the decay's


def test_the_findings_name_the_numbers(answer):
    apart, spread = answer.findings
    assert "between 41.0 % (τ = 10) and 43.9 % (τ = 100)" in spread
    lower = (f"the final test robust {metric} is lower (τ = 10, τ = 100)" for metric in ("error", "loss"))
    assert apart == f"Compared with the static rate seed by seed, {'; '.join(lower)}."
    assert study.load("wci_rate") is STUDY


def test_without_a_control(tmp_path):
    for threshold in (10, 100):
        write_wci_rate(tmp_path / f"{threshold}", threshold, 0, slope=0.001)
    found = STUDY.answer(find_runs(tmp_path))
    assert "against_static" not in found.tables
    assert "schedule.threshold=1e9" in found.findings[0]
    for picture in found.pictures:
        picture.draw(picture.data)  # one seed: no intervals


def test_many_thresholds_are_lines_without_bands(tmp_path):
    for threshold in (10, 20, 30, 40, 50, 1e9):
        write_wci_rate(tmp_path / f"{threshold:g}", threshold, 0, slope=0)
    figure = draw_thresholds(STUDY.answer(find_runs(tmp_path)).pictures[0].data)
    assert [len(ax.collections) for ax in figure.axes] == [0, 0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: write_fixed_rate(path / "x", "cosine", 0, slope=0),
            "their seed, schedule.threshold: schedule._target_",
        ),
        (
            lambda path: write_wci_rate(path / "x", 20, 0, slope=0, epochs=30),
            "evaluated up to epoch 30 of 40",
        ),
        (
            lambda path: write_wci_rate(path / "x", 20, 0, slope=0, every=20),
            "2 evaluated epochs from the decay",
        ),
        (lambda path: write_wci_rate(path / "x", 20, 0, slope=0, epochs=START), "never decayed"),
        (lambda path: write_wci_rate(path / "x", 10, 0, slope=0), "x: seed 0 of τ = 10 is that of .*10 too"),
        (
            lambda path: write_wci_rate(path / "x", 20, 0, slope=0, model__width=8),
            r"their seed, schedule\.threshold: model\.width",
        ),
    ],
    ids=["schedule", "unfinished", "few evaluations", "no decay", "twice", "more differs"],
)
def test_what_cannot_be_studied(tmp_path, damage, message):
    write_wci_rate(tmp_path / "10", 10, 0, slope=0)
    damage(tmp_path)
    with pytest.raises(RecordError, match=message):
        STUDY.answer(find_runs(tmp_path))


def test_runs_without_the_index(tmp_path):
    schedule = {"factor": 0.1, "quantity": "wci", "threshold": 10}
    write(tmp_path / "x", schedule, 0, choice="wci", slope=0, rate=lambda epoch: 0.01)
    with pytest.raises(RecordError, match="measure=index"):
        STUDY.answer(find_runs(tmp_path))


def test_the_preset():
    small = compose("experiment=wci_rate")
    assert (small.data.train_size, small.schedule._target_) == (300, "robustdyn.methods.WCIRate")
    assert list(small.measure.epochs) == []
    assert small.measure.measurements.spectrum is None
    full = compose("experiment=wci_rate", "scale=full")
    assert full.data._target_ == compose("data=cifar10").data._target_
    assert (full.trainer.max_epochs, full.schedule.start_epoch, full.schedule.interval) == (200, 100, 1)
    assert full.data.get("train_size") == compose("data=cifar10").data.get("train_size")
