"""What studies of one factor answer: learning curves by level, and best and final numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd

from robustdyn.errors import RecordError
from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, read_table
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
from robustdyn.report.statistics import decay_epochs
from robustdyn.studies.shared.comparing import (
    BEST,
    BOUNDS,
    COLUMNS,
    FINAL,
    INDEX,
    RATE,
    RISE,
    against,
    best_and_final,
    correlations,
    keys_of,
    mean_curves,
    mean_with_interval,
    pearson,
    values,
)
from robustdyn.studies.shared.comparison_figures import Panel, figure_of_curves, figure_of_outcomes
from robustdyn.studies.shared.study import Answer, Picture
from robustdyn.studies.shared.wording import lowest_said, sentence

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


class Decay(NamedTuple):
    """The first decay of a run: the first epoch at the lower rate, the initial rate, and the lower one."""

    epoch: int
    before: float
    after: float


def first_decay(run: Run) -> Decay:
    """When the rate first fell, and from which to which.

    Raises:
        RecordError: It never did.
    """
    epochs = read_table(run.path, "epochs")
    decays = decay_epochs(epochs)
    if not decays:
        raise RecordError(f"{run.path}: its learning rate never decays; leave the run out")
    rate = epochs.set_index("epoch")[RATE]
    return Decay(decays[0], float(rate.iloc[0]), float(rate.loc[decays[0]]))


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
    return Answer(
        tables=tables,
        pictures=[
            Picture("learning_curves", mean_curves(rows), curves),
            Picture("outcomes", with_seeds(table, found), partial(figure_of_outcomes, title=title)),
        ],
        findings=findings_of(table, found),
    )


def findings_of(table: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """Which setting has the lowest robust error, and whether final WCI and loss gap go together over runs.

    Args:
        table: As ``summary`` returns it.
        found: As ``outcomes`` returns it.
    """
    errors = table[table["quantity"] == TEST_ROBUST_ERROR]
    scaled = errors[list(BOUNDS)] * COLUMNS[TEST_ROBUST_ERROR].scale
    errors = errors.assign(moment=errors["outcome"].str.partition(" ")[0], **scaled)
    lowest = [f"on {panel}, {lowest_said(own)}" for panel, own in errors.groupby("panel", sort=False)]
    together = []
    for panel, own in found.groupby("panel", sort=False):
        wide = own.pivot(index=["setting", SEED], columns="outcome", values="value")
        pairs = wide.reindex(columns=[FINAL_INDEX, FINAL_GAP]).dropna()
        if len(pairs) > 3 and (pairs.nunique() > 1).all():
            of = pearson(pairs[FINAL_INDEX], pairs[FINAL_GAP])
            interval = f"[{of['low']:.2f}, {of['high']:.2f}]"
            together.append(f"{of['r']:.2f} {interval} over the {len(pairs)} runs on {panel}")
    said = (
        f"The Pearson correlation of final WCI and final robust loss gap is {'; '.join(together)}."
        if together
        else "The runs say nothing about the WCI: at least four must have measured it (measure=index)."
    )
    return [sentence("; ".join(lowest)), said]
