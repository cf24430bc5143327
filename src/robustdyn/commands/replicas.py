"""``robustdyn-replicas``: trains an ensemble of replicas from a run's checkpoint."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from robustdyn.data import ImageDataModule
from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError, RecordError
from robustdyn.launch.application import run_app
from robustdyn.launch.of_run import check_complete
from robustdyn.launch.paths import load_run
from robustdyn.methods import Regularizer
from robustdyn.models import load_weights
from robustdyn.models.weight_files import read_weight_file
from robustdyn.records.files import file_digest
from robustdyn.records.run_directory import RunDirectory
from robustdyn.replicas import EnsembleRun, TrainingState
from robustdyn.run.config import build
from robustdyn.run.ensembles import check_run, description, engine_provenance, ensemble_settings
from robustdyn.run.of_checkpoint import (
    changed_run,
    checkpoint_of,
    device_of,
    required_run_of,
)
from robustdyn.run.status import say
from robustdyn.run.targets import allowed

NAME = "replicas"
OF_THE_RUN = ("data", "model", "attack", "objective", "perturbation", "optimizer", "regularizer")


def main() -> None:
    """The ``robustdyn-replicas`` command."""
    run_app(run_replicas, NAME)


def run_replicas(cfg: DictConfig) -> None:
    """Run the missing part of an ensemble, or of one shard of it.

    Raises:
        UserError: The configuration, the checkpoint, the data or the record cannot be used.
    """
    checkpoint = checkpoint_of(cfg)
    run_dir = required_run_of(checkpoint)
    settings = ensemble_settings(cfg)
    shard, shards = _shard(cfg.shard)
    run = _run_config(cfg, run_dir)
    device = device_of(cfg.device)
    ensemble = EnsembleRun(settings, training_state(run, checkpoint, device, allowed(cfg)))
    output = Path(cfg.output) if cfg.output else RunDirectory(run_dir).replicas / checkpoint.stem
    saved = read_weight_file(checkpoint)
    noted = {**engine_provenance(settings.engine, device), "epoch": saved.epoch, "step": saved.step}
    left = ensemble.run(output, noted, shard=shard, shards=shards, say=say, wait=None)
    say(f"ensemble: {output}" + (f" ({left} chunks are still missing)" if left else ""))


def _shard(typed: str | None) -> tuple[int, int]:
    """The shard of this process and the number of shards: as typed, or from the launcher's environment."""
    if typed is None:
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if rank in os.environ and size in os.environ:
                return int(os.environ[rank]), int(os.environ[size])
        return 0, 1
    first, slash, last = str(typed).partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ConfigError(f"shard={typed} must be I/N with 0 <= I < N, such as 0/2")
    return int(first), int(last)


def _run_config(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """The run's configuration with the changes that the command was given."""
    run = load_run(run_dir)
    for group in ("perturbation", "optimizer"):
        name = cfg.method[group]
        if name == "run":
            continue
        path = config_dir() / group / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
            raise ConfigError(f"method.{group}={name} is not known; choose run, {known}")
        run[group] = OmegaConf.load(path)
    changed = changed_run(run, cfg.run)
    check_complete(run_dir, changed, sections=OF_THE_RUN, typed="+run.")
    check_run(changed, cfg.batchnorm, "set +run.{key}=0")
    return changed


def training_state(
    run: DictConfig, checkpoint: Path, device: torch.device, allow: Collection[str] = ()
) -> TrainingState:
    """The state of the training at the checkpoint; ``allow`` as in ``robustdyn.run.config.build``."""
    model: nn.Module = build(run, "model", allow=allow)
    load_weights(model, checkpoint, layout="robustdyn")
    model.to(device).eval()
    regularizer: Regularizer = build(run, "regularizer", allow=allow)
    optimizer: torch.optim.Optimizer = build(run, "optimizer", allow=allow)(
        regularizer.parameter_groups(model)
    )
    saved = _saved_optimizer(checkpoint)
    ours, theirs = optimizer.param_groups, saved["param_groups"]
    # with another regularizer the groups have other sizes, and states cannot be matched to parameters
    if [len(group["params"]) for group in ours] == [len(group["params"]) for group in theirs]:
        for own, other in zip(ours, theirs, strict=True):
            for p, number in zip(own["params"], other["params"], strict=True):
                held = saved["state"].get(number, {})
                # copied without conversion, because the run's optimiser may be of another kind
                optimizer.state[p] = {
                    k: v.to(device) if isinstance(v, Tensor) else v for k, v in held.items()
                }
    data: ImageDataModule = build(run, "data", allow=allow)
    data.prepare_data()
    data.setup("fit")
    return TrainingState(
        model=model,
        optimizer=optimizer,
        next_rate=float(saved["param_groups"][0]["lr"]),
        images=data.split("train").to(device),
        batch_size=run.data.batch_size,
        objective=build(run, "objective", allow=allow),
        attack=build(run, "attack.train", allow=allow),
        perturbation=build(run, "perturbation", allow=allow) if run.get("perturbation") else None,
        identity=file_digest(checkpoint),
        description=description(run),
    )


def _saved_optimizer(checkpoint: Path) -> dict[str, Any]:
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    try:
        state: dict[str, Any] = content["optimizer_states"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise RecordError(
            f"{checkpoint}: holds no optimiser; give a checkpoint from which a run's training can resume"
        ) from error
    return state


if __name__ == "__main__":
    # imported by name, so that a launcher's workers find it
    from robustdyn.commands.replicas import main as command

    command()
