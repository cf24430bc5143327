"""Puts comparisons of runs into words: cells of tables to read, and the sentences of findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from robustdyn.records.columns import Column
from robustdyn.records.schema import EPOCHS, TEST_ROBUST_ERROR
from robustdyn.studies.shared.comparing import BEST, COLUMNS, FINAL, METRICS, MOMENTS

# 3 to 10 draws of an exponential, a log-normal (σ = 1) and two-peaked laws: 0.70 to 0.94
COVERAGE = "where seeds are skewed or fall into two groups, such intervals cover 0.7 to 0.9 instead of 0.95"


def shown_table(means: pd.DataFrame) -> pd.DataFrame:
    """Means of ``at_moments`` to read: a row per setting, "mean ± half the interval" in the cells."""
    columns = {
        (metric, moment): f"{COLUMNS[metric].shown}, {moment}" for metric in METRICS for moment in MOMENTS
    }
    cells = means.assign(
        column=[columns[place] for place in zip(means["metric"], means["moment"], strict=True)],
        cell=[said(row, COLUMNS[row["metric"]]) for _, row in means.iterrows()],
    )
    wide = cells.pivot(index="setting", columns="column", values="cell")
    wide = wide.reindex(index=list(dict.fromkeys(means["setting"])), columns=list(columns.values()))
    wide.insert(0, "seeds", means.groupby("setting", sort=False)["seeds"].max())
    return wide.reset_index()


def said(row: Mapping[Any, Any] | pd.Series, column: Column) -> str:
    """``33.8 ± 0.9``, in the shown unit: the mean and half of its interval, which one seed does not have."""
    digits = 1 if column.scale > 1 else 3
    text = f"{row['mean']:.{digits}f}"
    return text if pd.isna(row["low"]) else f"{text} ± {row['high'] - row['mean']:.{digits}f}"


def told_apart(
    rows: pd.DataFrame,
    names: Sequence[str],
    words: tuple[str, str, str] = ("higher", "lower", "no clear difference"),
) -> str:
    """Which intervals lie above 0, below it, or on both sides of it: ``higher: ...; lower: ...``."""
    up, down, unclear = words
    found: dict[str, list[str]] = {word: [] for word in words}
    for name, low, high in zip(names, rows["low"], rows["high"], strict=True):
        found[up if low > 0 else down if high < 0 else unclear].append(f"“{name}”" if "," in name else name)
    return "; ".join(f"{word}: {', '.join(own)}" for word, own in found.items() if own)


def lowest_said(means: pd.DataFrame) -> str:
    """Which setting of ``at_moments`` has the lowest robust error, best and final."""
    errors = means[means["metric"] == TEST_ROBUST_ERROR].set_index("moment")
    lowest = {moment: errors.loc[[moment]].nsmallest(1, "mean").iloc[0] for moment in (BEST, FINAL)}
    parts = [
        f"{moment} {row['setting']} ({said(row, EPOCHS[TEST_ROBUST_ERROR])} %)"
        for moment, row in lowest.items()
    ]
    return (
        f"Lowest robust error: {', '.join(parts)}. Best is the epoch of lowest test robust error, chosen on "
        "the test set as in the papers, so that final − best of that error is never negative."
    )


def final_said(differences: pd.DataFrame, metric: str, reference: str) -> str:
    """Which settings' final metric is clearly above or below that of ``reference``, from ``against``."""
    own = differences[(differences["metric"] == metric) & (differences["moment"] == FINAL)]
    apart = told_apart(own, list(own["setting"]))
    return f"Final {EPOCHS[metric].label} against {reference}, seed by seed: {apart}."


def seeds_said(table: pd.DataFrame) -> str:
    """``3 seeds``, or ``2–3 seeds`` where settings have different numbers."""
    low, high = int(table["seeds"].min()), int(table["seeds"].max())
    return f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low}–{high} seeds"


def intervals_said(table: pd.DataFrame) -> str:
    """What means and intervals of this table are."""
    if table["seeds"].max() == 1:
        return "One seed, so no intervals."
    return (
        f"Means over {seeds_said(table)} with Student's 95 % interval, not adjusted for the number of them; "
        f"{COVERAGE}."
    )
