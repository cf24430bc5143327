"""The figures of a report: ``FIGURES`` lists them with their table, caption and text alternative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from robustdyn.records.columns import Column
from robustdyn.records.schema import (
    ALIGNMENT,
    BEST_RATE,
    BEST_RATE_SE,
    BOUNDS,
    CAPTURED_NOISE,
    CAUCHY_SCHWARZ_BOUND,
    COMMUTATOR_NULL,
    EPOCHS,
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    HESSIAN_TRACE,
    NOISE_EIGENVALUE,
    POSTERIOR_VARIANCE,
    RITZ_VALUE,
    ROBUST_LOSS_GAP,
    SPECTRUM,
    SUBSPACE_OVERLAP,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
    TOTAL_CORRELATION,
    TOTAL_CORRELATION_NULL,
    WCI,
    WCI_SE,
    WCI_TERM,
    WEIGHT_NORM_SQ,
)
from robustdyn.report import style
from robustdyn.report.panels import MARKER, PANEL, Curve, Draw, Panel, over_epochs
from robustdyn.report.plotting import (
    Cast,
    group_legend,
    key,
    label_ends,
    leave_out_transient,
    log_axis,
    mark_decays,
    means_by_epoch,
    named,
    note,
)
from robustdyn.report.posterior_variances import CAPTION, posterior_variances
from robustdyn.report.reference import Reference
from robustdyn.report.spectral_density import spectral_density
from robustdyn.report.statistics import correlation, decay_epochs, format_number
from robustdyn.report.whole_bound import BOUND_ALT, BOUND_CAPTION, whole_bound


@dataclass(frozen=True)
class FigureSpec:
    """A figure of the report.

    Attributes:
        name: File name without ending.
        title: Heading in the report.
        function: Draws it.
        table: The table it shows, which must have rows, as must the table ``epochs``.
        column: Column of the table without which there is nothing to draw.
        caption: How to read it.
        alt: What it shows, for those who cannot see it.
    """

    name: str
    title: str
    function: Draw
    table: str
    column: str
    caption: str
    alt: str

    def missing(self, frames: Mapping[str, pd.DataFrame]) -> str | None:
        """Why the figure cannot be drawn from these tables, or ``None`` if it can."""
        for table in (self.table, "epochs"):
            if frames[table].empty:
                return f"nothing is recorded in the table {table}"
        if frames[self.table][self.column].isna().all():
            return f"the column {self.column} of the table {self.table} holds no number"
        return None

    @style.styled
    def draw(
        self, frames: Mapping[str, pd.DataFrame], reference: Reference | None = None, part: str = ""
    ) -> Figure:
        """The figure, with a reference's band behind the curves that it has.

        ``part`` says which settings the tables hold, if not all.
        """
        epochs = named(frames["epochs"])
        cast = Cast.of(epochs, reference=reference, part=part)
        return self.function(named(frames[self.table]), epochs, cast)


def learning_curves(metric: str, heading: str) -> Draw:
    """Train, test (and validation) curves of a metric on the left, the gap on the right."""
    train, test, validation, gap = (
        EPOCHS[name]
        for name in (f"train_{metric}", f"test_{metric}", f"validation_{metric}", f"{metric}_gap")
    )

    def drawn(epochs: pd.DataFrame, _: pd.DataFrame, cast: Cast) -> Figure:
        figure = style.new_figure(heading, PANEL + (0.0 if cast.alone else 0.3))
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
        curves = [Curve(train, "--", "", colour=style.TRAIN, text="train")]
        curves += [Curve(test, "-", "", colour=style.TEST, text="test")]
        if cast.alone and validation.name in epochs and epochs[validation.name].notna().any():
            curves += [Curve(validation, ":", "", colour=style.VALIDATION, text="validation")]
        ylabel = f"{metric.replace('_', ' ')} ({test.shown_unit})"
        ends = Panel("", tuple(curves), ylabel).draw(left, epochs, cast)
        left.set_title(f"Train and test ({_mark_lowest(left, epochs, test, cast)})")
        _gap_panel("Gap, test − train", gap).draw(right, epochs, cast)
        right.axhline(0.0, color=style.MARK, linewidth=0.8)
        leave_out_transient(left, epochs, [train, test])
        leave_out_transient(right, epochs, [gap])
        mark_decays([left, right], epochs, cast)
        if cast.alone:
            label_ends(left, ends)
        group_legend(figure, cast, [] if cast.alone else [key("test", "-"), key("train", "--")])
        return figure

    return drawn


def rate(heading: str, panel: Panel) -> Draw:
    """A learning rate over epochs on a logarithmic axis."""

    def drawn(rates: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
        figure = style.new_figure(heading, 3.0)
        ax = figure.subplots()
        panel.draw(ax, rates, cast)
        log_axis(ax)
        mark_decays([ax], epochs, cast)
        group_legend(figure, cast)
        return figure

    return drawn


def wci_and_gap(wci: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
    """WCI above the robust loss gap on one epoch axis, and one against the other; without a gap WCI alone."""
    index = Panel("WCI (band: ±1 s.e.)", (Curve(WCI["wci"], spread=WCI_SE),))
    if epochs[ROBUST_LOSS_GAP].isna().all():
        figure = style.new_figure("Weight-Curvature Index", PANEL)
        alone = figure.subplots()
        index.draw(alone, wci, cast)
        mark_decays([alone], epochs, cast)
        group_legend(figure, cast)
        return figure
    figure = style.new_figure("Weight-Curvature Index and the robust generalisation gap", 5.2)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1.0))
    top = figure.add_subplot(grid[0, 0])
    bottom = figure.add_subplot(grid[1, 0], sharex=top)
    index.draw(top, wci, cast)
    top.set_xlabel("")
    top.tick_params(labelbottom=False)
    gap = EPOCHS[ROBUST_LOSS_GAP]
    _gap_panel("Robust loss gap, test − train", gap).draw(bottom, epochs, cast)
    leave_out_transient(bottom, epochs, [gap])
    mark_decays([top, bottom], epochs, cast)
    _gap_against_wci(figure.add_subplot(grid[:, 1]), wci, epochs, cast)
    group_legend(figure, cast)
    return figure


def layer_terms(layers: pd.DataFrame, epochs: pd.DataFrame, cast: Cast) -> Figure:
    """Each layer's share of the WCI at the last measured epoch and, hollow, before the first decay."""
    names, n = list(dict.fromkeys(layers["layer"])), len(cast.colours)
    figure = style.new_figure("Layers' terms of the WCI", 1.6 + len(names) * (0.16 + 0.06 * min(n, 5)))
    ax = figure.subplots()
    # groups share a layer's row, each at a height of its own
    offsets = dict(zip(cast.colours, np.linspace(-0.24, 0.24, n) if n > 1 else [0.0], strict=True))
    for group, rows in layers.groupby("group", sort=False):
        colour, places = (
            cast.colour(str(group), style.PALETTE[0]),
            np.arange(len(names)) + offsets[str(group)],
        )
        of_runs = epochs[epochs["group"] == group].groupby("run", sort=False)
        first_decay = min((decay for _, own in of_runs for decay in decay_epochs(own)[:1]), default=-1)
        last, before = _layer_means(rows, names), _layer_means(rows[rows["epoch"] < first_decay], names)
        marker = cast.marker(str(group)) or MARKER
        dots: dict[str, Any] = {"linestyle": "", "marker": marker, "color": colour, "markersize": 6}
        if before.size:
            ax.hlines(places, before, last, color=colour, linewidth=1.0, alpha=0.5)
            ax.plot(before, places, fillstyle="none", **dots)
        ax.plot(last, places, **dots)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.set_xlabel(style.mathtext("WCI term of the layer, sqrt(‖W_k‖² Tr H_k)"))
    hollow = key("before the first decay", "", MARKER, fillstyle="none")
    group_legend(figure, cast, [key("last measurement", "", MARKER), hollow], single_seeds=False)
    return figure


def _gap_panel(title: str, gap: Column) -> Panel:
    return Panel(title, (Curve(gap, marker=""),), f"gap ({gap.shown_unit})")


def _above_its_null(name: str, null: str) -> Panel:
    """A statistic that sampling noise keeps from zero, and how far: the dotted line."""
    curves = (
        Curve(ALIGNMENT[null], ":", "", spread=f"{null}_spread"),
        Curve(ALIGNMENT[name], spread=f"{name}_se"),
    )
    # neither can be negative, whatever the bands say
    return Panel("dotted: if H and C commuted", curves, limits=(0, None))


def _mark_lowest(ax: Axes, epochs: pd.DataFrame, column: Column, cast: Cast) -> str:
    """A ring at the lowest point of each group's (mean) curve.

    Returns:
        What the rings mark: with value and epoch where there is one group only.
    """
    said = "○ lowest test"
    for group, means in means_by_epoch(epochs, column.name, "group").items():
        curve = means * column.scale
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
        epochs[["run", "epoch", ROBUST_LOSS_GAP]], on=["run", "epoch"], validate="one_to_one"
    )
    pairs = pairs.dropna(subset=["wci", ROBUST_LOSS_GAP])
    notes = []
    for group, rows in pairs.groupby("group", sort=False):
        colour, marker = cast.colour(str(group), style.PALETTE[0]), cast.marker(str(group)) or MARKER
        for _, own in rows.groupby("run", sort=False):
            x, y = own["wci"], own[ROBUST_LOSS_GAP]
            ax.plot(x, y, color=colour, marker=marker, linewidth=0.7, alpha=0.75)
            ax.plot(x.iloc[-1:], y.iloc[-1:], marker=marker, markersize=8, color=colour)
        r = correlation(rows["wci"], rows[ROBUST_LOSS_GAP])
        if r is not None:
            notes.append((f"r = {r:.2f} ({len(rows)} points)", colour))
    ax.set_title("Gap against WCI")
    ax.set_xlabel(WCI["wci"].shown)
    ax.set_ylabel(EPOCHS[ROBUST_LOSS_GAP].shown)
    if len(notes) <= len(style.PALETTE):
        for i, (text, colour) in enumerate(reversed(notes)):  # above the right end, where no data is
            note(ax, text, (1.0, 1.0), lift=3 + 10 * i, color=colour, ha="right")


def _layer_means(layers: pd.DataFrame, names: Sequence[str]) -> NDArray[np.float64]:
    """Mean over runs of the layers' terms at each run's last measured epoch (names,); (0,) without rows."""
    if layers.empty:
        return np.empty(0)
    last = layers[layers["epoch"] == layers.groupby("run")["epoch"].transform("max")]
    return last.groupby("layer")[WCI_TERM].mean().reindex(list(names)).to_numpy(dtype=float)


FIGURES: tuple[FigureSpec, ...] = (
    FigureSpec(
        "robust_loss",
        "Robust loss",
        learning_curves("robust_loss", "Robust loss: cross-entropy on adversarial examples"),
        "epochs",
        TEST_ROBUST_LOSS,
        "Robust overfitting is the test curve rising after a learning-rate decay while the train curve "
        "falls: the gap on the right opens. The ring marks the lowest test robust loss. Train values are "
        "averages over the epoch while the weights move; test values belong to the epoch's end.",
        "Lines over epochs: robust loss on training and test adversarial examples, and the gap between them.",
    ),
    FigureSpec(
        "robust_error",
        "Robust error",
        learning_curves("robust_error", "Robust error: misclassified adversarial examples"),
        "epochs",
        TEST_ROBUST_ERROR,
        "The same for the share of adversarial examples misclassified. The error often moves less than the "
        "loss: compare the two before concluding that nothing happened. The ring marks the lowest test "
        "robust error.",
        "Lines over epochs: robust error in per cent on training and test adversarial examples, and their "
        "gap.",
    ),
    FigureSpec(
        "learning_rate",
        "Learning rate",
        rate("Learning rate", Panel("", (Curve(EPOCHS["lr"], marker="", steps=True),))),
        "epochs",
        "lr",
        "The rate in force at the end of each epoch, on a logarithmic axis. Dashed vertical lines, here and "
        "in all figures, are decays: drops by more than 20 % after an epoch in which the rate was held.",
        "Step line over epochs: learning rate on a logarithmic axis.",
    ),
    FigureSpec(
        "wci_and_gap",
        "WCI and the robust gap",
        wci_and_gap,
        "wci",
        "wci",
        "Left: does the WCI move when the gap moves? Right: one point for each measured epoch, joined in "
        "time (the large mark is the last); r is Pearson's correlation over these points, which follow one "
        "another in time and are not independent samples.",
        "Two line panels over epochs, the Weight-Curvature Index and the robust loss gap, and a scatter of "
        "gap against index.",
    ),
    FigureSpec(
        "norm_and_trace",
        "Weight norm and Hessian trace apart",
        over_epochs(
            "What drives the WCI: weight norm or curvature?",
            Panel("Weight norm", (Curve(WCI[WEIGHT_NORM_SQ]),), limits=(0, None)),
            Panel(
                "Hessian trace (±1 s.e.)",
                (Curve(WCI[HESSIAN_TRACE], spread="hessian_trace_se"),),
                limits=(0, None),
            ),
            Panel(
                "WCI and its bound",
                (Curve(WCI["wci"]), Curve(WCI[CAUCHY_SCHWARZ_BOUND], "--", "")),
                limits=(0, None),
            ),
            keys=(("WCI", "-", MARKER), (WCI[CAUCHY_SCHWARZ_BOUND].label, "--", "")),
        ),
        "wci",
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
        "layers",
        WCI_TERM,
        "One row per weight matrix from input to output; the terms of a run add up to its WCI. Hollow: the "
        "last measurement before the first decay; filled: the last one.",
        "Dots by layer: each layer's term of the WCI before the first decay and at the last measurement.",
    ),
    FigureSpec(
        "spectrum",
        "Curvature and gradient noise",
        over_epochs(
            "Curvature and gradient noise, leading directions",
            Panel("Hessian, {top}", (Curve(SPECTRUM[HESSIAN_EIGENVALUE], spread="residual"),)),
            Panel(
                "Gradient noise along them", (Curve(SPECTRUM[GRADIENT_NOISE], spread="gradient_noise_se"),)
            ),
            Panel("Gradient noise, its own {top}", (Curve(SPECTRUM[NOISE_EIGENVALUE]),)),
        ),
        "spectrum",
        HESSIAN_EIGENVALUE,
        "Left: leading Hessian eigenvalues (band, where drawn: ± the solver's residual). Middle: variance "
        "of the mini-batch gradient along these directions (band: ±1 s.e.). Right: leading eigenvalues of "
        "the gradient covariance itself; where middle and right agree, noise and curvature share their "
        "directions. Open circles are magnitudes of negative values. Directions are sorted at each epoch "
        "separately: a line is a rank, not one direction.",
        "Three panels of lines over epochs on logarithmic axes: Hessian eigenvalues, gradient noise along "
        "their directions, eigenvalues of the gradient noise.",
    ),
    FigureSpec(
        POSTERIOR_VARIANCE,
        "Posterior variances",
        posterior_variances,
        "posterior",
        POSTERIOR_VARIANCE,
        CAPTION,
        "Lines over epochs on a logarithmic axis: posterior variance along each tracked direction, "
        "stationary and time-resolved, with the latter's propagated and injected parts.",
    ),
    FigureSpec(
        "bound_terms",
        "Dominant bound terms",
        over_epochs(
            "Dominant PAC-Bayes terms, {top} directions",
            *(
                Panel(title, (Curve(BOUNDS[name]),), f"{BOUNDS[name].label}, {{top}}")
                for title, name in (
                    ("Curvature term", "curvature_term_top_k"),
                    ("Complexity term", "log_variance_term_top_k"),
                    ("Their sum", "dominant_terms_top_k"),
                )
            ),
        ),
        "bounds",
        "dominant_terms_top_k",
        "Sums over the tracked directions only: a statement about that subspace, not the bound of the whole "
        "model. A decay lowers the curvature term and raises the complexity term. Epochs where a tracked "
        "direction has no stationary law have no sum.",
        "Three line panels over epochs: curvature term, complexity term and their sum over the tracked "
        "directions.",
    ),
    FigureSpec("whole_bound", "Bound and gap", whole_bound, "catoni", "total", BOUND_CAPTION, BOUND_ALT),
    FigureSpec(
        "best_rate",
        "The rate that the bound would choose",
        rate(
            "Rate that minimises the dominant terms, times β",
            Panel("{top} directions (band: ±1 s.e.)", (Curve(BOUNDS[BEST_RATE], spread=BEST_RATE_SE),)),
        ),
        "bounds",
        BEST_RATE,
        "For a bound with a given β, divide by β. schedule=bound does so with β = beta_per_example · n and "
        "then clips the rate. It falls where the gradient noise grows. The rate says nothing about how far "
        "the loss has fallen.",
        "Line over epochs: the rate that minimises the bound's dominant terms, at β = 1, on a logarithmic "
        "axis.",
    ),
    FigureSpec(
        "alignment",
        "Alignment of curvature and noise",
        over_epochs(
            "Alignment of Hessian H and gradient covariance C",
            _above_its_null("commutator", COMMUTATOR_NULL),
            Panel(
                "dashed: captured noise",
                (Curve(ALIGNMENT[CAPTURED_NOISE], "--"), Curve(ALIGNMENT[SUBSPACE_OVERLAP])),
                limits=(0, 1),
            ),
            _above_its_null(TOTAL_CORRELATION, TOTAL_CORRELATION_NULL),
        ),
        "alignment",
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
        "density",
        RITZ_VALUE,
        "Top: Hessian eigenvalues per decade of λ; a lone one stands 2.7 high. Bottom: how much of the "
        "gradient noise's variance lies along them; noise left of zero is where curvature holds no "
        "stationary posterior. The axis is logarithmic on either side of zero and linear in the grey strip, "
        "within which eigenvalues are not told apart. Band, for a single run: ±1 s.e. over random vectors.",
        "Two rows of curves over the Hessian eigenvalue on a signed logarithmic axis, at up to three epochs: "
        "number of eigenvalues, and gradient noise along them.",
    ),
)
