"""When the learning rate first decays (WCI paper, figure 2 a)."""

from __future__ import annotations

from collections.abc import Sequence

from robustdyn.errors import RecordError
from robustdyn.records.reader import Run, read_table
from robustdyn.report.statistics import decay_epochs
from robustdyn.studies.shared.one_factor import compared
from robustdyn.studies.shared.study import Answer, Study


def first_decay(run: Run) -> int:
    """The epoch at which the rate first fell.

    Raises:
        RecordError: It never did.
    """
    decays = decay_epochs(read_table(run.path, "epochs"))
    if not decays:
        raise RecordError(f"{run.path}: its learning rate never decays; leave the run out")
    return decays[0]


def answer(runs: Sequence[Run]) -> Answer:
    """See ``STUDY``."""
    first = {run.path: first_decay(run) for run in runs}

    def setting(run: Run) -> str:
        return f"decay at {first[run.path]}"

    ordered = sorted(runs, key=lambda run: first[run.path])
    title = "Robust overfitting by the epoch of the first decay"
    return compared(ordered, setting, title=title, baseline=setting(ordered[-1]))


STUDY = Study("Does it matter to robust overfitting when the learning rate first decays?", answer)
