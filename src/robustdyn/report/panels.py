"""Figures of panels over epochs: each panel shows columns of one table, and all are drawn the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from robustdyn.records.columns import Column
from robustdyn.records.schema import TRACKED_DIRECTIONS
from robustdyn.report import style
from robustdyn.report.plotting import (
    MARKED_POINTS,
    Cast,
    End,
    finish,
    group_legend,
    key,
    log_axis,
    mark_decays,
    means_by_epoch,
)

PANEL = 3.6  # inches: height of one row of panels with title and legend
MOST_DIRECTIONS = 32  # lines of one group that can be told apart
MARKER = "o"

Draw = Callable[[pd.DataFrame, pd.DataFrame, Cast], Figure]
"""Draws a figure from the tidy rows of its table, those of the table ``epochs``, and the groups' colours."""


@dataclass(frozen=True)
class Curve:
    """How a column is drawn over epochs.

    Attributes:
        column: Which column; its scale is applied.
        line: Line style.
        marker: Marker of the points.
        spread: Column with a standard error, drawn as a band of ±1.
        colour: The curve's own colour, used where there is one group only.
        text: What the line is called at its end.
        steps: Whether each value is held until the next epoch.
    """

    column: Column
    line: str = "-"
    marker: str = MARKER
    spread: str | None = None
    colour: str = style.NEUTRAL
    text: str = ""
    steps: bool = False

    def draw(self, ax: Axes, frame: pd.DataFrame, cast: Cast) -> list[End]:
        """A line for each group; in groups of several runs the bold mean above thin lines, one for each run.

        Earlier groups have wider lines, so that equal ones can all be seen.

        Returns:
            The ends of the groups' lines, to be labelled.
        """
        name, scale, ends = self.column.name, self.column.scale, []
        look: dict[str, Any] = {
            "linestyle": self.line,
            "drawstyle": "steps-post" if self.steps else "default",
        }
        known = frame.dropna(subset=[name])
        means = means_by_epoch(known, name, "group")
        for order, (group, rows) in enumerate(known.groupby("group", sort=False)):
            last = len(cast.colours) - 1
            extra = (last - order) * min(1.2, 4.0 / max(last, 1))
            look["color"] = shade = cast.colour(str(group), self.colour)
            several = cast.sizes[str(group)] > 1
            marked = partial(self._marked, cast, str(group))
            for _, own in rows.groupby("run", sort=False):
                x, y = own["epoch"].to_numpy(), own[name].to_numpy(dtype=float) * scale
                if self.spread is not None and own[self.spread].notna().any():
                    error = own[self.spread].fillna(0.0).to_numpy(dtype=float) * scale
                    ax.fill_between(x, y - error, y + error, color=shade, alpha=0.15, linewidth=0)
                if several:
                    ax.plot(x, y, linewidth=0.8, alpha=0.45, **look)
                else:
                    ax.plot(x, y, linewidth=1.8 + extra, **marked(len(x)), **look)
            if group not in means:
                continue
            mean = means[group] * scale
            if several:
                ax.plot(mean.index, mean, linewidth=2.4 + extra, **marked(len(mean)), **look)
            ends.append(End(float(mean.index[-1]), float(mean.iloc[-1]), self.text, shade))
        return ends

    def _marked(self, cast: Cast, group: str, points: int) -> dict[str, Any]:
        """The curve's marker at every point, or the group's at some where colours are too many."""
        shape = cast.marker(group)
        if not shape:
            return {"marker": self.marker}
        return {"marker": shape, "markevery": style.sparse(points, list(cast.colours).index(group))}

    def draw_directions(self, ax: Axes, frame: pd.DataFrame, cast: Cast) -> None:
        """A line for every direction, on a logarithmic axis; means over a group's runs.

        One group: dark to light by rank, with the band. Several: colour by group, the leading direction
        bold. Values ≤ 0 have no place on the axis: open circles show their magnitude.
        """
        ranks = sorted(frame["index"].unique())
        shades = style.shades(ranks[-1] + 1)
        shade_of = {rank: shades[rank] for rank in ranks}
        line = ["group", "index"]
        means = means_by_epoch(frame, self.column.name, line)
        spread = self.spread if cast.alone else None
        errors = {} if spread is None else means_by_epoch(frame, spread, line)
        for group, rank in frame[line].drop_duplicates().itertuples(index=False):
            if (group, rank) not in means:
                continue
            mean, shade = means[group, rank], cast.colour(group, shade_of[rank])
            strong = cast.alone or rank == ranks[0]
            positive, negative = mean.where(mean > 0), -mean[mean < 0]
            width, alpha = (1.6, 1.0) if strong else (0.8, 0.4)
            marker = self.marker if strong and len(mean) <= MARKED_POINTS else ""
            ax.plot(
                mean.index, positive, color=shade, marker=marker, markersize=3, linewidth=width, alpha=alpha
            )
            if len(negative):
                look: dict[str, Any] = {"linestyle": "", "fillstyle": "none", "markersize": 4}
                ax.plot(negative.index, negative, "o", color=shade, **look)
            if (group, rank) in errors:
                error = errors[group, rank].reindex(mean.index)
                low = (positive - error).where(positive > error, positive * 0.5)
                ax.fill_between(mean.index, low, positive + error, color=shade, alpha=0.2, linewidth=0)
        log_axis(ax)


@dataclass(frozen=True)
class Panel:
    """Columns over epochs on one pair of axes. ``{top}`` in its texts stands for the number of directions.

    Attributes:
        title: Above the panel.
        curves: The columns, from back to front.
        ylabel: Name of the vertical axis; that of the first solid curve if empty.
        limits: Ends of the vertical axis, if the curves do not settle them.
    """

    title: str
    curves: tuple[Curve, ...]
    ylabel: str = ""
    limits: tuple[float | None, float | None] | None = None

    def draw(self, ax: Axes, frame: pd.DataFrame, cast: Cast) -> list[End]:
        """Draw the panel and return the ends of its curves. A table of directions has a line for each."""
        ends = []
        for curve in self.curves:
            if cast.reference is not None and not frame.empty:
                cast.reference.draw(ax, curve.column, curve.line, int(frame["epoch"].max()))
            if "index" in frame:
                curve.draw_directions(ax, frame, cast)
            else:
                ends += curve.draw(ax, frame, cast)
        solid = next(curve.column for curve in self.curves if curve.line == "-")
        top = _top(frame)
        finish(ax, self.title.format(top=top), self.ylabel.format(top=top) or solid.shown)
        if self.limits is not None:
            ax.set_ylim(*self.limits)
        return ends


def over_epochs(
    heading: str, *panels: Panel, keys: Sequence[tuple[str, str, str]] = (), one_scale: bool = False
) -> Draw:
    """A figure of panels side by side with the decays marked.

    Args:
        heading: Above the figure; ``{top}`` stands for the number of directions.
        panels: From left to right.
        keys: Entries of the legend beside the groups: label, line and marker.
        one_scale: Whether the panels share their vertical axis.
    """

    def drawn(frame: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
        title, ranked = heading.format(top=_top(frame)), "index" in frame
        left_out = ""
        if ranked:
            ranks = int(frame["index"].max()) + 1
            kept = _drawn_ranks(ranks)
            frame = frame[frame["index"].isin(kept)]
            left_out = f", {len(kept)} of {ranks} drawn" if len(kept) < ranks else ""
        figure = style.new_figure(cast.with_repeats(title) if ranked else title, PANEL + 0.2 * ranked)
        axes = list(np.atleast_1d(figure.subplots(1, len(panels), sharex=True, sharey=one_scale)))
        for ax, panel in zip(axes, panels, strict=True):
            panel.draw(ax, frame, cast)
        mark_decays(axes, epochs, cast)
        said = [key(*entry) for entry in keys]
        if ranked and cast.alone:
            _rank_scale(figure, axes, ranks, left_out)
        elif ranked:
            leading = key("leading direction", linewidth=1.6)
            said = [leading, key(f"further directions{left_out}", linewidth=0.8, alpha=0.5)]
        group_legend(figure, cast, said, single_seeds=not ranked)
        return figure

    return drawn


def _top(frame: pd.DataFrame) -> str:
    """``top 10`` or, where runs tracked different numbers, ``top 5–10``; empty for a table without any."""
    if "index" in frame:
        return f"top {int(frame['index'].max()) + 1}"
    if TRACKED_DIRECTIONS not in frame:
        return ""
    low, high = int(frame[TRACKED_DIRECTIONS].min()), int(frame[TRACKED_DIRECTIONS].max())
    return f"top {low}" if low == high else f"top {low}–{high}"


def _drawn_ranks(k: int) -> list[int]:
    """The ranks, or of more than ``MOST_DIRECTIONS`` some: the first, the last, and wider and wider apart."""
    if k <= MOST_DIRECTIONS:
        return list(range(k))
    return sorted({round(rank) - 1 for rank in np.geomspace(1, k, MOST_DIRECTIONS)})


def _rank_scale(figure: Figure, axes: Sequence[Axes], k: int, left_out: str) -> None:
    """A stepped colour bar that says which shade is which rank; none for a single direction."""
    if k == 1:
        return
    scale = ScalarMappable(BoundaryNorm(np.arange(k + 1) + 0.5, k), ListedColormap(list(style.shades(k))))
    bar = figure.colorbar(scale, ax=axes, pad=0.015, aspect=30)
    steps = sorted({1, *range(max(1, k // 4), k + 1, max(1, k // 4)), k})
    bar.set_ticks(steps, labels=[str(step) for step in steps])
    bar.ax.minorticks_off()
    bar.set_label(f"rank of the direction, 1 = leading{left_out}")
