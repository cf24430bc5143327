"""Builds the loggers of a training run that ``logger=`` names."""

import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from robustdyn.run.config import build


def build_loggers(cfg: DictConfig) -> list[Logger]:
    """Build one logger for each entry of the group ``logger``.

    Unless the configuration names them, runs of wandb are named after the run's folder and grouped by sweep.

    Raises:
        ConfigError: A logger refuses a setting, or lacks a package.
    """
    # the directory is overwritten on purpose
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists.*")
    loggers: list[Logger] = []
    for key in cfg.logger:
        open_names: dict[str, Any] = {
            name: value
            for name, value in _names(cfg).items()
            if name in cfg.logger[key] and OmegaConf.select(cfg, f"logger.{key}.{name}") is None
        }
        loggers.append(build(cfg, f"logger.{key}", **open_names))
    return loggers


def _names(cfg: DictConfig) -> dict[str, str | None]:
    """``name`` and ``group`` of a run: its folder and its sweep, or for a single run its seed and None."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return {"name": f"{cfg.name} seed={cfg.seed}", "group": None}
    return {
        "name": f"{cfg.name} {Path(hydra_cfg.sweep.subdir).name}",
        "group": f"{cfg.name} {Path(hydra_cfg.sweep.dir).name}",
    }
