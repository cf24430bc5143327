"""Shows a training run's records on Weights & Biases, or writes them to a file to upload later.

Facts about wandb 0.31 that shape this module, each covered by a test: wandb drops a second ``log`` at a
committed step. ``wandb sync`` appends an offline file to the server's run and renumbers its steps if the
file says ``resume``; otherwise the file replaces the run. The service keeps the id of a run whose ``init``
failed. A resumed session starts the running minimum of a summary again.
"""

import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_only

from robustdyn.records import TABLES, read_table
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import (
    GRADIENT_NOISE,
    HESSIAN_EIGENVALUE,
    NOISE_EIGENVALUE,
    RITZ_VALUE,
    WCI_TERM,
)
from robustdyn.run.publishing import CurveLogger, Moment, brief

TABLES_SHOWN = ("spectrum", "layers", "density", "posterior")
HISTOGRAMS = {
    "spectrum": (HESSIAN_EIGENVALUE, GRADIENT_NOISE, NOISE_EIGENVALUE),
    "layers": (WCI_TERM,),
}
BINS = 64  # what wandb draws of a histogram

_log = logging.getLogger(__name__)


class WandbRecords(CurveLogger, WandbLogger):
    """Shows a run's records on Weights & Biases, under one id however often the run is resumed.

    The step of wandb is the number of optimiser steps. Curves are drawn over ``epoch``, and ``rates`` over
    its own step. A step that the server has is not sent again. Offline, every session writes one file with
    the whole run and removes the files of earlier sessions.

    Lightning's ``WandbLogger`` starts wandb's run when a trainer is set up, asks for a login on the terminal
    and lets every error of wandb end the training. This class starts the run with the records, asks nothing
    and raises errors only to the publisher. Without a login, without an answer in ``init_timeout`` seconds,
    or when wandb fails later, the run is written offline from its first row, and one line says so. All files
    are in ``DIRECTORY/wandb``; the id is in ``run.json`` there.

    Args:
        directory: The run directory.
        offline: Whether to write a file for ``wandb sync`` instead of connecting.
        init_timeout: Seconds to wait for the server's first answer.
        finish_timeout: Seconds to wait for uploads when the run ends.
        figures: Whether to show the report's figures.
        checkpoints: Which checkpoints to upload as artifacts when the run has ended.
        settings: Further fields of ``wandb.Settings``.
        init: Further arguments of Lightning's logger and of ``wandb.init``, e.g. ``project`` and ``tags``.

    Raises:
        ValueError: ``checkpoints`` or a timeout has an impossible value.
    """

    def __init__(
        self,
        *,
        directory: str,
        offline: bool,
        init_timeout: float,
        finish_timeout: float,
        figures: bool,
        checkpoints: Literal["none", "best", "last", "all"],
        settings: Mapping[str, Any],
        **init: Any,
    ) -> None:
        timeouts = {"init_timeout": init_timeout, "finish_timeout": finish_timeout}
        for what, seconds in timeouts.items():
            if not seconds > 0:
                raise ValueError(f"{what}={seconds} must be a positive number of seconds")
        self._directory = RunDirectory(directory)
        best, last = self._directory.best_checkpoint("*"), self._directory.last_checkpoint
        patterns = {"none": None, "best": best.name, "last": last.name, "all": "*.ckpt"}
        if checkpoints not in patterns:
            raise ValueError(f"checkpoints={checkpoints} must be none, best, last or all")
        quiet = {"console": "off", "silent": True, "finish_timeout_raises": True}
        settings = {**quiet, **timeouts, **settings}
        WandbLogger.__init__(self, save_dir=directory, settings=settings, config={}, **init)
        CurveLogger.__init__(self, self)
        del self._wandb_init["anonymous"]  # wandb warns of it
        self._checkpoints = patterns[checkpoints]
        self.shows_figures = figures
        self.complete = False  # whether an earlier session had the whole run
        self._state = self._directory.wandb / "run.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._state.read_text())
            self._id, self.complete = str(state["id"]), bool(state["complete"])
        # Lightning's ``offline`` sets WANDB_MODE for the rest of the process: for the next run of a sweep too
        offline = offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        self._wandb_init["mode"] = "offline" if offline else None
        self._environment: dict[str, str] = {}
        self._error: Exception | None = None
        self._concluded = False
        self._defined: set[str] = set()
        # best values so far: wandb's own start again in every session
        self._best: dict[str, float] = {}

    # Lightning's interface

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb; before its start and after its end an object that accepts every call.

        Lightning asks for it during setup, when it is not yet known whether there is anything to log.
        """
        return DummyExperiment() if self._experiment is None else self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the configuration, which is sent when the run starts."""
        self._wandb_init["config"].update(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what a module or a callback passes to ``self.log``; ``update`` logs the records.

        The next ``update`` raises an error that occurs here.
        """
        if self._experiment is None or self._error is not None:
            return
        run = self._experiment
        try:
            # no step below that of an earlier row, or wandb would drop the values
            run.log({**metrics, "trainer/global_step": step}, step=max(step or 0, run.step))
        except Exception as error:
            self._error = error

    # the records

    def follow(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Start the run with the configuration and all rows that the server does not have."""
        self.log_hyperparams(config)
        run = self._begin()
        place = run.url or "disabled"
        if self._wandb_init["mode"] == "offline":
            place = f"offline, to upload: wandb sync {Path(run.dir).parent}"
        _log.info("wandb: %s", place)
        sys.stderr.write(f"wandb: {place}\n")
        sys.stderr.flush()
        super().follow(run_dir, config)

    def update(self) -> None:
        """Log the rows recorded since the last call."""
        if self._error is not None:
            raise self._error
        super().update()

    def conclude(self) -> None:
        """Log the tables whose rows are more than a curve."""
        self._concluded = True
        media = {}
        for table in TABLES_SHOWN:
            frame = read_table(self._directory.path, table).dropna(axis="columns", how="all").astype(object)
            if len(frame):
                frame = frame.where(frame.notna(), None)  # JSON has no other missing value
                media[f"tables/{table}"] = wandb.Table(dataframe=frame, allow_mixed_types=True)
        if media:
            self.experiment.log(media)

    def show(self, figures: Mapping[str, Path]) -> None:
        """Log the report's figures."""
        if self.shows_figures and figures:
            self.experiment.log({f"figures/{name}": wandb.Image(str(p)) for name, p in figures.items()})

    def finish(self, *, failed: bool) -> None:
        """Upload the rest and end the run of wandb with its threads and its service."""
        complete = self._concluded and not failed
        if complete:
            self._log_checkpoints()
        run, self._experiment = self._experiment, None
        try:
            if run is not None:
                run.finish(exit_code=int(failed))
                self._save_state(complete=complete)
        finally:
            with suppress(Exception):
                wandb.teardown()
            wandb.run = None  # the next job would log to a run that could not be finished
            while self._environment:
                os.environ.pop(self._environment.popitem()[0], None)

    def recover(self, error: Exception) -> bool:
        """Report an error, and return whether to start again offline; a second failure ends the logging."""
        if self._wandb_init["mode"] == "offline":
            _log.warning("wandb: %s; the run continues without it, its records are complete", brief(error))
            return False
        _log.warning("wandb: %s; the run continues, offline", brief(error))
        if self._feed is None:
            self._remove_files("run")  # an attempt without a row
        self._wandb_init["mode"] = "offline"
        return True

    def _begin(self) -> Any:
        """Start the run in Lightning's logger and return it.

        Raises:
            Exception: Whatever wandb cannot do.
        """
        folder = self._directory.wandb
        wanted = {
            "WANDB_SILENT": "true",
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_ARTIFACT_DIR": str(folder / "artifacts"),
        }
        # wandb reads these only from the environment; what the user has set stays
        self._environment = {name: value for name, value in wanted.items() if name not in os.environ}
        os.environ.update(self._environment)
        mode = self._wandb_init["mode"] or os.environ.get("WANDB_MODE")
        if mode not in ("offline", "disabled") and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("no login; `wandb login` once, or WANDB_API_KEY, would change that")
        # the agent of a sweep gives the id of the run
        given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        self._id = given or self._id or uuid.uuid4().hex[:8]
        # an offline file holds the whole run and must replace the server's
        self._wandb_init |= {"id": self._id, "resume": None if mode == "offline" else "allow"}
        self._save_state(complete=False)
        self._remove_files("offline-run")  # all their rows are sent again
        run = super().experiment
        self._defined, self._error = set(), None
        # Lightning's axis for what modules log; without step_sync, rows of the records do not get it too
        run.define_metric("*", step_metric="trainer/global_step", step_sync=False, overwrite=True)
        return run

    def _save_state(self, *, complete: bool) -> None:
        self._state.parent.mkdir(parents=True, exist_ok=True)
        self._state.write_text(json.dumps({"id": self._id, "complete": complete}) + "\n")

    def _remove_files(self, kind: str) -> None:
        for folder in self._directory.wandb.glob(f"{kind}-*-{self._id}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _log_checkpoints(self) -> None:
        pattern = self._checkpoints
        for file in sorted(self._directory.checkpoints.glob(pattern)) if pattern else ():
            artifact = wandb.Artifact(f"checkpoint-{self._id}", type="model")
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
            self.experiment.log_artifact(artifact, aliases=[file.stem])

    def _take(self, moments: Iterable[Moment]) -> None:
        run = self.experiment
        for moment in moments:
            curves = moment.curves()
            self._note_best(curves)
            if moment.step < run.starting_step:
                continue  # the server has it
            values: dict[str, Any] = {"epoch": moment.epoch, **curves, **histograms(moment)}
            for name in values.keys() - self._defined:
                own = name in ("epoch", "rates/step")
                axis = "rates/step" if name.startswith("rates/") else "epoch"
                run.define_metric(name, step_metric=None if own else axis, hidden=own or None)
            self._defined |= values.keys()
            # ``log_metrics`` may have logged at a later step
            run.log(values, step=max(moment.step, run.step), commit=True)
        run.summary.update(self._best | dict(_summary(self._directory.summary)))

    def _note_best(self, curves: Mapping[str, float]) -> None:
        for name, value in curves.items():
            table, column = name.split("/")[:2]
            better = TABLES[table][column].better
            if better is not None:
                kind, choose = ("min", min) if better == "lower" else ("max", max)
                self._best[f"{kind}/{name}"] = choose(value, self._best.get(f"{kind}/{name}", value))


def histograms(moment: Moment) -> dict[str, wandb.Histogram]:
    """Return the spectra of a moment as ``histograms/<column>``, and densities as mass over eigenvalues."""
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
            [row[RITZ_VALUE] for row in own], bins=BINS, weights=[row["mass"] for row in own]
        )
        probes = len({row["probe"] for row in own})
        found[f"histograms/density_{kind}"] = wandb.Histogram(np_histogram=(mass / probes, edges))
    return found


def _summary(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the values of ``summary.json`` by names such as ``best_on_test/test_robust_error``."""
    if not path.is_file():
        return
    for key, value in json.loads(path.read_text()).items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", item) for name, item in value.items())
        else:
            yield key, value
