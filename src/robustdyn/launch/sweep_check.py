"""Checks the settings of a sweep before its first run starts, so that no run waits hours to be refused."""

import copy
from collections.abc import Callable
from functools import cache

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from robustdyn.errors import UserError
from robustdyn.records.progress import Plan


def impossible_value(config: DictConfig, plan: Plan, check: Callable[[DictConfig], object]) -> str | None:
    """Why some value of the sweep is refused in every run that has it, or None if there is no such value.

    A value that suits some runs of a grid, such as an option of one method, is possible: its other runs are
    refused one by one. Each run that is tried takes about half a second; if all values are possible, a few
    runs show it, and only an impossible value needs all of its runs.

    Args:
        config: The configuration of the sweep.
        plan: Its runs.
        check: Raises ``UserError`` if a run cannot have this configuration; it reads no data.

    Returns:
        The message of ``check`` for the first of these runs.
    """
    refusal = cache(lambda job: _refusal(config, job, check))
    possible: set[str] = set()
    for value in dict.fromkeys(text for job in plan.jobs for text in job):
        if value in possible:
            continue
        having = [job for job in plan.jobs if value in job]
        accepted = next((job for job in having if refusal(job) is None), None)
        if accepted is None:
            return refusal(having[0])
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
    except Exception:  # not written for the user: the sweeper or the run reports it, with its stack trace
        return None
    finally:
        HydraConfig.instance().set_config(config)
    return None
