"""Curves over epochs by setting, and what they come to: shared by the studies of single factors.

Tables are tidy: ``panel`` (a data set), ``setting`` (the factor's level), ``quantity`` (a column of the
``epochs`` or ``wci`` records, in its recorded unit), and ``epoch`` where it is a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, read_table
from robustdyn.records.schema import EPOCHS, WCI, Column
from robustdyn.report import style
from robustdyn.report.plotting import (
    MARKED_POINTS,
    Cast,
    End,
    finish,
    key,
    label_ends,
    leave_out_transient,
    log_axis,
    mark_decays,
)
from robustdyn.report.statistics import decay_epochs, format_number
from robustdyn.studies.shared.alike import require_repetitions
from robustdyn.studies.shared.over_seeds import (
    COVERAGE,
    LEVEL,
    draw_with_interval,
    geometric_mean_with_interval,
    mean_with_interval,
)
from robustdyn.studies.shared.study import Answer, Picture

LOSS_GAP, ERROR_GAP, INDEX, RATE = "robust_loss_gap", "robust_error_gap", "wci", "lr"
NORM, TRACE = "weight_norm_sq", "hessian_trace"
LOSS, ERROR, TRAIN_ERROR = "test_robust_loss", "test_robust_error", "train_robust_error"
COLUMNS: dict[str, Column] = {column.name: column for column in (*WCI.columns, *EPOCHS.columns)}
CELL = ["panel", "setting", "quantity"]
DATA_SETS = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100", "SVHN": "SVHN", "Digits": "digits"}
BEST, FINAL, RISE = "best", "final", "rise"
FINAL_GAP, FINAL_INDEX = "final robust loss gap", "final WCI"
OUTCOMES: dict[str, tuple[str, str]] = {
    "best robust error": (ERROR, BEST),
    "final robust error": (ERROR, FINAL),
    "rise of the robust error": (ERROR, RISE),
    "best robust loss": (LOSS, BEST),
    "final robust loss": (LOSS, FINAL),
    "rise of the robust loss": (LOSS, RISE),
    "final robust error gap": (ERROR_GAP, FINAL),
    FINAL_GAP: (LOSS_GAP, FINAL),
    FINAL_INDEX: (INDEX, FINAL),
    "final squared weight norm": (NORM, FINAL),
    "final Hessian trace": (TRACE, FINAL),
}
"""What a run comes to: the lowest value over its epochs, the last one, and last less lowest."""

TOLD = (
    "best robust error",
    "final robust error",
    "rise of the robust loss",
    FINAL_GAP,
    FINAL_INDEX,
)
TOLD_APART = (
    "best robust error",
    "final robust error",
    "rise of the robust error",
    "rise of the robust loss",
)

BOUNDS = ("mean", "low", "high")
CEILINGS = {ERROR: 100.0, LOSS: np.inf, INDEX: np.inf}
"""The most that these can be as shown; the least is 0. Student's interval may reach beyond, axes do not."""


def data_set(run: Run) -> str:
    """The data set's name."""
    name = str(run.config["data"]["_target_"]).rpartition(".")[2]
    return DATA_SETS.get(name, name)


def values(
    runs: Sequence[Run],
    quantities: Sequence[str],
    setting: Callable[[Run], str],
    panel: Callable[[Run], str] = data_set,
    optional: Sequence[str] = (),
) -> pd.DataFrame:
    """Recorded values of all runs, one row each, in the runs' order.

    Args:
        runs: Runs to compare.
        quantities: Columns of the ``epochs`` or ``wci`` records that every run must have.
        setting: A run's level of the factor.
        panel: What is drawn apart.
        optional: Further columns, taken where recorded.

    Returns:
        ``panel``, ``setting``, ``seed``, ``epoch``, ``quantity``, ``value``; the learning rate always.

    Raises:
        RecordError: A quantity was not recorded, runs of one setting differ in more than their seed or have
            the same, or a run is shorter than the others of its panel.
    """
    require_repetitions(runs, lambda run: f"{setting(run) or 'one setting'} on {panel(run)}")
    frames: list[pd.DataFrame] = []
    ends = [_last_epoch(run) for run in runs]
    for run, last in zip(runs, ends, strict=True):
        tables = {"epochs": read_table(run.path, "epochs"), "wci": read_table(run.path, "wci")}
        full = max(end for other, end in zip(runs, ends, strict=True) if panel(other) == panel(run))
        if last < full:
            raise RecordError(
                f"{run.path}: ends after epoch {last}, others after {full}; finish it or leave it out"
            )
        for name in dict.fromkeys([RATE, *quantities, *optional]):
            table = tables["epochs" if name in EPOCHS.names else "wci"]
            known = table.dropna(subset=[name])
            if known.empty and name in quantities:
                raise RecordError(f"{run.path}: {_lacks(name)}")
            head = {"panel": panel(run), "setting": setting(run), SEED: run.config[SEED]}
            rows = pd.DataFrame({"epoch": known["epoch"], "quantity": name, "value": known[name]})
            frames.append(rows.assign(**head)[[*head, "epoch", "quantity", "value"]])
    return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)


def over_seeds(rows: pd.DataFrame, *, geometric: bool = False) -> pd.DataFrame:
    """Mean and 95 % interval over seeds of ``values``, for each epoch.

    Epochs that some seeds lack (measured around decays, say) have fewer ``seeds``.
    """
    mean = geometric_mean_with_interval if geometric else mean_with_interval
    return mean(rows, [*CELL, "epoch"], "value")


def outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """What every run comes to: ``OUTCOMES`` of it, in order.

    The lowest value is picked on the test set, so that it flatters, and a rise is at least 0.

    Returns:
        ``panel``, ``setting``, ``seed``, ``quantity``, ``outcome``, ``value``.
    """
    found = []
    for (panel, setting, seed), own in rows.groupby(["panel", "setting", SEED], sort=False):
        series = {name: part.sort_values("epoch")["value"] for name, part in own.groupby("quantity")}
        for outcome, (quantity, how) in OUTCOMES.items():
            if quantity in series:
                curve = series[quantity]
                lowest, last = curve.min(), curve.iloc[-1]
                value = {BEST: lowest, FINAL: last, RISE: last - lowest}[how]
                found.append((panel, setting, seed, quantity, outcome, value))
    return pd.DataFrame(found, columns=["panel", "setting", SEED, "quantity", "outcome", "value"])


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval over seeds of ``outcomes``."""
    return mean_with_interval(found, ["panel", "setting", "quantity", "outcome"], "value")


def against(found: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Differences of ``outcomes`` from the baseline's, seed by seed: mean and 95 % interval.

    Runs of one seed share initial weights and the order of images, so that their difference is known better
    than either.

    Args:
        found: As ``outcomes`` returns it.
        baseline: The setting that the others are compared with; where a panel lacks it, no rows.

    Returns:
        As ``summary``, with ``baseline``, for all other settings.
    """
    on = ["panel", SEED, "quantity", "outcome"]
    reference = found[found["setting"] == baseline][[*on, "value"]]
    pairs = found[found["setting"] != baseline].merge(reference, on=on, suffixes=("", "_of_baseline"))
    pairs["value"] -= pairs.pop("value_of_baseline")
    return summary(pairs).assign(baseline=baseline)


def correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Correlation of WCI and robust gaps over the measured epochs of each run.

    Between evaluated epochs a gap is interpolated linearly. No p-values: epochs of a run are not independent
    of one another.

    Returns:
        ``panel``, ``setting``, ``seed``, ``quantity`` (the gap), ``phase``, ``epochs`` (their number),
        ``pearson``, ``spearman``; nothing for fewer than three epochs.
    """
    found = []
    for (panel, setting, seed), own in rows.groupby(["panel", "setting", SEED], sort=False):
        wide = own.pivot(index="epoch", columns="quantity", values="value")
        wide[[LOSS_GAP, ERROR_GAP]] = wide[[LOSS_GAP, ERROR_GAP]].interpolate("index", limit_area="inside")
        decay = first_decay(own)
        phases = {"all epochs": wide}
        if decay is not None:
            phases["after the first decay"] = wide[wide.index >= decay]
        for gap in (LOSS_GAP, ERROR_GAP):
            for phase, part in phases.items():
                pairs = part[[INDEX, gap]].dropna()
                if len(pairs) > 2 and (pairs.nunique() > 1).all():
                    r = stats.pearsonr(pairs[INDEX], pairs[gap]).statistic
                    rank = stats.spearmanr(pairs[INDEX], pairs[gap]).statistic
                    found.append((panel, setting, seed, gap, phase, len(pairs), r, rank))
    names = ["panel", "setting", SEED, "quantity", "phase", "epochs", "pearson", "spearman"]
    return pd.DataFrame(found, columns=names)


def told_ends(found: pd.DataFrame) -> list[str]:
    """Whether the WCI and the robust loss gap of ``outcomes`` go together among runs at their ends.

    One finding for each panel with more than three runs that have both.
    """
    lines = []
    ends = found[found["outcome"].isin([FINAL_GAP, FINAL_INDEX])]
    for panel, own in ends.groupby("panel", sort=False):
        wide = own.pivot(index=["setting", SEED], columns="outcome", values="value")
        pairs = wide.reindex(columns=[FINAL_INDEX, FINAL_GAP]).dropna()
        if len(pairs) > 3 and (pairs.nunique() > 1).all():
            r = stats.pearsonr(pairs[FINAL_INDEX], pairs[FINAL_GAP])
            low, high = r.confidence_interval(LEVEL)
            lines.append(
                f"{panel}, over {len(pairs)} runs at their ends: Pearson correlation of WCI and robust loss "
                f"gap {r.statistic:.2f} [{low:.2f}, {high:.2f}], p = {r.pvalue:.2g}, runs taken for "
                "independent."
            )
    return lines


def first_decay(rows: pd.DataFrame) -> int | None:
    """First epoch at a lower rate, from rows of one run or of one setting's curves; None without any."""
    rate = rows[rows["quantity"] == RATE].rename(columns={"value": RATE, "mean": RATE})
    return next(iter(decay_epochs(rate)), None)


def said(row: Mapping[Any, Any], column: Column, *, signed: bool = False) -> str:
    """``34.1 % [33.0, 35.2]``: a mean with its interval in the unit people read; signed for a difference."""
    numbers = [float(row[name]) * column.scale for name in BOUNDS]
    shown = [_number(number, signed, percent=column.scale > 1) for number in numbers]
    unit = "percentage points" if signed and column.scale > 1 else column.shown_unit
    interval = "" if np.isnan(numbers[1]) else f" [{shown[1]}, {shown[2]}]"
    return f"{shown[0]}{interval} {unit}".rstrip()


def told(table: pd.DataFrame, shown: Sequence[str]) -> list[str]:
    """One finding for each row of panels and settings of ``summary``: the named outcomes."""
    return [
        f"{' '.join(str(name) for name in names if name)}: {_list(rows, shown, signed=False)}."
        for names, rows in table.groupby(["panel", "setting"], sort=False)
    ]


def told_differences(differences: pd.DataFrame, shown: Sequence[str]) -> list[str]:
    """One finding for each setting of ``against``: the named outcomes, and which are beyond the seeds."""
    lines = []
    for (panel, setting, baseline), rows in differences.groupby(["panel", "setting", "baseline"], sort=False):
        own = rows[rows["outcome"].isin(shown)]
        clear = own[(own["low"] > 0) | (own["high"] < 0)]["outcome"].tolist()
        beyond = (
            f"the interval leaves out zero for {', '.join(clear)}" if clear else "no interval leaves out zero"
        )
        if own["low"].isna().all():
            beyond = "one seed, no interval"
        lines.append(f"{panel} {setting} less {baseline}: {_list(own, shown, signed=True)}; {beyond}.")
    if lines:
        lines.append("Differences are taken seed by seed; intervals are not corrected for their number.")
    return lines


def _list(rows: pd.DataFrame, shown: Sequence[str], *, signed: bool) -> str:
    of = {str(row["outcome"]): row for row in rows.to_dict("records")}
    return ", ".join(
        f"{name} {said(of[name], COLUMNS[of[name]['quantity']], signed=signed)}"
        for name in shown
        if name in of
    )


def seeds_said(table: pd.DataFrame) -> str:
    """``3 seeds``, or ``2–3 seeds`` where settings have different numbers."""
    low, high = int(table["seeds"].min()), int(table["seeds"].max())
    return f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low}–{high} seeds"


def intervals_said(table: pd.DataFrame) -> str:
    """What stands in brackets in findings drawn from this table."""
    if table["seeds"].max() == 1:
        return "One seed, so no intervals."
    return f"Means over {seeds_said(table)}; in brackets Student's 95 % interval; {COVERAGE}."


@dataclass(frozen=True)
class Row:
    """A quantity to draw.

    Attributes:
        quantity: Whose curves.
        title: What the panel is called.
        dashed: A further quantity in the same unit, in dashed lines.
        log: On a logarithmic axis.
    """

    quantity: str
    title: str
    dashed: str = ""
    log: bool = False


@style.styled
def figure_of_curves(table: pd.DataFrame, title: str, rows: Sequence[Row], *, mean: str = "mean") -> Figure:
    """Curves of ``over_seeds``: a column of panels for each data set, or one row if there is one only.

    Settings by colour, named at the lines' ends in the last column; decays marked. ``mean`` says which one
    the table holds.
    """
    rows = [row for row in rows if (table["quantity"] == row.quantity).any()]
    panels = list(dict.fromkeys(table["panel"]))
    beside = len(panels) == 1
    shape = (1, len(rows)) if beside else (len(rows), len(panels))
    figure = style.new_figure(
        f"{title} ({mean} of {seeds_said(table)})", 1.1 + (2.7 if beside else 2.1) * shape[0]
    )
    axes = figure.subplots(*shape, squeeze=False)
    rates = table[table["quantity"] == RATE].rename(columns={"mean": RATE})
    rates = rates.assign(group=rates["setting"], run=rates["setting"])
    cast = Cast.of(rates)
    for i, panel in enumerate(panels):
        own = table[table["panel"] == panel]
        for j, row in enumerate(rows):
            ax = axes[0, j] if beside else axes[j, i]
            ends = _draw_row(ax, own, row, cast, style.PALETTE[j])
            unit = COLUMNS[row.quantity].shown_unit
            label = f"{row.title}\n({unit})" if unit else row.title
            finish(ax, row.title if beside else panel if j == 0 else "", unit if beside else label)
            if not beside:
                ax.set_ylabel(ax.get_ylabel() if i == 0 else "")
                ax.set_xlabel("epoch" if j == len(rows) - 1 else "")
            _mark_decays(ax, rates[rates["panel"] == panel], cast)
            if (j if beside else i) == shape[1] - 1 and not cast.alone:
                label_ends(ax, ends)
    keys = [key("95 % interval of the mean", linewidth=7, alpha=0.3)] if table["seeds"].max() > 1 else []
    if any(line.get_linestyle() == ":" for ax in axes.flat for line in ax.lines):
        keys.append(key("decay of the rate, by colour", ":"))
    if any(row.dashed for row in rows):
        solid, dashed = next((row.quantity, row.dashed) for row in rows if row.dashed)
        keys += [key(COLUMNS[solid].label), key(COLUMNS[dashed].label, "--")]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


def _mark_decays(ax: Axes, rates: pd.DataFrame, cast: Cast) -> None:
    """Decays, without the rate that follows where it is not one for all settings."""
    mark_decays([ax], rates, cast)
    several = rates.groupby("epoch")[RATE].nunique() > 1
    for label in ax.texts:
        if isinstance(label, Annotation) and several.get(label.xy[0], False):
            label.set_text("decay")


def _draw_row(ax: Axes, table: pd.DataFrame, row: Row, cast: Cast, alone: str) -> list[End]:
    """The curves of one panel; their ends."""
    ends, quantities = [], [name for name in (row.quantity, row.dashed) if name]
    for setting in cast.colours:
        for quantity in quantities:
            curve = table[(table["setting"] == setting) & (table["quantity"] == quantity)]
            if curve.empty:
                continue
            colour, scale = cast.colour(setting, alone), COLUMNS[quantity].scale
            line = "-" if quantity == row.quantity else "--"
            marker = "o" if curve["epoch"].nunique() <= MARKED_POINTS and quantity in WCI.names else ""
            draw_with_interval(ax, curve, "epoch", colour=colour, scale=scale, line=line, marker=marker)
            last = curve.sort_values("epoch").iloc[-1]
            if line == "-":
                ends.append(End(float(last["epoch"]), float(last["mean"]) * scale, setting, colour))
    if row.log:
        log_axis(ax)
    else:
        wide = table.pivot(index=["setting", "epoch"], columns="quantity", values="mean").reset_index()
        leave_out_transient(ax, wide, [COLUMNS[name] for name in quantities])
    if row.quantity in CEILINGS and not row.log:
        low, high = ax.get_ylim()
        ax.set_ylim(max(0.0, low), min(CEILINGS[row.quantity], high))
    return ends


def with_seeds(table: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """``summary`` and, with their ``seed``, each run's own ``outcomes`` as ``mean``."""
    both = pd.concat([table, found.rename(columns={"value": "mean"})], ignore_index=True)
    return both[[*table.columns, SEED]]


@style.styled
def figure_of_outcomes(table: pd.DataFrame, title: str) -> Figure:
    """``with_seeds`` by setting: best and final test error and loss, final gaps and WCI.

    A row of panels for each data set; intervals as bars, single seeds as small points.
    """
    means, single = table[table[SEED].isna()], table[table[SEED].notna()]
    panels, settings = list(dict.fromkeys(means["panel"])), list(dict.fromkeys(means["setting"]))
    shown = [q for q in (ERROR, LOSS, ERROR_GAP, LOSS_GAP, INDEX) if (means["quantity"] == q).any()]
    several = means["seeds"].max() > 1
    height = 1.1 + (0.8 + 0.3 * len(settings)) * len(panels)
    figure = style.new_figure(f"{title} (mean of {seeds_said(means)})", height)
    axes = figure.subplots(len(panels), len(shown), squeeze=False, sharey=True, sharex="col")
    for i, panel in enumerate(panels):
        for j, quantity in enumerate(shown):
            ax, column = axes[i, j], COLUMNS[quantity]
            of_panel = [
                rows[(rows["panel"] == panel) & (rows["quantity"] == quantity)] for rows in (means, single)
            ]
            both = of_panel[0]["outcome"].nunique() > 1
            for how, fill, shift in ((BEST, "none", 0.13), (FINAL, "full", -0.13)):
                own, seeds = (
                    rows[rows["outcome"].map(lambda o, how=how: OUTCOMES[o][1] == how)] for rows in of_panel
                )
                rank = {name: len(settings) - 1 - k + shift * both for k, name in enumerate(settings)}
                place = own["setting"].map(rank).to_numpy(dtype=float)
                mean, low, high = (own[name].to_numpy(dtype=float) * column.scale for name in BOUNDS)
                colour = style.PALETTE[0] if how == FINAL else style.PALETTE[1]
                ax.hlines(place, low, high, color=colour, linewidth=1.2)
                ax.plot(mean, place, linestyle="", marker="o", markersize=5, fillstyle=fill, color=colour)
                if several:
                    ax.plot(
                        seeds["mean"] * column.scale, seeds["setting"].map(rank), linestyle="", marker="|",
                        markersize=6, markeredgewidth=1.0, color=style.MARK, zorder=3,
                    )  # fmt: skip
            if quantity in CEILINGS:
                low, high = ax.get_xlim()
                ax.set_xlim(max(0.0, low), min(CEILINGS[quantity], high))
            ax.set_yticks(range(len(settings)), settings[::-1])
            ax.set_ylim(-0.6, len(settings) - 0.4)
            label = column.label.removeprefix("test ")
            unit = "% points" if column.scale > 1 and quantity == ERROR_GAP else column.shown_unit
            if i == len(panels) - 1:
                ax.set_xlabel(f"{label}\n({unit})" if unit else label)
            if len(panels) > 1 and j == 0:
                ax.set_title(panel)
    keys = [
        key("final epoch", "", "o", style.PALETTE[0], markersize=5),
        key("best epoch, picked on the test set", "", "o", style.PALETTE[1], markersize=5, fillstyle="none"),
    ]
    if several:
        keys += [key("95 % interval of the mean"), key("single seeds", "", "|", markersize=6)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


def compared(
    runs: Sequence[Run],
    setting: Callable[[Run], str],
    *,
    title: str,
    baseline: str,
    findings: Callable[[pd.DataFrame], Sequence[str]] = lambda rows: (),
) -> Answer:
    """What studies of one factor answer: learning curves by level, and best and final numbers.

    Args:
        runs: In the order in which levels are to be listed.
        setting: A run's level.
        title: Of the figures.
        baseline: The level that the others are compared with, seed by seed.
        findings: Further findings from ``values``, put first.

    Raises:
        RecordError: As ``values``.
    """
    quantities = [TRAIN_ERROR, ERROR, LOSS, ERROR_GAP, LOSS_GAP]
    rows = values(runs, quantities, setting, optional=[INDEX, NORM, TRACE])
    curves, found = over_seeds(rows), outcomes(rows)
    table, differences = summary(found), against(found, baseline)
    panels = [Row(ERROR, "robust error", TRAIN_ERROR), Row(LOSS_GAP, "robust loss gap"), Row(INDEX, "WCI")]
    told_of_each = [*told(table, TOLD), *told_differences(differences, TOLD_APART)]
    return Answer(
        tables={"outcomes": table, "differences": differences},
        pictures=[
            Picture("learning_curves", curves, partial(figure_of_curves, title=title, rows=panels)),
            Picture("outcomes", with_seeds(table, found), partial(figure_of_outcomes, title=title)),
        ],
        findings=[*findings(rows), *told_ends(found), *told_of_each, intervals_said(table)],
    )


def _last_epoch(run: Run) -> int:
    """The last finished epoch.

    Raises:
        RecordError: There is none.
    """
    epochs = read_table(run.path, "epochs")["epoch"]
    if epochs.empty:
        raise RecordError(f"{run.path}: no finished epoch; finish the run or leave it out")
    return int(epochs.max())


def _lacks(quantity: str) -> str:
    """What to do about a quantity that was not recorded."""
    if quantity in EPOCHS.names:
        return (
            f"no epoch has a {quantity}; train until the first evaluation (trainer.check_val_every_n_epoch)"
        )
    return "needs measured WCI; train with measure=index or default"


def _number(value: float, signed: bool, *, percent: bool) -> str:
    """Per cent with one decimal, other numbers with about three digits."""
    text = f"{abs(value):.1f}" if percent else format_number(abs(value))
    sign = "−" if value < 0 and float(text.replace(",", "")) else "+" if signed else ""
    return sign + text
