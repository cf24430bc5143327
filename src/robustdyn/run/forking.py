"""Begins a branch of a run: its directory gets the run's checkpoint and the records up to it."""

import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from robustdyn.errors import CheckpointError, ConfigError, RecordError
from robustdyn.records import RunRecords
from robustdyn.records.command_line import at
from robustdyn.records.files import file_digest, replace_file
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import TABLES
from robustdyn.run.checkpointing import (
    AtomicCheckpointIO,
    changed_settings,
    hydra_files,
    read_checkpoint,
)
from robustdyn.run.of_checkpoint import required_run_of
from robustdyn.run.status import say

_log = logging.getLogger(__name__)

_REMEDY = "give a checkpoint that robustdyn-train saved, with its run's folder around it"
_BELONG_TO_THE_STATE = ("optimizer._target_", "regularizer.weight_decay_on")
"""Settings on which the form of the optimiser's state depends."""
_POLL = 0.1  # seconds


def fork_point(path: Path) -> dict[str, Any]:
    """The content of a checkpoint from which branches can start, which was saved at the end of an epoch.

    Raises:
        CheckpointError: It cannot be read, or was saved within an epoch.
    """
    checkpoint = read_checkpoint(path, _REMEDY)
    if finished_epochs(checkpoint) != checkpoint["epoch"] + 1:
        raise CheckpointError(
            f"{path} was saved within epoch {checkpoint['epoch']}, but branches start at the end of one: "
            "take a checkpoint that checkpoint.keep_epochs keeps, or let the run finish the epoch"
        )
    return checkpoint


def finished_epochs(checkpoint: Mapping[str, Any]) -> int:
    """The number of epochs of which the checkpoint has all steps.

    Raises:
        CheckpointError: The checkpoint does not say.
    """
    found: Any = checkpoint["loops"]
    for key in ("fit_loop", "epoch_progress", "current", "processed"):
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, int):
        raise CheckpointError(f"the checkpoint does not say how many epochs were finished; {_REMEDY}")
    return found


def begin_branch(cfg: DictConfig, run_dir: Path) -> None:
    """Give a branch that has no checkpoint yet the one that it starts from, and the records up to it.

    From there it continues as any interrupted run does. ``fork.json`` says what it is a branch of, and which
    settings it changes.

    Raises:
        ConfigError: Nothing is left to train, or a setting was changed that the state depends on.
        CheckpointError: The checkpoint cannot be read, or the branch's cannot be written.
        RecordError: The run's records cannot be read or written.
    """
    branch = RunDirectory(run_dir)
    if branch.last_checkpoint.is_file():
        return
    source = Path(cfg.fork.path)
    checkpoint = fork_point(source)
    epoch, step = checkpoint["epoch"], checkpoint["global_step"]
    if cfg.trainer.max_epochs <= epoch + 1:
        raise ConfigError(
            f"{source} was saved after epoch {epoch}, the last of trainer.max_epochs="
            f"{cfg.trainer.max_epochs}: nothing is left to train; give an earlier checkpoint "
            "(checkpoint.keep_epochs keeps them), or a larger trainer.max_epochs"
        )
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    changed = {name: [old, new] for name, old, new in changed_settings(checkpoint["config"], settings)}
    for name in _BELONG_TO_THE_STATE:
        if name in changed:
            old, new = changed[name]
            raise ConfigError(
                f"{name}={new} cannot take over the optimiser's state, which was made with {old}; leave it "
                "out, or train a run of its own with robustdyn-train"
            )
    if getattr(rank_zero_only, "rank", 0) != 0:  # all ranks have refused what cannot work
        while not branch.last_checkpoint.is_file():  # it is written last
            time.sleep(_POLL)
        return
    if "averaging._target_" in changed and "current_model_state" in checkpoint:
        # continue with the weights that were trained, and not with the average in their place
        checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        checkpoint.pop("averaging_state", None)
        checkpoint["callbacks"].pop(str(changed["averaging._target_"][0]).rpartition(".")[2], None)
    _copy_records(required_run_of(source), run_dir, epoch + 1)
    origin = {"checkpoint": str(source), "sha256": file_digest(source), "epoch": epoch, "step": step}
    try:
        replace_file(
            branch.fork, (json.dumps(origin | {"changed": changed}, indent=1, default=str) + "\n").encode()
        )
    except OSError as error:
        raise RecordError(f"{branch.fork}: cannot write ({error.strerror}); free space") from error
    checkpoint |= {"config": settings, "hydra": hydra_files(branch)}
    AtomicCheckpointIO().save_checkpoint(checkpoint, branch.last_checkpoint)
    said = "; ".join(f"{name}={new} (was {old})" for name, (old, new) in changed.items()) or "nothing"
    note = f"{run_dir}: a branch of {at('checkpoint', source)}, after epoch {epoch}; changed: {said}"
    _log.info(note)
    if HydraConfig.get().mode == RunMode.RUN:
        say(note, sys.stderr)


def _copy_records(run_dir: Path, branch_dir: Path, epochs: int) -> None:
    """Copy the rows of the first so many epochs."""
    run, branch = RunDirectory(run_dir), RunDirectory(branch_dir)
    try:
        branch.records.mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            if run.table(table).is_file():
                shutil.copyfile(run.table(table), branch.table(table))
    except OSError as error:
        raise RecordError(
            f"{run.records}: cannot copy ({error}); correct it and run the command again"
        ) from error
    RunRecords(branch_dir).truncate(epochs)
