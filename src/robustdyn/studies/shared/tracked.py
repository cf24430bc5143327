"""Tracked directions of several runs: quantities over them, moments about the decay, changes between these.

What is said of ``k`` tracked directions is said of that subspace, never of the whole model. Positive
quantities change by factors: their means over seeds are geometric, their intervals those of the logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run, read_table
from robustdyn.records.schema import (
    CAPTURED_NOISE,
    COMMUTATOR_NULL,
    CURVATURE_TERM,
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    INDEPENDENT,
    LOG_VARIANCE_TERM,
    NOISE_EIGENVALUE,
    POSTERIOR_VARIANCE,
    POSTERIOR_VARIANCE_STATIONARY,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    SUBSPACE_OVERLAP,
    TEST_CLEAN_ERROR,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
    TOTAL_CORRELATION,
    TOTAL_CORRELATION_NULL,
)
from robustdyn.report.statistics import decay_epochs
from robustdyn.studies.shared.comparing import RATE, mean_with_interval, paired

Change = Literal["factor", "difference"]

BEFORE, AFTER, LATE, END = "before", "after", "late", "end"
MOMENTS = {
    BEFORE: "last measured before the first decay",
    AFTER: "first measured at or after the first decay",
    LATE: "last measured before the second decay, or at all",
    END: "last measured",
}
STEPS = ((BEFORE, AFTER), (AFTER, LATE), (BEFORE, LATE), (BEFORE, END))
"""Between which moments changes are counted."""


@dataclass(frozen=True)
class Quantity:
    """A number at an epoch of a run.

    Attributes:
        label: For people; ``{k}`` stands for the number of tracked directions.
        change: How two values of it are compared: ``factor`` for what is positive.
        scale: Factor from the recorded number to the one people read.
    """

    label: str
    change: Change
    scale: float = 1.0


TOP, MEAN = "_top", "_mean"
_RANKED = {
    HESSIAN_EIGENVALUE: "Hessian eigenvalue λ",
    GRADIENT_NOISE: "gradient noise γ along H's directions",
    NOISE_EIGENVALUE: "noise eigenvalue (of C)",
    "stationary_variance": "stationary σ² (papers' law)",
    "independent_variance": "time-resolved σ² (papers' law)",
    "resolved_variance": "time-resolved σ² (training's law)",
}
_SUMS = {
    "stationary": "stationary σ² (papers' law)",
    "independent": "time-resolved σ² (papers' law)",
    "resolved": "time-resolved σ² and slope (training's law)",
}
_TERMS: Mapping[str, tuple[str, Change]] = {
    CURVATURE_TERM: ("Σ λσ²", "factor"),
    LOG_VARIANCE_TERM: ("−Σ ln σ² (nats)", "difference"),
    "dominant_terms": ("Σ λσ² − Σ ln σ²", "difference"),
}
WITHOUT_RATE = "log_variance_term_without_rate"
_ROBUSTNESS = {
    TEST_ROBUST_LOSS: Quantity("test robust loss (nats)", "difference"),
    ROBUST_LOSS_GAP: Quantity("robust loss gap, test − train (nats)", "difference"),
    TEST_ROBUST_ERROR: Quantity("test robust error (%)", "difference", 100.0),
    ROBUST_ERROR_GAP: Quantity("robust error gap (percentage points)", "difference", 100.0),
    TEST_CLEAN_ERROR: Quantity("test clean error (%)", "difference", 100.0),
}
_ALIGNMENT = {
    "commutator": Quantity("relative commutator of H and C", "difference"),
    COMMUTATOR_NULL: Quantity("commutator's null: H and C commute", "difference"),
    "commutator_excess": Quantity("(commutator − null) / spread of the null", "difference"),
    SUBSPACE_OVERLAP: Quantity("subspace overlap", "difference"),
    CAPTURED_NOISE: Quantity("captured noise", "difference"),
    "cosine": Quantity("cosine of H and C", "difference"),
    TOTAL_CORRELATION: Quantity("total correlation (nats)", "difference"),
    TOTAL_CORRELATION_NULL: Quantity("total correlation's null: H and C commute (nats)", "difference"),
    "total_correlation_excess": Quantity("(total correlation − null) / spread of the null", "difference"),
}
QUANTITIES: Mapping[str, Quantity] = {
    **{f"{name}{TOP}": Quantity(f"{label}, leading direction", "factor") for name, label in _RANKED.items()},
    **{
        f"{name}{MEAN}": Quantity(f"{label}, geometric mean of {{k}} tracked directions", "factor")
        for name, label in _RANKED.items()
    },
    **{
        f"{name}_{kind}": Quantity(f"{label}, {{k}} tracked directions, {variance}", change)
        for kind, variance in _SUMS.items()
        for name, (label, change) in _TERMS.items()
    },
    WITHOUT_RATE: Quantity("−Σ ln(σ²/η) (nats), {k} tracked directions, stationary", "difference"),
    **{name: Quantity(f"{q.label}, {{k}} tracked directions", q.change) for name, q in _ALIGNMENT.items()},
    **_ROBUSTNESS,
}


def tracked_directions(runs: Sequence[Run]) -> int:
    """k, the number of directions all runs tracked.

    Raises:
        RecordError: A run has no measured spectrum, or they tracked different numbers.
    """
    counts = {
        run.path: int(table_of(run, "spectrum").groupby("epoch")["index"].nunique().min()) for run in runs
    }
    if len(set(counts.values())) > 1:
        raise RecordError(
            f"runs tracked {', '.join(map(str, sorted(set(counts.values()))))} directions; "
            "give those with one measure.eigenpairs.directions"
        )
    return next(iter(counts.values()))


def table_of(run: Run, table: str) -> pd.DataFrame:
    """A table that the run must have.

    Raises:
        RecordError: It has no rows.
    """
    frame = read_table(run.path, table)
    if frame.empty:
        wanted = "finish the run" if table == "epochs" else "train with measure=default"
        raise RecordError(f"{run.path}: no {table} recorded; {wanted}")
    return frame


def tracked_quantities(run: Run) -> pd.DataFrame:
    """All quantities of one run.

    Returns:
        Columns ``epoch``, ``quantity`` and ``value``: spectrum, sums and alignment at measured epochs, with
        missing values where some direction has no posterior; variances after every epoch; robustness where
        evaluated; the learning rate.

    Raises:
        RecordError: The run lacks a table, or a posterior altogether.
    """
    epochs, spectrum, posterior, alignment = (
        table_of(run, name) for name in ("epochs", "spectrum", "posterior", "alignment")
    )
    if spectrum[POSTERIOR_VARIANCE_STATIONARY].isna().all():
        raise RecordError(f"{run.path}: no stationary posterior recorded; train with optimizer=sgd")
    own = posterior[["epoch", "index", "slope", POSTERIOR_VARIANCE, POSTERIOR_VARIANCE + INDEPENDENT]]
    spectrum = spectrum.merge(own, on=["epoch", "index"], how="left", validate="one_to_one")
    measured = _ranked(spectrum, [HESSIAN_EIGENVALUE, GRADIENT_NOISE, NOISE_EIGENVALUE])
    resolved, independent = spectrum[POSTERIOR_VARIANCE], spectrum[POSTERIOR_VARIANCE + INDEPENDENT]
    terms = {
        "curvature_term_stationary": spectrum[CURVATURE_TERM],
        "log_variance_term_stationary": spectrum[LOG_VARIANCE_TERM],
        "curvature_term_independent": spectrum["curvature"] * independent,
        "log_variance_term_independent": -np.log(independent.where(independent > 0)),
        # the robust loss is attacked at the weights that are drawn, and bends with the slope
        "curvature_term_resolved": spectrum["slope"] * resolved,
        "log_variance_term_resolved": -np.log(resolved.where(resolved > 0)),
    }
    sums = _whole_sums(spectrum[["epoch"]].assign(**terms))
    for kind in _SUMS:
        sums[f"dominant_terms_{kind}"] = sums[f"curvature_term_{kind}"] + sums[f"log_variance_term_{kind}"]
    rate = epochs.set_index("epoch")[RATE].reindex(sums.index)
    # the stationary σ² goes with η, whatever the network
    sums[WITHOUT_RATE] = sums["log_variance_term_stationary"] + _count(spectrum) * np.log(rate)
    variances = posterior.rename(
        columns={
            POSTERIOR_VARIANCE_STATIONARY: "stationary_variance",
            POSTERIOR_VARIANCE + INDEPENDENT: "independent_variance",
            POSTERIOR_VARIANCE: "resolved_variance",
        }
    )
    alignment = alignment.set_index("epoch")
    for name in ("commutator", TOTAL_CORRELATION):
        above = alignment[name] - alignment[f"{name}_null"]
        alignment[f"{name}_excess"] = above / alignment[f"{name}_null_spread"].where(lambda v: v > 0)
    evaluated = epochs.set_index("epoch")[[*_ROBUSTNESS, RATE]]
    parts = [
        _long(measured),
        _long(_ranked(variances, ["stationary_variance", "independent_variance", "resolved_variance"])),
        _long(sums),
        _long(alignment[list(_ALIGNMENT)]),
        _long(evaluated).dropna(subset=["value"]),
    ]
    return pd.concat(parts, ignore_index=True)


def moments(values: pd.DataFrame, path: object) -> pd.DataFrame:
    """The values of one run at the moments about its decays.

    Args:
        values: Rows of ``tracked_quantities``.
        path: The run's, for messages.

    Returns:
        Columns ``moment``, ``epoch``, ``quantity`` and ``value``. Each quantity is taken at the nearest epoch
        that has it on the same side of the decay; the learning rate and the variances, known at all epochs,
        where the spectrum was measured.

    Raises:
        RecordError: There is no decay, or nothing measured on one side of it.
    """
    rates = values[values["quantity"] == RATE].rename(columns={"value": "lr"})
    decays = decay_epochs(rates)
    if not decays:
        raise RecordError(f"{path}: no learning-rate decay to compare across; train with schedule=piecewise")
    first, second = decays[0], decays[1] if len(decays) > 1 else None
    measured = set(values.loc[values["quantity"] == HESSIAN_EIGENVALUE + TOP, "epoch"])
    if not (min(measured) < first <= max(measured)):
        raise RecordError(
            f"{path}: measured on one side of the decay at epoch {first} only; "
            "train with measure.epochs=[every 4, around decays 1]"
        )
    kept = values["quantity"].isin(_ROBUSTNESS) | values["epoch"].isin(measured)
    # a sum is missing where a corrected curvature or noise came out negative
    known = values[kept].dropna(subset=["value"]).sort_values("epoch")
    sides = {
        BEFORE: known[known["epoch"] < first].drop_duplicates("quantity", keep="last"),
        AFTER: known[known["epoch"] >= first].drop_duplicates("quantity", keep="first"),
        LATE: (known[known["epoch"] < second] if second is not None else known).drop_duplicates(
            "quantity", keep="last"
        ),
        END: known.drop_duplicates("quantity", keep="last"),
    }
    found = pd.concat([side.assign(moment=moment) for moment, side in sides.items()], ignore_index=True)
    return found[["moment", "epoch", "quantity", "value"]]


def mean(frame: pd.DataFrame, by: Sequence[str], *, changes: bool = False) -> pd.DataFrame:
    """Mean over seeds of ``value`` with its 95 % interval, geometric where the quantity changes by factors.

    Args:
        frame: Columns ``by``, ``quantity``, ``value``.
        by: As in ``mean_with_interval``; ``quantity`` is added.
        changes: Whether values are already logarithms of factors there.
    """
    keys = [*by, "quantity"]
    factor = _by_factors(frame["quantity"])
    logs = frame[factor]
    logs = logs.assign(value=np.exp(logs["value"])) if changes else logs
    geometric = mean_with_interval(logs, keys, geometric=True)
    return pd.concat([geometric, mean_with_interval(frame[~factor], keys)], ignore_index=True)


def changes_between(start: pd.DataFrame, end: pd.DataFrame, on: Sequence[str]) -> pd.DataFrame:
    """Change of each quantity from ``start`` to ``end``: the logarithm of the factor, or the difference.

    Args:
        start: Rows with ``on``, ``quantity`` and ``value``.
        end: As ``start``; rows without a partner are left out.
        on: Columns that partners share, besides the quantity.

    Returns:
        Rows of ``end`` with the change as ``value``, without those of the learning rate.
    """
    pairs = paired(end[end["quantity"] != RATE], start, [*on, "quantity"])
    value, reference = pairs["value"], pairs.pop("reference")
    ratio = (value / reference).where((value > 0) & (reference > 0))
    return pairs.assign(value=np.where(_by_factors(pairs["quantity"]), np.log(ratio), value - reference))


def label(quantity: str, k: int) -> str:
    """A quantity's label with the number of tracked directions."""
    return QUANTITIES[quantity].label.format(k=k)


def _by_factors(quantity: pd.Series) -> pd.Series:
    return quantity.map(lambda name: name in QUANTITIES and QUANTITIES[name].change == "factor").astype(bool)


def _ranked(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """By epoch: the values of the leading direction, and the geometric means over all (missing if any is)."""
    top = frame[frame["index"] == 0].set_index("epoch")[list(names)]
    logs = frame[["epoch"]].assign(**{name: np.log(frame[name].where(frame[name] > 0)) for name in names})
    means = (_whole_sums(logs) / _count(frame)).apply(np.exp)
    return top.add_suffix(TOP).join(means.add_suffix(MEAN))


def _whole_sums(frame: pd.DataFrame) -> pd.DataFrame:
    """Sums over the directions by epoch, missing if any is."""

    def whole(values: pd.Series) -> float:
        return float(values.sum(skipna=False))

    return frame.groupby("epoch").agg(whole)


def _count(frame: pd.DataFrame) -> int:
    return int(frame["index"].nunique())


def _long(wide: pd.DataFrame) -> pd.DataFrame:
    return (
        wide.rename_axis(index="epoch", columns="quantity").reset_index().melt("epoch", var_name="quantity")
    )
