"""When robust overfitting appears: radius, sample size, batch size and norm, each changed alone.

The gap of a run, its bound and its slope ratio are those of its own attack, with the radius of its training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from robustdyn.errors import RecordError
from robustdyn.records.columns import Column, Table
from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, read_table
from robustdyn.records.schema import (
    CATONI,
    EPOCHS,
    REFRESHED_SLOPE,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    SLOPE_RATIO,
    SLOPES,
    SPECTRUM,
    TEST_ROBUST_ERROR,
    TRAIN_ROBUST_LOSS,
)
from robustdyn.report import style
from robustdyn.report.plotting import key
from robustdyn.studies.shared.comparing import (
    BEST,
    BOUNDS,
    FINAL,
    against,
    data_set,
    mean_with_interval,
    require_alike,
    require_complete,
    require_repetitions,
)
from robustdyn.studies.shared.study import Answer, Picture, Study
from robustdyn.studies.shared.wording import seeds_said, sentence, told_apart

DEFAULT = "default"
RADIUS, IMAGES, BATCH, NORM = "radius", "training images", "batch size", "norm"
FACTORS = (RADIUS, IMAGES, BATCH, NORM)
VARIED = ("regime", "attack", "data.train_size", "data.batch_size")
NORMS = {"linf": "l∞", "l2": "l2"}

LOSS_GAP, ERROR_GAP = f"{FINAL} {ROBUST_LOSS_GAP}", f"{FINAL} {ROBUST_ERROR_GAP}"
TERMS = ("empirical_loss", "curvature", "kl_mean", "kl_trace", "kl_log_determinant", "kl", "total")
OUTCOMES: dict[str, Column] = {
    LOSS_GAP: EPOCHS[ROBUST_LOSS_GAP],
    ERROR_GAP: EPOCHS[ROBUST_ERROR_GAP],
    f"{FINAL} {TEST_ROBUST_ERROR}": EPOCHS[TEST_ROBUST_ERROR],
    f"{BEST} {TEST_ROBUST_ERROR}": EPOCHS[TEST_ROBUST_ERROR],
    f"{FINAL} {TRAIN_ROBUST_LOSS}": EPOCHS[TRAIN_ROBUST_LOSS],
    **{name: CATONI[name] for name in TERMS},
    SLOPE_RATIO: SLOPES[SLOPE_RATIO],
}
"""What a run comes to, by the column that it comes from."""


class Regime(NamedTuple):
    """What the study varies of a run: the attack's norm and radius in 1/255, images, and a batch's images."""

    norm: str
    radius: float
    images: int
    batch: int


def regime_of(run: Run) -> Regime:
    """The run's regime; standard training has the radius 0.

    Raises:
        RecordError: The number of training images is not set.
    """
    attack, data = run.config["attack"], run.config["data"]
    if data["train_size"] is None:
        raise RecordError(f"{run.path}: data.train_size is not set; train experiment=regimes")
    return Regime(
        str(attack["norm"]), float(attack["eps_255"]), int(data["train_size"]), int(data["batch_size"])
    )


def level_of(regime: Regime, default: Regime) -> tuple[str, str]:
    """The factor in which a regime differs from the default, and its level; both ``DEFAULT`` if in none.

    A change of norm changes the unit of the radius, and counts as one.

    Raises:
        ValueError: It differs in several.
    """
    if regime.norm != default.norm:
        regime = regime._replace(radius=default.radius)
    changed = [
        factor
        for factor, own, usual in zip((NORM, RADIUS, IMAGES, BATCH), regime, default, strict=True)
        if own != usual
    ]
    if len(changed) > 1:
        raise ValueError(f"differs from the most frequent regime in {' and '.join(changed)}")
    return (changed[0], levels_of(regime, default)[changed[0]]) if changed else (DEFAULT, DEFAULT)


def levels_of(regime: Regime, default: Regime) -> dict[str, str]:
    """The level of every factor, as it is shown; the radius in units of the default's."""
    return {
        RADIUS: f"×{regime.radius / default.radius:g}",
        IMAGES: str(regime.images),
        BATCH: str(regime.batch),
        NORM: NORMS.get(regime.norm, regime.norm),
    }


def answer(runs: Sequence[Run]) -> Answer:
    """What each run comes to, by level of the one factor that it changes, and less the default.

    Raises:
        RecordError: A run changes several factors, is not finished, or lacks a default to compare with.
    """
    require_complete(runs)
    by_panel: dict[str, list[Run]] = {}
    for run in runs:
        by_panel.setdefault(data_set(run), []).append(run)
    rows = pd.concat([_of_panel(panel, own) for panel, own in by_panel.items()], ignore_index=True)
    rows["setting"] = rows["factor"].where(rows["factor"] == DEFAULT, rows["factor"] + " " + rows["level"])
    by = ["panel", "factor", "level", "order", "outcome"]
    apart = _as_factors(against(_in_logs(rows), DEFAULT, ["panel", "outcome"])).merge(
        rows[["panel", "setting", "factor", "level", "order"]].drop_duplicates(), on=["panel", "setting"]
    )
    everywhere = _with_default_in_each_factor(rows)
    levels = _as_factors(mean_with_interval(_in_logs(everywhere), by))
    apart["change"] = apart["outcome"].map(lambda name: "factor" if name == SLOPE_RATIO else "difference")
    tables = {
        "levels": _ordered(levels).drop(columns="order"),
        "effects": _ordered(apart)[[*by, "change", *BOUNDS, "seeds"]].drop(columns="order"),
        "rank_correlations": correlations_with_gap(rows),
        "runs": rows[["panel", "factor", "level", SEED, "outcome", "value"]],
    }
    drawn = _ordered(
        pd.concat(
            [
                levels,
                everywhere[[*by, SEED, "value"]].rename(columns={"value": "mean"}),
            ],
            ignore_index=True,
        )
    )
    pictures = [
        Picture(
            outcome.replace(" ", "_"),
            drawn[drawn["outcome"] == outcome].reset_index(drop=True),
            partial(figure_of_levels, outcome=outcome),
        )
        for outcome in OUTCOMES
        if (drawn["outcome"] == outcome).any()
    ]
    return Answer(tables, pictures, findings_of(tables))


def correlations_with_gap(rows: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each outcome with the final robust loss gap over the regimes of a data set.

    Args:
        rows: The table ``runs``.

    Returns:
        ``panel``, ``outcome`` and, over seeds, ``mean``, ``low``, ``high`` of the correlation, and ``seeds``.
    """
    wide = rows.pivot(index=["panel", SEED, "factor", "level"], columns="outcome", values="value")
    found = (
        wide.groupby(["panel", SEED]).corr("spearman", min_periods=3)[LOSS_GAP].rename("value").reset_index()
    )
    table = mean_with_interval(found[found["outcome"] != LOSS_GAP], ["panel", "outcome"])
    return table.assign(low=table["low"].clip(lower=-1.0), high=table["high"].clip(upper=1.0))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which levels have a clearly higher or lower loss gap, and how bound and slope ratio rank with it."""
    effects, said, parts = tables["effects"], [], []
    for panel, own in effects[effects["outcome"] == LOSS_GAP].groupby("panel", sort=False):
        names = [f"{factor} {level}" for factor, level in zip(own["factor"], own["level"], strict=True)]
        parts.append(f"on {panel}, it is {told_apart(own, names)}")
    if parts:
        said.append(
            sentence(f"the final robust loss gap against the default, seed by seed: {'; '.join(parts)}")
        )
    ranks, parts = tables["rank_correlations"], []
    for outcome, name in (("total", "the bound over all weights"), (SLOPE_RATIO, "the slope ratio")):
        own = ranks[ranks["outcome"] == outcome]
        each = [
            f"{mean:.2f}{'' if pd.isna(low) else f' [{low:.2f}, {high:.2f}]'} on {panel}"
            for panel, mean, low, high in zip(own["panel"], *(own[bound] for bound in BOUNDS), strict=True)
        ]
        if each:
            parts.append(f"{' and '.join(each)} for {name}")
    if parts:
        said.append(f"Over the regimes, the rank correlation with this gap is {', and '.join(parts)}.")
    return said or ["There is nothing beside the default to compare."]


def _in_logs(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, slope ratios as their logarithms; one that is not positive has none."""
    ratio = rows["outcome"] == SLOPE_RATIO
    return rows.assign(
        value=rows["value"].where(~ratio, np.log(rows["value"].where(ratio & (rows["value"] > 0))))
    )


def _as_factors(table: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals of slope ratios back from logarithms: geometric means, or factors between these."""
    ratio = table["outcome"] == SLOPE_RATIO
    return table.assign(
        **{name: table[name].where(~ratio, np.exp(table[name].where(ratio))) for name in BOUNDS}
    )


def _of_panel(panel: str, runs: Sequence[Run]) -> pd.DataFrame:
    """What the runs of one data set come to: a row for each run and outcome."""
    require_alike(runs, VARIED, of=panel)
    regimes = [regime_of(run) for run in runs]
    attacked = [regime for regime in regimes if regime.radius > 0]  # the radius is the unit of the others
    if not attacked:
        raise RecordError(f"all runs on {panel} have radius 0; train experiment=regimes")
    default = Regime(*(Counter(values).most_common(1)[0][0] for values in zip(*attacked, strict=True)))
    if default not in regimes:
        raise RecordError(f"no run on {panel} has the most frequent level of every factor; train it as well")
    named, rows = {}, []
    for run, regime in zip(runs, regimes, strict=True):
        try:
            named[run.path] = level_of(regime, default)
        except ValueError as error:
            raise RecordError(f"{run.path}: {error}; leave it out") from error
    require_repetitions(runs, lambda run: f"{' '.join(dict.fromkeys(named[run.path]))} on {panel}")
    for run, regime in zip(runs, regimes, strict=True):
        factor, level = named[run.path]
        head = {"panel": panel, "factor": factor, "level": level, SEED: run.config[SEED]}
        head |= {"shown": levels_of(default, default), "orders": _orders(regime)}
        rows += [{**head, "outcome": name, "value": value} for name, value in outcomes_of(run).items()]
    return pd.DataFrame(rows).assign(order=lambda found: [
        0.0 if factor == DEFAULT else orders[factor]
        for factor, orders in zip(found["factor"], found["orders"], strict=True)
    ])  # fmt: skip


def _orders(regime: Regime) -> dict[str, float]:
    """By what the levels of each factor are sorted."""
    norm = list(NORMS).index(regime.norm) if regime.norm in NORMS else len(NORMS)
    return {
        RADIUS: regime.radius,
        IMAGES: float(regime.images),
        BATCH: float(regime.batch),
        NORM: float(norm),
    }


def outcomes_of(run: Run) -> dict[str, float]:
    """``OUTCOMES`` of a run, as far as recorded and known; terms and slope ratio after the last epoch.

    The slope ratio is Σ J_i / Σ λ_i over the tracked directions: along one of them λ_i may be close to 0.
    """
    epochs = read_table(run.path, EPOCHS.name).dropna(subset=[TEST_ROBUST_ERROR])
    found = {f"{FINAL} {name}": epochs[name].iloc[-1] for name in (ROBUST_LOSS_GAP, ROBUST_ERROR_GAP)}
    found |= {f"{FINAL} {name}": epochs[name].iloc[-1] for name in (TEST_ROBUST_ERROR, TRAIN_ROBUST_LOSS)}
    found[f"{BEST} {TEST_ROBUST_ERROR}"] = epochs[TEST_ROBUST_ERROR].min()
    terms, slopes, spectrum = (_last(run, table) for table in (CATONI, SLOPES, SPECTRUM))
    found |= {name: terms[name].iloc[0] for name in TERMS if len(terms)}
    if len(slopes):
        # of fewer directions it would be another quantity
        steep, curved = slopes[REFRESHED_SLOPE].sum(skipna=False), spectrum["curvature"].sum(skipna=False)
        found[SLOPE_RATIO] = steep / curved
    return {name: float(found[name]) for name in OUTCOMES if name in found and not pd.isna(found[name])}


def _last(run: Run, table: Table) -> pd.DataFrame:
    """The rows of the last measured epoch."""
    measured = read_table(run.path, table.name)
    last: pd.DataFrame = measured[measured["epoch"] == measured["epoch"].max()]
    return last


def _with_default_in_each_factor(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, those of the default once for each factor that is varied on their data set."""
    plain, parts = rows["factor"] == DEFAULT, [rows[rows["factor"] != DEFAULT]]
    for panel, varied in rows[~plain].groupby("panel", sort=False):
        for factor in varied["factor"].unique():
            own = rows[plain & (rows["panel"] == panel)]
            shown = [levels[factor] for levels in own["shown"]]
            order = [orders[factor] for orders in own["orders"]]
            parts.append(own.assign(factor=factor, level=shown, order=order))
    return pd.concat(parts, ignore_index=True)


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    """Data sets as they come, then by outcome, factor and level."""
    ranks = {
        "panel": {name: i for i, name in enumerate(dict.fromkeys(table["panel"]))},
        "outcome": {name: i for i, name in enumerate(OUTCOMES)},
        "factor": {name: i for i, name in enumerate(FACTORS)},
    }
    by = ["panel", "outcome", "factor", "order"]
    return table.sort_values(
        by,
        key=lambda column: column.map(ranks[column.name]) if column.name in ranks else column,
        kind="stable",
    ).reset_index(drop=True)


@style.styled
def figure_of_levels(table: pd.DataFrame, outcome: str) -> Figure:
    """One outcome by level: a panel for each factor, a row for each data set; single seeds as small marks.

    Args:
        table: ``panel``, ``factor``, ``level``, ``order``, ``mean``, ``low``, ``high``, ``seeds``, and with a
            ``seed`` the runs' own values as ``mean``.
        outcome: Of ``OUTCOMES``.
    """
    column = OUTCOMES[outcome]
    means, single = table[table[SEED].isna()], table[table[SEED].notna()]
    panels = list(dict.fromkeys(means["panel"]))
    factors = [factor for factor in FACTORS if (means["factor"] == factor).any()]
    moment = next(
        (f", {moment}" for moment in (FINAL, BEST) if outcome.startswith(f"{moment} ")), ", last epoch"
    )
    title = f"{style.mathtext(column.label)}{moment} (mean of {seeds_said(means)}, 95 % interval)"
    figure = style.new_figure(title, 0.9 + 2.2 * len(panels))
    axes = figure.subplots(len(panels), len(factors), squeeze=False, sharey="row")
    for i, panel in enumerate(panels):
        for j, factor in enumerate(factors):
            ax = axes[i, j]
            own, seeds = (
                rows[(rows["panel"] == panel) & (rows["factor"] == factor)] for rows in (means, single)
            )
            if own.empty:
                ax.set_visible(False)
                continue
            levels = list(own.sort_values("order")["level"])
            place = own["level"].map(levels.index).to_numpy(dtype=float)
            mean, low, high = (own[name].to_numpy(dtype=float) * column.scale for name in BOUNDS)
            ax.vlines(place, low, high, color=style.PALETTE[0], linewidth=1.4)
            ax.plot(place, mean, color=style.PALETTE[0], marker="o", markersize=5, linewidth=1.0)
            ax.plot(
                seeds["level"].map(levels.index), seeds["mean"] * column.scale, linestyle="", marker="_",
                markersize=8, color=style.MARK, zorder=3,
            )  # fmt: skip
            ax.set_xticks(range(len(levels)), levels, fontsize=8.5)  # ×0.25 beside ×0.5
            ax.set_xlim(-0.5, len(levels) - 0.5)
            ax.set_title(factor if i == 0 else "")
            if j == 0:
                ax.set_ylabel(f"{panel}\n({column.shown_unit})" if column.shown_unit else panel)
    keys = [key("mean and 95 % interval", marker="o"), key("single seeds", "", "_", markersize=8)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


STUDY = Study(
    "When does robust overfitting appear: what do radius, sample size, batch size and norm do to the gap, "
    "the bound's terms and the slope of the gradient?",
    answer,
)
