"""Figures of replica ensembles beside the laws that predict them, from the tables of ``ground_truth``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from robustdyn.replicas.prediction import (
    DRIFT,
    EXACT,
    EXACT_PATH,
    INJECTED,
    MIXTURE,
    NOISE_FREE,
    REFRESHED,
    REFRESHED_PATH,
    SLOW_MODE,
    STATIONARY,
)
from robustdyn.report import style
from robustdyn.report.plotting import End, key, label_ends, log_axis
from robustdyn.theory.transient import DECAY

GOAL = (0.9, 1.11)  # of a geometric mean that counts as agreement
FLOOR = 0.02  # of a ratio to the start, below which the drift's axis does not go
GAP = 0.25  # decades between what precedes a decay and what follows

NAMES = {
    STATIONARY: "stationary",
    SLOW_MODE: "slow mode",
    EXACT: "exact, attack held fixed",
    REFRESHED: "exact, attack recomputed",
    EXACT_PATH: "attack held fixed, along the mean's path",
    REFRESHED_PATH: "attack recomputed, along the mean's path",
    INJECTED: "posterior of one run: noise since the decay",
    MIXTURE: "posterior of runs: noise and places",
    NOISE_FREE: "noise-free path",
    DRIFT: "noise-free path with third-order drift",
}
COLOURS = {
    STATIONARY: style.PINK,
    SLOW_MODE: style.ORANGE,
    EXACT: style.PALETTE[0],
    REFRESHED: style.PALETTE[1],
    EXACT_PATH: style.PALETTE[0],
    REFRESHED_PATH: style.PALETTE[1],
    INJECTED: style.PALETTE[2],
    MIXTURE: style.PALETTE[2],
    NOISE_FREE: style.ORANGE,
    DRIFT: style.PALETTE[2],
}
LINES = {EXACT_PATH: ":", REFRESHED_PATH: ":", INJECTED: "--"}
OF_VARIANCES = [law for law in NAMES if law not in (NOISE_FREE, DRIFT)]  # these differ in the mean alone
DRAWN = (STATIONARY, SLOW_MODE, EXACT, REFRESHED, REFRESHED_PATH, MIXTURE)  # beside single variances
SHORT = {
    EXACT: "left, attack held",
    REFRESHED: "left, attack recomputed",
    NOISE_FREE: "left, noise-free",
    DRIFT: "left, drift",
}


class _Steps:
    """A step axis, logarithmic from the start and, where the rate falls at once, again from there."""

    def __init__(self, rows: pd.DataFrame) -> None:
        known = rows.drop_duplicates("step").sort_values("step")
        self.last = int(known["step"].max())
        steps, rates = known["step"].to_numpy(), known["learning_rate"].to_numpy()
        falls = np.flatnonzero(rates[1:] < (1 - DECAY) * rates[:-1])
        self.decay = int(steps[falls[0]]) if len(falls) == 1 and steps[falls[0]] > 1 else None

    def place(self, steps: Sequence[int] | np.ndarray | pd.Series) -> np.ndarray:
        """Where steps ≥ 1 lie."""
        values = np.maximum(np.asarray(steps, dtype=np.float64), 1)
        places: np.ndarray = np.log10(values)
        if self.decay is not None:
            since = np.log10(np.maximum(values - self.decay, 1))
            places = np.where(values > self.decay, np.log10(self.decay) + GAP + since, places)
        return places

    def dress(self, ax: Axes) -> None:
        """Ticks, labels and the mark of the decay."""
        ticks = {step: str(step) for step in (1, 10, 100, 1000, 10000) if step <= (self.decay or self.last)}
        ax.set_xlabel("optimiser step")
        if self.decay is not None:
            later = [step for step in (1, 10, 100, 1000) if self.decay + step <= self.last]
            ticks |= {self.decay + step: f"+{step}" for step in later}
            place = np.log10(self.decay) + GAP / 2
            ax.axvline(place, color=style.MARK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            ax.set_xlabel(f"optimiser step, + after {self.decay}")
        ax.set_xticks(self.place(list(ticks)), list(ticks.values()))
        ax.set_xlim(-0.05, float(self.place([self.last])[0]) + 0.05)


def _ratio_axis(ax: Axes, limits: tuple[float, float]) -> None:
    ax.set_yscale("log")
    ax.set_ylim(*limits)
    _plain_ticks(ax.yaxis, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def _plain_ticks(axis: Axis, *subs: float) -> None:
    """Labels ``0.5``, ``2`` at these multiples of powers of ten."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grid(figure: Figure, count: int, columns: int, **shared: Any) -> list[Axes]:
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, **shared).ravel()
    for ax in axes[count:]:
        ax.set_visible(False)
    return list(axes[:count])


def _law_keys(data: pd.DataFrame, laws: Iterable[str]) -> list[Line2D]:
    """Legend entries of the laws that the table has."""
    return [
        key(NAMES[law], LINES.get(law, "-"), colour=COLOURS[law])
        for law in laws
        if (data["law"] == law).any()
    ]


def _per_ensemble(
    data: pd.DataFrame, title: str, ylabel: str, *, height: float = 2.7, sharey: bool = True
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame, _Steps]]]:
    """A figure, and for each ensemble a panel over steps, its rows and its step axis."""
    names = list(dict.fromkeys(data["ensemble"]))
    figure = style.new_figure(title, 0.9 + height * -(-len(names) // 2))
    panels = []
    for ax, name in zip(_grid(figure, len(names), min(2, len(names)), sharey=sharey), names, strict=True):
        own = data[data["ensemble"] == name]
        axis = _Steps(own)
        axis.dress(ax)
        ax.set_title(name)
        ax.set_ylabel(ylabel)
        panels.append((ax, own, axis))
    return figure, panels


def _draw_law(ax: Axes, places: Any, values: Any, law: str, width: float, **look: Any) -> None:
    ax.plot(places, values, color=COLOURS[law], linestyle=LINES.get(law, "-"), linewidth=width, **look)


def _draw_bars(ax: Axes, x: Any, y: Any, error: Any, points: str, colour: str, **look: Any) -> None:
    ax.errorbar(x, y, yerr=error, fmt=points, color=colour, elinewidth=0.8, **look)


@style.styled
def draw_ratio(data: pd.DataFrame) -> Figure:
    """Geometric mean of measured / predicted variance against the step, a panel for each ensemble.

    Args:
        data: Table ``agreement`` from step 1 on.
    """
    title, ylabel = "Variance of the weights, measured / predicted", "geometric mean over directions"
    figure, panels = _per_ensemble(data, title, ylabel, height=3.0)
    for ax, own, axis in panels:
        ax.axhspan(*GOAL, color=style.MARK, alpha=0.15, linewidth=0, zorder=0.9)
        ax.axhline(1, color=style.MARK, linewidth=0.8)
        for law in OF_VARIANCES:
            line = own[own["law"] == law].dropna(subset=["geometric_mean"])
            if line.empty:
                continue
            places, own_attack = axis.place(line["step"]), law in (EXACT, REFRESHED)
            points = {"marker": "o" if own_attack else "", "markersize": 2.5}
            _draw_law(ax, places, line["geometric_mean"], law, 1.3 if law in LINES else 1.8, **points)
            if own_attack:
                band = places, line["low"], line["high"]
                ax.fill_between(*band, color=COLOURS[law], alpha=0.15, linewidth=0, zorder=0.9)
        _ratio_axis(ax, (0.15, 8.0))
    handles = [*_law_keys(data, OF_VARIANCES), key("learning rate falls", "--")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@style.styled
def draw_variances(data: pd.DataFrame, name: str) -> Figure:
    """Variance against the step, measured and predicted, a panel for each direction.

    Args:
        data: A row for each law, step and direction of one ensemble.
        name: The ensemble's.
    """
    figure = style.new_figure(f"Variance of the weights along Hessian eigenvectors: {name}", 6.4)
    axis, chosen = _Steps(data), sorted(data["direction"].unique())
    axes = _grid(figure, len(chosen), -(-len(chosen) // 2), sharex=True)
    for ax, direction in zip(axes, chosen, strict=True):
        own = data[data["direction"] == direction]
        seen = own[own["law"] == EXACT]
        places = axis.place(seen["step"])
        ax.fill_between(places, seen["low"], seen["high"], color="#000000", alpha=0.13, linewidth=0)
        ax.plot(places, seen["measured"], color="#000000", marker="o", markersize=3, linewidth=0)
        for law in DRAWN:
            line = own[own["law"] == law].dropna(subset=["predicted"])
            held = "steps-post" if law == STATIONARY else "default"
            _draw_law(ax, axis.place(line["step"]), line["predicted"], law, 1.5, drawstyle=held)
        low, high = seen["low"].min(), seen["high"].max()
        ax.set_yscale("log")
        ax.set_ylim(low / 2, high * 2)
        axis.dress(ax)
        ax.set_title(f"direction {direction}, λ = {seen['eigenvalue'].iloc[0]:.3g}")
        ax.set_ylabel("variance σ²")
    handles = [key("measured, 95 % interval", "", "o", "#000000"), *_law_keys(data, DRAWN)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@style.styled
def draw_ratio_by_eigenvalue(data: pd.DataFrame) -> Figure:
    """Measured / predicted variance of each direction against λ, a panel for each ensemble and time.

    Args:
        data: A row for each law and direction, with ``when``, the panel's time in words.
    """
    panels = list(dict.fromkeys(zip(data["ensemble"], data["when"], strict=True)))
    figure = style.new_figure("Measured / predicted variance against λ", 0.9 + 2.7 * -(-len(panels) // 2))
    axes = _grid(figure, len(panels), min(2, len(panels)), sharey=True)
    for ax, (name, when) in zip(axes, panels, strict=True):
        own = data[(data["ensemble"] == name) & (data["when"] == when)]
        ax.axhline(1, color=style.MARK, linewidth=0.8)
        for law, shift in ((EXACT, 0.985), (REFRESHED, 1.015)):
            rows = own[own["law"] == law]
            ratio, low, high = (rows[name] / rows["predicted"] for name in ("measured", "low", "high"))
            error = [ratio - low, high - ratio]
            _draw_bars(ax, rows["eigenvalue"] * shift, ratio, error, "o", COLOURS[law], markersize=3.5)
        ax.set_xscale("log")
        _plain_ticks(ax.xaxis, 1.0, 2.0, 5.0)
        _ratio_axis(ax, (0.07, 7.0))
        ax.set_title(f"{name}: {when}")
        ax.set_xlabel("λ of H at the start")
        ax.set_ylabel("measured / predicted")
    handles = [
        key(NAMES[law], "", "o", COLOURS[law]) for law in (EXACT, REFRESHED) if (data["law"] == law).any()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


@style.styled
def draw_mean(data: pd.DataFrame) -> Figure:
    """How far the mean moved and how much of that laws leave, a panel for each ensemble.

    Args:
        data: Table ``agreement`` from step 1 on.
    """
    title = "Mean of the weights, in predicted standard deviations"
    figure, panels = _per_ensemble(data, title, "rms over directions (σ)", sharey=False)
    for ax, own, axis in panels:
        ends = []
        right = float(axis.place([axis.last])[0])
        for law in SHORT:
            rows = own[own["law"] == law]
            if rows.empty:
                continue
            ax.plot(axis.place(rows["step"]), rows["rms_offset"], color=COLOURS[law])
            ends.append(End(right, rows["rms_offset"].iloc[-1], SHORT[law], COLOURS[law]))
        rows = own[own["law"] == (REFRESHED if (own["law"] == REFRESHED).any() else EXACT)]
        ax.plot(axis.place(rows["step"]), rows["rms_move"], color="#000000")
        ends.append(End(right, rows["rms_move"].iloc[-1], "moved", "#000000"))
        chance = rows["rms_offset_of_chance"].iloc[0]
        ax.axhline(chance, color=style.MARK, linewidth=0.9, linestyle=":")
        ends.append(End(right, chance, "chance", style.MARK))
        ax.set_ylim(bottom=0)
        label_ends(ax, ends)
    return figure


@style.styled
def draw_drift(data: pd.DataFrame) -> Figure:
    """Curvature, slope and noise relative to the start, a panel for each ensemble.

    Args:
        data: Tables ``along_the_path`` and ``at_the_replicas``, told apart by ``source``, path or replicas.
    """
    title = "What drifts while replicas train, relative to the start"
    figure, panels = _per_ensemble(data, title, "relative to the start")
    values = data[["curvature", "slope", "noise"]].to_numpy(dtype=float)
    values = values[values > FLOOR]  # an estimate may be negative
    limits = (min(0.5, values.min() / 1.3), max(2.0, 1.3 * values.max()))
    looks = {"curvature": style.PALETTE[0], "slope": style.PALETTE[1], "noise": style.PALETTE[2]}
    for ax, own, axis in panels:
        ax.axhline(1, color=style.MARK, linewidth=0.8)
        path = own[own["source"] == "path"].sort_values("step")
        for column, colour in looks.items():
            # between these nothing was measured
            places = axis.place(path["step"])
            ax.plot(places, path[column], color=colour, marker="o", markersize=4, linewidth=0.8)
        seen = own[own["source"] == "replicas"].sort_values("step")
        for column in ("slope", "noise"):
            places, error = axis.place(seen["step"]), 2 * seen[f"{column}_error"]
            hollow = {"markersize": 3.5, "fillstyle": "none"}
            _draw_bars(ax, places, seen[column], error, "D", looks[column], **hollow)
        ax.set_ylim(*limits)
        log_axis(ax)
    names = ("λ of H, attack held fixed", "slope, attack recomputed", "gradient noise")
    along = data[data["source"] == "path"].groupby("ensemble")["step"].nunique()
    followed = along.max() > 1  # else all curves are a point at 1
    handles = [
        key(name, colour=colour)
        for name, (column, colour) in zip(names, looks.items(), strict=True)
        if followed or column != "curvature"
    ]
    handles += [
        key("at the replicas' mean", marker="o"),
        key("from the replicas' own gradients, ± 2 s.e.", "", "D", fillstyle="none"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@style.styled
def draw_memory(data: pd.DataFrame) -> Figure:
    """What replicas remember of earlier steps at the decay and at the end, a panel for each ensemble.

    Args:
        data: Table ``memory``.
    """
    title = "Correlation of replicas' places with those at an earlier step"
    figure, panels = _per_ensemble(data, title, "mean correlation")
    for ax, own, axis in panels:
        ax.axhline(0, color=style.MARK, linewidth=0.8)
        of_reference = own.sort_values("step").groupby("reference", sort=True)
        for (reference, rows), colour in zip(of_reference, style.PALETTE, strict=False):
            places = axis.place(rows["step"])
            look = {"markersize": 3, "linewidth": 1.2, "label": f"at step {reference}"}
            _draw_bars(ax, places, rows["correlation"], 2 * rows["error"], "o-", colour, **look)
            ax.plot(places, rows["expected"], color=colour, linestyle=":", linewidth=1.3)
        ax.legend(loc="upper left")
    handles = [
        key("measured, ± 2 s.e.", marker="o", colour=style.MARK),
        key("what the slopes would leave", ":", colour=style.MARK),
        key("learning rate falls", "--"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@style.styled
def draw_gaussianity(data: pd.DataFrame) -> Figure:
    """Mardia's skewness and kurtosis in deviations of their law under normality, a panel for each ensemble.

    Args:
        data: Table ``gaussianity``.
    """
    title, ylabel = (
        "Are replicas Gaussian? Mardia's statistics of all directions",
        "(measured − expected) / s.d.",
    )
    figure, panels = _per_ensemble(data, title, ylabel)
    looks = dict(zip(("skewness", "kurtosis"), style.PALETTE, strict=False))
    for ax, own, axis in panels:
        ax.axhspan(-2, 2, color=style.MARK, alpha=0.15, linewidth=0, zorder=0.9)
        ax.axhline(0, color=style.MARK, linewidth=0.8)
        for name, colour in looks.items():
            away = (own[name] - own[f"{name}_expected"]) / own[f"{name}_spread"]
            ax.plot(axis.place(own["step"]), away, "o-", color=colour, markersize=3, linewidth=1.2)
    handles = [key(name, marker="o", colour=colour) for name, colour in looks.items()]
    handles += [key("learning rate falls", "--"), key("Gaussian replicas, ± 2 s.d.", linewidth=6, alpha=0.2)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure
