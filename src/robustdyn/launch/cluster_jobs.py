"""Waits for the jobs of a sweep and reads how each has ended."""

import logging
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from hydra.core.utils import JobReturn
from submitit import Job
from submitit.core.utils import pickle_load
from submitit.slurm.slurm import SlurmInfoWatcher

from robustdyn.errors import ConfigError, UserError

log = logging.getLogger(__name__)

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 20.0
"""Time between two checks. It grows, so that long jobs do not keep SLURM's controller busy."""

GRACE_S = 15.0
"""How long after the end of a job its result may appear on a shared file system; as in submitit."""

GONE = "no longer in its queue"
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
         "PREEMPTED", "TIMEOUT", GONE}  # fmt: skip
"""States of a job that will not run again (squeue's manual, "job state codes")."""


class RunFailed(Exception):
    """Raised in the job of a run that failed; the message is the run's error in one line."""


class JobFailed(UserError):
    """A job of a sweep has no result; the message names the job, the error and the log file."""


class Failure(NamedTuple):
    """Why a job has no result: the error in one line, and the log file with the details."""

    error: str
    log: Path


class Queue(SlurmInfoWatcher):
    """Reads the states of jobs from ``squeue``, for submitit.

    submitit itself asks ``sacct``, which needs SLURM's accounting. Some clusters do not have it, and it lags.
    """

    def __init__(self) -> None:
        super().__init__(delay_s=int(LONGEST_PAUSE_S))
        self._ended_since: dict[str, float] = {}
        self._over: set[str] = set()
        self._held: set[str] = set()

    def _make_command(self) -> list[str]:
        """Ask for all jobs of the user, because squeue fails if it is asked for one that it has forgotten."""
        user = f"--user={os.getuid()}"
        return ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", user]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The states of the registered jobs in squeue's answer, except those that are over already."""
        answer = string if isinstance(string, str) else string.decode()
        lines = [line.split("|", 2) for line in answer.splitlines() if line.count("|") >= 2]
        known = {job: (state, reason) for job, state, reason in lines}
        states = {job: known.get(job, (GONE, "")) for job in self._registered - self._over}
        for job, (state, reason) in states.items():
            if "held" in reason and job not in self._held:
                self._held.add(job)
                log.warning(f"SLURM holds job {job} back ({reason}); to let it go: scontrol release {job}")
            if state not in ENDED:  # including a job that was requeued
                self._ended_since.pop(job, None)
            elif time.monotonic() - self._ended_since.setdefault(job, time.monotonic()) >= GRACE_S:
                self._over.add(job)
        return {job: {"State": state} for job, (state, _) in states.items()}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job ended so long ago that its result would be there by now."""
        self.update_if_long_enough(mode)
        return job_id in self._over


def queue_states(job_ids: Iterable[str]) -> dict[str, str]:
    """What SLURM says of these jobs now: ``UNKNOWN`` if it does not answer."""
    jobs, queue = list(job_ids), Queue()
    for job in jobs:
        queue.register_job(job)
    return {job: queue.get_state(job) for job in jobs}


def still_active(job_ids: Iterable[str]) -> list[str]:
    """The jobs among these that have not ended."""
    return [job for job, state in queue_states(job_ids).items() if state not in ENDED]


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel these jobs; those that have ended meanwhile do not matter.

    Raises:
        ConfigError: There is no SLURM here, or it does not take the request.
    """
    ids = list(job_ids)
    try:
        done = subprocess.run(["scancel", "--quiet", *ids], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("there is no SLURM on this machine (no scancel on the PATH)") from error
    if done.returncode and still_active(ids):
        raise ConfigError(f"scancel: {' '.join(done.stderr.split())}")


def wait(jobs: Mapping[int, Job[JobReturn]]) -> dict[int, JobReturn | Failure]:
    """Wait until all jobs are done.

    Args:
        jobs: By the number of the run.

    Returns:
        What each run returned, or why it failed.
    """
    outcomes: dict[int, JobReturn | Failure] = {}
    pause = SHORTEST_PAUSE_S
    while True:
        for number, job in jobs.items():
            if number not in outcomes and job.done():
                outcome = outcomes[number] = read_outcome(job)
                how = "failed" if isinstance(outcome, Failure) else "done"
                log.info(f"#{number}, job {job.job_id}: {how} ({len(outcomes)} of {len(jobs)})")
        if len(outcomes) == len(jobs):
            return outcomes
        time.sleep(pause)
        pause = min(1.1 * pause, LONGEST_PAUSE_S)


def read_outcome(job: Job[JobReturn]) -> JobReturn | Failure:
    """Read the result files that the processes of a finished job have written."""
    tasks = [job.task(rank) for rank in range(job.num_tasks)]
    left = {
        task: pickle_load(task.paths.result_pickle) for task in tasks if task.paths.result_pickle.exists()
    }
    errors = [task for task, (kind, _) in left.items() if kind == "error"]
    if errors:  # the earliest is the cause: other processes may have failed because that one was gone
        cause = min(errors, key=lambda task: task.paths.result_pickle.stat().st_mtime_ns)
        return Failure(last_line(left[cause][1]), cause.paths.stdout)
    if len(left) < len(tasks):
        return Failure(f"ended without a result; SLURM says {job.state}", tasks[0].paths.stdout)
    returned: JobReturn = left[tasks[0]][1]
    return returned


def last_line(trace: str) -> str:
    """The last line of a stack trace, without the module of the error."""
    line = trace.rstrip().rpartition("\n")[2]
    return re.sub(r"^(\w+\.)+(?=\w+(:|$))", "", line).removeprefix(f"{RunFailed.__name__}: ")
