"""The loggers of a training run, as ``logger=`` names them."""

import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from robustdyn.run.config import build


def build_loggers(cfg: DictConfig) -> list[Logger]:
    """One for each entry of the group ``logger``.

    wandb's runs are named here where the configuration leaves it open: after the run's folder, and grouped
    by sweep.

    Raises:
        ConfigError: A setting a logger refuses, or a package it lacks.
    """
    # that it is written anew is on purpose
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
    """``name`` and ``group`` of a run: its folder and its sweep's, or its seed and none."""
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return {"name": f"{cfg.name} seed={cfg.seed}", "group": None}
    return {
        "name": f"{cfg.name} {Path(hydra_cfg.sweep.subdir).name}",
        "group": f"{cfg.name} {Path(hydra_cfg.sweep.dir).name}",
    }
