import numpy as np
import pandas as pd
import pytest

from robustdyn.records import combine, find_runs, read_table
from robustdyn.records.reader import combine_tables
from robustdyn.report.statistics import (
    correlation,
    decay_epochs,
    final_and_best,
    format_number,
    headlines,
)
from tests.records.synthetic import DECAYS, write_run, write_sweep


def headline(runs):
    return [str(line) for line in headlines(runs, combine_tables(runs, ("epochs", "wci")))]


def rates(values):
    return pd.DataFrame({"epoch": range(len(values)), "lr": values})


@pytest.mark.parametrize(
    ("values", "decays"),
    [
        ([0.1] * 3 + [0.01] * 3 + [0.001] * 2, [3, 6]),
        ([0.1, 0.05], [1]),
        ([0.1, 0.1, 0.09, 0.09], []),  # less than a fifth
        (0.1 * (1 - np.arange(20) / 20), []),  # linear to zero
        (0.1 * (1 - np.arange(4) / 4), []),  # steep from its first epoch on
        (0.1 * 0.5 ** np.arange(6), []),  # exponential
        ([0.1, 0.01, 0.01, 0.001, 0.001], [1, 3]),
        (0.05 * (1 + np.cos(np.pi * np.arange(30) / 30)), []),  # cosine
        ([0.01, 0.05, 0.1, 0.05, 0.01], []),  # cyclic
        ([0.1] * 2 + [0.01, 0.006, 0.006, 0.004, 0.01, 0.01], [2, 5]),  # a rate that follows the WCI
        ([0.1, 0.1, np.nan, 0.01], [3]),
        ([], []),
    ],
)
def test_decays_are_drops_of_a_held_rate(values, decays):
    assert decay_epochs(rates(values)) == decays


def test_decays_are_found_whatever_the_order_of_rows(one):
    frame = read_table(one, "epochs")
    assert decay_epochs(frame.iloc[::-1]) == list(DECAYS)


def test_final_and_best_are_rows_of_the_record(methods):
    runs = find_runs(methods)
    table = final_and_best(runs, combine(runs, "epochs"))
    assert set(table["selection"]) == {"final", "best on test"}
    for run in runs:
        recorded = read_table(run.path, "epochs").set_index("epoch")
        own = table[table["run"] == run.label].set_index("selection")
        assert own.loc["final", "epoch"] == 39
        assert own.loc["best on test", "epoch"] == recorded["test_robust_error"].idxmin()
        for _, row in own.iterrows():
            for column in ("test_clean_error", "test_robust_error", "test_robust_loss", "robust_loss_gap"):
                assert row[column] == recorded.loc[row["epoch"], column]


def test_the_headline_of_one_run_is_in_its_record(one):
    epochs, wci = (read_table(one, t).set_index("epoch") for t in ("epochs", "wci"))
    loss, gap, index = headline(find_runs(one))
    low = epochs["test_robust_loss"].idxmin()
    losses = epochs["test_robust_loss"]
    assert (
        loss
        == f"test robust loss: minimum {losses[low]:.3f} (epoch {low}) → final {losses[39]:.3f} (epoch 39)"
    )
    gaps = epochs["robust_loss_gap"]
    assert f"before the first decay {gaps[19]:.3f} (epoch 19) → final {gaps[39]:.3f}" in gap
    assert f"{wci['wci'][18]:.1f} (epoch 18) → final {wci['wci'][39]:.1f} (epoch 39)" in index


def test_the_headline_of_seeds_is_their_mean_and_range(seeds):
    runs = find_runs(seeds)
    final = [read_table(run.path, "epochs")["test_robust_loss"].iloc[-1] for run in runs]
    text = headline(runs)[0]
    assert "(mean of 2 seeds [range])" in text
    assert f"final {np.mean(final):.3f} [{min(final):.3f}–{max(final):.3f}] (epoch 39)" in text


def test_the_headline_of_methods_names_each(methods):
    for text in headline(find_runs(methods)):
        assert all(f"method={m} " in text for m in ("at", "awp", "wci_lr"))


def test_the_headline_of_many_settings_names_the_extremes(tmp_path):
    for i in range(6):
        method = "at" if i == 3 else "awp"
        write_run(tmp_path / str(i), method, 0, perturbation__gamma=i, epochs=30, measured=())
    loss, _, index = headline(find_runs(tmp_path))
    assert "smallest and largest rise of 6 settings" in loss
    assert loss.index("gamma=3") > loss.index(";")
    assert index == "WCI: not measured"


def test_without_a_decay_the_lowest_loss_is_the_anchor(tmp_path):
    write_sweep(tmp_path, ("at",), epochs=10, measured=(0, 5))
    runs = find_runs(tmp_path)
    _, gap, index = headlines(runs, combine_tables(runs, ("epochs", "wci")))
    assert gap.start == index.start == "at the lowest test robust loss"
    ((first, last),) = gap.changes[0].pairs
    assert (first.epoch, last.epoch) == (9, 9)


def test_what_was_first_measured_after_the_decay_is_not_said_to_be_from_before_it(tmp_path):
    for seed, measured in enumerate([(20, 29), (2, 8, 29)]):  # the decay is before epoch 15
        write_run(tmp_path / str(seed), "at", seed, epochs=30, measured=measured)
    runs = find_runs(tmp_path)
    _, gap, index = headlines(runs, combine_tables(runs, ("epochs", "wci")))
    assert (gap.start, index.start) == ("before the first decay", "at the first measurement")
    epochs = {tuple(value.epoch for value in pair) for pair in index.changes[0].pairs}
    assert epochs == {(20, 29), (2, 29)}


def test_correlation_needs_three_different_points():
    x = pd.Series([1.0, 2.0, 3.0, np.nan])
    assert correlation(x, 2 * x + 1) == pytest.approx(1.0)
    assert correlation(x.head(2), x.head(2)) is None
    assert correlation(x, pd.Series([1.0] * 4)) is None


def test_numbers_read_well():
    values = [0, 0.0871, 0.89, 1.234567, 212.17, 35_000.0, 2e-6, -0.5]
    assert [format_number(v) for v in values] == [
        "0.000", "0.087", "0.890", "1.235", "212.2", "35,000", "2.00e-06", "-0.500",
    ]  # fmt: skip
