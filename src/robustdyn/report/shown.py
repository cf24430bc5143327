"""Chooses which settings the figures show, where there are more of them than a reader can tell apart."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from robustdyn.records.schema import EPOCHS, TEST_ROBUST_ERROR
from robustdyn.report.statistics import FINAL

MOST_SETTINGS = 16  # told apart by shade, in the order of the legend
AT_EACH_END = 4  # so many colours are told apart at once


def shown_in_figures(
    frames: Mapping[str, pd.DataFrame], summary: pd.DataFrame
) -> tuple[Mapping[str, pd.DataFrame], str]:
    """The tables of the settings that figures show.

    Args:
        frames: Tidy tables of all runs.
        summary: Rows of ``robustdyn.report.statistics.final_and_best`` by which the settings are ranked.

    Returns:
        All tables and an empty text for up to ``MOST_SETTINGS`` settings. Otherwise the rows of the best and
        the worst settings, best first, and words that say so.
    """
    groups = list(dict.fromkeys(frames["epochs"]["group"]))
    if len(groups) <= MOST_SETTINGS:
        return frames, ""
    final = summary[summary["selection"] == FINAL].groupby("group", sort=False)[TEST_ROBUST_ERROR].mean()
    ordered = final.dropna().sort_values(kind="stable").index
    if len(ordered) < 2 * AT_EACH_END:
        chosen, which = groups[: 2 * AT_EACH_END], f"the first {2 * AT_EACH_END} of {len(groups)} settings"
    else:
        chosen = [*ordered[:AT_EACH_END], *ordered[-AT_EACH_END:]]
        which = f"the {AT_EACH_END} best and the {AT_EACH_END} worst of {len(groups)} settings"
        which += f" by final {EPOCHS[TEST_ROBUST_ERROR].label}, best first"
    rows = {name: [frame[frame["group"] == group] for group in chosen] for name, frame in frames.items()}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in rows.items()}, which
