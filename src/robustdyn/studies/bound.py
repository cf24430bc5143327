"""Catoni's bound over all parameters against the robust gap, over epochs and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, read_table
from robustdyn.records.schema import ROBUST_ERROR_GAP, ROBUST_LOSS_GAP
from robustdyn.report.whole_bound import how_vacuous
from robustdyn.studies.dynamics import MAY_DIFFER, method_of
from robustdyn.studies.shared.comparing import (
    RATE,
    correlations,
    mean_curves,
    mean_with_interval,
    require_alike,
    values,
)
from robustdyn.studies.shared.comparison_figures import Panel, figure_of_curves
from robustdyn.studies.shared.study import Answer, Picture, Study

TOTAL = "total"
TERMS = ("empirical_loss", "curvature", "kl_over_beta", "confidence", "complexity")
"""What the bound is the sum of."""
PARTS = ("kl_mean", "kl_trace", "kl_log_determinant")
"""What the KL is the sum of, without a total correlation."""
MOVING = (TOTAL, "empirical_loss", "curvature", "kl", *PARTS)
"""What is correlated with the gap."""
GAPS = (ROBUST_LOSS_GAP, ROBUST_ERROR_GAP)


def rank_correlations(rows: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of the bound and of its terms with the gaps: mean over seeds and its interval.

    Args:
        rows: As ``robustdyn.studies.shared.comparing.values`` returns them.

    Returns:
        ``panel``, ``setting``, ``term``, ``quantity`` (the gap), ``phase``, ``mean``, ``low``, ``high``,
        ``seeds``.
    """
    of_runs = [correlations(rows, term).assign(term=term) for term in MOVING]
    by = ["panel", "setting", "term", "quantity", "phase"]
    found = mean_with_interval(pd.concat(of_runs, ignore_index=True), by, "spearman")
    return found.assign(low=found["low"].clip(lower=-1.0), high=found["high"].clip(upper=1.0))


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``.

    Raises:
        RecordError: The runs differ in more than method and seed, or lack the bound.
    """
    require_alike(runs, MAY_DIFFER)
    rows = values(runs, [*GAPS, TOTAL, *TERMS, "kl", *PARTS], setting=method_of)
    curves = mean_curves(rows)
    measured = pd.concat(
        [
            read_table(run.path, "catoni").assign(setting=method_of(run), seed=run.config[SEED])
            for run in runs
        ],
        ignore_index=True,
    )
    said = how_vacuous(measured.dropna(subset=[TOTAL]))
    panels = [
        Panel("bound", TOTAL, log=True),
        Panel("log determinant", "kl_log_determinant", log=True),
        Panel("½ Tr(H₊Σ)", "curvature"),
        Panel("robust loss gap", ROBUST_LOSS_GAP),
        Panel("robust error gap", ROBUST_ERROR_GAP),
    ]
    shown = curves[curves["quantity"].isin([RATE, *(panel.quantity for panel in panels)])]
    picture = Picture(
        "bound_and_gap",
        shown,
        partial(figure_of_curves, title=f"Catoni's bound, {said}, and the robust gap", panels=panels),
    )
    tables = {"curves": curves, "correlations": rank_correlations(rows), "vacuous": _vacuous(measured)}
    return Answer(tables, [picture], findings_of(tables))


def _vacuous(measured: pd.DataFrame) -> pd.DataFrame:
    """The lowest bound of each run, and whether any of its bounds says anything."""
    found = measured.dropna(subset=[TOTAL])
    lowest = found.loc[found.groupby(["setting", SEED])[TOTAL].idxmin()]
    names = [
        "setting",
        SEED,
        "epoch",
        TOTAL,
        "total_se",
        "loss_range",
        "vacuous",
        "covers",
        "noise_free_parameters",
    ]
    return lowest[names].reset_index(drop=True)


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """How bound and gap are ranked alike, by method; and whether the bound is vacuous."""
    r = tables["correlations"]
    own = r[(r["term"] == TOTAL) & (r["quantity"] == ROBUST_LOSS_GAP) & (r["phase"] == "all epochs")]
    each = [
        f"{mean:.2f}{'' if pd.isna(low) else f' [{low:.2f}, {high:.2f}]'} with {setting}"
        for setting, mean, low, high in zip(own["setting"], own["mean"], own["low"], own["high"], strict=True)
    ]
    lowest = tables["vacuous"]
    holds = int((~lowest["vacuous"].astype(bool)).sum())
    least = lowest[TOTAL].min()
    return [
        "The rank correlation of the bound and the robust loss gap over epochs, mean over seeds, is "
        f"{', '.join(each) or 'not known: fewer than three measured epochs are evaluated (measure.epochs)'}.",
        f"The lowest bound is {least:.3g} nats; in {holds} of {len(lowest)} runs it is below the largest "
        "value of the clipped loss, and in the others it is vacuous at every epoch.",
    ]


STUDY = Study(
    "Does Catoni's bound over all parameters follow the robust gap under AT and AWP, and which terms do?",
    answer,
)
