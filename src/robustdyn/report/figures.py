"""The figures of a report; each is a function of tidy frames and returns a figure.

``FIGURES`` lists them with the tables they need, their caption and their text alternative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from robustdyn.records import schema
from robustdyn.records.schema import ALIGNMENT, BOUNDS, DENSITY, EPOCHS, POSTERIOR, SPECTRUM, WCI
from robustdyn.report import style
from robustdyn.report.plotting import (
    Cast,
    draw,
    draw_ranks,
    finish,
    group_legend,
    key,
    label_ends,
    leave_out_transient,
    log_axis,
    mark_decays,
    mean_by_epoch,
    named,
)
from robustdyn.report.statistics import correlation, decay_epochs, format_number

__all__ = ["FIGURES", "FigureSpec", "decay_epochs"]

PANEL = 3.6  # inches: height of one row of panels with title and legend
MARKER = "o"


KINDS = (
    ("hessian", "eigenvalues of H per decade", style.PALETTE[0]),
    ("noise", "part of Tr C per decade", style.PALETTE[1]),
)
"""Kinds of rows of the ``density`` table, what their density is, and its colour in a figure of one group."""

WIDTH = 0.15  # decades: what a node of a spectral density is spread over
LONE = 1 / (WIDTH * math.sqrt(2 * math.pi))  # how high a lone eigenvalue stands

NULLS = {"commutator": "commutator_null", "total_correlation": "total_correlation_null"}
"""Statistics that sampling noise keeps from zero, and the column that says how far."""


@style.styled
def robust_loss(epochs: pd.DataFrame) -> Figure:
    """Train and test robust loss, and their gap, over epochs.

    Args:
        epochs: Tidy ``epochs`` rows.
    """
    return _learning_curves(
        named(epochs), "robust_loss", "Robust loss: cross-entropy on adversarial examples"
    )


@style.styled
def robust_error(epochs: pd.DataFrame) -> Figure:
    """Train and test robust error in per cent, and their gap, over epochs.

    Args:
        epochs: Tidy ``epochs`` rows.
    """
    return _learning_curves(named(epochs), "robust_error", "Robust error: misclassified adversarial examples")


@style.styled
def learning_rate(epochs: pd.DataFrame) -> Figure:
    """Learning rate over epochs on a logarithmic axis.

    Args:
        epochs: Tidy ``epochs`` rows.
    """
    epochs = named(epochs)
    cast = Cast.of(epochs)
    figure = style.new_figure("Learning rate", 3.0)
    ax = figure.subplots()
    draw(ax, epochs, EPOCHS["lr"], cast, steps=True)
    log_axis(ax)
    finish(ax, "", EPOCHS["lr"].shown)
    mark_decays([ax], epochs, cast)
    group_legend(figure, cast)
    return figure


@style.styled
def wci_and_gap(wci: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """WCI above the robust loss gap on one epoch axis, and one against the other.

    Args:
        wci: Tidy ``wci`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    wci, epochs = named(wci), named(epochs)
    cast = Cast.of(epochs)
    figure = style.new_figure("Weight-Curvature Index and the robust generalisation gap", 5.2)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1.0))
    top = figure.add_subplot(grid[0, 0])
    bottom = figure.add_subplot(grid[1, 0], sharex=top)
    draw(top, wci, WCI["wci"], cast, marker=MARKER, spread="wci_se")
    finish(top, "WCI (band: ±1 s.e.)", WCI["wci"].shown)
    top.set_xlabel("")
    top.tick_params(labelbottom=False)
    draw(bottom, epochs, EPOCHS["robust_loss_gap"], cast)
    finish(bottom, "Robust loss gap, test − train", f"gap ({EPOCHS['robust_loss_gap'].shown_unit})")
    leave_out_transient(bottom, epochs, [EPOCHS["robust_loss_gap"]])
    mark_decays([top, bottom], epochs, cast)
    _gap_against_wci(figure.add_subplot(grid[:, 1]), wci, epochs, cast)
    group_legend(figure, cast)
    return figure


@style.styled
def norm_and_trace(wci: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """‖W‖²_F and Tr H apart, and the WCI under its Cauchy–Schwarz bound.

    Args:
        wci: Tidy ``wci`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    wci, epochs = named(wci), named(epochs)
    cast = Cast.of(epochs)
    figure = style.new_figure("What drives the WCI: weight norm or curvature?", PANEL)
    axes = figure.subplots(1, 3)
    draw(axes[0], wci, WCI["weight_norm_sq"], cast, marker=MARKER)
    finish(axes[0], "Weight norm", WCI["weight_norm_sq"].shown)
    draw(axes[1], wci, WCI["hessian_trace"], cast, marker=MARKER, spread="hessian_trace_se")
    finish(axes[1], "Hessian trace (±1 s.e.)", WCI["hessian_trace"].shown)
    draw(axes[2], wci, WCI["wci"], cast, marker=MARKER)
    draw(axes[2], wci, WCI["cauchy_schwarz_bound"], cast, line="--")
    finish(axes[2], "WCI and its bound", WCI["wci"].shown)
    for ax in axes:
        ax.set_ylim(bottom=0)
    mark_decays(axes, epochs, cast)
    group_legend(figure, cast, [key("WCI", "-", MARKER), key(WCI["cauchy_schwarz_bound"].label, "--")])
    return figure


@style.styled
def spectrum(spectrum: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Top Hessian eigenvalues, gradient noise along their directions, and top noise eigenvalues.

    Args:
        spectrum: Tidy ``spectrum`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    panels = [
        ("hessian_eigenvalue", "Hessian, top {k}", "residual"),
        ("gradient_noise", "Gradient noise along them", "gradient_noise_se"),
        ("noise_eigenvalue", "Gradient noise, its own top {k}", None),
    ]
    title = "Curvature and gradient noise, leading directions"
    return _rank_figure(title, panels, SPECTRUM, spectrum, epochs)


@style.styled
def posterior_variance(posterior: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Posterior variances along the tracked directions: stationary, and at each time.

    Args:
        posterior: Tidy ``posterior`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    panels: list[tuple[str, str, str | None]] = [
        ("posterior_variance_stationary", "Stationary at the present rate", None),
        ("posterior_variance", "Time-resolved, with shuffled epochs", None),
    ]
    title = "Posterior variance of the weights, top {k} directions"
    return _rank_figure(title, panels, POSTERIOR, posterior, epochs, one_scale=True)


@style.styled
def bound_terms(bounds: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """The dominant PAC-Bayes terms over the tracked directions.

    Args:
        bounds: Tidy ``bounds`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    bounds, epochs = named(bounds), named(epochs)
    cast = Cast.of(epochs)
    figure = style.new_figure(
        f"Dominant PAC-Bayes terms, {_top(bounds['tracked_directions'])} directions", PANEL
    )
    axes = figure.subplots(1, 3)
    titles = {
        "curvature_term_top_k": "Curvature term",
        "log_variance_term_top_k": "Complexity term",
        "dominant_terms_top_k": "Their sum",
    }
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        draw(ax, bounds, BOUNDS[name], cast, marker=MARKER)
        finish(ax, title, f"{BOUNDS[name].label}, {_top(bounds['tracked_directions'])}")
    mark_decays(axes, epochs, cast)
    group_legend(figure, cast)
    return figure


@style.styled
def alignment(alignment: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """How far Hessian and gradient noise share directions.

    Args:
        alignment: Tidy ``alignment`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    alignment, epochs = named(alignment), named(epochs)
    cast = Cast.of(epochs)
    figure = style.new_figure("Alignment of Hessian H and gradient covariance C", PANEL)
    axes = figure.subplots(1, 3)
    for ax, name in zip(axes, ("commutator", "subspace_overlap", "total_correlation"), strict=True):
        if null := NULLS.get(name):
            draw(ax, alignment, ALIGNMENT[null], cast, line=":", spread=f"{null}_spread")
            draw(ax, alignment, ALIGNMENT[name], cast, marker=MARKER, spread=f"{name}_se")
            finish(ax, "dotted: if H and C commuted", ALIGNMENT[name].shown)
            ax.set_ylim(bottom=0)  # neither can be negative, whatever the bands say
        else:
            draw(ax, alignment, ALIGNMENT["captured_noise"], cast, line="--", marker=MARKER)
            draw(ax, alignment, ALIGNMENT[name], cast, marker=MARKER)
            finish(ax, "dashed: captured noise", ALIGNMENT[name].shown)
            ax.set_ylim(0, 1)
    mark_decays(axes, epochs, cast)
    group_legend(figure, cast)
    return figure


@style.styled
def spectral_density(density: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """How many eigenvalues the Hessian has where, and beneath it how much gradient noise lies there.

    Args:
        density: Tidy ``density`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    density, epochs = named(density), named(epochs)
    cast = Cast.of(epochs)
    moments = _moments(density, epochs)
    axis = _SignedLog.of(pd.concat(moments.values()))
    figure = style.new_figure(_with_repeats("Spectral density of Hessian H and noise C", cast), 5.6)
    rows = figure.subplots(len(KINDS), len(moments), sharex=True, sharey="row", squeeze=False)
    for (kind, label, colour), panels in zip(KINDS, rows, strict=True):
        first: list[_Curve] = []
        for ax, (moment, chosen) in zip(panels, moments.items(), strict=True):
            curves = list(axis.curves(chosen[chosen["kind"] == kind]))
            if cast.alone:
                _draw_curves(ax, first, cast, colour, line="--")
            _draw_curves(ax, curves, cast, colour)
            first = first or curves
            axis.lay(ax)
            if kind == KINDS[0][0]:
                at = sorted(set(chosen["epoch"]))
                ax.set_title(f"{moment}, epoch {at[0]}" if len(at) == 1 else moment)
        panels[0].set_ylabel(label)
        highest = max(float(np.max(line.get_ydata())) for ax in panels for line in ax.lines)
        panels[0].set_ylim(LONE / 4 if kind == "hessian" else 1e-4 * highest, 2 * highest)
        log_axis(panels[0])
    for ax in rows[-1]:
        ax.set_xlabel(DENSITY["ritz_value"].label)
    said = [key(next(iter(moments)), "--", linewidth=1.0)] if cast.alone and len(moments) > 1 else []
    group_legend(figure, cast, said, single_seeds=False)
    return figure


@style.styled
def layer_terms(layers: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Each layer's share of the WCI at the last measured epoch and, hollow, before the first decay.

    Args:
        layers: Tidy ``layers`` rows.
        epochs: Tidy ``epochs`` rows.
    """
    layers, epochs = named(layers), named(epochs)
    cast = Cast.of(epochs)
    names = list(dict.fromkeys(layers["layer"]))
    figure = style.new_figure(
        "Layers' terms of the WCI", 1.6 + len(names) * (0.16 + 0.06 * min(len(cast.colours), 5))
    )
    ax = figure.subplots()
    offsets = dict(zip(cast.colours, _offsets(len(cast.colours)), strict=True))
    for group, rows in layers.groupby("group", sort=False):
        colour, offset = cast.colour(str(group), style.PALETTE[0]), offsets[str(group)]
        decay = _first_decay(epochs[epochs["group"] == group])
        last, before = _layer_means(rows, names), _layer_means(rows[rows["epoch"] < decay], names)
        places = np.arange(len(names)) + offset
        if before.size:
            ax.hlines(places, before, last, color=colour, linewidth=1.0, alpha=0.5)
            ax.plot(before, places, linestyle="", marker=MARKER, fillstyle="none", color=colour, markersize=6)
        ax.plot(last, places, linestyle="", marker=MARKER, color=colour, markersize=6)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel(style.mathtext("WCI term of the layer, sqrt(‖W_k‖² Tr H_k)"))
    solid, hollow = (
        key("last measurement", "", MARKER),
        key("before the first decay", "", MARKER, fillstyle="none"),
    )
    group_legend(figure, cast, [solid, hollow], single_seeds=False)
    return figure


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the report.

    Attributes:
        name: File name without ending.
        title: Heading in the report.
        function: Draws it from the tables named, in that order.
        tables: Tables it needs; each must have rows.
        column: Column of the first table without which there is nothing to draw.
        caption: How to read it.
        alt: What it shows, for those who cannot see it.
    """

    name: str
    title: str
    function: Callable[..., Figure]
    tables: tuple[str, ...]
    column: str
    caption: str
    alt: str

    def missing(self, frames: Mapping[str, pd.DataFrame]) -> str | None:
        """Why the figure cannot be drawn from these tables, or ``None`` if it can."""
        for table in self.tables:
            if frames[table].empty:
                return f"nothing is recorded in the table {table}"
        if frames[self.tables[0]][self.column].isna().all():
            return f"the column {self.column} of the table {self.tables[0]} holds no number"
        return None

    def draw(self, frames: Mapping[str, pd.DataFrame]) -> Figure:
        """The figure."""
        return self.function(*(frames[table] for table in self.tables))


FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        "robust_loss",
        "Robust loss",
        robust_loss,
        ("epochs",),
        "test_robust_loss",
        "Robust overfitting is the test curve rising after a learning-rate decay while the train curve "
        "falls: the gap on the right opens. The ring marks the lowest test robust loss. Train values are "
        "averages over the epoch while the weights move; test values belong to the epoch's end.",
        "Lines over epochs: robust loss on training and test adversarial examples, and the gap between them.",
    ),
    FigureSpec(
        "robust_error",
        "Robust error",
        robust_error,
        ("epochs",),
        "test_robust_error",
        "The same for the share of adversarial examples misclassified. The error often moves less than the "
        "loss: compare the two before concluding that nothing happened. The ring marks the lowest test "
        "robust error.",
        "Lines over epochs: robust error in per cent on training and test adversarial examples, and their "
        "gap.",
    ),
    FigureSpec(
        "learning_rate",
        "Learning rate",
        learning_rate,
        ("epochs",),
        "lr",
        "The rate in force at the end of each epoch, on a logarithmic axis. Dashed vertical lines, here and "
        "in all figures, are decays: drops by more than 20 % after an epoch in which the rate was held.",
        "Step line over epochs: learning rate on a logarithmic axis.",
    ),
    FigureSpec(
        "wci_and_gap",
        "WCI and the robust gap",
        wci_and_gap,
        ("wci", "epochs"),
        "wci",
        "Left: does the WCI move when the gap moves? Right: one point for each measured epoch, joined in "
        "time (the square is the last); r is Pearson's correlation over these points, which follow one "
        "another in time and are not independent samples.",
        "Two line panels over epochs, the Weight-Curvature Index and the robust loss gap, and a scatter of "
        "gap against index.",
    ),
    FigureSpec(
        "norm_and_trace",
        "Weight norm and Hessian trace apart",
        norm_and_trace,
        ("wci", "epochs"),
        "wci",
        "The WCI is bounded by the product of the two factors' square roots (dashed). The factor whose "
        "curve bends where the WCI bends is the one that drives it.",
        "Three line panels over epochs: squared weight norm, Hessian trace, and WCI with its Cauchy–Schwarz "
        "bound.",
    ),
    FigureSpec(
        "layer_terms",
        "Layers of the WCI",
        layer_terms,
        ("layers", "epochs"),
        "wci_term",
        "One row per weight matrix from input to output; the terms of a run add up to its WCI. Hollow: the "
        "last measurement before the first decay; filled: the last one.",
        "Dots by layer: each layer's term of the WCI before the first decay and at the last measurement.",
    ),
    FigureSpec(
        "spectrum",
        "Curvature and gradient noise",
        spectrum,
        ("spectrum", "epochs"),
        "hessian_eigenvalue",
        "Left: leading Hessian eigenvalues (band, where drawn: ± the solver's residual). Middle: variance "
        "of the mini-batch gradient along these directions (band: ±1 s.e.). Right: leading eigenvalues of "
        "the gradient covariance itself; where middle and right agree, noise and curvature share their "
        "directions. Open circles are magnitudes of negative values. Directions are ordered anew at each "
        "epoch: a line is a rank, not one direction.",
        "Three panels of lines over epochs on logarithmic axes: Hessian eigenvalues, gradient noise along "
        "their directions, eigenvalues of the gradient noise.",
    ),
    FigureSpec(
        "posterior_variance",
        "Posterior variances",
        posterior_variance,
        ("posterior", "epochs"),
        "posterior_variance",
        "Variance of the weights along each tracked direction. Left: what momentum SGD would settle to at "
        "the present rate; it jumps at a decay. Right: where it is on its way there, from the run's own "
        "rates; the posterior contracts as fast as curvature and momentum let it. Epochs where a direction "
        "has no stationary law are left out.",
        "Lines over epochs on a logarithmic axis: posterior variance along each tracked direction, "
        "stationary and time-resolved.",
    ),
    FigureSpec(
        "bound_terms",
        "Dominant bound terms",
        bound_terms,
        ("bounds", "epochs"),
        "dominant_terms_top_k",
        "Sums over the tracked directions only: a statement about that subspace, not the bound of the whole "
        "model. A decay lowers the curvature term and raises the complexity term. Epochs where a tracked "
        "direction has no stationary law have no sum.",
        "Three line panels over epochs: curvature term, complexity term and their sum over the tracked "
        "directions.",
    ),
    FigureSpec(
        "alignment",
        "Alignment of curvature and noise",
        alignment,
        ("alignment", "epochs"),
        "commutator",
        "Left: 0 would mean that Hessian and gradient noise commute; sampling noise alone already gives the "
        "dotted line (band: its spread; that of the measured line: ±1 s.e.). Middle: 1 means that their "
        "leading directions span the same space, and (dashed) that H's directions catch as much noise as C's "
        "own. Right: what the bound pays, in nats, for not commuting. All over the tracked directions.",
        "Three line panels over epochs: relative commutator, subspace overlap with captured noise, and total "
        "correlation.",
    ),
    FigureSpec(
        "spectral_density",
        "The whole spectrum",
        spectral_density,
        ("density", "epochs"),
        "ritz_value",
        "Top: Hessian eigenvalues per decade of λ; a lone one stands 2.7 high. Bottom: how much of the "
        "gradient noise's variance lies along them; noise left of zero is where curvature holds no "
        "stationary posterior. The axis is logarithmic on either side of zero and linear in the grey strip, "
        "within which eigenvalues are not told apart. Band, for a single run: ±1 s.e. over random vectors.",
        "Two rows of curves over the Hessian eigenvalue on a signed logarithmic axis, at up to three epochs: "
        "number of eigenvalues, and gradient noise along them.",
    ),
)


def _moments(density: pd.DataFrame, epochs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each run's first and last measurement and of its last one before the first decay.

    A moment that is in every run one of the others is left out.
    """
    chosen: dict[str, dict[str, float]] = {name: {} for name in ("last", "first", "before")}
    for run, rows in density.groupby("run", sort=False):
        measured = rows["epoch"]
        decay = next(iter(decay_epochs(epochs[epochs["run"] == run])), -1)
        chosen["last"][str(run)] = measured.max()
        chosen["first"][str(run)] = measured.min()
        chosen["before"][str(run)] = measured[measured < decay].max()  # nan where there is none
    titles = {
        "first": "first measurement",
        "before": "before the first decay",
        "last": "last measurement",
    }
    kept: dict[str, pd.DataFrame] = {}
    seen: list[dict[str, float]] = []
    for name, at in chosen.items():
        rows = density[density["epoch"] == density["run"].map(at)]
        if len(rows) and at not in seen:
            kept[name] = rows
            seen.append(at)
    return {title: kept[name] for name, title in titles.items() if name in kept}


@dataclass(frozen=True)
class _Curve:
    """A group's density at points of an axis, with its standard error where it is one run's."""

    group: str
    points: NDArray[np.float64]
    heights: NDArray[np.float64]
    error: NDArray[np.float64] | None


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
        lowest, highest = nodes["ritz_value"].min(), nodes["ritz_value"].max()
        of_one = nodes.groupby(["run", "epoch", "kind", "probe"], sort=False)["ritz_value"]
        gaps = of_one.agg(lambda values: values[values > 0].min() - values[values <= 0].max())
        coarsest = gaps.groupby(["run", "epoch", "kind"], sort=False).mean().max()
        least = 1e-6 * max(abs(lowest), abs(highest)) or 1.0
        return cls(max(coarsest, least) if coarsest > 0 else 1e4 * least, lowest, highest)

    def places(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where values are, in decades (away from zero) from zero."""
        return np.asarray(np.arcsinh(values / self.linear) / np.log(10))

    def curves(self, nodes: pd.DataFrame) -> Iterator[_Curve]:
        """A curve for each group: mean over its runs' random vectors of their masses, spread out."""
        for group, rows in nodes.groupby("group", sort=False):
            places = self.places(rows["ritz_value"].to_numpy(dtype=float))
            reach = 2.5 * WIDTH
            grid = np.arange(places.min() - reach, places.max() + reach, WIDTH / 8)
            vectors = []
            for _, own in rows.groupby(["run", "probe"], sort=False):
                offsets = grid[:, None] - self.places(own["ritz_value"].to_numpy(dtype=float))
                kernel = np.exp(-0.5 * (offsets / WIDTH) ** 2) / (WIDTH * np.sqrt(2 * np.pi))
                vectors.append(kernel @ own["mass"].to_numpy(dtype=float))
            alone = rows["run"].nunique() == 1 and len(vectors) > 1
            yield _Curve(
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
        room = 0.055 * (spec.get_gridspec().ncols if spec is not None else 1) * (ends[1] - ends[0])  # decades
        smallest = math.ceil(math.log10(self.linear * math.sinh(room * math.log(10))))
        largest = max(smallest, math.floor(math.log10(max(-left, right))))
        ticks = {0.0: "0"}
        for power in range(largest, smallest - 1, -math.ceil(room)):
            ticks |= {10.0**power: f"$10^{{{power}}}$", -(10.0**power): f"$-10^{{{power}}}$"}
        shown = {at: text for at, text in ticks.items() if left <= at <= right}
        ax.set_xticks(list(shown), list(shown.values()))
        decades = [sign * 10.0**power for power in range(smallest, largest + 1) for sign in (-1, 1)]
        ax.xaxis.set_minor_locator(FixedLocator(decades))


def _draw_curves(ax: Axes, curves: Sequence[_Curve], cast: Cast, colour: str, *, line: str = "-") -> None:
    """Lines with bands of ±1 standard error; thin and without bands where ``line`` is no solid line."""
    for curve in curves:
        shade = cast.colour(curve.group, colour)
        solid = line == "-"
        ax.plot(curve.points, curve.heights, color=shade, linestyle=line, linewidth=1.6 if solid else 0.9)
        if solid and curve.error is not None:
            low = np.maximum(curve.heights - curve.error, 0.05 * curve.heights)
            ax.fill_between(
                curve.points, low, curve.heights + curve.error, color=shade, alpha=0.2, linewidth=0
            )


def _learning_curves(epochs: pd.DataFrame, metric: str, title: str) -> Figure:
    """Train, test (and validation) curves of a metric on the left, the gap on the right."""
    cast = Cast.of(epochs)
    figure = style.new_figure(title, PANEL + (0.0 if cast.alone else 0.3))
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    test, gap = EPOCHS[f"test_{metric}"], EPOCHS[f"{metric}_gap"]
    ends = draw(left, epochs, EPOCHS[f"train_{metric}"], cast, colour=style.TRAIN, line="--", text="train")
    ends += draw(left, epochs, test, cast, colour=style.TEST, text="test")
    validation = EPOCHS[f"validation_{metric}"]
    if cast.alone and validation.name in epochs and epochs[validation.name].notna().any():
        ends += draw(left, epochs, validation, cast, colour=style.VALIDATION, line=":", text="validation")
    lowest = _mark_lowest(left, epochs, test, cast)
    finish(left, f"Train and test ({lowest})", f"{metric.replace('_', ' ')} ({test.shown_unit})")
    draw(right, epochs, gap, cast)
    right.axhline(0.0, color=style.MARK, linewidth=0.8)
    finish(right, "Gap, test − train", f"gap ({gap.shown_unit})")
    leave_out_transient(left, epochs, [EPOCHS[f"train_{metric}"], test])
    leave_out_transient(right, epochs, [gap])
    mark_decays([left, right], epochs, cast)
    if cast.alone:
        label_ends(left, ends)
    splits = [] if cast.alone else [key("test", "-"), key("train", "--")]
    group_legend(figure, cast, splits)
    return figure


def _mark_lowest(ax: Axes, epochs: pd.DataFrame, column: schema.Column, cast: Cast) -> str:
    """A ring at the lowest point of each group's (mean) curve.

    Returns:
        What the rings mark: with value and epoch where there is one group only.
    """
    said = "○ lowest test"
    for group, rows in epochs.groupby("group", sort=False):
        curve = mean_by_epoch(rows, column.name) * column.scale
        if curve.empty:
            continue
        lowest = int(curve.argmin())
        epoch, value = int(curve.index[lowest]), float(curve.iloc[lowest])
        colour = cast.colour(str(group), style.TEST)
        ax.plot([epoch], [value], marker=MARKER, markersize=8, fillstyle="none", color=colour, linestyle="")
        if cast.alone:
            number = f"{value:.1f} %" if column.scale > 1 else format_number(value)
            said = f"○ lowest test: {number}, epoch {epoch}"
    return said


def _gap_against_wci(ax: Axes, wci: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> None:
    """Robust loss gap against WCI at measured epochs, joined in time within each run."""
    pairs = wci[["run", "group", "epoch", "wci"]].merge(
        epochs[["run", "epoch", "robust_loss_gap"]], on=["run", "epoch"], validate="one_to_one"
    )
    pairs = pairs.dropna(subset=["wci", "robust_loss_gap"])
    notes = []
    for group, rows in pairs.groupby("group", sort=False):
        colour = cast.colour(str(group), style.PALETTE[0])
        for _, own in rows.groupby("run", sort=False):
            own = own.sort_values("epoch")
            ax.plot(
                own["wci"], own["robust_loss_gap"], color=colour, marker=MARKER, linewidth=0.7, alpha=0.75
            )
            ax.plot(
                own["wci"].iloc[-1:], own["robust_loss_gap"].iloc[-1:], marker="s", markersize=7, color=colour
            )
        r = correlation(rows["wci"], rows["robust_loss_gap"])
        if r is not None:
            notes.append(((f"r = {r:.2f} ({len(rows)} points)"), colour))
    ax.set_title("Gap against WCI")
    ax.set_xlabel(WCI["wci"].shown)
    ax.set_ylabel(EPOCHS["robust_loss_gap"].shown)
    if len(notes) <= len(style.PALETTE):
        _notes(ax, notes)


def _notes(ax: Axes, notes: Sequence[tuple[str, str]]) -> None:
    """Coloured lines of text above the panel's right end, where no data is."""
    for i, (text, colour) in enumerate(reversed(notes)):
        ax.annotate(
            text,
            (1.0, 1.0),
            xytext=(0, 3 + 10 * i),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
            color=colour,
            annotation_clip=False,
        )


def _rank_figure(
    title: str,
    panels: Sequence[tuple[str, str, str | None]],
    table: schema.Table,
    frame: pd.DataFrame,
    epochs: pd.DataFrame,
    *,
    one_scale: bool = False,
) -> Figure:
    """Panels of (column, title, spread), one line per rank, ``{k}`` in titles filled in."""
    frame, epochs = named(frame), named(epochs)
    cast = Cast.of(epochs)
    k = int(frame["index"].max()) + 1
    figure = style.new_figure(_with_repeats(title.format(k=k), cast), PANEL + 0.2)
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=one_scale))
    for ax, (name, panel_title, spread) in zip(axes, panels, strict=True):
        draw_ranks(ax, frame, table[name], cast, spread=spread)
        finish(ax, panel_title.format(k=k), table[name].shown)
    mark_decays(axes, epochs, cast)
    if cast.alone and k > 1:
        _rank_scale(figure, list(axes), k)
    elif not cast.alone:
        ranks = [key("leading direction", linewidth=1.6), key("further directions", linewidth=0.8, alpha=0.5)]
        group_legend(figure, cast, ranks, single_seeds=False)
    return figure


def _rank_scale(figure: Figure, axes: Sequence[Axes], k: int) -> None:
    """A stepped colour bar that says which shade is which rank."""
    scale = ScalarMappable(BoundaryNorm(np.arange(k + 1) + 0.5, k), ListedColormap(list(style.shades(k))))
    bar = figure.colorbar(scale, ax=axes, pad=0.015, aspect=30)
    steps = sorted({1, *range(max(1, k // 4), k + 1, max(1, k // 4)), k})
    bar.set_ticks(steps, labels=[str(step) for step in steps])
    bar.ax.minorticks_off()
    bar.set_label("rank of the direction, 1 = leading")


def _with_repeats(title: str, cast: Cast) -> str:
    return f"{title} ({cast.repeats()})" if cast.repeats() else title


def _top(tracked: pd.Series) -> str:
    """``top 10`` or, where runs tracked different numbers, ``top 5–10``."""
    low, high = int(tracked.min()), int(tracked.max())
    return f"top {low}" if low == high else f"top {low}–{high}"


def _first_decay(epochs: pd.DataFrame) -> int:
    """The earliest decay in any run of a group; -1 without any."""
    first = [decay_epochs(rows)[:1] for _, rows in epochs.groupby("run", sort=False)]
    return min((epoch for epochs_of_run in first for epoch in epochs_of_run), default=-1)


def _offsets(n: int) -> NDArray[np.float64]:
    """Heights at which n groups share one row of a dot plot."""
    return np.linspace(-0.24, 0.24, n) if n > 1 else np.zeros(1)


def _layer_means(layers: pd.DataFrame, names: Sequence[str]) -> NDArray[np.float64]:
    """Mean over runs of the layers' terms at each run's last measured epoch (names,); (0,) without rows."""
    if layers.empty:
        return np.empty(0)
    last = layers[layers["epoch"] == layers.groupby("run")["epoch"].transform("max")]
    return last.groupby("layer")["wci_term"].mean().reindex(list(names)).to_numpy(dtype=float)
