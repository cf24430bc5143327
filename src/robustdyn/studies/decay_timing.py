"""When the learning rate first decays (WCI paper, figure 2 a)."""

from __future__ import annotations

from collections.abc import Sequence

from robustdyn.records.reader import Run
from robustdyn.studies.shared.one_factor import compared, first_decay
from robustdyn.studies.shared.study import Answer, Study


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    first = {run.path: first_decay(run).epoch for run in runs}
    ordered = sorted(runs, key=lambda run: first[run.path])
    return compared(
        ordered,
        lambda run: f"decay at {first[run.path]}",
        title="Robust overfitting by the epoch of the first decay",
        baseline=f"decay at {first[ordered[-1].path]}",
    )


STUDY = Study("Does it matter to robust overfitting when the learning rate first decays?", answer)
