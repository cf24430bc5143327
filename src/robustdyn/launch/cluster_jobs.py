"""How submitted runs end: results, exceptions, and jobs that die without either."""

import contextlib
import logging
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from robustdyn.errors import UserError

log = logging.getLogger(__name__)

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 20.0
"""Between two looks: short jobs' results come at once, and long jobs do not keep SLURM's controller busy."""

GRACE_S = 15.0
"""What a result may take to appear on a shared file system when its job has ended; submitit waits as long."""

UNKNOWN = "no longer in its queue"
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
    UNKNOWN,
}
"""States of a job that will not run again (squeue's manual, "job state codes")."""

ERROR_LENGTH = 200


class JobFailed(UserError):
    """A job of a sweep that came to no result; the message names the job, the error and the log file."""


@dataclass(frozen=True)
class SubmittedRun:
    """One run of a sweep and the job that it became.

    Attributes:
        number: Hydra's number of the run in its sweep.
        overrides: Its configuration, as Hydra's sweeper put it together.
        label: Those that tell it from the other runs.
        job: submitit's, with one task for each process.
    """

    number: int
    overrides: tuple[str, ...]
    label: str
    job: Any

    @property
    def tasks(self) -> list[Any]:
        """Its processes, by rank."""
        return [self.job.task(rank) for rank in range(self.job.num_tasks)]


@dataclass(frozen=True)
class Failure:
    """Why a run has no result.

    Attributes:
        error: One line.
        log: The file that says more.
    """

    error: str
    log: Path


Outcome = JobReturn | Failure


def wait(runs: Sequence[SubmittedRun]) -> list[Outcome]:
    """Wait for all; every run's outcome, in order."""
    outcomes: dict[int, Outcome] = {}
    ended_since: dict[int, float] = {}
    held: set[str] = set()
    pause = SHORTEST_PAUSE_S
    while True:
        waiting = [run for run in runs if run.number not in outcomes]
        states = job_states([run.job.job_id for run in waiting])
        for run in waiting:
            job, (state, reason) = run.job.job_id, states.get(run.job.job_id, ("", ""))
            if "held" in reason and job not in held:
                held.add(job)
                log.warning(f"SLURM holds job {job} back ({reason}); to let it go: scontrol release {job}")
            if state in ENDED:
                ended_since.setdefault(run.number, time.monotonic())
            else:  # also one that was requeued
                ended_since.pop(run.number, None)
            over = time.monotonic() - ended_since.get(run.number, time.monotonic()) >= GRACE_S
            outcome = read_outcome(run, state if over else None)
            if outcome is not None:
                outcomes[run.number] = outcome
                how = "failed" if isinstance(outcome, Failure) else "done"
                log.info(f"#{run.number}, job {job}: {how} ({len(outcomes)} of {len(runs)})")
        if len(outcomes) == len(runs):
            return [outcomes[run.number] for run in runs]
        time.sleep(pause)
        pause = min(1.1 * pause, LONGEST_PAUSE_S)


def job_states(job_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """SLURM's state of each job and the reason for it; nothing while its controller does not answer.

    It asks the queue, not the accounting, which some clusters do not have and which lags.
    """
    if not job_ids:
        return {}
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    command = [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        "--format=%i|%T|%r",
        f"--jobs={','.join(arrays)}",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        return {}
    lines = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]
    known = {job_id: (state, reason) for job_id, state, reason in lines}
    return {job_id: known.get(job_id, (UNKNOWN, "")) for job_id in job_ids}


def read_outcome(run: SubmittedRun, ended_as: str | None) -> Outcome | None:
    """What the run's processes left behind; None if there may be more to come.

    Args:
        run: The run.
        ended_as: SLURM's state of a job that ended a while ago, so that nothing more will come; else None.
    """
    from submitit.core.utils import pickle_load

    left = [task for task in run.tasks if _exists(task.paths.result_pickle)]
    if len(left) < len(run.tasks) and ended_as is None:
        return None
    results = [pickle_load(task.paths.result_pickle) for task in left]
    errors = [(task.paths, text) for task, (kind, text) in zip(left, results, strict=True) if kind == "error"]
    if errors:  # the first one in time is the cause; other processes may have failed because it was gone
        paths, text = min(errors, key=lambda error: error[0].result_pickle.stat().st_mtime_ns)
        return Failure(last_error(text), Path(paths.stdout))
    if len(left) < len(run.tasks):
        return Failure(f"ended without a result; SLURM says {ended_as}", Path(run.tasks[0].paths.stdout))
    returned: JobReturn = results[0][1]
    return returned


def last_error(trace: str) -> str:
    """``ValueError: what happened`` from a stack trace."""
    lines = trace.rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    after = lines[frames[-1] + 1 :] if frames else lines
    message = " ".join(dropwhile(lambda line: line.startswith(" "), after))
    text = re.sub(r"^(\w+\.)+(?=\w+(:|$))", "", " ".join(message.split()))  # the class without its module
    return text if len(text) <= ERROR_LENGTH else f"{text[: ERROR_LENGTH - 3]}..."


def report(runs: Sequence[SubmittedRun], outcomes: Sequence[Outcome]) -> None:
    """List all that failed, on standard error: job, overrides, error, log file."""
    failed = [(r, o) for r, o in zip(runs, outcomes, strict=True) if isinstance(o, Failure)]
    lines = [f"{len(failed)} of {len(runs)} jobs failed:"] if failed else []
    lines += [f"  {run.job.job_id}  {run.label}  {failure.error}  {failure.log}" for run, failure in failed]
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def _exists(path: Path) -> bool:
    """Also where a network file system remembers that it was not there."""
    with contextlib.suppress(OSError):
        path.parent.chmod(path.parent.stat().st_mode)
    return path.exists()


def as_job_return(run: SubmittedRun, outcome: Outcome) -> JobReturn:
    """The outcome as Hydra's sweeper wants it."""
    if isinstance(outcome, JobReturn):
        return outcome
    error = JobFailed(f"job {run.job.job_id} ({run.label}): {outcome.error}; log: {outcome.log}")
    return JobReturn(overrides=list(run.overrides), status=JobStatus.FAILED, _return_value=error)
