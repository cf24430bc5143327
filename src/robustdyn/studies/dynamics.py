"""Learning dynamics of AT against AWP: curvature, gradient noise, posterior, bound terms, alignment.

Xu and Zhang, How Learning Dynamics Drive Adversarially Robust Generalization?, arXiv 2410.07719. All sums and
means are over the tracked directions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustdyn.records.reader import Run
from robustdyn.report import style
from robustdyn.report.plotting import Cast, End, finish, key, label_ends, log_axis, mark_decays
from robustdyn.report.statistics import format_number
from robustdyn.studies.shared.alike import require_alike, require_repetitions
from robustdyn.studies.shared.over_seeds import COVERAGE, draw_with_interval
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.tracked import (
    AFTER,
    BEFORE,
    END,
    LATE,
    LEARNING_RATE,
    MOMENTS,
    QUANTITIES,
    STEPS,
    WITHOUT_RATE,
    changed,
    label,
    mean,
    moments,
    number,
    over_epochs,
    told,
    tracked_directions,
)

MAY_DIFFER = ("objective", "perturbation", "schedule", "averaging", "attack.train", "measure.inputs")
ABOVE_NULL = 2.0  # spreads of the null: beyond, sampling noise alone is an unlikely reason

LOSSES = ("test_robust_loss", "robust_loss_gap")

OTHER, NULL = "--", ":"


@dataclass(frozen=True)
class Panel:
    """What a panel shows: a quantity in full lines, and perhaps a second one in others."""

    title: str
    unit: str
    quantity: str
    second: str = ""
    line: str = OTHER
    limits: tuple[float | None, float | None] = (None, None)


def answer(runs: Sequence[Run]) -> Answer:
    """Curves over epochs, changes across the decay, and AWP against AT.

    Raises:
        RecordError: The runs differ in more than method and seed, or lack what is compared.
    """
    require_alike(runs, MAY_DIFFER)
    require_repetitions(runs, method_of)
    k = tracked_directions(runs)
    every, at = [], []
    for run in runs:
        values = over_epochs(run)
        names = {"method": method_of(run), "seed": run.config.get("seed")}
        every.append(values.assign(**names))
        at.append(moments(values, run.path).assign(**names))
    values, points = pd.concat(every, ignore_index=True), pd.concat(at, ignore_index=True)
    methods = list(dict.fromkeys(values["method"]))
    reference = "AT" if "AT" in methods else methods[0]
    curves = _curves(values)
    at_moments, changes = _at_moments(points), _changes(points)
    against = _against(points, methods, reference)
    tables = {
        "moments": _labelled(at_moments, k),
        "changes": _labelled(changes, k),
        "alignment": _above_null(values),
        "runs": points,
    }
    if not against.empty:
        tables[f"against_{reference.lower()}"] = _labelled(against, k)
    return Answer(
        tables=tables,
        pictures=list(_pictures(curves, k)),
        findings=list(_findings(values, points, at_moments, changes, against, methods, reference, k)),
    )


def method_of(run: Run) -> str:
    """``AT``, ``AWP``, ``WCI-LR``: the run's method as papers write it."""
    name = run.choices.get("method")
    if name is None:
        perturbation = str((run.config.get("perturbation") or {}).get("_target_", "at"))
        name = perturbation.rpartition(".")[2]
    return name.upper().replace("_", "-")


def _curves(values: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds by epoch; an epoch at which some seed has no value is left out, lest the curve jump."""
    found = mean(values, ["method", "epoch"])
    seeds = values.groupby("method")["seed"].nunique()
    return found[found["seeds"] == found["method"].map(seeds)].reset_index(drop=True)


def _at_moments(points: pd.DataFrame) -> pd.DataFrame:
    rows = mean(points[points["quantity"] != LEARNING_RATE], ["method", "moment"])
    return _ordered(rows)


def _changes(points: pd.DataFrame) -> pd.DataFrame:
    """Changes between moments, counted in each run, over the seeds."""
    found = []
    for start, end in STEPS:
        pairs = _pair(points[points["moment"] == start], points[points["moment"] == end], ["method", "seed"])
        found.append(mean(pairs, ["method"], changes=True).assign(**{"from": start, "to": end}))
    rows = _ordered(pd.concat(found, ignore_index=True))
    return rows[["method", "quantity", "from", "to", "change", "mean", "low", "high", "seeds"]]


def _against(points: pd.DataFrame, methods: Sequence[str], reference: str) -> pd.DataFrame:
    """Other methods against the reference, seed by seed, at each moment."""
    found = []
    for method in methods:
        if method != reference:
            ours, theirs = (points[points["method"] == name] for name in (reference, method))
            pairs = _pair(ours, theirs, ["moment", "seed"])
            found.append(mean(pairs, ["moment"], changes=True).assign(method=method, against=reference))
    if not found:
        return pd.DataFrame()
    rows = _ordered(pd.concat(found, ignore_index=True))
    return rows[["method", "against", "moment", "quantity", "change", "mean", "low", "high", "seeds"]]


def _pair(start: pd.DataFrame, end: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The change of each quantity from the one set of rows to the other, matched by ``by``."""
    pairs = start.merge(end, on=[*by, "quantity"], suffixes=("_start", "_end"), validate="one_to_one")
    pairs = pairs[pairs["quantity"] != LEARNING_RATE]
    return pairs.assign(value=changed(pairs["value_start"], pairs["value_end"], pairs["quantity"]))


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by method, then as the quantities and the moments come; with the kind of change."""
    order = {name: i for i, name in enumerate([*QUANTITIES, *MOMENTS])}
    kinds = rows["quantity"].map(lambda name: QUANTITIES[name].change)
    by = [name for name in ("method", "quantity", "moment", "from", "to") if name in rows]
    return (
        rows.assign(change=kinds)
        .sort_values(by, key=lambda column: column.map(order) if column.name != "method" else column)
        .reset_index(drop=True)
    )


def _labelled(rows: pd.DataFrame, k: int) -> pd.DataFrame:
    return rows.assign(label=rows["quantity"].map(lambda name: label(name, k)))


def _above_null(values: pd.DataFrame) -> pd.DataFrame:
    """How many of all measurements lie beyond what sampling noise alone would give."""
    found = []
    for name in ("commutator", "total_correlation"):
        rows = values[values["quantity"] == f"{name}_excess"].dropna(subset=["value"])
        counts = rows.groupby("method", sort=False)["value"].agg(
            measurements="count", above=lambda excess: int((excess > ABOVE_NULL).sum()), mean_excess="mean"
        )
        found.append(counts.reset_index().assign(quantity=name, spreads=ABOVE_NULL))
    return pd.concat(found, ignore_index=True)[
        ["quantity", "method", "measurements", "above", "spreads", "mean_excess"]
    ]


def _findings(
    values: pd.DataFrame,
    points: pd.DataFrame,
    at_moments: pd.DataFrame,
    changes: pd.DataFrame,
    against: pd.DataFrame,
    methods: Sequence[str],
    reference: str,
    k: int,
) -> Iterator[str]:
    seeds = points.groupby("method", sort=False)["seed"].agg(lambda s: ", ".join(map(str, sorted(set(s)))))
    measured = points[points["quantity"] == "hessian_eigenvalue_top"]
    epochs = measured.groupby("moment")["epoch"].agg(["min", "max"])
    where = ", ".join(
        f"{moment}: epoch {_range(epochs['min'][moment], epochs['max'][moment])} ({MOMENTS[moment]})"
        for moment in MOMENTS
    )
    yield (
        f"{'; '.join(f'{method}: seeds {n}' for method, n in seeds.items())}; {k} tracked "
        f"directions: sums and means are over these, no statement about the whole model. Intervals: 95 %, "
        f"Student, over seeds ({COVERAGE}); ×: factors, with geometric means."
    )
    yield f"Moments: {where}."
    lines = [
        ("Robust overfitting, test robust loss", "test_robust_loss"),
        ("Robust loss gap", "robust_loss_gap"),
        ("Leading Hessian eigenvalue", "hessian_eigenvalue_top"),
        (f"Hessian eigenvalues, geometric mean of {k} tracked directions", "hessian_eigenvalue_mean"),
        ("Leading eigenvalue of the gradient noise", "noise_eigenvalue_top"),
        (f"Gradient noise along H's {k} tracked directions, geometric mean", "gradient_noise_mean"),
        (f"Stationary σ², geometric mean of {k} tracked directions", "stationary_variance_mean"),
        (f"Time-resolved σ², geometric mean of {k} tracked directions", "resolved_variance_mean"),
        (f"Σ λσ², {k} tracked directions, stationary", "curvature_term_stationary"),
        (f"−Σ ln σ² (nats), {k} tracked directions, stationary", "log_variance_term_stationary"),
        (f"Σ λσ² − Σ ln σ², {k} tracked directions, stationary", "dominant_terms_stationary"),
        (f"Σ λσ² − Σ ln σ², {k} tracked directions, time-resolved", "dominant_terms_resolved"),
    ]
    for text, quantity in lines:
        said = [f"{method} {_steps(changes, method, quantity)}" for method in methods]
        yield f"{text}: {'. '.join(said)}."
    yield _rate_part(points, changes, methods, k)
    for other in dict.fromkeys(against["method"]) if not against.empty else []:
        yield _other(against[against["method"] == other], other, reference, k)
    yield from _alignment(_above_null(values), at_moments, methods, k)
    missing = values[values["quantity"] == "dominant_terms_stationary"].groupby("method", sort=False)["value"]
    lacking = [f"{method}: {v.isna().sum()} of {len(v)}" for method, v in missing if v.isna().any()]
    if lacking:
        yield (
            f"Measurements with a tracked direction without a stationary law, hence without sums: "
            f"{'; '.join(lacking)}. Curves leave out epochs that some seed lacks."
        )


def _steps(changes: pd.DataFrame, method: str, quantity: str) -> str:
    rows = changes[(changes["method"] == method) & (changes["quantity"] == quantity)]
    said = []
    for _, row in rows.iterrows():
        if (row["from"], row["to"]) in ((BEFORE, AFTER), (AFTER, LATE), (BEFORE, LATE)):
            said.append(f"{row['from']} → {row['to']} {told(row)}")
    return "; ".join(said) if said else "no value"


def _rate_part(points: pd.DataFrame, changes: pd.DataFrame, methods: Sequence[str], k: int) -> str:
    """What of the change of −Σ ln σ² is the learning rate's own, since the stationary σ² goes with it."""
    rates = points[points["quantity"] == LEARNING_RATE].set_index(["method", "seed", "moment"])["value"]
    before, late = rates.xs(BEFORE, level="moment"), rates.xs(LATE, level="moment")
    own = k * np.log(before / late).mean()
    said = [f"{method} {_steps(changes, method, WITHOUT_RATE)}" for method in methods]
    return (
        f"Of the change of −Σ ln σ² before → late, k ln(η before / η late) = {format_number(float(own))} "
        f"nats are the rate's own, whatever the network does. Without it, −Σ ln(σ²/η): {'. '.join(said)}."
    )


def _other(against: pd.DataFrame, other: str, reference: str, k: int) -> str:
    lines = [
        ("leading λ", "hessian_eigenvalue_top"),
        ("leading noise eigenvalue", "noise_eigenvalue_top"),
        ("stationary σ²", "stationary_variance_mean"),
        ("Σ λσ²", "curvature_term_stationary"),
        ("−Σ ln σ² (nats)", "log_variance_term_stationary"),
        ("their sum", "dominant_terms_stationary"),
        ("test robust loss", "test_robust_loss"),
        ("robust loss gap", "robust_loss_gap"),
    ]
    said = []
    for moment in (BEFORE, LATE):
        rows = {str(row["quantity"]): row for _, row in against[against["moment"] == moment].iterrows()}
        numbers = [f"{text} {_compared(rows[name])}" for text, name in lines if name in rows]
        said.append(f"{moment}: {', '.join(numbers)}")
    return (
        f"{other} against {reference}, seed by seed ({k} tracked directions, stationary) – {'; '.join(said)}."
    )


def _compared(row: pd.Series) -> str:
    words = {"rises": "higher", "falls": "lower", "no clear change": "no clear difference"}
    text = told(row)
    for change, comparison in words.items():
        text = text.replace(f", {change}", f" {comparison}")
    return text


def _alignment(
    above: pd.DataFrame, at_moments: pd.DataFrame, methods: Sequence[str], k: int
) -> Iterator[str]:
    rows = {(row["method"], row["moment"], row["quantity"]): row for _, row in at_moments.iterrows()}

    def at(method: str, moment: str, quantity: str) -> str:
        place = (method, moment, quantity)
        return number(rows[place]) if place in rows else "no value"

    for name, text in (
        ("commutator", "relative commutator"),
        ("total_correlation", "total correlation (nats)"),
    ):
        said = []
        for method in methods:
            counted = above[(above["quantity"] == name) & (above["method"] == method)]
            beyond = "".join(
                f"; over null + {ABOVE_NULL:g} sd in {row['above']} of {row['measurements']} measurements"
                for _, row in counted.iterrows()
            )
            values = ", ".join(
                f"{moment} {at(method, moment, name)} (null {at(method, moment, f'{name}_null')})"
                for moment in (BEFORE, LATE)
            )
            said.append(f"{method} {values}{beyond}")
        yield f"Alignment, {text}, {k} tracked directions: {'. '.join(said)}."
    said = []
    for method in methods:
        overlaps = ", ".join(f"{m} {at(method, m, 'subspace_overlap')}" for m in (BEFORE, LATE, END))
        said.append(f"{method} {overlaps}; captured noise {at(method, LATE, 'captured_noise')} (late)")
    yield f"Overlap of the leading subspaces of H and C, {k} tracked directions: {'. '.join(said)}."


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _pictures(curves: pd.DataFrame, k: int) -> Iterator[Picture]:
    ranked = ("hessian_eigenvalue", "gradient_noise", "noise_eigenvalue")
    variances = ("stationary_variance", "resolved_variance")
    terms = ("curvature_term", "log_variance_term", "dominant_terms")
    contents = {
        "curvature_and_noise": ([f"{n}_{e}" for n in ranked for e in ("top", "mean")], _curvature_and_noise),
        "posterior_variance": ([f"{n}_{e}" for n in variances for e in ("top", "mean")], _posterior_variance),
        "bound_terms": (
            [*(f"{n}_{e}" for n in terms for e in ("stationary", "resolved")), WITHOUT_RATE, *LOSSES],
            _bound_terms,
        ),
        "alignment": (
            [
                "commutator",
                "commutator_null",
                "subspace_overlap",
                "captured_noise",
                "total_correlation",
                "total_correlation_null",
            ],
            _alignment_figure,
        ),
    }
    for name, (quantities, draw) in contents.items():
        data = curves[curves["quantity"].isin([*quantities, LEARNING_RATE])].sort_values(
            ["quantity", "method", "epoch"]
        )
        yield Picture(name, data.reset_index(drop=True), partial(draw, k=k))


@style.styled
def _curvature_and_noise(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Curvature and gradient noise, {k} tracked directions", 4.2)
    panels = [
        Panel("Hessian eigenvalues", "λ", "hessian_eigenvalue_top", "hessian_eigenvalue_mean", OTHER),
        Panel("Noise along H's directions", "γ = uᵀCu", "gradient_noise_top", "gradient_noise_mean", OTHER),
        Panel(
            "Eigenvalues of the noise C",
            "eigenvalue of C",
            "noise_eigenvalue_top",
            "noise_eigenvalue_mean",
            OTHER,
        ),
    ]
    return _draw(figure, figure.subplots(1, 3), panels, data, _ranks(k), logarithmic=(0, 1, 2))


@style.styled
def _posterior_variance(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Posterior variance of the weights, {k} tracked directions", 4.4)
    panels = [
        Panel(
            "Stationary at the present rate",
            "σ²",
            "stationary_variance_top",
            "stationary_variance_mean",
            OTHER,
        ),
        Panel(
            "Time-resolved, through the run's rates",
            "",
            "resolved_variance_top",
            "resolved_variance_mean",
            OTHER,
        ),
    ]
    axes = figure.subplots(1, 2, sharey=True)
    return _draw(figure, axes, panels, data, _ranks(k), logarithmic=(0,), marker="")


@style.styled
def _bound_terms(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Dominant PAC-Bayes terms, {k} tracked directions, and robust loss", 6.8)
    named = (
        ("curvature_term", "Curvature term", f"Σ λσ², top {k}"),
        ("log_variance_term", "Complexity term", f"−Σ ln σ², top {k} (nats)"),
        ("dominant_terms", "Their sum", f"Σ λσ² − Σ ln σ², top {k}"),
    )
    panels = [Panel(title, unit, f"{n}_stationary", f"{n}_resolved", OTHER) for n, title, unit in named]
    panels += [
        Panel("Complexity without the rate's part", f"−Σ ln(σ²/η), top {k} (nats)", WITHOUT_RATE),
        Panel("Robust loss, test", "nats", "test_robust_loss"),
        Panel("Robust loss gap, test − train", "nats", "robust_loss_gap"),
    ]
    keys = [key("stationary σ²"), key("time-resolved σ²", OTHER)]
    return _draw(figure, figure.subplots(2, 3).ravel(), panels, data, keys, logarithmic=(0,))


@style.styled
def _alignment_figure(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Alignment of Hessian H and gradient noise C, {k} tracked directions", 4.2)
    floor, share = (0.0, None), (0.0, 1.0)
    nats = "total correlation (nats)"
    panels = [
        Panel("Commutator", "‖HC − CH‖ / (2‖H‖‖C‖)", "commutator", "commutator_null", NULL, floor),
        Panel(
            "Leading subspaces", "overlap, captured noise", "subspace_overlap", "captured_noise", OTHER, share
        ),
        Panel("Total correlation", nats, "total_correlation", "total_correlation_null", NULL, floor),
    ]
    keys = [
        key("measured; overlap of subspaces"),
        key("sampling noise alone, if H and C commuted", NULL),
        key("captured noise", OTHER),
    ]
    return _draw(figure, figure.subplots(1, 3), panels, data, keys)


def _ranks(k: int) -> list[Line2D]:
    return [key("leading direction"), key(f"geometric mean of {k} tracked directions", OTHER)]


def _draw(
    figure: Figure,
    axes: Iterable[Axes],
    panels: Sequence[Panel],
    data: pd.DataFrame,
    keys: Sequence[Line2D],
    *,
    logarithmic: Sequence[int] = (),
    marker: str = "o",
) -> Figure:
    """Panels over epochs, a colour for each method named at its line's end, decays marked."""
    axes = list(axes)
    methods = list(dict.fromkeys(data["method"]))
    colours = dict(zip(methods, style.colours(len(methods)), strict=True))
    ends = [_lines(ax, data, panel, colours, marker) for ax, panel in zip(axes, panels, strict=True)]
    for i, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        if i in logarithmic:
            log_axis(ax)
        if panel.limits != (None, None):
            ax.set_ylim(*panel.limits)
        finish(ax, panel.title, panel.unit)
    rates = data[data["quantity"] == LEARNING_RATE]
    epochs = rates.assign(run=rates["method"], group=rates["method"], lr=rates["mean"])
    mark_decays(axes, epochs, Cast.of(epochs))
    for ax, named in zip(axes, ends, strict=True):
        label_ends(ax, named)
    seeds = rates.groupby("method", sort=False)["seeds"].max()
    said = {f"mean of {n} seeds, band: 95 % interval" if n > 1 else "one seed" for n in seeds}
    about = [key(text, "", colour=style.MARK) for text in sorted(said)]
    figure.legend(handles=[*keys, *about], loc="outside lower center", ncols=2 if len(keys) > 2 else 3)
    return figure


def _lines(ax: Axes, data: pd.DataFrame, panel: Panel, colours: Mapping[str, str], marker: str) -> list[End]:
    """The panel's two quantities of each method, mean and interval; where the first one's lines end."""
    ends = []
    for method, colour in colours.items():
        for quantity, line in ((panel.quantity, "-"), (panel.second, panel.line)):
            curve = data[(data["method"] == method) & (data["quantity"] == quantity)].sort_values("epoch")
            if curve.empty:
                continue
            first = quantity == panel.quantity
            draw_with_interval(ax, curve, "epoch", colour=colour, line=line, marker=marker if first else "")
            if first:
                ends.append(
                    End(float(curve["epoch"].iloc[-1]), float(curve["mean"].iloc[-1]), method, colour)
                )
    return ends


STUDY = Study(
    question=(
        "How do curvature, gradient noise, posterior and the bound's dominant terms move around the "
        "learning-rate decay and while the network overfits, under AT and under AWP, and do Hessian and "
        "noise share directions?"
    ),
    source="Xu and Zhang, arXiv 2410.07719: eigenvalues, posterior variances, bound terms, alignment",
    answer=answer,
)
