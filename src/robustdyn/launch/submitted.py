"""Records which job of SLURM trains which run of a sweep: ``jobs.json`` in the folder of the sweep."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from robustdyn.errors import RecordError
from robustdyn.records.files import read_object, replace_file

JOBS = "jobs.json"
JOB = re.compile(r"\d+(_\d+)?")
"""SLURM's number of a job, or of one job of an array."""


@dataclass(frozen=True)
class SubmittedRun:
    """The run of one job.

    Attributes:
        run: The overrides that identify the run in its sweep; see ``robustdyn.records.progress.identity``.
        log: The log file of the job's first process.
    """

    run: tuple[str, ...]
    log: str


@dataclass
class SubmittedJobs:
    """All jobs that were submitted for a sweep, the newest last.

    Attributes:
        folder: The folder of the sweep.
        runs: By the number of the job.
        report: The job that builds the report after all others; None if a command waits for them.
    """

    folder: Path
    runs: dict[str, SubmittedRun] = field(default_factory=dict)
    report: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "SubmittedJobs":
        """The jobs of a sweep; none if there is no file.

        Raises:
            RecordError: The file is not one that ``write`` has written.
        """
        if not (folder / JOBS).exists():
            return cls(folder)
        content = read_object(folder / JOBS) or {}
        runs, report = content.get("runs"), content.get("report")
        if not (
            isinstance(runs, dict)
            and all(JOB.fullmatch(job) and _is_run(run) for job, run in runs.items())
            and (report is None or (isinstance(report, str) and JOB.fullmatch(report)))
        ):
            raise RecordError(f"{folder / JOBS}: not a list of jobs; restore it, or remove it")
        return cls(folder, {job: SubmittedRun(tuple(v["run"]), v["log"]) for job, v in runs.items()}, report)

    def write(self) -> None:
        """Replace the file."""
        content = {"report": self.report, "runs": {job: asdict(run) for job, run in self.runs.items()}}
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / JOBS, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def _is_run(run: object) -> bool:
    if not isinstance(run, Mapping) or not isinstance(run.get("run"), list):
        return False
    return all(isinstance(text, str) for text in (*run["run"], run.get("log")))
