"""Cutout, mixup and weight decay against the WCI and the robust gap (WCI paper, figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

from robustdyn.records.reader import Run
from robustdyn.studies.shared.comparing import data_set
from robustdyn.studies.shared.one_factor import compared
from robustdyn.studies.shared.study import Answer, Study

PLAIN_DECAY = 5e-4  # both papers' weight decay
NONE = "none"


def setting(run: Run) -> str:
    """What regularises the run beyond the papers' protocol, with its strength."""
    data, decay = run.config["data"], float(run.config["optimizer"].get("weight_decay", PLAIN_DECAY))
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
    return compared(ordered, setting, title="WCI and robust gap under regularisers", baseline=NONE)


STUDY = Study("Do cutout, mixup and weight decay hold the WCI down, and the robust gap with it?", answer)
