import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import find_runs
from robustdyn.records.schema import ROBUST_ERROR_GAP, ROBUST_LOSS_GAP, TEST_ROBUST_ERROR
from robustdyn.studies.shared import comparing, one_factor, wording
from robustdyn.studies.shared.comparison_figures import Panel, figure_of_curves, figure_of_outcomes
from tests.studies.curve_runs import decayed, write_curves

BY = ["panel", "quantity", "outcome"]
QUANTITIES = (TEST_ROBUST_ERROR, ROBUST_LOSS_GAP)
FALLING, TEST, TRAIN = decayed(6, 3), [0.8, 0.6, 0.5, 0.3, 0.4, 0.45], [0.8, 0.6, 0.4, 0.2, 0.1, 0.1]


def by_train_size(run):
    return str(run.config["data"]["train_size"])


def write(root, seeds=(0, 1, 2), sizes=(300, 200), shift=0.0, **options):
    """Seed s has s points more error, the second size twice that and ``shift``."""
    for seed in seeds:
        for i, size in enumerate(sizes):
            test = np.array(TEST) + 0.01 * seed * (i + 1) + i * shift
            options |= {"lr": FALLING, "test": test, "train": TRAIN, "settings": {"data.train_size": size}}
            write_curves(root / f"{i}_{seed}", seed=seed, **options)
    return find_runs(root)


def test_curves_are_means_over_seeds_with_students_interval(tmp_path):
    rows = comparing.values(write(tmp_path), QUANTITIES, by_train_size)
    table = comparing.mean_curves(rows)
    cell = table[(table["setting"] == "300") & (table["quantity"] == TEST_ROBUST_ERROR)].set_index("epoch")
    np.testing.assert_allclose(cell["mean"], np.array(TEST) + 0.01, rtol=1e-12)
    half = stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    np.testing.assert_allclose(cell["high"] - cell["mean"], half, rtol=1e-9)
    assert set(cell["seeds"]) == {3}
    assert set(table["quantity"]) == {*QUANTITIES, comparing.RATE}
    assert set(table["panel"]) == {"digits"}


def test_outcomes_are_lowest_last_and_rise(tmp_path):
    found = one_factor.outcomes(comparing.values(write(tmp_path), QUANTITIES, by_train_size))
    one = found[(found["setting"] == "300") & (found["seed"] == 0)].set_index("outcome")["value"]
    assert one.to_dict() == pytest.approx(
        {
            "best robust error": 0.3,
            "final robust error": 0.45,
            "rise of the robust error": 0.15,
            "final robust loss gap": 1.4,
        }
    )


def test_differences_are_paired_by_seed(tmp_path):
    found = one_factor.outcomes(comparing.values(write(tmp_path, shift=0.1), QUANTITIES, by_train_size))
    apart = comparing.against(found, "300", BY).set_index("outcome").loc["final robust error"]
    # 0.1 and 0, 1, 2 points by seed; unpaired, the interval would be wider
    want = stats.t.interval(0.95, 2, loc=0.11, scale=0.01 / np.sqrt(3))
    assert (apart["setting"], apart["seeds"]) == ("200", 3)
    np.testing.assert_allclose(apart[["mean", "low", "high"]].to_numpy(float), [0.11, *want], rtol=1e-9)
    assert comparing.against(found, "no such", BY).empty


def test_one_seed_has_no_interval(tmp_path):
    rows = comparing.values(write(tmp_path, seeds=(0,)), QUANTITIES, by_train_size)
    found = one_factor.outcomes(rows)
    assert one_factor.summary(found)[["low", "high"]].isna().all(axis=None)
    assert comparing.against(found, "300", BY)[["low", "high"]].isna().all(axis=None)
    assert wording.seeds_said(comparing.mean_curves(rows)) == "1 seed"


def test_correlation_takes_the_gap_between_evaluated_epochs(tmp_path):
    """Gap and WCI are linear in the epoch, so that interpolation is exact and the correlation 1."""
    epochs = np.arange(9)
    write_curves(
        tmp_path / "run",
        lr=decayed(9, 4),
        test=0.1 + 0.02 * epochs,
        train=[0.1] * 9,
        norm=np.ones(9),
        trace=(1.0 + epochs) ** 2,
        every=2,
        measured=[0, 2, 4, 6, 8],
    )
    runs = find_runs(tmp_path)
    rows = comparing.values(runs, [comparing.INDEX, ROBUST_LOSS_GAP, ROBUST_ERROR_GAP], lambda run: "")
    r = comparing.correlations(rows)
    # evaluated are 1, 3, 5, 7: of the measured, 0 and 8 have no gap
    assert set(r["phase"]) == {"all epochs"}  # after the decay only 4 and 6 have
    assert list(r["epochs"]) == [3, 3]
    np.testing.assert_allclose(r[["pearson", "spearman"]].to_numpy(), 1.0, rtol=1e-12)


def test_correlation_can_be_negative_after_the_decay_only(tmp_path):
    gap = np.array([0, 1, 2, 3, 4, 5, 6, 7]) / 20
    trace = np.array([1, 2, 3, 4, 8, 7, 6, 5.0]) ** 2
    options = {"lr": decayed(8, 4), "train": [0.1] * 8, "norm": np.ones(8)}
    write_curves(tmp_path / "run", test=0.1 + gap, trace=trace, **options)
    rows = comparing.values(
        find_runs(tmp_path), [comparing.INDEX, ROBUST_LOSS_GAP, ROBUST_ERROR_GAP], lambda run: ""
    )
    found = comparing.correlations(rows).set_index(["quantity", "phase"])
    assert found["epochs"].to_list() == [8, 4, 8, 4]  # the decay's own epoch is after it
    r = found["pearson"]
    assert r[ROBUST_LOSS_GAP, "after the first decay"] == pytest.approx(-1)
    assert r[ROBUST_LOSS_GAP, "all epochs"] == pytest.approx(np.corrcoef(np.sqrt(trace), gap)[0, 1])


def test_only_some_runs_have_measured_the_wci(tmp_path):
    write(tmp_path / "a", sizes=(300,), norm=np.ones(6), trace=np.arange(1.0, 7.0))
    write(tmp_path / "b", seeds=(0, 1), sizes=(200,))
    write(tmp_path / "c", seeds=(2,), sizes=(200,), norm=np.ones(6), trace=np.arange(1.0, 7.0))
    found = one_factor.compared(find_runs(tmp_path), by_train_size, title="Title", baseline="300")
    r = found.tables["correlations"]
    assert set(zip(r["setting"], r["seed"], strict=True)) == {("300", 0), ("300", 1), ("300", 2), ("200", 2)}
    final = found.tables["outcomes"].set_index(["setting", "outcome"])["seeds"]
    assert (final["300", one_factor.FINAL_INDEX], final["200", one_factor.FINAL_INDEX]) == (3, 1)
    for picture in found.pictures:
        picture.draw(picture.data)


def test_what_runs_lack_is_said(tmp_path):
    runs = write(tmp_path / "a", seeds=(0,))
    with pytest.raises(RecordError, match="needs measured WCI; train with measure=index"):
        comparing.values(runs, [comparing.INDEX], by_train_size)
    assert not comparing.values(runs, QUANTITIES, by_train_size, optional=[comparing.INDEX]).empty
    with pytest.raises(RecordError, match=r"one setting on digits differ in more than .*: data\.train_size"):
        comparing.values(runs, QUANTITIES, lambda run: "")
    with pytest.raises(RecordError, match=r"seed 0 of 300 on digits is that of .* too"):
        comparing.values([*runs, *runs], QUANTITIES, by_train_size)
    write_curves(tmp_path / "b", lr=FALLING[:4], test=TEST[:4], train=TRAIN[:4], seed=1)
    with pytest.raises(RecordError, match="b: ends after epoch 3, others after 5"):
        comparing.values([*runs, *find_runs(tmp_path / "b")], QUANTITIES, by_train_size)
    write_curves(tmp_path / "c", lr=FALLING, test=TEST, train=TRAIN, every=9)
    with pytest.raises(RecordError, match="no epoch has a test_robust_error; train until"):
        comparing.values(find_runs(tmp_path / "c"), QUANTITIES, by_train_size)
    write_curves(tmp_path / "d", lr=[], test=[], train=[])
    with pytest.raises(RecordError, match="no finished epoch"):
        comparing.values(find_runs(tmp_path / "d"), QUANTITIES, by_train_size)


def test_the_figure_of_curves_draws_its_table(tmp_path):
    measured = {"norm": np.ones(6), "trace": np.arange(1.0, 7.0)}
    rows = comparing.values(write(tmp_path, **measured), [*QUANTITIES, comparing.INDEX], by_train_size)
    table = comparing.mean_curves(rows)
    shown = [Panel("robust error", TEST_ROBUST_ERROR), Panel("WCI", comparing.INDEX, log=True)]
    figure = figure_of_curves(table, "Title", shown)
    assert figure.get_suptitle() == "Title (mean of 3 seeds)"
    for ax, quantity, scale in zip(figure.axes, (TEST_ROBUST_ERROR, comparing.INDEX), (100, 1), strict=True):
        drawn = [line for line in ax.lines if len(line.get_xdata()) == 6]
        for line, setting in zip(drawn, ("300", "200"), strict=True):
            own = table[(table["quantity"] == quantity) & (table["setting"] == setting)]
            np.testing.assert_allclose(line.get_ydata(), own["mean"] * scale)
    assert {"300", "200"} <= {text.get_text() for text in figure.axes[1].texts}
    assert figure.axes[0].get_ylabel() == "%"


def test_the_figure_of_outcomes_draws_its_table(tmp_path):
    found = one_factor.outcomes(comparing.values(write(tmp_path), QUANTITIES, by_train_size))
    table = one_factor.with_seeds(one_factor.summary(found), found)
    error = figure_of_outcomes(table, "Title").axes[0]
    labels = [label.get_text() for label in error.get_yticklabels()]
    best, of_best, final, of_final = error.lines
    for means, seeds, outcome in (
        (best, of_best, "best robust error"),
        (final, of_final, "final robust error"),
    ):
        for line, own in (
            (means, table[table["seed"].isna()]),
            (seeds, found.rename(columns={"value": "mean"})),
        ):
            wanted = own[own["outcome"] == outcome].set_index("setting")["mean"] * 100
            drawn = pd.Series(line.get_xdata(), [labels[round(y)] for y in line.get_ydata()])
            pd.testing.assert_series_equal(drawn, wanted, check_names=False, check_index_type=False)
    assert len(of_best.get_xdata()) == 6  # three seeds of two settings


def test_axes_end_where_a_quantity_does(tmp_path):
    """Errors of 1 and 99 % have Student's interval from −573 to 673 %."""
    for seed, error in enumerate((0.01, 0.99)):
        write_curves(
            tmp_path / str(seed), lr=[0.1] * 3, test=[error] * 3, train=[0.5] * 3, seed=seed,
            norm=[1.0] * 3, trace=[1.0 + 9 * seed] * 3,
        )  # fmt: skip
    quantities = [TEST_ROBUST_ERROR, ROBUST_ERROR_GAP, comparing.INDEX]
    rows = comparing.values(find_runs(tmp_path), quantities, lambda run: "all")
    found = one_factor.outcomes(rows)
    outcomes = figure_of_outcomes(one_factor.with_seeds(one_factor.summary(found), found), "Title")
    over = figure_of_curves(comparing.mean_curves(rows), "Title", [Panel(q, q) for q in quantities])
    ranges = [ax.get_xlim() for ax in outcomes.axes], [ax.get_ylim() for ax in over.axes]
    for error, gap, index in ranges:
        assert error == (0, 100)
        assert gap[0] < -100
        assert gap[1] > 100
        assert index[0] == 0
