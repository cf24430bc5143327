"""What studies of one factor answer: learning curves by level, and best and final numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd

from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run
from robustdyn.records.schema import (
    HESSIAN_EIGENVALUE,
    HESSIAN_TRACE,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
    TRAIN_ROBUST_ERROR,
    TRAIN_ROBUST_LOSS,
    WEIGHT_NORM_SQ,
)
from robustdyn.studies.shared.comparing import (
    BEST,
    COLUMNS,
    FINAL,
    INDEX,
    RISE,
    against,
    best_and_final,
    correlations,
    keys_of,
    mean_with_interval,
    over_epochs,
    pearson,
    values,
)
from robustdyn.studies.shared.comparison_figures import Panel, figure_of_curves, figure_of_outcomes
from robustdyn.studies.shared.study import Answer, Picture
from robustdyn.studies.shared.wording import intervals_said

FINAL_GAP, FINAL_INDEX = "final robust loss gap", "final WCI"
OUTCOMES: dict[str, tuple[str, str]] = {
    "best robust error": (TEST_ROBUST_ERROR, BEST),
    "final robust error": (TEST_ROBUST_ERROR, FINAL),
    "rise of the robust error": (TEST_ROBUST_ERROR, RISE),
    "best robust loss": (TEST_ROBUST_LOSS, BEST),
    "final robust loss": (TEST_ROBUST_LOSS, FINAL),
    "rise of the robust loss": (TEST_ROBUST_LOSS, RISE),
    "final robust error gap": (ROBUST_ERROR_GAP, FINAL),
    FINAL_GAP: (ROBUST_LOSS_GAP, FINAL),
    FINAL_INDEX: (INDEX, FINAL),
    "final squared weight norm": (WEIGHT_NORM_SQ, FINAL),
    "final Hessian trace": (HESSIAN_TRACE, FINAL),
    "final train robust loss": (TRAIN_ROBUST_LOSS, FINAL),
    "final largest Hessian eigenvalue": (HESSIAN_EIGENVALUE, FINAL),
}
"""What a run comes to: the lowest value over its epochs, the last one, and last less lowest."""

OUTCOME = ["panel", "quantity", "outcome"]


def outcomes(rows: pd.DataFrame) -> pd.DataFrame:
    """``OUTCOMES`` of every run, in order, each quantity at its own best epoch.

    Args:
        rows: As ``robustdyn.studies.shared.comparing.values`` returns them.

    Returns:
        ``panel``, ``setting``, ``seed``, ``quantity``, ``outcome``, ``value``.
    """
    heads = [*keys_of(rows), SEED]
    found = [
        (*head, quantity, outcome, own.at[quantity, how])
        for head, run in best_and_final(rows).groupby(heads, sort=False)
        for own in [run.set_index("quantity")]
        for outcome, (quantity, how) in OUTCOMES.items()
        if quantity in own.index
    ]
    return pd.DataFrame(found, columns=[*heads, "quantity", "outcome", "value"])


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval over seeds of ``outcomes``."""
    return mean_with_interval(found, ["panel", "setting", "quantity", "outcome"])


def with_seeds(table: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """``summary`` and, with their ``seed``, each run's own ``outcomes`` as ``mean``."""
    both = pd.concat([table, found.rename(columns={"value": "mean"})], ignore_index=True)
    return both[[*table.columns, SEED]]


def compared(runs: Sequence[Run], setting: Callable[[Run], str], *, title: str, baseline: str) -> Answer:
    """Compare the levels of one factor.

    Args:
        runs: In the order in which levels are to be listed.
        setting: A run's level.
        title: Of the figures.
        baseline: The level that the others are compared with, seed by seed.

    Raises:
        RecordError: As ``robustdyn.studies.shared.comparing.values``.
    """
    quantities = [TRAIN_ROBUST_ERROR, TEST_ROBUST_ERROR, TEST_ROBUST_LOSS, ROBUST_ERROR_GAP, ROBUST_LOSS_GAP]
    rows = values(runs, quantities, setting, optional=[INDEX, WEIGHT_NORM_SQ, HESSIAN_TRACE])
    found = outcomes(rows)
    table = summary(found)
    tables = {
        "outcomes": table,
        "differences": against(found, baseline, OUTCOME).assign(baseline=baseline),
    }
    measured = (rows["quantity"] == INDEX).any()
    if measured:
        tables["correlations"] = correlations(rows)
    panels = [
        Panel("robust error", TEST_ROBUST_ERROR, second=TRAIN_ROBUST_ERROR),
        Panel("robust loss gap", ROBUST_LOSS_GAP),
        Panel("WCI", INDEX),
    ]
    curves = partial(figure_of_curves, title=title, panels=panels)
    index = [] if measured else ["Without measured WCI (measure=index) nothing is said about it."]
    return Answer(
        tables=tables,
        pictures=[
            Picture("learning_curves", over_epochs(rows), curves),
            Picture("outcomes", with_seeds(table, found), partial(figure_of_outcomes, title=title)),
        ],
        findings=[*index, *_lowest(table), *_at_their_ends(found), intervals_said(table)],
    )


def _lowest(table: pd.DataFrame) -> list[str]:
    """Which setting has the lowest robust error, at its best epoch and at the end."""
    lines = []
    for panel, own in table[table["quantity"] == TEST_ROBUST_ERROR].groupby("panel", sort=False):
        parts = []
        for outcome in ("best robust error", "final robust error"):
            row = own[own["outcome"] == outcome].sort_values("mean", kind="stable").iloc[0]
            parts.append(
                f"{outcome}: {row['setting']} ({row['mean'] * COLUMNS[TEST_ROBUST_ERROR].scale:.1f} %)"
            )
        lines.append(f"{panel}, lowest {'; lowest '.join(parts)}.")
    return lines


def _at_their_ends(found: pd.DataFrame) -> list[str]:
    """Whether WCI and robust loss gap go together among runs, where more than three have both."""
    lines = []
    ends = found[found["outcome"].isin([FINAL_GAP, FINAL_INDEX])]
    for panel, own in ends.groupby("panel", sort=False):
        wide = own.pivot(index=["setting", SEED], columns="outcome", values="value")
        pairs = wide.reindex(columns=[FINAL_INDEX, FINAL_GAP]).dropna()
        if len(pairs) > 3 and (pairs.nunique() > 1).all():
            of = pearson(pairs[FINAL_INDEX], pairs[FINAL_GAP])
            lines.append(
                f"{panel}, over {len(pairs)} runs at their ends: Pearson correlation of WCI and robust loss "
                f"gap {of['r']:.2f} [{of['low']:.2f}, {of['high']:.2f}], p = {of['p']:.2g}, runs taken for "
                "independent."
            )
    return lines
