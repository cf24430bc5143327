"""Initial learning rate and decay factor (WCI paper, figure 2 b)."""

from __future__ import annotations

from collections.abc import Sequence

from robustdyn.records.reader import Run
from robustdyn.studies.shared.one_factor import compared, first_decay
from robustdyn.studies.shared.study import Answer, Study


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    decay = {run.path: first_decay(run) for run in runs}
    rates = {path: (found.before, found.after) for path, found in decay.items()}
    return compared(
        sorted(runs, key=lambda run: rates[run.path], reverse=True),
        lambda run: "{:g} → {:.3g}".format(*rates[run.path]),
        title="Robust overfitting by learning rate before and after the decay",
        baseline="0.1 → 0.01",  # best in the paper
    )


STUDY = Study(
    "Which initial learning rate and which decay leave the network most robust, best and final?", answer
)
