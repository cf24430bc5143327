"""Settings side by side: best and final epochs of their runs, over seeds, and differences paired by seed.

A setting is what its runs share but for the seed; the caller names it. All numbers are in the units people
read: errors in per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robustdyn.errors import RecordError
from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, combine
from robustdyn.records.schema import EPOCHS, Column
from robustdyn.report import style
from robustdyn.report.plotting import End, key
from robustdyn.report.statistics import BEST_ON_TEST, FINAL, final_and_best, of_run
from robustdyn.studies.shared.alike import require_repetitions
from robustdyn.studies.shared.over_seeds import draw_with_interval, mean_with_interval

METRICS = ("test_robust_error", "test_clean_error", "robust_error_gap", "test_robust_loss", "robust_loss_gap")
BEST, DIFFERENCE = "best", "final − best"
MOMENTS = (BEST, FINAL, DIFFERENCE)
BANDS = 5  # more curves than this, and their intervals hide one another
KEY = ["setting", "metric", "moment"]


def check_complete(runs: Sequence[Run]) -> None:
    """Refuse runs that are not at their last epoch, or were not evaluated there.

    Raises:
        RecordError: Some run is not; the message names it.
    """
    epochs = combine(runs, "epochs").dropna(subset=["test_robust_error"])
    for run in runs:
        wanted = int(run.config["trainer"]["max_epochs"])
        evaluated = of_run(epochs, run.label)["epoch"]
        reached = 0 if evaluated.empty else int(evaluated.max()) + 1
        if reached < wanted:
            raise RecordError(
                f"{run.path}: evaluated up to epoch {reached} of {wanted}; finish it (the same training "
                "command goes on), or leave it out"
            )


def best_and_final(runs: Sequence[Run], settings: Mapping[str, str]) -> pd.DataFrame:
    """``METRICS`` of each run at its best epoch, at its last, and their difference.

    The best epoch is that of the lowest test robust error, as in the papers: selected on the test set, so
    that "final − best" of that error cannot be negative.

    Args:
        runs: Complete runs.
        settings: Label of each run -> its setting.

    Returns:
        ``setting``, ``seed``, ``metric``, ``unit``, ``moment``, ``value``; settings in order.

    Raises:
        RecordError: Runs of one setting differ in more than their seed, or have the same.
    """
    require_repetitions(runs, lambda run: settings[run.label])
    seeds = {run.label: int(run.config[SEED]) for run in runs}
    wide = final_and_best(runs).replace({"selection": {BEST_ON_TEST: BEST}})
    long = wide.melt(["run", "selection"], list(METRICS), "metric", "value")
    long["setting"], long["seed"] = long["run"].map(settings), long["run"].map(seeds)
    long["value"] *= long["metric"].map({name: EPOCHS[name].scale for name in METRICS})
    found = long.pivot(index=["setting", "seed", "metric"], columns="selection", values="value")
    found[DIFFERENCE] = found[FINAL] - found[BEST]
    tidy = found[list(MOMENTS)].melt(ignore_index=False, var_name="moment").reset_index()
    tidy.insert(3, "unit", tidy["metric"].map({name: EPOCHS[name].shown_unit for name in METRICS}))
    return _ordered(tidy, list(dict.fromkeys(settings.values())))


def over_seeds(values: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval over seeds of ``best_and_final``."""
    return mean_with_interval(values, [*KEY[:2], "unit", "moment"], "value")


def against(values: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Every other setting minus ``reference``, seed by seed: mean and 95 % interval of the differences.

    Runs of one seed share initial weights and the order of the data, so that pairs differ less than runs.
    Seeds that only one of the two has are left out. The intervals are not adjusted for their number.
    """
    own = values[values["setting"] == reference].set_index(["seed", "metric", "moment"])["value"]
    rest = values[values["setting"] != reference].set_index(["seed", "metric", "moment"])
    by_seed = rest.assign(value=rest["value"] - own.reindex(rest.index)).reset_index()
    found = mean_with_interval(by_seed, [*KEY[:2], "unit", "moment"], "value")
    return found.assign(minus=reference)


def shown_table(means: pd.DataFrame) -> pd.DataFrame:
    """``over_seeds`` as a table to read: a row per setting, "mean ± half the interval" in the cells."""
    cells = means.assign(
        column=[
            f"{EPOCHS[metric].shown}, {moment}"
            for metric, moment in zip(means["metric"], means["moment"], strict=True)
        ],
        cell=[said(row, EPOCHS[row["metric"]]) for _, row in means.iterrows()],
    )
    wide = cells.pivot(index="setting", columns="column", values="cell")
    columns = [f"{EPOCHS[metric].shown}, {moment}" for metric in METRICS for moment in MOMENTS]
    seeds = means.groupby("setting", sort=False)["seeds"].max()
    wide = wide.reindex(index=list(dict.fromkeys(means["setting"])), columns=columns)
    wide.insert(0, "seeds", seeds)
    return wide.reset_index()


def said(row: pd.Series, column: Column) -> str:
    """``33.8 ± 0.9``: the mean and half of its interval, which a single seed does not have."""
    digits = 1 if column.scale > 1 else 3
    text = f"{row['mean']:.{digits}f}"
    return text if pd.isna(row["low"]) else f"{text} ± {row['high'] - row['mean']:.{digits}f}"


def picked(means: pd.DataFrame, setting: str, metric: str, moment: str = FINAL) -> pd.Series:
    """The row of one setting, metric and moment."""
    rows = means[(means["setting"] == setting) & (means["metric"] == metric) & (means["moment"] == moment)]
    return rows.iloc[0]


def seeds_named(means: pd.DataFrame) -> str:
    """``3 seeds``, or ``2–3 seeds`` where settings have different numbers."""
    low, high = int(means["seeds"].min()), int(means["seeds"].max())
    number = str(low) if low == high else f"{low}–{high}"
    return f"{number} seed{'' if number == '1' else 's'}"


def curves(runs: Sequence[Run], settings: Mapping[str, str], columns: Sequence[Column]) -> pd.DataFrame:
    """Columns of the ``epochs`` table over epochs: mean and interval over seeds.

    Returns:
        ``setting``, ``metric``, ``epoch``, ``mean``, ``low``, ``high``, ``seeds``, settings in order.
    """
    epochs = combine(runs, "epochs")
    epochs["setting"] = epochs["run"].map(settings)
    for column in columns:
        epochs[column.name] *= column.scale
    long = epochs.melt(["setting", "epoch"], [column.name for column in columns], "metric", "value")
    return _ordered(
        mean_with_interval(long, ["setting", "metric", "epoch"], "value"),
        list(dict.fromkeys(settings.values())),
    )


def draw_rows(ax: Axes, means: pd.DataFrame, metric: str, colours: Mapping[str, str]) -> None:
    """A row per setting, the first on top: best (open) and final (filled) with their intervals."""
    own = means[means["metric"] == metric]
    order = list(colours)
    for moment, lift, filled in ((BEST, 0.14, False), (FINAL, -0.14, True)):
        for _, row in own[own["moment"] == moment].iterrows():
            colour = colours[row["setting"]]
            y = len(order) - 1 - order.index(row["setting"]) + lift
            if not pd.isna(row["low"]):
                ax.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.4)
            ax.plot(
                [row["mean"]], [y], marker="o", markersize=6, color=colour, linestyle="",
                markerfacecolor=colour if filled else "white",
            )  # fmt: skip
    ax.set_yticks(range(len(order)), list(reversed(order)))
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(EPOCHS[metric].shown_unit)


def draw_best_and_final(
    title: str, means: pd.DataFrame, panels: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """A panel of ``draw_rows`` for each metric, with its title."""
    figure = style.new_figure(f"{title} ({seeds_named(means)}, 95 % interval)", 1.6 + 0.34 * len(colours))
    for ax, (metric, name) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        draw_rows(ax, means, metric, colours)
        ax.set_title(name)
    marks = [key("best", "", "o", markerfacecolor="white", markersize=6), key("final", "", "o", markersize=6)]
    figure.legend(handles=marks, loc="outside lower center", ncols=2)
    return figure


def draw_over_epochs(
    ax: Axes, curve: pd.DataFrame, colours: Mapping[str, str], *, bands: bool = True
) -> None:
    """Each setting's mean over epochs; with its interval, if there are few enough of them."""
    for setting, rows in curve.groupby("setting", sort=False):
        colour = colours[str(setting)]
        if bands and len(colours) <= BANDS:
            draw_with_interval(ax, rows, "epoch", colour=colour)
        else:
            ax.plot(rows["epoch"], rows["mean"], color=colour)


def of_seeds(means: pd.DataFrame, colours: Mapping[str, str]) -> str:
    """What a figure of ``draw_over_epochs`` shows: ``mean of 3 seeds, 95 % interval``."""
    return f"mean of {seeds_named(means)}" + (", 95 % interval" if len(colours) <= BANDS else "")


def ends_of(curve: pd.DataFrame, colours: Mapping[str, str]) -> list[End]:
    """Where each setting's mean curve ends, to be labelled with its name."""
    ends = []
    for setting, rows in curve.groupby("setting", sort=False):
        last = rows.sort_values("epoch").iloc[-1]
        ends.append(End(float(last["epoch"]), float(last["mean"]), str(setting), colours[str(setting)]))
    return ends


def _ordered(frame: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Settings in this order, metrics and moments in theirs, then by seed or epoch."""
    ranks = {
        "setting": {name: i for i, name in enumerate(order)},
        "metric": {name: i for i, name in enumerate((*METRICS, *EPOCHS.names))},
        "moment": {name: i for i, name in enumerate(MOMENTS)},
    }
    by = [name for name in ("setting", "metric", "moment", "seed", "epoch") if name in frame]
    return frame.sort_values(
        by, key=lambda column: column.map(ranks[column.name]) if column.name in ranks else column
    ).reset_index(drop=True)
