"""Records and reads the status of runs: done, failed, unfinished, or missing from a sweep.

``status.json`` is replaced atomically when a run starts (``running``) and when it ends. A run is *done* if
its work returned without an error, either after ``trainer.max_epochs`` or earlier through early stopping. A
killed or interrupted run leaves ``running`` behind and is *unfinished*. Older versions wrote no status: their
runs are done when the record has as many epochs as were planned.
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from robustdyn.errors import RecordError, UserError
from robustdyn.records.files import sole_process
from robustdyn.records.labels import Setup, differences
from robustdyn.records.reader import Run, read_table
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.writer import _replace

LONGEST_NAME = 100  # bytes in the readable part of a folder's name; file systems allow 255
LONGEST_ERROR = 400  # characters of an error that was not written for the user

StateName = Literal["done", "failed", "unfinished", "missing"]
STATES: tuple[StateName, ...] = ("done", "failed", "unfinished", "missing")


class RunStatus:
    """Keeps ``status.json`` of a run directory while the run's work is done inside it.

    ``with RunStatus(run_dir, settings): ...`` writes ``running``, then ``done``, or ``failed`` with the error
    in one line after an exception. The traceback of any exception but a ``UserError`` goes to ``error.txt``.
    Ctrl-C, or a signal that ends the process, leaves ``running``: the run can be resumed.

    Args:
        run_dir: The run directory; made if absent.
        settings: The resolved configuration, with which ``is_done`` compares.
    """

    def __init__(self, run_dir: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self._run = RunDirectory(run_dir)
        self._settings = settings
        self._alone = ExitStack()

    def __enter__(self) -> RunStatus:
        """Lock the directory and write that the run is running.

        Raises:
            RecordError: Another process runs in the directory, or it cannot be written.
        """
        self._alone.enter_context(sole_process(self._run.path, "choose another hydra.run.dir"))
        self._run.traceback.unlink(missing_ok=True)
        for folder in (self._run.path, self._run.records, self._run.checkpoints):
            for left in folder.glob(".*.tmp"):  # from a process that was killed while writing
                left.unlink(missing_ok=True)
        self._write("running")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write how the run ended."""
        with self._alone:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self.done()
        elif isinstance(error, Exception):
            try:
                self._write("failed", one_line(error))
                if not isinstance(error, UserError):  # the message of a UserError says everything
                    text = "".join(traceback.format_exception(error))
                    self._run.traceback.write_text(text, encoding="utf-8")
            except (OSError, RecordError):
                return  # probably a full disk, which also ended the run: that error is the one to report

    def done(self) -> None:
        """Write that all of the run's work is done."""
        self._write("done")

    def _write(self, state: str, error: str | None = None) -> None:
        status = {"state": state, "error": error, "settings": self._settings}
        _replace(self._run.status, json.dumps(status, indent=1, default=str, ensure_ascii=False) + "\n")


def mark_done(run_dir: str | os.PathLike[str]) -> None:
    """Write that a run is done before ``RunStatus`` does, so that the run's own report shows it as done."""
    status = RunDirectory(run_dir).read_status()
    if status is not None:
        RunStatus(run_dir, status.get("settings") or {}).done()


def is_done(run_dir: str | os.PathLike[str], settings: Mapping[str, Any]) -> bool:
    """Whether the run in ``run_dir`` is done and had these settings, apart from where files go."""
    status = RunDirectory(run_dir).read_status()
    if status is None or status.get("state") != "done" or not status.get("settings"):
        return False
    # as they come back from the file, where JSON cannot hold every type
    now = json.loads(json.dumps(settings, default=str))
    setups = [Setup(Path(run_dir), config, (), {}, frozenset()) for config in (status["settings"], now)]
    return not differences(setups)


def one_line(error: BaseException) -> str:
    """An error as one line; its class is added unless the message was written for the user."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    text = text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class Plan:
    """The runs that a sweep was asked for.

    Attributes:
        jobs: The overrides of each run.
        swept: The keys that were given several values.
        without: Keys and sections that do not distinguish runs, because they only say where files go.
    """

    jobs: tuple[tuple[str, ...], ...]
    swept: tuple[str, ...]
    without: tuple[str, ...]


@dataclass(frozen=True)
class RunState:
    """The state of one run.

    Attributes:
        name: The overrides that tell it from the others, or its label.
        state: As described at the top of the module.
        epochs: Epochs finished.
        planned: Epochs asked for; None if its configuration does not say.
        error: The error of a failed run, in one line.
        run: The run; None if it is missing.
        asked: Whether the last command that started the sweep asked for it.
        overrides: What identifies it in its sweep; see ``identity``.
    """

    name: str
    state: StateName
    epochs: int = 0
    planned: int | None = None
    error: str | None = None
    run: Run | None = None
    asked: bool = True
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> Path | None:
        """Its directory; None if it is missing."""
        return None if self.run is None else self.run.path

    @property
    def remark(self) -> str:
        """A remark for people: the error, or how many epochs are finished."""
        if self.state == "failed":
            return self.error or "no error was recorded"
        if self.state == "missing":
            return "was never started"
        of = "" if self.planned is None else f" of {self.planned}"
        early = (
            " (stopped early)" if self.state == "done" and of and self.epochs < (self.planned or 0) else ""
        )
        return f"{self.epochs}{of} epochs finished{early}"

    @property
    def traceback(self) -> Path | None:
        """The file with the stack trace of a failed run, if there is one."""
        file = None if self.path is None else RunDirectory(self.path).traceback
        return file if file is not None and self.state == "failed" and file.is_file() else None


def identity(overrides: Sequence[str], without: Sequence[str]) -> tuple[str, ...]:
    """Identifies a run of a sweep: its overrides in sorted order, except those that ``without`` names."""
    return tuple(sorted(text for text in overrides if not is_of(text, without)))


def folder_name(overrides: Sequence[str], without: Sequence[str], swept: Sequence[str]) -> str:
    """The name of a run's folder in its sweep, which follows from the run's overrides alone.

    It does not depend on the order of the overrides or on the other runs, so that a sweep that is started
    again, or with more seeds, finds the runs that it has. Different overrides never share a name: if they are
    too long for one, eight digits of their hash are added.

    Args:
        overrides: The run's overrides.
        without: Keys and sections that do not distinguish runs.
        swept: Keys to keep in the name if it cannot hold all of them.
    """
    kept = identity(overrides, without)
    full = ",".join(kept)
    if "/" not in full and len(full.encode()) <= LONGEST_NAME:
        return full or "default"
    said = ",".join(text for text in kept if text.partition("=")[0].lstrip("+~") in swept) or full
    digest = hashlib.sha256(full.encode()).hexdigest()[:8]
    return f"{said.replace('/', '-').encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"


def run_states(runs: Sequence[Run], plan: Plan | None = None) -> list[RunState]:
    """The states of the runs: those of the plan in its order, then all others.

    Raises:
        RecordError: A record is broken.
    """
    if plan is None or not plan.jobs:
        return [_state(run, run.label, identity(run.overrides, ())) for run in runs]
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(identity(run.overrides, plan.without), []).append(run)
    asked = dict.fromkeys(identity(job, plan.without) for job in plan.jobs)
    everyone = [*asked, *(key for key in found if key not in asked)]
    common = set.intersection(*map(set, everyone))
    states = []
    for key in everyone:
        name = " ".join(text for text in key if text not in common)
        if key not in found:
            states.append(RunState(name or "default", "missing", overrides=key))
        states += [_state(run, name or run.label, key, asked=key in asked) for run in found.get(key, [])]
    return states


def count(states: Sequence[RunState]) -> str:
    """The number of runs in each state, as in ``22 done, 2 failed``."""
    numbers = Counter(state.state for state in states)
    return ", ".join(f"{numbers[state]} {state}" for state in STATES if numbers[state])


def _state(run: Run, name: str, overrides: tuple[str, ...], *, asked: bool = True) -> RunState:
    epochs = len(read_table(run.path, "epochs"))
    trainer = run.config.get("trainer")
    planned = trainer.get("max_epochs") if isinstance(trainer, Mapping) else None
    if not isinstance(planned, int) or planned < 0:
        planned = None
    status = RunDirectory(run.path).read_status()
    error = None
    state: StateName = "unfinished"
    if status is not None:
        if status.get("state") in ("done", "failed"):
            state = status["state"]
            error = status.get("error")
    elif planned is not None and epochs >= planned:
        state = "done"
    return RunState(name, state, epochs, planned, error, run, asked, overrides)


def is_of(text: str, keys: Sequence[str]) -> bool:
    """Whether an override sets one of these keys, or a key in one of these sections."""
    name = text.lstrip("+~").partition("=")[0].partition("@")[0]
    return any(name == key or name.startswith((f"{key}.", f"{key}/")) for key in keys)
