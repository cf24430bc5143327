"""``robustdyn-train``: one run, from the composed configuration to its report."""

import logging
import warnings
from pathlib import Path

import lightning
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from robustdyn.analysis.report import build_report
from robustdyn.data import ImageDataModule
from robustdyn.entrypoints.combinations import check_combinations
from robustdyn.entrypoints.config import build, check
from robustdyn.entrypoints.environment import write_environment
from robustdyn.entrypoints.progress import RunProgress
from robustdyn.entrypoints.report import announce
from robustdyn.entrypoints.terminal import run_app
from robustdyn.measure import Measure, RecordEpochs, RecordPosterior, RecordTiming
from robustdyn.methods import AdversarialTraining
from robustdyn.records import RunRecords

LAST = "last"


def main() -> None:
    """The ``robustdyn-train`` command."""
    run_app(train, "train")


def train(cfg: DictConfig) -> None:
    """Train, measure and record one run in Hydra's output directory; go on where a checkpoint lies there.

    Raises:
        UserError: The configuration or a data file cannot be used.
    """
    check(cfg)
    check_combinations(cfg)
    _quieten_lightning()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    lightning.seed_everything(cfg.seed, verbose=False)

    data: ImageDataModule = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")  # data errors come before anything else is built
    module = build_module(cfg, data)
    records = RunRecords(run_dir)
    trainer: lightning.Trainer = build(
        cfg,
        "trainer",
        callbacks=_callbacks(cfg, data, records, run_dir),
        logger=[build(cfg, f"logger.{name}") for name in cfg.logger],
        default_root_dir=str(run_dir),
    )
    if trainer.is_global_zero:
        write_environment(run_dir, trainer, module.model)
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    checkpoint = run_dir / "checkpoints" / f"{LAST}.ckpt"
    try:
        trainer.fit(
            module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True
        )
    finally:
        if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            wandb.finish()  # else the next run of a sweep would go on in this one
    if cfg.report and trainer.is_global_zero and HydraConfig.get().mode == RunMode.RUN:
        announce(build_report([run_dir], run_dir / "report"))


def build_module(cfg: DictConfig, data: ImageDataModule) -> AdversarialTraining:
    """The LightningModule, put together from one choice along each axis."""
    return AdversarialTraining(
        model=build(cfg, "model"),
        objective=build(cfg, "objective"),
        attack=build(cfg, "attack.train"),
        evaluation_attack=build(cfg, "attack.evaluation"),
        perturbation=build(cfg, "perturbation"),
        regularizer=build(cfg, "regularizer"),
        optimizer=build(cfg, "optimizer"),
        schedule=build(cfg, "schedule"),
        execution=build(cfg, "execution"),
        evaluation_splits=data.evaluation_splits,
        seed=cfg.seed,
    )


def _callbacks(cfg: DictConfig, data: ImageDataModule, records: RunRecords, run_dir: Path) -> list[Callback]:
    settings = OmegaConf.to_container(cfg.measure, resolve=True)
    assert isinstance(settings, dict)
    measure = Measure(
        epochs=settings["epochs"],
        examples=settings["examples"],
        inputs=settings["inputs"],
        memory_mib=settings["memory_mib"],
        precision=settings["precision"],
        eigenpairs=build(cfg, "measure.eigenpairs"),
        measurements={name: build(cfg, f"measure.measurements.{name}") for name in cfg.measure.measurements},
        records=records,
    )
    posterior = RecordPosterior(records, interpolation=settings["interpolation"])
    callbacks: list[Callback] = [RecordEpochs(records), measure, posterior, RecordTiming(records)]
    callbacks += [c for c in (build(cfg, "averaging"), build(cfg, "stopping")) if c is not None]
    callbacks += [
        # selection on test examples, as the papers' "best", flatters: the name says which it was
        ModelCheckpoint(
            dirpath=run_dir / "checkpoints",
            filename=f"best_on_{split}",
            monitor=f"{split}_robust_error",
            mode="min",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        for split in data.evaluation_splits
    ]
    callbacks.append(
        ModelCheckpoint(
            dirpath=run_dir / "checkpoints",
            filename=LAST,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
    )
    callbacks.append(RunProgress(_label(cfg)))
    return callbacks


def _label(cfg: DictConfig) -> str:
    """The run's name and, in a sweep, what it was given."""
    hydra_cfg = HydraConfig.get()
    swept = Path(hydra_cfg.sweep.subdir).name if hydra_cfg.mode == RunMode.MULTIRUN else f"seed={cfg.seed}"
    return f"{cfg.name} {swept}"


def _quieten_lightning() -> None:
    """Its advice is about setups that are ours on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for about in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists.*",
        ".*isinstance.treespec.*",
        ".*could not find the monitored key.*",  # after an epoch without evaluation there is no candidate
    ):
        warnings.filterwarnings("ignore", about)


if __name__ == "__main__":
    main()
