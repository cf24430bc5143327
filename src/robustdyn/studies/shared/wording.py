"""Puts comparisons of runs into words: cells of tables to read, and parts of the sentences of findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from robustdyn.records.columns import Column
from robustdyn.records.schema import EPOCHS, TEST_ROBUST_ERROR
from robustdyn.studies.shared.comparing import BEST, COLUMNS, FINAL, METRICS, MOMENTS


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
    words: tuple[str, str, str] = ("higher", "lower", "not clearly different"),
) -> str:
    """Which intervals lie above 0, below it, or on both sides of it: ``higher (a, b), lower (c)``."""
    up, down, unclear = words
    found: dict[str, list[str]] = {word: [] for word in words}
    for name, low, high in zip(names, rows["low"], rows["high"], strict=True):
        found[up if low > 0 else down if high < 0 else unclear].append(f"“{name}”" if "," in name else name)
    return ", ".join(f"{word} ({', '.join(own)})" for word, own in found.items() if own)


def lowest_said(errors: pd.DataFrame) -> str:
    """Which setting has the lowest robust error at its best epoch, and which at the end.

    Args:
        errors: ``setting``, ``moment``, ``mean``, ``low``, ``high`` in per cent.
    """
    column, parts = EPOCHS[TEST_ROBUST_ERROR], []
    for moment, when in ((BEST, "at the best epoch"), (FINAL, "at the end")):
        row = errors[errors["moment"] == moment].nsmallest(1, "mean").iloc[0]
        parts.append(f"of “{row['setting']}” {when} ({said(row, column)} %)")
    return f"the lowest robust error (± half of its 95 % interval) is that {' and '.join(parts)}"


def final_said(differences: pd.DataFrame, metrics: Sequence[str], reference: str) -> str:
    """Which settings' final metrics are clearly above or below those of ``reference``, from ``against``."""
    final, parts = differences[differences["moment"] == FINAL], []
    for metric in metrics:
        own = final[final["metric"] == metric]
        parts.append(f"the final {EPOCHS[metric].label} is {told_apart(own, list(own['setting']))}")
    return f"compared with {reference} seed by seed, {'; '.join(parts)}"


def sentence(text: str) -> str:
    """Of parts that were said."""
    return f"{text[0].upper()}{text[1:]}."


def seeds_said(table: pd.DataFrame) -> str:
    """``3 seeds``, or ``2–3 seeds`` where settings have different numbers."""
    low, high = int(table["seeds"].min()), int(table["seeds"].max())
    return f"{high} seed{'s' if high > 1 else ''}" if low == high else f"{low}–{high} seeds"
