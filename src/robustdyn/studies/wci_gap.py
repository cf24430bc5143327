"""WCI against the robust gap over epochs, and its two factors apart (WCI paper, figures 1 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run
from robustdyn.studies.shared.curves import (
    ERROR_GAP,
    INDEX,
    LOSS_GAP,
    NORM,
    TRACE,
    Row,
    correlations,
    data_set,
    figure_of_curves,
    first_decay,
    intervals_said,
    over_seeds,
    values,
)
from robustdyn.studies.shared.over_seeds import mean_with_interval
from robustdyn.studies.shared.study import Answer, Picture, Study

CEILING = "cauchy_schwarz_bound"
BEFORE, AFTER = "before the first decay", "after it"
ORDER = ("CIFAR-10", "CIFAR-100", "SVHN", "digits")
GAPS = {LOSS_GAP: "robust loss gap", ERROR_GAP: "robust error gap"}
FACTORS = {INDEX: "WCI", NORM: "‖W‖_F", TRACE: "√Tr H", "shape": "how alike layers are"}
"""The WCI and what it is the product of: ln WCI = ½ ln Σ‖W_k‖² + ½ ln Σ Tr H_k + ln(WCI / ceiling)."""


def factors(rows: pd.DataFrame) -> pd.DataFrame:
    """By how much the WCI and each of its factors changed before and after the first decay.

    The WCI is the product of ‖W‖_F, √Tr H and what the Cauchy–Schwarz inequality loses, which depends on how
    norm and trace are spread over the layers; so logarithms of their changes add up. Each phase ends where
    the next begins: at the last measured epoch before the decay.

    Args:
        rows: As ``robustdyn.studies.shared.curves.values`` returns them.

    Returns:
        ``panel``, ``setting``, ``phase``, ``factor``, ``from_epoch``, ``to_epoch``, and the mean natural
        logarithm of the change with its interval (``mean``, ``low``, ``high``, ``seeds``).
    """
    found = []
    for (panel, setting, seed), own in rows.groupby(["panel", "setting", SEED], sort=False):
        wide = own.pivot(index="epoch", columns="quantity", values="value")
        known = wide[[INDEX, NORM, TRACE, CEILING]].dropna()
        index, norm, trace = (np.log(known[name]) for name in (INDEX, NORM, TRACE))
        shape = index - norm / 2 - trace / 2
        logs = pd.DataFrame({INDEX: index, NORM: norm / 2, TRACE: trace / 2, "shape": shape})
        decay = first_decay(own)
        turn = logs.index[logs.index < decay].max() if decay is not None else np.nan
        if np.isnan(turn):  # nothing measured before a decay
            continue
        for phase, start, end in ((BEFORE, logs.index[0], turn), (AFTER, turn, logs.index[-1])):
            if start < end:
                change = logs.loc[end] - logs.loc[start]
                found += [(panel, setting, seed, phase, name, start, end, change[name]) for name in FACTORS]
    by = ["panel", "setting", "phase", "factor", "from_epoch", "to_epoch"]
    frame = pd.DataFrame(found, columns=[*by[:2], SEED, *by[2:], "change"])
    return mean_with_interval(frame, by, "change")


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    names = [*ORDER, *sorted({data_set(run) for run in runs} - set(ORDER))]
    runs = sorted(runs, key=lambda run: names.index(data_set(run)))
    rows = values(runs, [LOSS_GAP, ERROR_GAP, INDEX, NORM, TRACE, CEILING], setting=lambda run: "")
    curves, r, changes = over_seeds(rows), correlations(rows), factors(rows)
    by_factors = over_seeds(rows[rows["quantity"].isin(["lr", INDEX, NORM, TRACE, CEILING])], geometric=True)
    gaps = [Row(LOSS_GAP, "robust loss gap"), Row(ERROR_GAP, "robust error gap"), Row(INDEX, "WCI")]
    apart = [
        Row(NORM, "‖W‖²_F", log=True),
        Row(TRACE, "Tr H", log=True),
        Row(INDEX, "WCI", CEILING, log=True),
    ]
    pictures = [
        Picture(
            "wci_and_gap",
            curves[curves["quantity"].isin(["lr", *(row.quantity for row in gaps)])],
            partial(figure_of_curves, title="WCI and robust generalisation gap", rows=gaps),
        ),
        Picture(
            "norm_and_trace",
            by_factors,
            partial(figure_of_curves, title="The two factors of the WCI", rows=apart, mean="geometric mean"),
        ),
    ]
    tables = {"curves": curves, "correlations": r, "factors": changes}
    return Answer(tables, pictures, [*_told_correlations(r), *_told_factors(changes)])


def _told_correlations(r: pd.DataFrame) -> list[str]:
    """Pearson's r of WCI and gap, one sentence for each data set and phase."""
    lines = []
    for (panel, phase), rows in r.groupby(["panel", "phase"], sort=False):
        parts = []
        for gap, own in rows.groupby("quantity", sort=False):
            low, mean, high = own["pearson"].min(), own["pearson"].mean(), own["pearson"].max()
            spread = f" (seeds: {low:.2f} to {high:.2f})" if len(own) > 1 else ""
            parts.append(f"{mean:.2f}{spread} with the {GAPS[str(gap)]}")
        epochs = sorted(set(rows["epochs"]))
        n = "–".join(str(count) for count in dict.fromkeys((epochs[0], epochs[-1])))
        lines.append(
            f"{panel}, {phase} ({n}): the WCI's Pearson correlation over epochs is {', '.join(parts)}."
        )
    if not lines:
        lines.append(
            "WCI and gaps have fewer than three epochs in common: no correlation; let "
            "measure.epochs name evaluated epochs."
        )
    return lines


def _told_factors(changes: pd.DataFrame) -> list[str]:
    """By what the WCI was multiplied in each phase, and which factor did most of it."""
    lines = []
    for (panel, phase), rows in changes.groupby(["panel", "phase"], sort=False):
        own = {str(row["factor"]): row for row in rows.to_dict("records")}
        said = {name: _factor_said(own[name]) for name in FACTORS}
        strongest = max((NORM, TRACE), key=lambda name: abs(float(own[name]["mean"])))
        lines.append(
            f"{panel}, {phase}: the WCI is multiplied by {said[INDEX]}: {said[NORM]} from {FACTORS[NORM]}, "
            f"{said[TRACE]} from {FACTORS[TRACE]}, {said['shape']} from {FACTORS['shape']}. "
            f"{FACTORS[strongest]} moves more."
        )
    if lines:
        lines.append(f"Factors' means are geometric. {intervals_said(changes)}")
    return lines


def _factor_said(row: Mapping[Any, Any]) -> str:
    mean, low, high = (float(np.exp(row[name])) for name in ("mean", "low", "high"))
    return f"{mean:.2f}" if np.isnan(low) else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


STUDY = Study(
    question="Does the WCI follow the robust gap over the epochs, and which of its factors drives it when?",
    source="WCI paper, figures 1 and 4",
    answer=answer,
)
