"""What all figures share: who gets which colour, axes, decay marks, labels at line ends, the legend.

A frame is tidy: ``run`` and ``group`` columns (as ``records.reader.combine`` makes them; a frame without them
is one run), ``epoch``, and the table's columns. Runs of one group are repetitions with other seeds: thin
lines, and their mean bold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from robustdyn.records.columns import Column
from robustdyn.report import style
from robustdyn.report.reference import BAND, Reference
from robustdyn.report.statistics import decay_epochs, format_number

ONE_RUN = "run"
MAX_GROUP_MARKS = 12  # more decay lines than this, and they are left to the learning-rate figure ...
MAX_MARKS = 50  # ... of single groups, and of all
LABEL_WIDTH = 0.62  # inches a decay label takes
LEGEND_ROW = 0.2  # inches a row of the legend takes ...
LEGEND_ROWS = 2  # ... beyond those that figures have room for
MARKED_POINTS = 40  # beyond this many, markers run into one another
KEY_OF = dict(zip(style.MARKERS, "●■▲◆▼✚✖★", strict=True))
"""Markers as characters, for labels of lines."""


@dataclass(frozen=True)
class Cast:
    """Who is in a figure: groups, their colours, how many runs each has, and the reference behind them.

    ``part`` says which groups these are, if there are more than the figure shows.
    """

    colours: dict[str, str]
    sizes: dict[str, int]
    reference: Reference | None = None
    part: str = ""

    @classmethod
    def of(cls, *frames: pd.DataFrame, reference: Reference | None = None, part: str = "") -> Cast:
        """The groups in the frames, in order of appearance."""
        runs = pd.concat([frame[["group", "run"]] for frame in frames]).drop_duplicates()
        groups = list(dict.fromkeys(runs["group"]))
        return cls(
            colours=dict(zip(groups, style.colours(len(groups)), strict=True)),
            sizes={group: int((runs["group"] == group).sum()) for group in groups},
            reference=reference,
            part=part,
        )

    @property
    def alone(self) -> bool:
        """Whether there is one group only, so that colour is free to tell series apart."""
        return len(self.colours) == 1

    def colour(self, group: str, own: str) -> str:
        """The group's colour; ``own``, the series' colour, where there is one group only."""
        return own if self.alone else self.colours[group]

    def marker(self, group: str) -> str:
        """The group's marker, empty where colours tell the groups apart."""
        groups = list(self.colours)
        return style.markers(len(groups))[groups.index(group)]

    def repeats(self) -> str:
        """``mean of 3 seeds`` for one group of several runs, else nothing."""
        (n, *others) = self.sizes.values()
        return f"mean of {n} seeds" if not others and n > 1 else ""

    def with_repeats(self, title: str) -> str:
        """The title, with ``(mean of 3 seeds)`` for one group of several runs."""
        return f"{title} ({self.repeats()})" if self.repeats() else title


@dataclass(frozen=True)
class End:
    """Where a line ends and what it is called."""

    x: float
    y: float
    text: str
    colour: str
    marker: str = ""


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with ``run`` and ``group`` columns, one run where it has none, by epoch."""
    frame = frame.copy()
    if "run" not in frame:
        frame["run"] = ONE_RUN
    if "group" not in frame:
        frame["group"] = frame["run"]
    return frame.sort_values("epoch", kind="stable")


def means_by_epoch(frame: pd.DataFrame, column: str, by: str | list[str]) -> dict[Any, pd.Series]:
    """Means over the runs of each part of a frame, at the epochs that all runs of the part have.

    Args:
        frame: One row for each epoch of a run of a part.
        column: What to take means of.
        by: The columns that tell the parts apart, as for ``groupby``.

    Returns:
        By part, in order of appearance; none for a part whose runs have no number at a common epoch.
    """
    known = frame.dropna(subset=[column])
    runs = known.groupby(by, sort=False)["run"].nunique()
    names = [*runs.index.names]
    found = known.groupby([*names, "epoch"])[column].agg(["mean", "count"])
    wanted = runs.reindex(found["count"].droplevel("epoch").index).to_numpy()
    means = dict(list(found.loc[found["count"] == wanted, "mean"].groupby(level=by)))
    return {part: means[part].droplevel(names) for part in runs.index if part in means}


def log_axis(ax: Axes) -> None:
    """A logarithmic vertical axis with plain ticks: 1, 2, 5 within few decades, else powers of ten.

    Within one decade there are more, so that at least two are seen. A linear axis stays where nothing that
    is drawn is positive.
    """
    positive = any((np.asarray(line.get_ydata(), dtype=float) > 0).any() for line in ax.lines)
    if not positive and not ax.collections:
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 500 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, plain=ax.get_ylim()[0] >= 1e-4)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _tick(value: float, *, plain: bool) -> str:
    """``0.05``, ``20``; as a multiple of a power of ten above 10000, and below 0.01 unless ``plain``."""
    if (plain or value >= 1e-2) and value < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    factor = "" if mantissa == "1.0" else rf"{float(mantissa):g}\times"
    return rf"${factor}10^{{{int(exponent)}}}$"


def finish(ax: Axes, title: str, ylabel: str) -> None:
    """Title, labels and whole-number epochs."""
    ax.set_title(title)
    ax.set_ylabel(style.mathtext(ylabel))
    ax.set_xlabel("epoch")
    grid = ax.get_gridspec()
    ticks = 7 if grid is None or grid.ncols < 5 else 4  # so that labels of narrow panels do not touch
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks, steps=[1, 2, 5, 10]))


def leave_out_transient(ax: Axes, epochs: pd.DataFrame, columns: Sequence[Column]) -> None:
    """Cut the axis where the first epochs tower over the rest of the run, and say so.

    A barely trained network's loss can be several times that of any later epoch; drawn in full it would
    flatten the curves one came to see. The first tenth of the run is cut at twice the rest's maximum.
    """
    values = pd.concat([epochs.set_index("epoch")[column.name] * column.scale for column in columns]).dropna()
    start = values.index < 0.1 * (values.index.max() + 1)
    if not start.any() or start.all():
        return
    limit, highest = 2 * values[~start].max(), values[start].max()
    if 0 < limit < highest:
        ax.set_ylim(top=limit)
        text = f"first epochs reach {format_number(highest)}"
        note(ax, text, (0.99, 0.97), ha="right", va="top", backgroundcolor="white")


def note(
    ax: Axes, text: str, place: tuple[float, float], *, lift: float = 0.0, fontsize: float = 8.0, **look: Any
) -> None:
    """A small text at fractions of the panel, which need not lie inside it, or ``lift`` points above."""
    look = {"color": style.MARK, "ha": "center", "va": "bottom", "xycoords": "axes fraction"} | look
    ax.annotate(
        text, place, (0, lift), textcoords="offset points", fontsize=fontsize, annotation_clip=False, **look
    )


def mark_decays(axes: Iterable[Axes], epochs: pd.DataFrame, cast: Cast) -> None:
    """Mark decay epochs: dashed where every group that got there has them, else dotted and coloured.

    Dashed ones are labelled, and so are dotted ones that several groups share. If there were too many
    colours, the latter are grey and those of single groups left out.
    """
    by_group = {group: _decays(epochs[epochs["group"] == group]) for group in cast.colours}
    reached = epochs.groupby("group")["epoch"].max()
    whose: dict[int, list[str]] = {}
    for group, decays in by_group.items():
        for epoch in decays:
            whose.setdefault(epoch, []).append(group)
    if len(whose) > MAX_MARKS:
        return
    shared = [
        e for e, groups in whose.items() if all(g in groups or reached.get(g, -1) < e for g in by_group)
    ]
    single = [(group, e) for e, groups in whose.items() if e not in shared for group in groups]
    labelled = {
        e: {by_group[group][e] for group in groups}
        for e, groups in whose.items()
        if e in shared or len(groups) > 1
    }
    for ax in axes:
        for epoch in shared:
            ax.axvline(epoch, color=style.MARK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        if len(single) <= MAX_GROUP_MARKS:
            for group, epoch in single:
                ax.axvline(
                    epoch, color=cast.colours[group], linewidth=0.9, linestyle=":", alpha=0.8, zorder=1
                )
        else:
            for epoch in set(labelled) - set(shared):
                ax.axvline(epoch, color=style.MARK, linewidth=0.9, linestyle=":", zorder=1)
        _label_decays(ax, labelled)


def label_ends(ax: Axes, ends: Sequence[End]) -> None:
    """Name lines at their right ends, moved apart where they would touch."""
    ax.get_xlim(), ax.get_ylim()  # settles the limits
    shown = sorted((end for end in ends if end.text), key=lambda end: _height(ax, end.y))
    if not shown:
        return
    heights = _apart([_height(ax, end.y) for end in shown], gap=0.075)
    for end, height in zip(shown, heights, strict=True):
        text = f"{KEY_OF[end.marker]} {end.text}" if end.marker else end.text
        note(ax, text, (1.015, height), color=end.colour, ha="left", va="center", fontsize=9)


def group_legend(
    figure: Figure, cast: Cast, extra: Sequence[Line2D] = (), *, single_seeds: bool = True
) -> None:
    """A legend below the panels: groups by colour (means of seeds said so), then ``extra`` entries."""
    groups = {} if cast.alone else cast.sizes
    handles = [
        key(
            f"{group} (mean of {n} seeds)" if n > 1 else group,
            marker=cast.marker(group),
            colour=cast.colours[group],
        )
        for group, n in groups.items()
    ]
    handles += extra
    if single_seeds and any(n > 1 for n in cast.sizes.values()):
        if cast.alone:
            handles.append(key(cast.repeats(), linewidth=2.4))
        handles.append(key("single seeds", linewidth=0.8))
    drawn = {artist.get_label() for ax in figure.axes for artist in ax.collections}
    if cast.reference is not None and BAND in drawn:
        handles.append(key(f"{cast.reference.name}, its band", linewidth=7, alpha=style.BAND_ALPHA))
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(4, len(handles), 128 // (longest + 8)))
        said = {"title": cast.part, "alignment": "left"} if cast.part else {}
        rows = math.ceil(len(handles) / columns) + bool(cast.part)
        # else the panels would have to shrink
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - LEGEND_ROWS))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, **said)


def key(label: str, line: str = "-", marker: str = "", colour: str = style.MARK, **more: object) -> Line2D:
    """A legend entry that explains a line style or a marker."""
    return Line2D([], [], color=colour, linestyle=line, marker=marker, label=label, **more)  # type: ignore[arg-type]


def _decays(epochs: pd.DataFrame) -> dict[int, float]:
    """Decay epochs that all runs of a group share -> the rate from there on."""
    runs = [rows for _, rows in epochs.groupby("run", sort=False)]
    if not runs:
        return {}
    shared = set.intersection(*(set(decay_epochs(rows)) for rows in runs))
    rates = runs[0].set_index("epoch")["lr"]
    return {epoch: float(rates.loc[epoch]) for epoch in sorted(shared)}


def _label_decays(ax: Axes, decays: dict[int, set[float]]) -> None:
    """``η → 0.01`` above the panel, ``η falls`` if to several rates; neighbours take turns in height."""
    low, high = ax.get_xlim()
    spec = ax.get_subplotspec()
    columns = spec.get_gridspec().ncols if spec is not None else 1
    panels = (0.75 if columns < 5 else 0.55) * style.WIDTH  # more axes leave them less of the figure
    needed = LABEL_WIDTH * columns / panels  # of a panel's width
    last, row = -np.inf, 0
    for epoch, rates in sorted(decays.items()):
        shown = {f"{rate:.3g}" for rate in rates}
        place = (epoch - low) / (high - low)
        row, last = (1 - row if place - last < needed else 0), place
        text = f"η → {shown.pop()}" if len(shown) == 1 else "η falls"
        note(ax, text, (epoch, 1.0), xycoords=("data", "axes fraction"), lift=2 + 9 * row, fontsize=7.5)
    if decays:
        ax.set_title(ax.get_title(loc="left"), loc="left", pad=24)


def _height(ax: Axes, y: float) -> float:
    """Height of a data value as a fraction of the panel."""
    point = ax.transData.transform((0.0 if ax.get_xscale() == "linear" else 1.0, y))
    return float(ax.transAxes.inverted().transform(point)[1])


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as needed to be ``gap`` apart, centred where they were."""

    def lowest(cluster: Sequence[float]) -> float:
        return float(np.mean(cluster)) - gap * (len(cluster) - 1) / 2

    placed: list[list[float]] = []  # clusters of wanted heights
    for height in heights:
        placed.append([height])
        while len(placed) > 1 and lowest(placed[-1]) < lowest(placed[-2]) + gap * len(placed[-2]):
            placed[-2:] = [placed[-2] + placed[-1]]
    return [lowest(cluster) + i * gap for cluster in placed for i in range(len(cluster))]
