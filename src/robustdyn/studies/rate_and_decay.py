"""Initial learning rate and decay factor (WCI paper, figure 2 b)."""

from __future__ import annotations

from collections.abc import Sequence

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run, read_table
from robustdyn.report.statistics import decay_epochs
from robustdyn.studies.shared.one_factor import compared
from robustdyn.studies.shared.study import Answer, Study

BASELINE = "0.1 → 0.01"  # best in the paper


def rates(run: Run) -> tuple[float, float]:
    """The rate before and after the first decay.

    Raises:
        RecordError: It never decays.
    """
    epochs = read_table(run.path, "epochs")
    decays = decay_epochs(epochs)
    if not decays:
        raise RecordError(f"{run.path}: its learning rate never decays; leave the run out")
    rate = epochs.set_index("epoch")["lr"]
    return float(rate.iloc[0]), float(rate.loc[decays[0]])


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    found = {run.path: rates(run) for run in runs}

    def setting(run: Run) -> str:
        before, after = found[run.path]
        return f"{before:g} → {after:.3g}"

    ordered = sorted(runs, key=lambda run: found[run.path], reverse=True)
    title = "Robust overfitting by learning rate before and after the decay"
    return compared(ordered, setting, title=title, baseline=BASELINE)


STUDY = Study(
    "Which initial learning rate and which decay leave the network most robust, best and final?", answer
)
