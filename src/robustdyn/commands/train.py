"""``robustdyn-train``: trains a network, measures and records it, and writes the run's report."""

import logging
import os
import sys
import warnings
from pathlib import Path

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from robustdyn import streams
from robustdyn.data import ImageDataModule
from robustdyn.errors import ConfigError, TrainingError, UserError
from robustdyn.launch.application import run_app
from robustdyn.launch.cluster import check_slurm
from robustdyn.launch.of_run import missing_settings
from robustdyn.launch.ranks import OneRun, batchnorm_plugins, run_in_ranks
from robustdyn.launch.requeue import slurm_callbacks, slurm_plugins
from robustdyn.launch.resume import log_changes, resumed
from robustdyn.launch.states import announce
from robustdyn.methods import AdversarialTraining
from robustdyn.records import RunRecords
from robustdyn.records.progress import mark_done
from robustdyn.records.run_directory import RunDirectory
from robustdyn.report.page import build_report
from robustdyn.run.checkpointing import AtomicCheckpointIO, resume_from
from robustdyn.run.combinations import check_combinations
from robustdyn.run.config import build, check
from robustdyn.run.ensembles import check_ensemble
from robustdyn.run.environment import write_environment
from robustdyn.run.forking import begin_branch
from robustdyn.run.log import IN_FILE_ONLY
from robustdyn.run.loggers import build_loggers
from robustdyn.run.parts import build_callbacks, build_module
from robustdyn.run.publishing import Publisher

_log = logging.getLogger(__name__)


def main() -> None:
    """The ``robustdyn-train`` command."""
    run_app(train, "train", paths=("resume",), composed=resumed, check=check_settings)


def train(cfg: DictConfig) -> None:
    """Train, measure and record one run in Hydra's output directory; resume if it holds a checkpoint.

    Raises:
        UserError: The configuration, a file or the training itself prevents the run.
    """
    try:
        _train(cfg)
    except Exception as error:
        _log.error(str(error), exc_info=not isinstance(error, UserError), extra=IN_FILE_ONLY)
        raise


def check_settings(cfg: DictConfig) -> None:
    """Refuse settings that no run can have; this reads no data.

    Raises:
        ConfigError: A setting, or a combination of some, cannot work.
    """
    check(cfg)
    check_combinations(cfg)
    check_ensemble(cfg)


def _train(cfg: DictConfig) -> None:
    check_settings(cfg)
    check_slurm(cfg, os.environ)
    _quieten_lightning()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    log_changes()
    if cfg.get("fork"):
        begin_branch(cfg, run_dir)
    checkpoint = resume_from(cfg, run_dir, missing_settings)
    if run_in_ranks(cfg, train):
        return
    # NumPy's global generator takes a seed of 32 bits
    seed = cfg.seed if cfg.seed < 2**32 else streams.stream_seed(cfg.seed, "global") % 2**32
    lightning.seed_everything(seed, verbose=False)

    data: ImageDataModule = build(cfg, "data")
    data.prepare_data()
    data.setup("fit")  # report data errors before anything else is built
    module = build_module(cfg, data)
    records = RunRecords(run_dir)
    loggers = build_loggers(cfg)
    publisher = Publisher(loggers, run_dir, OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    alone = HydraConfig.get().mode == RunMode.RUN
    trainer: lightning.Trainer = build(
        cfg,
        "trainer",
        callbacks=[
            OneRun(cfg, run_dir),
            *build_callbacks(cfg, data, records, run_dir),
            *slurm_callbacks(os.environ),
            publisher,
        ],
        logger=loggers,
        plugins=[AtomicCheckpointIO(), *batchnorm_plugins(cfg), *slurm_plugins(os.environ)],
        default_root_dir=str(run_dir),
    )
    # deterministic kernels do not need it, and filling every new tensor takes a tenth of a float32 step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if trainer.is_global_zero:
        write_environment(run_dir, trainer, module.model)
    _log.info(
        "training starts" if checkpoint is None else "training continues",
        extra={"run": str(run_dir), "checkpoint": None if checkpoint is None else str(checkpoint)},
    )
    try:
        with publisher:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            if cfg.report and trainer.is_global_zero and (alone or publisher.shows_figures):
                mark_done(run_dir)
                if alone:
                    sys.stdout.write("building the report\n")
                    sys.stdout.flush()
                report = build_report([run_dir], RunDirectory(run_dir).report)
                publisher.show(report.figures)
                if alone:
                    announce(report)
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(module, error) from error
    except MisconfigurationException as error:  # for instance a callback that needs a logger
        raise ConfigError(f"trainer: {error}") from error
    finally:
        if cfg.execution.compile != "none":
            torch.compiler.reset()  # the runs of a sweep share a limit on compiled versions


def _out_of_memory(module: AdversarialTraining, error: torch.OutOfMemoryError) -> TrainingError:
    measuring = module.stopwatch.broken_off == "measurement"
    remedy = (
        "lower measure.memory_mib, measure.eigenpairs.extra_vectors or measure.examples"
        if measuring
        else "lower data.batch_size (or data.eval_batch_size), or take execution=bf16"
    )
    return TrainingError(
        f"out of memory in the {'measurement' if measuring else 'training or evaluation'}: "
        f"{str(error).splitlines()[0]} {remedy}, and run the same command with resume=changed to continue"
    )


def _quieten_lightning() -> None:
    """Silence Lightning's advice against settings that are chosen on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for about in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists.*",
        ".*isinstance.treespec.*",
        ".*`srun` command is available.*",
        ".*could not find the monitored key.*",  # true after an epoch without evaluation
        ".*sync_dist=True.*",  # what is logged is the same on all ranks already
        ".*bucket view strides.*",  # for 1x1 kernels, which DDP may copy
    ):
        warnings.filterwarnings("ignore", about)


if __name__ == "__main__":
    # imported by name, so that a launcher's workers and a run's ranks find it
    from robustdyn.commands.train import main as command

    command()
