"""Choices along different axes that cannot go together, refused before anything is read."""

from omegaconf import DictConfig, OmegaConf

from robustdyn.entrypoints.config import build
from robustdyn.errors import ConfigError


def check_combinations(cfg: DictConfig) -> None:
    """Refuse combinations that cannot be.

    Raises:
        ConfigError: Names the keys and the remedy.
    """
    _mixed_targets(cfg)
    _measured_rate(cfg)
    _early_stopping(cfg)


def _mixed_targets(cfg: DictConfig) -> None:
    if OmegaConf.select(cfg, "data.mixup") and not build(cfg, "objective").takes_probabilities:
        raise ConfigError(
            f"data.mixup={cfg.data.mixup} mixes labels, but {_choice(cfg, 'objective')} compares the "
            "labelled class with the others; choose data.mixup=0, or objective=at or trades"
        )


def _measured_rate(cfg: DictConfig) -> None:
    table = build(cfg, "schedule").reads
    names = cfg.measure.measurements
    if table and not any(table in build(cfg, f"measure.measurements.{name}").tables for name in names):
        raise ConfigError(
            f"{_choice(cfg, 'schedule')} follows the measured table {table}, but measure.measurements has "
            "nothing that measures it; keep measure.measurements.weight_curvature or choose another schedule"
        )


def _early_stopping(cfg: DictConfig) -> None:
    if not cfg.stopping:
        return
    if str(cfg.stopping.get("monitor", "")).startswith("validation_") and not cfg.data.validation_size:
        raise ConfigError(
            "stopping=early watches held-out training images, but data.validation_size=0; choose a size, "
            "or stopping=none"
        )
    if cfg.trainer.check_val_every_n_epoch != 1:
        raise ConfigError(
            f"stopping=early needs an evaluation after every epoch, but trainer.check_val_every_n_epoch="
            f"{cfg.trainer.check_val_every_n_epoch}; choose 1, or stopping=none"
        )


def _choice(cfg: DictConfig, group: str) -> str:
    """``objective MART``: the group and the class it chose."""
    return f"{group} {cfg[group]._target_.rpartition('.')[2]}"
