"""Builds the parts of a training run from its configuration: the LightningModule and the callbacks."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import nn

from robustdyn.data import ImageDataModule
from robustdyn.errors import ConfigError
from robustdyn.measure import (
    Measure,
    MeasurementPlan,
    RecordEpochs,
    RecordPosterior,
    RecordTiming,
    StopOnNonFinite,
)
from robustdyn.methods import AdversarialTraining
from robustdyn.records import RunRecords
from robustdyn.records.run_directory import RunDirectory
from robustdyn.run.checkpointing import BestCheckpoint, LastCheckpoint
from robustdyn.run.config import build
from robustdyn.run.ensembles import ensemble_callbacks
from robustdyn.run.progress_lines import RunProgress


def build_module(cfg: DictConfig, data: ImageDataModule) -> AdversarialTraining:
    """Build the LightningModule from the option chosen in each group.

    Raises:
        ConfigError: A part refuses its settings, or the model is no module.
    """
    model = build(cfg, "model")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model._target_={cfg.model._target_} makes a {type(model).__name__}, which is no "
            "torch.nn.Module; docs/extending.md says what a model must have"
        )
    return AdversarialTraining(
        model=model,
        objective=build(cfg, "objective"),
        attack=build(cfg, "attack.train"),
        evaluation_attack=build(cfg, "attack.evaluation"),
        perturbation=build(cfg, "perturbation"),
        added_noise=build(cfg, "added_noise"),
        curvature_penalty=build(cfg, "curvature_penalty"),
        regularizer=build(cfg, "regularizer"),
        optimizer=build(cfg, "optimizer"),
        schedule=build(cfg, "schedule"),
        batchnorm_frozen_from=cfg.batchnorm.frozen_from,
        execution=build(cfg, "execution"),
        evaluation_splits=data.evaluation_splits,
        seed=cfg.seed,
    )


def measurement_plan(cfg: DictConfig, allow: Collection[str] | None = None) -> MeasurementPlan:
    """Build what ``measure`` says to measure; ``allow`` as in ``build``.

    Raises:
        ConfigError: A setting outside its range.
    """
    try:
        return MeasurementPlan(
            measurements={
                str(name): build(cfg, f"measure.measurements.{name}", allow=allow)
                for name, chosen in cfg.measure.measurements.items()
                if chosen is not None
            },
            eigenpairs=build(cfg, "measure.eigenpairs", allow=allow),
            second_attack=cfg.measure.second_attack,
            memory_mib=cfg.measure.memory_mib,
            precision=cfg.measure.precision,
        )
    except ValueError as error:
        raise ConfigError(f"measure: {error}") from error


def further_callbacks(cfg: DictConfig) -> list[Callback]:
    """Build the callbacks that the user added under ``callbacks``.

    Raises:
        ConfigError: One cannot be built, or is no callback of Lightning.
    """
    found = []
    for key in (f"callbacks.{name}" for name, chosen in cfg.callbacks.items() if chosen is not None):
        callback = build(cfg, key)
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"{key} makes a {type(callback).__name__}, which is no lightning.pytorch.Callback; "
                "docs/extending.md has an example"
            )
        found.append(callback)
    return found


def build_callbacks(
    cfg: DictConfig, data: ImageDataModule, records: RunRecords, run_dir: Path
) -> list[Callback]:
    """Build all callbacks, in the order in which they must run."""
    settings = OmegaConf.to_container(cfg.measure, resolve=True)
    assert isinstance(settings, dict)
    measure = Measure(
        epochs=settings["epochs"],
        examples=settings["examples"],
        inputs=settings["inputs"],
        weights=settings["weights"],
        plan=measurement_plan(cfg),
        records=records,
    )
    posterior = RecordPosterior(records, interpolation=settings["interpolation"])
    callbacks: list[Callback] = [RecordEpochs(records), measure, *ensemble_callbacks(cfg, run_dir)]
    callbacks += [posterior, RecordTiming(records)]
    callbacks.append(StopOnNonFinite(run_dir, every_steps=cfg.nonfinite.every_steps))
    callbacks += [c for c in (build(cfg, "averaging"), build(cfg, "stopping")) if c is not None]
    run = RunDirectory(run_dir)
    callbacks += [
        # selecting on test examples, as for the papers' "best", is optimistic, so the name says it
        BestCheckpoint(
            dirpath=run.checkpoints,
            filename=run.best_checkpoint(split).stem,
            monitor=f"{split}_robust_error",
            mode="min",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        for split in data.evaluation_splits
    ]
    saved: Any = OmegaConf.to_container(cfg.checkpoint, resolve=True)
    callbacks.append(LastCheckpoint(run, cfg=cfg, **saved))
    if cfg.trainer.get("enable_progress_bar", True):
        callbacks.append(RunProgress(_label(cfg)))
    return callbacks + further_callbacks(cfg)


def _label(cfg: DictConfig) -> str:
    """The run's name and, in a sweep, its overrides."""
    hydra_cfg = HydraConfig.get()
    swept = Path(hydra_cfg.sweep.subdir).name if hydra_cfg.mode == RunMode.MULTIRUN else f"seed={cfg.seed}"
    return f"{cfg.name} {swept}"
