"""Training methods, best and final, as in the WCI paper's table 1, and what their weights and speed are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy import stats

from robustdyn.records.labels import SEED
from robustdyn.records.reader import Run, combine, read_table
from robustdyn.records.schema import (
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    ROBUST_LOSS_GAP,
    TEST_CLEAN_ERROR,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
)
from robustdyn.report.statistics import BEST_ON_TEST, BEST_ON_VALIDATION, final_and_best
from robustdyn.studies.shared.comparing import (
    BEST,
    COLUMNS,
    FINAL,
    INDEX,
    LEVEL,
    METRICS,
    MOMENT,
    RISE,
    against,
    in_shown_units,
    mean_with_interval,
    require_complete,
    require_repetitions,
    tidy_moments,
)
from robustdyn.studies.shared.comparison_figures import best_and_final
from robustdyn.studies.shared.study import Answer, Study
from robustdyn.studies.shared.wording import final_said, lowest_said, said, sentence

PLAIN, EARLY = "AT", "AT, early stopping"
PANELS = {
    TEST_ROBUST_ERROR: "Robust error",
    TEST_CLEAN_ERROR: "Clean error",
    TEST_ROBUST_LOSS: "Robust loss",
    ROBUST_LOSS_GAP: "Gap in loss",
}
SPEED, ALIGNED = "images_per_second", "gradient_alignment"
MEASURED = (INDEX, HESSIAN_EIGENVALUE, GRADIENT_NOISE, ALIGNED, SPEED)
"""Columns of ``selected`` where they were recorded; eigenvalue and noise are of the leading direction."""


def method(run: Run) -> str:
    """The method's name in the papers, with the threshold where there is one."""
    name = run.choices["method"].replace("wci_lr", "WCI-LR").replace("nfgsm", "N-FGSM").replace("_", " ")
    threshold = run.config["schedule"].get("threshold")
    return name.upper() if threshold is None else f"{name}, τ = {threshold:g}"


def selected(runs: Sequence[Run]) -> pd.DataFrame:
    """``final_and_best`` of the runs by method, with their ``seed``, and in final rows ``MEASURED``.

    Early stopping is a method of its own: plain adversarial training, its last epoch replaced by the one
    whose robust error on held-out training images was lowest.
    """
    frame = final_and_best(runs, combine(runs, "epochs"))
    methods, seeds = ({run.label: of(run) for run in runs} for of in (method, lambda run: run.config[SEED]))
    frame = frame.assign(group=frame["run"].map(methods), seed=frame["run"].map(seeds))
    found = {run.label: measured(run) for run in runs}
    final = frame["selection"] == FINAL
    for name in MEASURED:
        column = frame["run"].map(lambda label, name=name: found[label][name]).where(final)
        frame = frame.assign(**{name: column}) if column.notna().any() else frame
    early = frame[(frame["group"] == PLAIN) & (frame["selection"] != FINAL)].assign(group=EARLY)
    early = early.replace({"selection": {BEST_ON_VALIDATION: FINAL}}).sort_values("selection", kind="stable")
    early = early if (early["selection"] == FINAL).any() else early[:0]
    return pd.concat([frame[frame["selection"] != BEST_ON_VALIDATION], early], ignore_index=True)


def measured(run: Run) -> dict[str, float]:
    """The last measured values of a run, and its median speed; NaN where there is none."""

    def last(table: str, column: str, key: str = "", value: object = None) -> float:
        rows = read_table(run.path, table)
        rows = (rows[rows[key] == value] if key else rows).dropna(subset=[column])
        return math.nan if rows.empty else float(rows[column].iloc[-1])

    return {
        INDEX: last("wci", INDEX),
        HESSIAN_EIGENVALUE: last("spectrum", HESSIAN_EIGENVALUE, "index", 0),
        GRADIENT_NOISE: last("spectrum", GRADIENT_NOISE, "index", 0),
        ALIGNED: last("measures", "value", "measure", ALIGNED),
        SPEED: float(read_table(run.path, "timing")[SPEED].median()),
    }


def tables_of(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of the study.

    Args:
        frame: As ``selected`` returns it.
    """
    named = frame.rename(columns={"group": "setting", "selection": "moment"}).replace({BEST_ON_TEST: BEST})
    long = in_shown_units(named.melt(["setting", SEED, "moment"], METRICS, var_name="quantity"))
    wide = long.pivot_table("value", ["setting", SEED, "quantity"], "moment", sort=False).reset_index()
    found = tidy_moments(wide.assign(**{RISE: wide[FINAL] - wide[BEST]}))
    means = mean_with_interval(found, MOMENT)
    error = (means["high"] - means["mean"]) / stats.t.ppf((1 + LEVEL) / 2, means["seeds"] - 1)
    tables = {
        "methods": means,
        "methods_shown": _shown(means.assign(low=means["mean"] - error, high=means["mean"] + error)),
        "against_at": against(found, PLAIN, MOMENT[1:]).assign(minus=PLAIN),
        "runs": frame,
    }
    known = [name for name in MEASURED if name in frame]
    if not known:
        return tables
    rows = named.melt(["setting", SEED], known, var_name="quantity")
    return tables | {"measured": mean_with_interval(rows, ["quantity", "setting"])}


def _shown(means: pd.DataFrame) -> pd.DataFrame:
    """Means to read: "mean ± standard error", the moments as columns."""
    rows = means.assign(
        metric=[COLUMNS[name].shown for name in means["metric"]],
        cell=[said(row, COLUMNS[row["metric"]]) for _, row in means.iterrows()],
    )
    by = ["metric", "setting", "seeds"]
    wide = rows.pivot_table("cell", by, "moment", aggfunc="first", sort=False)
    return wide.rename_axis(columns=None).reset_index()


def answer_from(frame: pd.DataFrame) -> Answer:
    """The answer from what ``selected`` returns."""
    tables = tables_of(frame)
    means = tables["methods"]
    pictures = [best_and_final(means, "Best and final epoch of each method", PANELS)]
    return Answer(tables, pictures, findings_of(tables))


def findings_of(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Which method has the lowest robust error, and which methods differ from plain adversarial training."""
    means = tables["methods"]
    lowest = lowest_said(means[means["metric"] == TEST_ROBUST_ERROR])
    apart = final_said(tables["against_at"], (TEST_ROBUST_ERROR, TEST_ROBUST_LOSS), PLAIN)
    return [sentence(lowest), sentence(apart)]


def answer(runs: Sequence[Run]) -> Answer:
    """Best and final of every method, and against plain adversarial training."""
    require_repetitions(runs, method)
    require_complete(runs)
    return answer_from(selected(runs))


STUDY = Study(
    "How do AT, AWP, the WCI learning rate, weight averaging, one-step attacks and early stopping compare, "
    "best and final, where plain AT overfits?",
    answer,
)
