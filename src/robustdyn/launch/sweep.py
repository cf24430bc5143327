"""Runs the jobs of a multirun: a failed one stops no other, and finished ones are skipped."""

import gc
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import RecordError, UserError
from robustdyn.launch.states import announce, plan_of, say_states, states_of
from robustdyn.launch.sweep_check import impossible_value
from robustdyn.records.command_line import at, hydra_quoted
from robustdyn.records.files import sole_process
from robustdyn.records.progress import Plan, RunStatus, folder_name, identity, is_done, one_line
from robustdyn.records.run_directory import RunDirectory
from robustdyn.report.page import build_report

LOCAL = (".BasicLauncher", ".JoblibLauncher")
"""These launchers need no more than the status of a failed run; those of clusters must see the error."""

SWEEP_PROCESS = "ROBUSTDYN_SWEEP_PROCESS"
"""Environment variable with the process id of the sweep, for the workers of a parallel sweep."""

log = logging.getLogger(__name__)


def run_in_its_directory(task: Callable[[DictConfig], None], cfg: DictConfig) -> float | None:
    """Run ``task`` and keep its status in Hydra's output directory.

    In a sweep, a run that is done is skipped. A run that fails on this machine leaves its traceback in its
    directory, and the others continue. Its error is not passed to the process of the sweep, which would stop
    at the first one and could not unpickle errors of many classes.

    Returns:
        The objective of a sweeper that optimises: the number in ``summary.json`` that the key ``metric``
        names. It is None if the key names none, or if the run failed.

    Raises:
        Exception: ``task`` raised it, outside a sweep or on a cluster.
    """
    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    in_sweep = hydra_cfg.mode == RunMode.MULTIRUN
    first = getattr(rank_zero_only, "rank", 0) == 0  # also set before there is a trainer
    settings = _settings(cfg)
    if in_sweep and is_done(run_dir, settings):
        log.info("%s: done already", run_dir.name)
        return _metric(cfg, run_dir)
    if str(hydra_cfg.launcher.get("_target_")).endswith(".JoblibLauncher") and in_sweep:
        _end_with_parent()
    try:
        with RunStatus(run_dir, settings) if first else nullcontext():
            task(cfg)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns it into an exit
            raise type(end.__context__)() from end
        raise
    except Exception as error:
        if not (in_sweep and first and str(hydra_cfg.launcher.get("_target_")).endswith(LOCAL)):
            raise
        sys.stderr.write(f"error: {run_dir.name}: {one_line(error)}\n")
        return None
    finally:
        if in_sweep and torch.cuda.is_initialized():  # free memory for the next run
            gc.collect()
            torch.cuda.empty_cache()
    return _metric(cfg, run_dir) if first else None


def _metric(cfg: DictConfig, run_dir: Path) -> float | None:
    name = cfg.get("metric")
    if name is None:
        return None
    summary = RunDirectory(run_dir).summary
    value: Any = json.loads(summary.read_text(encoding="utf-8"))
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, int | float):
        sys.stderr.write(f"error: {summary} holds no number for metric={name}\n")
        return None
    return float(value)


@cache
def _end_with_parent() -> None:
    """Kill this worker when the process of its parallel sweep is gone, because the sweep may be restarted."""
    sweep = int(os.environ[SWEEP_PROCESS])
    if sweep == os.getpid():  # with n_jobs=1 joblib starts no worker
        return

    def watch() -> None:
        while os.getppid() == sweep:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class SweepReport(Callback):
    """Reports at the end of a multirun how its runs ended, and builds a report unless ``report=false``.

    Args:
        swept: The keys that differ between the runs, set when a sweep starts, for the folders' names.
    """

    check: ClassVar[Callable[[DictConfig], object] | None] = None  # of the command, see run_app
    running: ClassVar[DictConfig | None] = None
    inside: ClassVar[ExitStack] = ExitStack()  # holds the lock of the sweep's directory

    def __init__(self, swept: Sequence[str]) -> None:
        self.swept = swept

    def _enter(self, directory: Path, remedy: str) -> None:
        try:
            self.inside.enter_context(sole_process(directory, remedy))
        except RecordError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(1)  # Hydra would turn an exception of a callback into a warning

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook: refuse a directory in which another process runs, before Hydra writes to it."""
        HydraConfig.instance().set_config(config)
        typed = [text.partition("=")[0] for text in config.hydra.overrides.hydra]
        ignored = [key for key in typed if re.match(r"\+*hydra[./](launcher|sweeper|sweep)\b", key)]
        # a configuration file can choose a launcher, too
        if str(config.hydra.launcher.get("_target_")).endswith(".SlurmSweep"):
            ignored.append("hydra/launcher")
        if ignored:
            sys.stderr.write(f"error: {ignored[0]} takes effect with -m only, for a single run too; add it\n")
            sys.exit(1)
        self._enter(Path(config.hydra.run.dir), "choose another hydra.run.dir")
        self.inside.close()  # the run itself takes the lock again

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook: pass the directory and swept keys to all runs; refuse a sweep that cannot work."""
        HydraConfig.instance().set_config(config)  # for ${hydra:...}; Hydra sets it only for runs
        plan = plan_of(config)
        if plan is not None:
            _refuse_shared_folders(config, plan)
            check = SweepReport.check
            refusal = None if check is None else impossible_value(config, plan, check)
            if refusal is not None:
                sys.stderr.write(f"error: {refusal} (no run of the sweep was started)\n")
                sys.exit(1)  # Hydra would turn an exception of a callback into a warning
        self._enter(Path(config.hydra.sweep.dir), "choose another hydra.sweep.dir")
        os.environ[SWEEP_PROCESS] = str(os.getpid())
        # each run composes its configuration again, and its own name must not change the sweep's directory
        pinned: dict[str, str | list[str]] = {"hydra.sweep.dir": str(config.hydra.sweep.dir)}
        if plan is not None:
            pinned["hydra.callbacks.sweep_report.swept"] = list(plan.swept)
        with read_write(config.hydra), open_dict(config.hydra):
            for key, value in pinned.items():
                OmegaConf.update(config, key, value)
                config.hydra.overrides.hydra.append(f"{key}={_in_grammar(value)}")
        SweepReport.running = config

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook."""
        if not end_sweep():
            sys.exit(1)


def end_sweep(*, report: bool = True) -> bool:
    """Build the report of the sweep that is running in this process, and list the runs that are not done.

    This has no effect before the first run was started, and none when called again.

    Args:
        report: Whether to build the report if ``cfg.report`` asks for it.

    Returns:
        Whether all runs of the sweep are done.
    """
    config, SweepReport.running = SweepReport.running, None
    if config is None:
        return True
    folder = Path(config.hydra.sweep.dir)
    try:
        states = states_of([folder])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return False
    if all(state.state == "missing" for state in states):
        return False
    if report and config.report:
        sys.stdout.write(f"building the report of {folder}\n")
        sys.stdout.flush()
        try:
            announce(build_report([folder], RunDirectory(folder).report, states))
        except UserError as error:  # for instance because no run finished an epoch
            sys.stderr.write(f"no report: {error}\n")
    say_states(states, sys.stderr)
    done = all(state.state == "done" for state in states if state.asked)
    if not done:
        sys.stderr.write(
            f"the same command with {shlex.quote(at('hydra.sweep.dir', folder))} runs what is not done\n"
        )
    return done


def sweeping() -> bool:
    """Whether this process runs a sweep that has not been reported yet."""
    return SweepReport.running is not None


def forget_sweep() -> None:
    """Drop the sweep without a report, and restore Hydra's state from before the command."""
    SweepReport.running = None
    SweepReport.inside.close()
    os.environ.pop(SWEEP_PROCESS, None)
    HydraConfig.instance().cfg = None


def _refuse_shared_folders(config: DictConfig, plan: Plan) -> None:
    raw = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    assert isinstance(raw, dict)
    if "run_folder:" not in str(raw["subdir"]):
        return  # the user chose the name
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}
    for job in plan.jobs:
        other = seen.setdefault(identity(job, plan.without), job)
        if other is not job:
            different = sorted({*job} ^ {*other})
            reason = (
                f"differ only in {' '.join(different)}" if different else f"are the same ({' '.join(job)})"
            )
            sys.stderr.write(
                f"error: two runs of the sweep {reason} and would share a folder; ask for each run once, or "
                "set hydra.sweep.subdir='${hydra.job.num}'\n"
            )
            sys.exit(1)  # Hydra would turn an exception of a callback into a warning


def _in_grammar(value: str | Sequence[str]) -> str:
    """A value in the grammar of Hydra's overrides."""
    return hydra_quoted(value) if isinstance(value, str) else f"[{','.join(map(hydra_quoted, value))}]"


def _settings(cfg: DictConfig) -> dict[str, Any]:
    try:
        settings = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:
        return {}  # the task will report the error
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _run_folder(overrides: ListConfig, without: ListConfig, swept: ListConfig, sweep_dir: str) -> str:
    raw = OmegaConf.to_container(overrides, resolve=False)
    assert isinstance(raw, list)
    name = folder_name([str(text) for text in raw], list(without), list(swept))
    _, dash, digest = name.rpartition("-")
    if not dash or len(digest) != 8 or not Path(sweep_dir).is_dir():
        return name
    # the part before the hash depends on the swept keys, which may be fewer this time
    known = sorted(path.name for path in Path(sweep_dir).iterdir() if path.name.endswith(dash + digest))
    return known[0] if known else name


# Registered at import, as those of config.py: application.py imports this module, and so does a launcher's
# worker when it unpickles the callback.
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
