"""Cutout, mixup and weight decay against the WCI and the robust gap (WCI paper, figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from robustdyn.records.reader import Run
from robustdyn.studies.shared.curves import (
    INDEX,
    LOSS_GAP,
    compared,
    correlations,
    data_set,
)
from robustdyn.studies.shared.study import Answer, Study

PLAIN_DECAY = 5e-4  # both papers' weight decay
NONE = "none"


def setting(run: Run) -> str:
    """What regularises the run beyond the papers' protocol, with its strength."""
    data, decay = run.config["data"], float(run.config["optimizer"].get("weight_decay", 0.0))
    parts = []
    if side := data.get("augment", {}).get("cutout", 0):
        parts.append(f"cutout {side} px")
    if alpha := data.get("mixup", 0.0):
        parts.append(f"mixup α={alpha:g}")
    if decay != PLAIN_DECAY:
        parts.append(f"l2 {decay:g}")
    return " + ".join(parts) or NONE


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    ordered = sorted(runs, key=lambda run: (data_set(run), setting(run) != NONE, setting(run)))
    title = "WCI and robust gap under regularisers"
    return compared(ordered, setting, title=title, baseline=NONE, findings=_index_and_gap)


def _index_and_gap(rows: pd.DataFrame) -> list[str]:
    """Whether WCI and gap go together within runs."""
    if not (rows["quantity"] == INDEX).any():
        return ["Without measured WCI (measure=index) nothing is said about it."]
    lines = []
    within = correlations(rows)
    loss = within[(within["quantity"] == LOSS_GAP) & (within["phase"] == "all epochs")]
    for (panel, level), own in loss.groupby(["panel", "setting"], sort=False):
        low, high = own["pearson"].min(), own["pearson"].max()
        spread = f" (seeds: {low:.2f} to {high:.2f})" if len(own) > 1 else ""
        lines.append(
            f"{panel} {level}: Pearson correlation of WCI and robust loss gap over "
            f"{own['epochs'].min()} epochs {own['pearson'].mean():.2f}{spread}."
        )
    return lines


STUDY = Study(
    question="Do cutout, mixup and weight decay hold the WCI down, and the robust gap with it?",
    source="WCI paper, figure 7",
    answer=answer,
)
