"""Learning dynamics of AT against AWP: curvature, gradient noise, posterior, bound terms, alignment.

Xu and Zhang, How Learning Dynamics Drive Adversarially Robust Generalization?, arXiv 2410.07719. All sums and
means are over the tracked directions only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run
from robustdyn.records.schema import (
    CAPTURED_NOISE,
    COMMUTATOR_NULL,
    CURVATURE_TERM,
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    LOG_VARIANCE_TERM,
    NOISE_EIGENVALUE,
    POSTERIOR_VARIANCE,
    ROBUST_LOSS_GAP,
    SUBSPACE_OVERLAP,
    TEST_ROBUST_LOSS,
    TOTAL_CORRELATION,
    TOTAL_CORRELATION_NULL,
)
from robustdyn.report import style
from robustdyn.report.plotting import Cast, finish, key, label_ends, mark_decays
from robustdyn.studies.shared.comparing import RATE, require_alike, require_repetitions
from robustdyn.studies.shared.comparison_figures import Panel, draw_panel
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.tracked import (
    BEFORE,
    LATE,
    MOMENTS,
    QUANTITIES,
    STEPS,
    WITHOUT_RATE,
    changes_between,
    label,
    mean,
    moments,
    tracked_directions,
    tracked_quantities,
)
from robustdyn.studies.shared.wording import told_apart

MAY_DIFFER = ("objective", "perturbation", "schedule", "averaging", "attack.train", "measure.inputs")
ABOVE_NULL = 2.0  # spreads of the null: beyond, sampling noise alone is an unlikely reason

LOSSES = (TEST_ROBUST_LOSS, ROBUST_LOSS_GAP)

OTHER, NULL = "--", ":"
TOLD = {
    "hessian_eigenvalue_top": "leading λ",
    "noise_eigenvalue_top": "leading noise eigenvalue",
    "resolved_variance_mean": "σ²",
    "curvature_term_resolved": "Σ Jσ²",
    "log_variance_term_resolved": "−Σ ln σ²",
    "dominant_terms_resolved": "their sum",
    TEST_ROBUST_LOSS: "test robust loss",
    ROBUST_LOSS_GAP: "robust loss gap",
}
"""What findings are about, in short; the variances are those of training's law."""
TOLD_OF_PAPERS = {
    "stationary_variance_mean": "stationary σ²",
    "curvature_term_stationary": "Σ λσ²",
    "log_variance_term_stationary": "−Σ ln σ²",
    "dominant_terms_stationary": "their sum",
}
"""The same by the papers' law."""


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
        values = tracked_quantities(run)
        names = {"method": method_of(run), SEED: run.config.get(SEED)}
        every.append(values.assign(**names))
        at.append(moments(values, run.path).assign(**names))
    values, points = pd.concat(every, ignore_index=True), pd.concat(at, ignore_index=True)
    methods = list(dict.fromkeys(values["method"]))
    reference = "AT" if "AT" in methods else methods[0]
    curves = _curves(values)
    at_moments = _ordered(mean(points[points["quantity"] != RATE], ["method", "moment"]))
    changes = _changes(points)
    against = _against(points, methods, reference)
    tables = {"moments": at_moments, "changes": changes, "alignment": _above_null(values), "runs": points}
    if not against.empty:
        tables[f"against_{reference.lower()}"] = against
    for name in tables.keys() - {"alignment", "runs"}:
        tables[name] = tables[name].assign(label=tables[name]["quantity"].map(partial(label, k=k)))
    if (lacking := _lacking(values))["lacking"].any():
        tables["no_stationary_law"] = lacking
    return Answer(tables, list(_pictures(curves, k)), findings_of(tables))


def method_of(run: Run) -> str:
    """``AT``, ``AWP``, ``WCI-LR``: the run's method as papers write it."""
    name = run.choices.get("method")
    if name is None:
        perturbation = str((run.config.get("perturbation") or {}).get("_target_", "at"))
        name = perturbation.rpartition(".")[2]
    return name.upper().replace("_", "-")


def _curves(values: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds by epoch, without epochs that some seed lacks, where the curve would jump."""
    found = mean(values, ["method", "epoch"])
    seeds = values.groupby("method")["seed"].nunique()
    return found[found["seeds"] == found["method"].map(seeds)].reset_index(drop=True)


def _changes(points: pd.DataFrame) -> pd.DataFrame:
    """Changes between moments, counted in each run, over the seeds."""
    found = []
    for start, end in STEPS:
        pairs = changes_between(
            points[points["moment"] == start], points[points["moment"] == end], ["method", SEED]
        )
        found.append(mean(pairs, ["method"], changes=True).assign(**{"from": start, "to": end}))
    rows = _ordered(pd.concat(found, ignore_index=True))
    return rows[["method", "quantity", "from", "to", "change", "mean", "low", "high", "seeds"]]


def _against(points: pd.DataFrame, methods: Sequence[str], reference: str) -> pd.DataFrame:
    """Other methods against the reference, seed by seed, at each moment."""
    found = []
    for method in methods:
        if method != reference:
            ours, theirs = (points[points["method"] == name] for name in (reference, method))
            pairs = changes_between(ours, theirs, ["moment", SEED])
            found.append(mean(pairs, ["moment"], changes=True).assign(method=method, against=reference))
    if not found:
        return pd.DataFrame()
    rows = _ordered(pd.concat(found, ignore_index=True))
    return rows[["method", "against", "moment", "quantity", "change", "mean", "low", "high", "seeds"]]


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


def _above_null(values: pd.DataFrame) -> pd.DataFrame:
    """How many of all measurements lie beyond what sampling noise alone would give."""
    found = []
    for name in ("commutator", TOTAL_CORRELATION):
        rows = values[values["quantity"] == f"{name}_excess"].dropna(subset=["value"])
        counts = rows.groupby("method", sort=False)["value"].agg(
            measurements="count", above=lambda excess: int((excess > ABOVE_NULL).sum()), mean_excess="mean"
        )
        found.append(counts.reset_index().assign(quantity=name, spreads=ABOVE_NULL))
    return pd.concat(found, ignore_index=True)[
        ["quantity", "method", "measurements", "above", "spreads", "mean_excess"]
    ]


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What moves across the decay by method, and how methods differ from the reference late, by both laws."""

    def said(rows: pd.DataFrame, *words: tuple[str, str, str]) -> str:
        return f"{of(rows, TOLD, *words)}. By the papers' law: {of(rows, TOLD_OF_PAPERS, *words)}."

    def of(rows: pd.DataFrame, told: Mapping[str, str], *words: tuple[str, str, str]) -> str:
        parts = []
        for method, own in rows[rows["quantity"].isin(told)].groupby("method", sort=False):
            # a factor's interval is about 1
            unchanged = own["change"].map({"factor": 1.0, "difference": 0.0})
            bounds = own[["low", "high"]].sub(unchanged, axis=0)
            parts.append(f"{method} {told_apart(bounds, list(own['quantity'].map(told)), *words)}")
        return "; ".join(parts)

    changes = tables["changes"]
    across = changes[(changes["from"] == BEFORE) & (changes["to"] == LATE)]
    sentences = [
        f"From {BEFORE} the first decay to {LATE}: {said(across, ('rises', 'falls', 'no clear change'))}"
    ]
    for against in (table for name, table in tables.items() if name.startswith("against_")):
        late, reference = against[against["moment"] == LATE], against["against"].iloc[0]
        sentences.append(f"{LATE.capitalize()}, compared with {reference} seed by seed: {said(late)}")
    return sentences


def _lacking(values: pd.DataFrame) -> pd.DataFrame:
    """At how many measurements of a method some direction has no law, and sums are missing, by law."""
    found = []
    for law, kind in (("papers", "stationary"), ("training", "resolved")):
        sums = values[values["quantity"] == f"dominant_terms_{kind}"]
        of_method = sums["value"].isna().groupby(sums["method"], sort=False)
        found.append(of_method.agg(lacking="sum", measurements="size").reset_index().assign(law=law))
    return pd.concat(found, ignore_index=True)


def _pictures(curves: pd.DataFrame, k: int) -> Iterator[Picture]:
    ranked = (HESSIAN_EIGENVALUE, GRADIENT_NOISE, NOISE_EIGENVALUE)
    variances = ("stationary_variance", "independent_variance", "resolved_variance")
    terms = (CURVATURE_TERM, LOG_VARIANCE_TERM, "dominant_terms")
    kinds = [f"{n}_{e}" for n in terms for e in ("stationary", "resolved")]
    nulls = [f"{n}{e}" for n in ("commutator", TOTAL_CORRELATION) for e in ("", "_null")]
    contents = {
        "curvature_and_noise": ([f"{n}_{e}" for n in ranked for e in ("top", "mean")], _curvature_and_noise),
        POSTERIOR_VARIANCE: ([f"{n}_{e}" for n in variances for e in ("top", "mean")], _posterior_variance),
        "bound_terms": ([*kinds, WITHOUT_RATE, *LOSSES], _bound_terms),
        "alignment": ([*nulls, SUBSPACE_OVERLAP, CAPTURED_NOISE], _alignment_figure),
    }
    for name, (quantities, draw) in contents.items():
        data = curves[curves["quantity"].isin([*quantities, RATE])].sort_values(
            ["quantity", "method", "epoch"]
        )
        yield Picture(name, data.reset_index(drop=True), partial(draw, k=k))


@style.styled
def _curvature_and_noise(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Curvature and gradient noise, {k} tracked directions", 4.2)
    panels = [
        _ranked("Hessian eigenvalues", "λ", HESSIAN_EIGENVALUE),
        _ranked("Noise along H's directions", "γ = uᵀCu", GRADIENT_NOISE),
        _ranked("Eigenvalues of the noise C", "eigenvalue of C", NOISE_EIGENVALUE),
    ]
    return _draw(figure, figure.subplots(1, 3), panels, data, _ranks(k))


@style.styled
def _posterior_variance(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Posterior variance of the weights, {k} tracked directions", 4.4)
    panels = [
        _ranked("Stationary, papers' law", "σ²", "stationary_variance"),
        _ranked("Time-resolved, papers' law", "", "independent_variance"),
        _ranked("Time-resolved, training's law", "", "resolved_variance"),
    ]
    axes = figure.subplots(1, 3, sharey=True)
    return _draw(figure, axes, panels, data, _ranks(k), marker="")


@style.styled
def _bound_terms(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Dominant PAC-Bayes terms, {k} tracked directions, and robust loss", 6.8)
    named = (
        (CURVATURE_TERM, "Curvature term", f"Σ λσ², top {k}"),
        (LOG_VARIANCE_TERM, "Complexity term", f"−Σ ln σ², top {k} (nats)"),
        ("dominant_terms", "Their sum", f"Σ λσ² − Σ ln σ², top {k}"),
    )
    panels = [
        Panel(title, f"{n}_stationary", unit, f"{n}_resolved", log=n == CURVATURE_TERM)
        for n, title, unit in named
    ]
    panels += [
        Panel("Complexity without the rate's part", WITHOUT_RATE, f"−Σ ln(σ²/η), top {k} (nats)"),
        Panel("Robust loss, test", TEST_ROBUST_LOSS, "nats"),
        Panel("Robust loss gap, test − train", ROBUST_LOSS_GAP, "nats"),
    ]
    keys = [key("papers' law: stationary σ², λ"), key("training's law: time-resolved σ², J", OTHER)]
    return _draw(figure, figure.subplots(2, 3).ravel(), panels, data, keys)


@style.styled
def _alignment_figure(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Alignment of Hessian H and gradient noise C, {k} tracked directions", 4.2)
    floor, share = (0.0, None), (0.0, 1.0)
    nats = "total correlation (nats)"
    panels = [
        Panel("Commutator", "commutator", "‖HC − CH‖ / (2‖H‖‖C‖)", COMMUTATOR_NULL, NULL, limits=floor),
        Panel("Leading subspaces", SUBSPACE_OVERLAP, "overlap, captured noise", CAPTURED_NOISE, limits=share),
        Panel("Total correlation", TOTAL_CORRELATION, nats, TOTAL_CORRELATION_NULL, NULL, limits=floor),
    ]
    keys = [
        key("measured; overlap of subspaces"),
        key("sampling noise alone, if H and C commuted", NULL),
        key("captured noise", OTHER),
    ]
    return _draw(figure, figure.subplots(1, 3), panels, data, keys)


def _ranked(title: str, unit: str, quantity: str) -> Panel:
    return Panel(title, f"{quantity}_top", unit, f"{quantity}_mean", log=True)


def _ranks(k: int) -> list[Line2D]:
    return [key("leading direction"), key(f"geometric mean of {k} tracked directions", OTHER)]


def _draw(
    figure: Figure,
    axes: Iterable[Axes],
    panels: Sequence[Panel],
    data: pd.DataFrame,
    keys: Sequence[Line2D],
    *,
    marker: str = "o",
) -> Figure:
    """Panels over epochs, a colour for each method named at its line's end, decays marked."""
    axes = list(axes)
    methods = list(dict.fromkeys(data["method"]))
    colours = dict(zip(methods, style.colours(len(methods)), strict=True))
    curves = data.rename(columns={"method": "setting"})
    ends = [
        draw_panel(ax, curves, panel, colours, markers={panel.quantity: marker})
        for ax, panel in zip(axes, panels, strict=True)
    ]
    for ax, panel in zip(axes, panels, strict=True):
        finish(ax, panel.title, panel.unit)
    rates = data[data["quantity"] == RATE]
    epochs = rates.assign(run=rates["method"], group=rates["method"], lr=rates["mean"])
    mark_decays(axes, epochs, Cast.of(epochs))
    for ax, named in zip(axes, ends, strict=True):
        label_ends(ax, named)
    seeds = rates.groupby("method", sort=False)["seeds"].max()
    said = {f"mean of {n} seeds, band: 95 % interval" if n > 1 else "one seed" for n in seeds}
    about = [key(text, "", colour=style.MARK) for text in sorted(said)]
    figure.legend(handles=[*keys, *about], loc="outside lower center", ncols=2 if len(keys) > 2 else 3)
    return figure


STUDY = Study(
    "How do curvature, gradient noise, posterior and the bound's dominant terms move around the "
    "learning-rate decay and while the network overfits, under AT and under AWP, and do Hessian and noise "
    "share directions?",
    answer,
)
