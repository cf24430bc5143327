"""A learning rate that follows the WCI, at several thresholds (WCI paper, section 4, figures 3, 8 and 9 a).

η = η₁ · min(1, τ / WCI) from the first decay on. The runs of the largest threshold are the control
where their rate was never lowered: η₁ throughout, everything else the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run, combine
from robustdyn.records.schema import EPOCHS, ROBUST_LOSS_GAP, TEST_ROBUST_ERROR, TEST_ROBUST_LOSS, WCI
from robustdyn.report import style
from robustdyn.report.plotting import End, finish, label_ends, log_axis
from robustdyn.report.statistics import by_run
from robustdyn.studies.shared.comparing import (
    FINAL,
    INDEX,
    METRICS,
    MOMENT,
    RATE,
    against,
    at_moments,
    mean_with_interval,
    metrics_over_epochs,
    require_alike,
    require_complete,
    values,
)
from robustdyn.studies.shared.comparison_figures import (
    BANDS,
    best_and_final,
    draw_over_epochs,
    draw_points,
    name_rows,
    of_seeds,
)
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.wording import final_said, seeds_said, sentence, shown_table

STATIC = "static η₁"
SHOWN = (TEST_ROBUST_ERROR, TEST_ROBUST_LOSS)
TRENDS = (*SHOWN, ROBUST_LOSS_GAP)
PER = 10  # epochs that a slope is said for
LEAST = 3  # evaluated epochs that a line is fitted to
UNDAMPED = 1 - 1e-6  # of η₁: not lowered
MARGIN = 0.08  # of the run, shown before the decay
RATE_AND_INDEX = {RATE: EPOCHS[RATE], INDEX: WCI[INDEX]}


def damping(runs: Sequence[Run]) -> pd.DataFrame:
    """What the rule did: every epoch from the first decay on.

    Returns:
        ``run``, ``seed``, ``threshold``, ``epoch``, ``lr``, ``damping`` (η / η₁) and ``wci``, as
        measured at the end of the epoch, missing where it was not.

    Raises:
        RecordError: A run has another schedule, follows another quantity, has no decay, or lacks the WCI.
    """
    epochs, wci = by_run(combine(runs, "epochs")), by_run(combine(runs, "wci"))
    found = []
    for run in runs:
        schedule = run.config["schedule"]
        if schedule.get("quantity") != "wci":
            raise RecordError(
                f"{run.path}: the study needs runs of schedule=wci that follow the WCI; leave this one out"
            )
        own = epochs[run.label][["run", "epoch", "lr"]]
        # not from schedule.start_epoch, which is derived and cannot always be read back
        lowered = schedule["factor"] * run.config["optimizer"]["lr"]
        own = own[own["lr"] * UNDAMPED <= lowered]
        if own.empty:
            raise RecordError(f"{run.path}: its rate never decayed; leave it out, or train it to the end")
        measured = wci[run.label][["epoch", "wci"]]
        if measured["wci"].isna().all():
            raise RecordError(f"{run.path}: needs the measured WCI; train with measure=index or default")
        found.append(
            own.merge(measured, on="epoch", how="left").assign(
                seed=run.config["seed"],
                threshold=float(schedule["threshold"]),
                damping=own["lr"].to_numpy() / lowered,
            )
        )
    columns = ["run", "seed", "threshold", "epoch", "lr", "damping", "wci"]
    together: pd.DataFrame = pd.concat(found, ignore_index=True)
    return together[columns]


def threshold_names(runs: Sequence[Run], damped: pd.DataFrame) -> dict[str, str]:
    """Label of each run -> ``τ = 10``, ascending; ``static η₁`` for the largest if never lowered."""
    thresholds = {run.label: float(run.config["schedule"]["threshold"]) for run in runs}
    largest = max(thresholds.values())
    lowest = damped.groupby("threshold")["damping"].min()
    static = lowest[largest] >= UNDAMPED
    return {
        label: STATIC if static and threshold == largest else f"τ = {threshold:g}"
        for label, threshold in sorted(thresholds.items(), key=lambda item: item[1])
    }


def trends(runs: Sequence[Run], settings: Mapping[str, str], start: int) -> pd.DataFrame:
    """Least-squares line of each run's test metrics over its epochs from ``start`` on.

    Returns:
        ``setting``, ``seed``, ``metric``, ``slope`` (per ten epochs) and ``intercept`` (at epoch 0), in the
        units people read.

    Raises:
        RecordError: Fewer than three evaluated epochs.
    """
    epochs = by_run(combine(runs, "epochs"))
    labelled = {run.label: run for run in runs}
    found = []
    for label, setting in settings.items():
        run = labelled[label]
        own = epochs[label].dropna(subset=list(TRENDS))
        own = own[own["epoch"] >= start]
        if len(own) < LEAST:
            raise RecordError(
                f"{run.path}: {len(own)} evaluated epochs from the decay on, a trend needs {LEAST}; "
                "lower trainer.check_val_every_n_epoch"
            )
        for metric in TRENDS:
            line = stats.linregress(own["epoch"], own[metric] * EPOCHS[metric].scale)
            row = {"setting": setting, "seed": run.config["seed"], "metric": metric}
            found.append(row | {"slope": PER * line.slope, "intercept": line.intercept})
    return pd.DataFrame(found)


def answer(runs: Sequence[Run]) -> Answer:
    """Best and final of each threshold, the trend since the decay, and rate and index over epochs."""
    require_alike(runs, ["schedule.threshold"])
    damped = damping(runs)
    require_complete(runs)
    settings = threshold_names(runs, damped)
    order = list(dict.fromkeys(settings.values()))
    ordered = sorted(runs, key=lambda run: order.index(settings[run.label]))
    rows = values(
        ordered, [TEST_ROBUST_ERROR], lambda run: settings[run.label], None, optional=[*METRICS, INDEX]
    )
    found = at_moments(rows)
    means = mean_with_interval(found, MOMENT)
    start = int(damped["epoch"].min())  # of all runs: they differ in nothing that moves it
    fitted = trends(runs, settings, start)
    slopes = mean_with_interval(fitted, ["setting", "metric"], "slope")
    shown_from = max(0, start - max(2, round(MARGIN * int(runs[0].config["trainer"]["max_epochs"]))))
    over_epochs = metrics_over_epochs(rows, [RATE, INDEX, *SHOWN])
    over_epochs = over_epochs[over_epochs["epoch"] >= shown_from].assign(start=start)
    tables = {
        "thresholds": means,
        "thresholds_shown": shown_table(means),
        "runs": found,
        "trend": slopes,
        "rule": _rule(damped, settings),
    }
    if STATIC in order:
        tables["against_static"] = against(found, STATIC, MOMENT[1:]).assign(minus=STATIC)
    rate_and_index = pd.concat([over_epochs[over_epochs["metric"] == name] for name in RATE_AND_INDEX])
    panels = {name: EPOCHS[name].label.capitalize() for name in TRENDS}
    pictures = [
        Picture("thresholds", over_epochs[over_epochs["metric"].isin(SHOWN)], draw_thresholds),
        best_and_final(means, "Best and final epoch at each threshold τ", panels, _colours(means)),
        Picture("trend", _trend_table(over_epochs, fitted, slopes), draw_trend),
        Picture("rate_and_wci", rate_and_index.reset_index(drop=True), draw_rate_and_wci),
    ]
    return Answer(tables, pictures, findings_of(tables))


@style.styled
def draw_thresholds(over_epochs: pd.DataFrame) -> Figure:
    """Robust error and loss over epochs (the paper's figures 3 a and 8)."""
    colours = _colours(over_epochs)
    figure = style.new_figure(
        f"The WCI rate at several thresholds τ ({of_seeds(over_epochs, colours)})", _height(colours)
    )
    for ax, metric in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        ends = _draw(ax, over_epochs, metric, colours)
        finish(ax, EPOCHS[metric].label.capitalize(), EPOCHS[metric].shown)
        _mark_decay(ax, over_epochs)
        label_ends(ax, ends)
    return figure


@style.styled
def draw_trend(table: pd.DataFrame) -> Figure:
    """Lines through the robust error since the decay, and all their slopes (the paper's figure 3 b)."""
    colours = _colours(table)
    figure = style.new_figure(f"Trend since the decay ({seeds_said(table)}, 95 % interval)", 3.8)
    figure.set_layout_engine("constrained", wspace=0.12)  # between the lines' names and the rows'
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1.0))
    column = EPOCHS[TEST_ROBUST_ERROR]
    points, lines = table[table["kind"] == "measured"], table[table["kind"] == "line"]
    for setting, rows in points.groupby("setting", sort=False):
        left.plot(rows["epoch"], rows["mean"], "o", color=colours[str(setting)], alpha=0.55)
    ends = _draw(left, lines.assign(metric="line"), "line", colours, bands=False)
    finish(left, "Mean over seeds, and least-squares line", column.shown)
    label_ends(left, ends)
    slopes = table[table["kind"] == "slope"]
    names = list(slopes["setting"])
    draw_points(right, range(len(names))[::-1], slopes, [colours[name] for name in names])
    right.axvline(0.0, color=style.MARK, linewidth=0.8)
    name_rows(right, names)
    right.set_title(f"Slope of the {column.label}")
    right.set_xlabel(f"percentage points per {PER} epochs")
    return figure


@style.styled
def draw_rate_and_wci(table: pd.DataFrame) -> Figure:
    """The rate above the index that it follows (the paper's figure 9 a)."""
    colours = _colours(table)
    whose = " of the WCI" if len(colours) <= BANDS else ""
    title = f"Rate and WCI ({of_seeds(table, colours)}{whose})"
    figure = style.new_figure(title, 1.5 * _height(colours))
    upper, lower = figure.subplots(2, 1, sharex=True)
    ends = {}
    for ax, (name, column) in zip((upper, lower), RATE_AND_INDEX.items(), strict=True):
        ends[ax] = _draw(ax, table, name, colours, bands=name == INDEX)
        finish(ax, "", column.shown)
        _mark_decay(ax, table)
    upper.set_xlabel("")
    log_axis(upper)
    lower.set_ylim(bottom=0)
    for ax in (upper, lower):
        label_ends(ax, ends[ax])
    return figure


def _draw(
    ax: Axes, table: pd.DataFrame, metric: str, colours: Mapping[str, str], *, bands: bool = True
) -> list[End]:
    own = table[table["metric"] == metric].rename(columns={"metric": "quantity"})
    return draw_over_epochs(ax, own, colours, {metric: "-"}, bands=bands and len(colours) <= BANDS)


def _height(colours: Mapping[str, str]) -> float:
    """Inches, so that the labels of many curves fit beside them."""
    return 3.7 if len(colours) <= BANDS else 4.6


def _mark_decay(ax: Axes, table: pd.DataFrame) -> None:
    """The first epoch at the lower rate."""
    start = table["start"].iloc[0]
    ax.axvline(start, color=style.MARK, linewidth=0.9, linestyle=(0, (4, 3)))
    place = ax.get_xaxis_transform()
    ax.text(start, 0.99, " decay", transform=place, va="top", fontsize=8, color=style.MARK)


def _colours(frame: pd.DataFrame) -> dict[str, str]:
    """Thresholds from dark to light, the control apart from them."""
    order = list(dict.fromkeys(frame["setting"]))
    thresholds = [name for name in order if name != STATIC]
    n = len(thresholds)
    shades = style.shades(n + 1 + n // 4)[:n]  # the lightest are faint on white
    colours = dict(zip(thresholds, shades, strict=True))
    return {name: colours.get(name, style.PALETTE[1]) for name in order}


def _rule(damped: pd.DataFrame, settings: Mapping[str, str]) -> pd.DataFrame:
    """How far the rate was lowered, by factors, and what became of the index: over seeds."""
    found = []
    for label in settings:
        own = damped[damped["run"] == label].sort_values("epoch")
        measured = own.dropna(subset=["wci"])
        numbers = {
            "final η / η₁": own["damping"].iloc[-1],
            "mean η / η₁": own["damping"].mean(),
            "share of epochs with a lowered rate": (own["damping"] < UNDAMPED).mean(),
            "last WCI": measured["wci"].iloc[-1] if len(measured) else np.nan,
            "highest WCI": measured["wci"].max(),
        }
        found += [
            {"setting": settings[label], "quantity": name, "value": value} for name, value in numbers.items()
        ]
    frame = pd.DataFrame(found)
    factor, by = frame["quantity"].str.contains("η₁"), ["setting", "quantity"]
    parts = [mean_with_interval(frame[factor], by, geometric=True), mean_with_interval(frame[~factor], by)]
    order = list(settings.values()).index
    return pd.concat(parts).sort_values("setting", key=lambda names: names.map(order), kind="stable")


def _trend_table(over_epochs: pd.DataFrame, fitted: pd.DataFrame, slopes: pd.DataFrame) -> pd.DataFrame:
    """Measured points and lines of the control and the largest other threshold; the slopes of all."""
    metric = TEST_ROBUST_ERROR
    order = list(dict.fromkeys(slopes["setting"]))
    shown = [name for name in order if name != STATIC][-1:] + [name for name in order if name == STATIC]
    points = over_epochs[
        (over_epochs["metric"] == metric)
        & (over_epochs["epoch"] >= over_epochs["start"])
        & over_epochs["setting"].isin(shown)
    ]
    lines = []
    for setting in shown:
        # the mean of the runs' lines; with equal epochs in all, the line through the means
        own = fitted[(fitted["setting"] == setting) & (fitted["metric"] == metric)]
        for epoch in (points["epoch"].min(), points["epoch"].max()):
            height = (own["intercept"] + own["slope"] / PER * epoch).mean()
            lines.append({"setting": setting, "epoch": epoch, "mean": height, "seeds": len(own)})
    parts = {
        "slope": slopes[slopes["metric"] == metric],
        "measured": points,
        "line": pd.DataFrame(lines),
    }
    columns = ["kind", "setting", "epoch", "mean", "low", "high", "seeds"]
    return pd.concat([part.assign(kind=kind) for kind, part in parts.items()], ignore_index=True)[columns]


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which thresholds differ from the static rate, and how much the threshold matters."""
    means, rule = tables["thresholds"], tables["rule"]
    own = means[
        (means["metric"] == TEST_ROBUST_ERROR) & (means["moment"] == FINAL) & (means["setting"] != STATIC)
    ]
    finals = own.set_index("setting")["mean"]
    apart = (
        final_said(tables["against_static"], SHOWN, "the static rate")
        if "against_static" in tables
        else "there is no control: no run kept η₁ throughout; schedule.threshold=1e9 makes one"
    )
    return [
        sentence(apart),
        f"The final robust error lies between {finals.min():.1f} % ({finals.idxmin()}) and "
        f"{finals.max():.1f} % ({finals.idxmax()}), with τ in units of an index that was at most "
        f"{rule[rule['quantity'] == 'highest WCI']['mean'].max():.3g}.",
    ]


STUDY = Study(
    "Does a learning rate that follows the WCI prevent robust overfitting, and does its threshold matter?",
    answer,
)
