"""The loggers of a training run: opened, told the configuration, closed."""

from collections.abc import Sequence

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from robustdyn.entrypoints.config import build


def build_loggers(cfg: DictConfig) -> list[Logger]:
    """One for each entry of the group ``logger``."""
    return [build(cfg, f"logger.{name}") for name in cfg.logger]


def describe(loggers: Sequence[Logger], cfg: DictConfig) -> None:
    """Hand the whole configuration to every logger."""
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def close_loggers(loggers: Sequence[Logger]) -> None:
    """End what would otherwise go on into the next run of a sweep."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish()
