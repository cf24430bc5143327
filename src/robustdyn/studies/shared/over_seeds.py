"""Runs that differ in nothing but their seed, as one curve: mean and 95 % interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

LEVEL = 0.95
# 3 to 10 draws of an exponential, a log-normal (σ = 1) and two-peaked laws: 0.70 to 0.94
COVERAGE = "where seeds are skewed or fall into two groups, such intervals cover 0.7 to 0.9 instead of 0.95"


def mean_with_interval(frame: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """Mean over the rows that share ``by``, and Student's 95 % interval of it.

    Seeds are taken for independent draws of one normal law; of a skewed or two-peaked one the interval covers
    0.7 to 0.9. With a single seed there is no interval.

    Args:
        frame: One row for each seed and combination of ``by``; rows without a value are left out.
        by: Columns that tell apart what is averaged separately, such as group and epoch.
        column: What to average.

    Returns:
        Columns ``by``, ``mean``, ``low``, ``high`` (missing with one seed) and ``seeds``, ordered by ``by``.
    """
    known = frame.dropna(subset=[column])
    found = (
        known.groupby(list(by), sort=False, observed=True)[column].agg(["mean", "sem", "count"]).reset_index()
    )
    half = found["sem"] * stats.t.ppf((1 + LEVEL) / 2, (found["count"] - 1).clip(lower=1))
    half = half.where(found["count"] > 1)
    return found[list(by)].assign(
        mean=found["mean"], low=found["mean"] - half, high=found["mean"] + half, seeds=found["count"]
    )


def geometric_mean_with_interval(frame: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """As ``mean_with_interval``, of logarithms: for positive numbers that change by factors.

    The interval is of one law of the logarithms and stays positive; rows that are not positive are left out.
    """
    logs = np.log(frame[column].where(frame[column] > 0))
    found = mean_with_interval(frame.assign(**{column: logs}), by, column)
    found[["mean", "low", "high"]] = np.exp(found[["mean", "low", "high"]])
    return found


def draw_with_interval(
    ax: Axes,
    curve: pd.DataFrame,
    x: str,
    *,
    colour: str,
    scale: float = 1.0,
    line: str = "-",
    marker: str = "",
) -> None:
    """One curve of ``mean_with_interval`` over its column ``x``: a line, and its interval as a band."""
    curve = curve.sort_values(x)
    place = curve[x].to_numpy(dtype=float)
    mean, low, high = (curve[name].to_numpy(dtype=float) * scale for name in ("mean", "low", "high"))
    ax.fill_between(place, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.plot(place, mean, color=colour, linestyle=line, marker=marker)
