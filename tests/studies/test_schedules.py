import shutil

import numpy as np
import pandas as pd
import pytest

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.studies.schedules import (
    STUDY,
    cost,
    draw_cost,
    draw_curves,
    of_training,
)
from robustdyn.studies.shared import study
from tests.runs import compose
from tests.studies.rates import error, interval, write_bound_rate, write_fixed_rate, write_wci_rate
from tests.tolerances import EXACT64

EXACT = EXACT64["rtol"]
SEEDS = (0, 1, 2)
SLOPES = {"piecewise": 0.004, "cosine": 0.002, "cyclic": 0.001}
WCI = "WCI-LR, τ = 100"
ORDER = ["piecewise", "cosine", "one-cycle", WCI]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    for seed in SEEDS:
        write_wci_rate(path / f"a_wci_{seed}", 100, seed, slope=0.0)
        for choice, slope in SLOPES.items():
            rate = {"optimizer__lr": 0.2} if choice == "cyclic" else {}
            write_fixed_rate(path / f"{choice}_{seed}", choice, seed, slope=slope * (1 + 0.1 * seed), **rate)
    return path


@pytest.fixture(scope="module")
def answer(sweep):
    return STUDY.answer(find_runs(sweep))


def test_best_final_and_difference(answer):
    table = answer.tables["schedules"]
    assert list(dict.fromkeys(table["setting"])) == ORDER
    found = table.set_index(["setting", "metric", "moment"])
    best = np.array([100 * error(11, 0.004 * (1 + 0.1 * seed), seed) for seed in SEEDS])
    final = np.array([100 * error(39, 0.004 * (1 + 0.1 * seed), seed) for seed in SEEDS])
    for moment, values in {"best": best, "final": final, "final − best": final - best}.items():
        row = found.loc["piecewise", "test_robust_error", moment]
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-10)
        assert row["high"] - row["mean"] == pytest.approx(interval(values), rel=1e-8)  # the t table's digits
    row = found.loc["piecewise", "robust_loss_gap", "final"]
    assert row["mean"] == pytest.approx(2 * (final.mean() / 100 - 0.3), rel=1e-10)
    shown = answer.tables["schedules_shown"].set_index("setting")
    said = f"{final.mean():.1f} ± {interval(final):.1f}"
    assert shown.loc["piecewise", "test robust error (%), final"] == said
    assert shown.loc[WCI, "seeds"] == 3


def test_others_against_the_wci_rate_seed_by_seed(answer):
    table = answer.tables["against_wci"]
    found = table.set_index(["setting", "metric", "moment"])
    differences = [100 * 29 * 0.002 * (1 + 0.1 * seed) for seed in SEEDS]
    row = found.loc["cosine", "test_robust_error", "final"]
    assert row["mean"] == pytest.approx(np.mean(differences), rel=1e-10)
    assert row["high"] - row["mean"] == pytest.approx(interval(differences), rel=1e-8)
    assert set(table["minus"]) == {WCI}


def test_the_rate_of_the_bound_is_a_second_reference(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path, dirs_exist_ok=True)
    for seed in SEEDS:
        write_bound_rate(tmp_path / f"bound_{seed}", 0.3, seed, slope=0.003)
    found, bound = STUDY.answer(find_runs(tmp_path)), "bound, β = 0.3 n"
    assert list(dict.fromkeys(found.tables["schedules"]["setting"])) == [*ORDER[:-1], bound, WCI]
    differences = found.tables["against_bound"].set_index(["setting", "metric", "moment"])["mean"]
    assert differences[WCI, "test_robust_error", "final"] == pytest.approx(-100 * 29 * 0.003, rel=1e-10)
    by_seed = [100 * 29 * (0.004 * (1 + 0.1 * seed) - 0.003) for seed in SEEDS]
    assert differences["piecewise", "test_robust_error", "final"] == pytest.approx(
        np.mean(by_seed), rel=1e-10
    )
    opposite = found.tables["against_wci"].set_index(["setting", "metric", "moment"])["mean"]
    assert opposite[bound, "test_robust_error", "final"] == pytest.approx(100 * 29 * 0.003, rel=1e-10)
    assert f"compared with {bound} seed by seed, the final test robust error is " in found.findings[0]
    for picture in found.pictures:
        picture.draw(picture.data)


def test_costs(answer):
    table = answer.tables["cost"].set_index(["setting", "quantity"])["mean"]
    # epochs 1 to 39: evaluated every second, 20 times; measured after epochs 9 to 38
    assert table["piecewise", "all"] == pytest.approx(10.0, rel=EXACT)
    assert table["piecewise", "evaluation"] == pytest.approx(2 * 20 / 39, rel=EXACT)
    assert table["piecewise", "one_evaluation"] == pytest.approx(2.0, rel=EXACT)
    assert table["piecewise", "measurement"] == 0
    assert ("piecewise", "one_measurement") not in table.index
    assert table[WCI, "measurement"] == pytest.approx(3 * 30 / 39, rel=EXACT)
    assert table[WCI, "one_measurement"] == pytest.approx(3.0, rel=EXACT)
    assert table[WCI, "measurement_share"] == pytest.approx(30 * 30 / 39, rel=EXACT)
    parts = table[WCI][["training", "evaluation", "measurement"]].sum()
    assert parts == pytest.approx(table[WCI, "all"], rel=EXACT)

    own = answer.tables["cost_of_training"].set_index(["setting", "quantity"])["mean"]
    assert own[WCI, "training"] == pytest.approx(100, rel=EXACT)
    assert own[WCI, "measurement"] == pytest.approx(100 * 90 / (390 - 40 - 90), rel=EXACT)  # seconds in all
    assert own["piecewise", "all"] == pytest.approx(100 * 390 / (390 - 40), rel=EXACT)
    assert set(answer.tables["cost_of_training"]["unit"]) == {"%"}


def test_a_loaded_machine_slows_the_parts_alike():
    times = pd.DataFrame(
        {"setting": "cosine", "seed": [0, 1], "training": [4.0, 12.0], "evaluation": [1.0, 3.0]}
    ).assign(measurement=0.0, all=[5.0, 15.0])
    table = cost(of_training(times), ["cosine"], "%").set_index("quantity")
    assert table.loc["all", ["mean", "low", "high"]].to_list() == [125, 125, 125]
    assert table.loc["evaluation", "mean"] == 25


def test_figures_show_their_tables_and_nothing_else(answer):
    pictures = {picture.name: picture for picture in answer.pictures}
    assert list(pictures) == ["best_and_final", "learning_curves", "cost"]

    table = pictures["best_and_final"].data
    figure = pictures["best_and_final"].draw(table)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ORDER[::-1]
    for ax, metric in zip(
        figure.axes,
        ("test_robust_error", "test_clean_error", "robust_error_gap", "robust_loss_gap"),
        strict=True,
    ):
        own = table[table["metric"] == metric]
        drawn = {float(x) for line in ax.lines for x in line.get_xdata()}
        assert drawn == set(own[["mean", "low", "high"]].to_numpy().ravel())

    table = pictures["learning_curves"].data
    metrics = ("test_robust_error", "test_clean_error", "lr")
    for ax, metric in zip(draw_curves(table).axes, metrics, strict=True):
        own = table[table["metric"] == metric]
        drawn = [tuple(p) for line in ax.lines for p in zip(*map(list, line.get_data()), strict=True)]
        assert len(ax.lines) == len(ORDER)
        assert drawn == list(zip(own["epoch"], own["mean"], strict=True))

    table = pictures["cost"].data
    (ax,) = draw_cost(table).axes
    for bars, part in zip(ax.containers, ("training", "evaluation", "measurement"), strict=True):
        own = table[table["quantity"] == part]
        assert [bar.get_width() for bar in bars] == pytest.approx(list(own["mean"]), rel=EXACT)
    whole = table[table["quantity"] == "all"]["mean"].to_numpy()
    ends = [bar.get_x() + bar.get_width() for bar in ax.containers[-1]]
    assert ends == pytest.approx(list(whole), rel=EXACT)


def test_the_findings_name_the_numbers(answer):
    robust, cost_said = answer.findings
    lowest, against = robust.split("; ")
    both = f"of “{WCI}” at the best epoch (41.0 ± 2.5 %) and of “{WCI}” at the end (41.0 ± 2.5 %)"
    assert lowest == f"The lowest robust error (± half of its 95 % interval) is that {both}"
    assert against.endswith("the final test robust error is higher (piecewise, cosine, one-cycle).")
    assert "takes 10 s, mean over the run, of which measuring takes 23 %" in cost_said
    assert study.load("schedules") is STUDY


def test_one_seed_and_no_times(tmp_path):
    write_wci_rate(tmp_path / "wci", 100, 0, slope=0, timed=False)
    write_fixed_rate(tmp_path / "linear", "linear", 0, slope=0, timed=False)
    found = STUDY.answer(find_runs(tmp_path))
    assert "cost" not in found.tables
    assert found.findings[-1].startswith("The cost is not known")
    assert found.tables["schedules"]["low"].isna().all()
    for picture in found.pictures:
        picture.draw(picture.data)


@pytest.mark.parametrize(
    ("choice", "settings", "message"),
    [
        ("unheard_of", {}, "schedule unheard_of is none of"),
        ("linear", {"epochs": 30}, "evaluated up to epoch 30 of 40"),
        ("linear", {"model__width": 8}, r"their seed, schedule, optimizer\.lr: model\.width"),
        ("piecewise", {}, "x: seed 0 of piecewise is that of .*piecewise too"),
    ],
)
def test_what_cannot_be_studied(tmp_path, choice, settings, message):
    write_wci_rate(tmp_path / "wci", 100, 0, slope=0)
    write_fixed_rate(tmp_path / "piecewise", "piecewise", 0, slope=0)
    write_fixed_rate(tmp_path / "x", choice, 0, slope=0, **settings)
    with pytest.raises(RecordError, match=message):
        STUDY.answer(find_runs(tmp_path))


def test_nothing_to_compare_with(tmp_path):
    write_wci_rate(tmp_path / "wci", 100, 0, slope=0)
    with pytest.raises(RecordError, match="schedule=wci and of another"):
        STUDY.answer(find_runs(tmp_path))


def test_the_preset():
    small = compose("experiment=schedules", "schedule=cyclic")
    assert (small.optimizer.lr, list(small.schedule.factors)) == (0.2, [0.0, 1.0, 0.0])
    assert small.schedule == compose("schedule=one_cycle", "trainer.max_epochs=80").schedule
    assert compose("experiment=schedules", "schedule=linear").optimizer.lr == 0.1
    full = compose("experiment=schedules", "scale=full", "schedule=wci")
    assert (full.trainer.max_epochs, full.schedule.start_epoch, full.schedule.threshold) == (200, 100, 100)
    assert list(full.measure.epochs) == []
