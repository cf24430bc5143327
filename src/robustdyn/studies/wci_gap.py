"""WCI against the robust gap over epochs, and its two factors apart (WCI paper, figures 1 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run
from robustdyn.records.schema import (
    CAUCHY_SCHWARZ_BOUND,
    HESSIAN_TRACE,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    WEIGHT_NORM_SQ,
)
from robustdyn.studies.shared.comparing import (
    INDEX,
    RATE,
    correlations,
    data_set,
    decay_epoch,
    mean_curves,
    mean_with_interval,
    values,
)
from robustdyn.studies.shared.comparison_figures import Panel, figure_of_curves
from robustdyn.studies.shared.study import Answer, Picture, Study

CEILING = CAUCHY_SCHWARZ_BOUND
BEFORE, AFTER = "before the first decay", "after it"
ORDER = ("CIFAR-10", "CIFAR-100", "SVHN", "digits")
FACTORS = {INDEX: "WCI", WEIGHT_NORM_SQ: "‖W‖_F", HESSIAN_TRACE: "√Tr H", "shape": "how alike layers are"}
"""The WCI and what it is the product of: ln WCI = ½ ln Σ‖W_k‖² + ½ ln Σ Tr H_k + ln(WCI / ceiling)."""


def factors(rows: pd.DataFrame) -> pd.DataFrame:
    """By how much the WCI and each of its factors changed before and after the first decay.

    The WCI is the product of ‖W‖_F, √Tr H and what the Cauchy–Schwarz inequality loses, which depends on how
    norm and trace are spread over the layers; so logarithms of their changes add up. Each phase ends where
    the next begins: at the last measured epoch before the decay.

    Args:
        rows: As ``robustdyn.studies.shared.comparing.values`` returns them.

    Returns:
        ``panel``, ``setting``, ``phase``, ``factor``, ``from_epoch``, ``to_epoch``, and the mean natural
        logarithm of the change with its interval (``mean``, ``low``, ``high``, ``seeds``).
    """
    found = []
    for (panel, setting, seed), own in rows.groupby(["panel", "setting", SEED], sort=False):
        wide = own.pivot(index="epoch", columns="quantity", values="value")
        known = wide[[INDEX, WEIGHT_NORM_SQ, HESSIAN_TRACE, CEILING]].dropna()
        index, norm, trace = (np.log(known[name]) for name in (INDEX, WEIGHT_NORM_SQ, HESSIAN_TRACE))
        shape = index - norm / 2 - trace / 2
        logs = pd.DataFrame(
            {INDEX: index, WEIGHT_NORM_SQ: norm / 2, HESSIAN_TRACE: trace / 2, "shape": shape}
        )
        decay = decay_epoch(own)
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
    rows = values(
        runs,
        [ROBUST_LOSS_GAP, ROBUST_ERROR_GAP, INDEX, WEIGHT_NORM_SQ, HESSIAN_TRACE, CEILING],
        setting=lambda run: "",
    )
    curves, r, changes = mean_curves(rows), correlations(rows), factors(rows)
    product = rows[rows["quantity"].isin([RATE, INDEX, WEIGHT_NORM_SQ, HESSIAN_TRACE, CEILING])]
    gaps = [
        Panel("robust loss gap", ROBUST_LOSS_GAP),
        Panel("robust error gap", ROBUST_ERROR_GAP),
        Panel("WCI", INDEX),
    ]
    apart = [
        Panel("‖W‖²_F", WEIGHT_NORM_SQ, log=True),
        Panel("Tr H", HESSIAN_TRACE, log=True),
        Panel("WCI", INDEX, second=CEILING, log=True),
    ]
    pictures = [
        Picture(
            "wci_and_gap",
            curves[curves["quantity"].isin([RATE, *(panel.quantity for panel in gaps)])],
            partial(figure_of_curves, title="WCI and robust generalisation gap", panels=gaps),
        ),
        Picture(
            "norm_and_trace",
            mean_curves(product, geometric=True),
            partial(
                figure_of_curves, title="The two factors of the WCI", panels=apart, mean="geometric mean"
            ),
        ),
    ]
    tables = {"curves": curves, "correlations": r, "factors": changes}
    return Answer(tables, pictures, findings_of(tables))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Pearson's r of WCI and loss gap over all epochs by data set, and which factor moves more when."""
    r, changes = tables["correlations"], tables["factors"]
    own = r[(r["quantity"] == ROBUST_LOSS_GAP) & (r["phase"] == "all epochs")]
    means = own.groupby("panel", sort=False)["pearson"].mean()
    follows = ", ".join(f"{mean:.2f} on {panel}" for panel, mean in means.items())
    moving = []
    either = changes[changes["factor"].isin([WEIGHT_NORM_SQ, HESSIAN_TRACE])]
    for phase, rows in either.groupby("phase", sort=False):
        strongest = rows.loc[rows["mean"].abs().groupby(rows["panel"], sort=False).idxmax()]
        pairs = zip(strongest["factor"], strongest["panel"], strict=True)
        moving.append(f"{phase} {', '.join(f'{FACTORS[factor]} ({panel})' for factor, panel in pairs)}")
    return [
        "The Pearson correlation of WCI and robust loss gap over all epochs, mean over seeds, is "
        f"{follows or 'not known: fewer than three measured epochs are evaluated (measure.epochs)'}.",
        f"The factor of the WCI that moves more is {'; '.join(moving) or 'not known before a decay'}.",
    ]


STUDY = Study(
    "Does the WCI follow the robust gap over the epochs, and which of its factors drives it when?", answer
)
