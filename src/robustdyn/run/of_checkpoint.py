"""Finds the checkpoint that a command was given, the run it belongs to, and the device to use."""

import difflib
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import ConfigError, DataFileError
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.untrusted import DATA_ROOT, PURE_RESOLVERS, read_config
from robustdyn.run.config import check

OF_A_RUN = ("data", "model", "attack")
"""Sections that the configuration of every run has."""


def checkpoint_of(cfg: DictConfig) -> Path:
    """The file that the setting ``checkpoint`` names.

    Raises:
        ConfigError: The setting is missing or names a directory.
        DataFileError: There is no such file.
    """
    if not cfg.checkpoint:
        raise ConfigError("checkpoint is not given; give checkpoint=RUN/checkpoints/best_on_test.ckpt")
    path = Path(str(cfg.checkpoint))
    if path.is_dir():
        found = sorted(RunDirectory(path).checkpoints.glob("*.ckpt")) or sorted(path.glob("*.ckpt"))
        such = f", such as {found[0]}" if found else ""
        raise ConfigError(f"checkpoint={path} is a directory; give a file{such}")
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*") if p.is_file()], n=3
        )
        remedy = f"did you mean {' or '.join(near)}?" if near else "check the path"
        raise DataFileError(f"checkpoint={path}: no such file; {remedy}")
    return path


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that holds the file: the parent of its folder, or its folder; None for neither."""
    for folder in (checkpoint.absolute().parent.parent, checkpoint.absolute().parent):
        config = RunDirectory(folder).config
        if config.is_file():
            found = load_config(config)
            # another project's run may have a configuration there, too
            if all(isinstance(found.get(section), DictConfig) for section in OF_A_RUN):
                return folder
    return None


def required_run_of(checkpoint: Path) -> Path:
    """The same as ``run_of``, but never None.

    Raises:
        ConfigError: The file is not in a run directory.
    """
    run_dir = run_of(checkpoint)
    if run_dir is None:
        raise ConfigError(f"checkpoint={checkpoint} is not in a run directory; give a run's checkpoint")
    return run_dir


def changed_run(run: DictConfig, changes: DictConfig) -> DictConfig:
    """A run's configuration with the changes that a command was given under ``run``.

    Raises:
        ConfigError: A key does not exist in the configuration, or a value is not allowed.
    """
    try:
        changed = OmegaConf.merge(run, changes)
        assert isinstance(changed, DictConfig)
        check(changed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"run: {' '.join(str(error).split())}") from error
    return changed


def load_config(path: Path) -> DictConfig:
    """A configuration from a run directory; pass ``allow`` to ``build`` when building parts from it.

    Raises:
        RecordError: It cannot be read.
    """
    return read_config(path, "restore it, or move the checkpoint away", (*PURE_RESOLVERS, DATA_ROOT))


def device_of(name: str) -> torch.device:
    """The device with this name; ``auto`` means a GPU if there is one.

    Raises:
        ConfigError: This machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name} is not available; choose auto or cpu") from error
    return device


def type_name(node: DictConfig) -> str:
    """``CIFAR10`` for a node whose target is ``robustdyn.data.CIFAR10``."""
    return str(node._target_).rpartition(".")[2]
