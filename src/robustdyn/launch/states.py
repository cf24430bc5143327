"""Finds the states of the runs of a sweep or of some folders, and prints them."""

import itertools
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from robustdyn.errors import ConfigError, RecordError, UserError
from robustdyn.records import find_runs
from robustdyn.records.progress import Plan, RunState, count, run_states
from robustdyn.records.run_directory import MULTIRUN
from robustdyn.records.untrusted import read_config, read_yaml
from robustdyn.run.status import say

if TYPE_CHECKING:
    from robustdyn.report.page import Report

MOST_RUNS = 100_000  # in a sweep; the names of all runs are kept in memory
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def states_of(paths: Sequence[Path]) -> list[RunState]:
    """The states of the runs at or below these paths, including those that a sweep has not started yet.

    Raises:
        UserError: A path holds no run and no sweep, or a record or a configuration cannot be read.
    """
    states: list[RunState] = []
    for path in paths:
        try:
            plan = plan_of(_load(path / MULTIRUN)) if (path / MULTIRUN).is_file() else None
        except ConfigError as error:
            raise RecordError(f"{path / MULTIRUN}: {error}, or give the run directories alone") from error
        try:
            runs = find_runs([path])
        except UserError:
            if plan is None:
                raise
            runs = []
        states += run_states(runs, plan)
    return states


def plan_of(config: DictConfig) -> Plan | None:
    """The runs that a multirun was asked for, from its configuration or its ``multirun.yaml``.

    Returns:
        None if the sweeper is not Hydra's own, because others choose the runs one after another.

    Raises:
        ConfigError: There are too many runs.
    """
    sweeper = OmegaConf.select(config, "hydra.sweeper")
    task = OmegaConf.select(config, "hydra.overrides.task")
    if not isinstance(sweeper, DictConfig) or not isinstance(task, ListConfig):
        return None
    if sweeper.get("_target_") != BASIC_SWEEPER:
        return None
    params, typed = sweeper.get("params"), OmegaConf.to_container(task, resolve=False)
    assert isinstance(typed, list)
    lines = [f"{key!s}={value}" for key, value in params.items()] if isinstance(params, DictConfig) else []
    lines += map(str, typed)
    values: dict[str, list[str]] = {}  # the last value of a key counts, as in the sweeper
    try:
        for override in OverridesParser.create().parse_overrides(lines):
            key = override.get_key_element()
            several = override.is_sweep_override()
            texts = override.sweep_string_iterator() if several else [override.get_value_element_as_str()]
            values[key] = [f"{key}={text}" for text in itertools.islice(texts, MOST_RUNS + 1)]
    except (HydraException, RecursionError):  # the sweeper reports the error
        return None
    if math.prod(map(len, values.values())) > MOST_RUNS:
        raise ConfigError(f"a sweep of more than {MOST_RUNS:,} runs; choose fewer values")
    jobs = [
        tuple(text for text in job if not text.startswith(("hydra.", "hydra/")))
        for job in itertools.product(*values.values())
    ]
    swept_keys = [key.lstrip("+~") for key, texts in values.items() if len(texts) > 1]
    without = OmegaConf.select(config, "hydra.job.config.override_dirname.exclude_keys") or []
    return Plan(tuple(jobs), tuple(swept_keys), tuple(without))


def say_states(states: Sequence[RunState], stream: TextIO) -> None:
    """Print the number of runs in each state and every run that is not done; nothing if a single run is."""
    if [state.state for state in states] in ([], ["done"]):
        return
    say(f"runs: {count(states)}", stream)
    for state in states:
        if state.state != "done":
            say(f"  {state.state:<10}  {state.name}: {state.remark}", stream)
            if state.traceback is not None:
                say(f"  {'':<10}  traceback: {state.traceback}", stream)


def _load(path: Path) -> DictConfig:
    config = read_config(path, "restore it, or remove it")
    with suppress(KeyError, TypeError):  # as in the records of the runs: compared, never resolved
        config.hydra.overrides.task = read_yaml(path)["hydra"]["overrides"]["task"]
    return config


def announce(report: "Report") -> None:
    """Print the three most important numbers and where the report is."""
    for line in (*report.headline, f"report: {report.html}"):
        say(line)
