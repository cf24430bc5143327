import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records import RunRecords, find_runs
from robustdyn.records.schema import EPOCHS, WCI
from robustdyn.studies.correlation import (
    GRID,
    STUDY,
    across_seeds,
    draw_by_epoch,
    draw_scatter,
    draw_spread,
    pairs_of,
    per_seed,
    pooled,
    spread,
)
from robustdyn.studies.shared import study
from tests.records.synthetic import config, write_hydra
from tests.runs import compose
from tests.tolerances import EXACT64

EXACT = EXACT64["rtol"]
DECAY = 7
LAST = 20
GAPS = ["robust_loss_gap", "robust_error_gap"]


def write(path, seed, wci, gaps, *, evaluated=lambda epoch: True, rate=None, **settings):
    """A run whose WCI and gaps over epochs are given; ``rate`` of an epoch."""
    write_hydra(path, config(seed=seed, **settings), [f"seed={seed}"])
    records = RunRecords(path)
    for epoch, (index, loss, error) in enumerate(zip(wci, *gaps, strict=True)):
        row = dict.fromkeys(EPOCHS.required) | {"epoch": epoch, "step": epoch + 1, "seconds": 1.0}
        row["lr"] = (rate or (lambda e: 0.1 if e < DECAY else 0.01))(epoch)
        if evaluated(epoch):
            row |= {"robust_loss_gap": loss, "robust_error_gap": error}
        records.append("epochs", row)
        if index is not None:
            measured = dict.fromkeys(WCI.required) | {"epoch": epoch, "step": epoch + 1}
            records.append("wci", measured | {"wci": index, "wci_se": 2.0})
    return path


def curves(rng, epochs=LAST):
    """WCI, loss gap and error gap of one seed: a trend, the seed's own level, noise."""
    index = 60 + rng.normal(0, 5) + 4 * np.arange(epochs) + rng.normal(0, 6, epochs)
    loss = 0.1 + rng.normal(0, 0.05) + 0.003 * index + rng.normal(0, 0.05, epochs)
    return index.tolist(), (loss.tolist(), (0.2 * loss + rng.normal(0, 0.01, epochs)).tolist())


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Six seeds, evaluated at odd epochs only."""
    path = tmp_path_factory.mktemp("sweep")
    rng = np.random.default_rng(1)
    for seed in range(6):
        write(path / f"seed={seed}", seed, *curves(rng), evaluated=lambda epoch: epoch % 2 == 1)
    return path


@pytest.fixture(scope="module")
def answer(sweep):
    return STUDY.answer(find_runs(sweep))


def synthetic(seeds=6, epochs=30, decay=10, rng=None, repeats=1):
    """A frame as ``pairs_of`` makes it; each epoch ``repeats`` times over."""
    rng = rng or np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        index, (loss, error) = curves(rng, epochs)
        for epoch in range(epochs):
            row = {
                "seed": seed,
                "epoch": epoch,
                "decayed": epoch >= decay,
                "wci": index[epoch],
                "wci_se": 2.0,
            }
            rows += [row | {"robust_loss_gap": loss[epoch], "robust_error_gap": error[epoch]}] * repeats
    return pd.DataFrame(rows)


def pick(table, epochs="from the first decay on", form="values", gap="robust_loss_gap"):
    return table[(table["epochs"] == epochs) & (table["form"] == form) & (table["gap"] == gap)]


def clustered(x, y, groups):
    """Slope and intercept with their cluster-robust covariance, by its textbook formula (Liang & Zeger)."""
    design = np.column_stack([np.ones_like(x), x])
    bread = np.linalg.inv(design.T @ design)
    beta = bread @ design.T @ y
    scores = design * (y - design @ beta)[:, None]
    sums = np.array([scores[groups == group].sum(axis=0) for group in np.unique(groups)])
    count, points = len(sums), len(x)
    factor = count / (count - 1) * (points - 1) / (points - 2)
    return beta, factor * bread @ sums.T @ sums @ bread, stats.t.ppf(0.975, count - 1)


def test_an_exact_law_is_found_exactly():
    pairs = synthetic()
    pairs["robust_loss_gap"] = 0.2 + 0.003 * pairs["wci"]
    pairs["robust_error_gap"] = 0.4 - 0.0007 * pairs["wci"]
    own, whole = per_seed(pairs), pooled(pairs)
    for form in ("values", "changes"):
        for gap, slope, r in (("robust_loss_gap", 0.003, 1.0), ("robust_error_gap", -0.0007, -1.0)):
            np.testing.assert_allclose(pick(own, form=form, gap=gap)["slope"], slope, rtol=EXACT)
            np.testing.assert_allclose(pick(own, form=form, gap=gap)["r"], r, rtol=EXACT)
            row = pick(whole, form=form, gap=gap).iloc[0]
            names = ["slope", "naive_low", "naive_high", "cluster_low", "cluster_high", "seeds_mean"]
            np.testing.assert_allclose(row[names].astype(float), slope, rtol=EXACT)
            assert row["r2"] == pytest.approx(1.0, rel=EXACT)


def test_each_seeds_numbers_are_those_of_least_squares_on_its_own_epochs():
    pairs = synthetic()
    table = per_seed(pairs)
    for epochs, points in (("from the first decay on", pairs[pairs["decayed"]]), ("all", pairs)):
        for seed, own in points.groupby("seed"):
            row = pick(table, epochs).set_index("seed").loc[seed]
            slope, r = np.polyfit(own["wci"], own["robust_loss_gap"], 1)[0], row["r"]
            assert row["slope"] == pytest.approx(slope, rel=EXACT)
            assert r == pytest.approx(np.corrcoef(own["wci"], own["robust_loss_gap"])[0, 1], rel=EXACT)
            freedom = len(own) - 2
            expected = 2 * stats.t.sf(abs(r) * np.sqrt(freedom / (1 - r**2)), freedom)
            assert row["p"] == pytest.approx(expected, rel=EXACT)
            assert row["points"] == len(own)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize(("epochs", "start"), [("from the first decay on", 10), ("all", 0)])
def test_pooled_intervals_are_those_of_their_formulas(epochs, start, gap):
    pairs = synthetic()
    row = pick(pooled(pairs), epochs, gap=gap).iloc[0]
    used = pairs[pairs["epoch"] >= start]
    x, y = used["wci"].to_numpy(), used[gap].to_numpy()
    line = stats.linregress(x, y)
    half = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    naive = [line.slope, line.slope - half, line.slope + half, line.rvalue**2]
    np.testing.assert_allclose(
        row[["slope", "naive_low", "naive_high", "r2"]].astype(float), naive, rtol=EXACT
    )
    beta, covariance, t = clustered(x, y, used["seed"].to_numpy())
    half = t * np.sqrt(covariance[1, 1])
    ends = row[["cluster_low", "cluster_high"]].astype(float)
    np.testing.assert_allclose(ends, [beta[1] - half, beta[1] + half], rtol=EXACT)
    p = 2 * stats.t.sf(abs(beta[1]) / np.sqrt(covariance[1, 1]), 5)
    assert row["cluster_p"] == pytest.approx(p, rel=EXACT)
    own = [np.polyfit(rows["wci"], rows[gap], 1)[0] for _, rows in used.groupby("seed")]
    interval = stats.t.interval(0.95, 5, np.mean(own), stats.sem(own))
    found = row[["seeds_mean", "seeds_low", "seeds_high"]].astype(float)
    np.testing.assert_allclose(found, [np.mean(own), *interval], rtol=EXACT)


def test_saying_each_epoch_nine_times_over_fools_the_naive_interval_only():
    once, nine = (pooled(synthetic(repeats=repeats)) for repeats in (1, 9))
    for name, ratio in (("naive", 3.0), ("cluster", 1.0), ("seeds", 1.0)):
        wide, narrow = (
            float((pick(t)[f"{name}_high"] - pick(t)[f"{name}_low"]).iloc[0]) for t in (once, nine)
        )
        # degrees of freedom, 118 or 1078, are all that differs
        assert wide / narrow == pytest.approx(ratio, rel=0.02)


def test_unrelated_trends_correlate_and_their_changes_do_not():
    rng = np.random.default_rng(3)
    pairs = synthetic(epochs=60)
    pairs["wci"] = 50 + 2 * pairs["epoch"] + rng.normal(0, 3, len(pairs))
    pairs["robust_loss_gap"] = 0.02 * pairs["epoch"] + rng.normal(0, 0.03, len(pairs))
    table = pooled(pairs)
    assert (pick(per_seed(pairs))["r"] > 0.95).all()
    assert pick(table)["cluster_low"].iloc[0] > 0
    changes = pick(table, form="changes").iloc[0]
    assert changes["cluster_low"] < 0 < changes["cluster_high"]
    assert abs(pick(per_seed(pairs), form="changes")["r"].mean()) < 0.15
    assert changes["points"] == 6 * 49  # ten epochs before the decay, and none across it


def test_a_change_is_from_the_pair_before_of_the_same_seed():
    pairs = synthetic(seeds=3, epochs=8, decay=3)
    own = per_seed(pairs)
    for seed, rows in pairs.groupby("seed"):
        x, y = (np.diff(rows[name]) for name in ("wci", "robust_loss_gap"))
        for epochs, start in (("all", 0), ("from the first decay on", 3)):
            row = pick(own, epochs, "changes").set_index("seed").loc[seed]
            assert row["points"] == 7 - start
            assert row["r"] == pytest.approx(np.corrcoef(x[start:], y[start:])[0, 1], rel=EXACT)


def test_correlation_over_seeds_is_fishers_at_each_epoch_that_all_seeds_have():
    pairs = synthetic(seeds=8)
    pairs = pairs[~((pairs["seed"] == 3) & (pairs["epoch"] == 7))]
    table = across_seeds(pairs)
    assert sorted(set(range(30)) - set(table["epoch"])) == [7]
    for gap in GAPS:
        for epoch, row in table[table["gap"] == gap].set_index("epoch").iterrows():
            own = pairs[pairs["epoch"] == epoch]
            r = np.corrcoef(own["wci"], own[gap])[0, 1]
            half = stats.norm.ppf(0.975) / np.sqrt(8 - 3)
            expected = [r, np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)]
            np.testing.assert_allclose(row[["r", "low", "high"]].astype(float), expected, rtol=EXACT)


def test_spread_of_six_known_numbers():
    values = [90.0, 110.0, 100.0, 95.0, 105.0, 100.0]  # squared deviations sum to 250
    frame = pd.DataFrame({"epoch": 4, "wci": values, "wci_se": [3.0, 4.0, 0.0, 0.0, 5.0, 0.0]})
    alone = pd.DataFrame({"epoch": [5], "wci": [80.0], "wci_se": [1.0]})
    (row,) = spread(pd.concat([frame, alone])).to_dict("records")
    assert (row["epoch"], row["seeds"], row["mean"]) == (4, 6, 100.0)
    assert row["sd"] == pytest.approx(np.sqrt(50.0), rel=EXACT)
    # χ² with five degrees of freedom, from a printed table: 0.831 and 12.833
    assert row["sd_low"] == pytest.approx(np.sqrt(250 / 12.833), rel=1e-3)
    assert row["sd_high"] == pytest.approx(np.sqrt(250 / 0.831), rel=1e-3)
    assert row["sd_share"] == pytest.approx(np.sqrt(50.0) / 100, rel=EXACT)
    assert row["measurement_se"] == pytest.approx(np.sqrt(50 / 6), rel=EXACT)


def test_pairs_are_epochs_measured_and_evaluated_marked_from_the_first_decay_on(sweep, answer):
    pairs = answer.tables["pairs"]
    assert pairs_of(find_runs(sweep)).equals(pairs)
    for _, own in pairs.groupby("seed"):
        assert own["epoch"].tolist() == list(range(1, LAST, 2))
        assert own.loc[own["decayed"], "epoch"].tolist() == list(range(7, LAST, 2))
    rng = np.random.default_rng(1)
    index, (loss, error) = curves(rng)
    own = pairs[pairs["seed"] == 0]
    expected = np.column_stack([index, loss, error])[1::2]
    np.testing.assert_allclose(own[["wci", *GAPS]], expected, rtol=EXACT)
    assert answer.tables["wci_spread"]["epoch"].tolist() == list(range(LAST))  # needs no evaluation


def test_findings_say_whether_they_go_together(answer):
    loss, error = answer.findings
    own, row = pick(answer.tables["per_seed"]), pick(answer.tables["pooled"]).iloc[0]
    clear = "cannot be told" if row["cluster_low"] < 0 < row["cluster_high"] else "differs"
    assert f"r is {own['r'].mean():.2f} on average over seeds, and the pooled slope {clear} from 0" in loss
    assert error.startswith("Robust error gap")


def test_the_scatter_shows_its_table(answer):
    table = answer.pictures[0].data
    figure = draw_scatter(table)
    for ax, (form, gap) in zip(
        figure.axes, [(f, g) for f in ("values", "changes") for g in GAPS], strict=True
    ):
        own = table[(table["form"] == form) & (table["gap"] == gap)]
        scale = 100 if gap == "robust_error_gap" else 1
        points, line = own[own["kind"] == "point"], own[own["kind"] == "line"]
        drawn = [drawn.get_xydata() for drawn in ax.lines if drawn.get_marker() == "o"]
        expected = points[["wci", "value"]].to_numpy() * [1, scale]
        order = np.lexsort(expected.T), np.lexsort(np.concatenate(drawn).T)
        np.testing.assert_allclose(np.concatenate(drawn)[order[1]], expected[order[0]], rtol=EXACT)
        assert len(points) == (60 if form == "values" else 54)
        assert points["in_line"].sum() == (42 if form == "values" else 36)
        (fit,) = (drawn for drawn in ax.lines if drawn.get_marker() == "None")
        np.testing.assert_allclose(fit.get_xydata(), line[["wci", "value"]] * [1, scale], rtol=EXACT)
        bands = [c.get_paths()[0].vertices[:, 1] for c in ax.collections if isinstance(c, PolyCollection)]
        for band, name in zip(bands, ("cluster", "naive"), strict=True):
            assert band.min() == pytest.approx(line[f"{name}_low"].min() * scale, rel=EXACT)
            assert band.max() == pytest.approx(line[f"{name}_high"].max() * scale, rel=EXACT)
        shown = "percentage points" if scale == 100 else "nats"
        assert shown in ax.get_ylabel()


def test_the_bands_about_the_line_are_those_of_their_formulas(answer):
    pairs, table = answer.tables["pairs"], answer.pictures[0].data
    line = table[(table["kind"] == "line") & (table["form"] == "values") & (table["gap"] == GAPS[0])]
    used = pairs[pairs["decayed"]]
    x, y = used["wci"].to_numpy(), used[GAPS[0]].to_numpy()
    beta, covariance, t = clustered(x, y, used["seed"].to_numpy())
    grid = np.column_stack([np.ones(GRID), np.linspace(x.min(), x.max(), GRID)])
    half = t * np.sqrt(np.einsum("ni,ij,nj->n", grid, covariance, grid))
    np.testing.assert_allclose(line["cluster_low"], grid @ beta - half, rtol=EXACT)
    np.testing.assert_allclose(line["cluster_high"], grid @ beta + half, rtol=EXACT)
    fit = stats.linregress(x, y)
    scatter = np.sum((y - grid[0, 0] * fit.intercept - fit.slope * x) ** 2) / (len(x) - 2)
    spread_x = 1 / len(x) + (grid[:, 1] - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2)
    half = stats.t.ppf(0.975, len(x) - 2) * np.sqrt(scatter * spread_x)
    np.testing.assert_allclose(line["naive_high"] - line["naive_low"], 2 * half, rtol=EXACT)


def test_curves_over_epochs_show_their_tables(answer):
    by_epoch = answer.pictures[1].data
    figure = draw_by_epoch(by_epoch)
    for ax, gap in zip(figure.axes, GAPS, strict=True):
        own = by_epoch[(by_epoch["gap"] == gap)].dropna(subset=["r"])
        (curve,) = (line for line in ax.lines if line.get_marker() == "o")
        np.testing.assert_array_equal(curve.get_xydata(), own[["epoch", "r"]])
        assert [text.get_text() for text in ax.texts] == ["η → 0.01"]
    over = answer.pictures[2].data
    left, right = draw_spread(over).axes
    singles = [line.get_ydata() for line in left.lines if len(line.get_xdata()) == LAST]
    assert len(singles) == 7
    mean = over[over["kind"] == "over seeds"]
    np.testing.assert_array_equal(singles[-1], mean["mean"])
    np.testing.assert_allclose(np.mean(singles[:-1], axis=0), mean["mean"], rtol=EXACT)
    np.testing.assert_array_equal(right.lines[0].get_ydata(), mean["sd"])
    np.testing.assert_array_equal(right.lines[1].get_ydata(), mean["measurement_se"])
    marks = [line.get_xdata()[0] for line in left.lines if list(line.get_ydata()) == [0, 1]]
    assert marks == [DECAY]


def test_the_study_writes_its_files(sweep, tmp_path):
    written = study.conduct("correlation", sweep, tmp_path)
    assert {path.stem for path in written.tables} == {
        "pairs",
        "per_seed",
        "pooled",
        "across_seeds",
        "wci_spread",
    }
    assert len(written.figures) == 9
    assert all(path.stat().st_size > 0 for path in (*written.tables, *written.figures))
    assert written.findings.read_text().startswith(STUDY.question)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__train_size": 200}, r"runs differ in more than their seed: data\.train_size \(300, 200\);"),
        ({"seed": 0}, "seed 0 is that of .*run0 too"),
        ({"unmeasured": True}, "run2: no measured WCI; train with measure=index"),
        ({"rate": lambda epoch: 0.1}, "run2: no decay of the learning rate"),
        (
            {"evaluated": lambda epoch: epoch in (1, 7, 8, 9)},
            "run2: WCI and gaps .* at 3 epochs .*measure.epochs",
        ),
    ],
)
def test_runs_that_do_not_answer_the_question_are_refused(changed, message, tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(3):
        index, gaps = curves(rng)
        own = dict(changed) if seed == 2 else {}
        index = [None] * LAST if own.pop("unmeasured", False) else index
        write(tmp_path / f"run{seed}", own.pop("seed", seed), index, gaps, **own)
    with pytest.raises(RecordError, match=message):
        STUDY.answer(find_runs(tmp_path))


def test_two_seeds_are_too_few(sweep):
    with pytest.raises(RecordError, match=r"2 seeds, at least 3 are needed; .*experiment=correlation"):
        STUDY.answer(find_runs([sweep / "seed=0", sweep / "seed=1"]))


def test_the_preset_measures_the_index_every_second_epoch_and_is_the_papers_experiment_at_full_scale():
    small, full = compose("experiment=correlation"), compose("experiment=correlation", "scale=full")
    for cfg in (small, full):
        assert cfg.measure.epochs == "every 2"
        assert [name for name, spec in cfg.measure.measurements.items() if spec] == ["weight_curvature"]
    assert "Digits" in small.data["_target_"]
    assert "CIFAR10" in full.data["_target_"]
    assert (full.trainer.max_epochs, list(full.decay_epochs), full.data.train_size) == (200, [100, 150], None)
    assert (full.model.width, full.attack.train.batchnorm) == (64, "train")
