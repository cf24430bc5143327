"""The strength γ of adversarial weight perturbation against the bound's terms and robustness.

Xu and Zhang, How Learning Dynamics Drive Adversarially Robust Generalization?, arXiv 2410.07719, ask whether
AWP could aim at the bound's dominant terms. All terms are over the tracked directions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import statsmodels.api as sm  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run
from robustdyn.records.schema import ROBUST_ERROR_GAP, ROBUST_LOSS_GAP, TEST_ROBUST_ERROR, TEST_ROBUST_LOSS
from robustdyn.report import style
from robustdyn.report.plotting import End, key, label_ends
from robustdyn.studies.shared.comparing import LEVEL, RATE, pearson, require_alike, require_repetitions
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.tracked import (
    BEFORE,
    END,
    LATE,
    QUANTITIES,
    WITHOUT_RATE,
    label,
    mean,
    moments,
    tracked_directions,
    tracked_quantities,
)
from robustdyn.studies.shared.wording import seeds_said, sentence

BEST = "best"  # each quantity at its own lowest epoch on the test set
UNIT = 0.01  # slopes are per this much of γ, the authors' value
MEAN = "mean"
TERMS = {
    "curvature_term_stationary": "Σ λσ²",
    "log_variance_term_stationary": "−Σ ln σ² (nats)",
    "dominant_terms_stationary": "Σ λσ² − Σ ln σ²",
}
ROBUSTNESS = {
    TEST_ROBUST_ERROR: "test robust error (%)",
    TEST_ROBUST_LOSS: "test robust loss (nats)",
    ROBUST_LOSS_GAP: "robust loss gap (nats)",
}


def answer(runs: Sequence[Run]) -> Answer:
    """Each quantity against γ, its trend, and whether the terms order the strengths as robustness does.

    Raises:
        RecordError: The runs differ in more than γ and seed, have fewer than three strengths, or lack what is
        compared.
    """
    require_alike(runs, ["perturbation"])
    require_repetitions(runs, lambda run: f"γ = {gamma_of(run):g}")
    k = tracked_directions(runs)
    points = pd.concat([_points(run) for run in runs], ignore_index=True)
    strengths = sorted(points["gamma"].unique())
    if len(strengths) < 3:
        raise RecordError(f"{len(strengths)} strengths γ of AWP, needs three; train experiment=awp_strength")
    levels = mean(points, ["gamma", "moment"]).sort_values(["quantity", "moment", "gamma"], ignore_index=True)
    trends, agreement = _trends(points), _agreement(points)
    tables = {
        name: rows.assign(label=rows["quantity"].map(partial(label, k=k)))
        for name, rows in {"strengths": levels, "trends": trends}.items()
    }
    tables |= {"agreement": agreement, "runs": points}
    return Answer(tables, list(_pictures(points, levels, k)), findings_of(tables))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which strength has the lowest mean of each quantity, late and at the end."""
    return [_choices(tables["strengths"], moment) for moment in (LATE, END)]


def gamma_of(run: Run) -> float:
    """γ of a run's AWP, 0 without any.

    Raises:
        RecordError: Its weights are perturbed by something else.
    """
    perturbation = run.config.get("perturbation") or {}
    if not perturbation:
        return 0.0
    if not str(perturbation.get("_target_")).endswith(".AWP"):
        raise RecordError(f"{run.path}: perturbation is not AWP; leave this run out")
    return float(perturbation["gamma"])


def _points(run: Run) -> pd.DataFrame:
    """Quantities of a run at the moments about the decay, and the lowest error and loss on the test set."""
    values = tracked_quantities(run)
    rows = moments(values, run.path)
    best = []
    for name in (TEST_ROBUST_ERROR, TEST_ROBUST_LOSS):
        own = values[values["quantity"] == name]
        best.append(own.loc[[own["value"].idxmin()]].assign(moment=BEST))
    rows = pd.concat([rows[rows["quantity"] != RATE], *best], ignore_index=True)
    return rows.assign(gamma=gamma_of(run), seed=run.config.get("seed"))[
        ["gamma", "seed", "moment", "epoch", "quantity", "value"]
    ]


def _trends(points: pd.DataFrame) -> pd.DataFrame:
    """Over runs: Spearman's rank correlation with γ, and the least-squares slope per 0.01 of γ.

    The slope is of the logarithm, given as a factor, where a quantity changes by factors. Runs count as
    independent.
    """
    found = []
    for (moment, quantity), rows in points.dropna(subset=["value"]).groupby(
        ["moment", "quantity"], sort=False
    ):
        factor = QUANTITIES[str(quantity)].change == "factor"
        if factor:
            rows = rows[rows["value"] > 0]
        if rows["gamma"].nunique() < 3 or rows["value"].nunique() < 2:
            continue
        rank = stats.spearmanr(rows["gamma"], rows["value"])
        y = np.log(rows["value"]) if factor else rows["value"]
        fit = sm.OLS(y.to_numpy(), sm.add_constant(rows["gamma"].to_numpy() / UNIT)).fit()
        slope = np.array([fit.params[1], *fit.conf_int(1 - LEVEL)[1]])
        low_mid = np.exp(slope) if factor else slope
        found.append(
            {
                "quantity": quantity,
                "moment": moment,
                "runs": len(rows),
                "spearman": rank.statistic,
                "p": rank.pvalue,
                "change": QUANTITIES[str(quantity)].change,
                "slope": low_mid[0],
                "low": low_mid[1],
                "high": low_mid[2],
            }
        )
    return pd.DataFrame(found)


def _agreement(points: pd.DataFrame) -> pd.DataFrame:
    """Over runs: how terms and curvature go with robustness at the same moment."""
    terms = [
        *TERMS,
        WITHOUT_RATE,
        "dominant_terms_resolved",
        "hessian_eigenvalue_top",
        "noise_eigenvalue_top",
    ]
    found = []
    for moment in (LATE, END):
        wide = points[points["moment"] == moment].pivot(
            index=["gamma", "seed"], columns="quantity", values="value"
        )
        for term in terms:
            for metric in (*ROBUSTNESS, ROBUST_ERROR_GAP):
                pairs = wide[[term, metric]].dropna()
                if len(pairs) < 3 or (pairs.nunique() < 2).any():
                    continue
                x, y = pairs[term], pairs[metric]
                of, rank = pearson(x, y), stats.spearmanr(x, y)
                if len(pairs) == 3:  # too few for an interval
                    of |= {"low": np.nan, "high": np.nan}
                head = {"moment": moment, "term": term, "robustness": metric, "runs": len(pairs)}
                found.append(head | of | {"spearman": rank.statistic, "spearman_p": rank.pvalue})
    return pd.DataFrame(found).rename(columns={"r": "pearson"})


def _choices(levels: pd.DataFrame, moment: str) -> str:
    chosen: dict[float, list[str]] = {}
    for quantity, text in (TERMS | {WITHOUT_RATE: "−Σ ln(σ²/η) (nats)"} | ROBUSTNESS).items():
        rows = levels[(levels["quantity"] == quantity) & (levels["moment"] == moment)]
        if not rows.empty:
            chosen.setdefault(rows.nsmallest(1, "mean")["gamma"].iloc[0], []).append(text)
    said = "; ".join(f"at γ = {gamma:g} for {', '.join(chosen[gamma])}" for gamma in sorted(chosen))
    return sentence(f"{'at the end' if moment == END else moment}, the mean is lowest {said}")


def _pictures(points: pd.DataFrame, levels: pd.DataFrame, k: int) -> Iterator[Picture]:
    single = points.assign(seed=points["seed"].astype(str)).drop(columns="epoch")
    averaged = levels.assign(seed=MEAN, value=levels["mean"])
    drawn = pd.concat([single, averaged], ignore_index=True)[["gamma", "seed", "moment", "quantity", "value"]]
    shown = drawn["quantity"].isin(TERMS) & drawn["moment"].isin([BEFORE, LATE, END])
    yield Picture("terms", drawn[shown].reset_index(drop=True), partial(_terms, k=k))
    shown = drawn["quantity"].isin(ROBUSTNESS) & drawn["moment"].isin([BEST, END])
    yield Picture("robustness", drawn[shown].reset_index(drop=True), _robustness)
    late = points[points["moment"] == LATE].pivot(index=["gamma", "seed"], columns="quantity", values="value")
    pairs = late[["curvature_term_stationary", "dominant_terms_stationary", *ROBUSTNESS]].reset_index()
    yield Picture("terms_and_robustness", pairs, partial(_together, k=k))


@style.styled
def _terms(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(f"Bound terms against the strength of AWP, {k} tracked directions", 7.2)
    rows = figure.subplots(3, 3, sharex=True)
    where = {BEFORE: "before the decay", LATE: "end of the second rate", END: "end of the run"}
    for axes, (moment, words) in zip(rows, where.items(), strict=True):
        for ax, (quantity, unit) in zip(axes, TERMS.items(), strict=True):
            own = data[(data["moment"] == moment) & (data["quantity"] == quantity)]
            _against_gamma(ax, own, style.PALETTE[0])
            ax.set_title(words)
            ax.set_ylabel(f"{unit}, top {k}" if moment == LATE else f"{unit.partition(' (')[0]}")
    for ax in rows[-1]:
        ax.set_xlabel("γ of AWP")
    _legend(figure, data, style.PALETTE[0])
    return figure


@style.styled
def _robustness(data: pd.DataFrame) -> Figure:
    figure = style.new_figure("Robustness against the strength of AWP", 3.8)
    axes = figure.subplots(1, 3)
    for ax, (quantity, unit) in zip(axes, ROBUSTNESS.items(), strict=True):
        ends = []
        for moment, colour in ((BEST, style.PALETTE[2]), (END, style.PALETTE[1])):
            own = data[(data["moment"] == moment) & (data["quantity"] == quantity)]
            if not own.empty:
                scaled = own.assign(value=own["value"] * QUANTITIES[quantity].scale)
                _against_gamma(ax, scaled, colour)
                last = scaled[scaled["seed"] == MEAN].sort_values("gamma").iloc[-1]
                ends.append(End(float(last["gamma"]), float(last["value"]), moment, colour))
        label_ends(ax, ends)
        ax.set_ylabel(unit)
        ax.set_xlabel("γ of AWP")
    _legend(figure, data, style.MARK)
    return figure


@style.styled
def _together(data: pd.DataFrame, k: int) -> Figure:
    figure = style.new_figure(
        f"Do the terms tell how robust? End of the second rate, {k} tracked directions", 6.0
    )
    rows = figure.subplots(2, 3, sharey="col")
    strengths = sorted(data["gamma"].unique())
    colours = dict(zip(strengths, style.shades(len(strengths)), strict=True))
    terms = {name: TERMS[name] for name in ("curvature_term_stationary", "dominant_terms_stationary")}
    for axes, (term, said) in zip(rows, terms.items(), strict=True):
        for ax, (metric, unit) in zip(axes, ROBUSTNESS.items(), strict=True):
            for gamma, own in data.groupby("gamma"):
                y = own[metric] * QUANTITIES[metric].scale
                ax.plot(own[term], y, "o", markersize=6, color=colours[float(str(gamma))])
            ax.set_xlabel(f"{said}, top {k}")
            ax.set_ylabel(unit)
    handles = [key(f"γ = {gamma:g}", "", "o", colour) for gamma, colour in colours.items()]
    handles.append(key("a point: one run", ""))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _against_gamma(ax: Axes, own: pd.DataFrame, colour: str) -> None:
    """Single seeds as open circles, their means joined."""
    curve = own[own["seed"] == MEAN].sort_values("gamma")
    single = own[own["seed"] != MEAN]
    ax.plot(single["gamma"], single["value"], "o", color=colour, fillstyle="none", markersize=5, alpha=0.8)
    ax.plot(curve["gamma"], curve["value"], color=colour, marker="_", markersize=9)
    strengths = sorted(own["gamma"].unique())
    ax.set_xticks(strengths, [f"{gamma:g}" for gamma in strengths])
    ax.tick_params(axis="x", labelrotation=45)


def _legend(figure: Figure, data: pd.DataFrame, colour: str) -> None:
    n = data.loc[data["seed"] != MEAN].groupby("gamma")["seed"].nunique()
    handles = [
        key(f"mean of {seeds_said(n.rename('seeds').to_frame())}", marker="_", colour=colour),
        key("single seeds", "", "o", colour, fillstyle="none"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


STUDY = Study(
    "How does the strength γ of AWP move the bound's dominant terms, and do these tell which strength is the "
    "most robust?",
    answer,
)
