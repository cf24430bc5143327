"""A training run on Weights & Biases: what its records say, online, or in a file to upload later.

Facts about wandb 0.31 that shape this module, each held by a test: a second ``log`` at a committed step is
dropped; an offline file whose run says ``resume`` is appended on ``wandb sync`` and its steps renumbered, one
that does not replaces what the server has; the service keeps the id of a run whose ``init`` failed; the
running minimum in a summary starts afresh in a resumed session.
"""

import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_only

from robustdyn.records import TABLES, read_table
from robustdyn.records.run_directory import RunDirectory
from robustdyn.run.publishing import Moment, RecordFeed, brief

TABLES_SHOWN = ("spectrum", "layers", "density", "posterior")
HISTOGRAMS = {
    "spectrum": ("hessian_eigenvalue", "gradient_noise", "noise_eigenvalue"),
    "layers": ("wci_term",),
}
BINS = 64  # what wandb draws of a histogram

_log = logging.getLogger(__name__)

Checkpoints = Literal["none", "best", "last", "all"]


class WandbRecords(Logger):
    """A run's records on Weights & Biases, under one id however often the run is resumed.

    wandb's step is the number of optimiser steps; curves are drawn over ``epoch`` (``rates`` over its own
    step). A step that the server has is not sent again. Offline, every session writes one file with the whole
    run, in place of its predecessors' files.

    Whatever wandb does, training goes on: without a login, without an answer in ``init_timeout`` seconds, or
    when wandb breaks off later, the run is written offline from its first row, with one line that says so.
    Nothing is ever asked on the terminal. All files lie in ``DIRECTORY/wandb``, the id in ``run.json`` there.

    Args:
        directory: The run directory.
        project: wandb's project.
        entity: User or team; None for the login's default.
        name: Of the run.
        group: Of the run, a sweep say.
        tags: Of the run.
        job_type: Of the run.
        offline: Whether to write a file for ``wandb sync`` and not to connect.
        init_timeout: Seconds to wait for the server's first answer.
        finish_timeout: Seconds to wait for uploads when the run ends.
        figures: Whether to show the report's figures.
        checkpoints: Which to keep as artifacts when the run has ended.
        settings: More of ``wandb.Settings``.
    """

    def __init__(
        self,
        *,
        directory: str,
        project: str,
        entity: str | None,
        name: str | None,
        group: str | None,
        tags: list[str],
        job_type: str,
        offline: bool,
        init_timeout: float,
        finish_timeout: float,
        figures: bool,
        checkpoints: Checkpoints,
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if checkpoints not in ("none", "best", "last", "all"):
            raise ValueError(f"checkpoints={checkpoints} must be none, best, last or all")
        for what, seconds in (("init_timeout", init_timeout), ("finish_timeout", finish_timeout)):
            if not seconds > 0:
                raise ValueError(f"{what}={seconds} must be a positive number of seconds")
        self.shows_figures = figures
        self._directory = RunDirectory(directory)
        self._project = project
        self._identity: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "name": name,
            "group": group,
            "tags": list(tags),
            "job_type": job_type,
        }
        self._offline = offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        self._checkpoints = checkpoints
        self._timeouts = {"init_timeout": init_timeout, "finish_timeout": finish_timeout}
        self._settings = dict(settings)
        self._state = _State(self._directory.wandb / "run.json")
        self._environment = _Environment(self._directory.wandb)
        self._config: dict[str, Any] = {}
        self._run: wandb.Run | None = None
        self._given_up = False
        self._feed: RecordFeed | None = None
        self._first_step = 0  # what is before it the server has
        self._next_step = 0  # of wandb's log
        self._defined: set[str] = set()
        # by hand: wandb's own summaries start afresh with every session
        self._best: dict[str, float] = {}
        self._concluded = False
        self._figures: dict[str, Path] = {}

    # Lightning's interface

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str | None:
        """The run's id, once it has one."""
        return self._state.id

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self._directory.path)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; something that takes every call and does nothing before training starts, or without wandb.

        Lightning asks for it while it sets up, when it is not yet known whether there is anything to do.
        """
        return DummyExperiment() if self._run is None else self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Take the configuration."""
        self._config |= dict(params)
        if self._run is not None:
            self._guard(lambda run: run.config.update(self._config, allow_val_change=True), again=False)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """What a module or callback hands to ``self.log``; the records come through ``update``."""
        self._open()
        # never ahead of the next moment of the record, or that would be dropped
        self._next_step = max(step or 0, self._next_step)
        self._guard(lambda run: run.log(dict(metrics), step=self._next_step))

    # the records

    @property
    def complete(self) -> bool:
        """Whether an earlier session had the whole run."""
        return self._state.complete

    def follow(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Begin, or go on, with the records as they are now."""
        self._config |= dict(config)
        self._feed = RecordFeed(run_dir)
        self._open()
        self.update()

    def update(self) -> None:
        """Log what was recorded since."""
        self._guard(self._log_new, again=False)

    def conclude(self) -> None:
        """Log the tables whose rows are more than a curve."""
        self._concluded = True
        self._guard(self._log_tables, again=False)

    def show(self, figures: Mapping[str, Path]) -> None:
        """Log the report's figures."""
        if self.shows_figures and figures:
            self._figures = dict(figures)
            self._guard(self._log_figures, again=False)

    def finish(self, *, failed: bool) -> None:
        """Upload the rest and end wandb's run and service."""
        if not failed and self._concluded:
            self._guard(self._log_checkpoints)
        self._guard(lambda run: run.finish(exit_code=int(failed)))
        if self._run is not None and self._concluded and not failed:
            self._state.save(self._run.id, complete=True)
        self._stop_run()
        self._environment.restore()

    # sessions

    def _open(self) -> None:
        """Begin wandb's run, if it has not."""
        if self._run is not None or self._given_up:
            return
        self._environment.set()
        try:
            self._begin(offline=self._offline)
        except Exception as error:
            if self._offline:
                self._give_up(error)
            else:
                self._fall_back(error)

    def _begin(self, *, offline: bool) -> None:
        """Begin a session.

        Raises:
            Exception: Whatever wandb cannot do.
        """
        if not offline and not self._may_log_in():
            raise _NoLoginError("no login; `wandb login` once, or WANDB_API_KEY, would change that")
        known = self._state.settle_id()
        if offline:
            self._remove_files("offline-run")
        run = wandb.init(
            **self._identity,
            id=self._state.id,
            # an offline file is whole, and must replace what the server has
            resume="allow" if known and not offline else None,
            mode="offline" if offline else None,
            dir=str(self._directory.path),
            config=self._config,
            settings=wandb.Settings(
                **{
                    "console": "off",
                    "silent": True,
                    "finish_timeout_raises": True,
                    **self._timeouts,
                    **self._settings,
                }
            ),
        )
        self._run = run
        self._state.save(run.id)
        self._first_step = self._next_step = run.starting_step
        self._defined = set()
        self._define("epoch", None, hidden=True)
        where = f"offline, to upload: wandb sync {Path(run.dir).parent}" if offline else run.url or "disabled"
        _say(where)
        if not offline:
            self._remove_files("offline-run")  # all they hold is sent again

    def _may_log_in(self) -> bool:
        if os.environ.get("WANDB_MODE") == "disabled":
            return True
        return wandb.login(prompt=False, verify=False)

    def _fall_back(self, error: BaseException) -> None:
        """Write the run offline, from its first row."""
        began = self._run is not None
        self._stop_run()
        _log.warning("wandb: %s; the run goes on, offline", brief(error))
        if not began:
            self._remove_files("run")  # an attempt without a row
        self._offline = True
        self._open()
        self._guard(self._log_everything, again=False)

    def _give_up(self, error: BaseException) -> None:
        self._given_up = True
        self._stop_run()
        self._environment.restore()
        _log.warning("wandb: %s; the run goes on without it, its records are complete", brief(error))

    def _guard(self, action: Callable[[wandb.Run], object], *, again: bool = True) -> None:
        """Do it; if it fails, go on offline, where all is logged anew, and then, if ``again``, do this."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            if self._offline:
                self._give_up(error)
                return
            self._fall_back(error)
            if again:
                self._guard(action)

    def _stop_run(self) -> None:
        """End wandb's run, if it has not ended, its threads and its service."""
        run, self._run = self._run, None
        if run is not None:
            with suppress(Exception):
                run.finish(exit_code=1)
        with suppress(Exception):
            wandb.teardown()
        wandb.run = None  # a run that could not be finished would be taken for that of the next job

    def _remove_files(self, kind: str) -> None:
        for folder in self._directory.wandb.glob(f"{kind}-*-{self._state.id}*"):
            shutil.rmtree(folder, ignore_errors=True)

    # what is logged

    def _log_everything(self, run: wandb.Run) -> None:
        if self._feed is not None:
            self._feed = RecordFeed(self._feed.run_dir)
        self._log_new(run)
        if self._concluded:
            self._log_tables(run)
        if self._figures:
            self._log_figures(run)

    def _log_new(self, run: wandb.Run) -> None:
        if self._feed is None:
            return
        for moment in self._feed.moments():
            curves = moment.curves()
            self._note_best(curves)
            if moment.step < self._first_step:
                continue
            values: dict[str, Any] = {"epoch": moment.epoch, **curves}
            for name in curves:
                x = "rates/step" if name.startswith("rates/") else "epoch"
                self._define(name, None if name == x else x, hidden=name == x)
            for name, histogram in histograms(moment).items():
                self._define(name, "epoch")
                values[name] = histogram
            self._commit(run, values, moment.step)
        run.summary.update(self._best | dict(_summary(self._directory.summary)))

    def _log_tables(self, run: wandb.Run) -> None:
        media = {}
        for table in TABLES_SHOWN:
            frame = read_table(self._directory.path, table).dropna(axis="columns", how="all")
            if len(frame):
                rows: list[Iterable[Any]] = [
                    [_value(cell) for cell in row] for row in frame.itertuples(index=False)
                ]
                media[f"tables/{table}"] = wandb.Table(
                    columns=list(frame.columns), data=rows, allow_mixed_types=True
                )
        self._log_media(run, media)

    def _log_figures(self, run: wandb.Run) -> None:
        self._log_media(run, {f"figures/{name}": wandb.Image(str(p)) for name, p in self._figures.items()})

    def _log_media(self, run: wandb.Run, media: dict[str, Any]) -> None:
        if media:
            self._commit(run, media, self._next_step)

    def _commit(self, run: wandb.Run, values: dict[str, Any], step: int) -> None:
        step = max(step, self._next_step)  # not before what ``log_metrics`` may have logged
        self._next_step = step + 1
        run.log(values, step=step, commit=True)

    def _log_checkpoints(self, run: wandb.Run) -> None:
        best, last = self._directory.best_checkpoint("*"), self._directory.last_checkpoint
        patterns = {"none": "", "best": best.name, "last": last.name, "all": "*.ckpt"}
        pattern = patterns[self._checkpoints]
        for file in sorted(self._directory.checkpoints.glob(pattern)) if pattern else ():
            artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model")
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
            run.log_artifact(artifact, aliases=[file.stem])

    def _note_best(self, curves: Mapping[str, float]) -> None:
        for name, value in curves.items():
            table, column = name.split("/")[:2]
            better = TABLES[table][column].better
            if better is not None:
                kind, choose = ("min", min) if better == "lower" else ("max", max)
                self._best[f"{kind}/{name}"] = choose(value, self._best.get(f"{kind}/{name}", value))

    def _define(self, name: str, x: str | None, **settings: Any) -> None:
        if name not in self._defined and self._run is not None:
            self._defined.add(name)
            self._run.define_metric(name, step_metric=x, **settings)


def histograms(moment: Moment) -> dict[str, wandb.Histogram]:
    """The spectra of a moment, as ``histograms/<column>``; of a density, its mass over the eigenvalues."""
    found: dict[str, wandb.Histogram] = {}
    for table, columns in HISTOGRAMS.items():
        rows = [row for name, row in moment.rows if name == table]
        for column in columns:
            values = [row[column] for row in rows if row.get(column) is not None]
            if values:
                found[f"histograms/{column}"] = wandb.Histogram(np_histogram=np.histogram(values, bins=BINS))
    nodes = [row for name, row in moment.rows if name == "density"]
    for kind in sorted({row["kind"] for row in nodes}):
        own = [row for row in nodes if row["kind"] == kind]
        mass, edges = np.histogram(
            [row["ritz_value"] for row in own], bins=BINS, weights=[row["mass"] for row in own]
        )
        probes = len({row["probe"] for row in own})
        found[f"histograms/density_{kind}"] = wandb.Histogram(np_histogram=(mass / probes, edges))
    return found


def _summary(path: Path) -> Iterator[tuple[str, Any]]:
    """What ``summary.json`` says: ``best_on_test/test_robust_error``, ..."""
    if not path.is_file():
        return
    for key, value in json.loads(path.read_text()).items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", item) for name, item in value.items())
        else:
            yield key, value


def _value(cell: Any) -> Any:
    """As JSON can hold it."""
    if cell is None or cell != cell or str(cell) == "<NA>":
        return None
    return cell.item() if hasattr(cell, "item") else cell


class _NoLoginError(Exception):
    """wandb has no credentials."""


class _State:
    """The run's id, kept in the run directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id: str | None = None
        self.complete = False
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(path.read_text())
            self.id, self.complete = str(state["id"]), bool(state["complete"])

    def settle_id(self) -> bool:
        """Have an id; whether an earlier session had it."""
        # a sweep agent's run has the id that the agent gave it
        given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        known = self.id is not None and given in (None, self.id)
        if not known:
            self.save(given or uuid.uuid4().hex[:8])
        return known

    def save(self, run_id: str, *, complete: bool = False) -> None:
        """Keep it, and whether the run is complete."""
        self.id, self.complete = run_id, complete
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"id": run_id, "complete": complete}) + "\n")


class _Environment:
    """What of wandb can only be set in the environment, while a run lasts; the user's own settings stay."""

    def __init__(self, folder: Path) -> None:
        self._wanted = {
            "WANDB_SILENT": "true",
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_ARTIFACT_DIR": str(folder / "artifacts"),
        }
        self._set: list[str] = []

    def set(self) -> None:
        for name, value in self._wanted.items():
            if name not in os.environ:
                os.environ[name] = value
                self._set.append(name)

    def restore(self) -> None:
        while self._set:
            os.environ.pop(self._set.pop(), None)


def _say(where: str) -> None:
    """One line on where the run is."""
    _log.info("wandb: %s", where)
    sys.stderr.write(f"wandb: {where}\n")
    sys.stderr.flush()
