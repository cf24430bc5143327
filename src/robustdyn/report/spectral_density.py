"""The figure of the whole spectrum: the Hessian's eigenvalues, and the gradient noise along them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from robustdyn.records.schema import DENSITY, RITZ_VALUE
from robustdyn.report import style
from robustdyn.report.plotting import Cast, group_legend, key, log_axis
from robustdyn.report.statistics import decay_epochs

KINDS = (
    ("hessian", "eigenvalues of H per decade", style.PALETTE[0]),
    ("noise", "part of Tr C per decade", style.PALETTE[1]),
)
"""Kinds of rows of the ``density`` table, what their density is, and its colour in a figure of one group."""

WIDTH = 0.15  # decades: what a node of a spectral density is spread over
LONE = 1 / (WIDTH * math.sqrt(2 * math.pi))  # how high a lone eigenvalue stands


def spectral_density(density: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
    """How many eigenvalues the Hessian has where, and beneath it how much gradient noise lies there.

    Args:
        density: Tidy ``density`` rows.
        epochs: Tidy ``epochs`` rows.
        cast: Colours.
    """
    moments = _moments(density, epochs)
    axis = _SignedLog.of(pd.concat(moments.values()))
    figure = style.new_figure(cast.with_repeats("Spectral density of Hessian H and noise C"), 5.6)
    rows = figure.subplots(len(KINDS), len(moments), sharex=True, sharey="row", squeeze=False)
    for (kind, label, colour), panels in zip(KINDS, rows, strict=True):
        first: list[_Density] = []
        for ax, (moment, chosen) in zip(panels, moments.items(), strict=True):
            found = list(axis.densities(chosen[chosen["kind"] == kind]))
            if cast.alone:
                for one in first:
                    ax.plot(one.points, one.heights, color=colour, linestyle="--", linewidth=0.9)
            for one in found:
                one.draw(ax, cast.colour(one.group, colour))
            first = first or found
            axis.lay(ax)
            if kind == KINDS[0][0]:
                at = sorted(set(chosen["epoch"]))
                ax.set_title(f"{moment}, epoch {at[0]}" if len(at) == 1 else moment)
        panels[0].set_ylabel(label)
        highest = max(float(np.max(line.get_ydata())) for ax in panels for line in ax.lines)
        panels[0].set_ylim(LONE / 4 if kind == "hessian" else 1e-4 * highest, 2 * highest)
        log_axis(panels[0])
    for ax in rows[-1]:
        ax.set_xlabel(DENSITY[RITZ_VALUE].label)
    said = [key(next(iter(moments)), "--", linewidth=1.0)] if cast.alone and len(moments) > 1 else []
    group_legend(figure, cast, said, single_seeds=False)
    return figure


def _moments(density: pd.DataFrame, epochs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each run's first and last measurement and of its last one before the first decay.

    A moment that is one of the others in every run is left out.
    """
    decay = {run: next(iter(decay_epochs(rows)), -1) for run, rows in epochs.groupby("run")}
    measured = density.groupby("run")["epoch"]
    early = density[density["epoch"] < density["run"].map(decay)].groupby("run")["epoch"]
    moments = {
        "last measurement": measured.max(),
        "first measurement": measured.min(),
        "before the first decay": early.max(),
    }
    found: dict[str, pd.DataFrame] = {}
    for title, at in moments.items():
        rows = density[density["epoch"] == density["run"].map(at)]
        if len(rows) and not any(rows.equals(other) for other in found.values()):
            found[title] = rows
    in_time = ("first measurement", "before the first decay", "last measurement")
    return {title: found[title] for title in in_time if title in found}


class _Density(NamedTuple):
    """A group's density at points of an axis, with its standard error where it is one run's."""

    group: str
    points: NDArray[np.float64]
    heights: NDArray[np.float64]
    error: NDArray[np.float64] | None

    def draw(self, ax: Axes, colour: str) -> None:
        """A line with a band of ±1 standard error."""
        ax.plot(self.points, self.heights, color=colour, linewidth=1.6)
        if self.error is not None:
            low = np.maximum(self.heights - self.error, 0.05 * self.heights)
            ax.fill_between(self.points, low, self.heights + self.error, color=colour, alpha=0.2, linewidth=0)


@dataclass(frozen=True)
class _SignedLog:
    """An axis that is logarithmic on both sides of zero and linear within ±``linear``.

    Linear there and no finer, since between neighbouring nodes nothing is known: on an axis logarithmic down
    to less than that, gaps between nodes would look like gaps between eigenvalues.
    """

    linear: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, nodes: pd.DataFrame) -> _SignedLog:
        """The axis for these rows of the ``density`` table: as fine as their nodes about zero are apart."""
        lowest, highest = nodes[RITZ_VALUE].min(), nodes[RITZ_VALUE].max()
        of_one = nodes.groupby(["run", "epoch", "kind", "probe"], sort=False)[RITZ_VALUE]
        gaps = of_one.agg(lambda values: values[values > 0].min() - values[values <= 0].max())
        coarsest = gaps.groupby(["run", "epoch", "kind"], sort=False).mean().max()
        least = 1e-6 * max(abs(lowest), abs(highest)) or 1.0
        return cls(max(coarsest, least) if coarsest > 0 else 1e4 * least, lowest, highest)

    def places(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where values are, in decades (away from zero) from zero."""
        return np.asarray(np.arcsinh(values / self.linear) / np.log(10))

    def densities(self, nodes: pd.DataFrame) -> Iterator[_Density]:
        """A curve for each group: mean over its runs' random vectors of their masses, spread out."""
        for group, rows in nodes.groupby("group", sort=False):
            places = self.places(rows[RITZ_VALUE].to_numpy(dtype=float))
            reach = 2.5 * WIDTH
            grid = np.arange(places.min() - reach, places.max() + reach, WIDTH / 8)
            vectors = []
            for _, own in rows.groupby(["run", "probe"], sort=False):
                offsets = grid[:, None] - self.places(own[RITZ_VALUE].to_numpy(dtype=float))
                kernel = np.exp(-0.5 * (offsets / WIDTH) ** 2) / (WIDTH * np.sqrt(2 * np.pi))
                vectors.append(kernel @ own["mass"].to_numpy(dtype=float))
            alone = rows["run"].nunique() == 1 and len(vectors) > 1
            yield _Density(
                str(group),
                self.linear * np.sinh(grid * np.log(10)),
                np.mean(vectors, axis=0),
                np.std(vectors, axis=0, ddof=1) / np.sqrt(len(vectors)) if alone else None,
            )

    def lay(self, ax: Axes) -> None:
        """Make it a panel's horizontal axis."""
        ax.set_xscale("asinh", linear_width=self.linear)
        ax.axvspan(-self.linear, self.linear, color=style.MARK, alpha=0.12, linewidth=0, zorder=0)
        ends = self.places(np.array([self.lowest, self.highest])) + np.array([-3.0, 3.0]) * WIDTH
        left, right = self.linear * np.sinh(ends * np.log(10))
        ax.set_xlim(left, right)
        spec = ax.get_subplotspec()
        gap = 0.055 * (spec.get_gridspec().ncols if spec is not None else 1) * (ends[1] - ends[0])  # decades
        smallest = math.ceil(math.log10(self.linear * math.sinh(gap * math.log(10))))
        largest = max(smallest, math.floor(math.log10(max(-left, right))))
        ticks = {0.0: "0"}
        for power in range(largest, smallest - 1, -math.ceil(gap)):
            ticks |= {10.0**power: f"$10^{{{power}}}$", -(10.0**power): f"$-10^{{{power}}}$"}
        shown = {at: text for at, text in ticks.items() if left <= at <= right}
        ax.set_xticks(list(shown), list(shown.values()))
        decades = [sign * 10.0**power for power in range(smallest, largest + 1) for sign in (-1, 1)]
        ax.xaxis.set_minor_locator(FixedLocator(decades))
