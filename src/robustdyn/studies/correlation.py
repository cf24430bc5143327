"""Correlation of WCI and robust gaps within runs and across seeds (WCI paper, figures 5, 6, appendix C.1).

Epochs of one run are not independent, and index and gap both have a trend over epochs, which any two trends
share. Beside the paper's numbers stand those that allow for it: intervals clustered by seed, and the same
statistics of changes from one measured epoch to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats
from statsmodels.regression.linear_model import OLS  # type: ignore[import-untyped]
from statsmodels.tools.tools import add_constant  # type: ignore[import-untyped]

from robustdyn.errors import RecordError
from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, combine
from robustdyn.records.schema import EPOCHS, ROBUST_ERROR_GAP, ROBUST_LOSS_GAP, WCI, WCI_SE
from robustdyn.report import style
from robustdyn.report.plotting import Cast, finish, key, mark_decays
from robustdyn.report.statistics import by_run, decay_epochs
from robustdyn.studies.shared.comparing import (
    LEVEL,
    mean_with_interval,
    pearson,
    require_repetitions,
)
from robustdyn.studies.shared.comparison_figures import draw_with_interval
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.wording import sentence

GAPS = (ROBUST_LOSS_GAP, ROBUST_ERROR_GAP)
DECAYED, ALL = "from the first decay on", "all"
VALUES, CHANGES = "values", "changes"
MIN_SEEDS = 3
MIN_EPOCHS = 4  # three changes, the fewest that a correlation says anything about
GRID = 60  # points of a drawn line


def pairs_of(runs: Sequence[Run]) -> pd.DataFrame:
    """WCI and gaps at every epoch at which both are known.

    Args:
        runs: Repetitions of one setting with different seeds.

    Returns:
        ``seed``, ``epoch``, ``wci``, ``wci_se``, the two gaps in recorded units, and ``decayed``: whether the
        run's learning rate had decayed before that epoch's training.

    Raises:
        RecordError: Fewer than three seeds, runs that differ in more, a seed given twice, or a run without
            decay or with fewer than four such epochs since.
    """
    require_repetitions(runs)
    if len(runs) < MIN_SEEDS:
        raise RecordError(
            f"{runs[0].path}: {len(runs)} seeds, at least {MIN_SEEDS} are needed;"
            " robustdyn-train experiment=correlation trains six"
        )
    epochs, wci = by_run(combine(runs, "epochs")), by_run(combine(runs, "wci"))
    parts = []
    for run in runs:
        own, measured = epochs[run.label], wci[run.label].dropna(subset=["wci"])
        if measured.empty:
            raise RecordError(f"{run.path}: no measured WCI; train with measure=index or default")
        decays = decay_epochs(own)
        if not decays:
            raise RecordError(
                f"{run.path}: no decay of the learning rate; train with a schedule that has one"
                " (schedule=piecewise)"
            )
        both = measured[["epoch", "wci", WCI_SE]].merge(
            own[["epoch", *GAPS]].dropna(), on="epoch", validate="one_to_one"
        )
        both = both.assign(seed=run.config[SEED], decayed=both["epoch"] >= decays[0])
        if both["decayed"].sum() < MIN_EPOCHS:
            raise RecordError(
                f"{run.path}: WCI and gaps are both known at {both['decayed'].sum()} epochs since the first"
                f" decay, {MIN_EPOCHS} are needed; let measure.epochs hold epochs that are evaluated"
                " (trainer.check_val_every_n_epoch=2: 1, 3, 5, ...)"
            )
        parts.append(both)
    columns = ["seed", "epoch", "decayed", "wci", WCI_SE, *GAPS]
    return pd.concat(parts, ignore_index=True)[columns].sort_values(["seed", "epoch"], ignore_index=True)


def per_seed(pairs: pd.DataFrame) -> pd.DataFrame:
    """Pearson's correlation and the slope of gap on WCI in each run.

    Args:
        pairs: As ``pairs_of`` returns them.

    Returns:
        One row per choice of epochs, form (values or changes), gap and seed: ``points``, ``slope`` (recorded
        units of the gap per unit of WCI), ``r`` with its 95 % interval (Fisher) and ``p``. Interval and p
        take epochs for independent.
    """
    rows = []
    for what, sample in _samples(pairs):
        for seed, own in sample.groupby("seed"):
            slope = stats.linregress(own["wci"], own["value"]).slope
            row = {"seed": seed, "points": len(own), "slope": slope}
            rows.append(what | row | pearson(own["wci"], own["value"]))
    return pd.DataFrame(rows)


def pooled(pairs: pd.DataFrame) -> pd.DataFrame:
    """Least squares of gap on WCI over all seeds' epochs, with three 95 % intervals of the slope.

    ``naive`` takes epochs for independent, as the paper does; ``cluster`` allows for any dependence within a
    seed (Student's t with seeds − 1 degrees of freedom); ``seeds`` is the mean of the seeds' own slopes with
    Student's interval (Ibragimov & Müller, JBES 2010), sound with few seeds too.

    Args:
        pairs: As ``pairs_of`` returns them.

    Returns:
        One row per choice of epochs, form and gap; slopes in recorded units of the gap per unit of WCI.
    """
    names = ["epochs", "form", "gap"]
    of_seeds = mean_with_interval(per_seed(pairs), names, "slope").drop(columns="seeds")
    of_seeds = of_seeds.rename(columns={end: f"seeds_{end}" for end in ("mean", "low", "high")})
    rows = []
    for what, sample in _samples(pairs):
        naive, cluster = _fits(sample)
        row: dict[str, Any] = {
            "points": len(sample),
            "seeds": sample["seed"].nunique(),
            "r2": naive.rsquared,
            "slope": naive.params["wci"],
        }
        for name, fit in (("naive", naive), ("cluster", cluster)):
            low, high = fit.conf_int(1 - LEVEL).loc["wci"]
            row |= {f"{name}_low": low, f"{name}_high": high, f"{name}_p": fit.pvalues["wci"]}
        rows.append(what | row)
    return pd.DataFrame(rows).merge(of_seeds, on=names, validate="one_to_one")


def across_seeds(pairs: pd.DataFrame) -> pd.DataFrame:
    """Pearson's correlation over seeds of WCI and gap at one epoch, with Fisher's 95 % interval.

    Args:
        pairs: As ``pairs_of`` returns them.

    Returns:
        ``epoch``, ``gap``, ``seeds``, ``r``, ``low``, ``high``, ``p``, at the epochs that all seeds have.
    """
    seeds = pairs["seed"].nunique()
    rows = []
    for gap in GAPS:
        for epoch, own in pairs.groupby("epoch"):
            if len(own) == seeds:
                head = {"epoch": epoch, "gap": gap, "seeds": seeds}
                rows.append(head | pearson(own["wci"], own[gap]))
    return pd.DataFrame(rows, columns=["epoch", "gap", "seeds", "r", "low", "high", "p"])


def spread(wci: pd.DataFrame) -> pd.DataFrame:
    """WCI over seeds by epoch: mean and standard deviation, each with a 95 % interval.

    Args:
        wci: Rows of the ``wci`` table of all seeds.

    Returns:
        ``epoch``, ``mean``, ``low``, ``high``, ``seeds``, ``sd`` with ``sd_low`` and ``sd_high`` (χ², of
        normal values), ``sd_share`` of the mean, and ``measurement_se``: root mean square of the seeds'
        standard errors, what of ``sd`` is measuring. Epochs with one seed are left out.
    """
    found = mean_with_interval(wci, ["epoch"], "wci")
    by_epoch = wci.dropna(subset=["wci"]).groupby("epoch")
    found = found.merge(by_epoch["wci"].std().rename("sd"), on="epoch")
    error = by_epoch[WCI_SE].agg(lambda errors: np.sqrt(np.mean(errors**2))).rename("measurement_se")
    found = found.merge(error, on="epoch")
    found = found[found["seeds"] > 1].sort_values("epoch", ignore_index=True)
    freedom, tail = found["seeds"] - 1, (1 - LEVEL) / 2
    return found.assign(
        sd_low=found["sd"] * np.sqrt(freedom / stats.chi2.ppf(1 - tail, freedom)),
        sd_high=found["sd"] * np.sqrt(freedom / stats.chi2.ppf(tail, freedom)),
        sd_share=found["sd"] / found["mean"],
    )


def answer(runs: Sequence[Run]) -> Answer:
    """Tables, figures and findings; see the functions above."""
    pairs = pairs_of(runs)
    seed_of = {run.label: run.config[SEED] for run in runs}
    wci = combine(runs, "wci")
    wci = wci.assign(seed=wci["run"].map(seed_of))
    rates = _rates(combine(runs, "epochs"))
    of_seed, regression, by_epoch, spreads = per_seed(pairs), pooled(pairs), across_seeds(pairs), spread(wci)
    pictures = (
        Picture("wci_against_gaps", _scatter_table(pairs), draw_scatter),
        Picture("correlation_by_epoch", _with_rates(by_epoch, rates), draw_by_epoch),
        Picture("wci_spread", _spread_table(wci, spreads, rates), draw_spread),
    )
    tables = {
        "pairs": pairs,
        "per_seed": of_seed,
        "pooled": regression,
        "across_seeds": by_epoch,
        "wci_spread": spreads,
    }
    return Answer(tables, pictures, findings_of(tables))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Whether WCI and each gap, and their changes, go together since the first decay."""
    sentences = []
    for gap in GAPS:
        parts = []
        for form, text in ((VALUES, "r"), (CHANGES, "r of changes")):
            own, row = (
                table[(table["epochs"] == DECAYED) & (table["form"] == form) & (table["gap"] == gap)]
                for table in (tables["per_seed"], tables["pooled"])
            )
            low, high = row[["cluster_low", "cluster_high"]].iloc[0]
            clear = "differs" if low > 0 or high < 0 else "cannot be told"
            parts.append(
                f"{text} is {own['r'].mean():.2f} on average over seeds, and the pooled slope {clear} from 0 "
                "(clustered by seed)"
            )
        sentences.append(sentence(f"{EPOCHS[gap].label}, epochs {DECAYED}: {'; '.join(parts)}"))
    return sentences


@style.styled
def draw_scatter(table: pd.DataFrame) -> Figure:
    """Gap against WCI (above) and their changes (below), the pooled line and both its intervals.

    Args:
        table: ``kind`` ``point`` (hollow before the first decay) or ``line``, for each form and gap.
    """
    points = table[table["kind"] == "point"]
    seeds = sorted(points["seed"].unique())
    colour_of = dict(zip(seeds, style.colours(len(seeds)), strict=True))
    figure = style.new_figure(f"WCI against robust generalisation gaps, {len(seeds)} seeds", 7.2)
    axes = figure.subplots(2, 2)
    for row, form in zip(axes, (VALUES, CHANGES), strict=True):
        for ax, gap in zip(row, GAPS, strict=True):
            own = table[(table["form"] == form) & (table["gap"] == gap)]
            _draw_points(ax, own[own["kind"] == "point"], colour_of, EPOCHS[gap].scale)
            _draw_line(ax, own[own["kind"] == "line"], EPOCHS[gap].scale)
            sign = "" if form == VALUES else "Δ "
            ax.set_xlabel(f"{sign}{WCI['wci'].shown}")
            ax.set_ylabel(f"{sign}gap ({EPOCHS[gap].shown_unit})")
            name = EPOCHS[gap].label.capitalize()
            ax.set_title(name if form == VALUES else f"{name}: changes between epochs")
    grey = style.NEUTRAL
    handles: list[Line2D | Patch] = [key(f"seed {seed}", "", "o", colour_of[seed]) for seed in seeds]
    handles += [
        key("before, or across, the first decay", "", "o", style.MARK, fillstyle="none"),
        key("pooled line since the first decay", colour=grey),
        Patch(color=grey, alpha=0.15, label="95 %, clustered by seed"),
        Patch(color=grey, alpha=0.5, label="95 %, epochs as independent"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


@style.styled
def draw_by_epoch(table: pd.DataFrame) -> Figure:
    """Correlation over seeds by epoch with its interval.

    Args:
        table: ``across_seeds`` with the learning rate of every epoch, empty where nothing was measured.
    """
    seeds = int(table["seeds"].max())
    figure = style.new_figure(f"Correlation of WCI and gap over {seeds} seeds, by epoch (band: 95 %)", 3.8)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, gap, colour in zip(axes, GAPS, style.PALETTE, strict=False):
        own = table[table["gap"] == gap]
        curve = own.dropna(subset=["r"]).rename(columns={"r": "mean"})
        draw_with_interval(ax, curve, "epoch", colour=colour, marker="o")
        ax.axhline(0.0, color=style.MARK, linewidth=0.8)
        ax.set_ylim(-1.05, 1.05)
        finish(ax, EPOCHS[gap].label.capitalize(), "Pearson's r over seeds")
    axes[1].set_ylabel("")
    _mark_rates(axes, table[table["gap"] == GAPS[0]])
    return figure


@style.styled
def draw_spread(table: pd.DataFrame) -> Figure:
    """WCI of the seeds and their mean; their standard deviation beside that of measuring.

    Args:
        table: ``kind`` ``seed`` (one WCI) or ``over seeds``, with the learning rate of every epoch.
    """
    single, over = table[table["kind"] == "seed"], table[table["kind"] == "over seeds"]
    measured = over.dropna(subset=["mean"])
    seeds = single["seed"].nunique()
    figure = style.new_figure(f"WCI over {seeds} seeds (bands: 95 %)", 4.1)
    left, right = figure.subplots(1, 2)
    for _, own in single.groupby("seed"):
        left.plot(own["epoch"], own["wci"], color=style.PALETTE[0], linewidth=0.8, alpha=0.45)
    draw_with_interval(left, measured, "epoch", colour=style.PALETTE[0])
    finish(left, "Mean and single seeds", WCI["wci"].shown)
    deviation = measured[["epoch", "sd", "sd_low", "sd_high"]]
    deviation = deviation.set_axis(["epoch", "mean", "low", "high"], axis=1)
    draw_with_interval(right, deviation, "epoch", colour=style.PALETTE[1])
    right.plot(measured["epoch"], measured["measurement_se"], color=style.MARK, linestyle="--")
    finish(right, "Standard deviation over seeds", "standard deviation of WCI")
    right.set_ylim(bottom=0.0)
    _mark_rates((left, right), over)
    handles = [
        key(f"mean of {seeds} seeds", colour=style.PALETTE[0], linewidth=2.0),
        key("single seeds", colour=style.PALETTE[0], linewidth=0.8, alpha=0.45),
        key("standard deviation over seeds", colour=style.PALETTE[1]),
        key("standard error of one measurement", "--"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _samples(pairs: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """What is counted, and its points (seed, epoch, wci, value): each choice of epochs, form and gap."""
    for epochs, rows in ((DECAYED, pairs[pairs["decayed"]]), (ALL, pairs)):
        for form, points in ((VALUES, rows), (CHANGES, _changes(rows))):
            for gap in GAPS:
                sample = points[["seed", "epoch", "wci", gap]].rename(columns={gap: "value"})
                yield {"epochs": epochs, "form": form, "gap": gap}, sample


def _changes(rows: pd.DataFrame) -> pd.DataFrame:
    """The same columns, WCI and gaps as changes since the seed's row before; its first row is dropped."""
    columns = ["wci", *GAPS]
    return rows.assign(**rows.groupby("seed")[columns].diff()).dropna(subset=columns)


def _fits(sample: pd.DataFrame) -> tuple[Any, Any]:
    """Least squares of ``value`` on ``wci``: with the naive covariance, and clustered by seed."""
    model = OLS(sample["value"], add_constant(sample["wci"]))
    groups = pd.factorize(sample["seed"])[0]
    return model.fit(), model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)


def _rates(epochs: pd.DataFrame) -> pd.DataFrame:
    """``epoch`` and ``lr`` of all trained epochs; no rate where seeds differ."""
    by_epoch = epochs.groupby("epoch")["lr"]
    return by_epoch.first().where(by_epoch.nunique() == 1).reset_index()


def _with_rates(by_epoch: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    parts = [
        rates.merge(by_epoch[by_epoch["gap"] == gap], on="epoch", how="left").assign(gap=gap) for gap in GAPS
    ]
    return pd.concat(parts, ignore_index=True)


def _scatter_table(pairs: pd.DataFrame) -> pd.DataFrame:
    """All points, and the lines and bands of those since the first decay (``in_line``)."""
    samples = {tuple(what.values()): sample for what, sample in _samples(pairs)}
    parts = []
    for form in (VALUES, CHANGES):
        for gap in GAPS:
            head = {"form": form, "gap": gap}
            points, used = samples[ALL, form, gap], samples[DECAYED, form, gap]
            parts.append(points.assign(kind="point", in_line=points.index.isin(used.index), **head))
            parts.append(_line(used).assign(kind="line", **head))
    columns = ["kind", "form", "gap", "seed", "epoch", "in_line", "wci", "value"]
    bands = ["naive_low", "naive_high", "cluster_low", "cluster_high"]
    types = {"seed": "Int64", "epoch": "Int64", "in_line": "boolean"}
    return pd.concat(parts, ignore_index=True)[columns + bands].astype(types)


def _line(sample: pd.DataFrame) -> pd.DataFrame:
    """The pooled line over the points' range of WCI, and both 95 % intervals of its height."""
    line = pd.DataFrame({"wci": np.linspace(sample["wci"].min(), sample["wci"].max(), GRID)})
    for name, fit in zip(("naive", "cluster"), _fits(sample), strict=True):
        # not get_prediction: it takes Student's t of points − 2 degrees of freedom, clusters or not
        height = fit.t_test(add_constant(line[["wci"]]).to_numpy())
        line["value"] = height.effect
        line[f"{name}_low"], line[f"{name}_high"] = height.conf_int(1 - LEVEL).T
    return line


def _spread_table(wci: pd.DataFrame, spreads: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    single = wci.dropna(subset=["wci"])[["seed", "epoch", "wci"]].assign(kind="seed")
    over = rates.merge(spreads, on="epoch", how="left").assign(kind="over seeds")
    columns = ["kind", "seed", "epoch", "wci", *over.columns[1:-1]]
    both = pd.concat([single, over], ignore_index=True)[columns]
    return both.astype({"seed": "Int64", "seeds": "Int64"})


def _draw_points(ax: Axes, points: pd.DataFrame, colour_of: dict[Any, str], scale: float) -> None:
    for seed, own in points.groupby("seed"):
        for filled, some in own.groupby("in_line"):
            ax.plot(
                some["wci"],
                some["value"] * scale,
                color=colour_of[seed],
                linestyle="",
                marker="o",
                markersize=3.5 if filled else 3.0,
                fillstyle="full" if filled else "none",
                markeredgewidth=0.0 if filled else 0.6,
                alpha=0.7 if filled else 0.35,
            )


def _draw_line(ax: Axes, line: pd.DataFrame, scale: float) -> None:
    for name, alpha in (("cluster", 0.15), ("naive", 0.5)):
        low, high = line[f"{name}_low"] * scale, line[f"{name}_high"] * scale
        ax.fill_between(line["wci"], low, high, color=style.NEUTRAL, alpha=alpha, linewidth=0)
    ax.plot(line["wci"], line["value"] * scale, color=style.NEUTRAL, linewidth=1.4)


def _mark_rates(axes: Sequence[Axes], rates: pd.DataFrame) -> None:
    """Decays, from the rate of every epoch."""
    one = rates.assign(run="", group="")
    mark_decays(axes, one, Cast.of(one))


STUDY = Study(
    "Does the Weight-Curvature Index go with the robust gaps, within runs and across seeds?", answer
)
