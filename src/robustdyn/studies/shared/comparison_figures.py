"""Figures that compare settings over seeds: curves over epochs, best and final, each from its tidy table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from robustdyn.records.labels import SEED
from robustdyn.records.schema import (
    CATONI,
    EPOCHS,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
    WCI,
)
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
from robustdyn.studies.shared.comparing import BEST, BOUNDS, COLUMNS, FINAL, INDEX, RATE, RISE
from robustdyn.studies.shared.study import Picture
from robustdyn.studies.shared.wording import seeds_said

BANDS = 5  # more curves than this, and their intervals hide one another
CEILINGS = {TEST_ROBUST_ERROR: 100.0, TEST_ROBUST_LOSS: np.inf, INDEX: np.inf}
"""The most that these can be as shown; the least is 0. Student's interval may reach beyond, axes do not."""


@dataclass(frozen=True)
class Panel:
    """What a panel over epochs shows.

    Attributes:
        title: Above it.
        quantity: Whose curves, in full lines.
        unit: Of the vertical axis.
        second: A further quantity in the same unit.
        line: How that one's lines are.
        log: On a logarithmic axis.
        limits: Of the axis; ``None`` for an end that the values set.
    """

    title: str
    quantity: str
    unit: str = ""
    second: str = ""
    line: str = "--"
    log: bool = False
    limits: tuple[float | None, float | None] = (None, None)


def draw_with_interval(
    ax: Axes,
    curve: pd.DataFrame,
    x: str,
    *,
    colour: str,
    scale: float = 1.0,
    line: str = "-",
    marker: str = "",
    markevery: tuple[int, int] | None = None,
    band: bool = True,
) -> None:
    """One curve of means over its column ``x``: a line, and its interval as a band."""
    curve = curve.sort_values(x)
    place = curve[x].to_numpy(dtype=float)
    mean, low, high = (curve[name].to_numpy(dtype=float) * scale for name in BOUNDS)
    if band:
        ax.fill_between(place, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.plot(place, mean, color=colour, linestyle=line, marker=marker, markevery=markevery)


def draw_over_epochs(
    ax: Axes,
    table: pd.DataFrame,
    colours: Mapping[str, str],
    lines: Mapping[str, str],
    *,
    scale: float = 1.0,
    markers: Mapping[str, str] | None = None,
    bands: bool = True,
) -> list[End]:
    """Means over epochs with their intervals, a colour for each setting and, if they are many, a marker.

    Args:
        ax: Where to.
        table: ``setting``, ``quantity``, ``epoch``, ``mean``, ``low``, ``high``.
        colours: Settings in the order in which they are drawn.
        lines: Quantities and their lines.
        scale: From the table to the axis.
        markers: Quantities and the markers of their points; none where left out. Those of settings go first.
        bands: Whether intervals are shown.

    Returns:
        Where the first quantity's lines end, to be labelled with their settings.
    """
    ends, (first, *_) = [], lines
    shapes = style.markers(len(colours))
    for order, ((setting, colour), shape) in enumerate(zip(colours.items(), shapes, strict=True)):
        for quantity, line in lines.items():
            curve = table[(table["setting"] == setting) & (table["quantity"] == quantity)]
            if curve.empty:
                continue
            marker = shape or (markers or {}).get(quantity, "")
            every = style.sparse(len(curve), order) if shape else None
            look = {"colour": colour, "line": line, "marker": marker}
            draw_with_interval(ax, curve, "epoch", scale=scale, band=bands, markevery=every, **look)
            if quantity == first:
                last = curve.sort_values("epoch").iloc[-1]
                height = float(last["mean"]) * scale
                ends.append(End(float(last["epoch"]), height, setting, colour, shape))
    return ends


def draw_panel(
    ax: Axes,
    table: pd.DataFrame,
    panel: Panel,
    colours: Mapping[str, str],
    *,
    scale: float = 1.0,
    markers: Mapping[str, str] | None = None,
) -> list[End]:
    """The curves of a panel, on its axis; where those of its first quantity end."""
    lines = {panel.quantity: "-"} | ({panel.second: panel.line} if panel.second else {})
    ends = draw_over_epochs(ax, table, colours, lines, scale=scale, markers=markers)
    if panel.log:
        log_axis(ax)
    if panel.limits != (None, None):
        ax.set_ylim(*panel.limits)
    return ends


def draw_points(
    ax: Axes, places: Sequence[float], rows: pd.DataFrame, colours: Sequence[str], *, filled: bool = True
) -> None:
    """Means beside one another, each at its height, with their intervals as bars."""
    for y, (_, row), colour in zip(places, rows.iterrows(), colours, strict=True):
        if not pd.isna(row["low"]):
            ax.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.4)
        ax.plot(
            [row["mean"]], [y], marker="o", markersize=6, color=colour, linestyle="",
            markerfacecolor=colour if filled else "white",
        )  # fmt: skip


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """A row for each name, the first on top."""
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.grid(visible=False, axis="y")


def best_and_final(
    means: pd.DataFrame, title: str, panels: Mapping[str, str], colours: Mapping[str, str] | None = None
) -> Picture:
    """A panel for each metric: a row per setting, best (open) and final (filled) with their intervals.

    Args:
        means: ``setting``, ``metric``, ``moment``, ``mean``, ``low``, ``high``, ``seeds``, as shown.
        title: Of the figure.
        panels: Metrics and their titles.
        colours: Settings in order; ``None`` as they come.
    """
    draw = partial(_draw_best_and_final, title=title, panels=panels, colours=colours)
    return Picture("best_and_final", means[means["moment"] != RISE], draw)


@style.styled
def _draw_best_and_final(
    means: pd.DataFrame, title: str, panels: Mapping[str, str], colours: Mapping[str, str] | None
) -> Figure:
    colours = colours or setting_colours(means)
    figure = style.new_figure(f"{title} ({seeds_said(means)}, 95 % interval)", 1.6 + 0.34 * len(colours))
    order = list(colours)
    for ax, (metric, name) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for moment, lift in ((BEST, 0.14), (FINAL, -0.14)):
            rows = means[(means["metric"] == metric) & (means["moment"] == moment)]
            places = [len(order) - 1 - order.index(setting) + lift for setting in rows["setting"]]
            shades = [colours[setting] for setting in rows["setting"]]
            draw_points(ax, places, rows, shades, filled=moment == FINAL)
        name_rows(ax, order)
        ax.set_xlabel(EPOCHS[metric].shown_unit)
        ax.set_title(name)
    marks = [key("best", "", "o", markerfacecolor="white", markersize=6), key("final", "", "o", markersize=6)]
    figure.legend(handles=marks, loc="outside lower center", ncols=2)
    return figure


def setting_colours(frame: pd.DataFrame) -> dict[str, str]:
    """A colour for each ``setting``, as they come."""
    order = list(dict.fromkeys(frame["setting"]))
    return dict(zip(order, style.colours(len(order)), strict=True))


def of_seeds(means: pd.DataFrame, colours: Mapping[str, str]) -> str:
    """What a figure of curves shows: ``mean of 3 seeds, 95 % interval``."""
    return f"mean of {seeds_said(means)}" + (", 95 % interval" if len(colours) <= BANDS else "")


@style.styled
def figure_of_curves(
    table: pd.DataFrame, title: str, panels: Sequence[Panel], *, mean: str = "mean"
) -> Figure:
    """Curves over epochs: a column of panels for each data set, or one row if there is one only.

    Settings by colour, named at the lines' ends in the last column; decays marked. ``mean`` says which one
    the table holds.
    """
    panels = [panel for panel in panels if (table["quantity"] == panel.quantity).any()]
    data_sets = list(dict.fromkeys(table["panel"]))
    beside = len(data_sets) == 1
    shape = (1, len(panels)) if beside else (len(panels), len(data_sets))
    figure = style.new_figure(
        f"{title} ({mean} of {seeds_said(table)})", 1.1 + (2.7 if beside else 2.1) * shape[0]
    )
    axes = figure.subplots(*shape, squeeze=False)
    rates = table[table["quantity"] == RATE].rename(columns={"mean": RATE})
    rates = rates.assign(group=rates["setting"], run=rates["setting"])
    cast = Cast.of(rates)
    for i, data_set in enumerate(data_sets):
        own = table[table["panel"] == data_set]
        for j, panel in enumerate(panels):
            ax = axes[0, j] if beside else axes[j, i]
            ends = _draw_quantity(ax, own, panel, cast, style.PALETTE[j])
            unit = COLUMNS[panel.quantity].shown_unit
            label = f"{panel.title}\n({unit})" if unit else panel.title
            finish(ax, panel.title if beside else data_set if j == 0 else "", unit if beside else label)
            if not beside:
                ax.set_ylabel(ax.get_ylabel() if i == 0 else "")
                ax.set_xlabel("epoch" if j == len(panels) - 1 else "")
            _mark_decays(ax, rates[rates["panel"] == data_set], cast)
            if (j if beside else i) == shape[1] - 1 and not cast.alone:
                label_ends(ax, ends)
    keys = [key("95 % interval of the mean", linewidth=7, alpha=0.3)] if table["seeds"].max() > 1 else []
    dotted = set[Any]().union(*map(_dotted, axes.flat))
    if dotted:
        own = ", by colour" if dotted - {style.MARK} else ""
        keys.append(key(f"decay of the rate{own}", ":"))
    if any(panel.second for panel in panels):
        solid, dashed = next((panel.quantity, panel.second) for panel in panels if panel.second)
        keys += [key(COLUMNS[solid].label), key(COLUMNS[dashed].label, "--")]
    if keys:
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


def _draw_quantity(ax: Axes, table: pd.DataFrame, panel: Panel, cast: Cast, alone: str) -> list[End]:
    """The recorded quantities of a panel, as shown; its axis ends where they do."""
    quantities = [name for name in (panel.quantity, panel.second) if name]
    points = table.groupby(["quantity", "setting"])["epoch"].nunique().groupby("quantity").max()
    measured = [name for name in quantities if name in (*WCI.names, *CATONI.names) and name in points]
    ends = draw_panel(
        ax,
        table,
        panel,
        {setting: cast.colour(setting, alone) for setting in cast.colours},
        scale=COLUMNS[panel.quantity].scale,
        markers={name: "o" for name in measured if points[name] <= MARKED_POINTS},
    )
    if not panel.log:
        wide = table.pivot(index=["setting", "epoch"], columns="quantity", values="mean").reset_index()
        leave_out_transient(ax, wide, [COLUMNS[name] for name in quantities])
        if panel.quantity in CEILINGS:
            low, high = ax.get_ylim()
            ax.set_ylim(max(0.0, low), min(CEILINGS[panel.quantity], high))
    return ends


def _mark_decays(ax: Axes, rates: pd.DataFrame, cast: Cast) -> None:
    """Decays, without the rate that follows where it is not one for all settings; colours need no label."""
    mark_decays([ax], rates, cast)
    several = rates.groupby("epoch")[RATE].nunique() > 1
    coloured = bool(_dotted(ax) - {style.MARK})
    for label in ax.texts:
        if isinstance(label, Annotation) and several.get(label.xy[0], False):
            label.set_text("" if coloured else "decay")


def _dotted(ax: Axes) -> set[Any]:
    """The colours of dotted lines."""
    return {line.get_color() for line in ax.lines if line.get_linestyle() == ":"}


@style.styled
def figure_of_outcomes(table: pd.DataFrame, title: str) -> Figure:
    """Best and final test error and loss, final gaps and WCI by setting.

    A row of panels for each data set; intervals as bars, single seeds as small points.

    Args:
        table: ``panel``, ``setting``, ``quantity``, ``outcome``, which begins with ``best`` or ``final``,
            ``mean``, ``low``, ``high``, ``seeds``, and with a ``seed`` the runs' own values as ``mean``.
        title: Of the figure.
    """
    means, single = table[table[SEED].isna()], table[table[SEED].notna()]
    panels, settings = list(dict.fromkeys(means["panel"])), list(dict.fromkeys(means["setting"]))
    shown = [
        q
        for q in (TEST_ROBUST_ERROR, TEST_ROBUST_LOSS, ROBUST_ERROR_GAP, ROBUST_LOSS_GAP, INDEX)
        if (means["quantity"] == q).any()
    ]
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
                own, seeds = (rows[rows["outcome"].str.startswith(f"{how} ")] for rows in of_panel)
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
            unit = "% points" if column.scale > 1 and quantity == ROBUST_ERROR_GAP else column.shown_unit
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
