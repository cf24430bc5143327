"""What runs amount to: learning-rate decays, final and best rows, and the three numbers that matter.

Everything takes the frames of ``records.reader.combine``: tidy, with a ``run`` and a ``group`` column.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustdyn.records.columns import Column
from robustdyn.records.reader import Run
from robustdyn.records.schema import (
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
    TEST_CLEAN_ERROR,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
)
from robustdyn.records.writer import summarise
from robustdyn.theory import sudden_decays

TOLD = 4  # groups that fit one line of a terminal

FINAL = "final"
BEST_ON_TEST = "best on test"
BEST_ON_VALIDATION = "best on validation"
SELECTIONS = {FINAL: "final", BEST_ON_TEST: "best_on_test", BEST_ON_VALIDATION: "best_on_validation"}
SHOWN_METRICS = (
    TEST_CLEAN_ERROR,
    TEST_ROBUST_ERROR,
    TEST_ROBUST_LOSS,
    ROBUST_ERROR_GAP,
    ROBUST_LOSS_GAP,
)


def decay_epochs(epochs: pd.DataFrame) -> list[int]:
    """Epochs at which the learning rate drops suddenly: the first epochs at the lower rate.

    Smooth schedules (linear, exponential, cosine, cyclic) have none; see ``robustdyn.theory.sudden_decays``.

    Args:
        epochs: ``epochs`` rows of one run.

    Returns:
        Epoch numbers, ascending.
    """
    numbers, rates = epochs["epoch"].to_numpy(dtype=int), epochs["lr"].to_numpy(dtype=float)
    order = np.argsort(numbers)
    order = order[~np.isnan(rates[order])]
    return [int(numbers[order[i]]) for i in sudden_decays(rates[order])]


def by_run(frame: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """The rows of each run, by epoch; no rows for a run that has none."""
    groups = frame.sort_values("epoch", kind="stable").groupby("run", sort=False)
    return defaultdict(lambda: frame.head(0), {str(run): rows for run, rows in groups})


def final_and_best(runs: Sequence[Run], epochs: pd.DataFrame) -> pd.DataFrame:
    """Final and best epochs of every run.

    Args:
        runs: The runs.
        epochs: Their table ``epochs``.

    Returns:
        One row per run and selection (``final``, ``best on test``, ``best on validation`` where recorded):
        ``run``, ``group``, ``selection``, ``epoch`` and ``SHOWN_METRICS``. Runs without a finished epoch have
        none.
    """
    needed = ["run", "epoch", "validation_robust_error", *SHOWN_METRICS]  # summarise looks at every column
    rows, recorded = [], by_run(epochs[needed])
    for run in runs:
        own = recorded[run.label]
        if own.empty:
            continue
        summary = summarise(own)
        for selection, key in SELECTIONS.items():
            best = summary.get(key)
            if isinstance(best, dict):
                shown = {name: best[name] for name in ("epoch", *SHOWN_METRICS)}
                rows.append({"run": run.label, "group": run.group, "selection": selection} | shown)
    frame = pd.DataFrame(rows, columns=["run", "group", "selection", "epoch", *SHOWN_METRICS])
    return frame.astype(dict.fromkeys(SHOWN_METRICS, "float64"))


class EpochValue(NamedTuple):
    """A number at one epoch of one run."""

    epoch: int
    value: float


@dataclass(frozen=True)
class GroupChange:
    """How a number moved between two moments, in every run of a group.

    Attributes:
        group: The group's label.
        pairs: (from, to) for each run in which both moments exist.
    """

    group: str
    pairs: tuple[tuple[EpochValue, EpochValue], ...]

    def mean(self, end: bool) -> str:
        """The mean over runs at one end."""
        return format_number(float(np.mean([pair[end].value for pair in self.pairs])))

    def spread(self, end: bool) -> str:
        """The smallest and the largest value over runs at one end."""
        values = [pair[end].value for pair in self.pairs]
        return f"{format_number(min(values))}–{format_number(max(values))}"

    def epochs(self, end: bool) -> str:
        """The epoch, or the range of epochs over runs."""
        numbers = [pair[end].epoch for pair in self.pairs]
        low, high = min(numbers), max(numbers)
        return f"epoch {low}" if low == high else f"epochs {low}–{high}"

    @property
    def size(self) -> float:
        """Mean change over the runs."""
        return float(np.mean([end.value - start.value for start, end in self.pairs]))

    def short(self) -> str:
        """``0.89 → 1.02``, means over the runs."""
        return f"{self.mean(False)} → {self.mean(True)}"


@dataclass(frozen=True)
class Headline:
    """One of the numbers that matter.

    Attributes:
        name: What moved.
        start: Which moment it is counted from.
        changes: One for each group that has the number.
        missing: What to say where no group has it.
    """

    name: str
    start: str
    changes: tuple[GroupChange, ...]
    missing: str

    def __str__(self) -> str:
        """One line for a terminal; of many groups, those of the smallest and the largest change."""
        if not self.changes:
            return f"{self.name}: {self.missing}"
        if len(self.changes) == 1:
            return self._of_one(self.changes[0])
        told, which = self.told(TOLD)
        rest = f" ({which})" if which else ""
        return f"{self.name}, {self.start} → final: {'; '.join(f'{c.group} {c.short()}' for c in told)}{rest}"

    def told(self, most: int) -> tuple[tuple[GroupChange, ...], str]:
        """The changes, or of more than ``most`` the smallest and the largest, with words that say so."""
        if len(self.changes) <= most:
            return self.changes, ""
        ordered = sorted(self.changes, key=lambda change: change.size)
        return (ordered[0], ordered[-1]), f"smallest and largest rise of {len(ordered)} settings"

    def _of_one(self, change: GroupChange) -> str:
        n = len(change.pairs)
        start, final = (
            f"{change.mean(end)}{f' [{change.spread(end)}]' if n > 1 else ''} ({change.epochs(end)})"
            for end in (False, True)
        )
        seeds = f" (mean of {n} seeds [range])" if n > 1 else ""
        return f"{self.name}{seeds}: {self.start} {start} → final {final}"


def headlines(runs: Sequence[Run], frames: Mapping[str, pd.DataFrame]) -> list[Headline]:
    """The three numbers that matter: rise of the test robust loss, robust loss gap, WCI.

    Gap and WCI are counted from the end of the last epoch before the first decay; where some run has no
    decay, from the epoch of the lowest test robust loss. Where some run has no value up to there, they are
    counted from the first values, and the headline says so.

    Args:
        runs: The runs to take means over.
        frames: The tables ``epochs`` and ``wci`` of these runs and perhaps of others.
    """
    own = by_run(frames["epochs"][["run", "epoch", "lr", TEST_ROBUST_LOSS, ROBUST_LOSS_GAP]])
    wci = by_run(frames["wci"][["run", "epoch", "wci"]])
    finished = [run for run in runs if not own[run.label].empty]
    lowest = {run.label: _lowest_loss(own[run.label]) for run in finished}
    anchors = {run.label: _before_decay(own[run.label]) for run in finished}
    start = "before the first decay"
    if None in anchors.values():
        start, anchors = "at the lowest test robust loss", lowest
    if all(anchor is None for anchor in anchors.values()):  # as of a model that was only measured
        start, anchors = "at the first epoch", {label: int(own[label]["epoch"].min()) for label in anchors}
    found = []
    for name, begin, first, of, column, since, missing in (
        ("test robust loss", "minimum", "", own, TEST_ROBUST_LOSS, lowest, "not recorded"),
        ("robust loss gap", start, "at the first evaluation", own, ROBUST_LOSS_GAP, anchors, "not recorded"),
        ("WCI", start, "at the first measurement", wci, "wci", anchors, "not measured"),
    ):
        found_pairs = [_between(of[run.label], column, since[run.label]) for run in finished]
        if any(
            pair and pair[0].epoch > (since[run.label] or 0)
            for run, pair in zip(finished, found_pairs, strict=True)
        ):
            begin, found_pairs = first, [_between(of[run.label], column, 0) for run in finished]
        of_group: dict[str, list[tuple[EpochValue, EpochValue]]] = {}
        for run, pair in zip(finished, found_pairs, strict=True):
            if pair is not None:
                of_group.setdefault(run.group, []).append(pair)
        changes = tuple(GroupChange(group, tuple(pairs)) for group, pairs in of_group.items())
        found.append(Headline(name, begin, changes, missing))
    return found


def correlation(x: pd.Series, y: pd.Series) -> float | None:
    """Pearson correlation of two aligned series; ``None`` for fewer than three pairs or a constant series."""
    pairs = pd.DataFrame({"x": x.to_numpy(dtype=float), "y": y.to_numpy(dtype=float)}).dropna()
    if len(pairs) < 3 or pairs["x"].nunique() < 2 or pairs["y"].nunique() < 2:
        return None
    return float(np.corrcoef(pairs["x"], pairs["y"])[0, 1])


def format_metric(column: Column, value: float) -> str:
    """A metric as people read it: errors in per cent with two decimals, losses with three; a dash for NaN."""
    if np.isnan(value):
        return "–"
    return f"{value * column.scale:.2f}" if column.scale > 1 else f"{value:.3f}"


def format_number(value: float) -> str:
    """About three significant digits; loss-sized numbers with three decimals."""
    if value == 0 or 5e-4 <= abs(value) < 10:
        return f"{value:.3f}"
    if 10 <= abs(value) < 1e5:
        return f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def _before_decay(epochs: pd.DataFrame) -> int | None:
    """The last epoch before the first decay."""
    decays, numbers = decay_epochs(epochs), epochs["epoch"].to_numpy()
    return int(numbers[numbers < decays[0]].max()) if decays else None


def _lowest_loss(epochs: pd.DataFrame) -> int | None:
    """The first epoch with the lowest test robust loss."""
    numbers, losses = _known(epochs, TEST_ROBUST_LOSS)
    return int(numbers[losses.argmin()]) if len(losses) else None


def _between(frame: pd.DataFrame, column: str, anchor: int | None) -> tuple[EpochValue, EpochValue] | None:
    """The number at the last epoch up to ``anchor`` (else the first there is) and at the last epoch."""
    epochs, values = _known(frame, column)
    if not len(values) or anchor is None:
        return None
    first = max(0, int(np.searchsorted(epochs, anchor, side="right")) - 1)
    start, end = (EpochValue(int(epochs[i]), float(values[i])) for i in (first, -1))
    return start, end


def _known(frame: pd.DataFrame, column: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The epochs at which a run has a number, and the numbers."""
    values = frame[column].to_numpy(dtype=float)
    known = ~np.isnan(values)
    return frame["epoch"].to_numpy()[known], values[known]
