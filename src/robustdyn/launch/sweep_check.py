"""Checks the settings of a sweep before its first run starts, so that no run waits hours to be refused."""

import copy
import random
from collections.abc import Callable

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict, read_write

from robustdyn.errors import UserError
from robustdyn.records.progress import Plan

MOST_TRIED = 32
"""This many runs that have a value are composed and checked, which takes about half a second each."""


def impossible_value(config: DictConfig, plan: Plan, check: Callable[[DictConfig], object]) -> str | None:
    """Why some value of the sweep is refused in every run that has it, or None if there is no such value.

    A value that suits some runs of a grid, such as an option of one method, is possible: its other runs are
    refused one by one. Of more than ``MOST_TRIED`` runs with a value, the first and a random choice of the
    others are tried.

    Args:
        config: The configuration of the sweep.
        plan: Its runs.
        check: Raises ``UserError`` if a run cannot have this configuration; it reads no data.

    Returns:
        The message of ``check`` for the first of these runs.
    """
    refusals: dict[tuple[str, ...], str | None] = {}

    def refusal(job: tuple[str, ...]) -> str | None:
        if job not in refusals:
            refusals[job] = _refusal(config, job, check)
        return refusals[job]

    possible: set[str] = set()
    for value in dict.fromkeys(text for job in plan.jobs for text in job):
        if value in possible:
            continue
        first, *others = (job for job in plan.jobs if value in job)
        tried = [first, *random.Random(0).sample(others, min(len(others), MOST_TRIED - 1))]
        accepted = next((job for job in tried if refusal(job) is None), None)
        if accepted is None:
            return refusal(first)
        possible.update(accepted)
    return None


def _refusal(config: DictConfig, job: tuple[str, ...], check: Callable[[DictConfig], object]) -> str | None:
    try:
        run = GlobalHydra.instance().config_loader().load_sweep_config(config, list(job))
        with open_dict(run):
            run.hydra.job.id = run.hydra.job.num = 0  # as a launcher sets them
        HydraConfig.instance().set_config(run)
        cfg = copy.deepcopy(run)
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
        check(cfg)
    except UserError as error:
        return str(error)
    except HydraException:  # the sweeper reports it
        return None
    finally:
        HydraConfig.instance().set_config(config)
    return None
