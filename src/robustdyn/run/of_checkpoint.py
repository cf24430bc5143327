"""The checkpoint that a command is given, the run it lies in, and where to compute."""

import difflib
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import ConfigError, DataFileError
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.untrusted import DATA_ROOT, PURE_RESOLVERS, read_config
from robustdyn.run.config import check


def checkpoint_of(cfg: DictConfig) -> Path:
    """The file that ``checkpoint`` names.

    Raises:
        ConfigError: None is named, or a directory.
        DataFileError: There is no such file.
    """
    if not cfg.checkpoint:
        raise ConfigError("checkpoint is not given; say checkpoint=RUN/checkpoints/best_on_test.ckpt")
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
    """The run directory that the file lies in: its folder's parent, or its folder."""
    for folder in (checkpoint.absolute().parent.parent, checkpoint.absolute().parent):
        config = RunDirectory(folder).config
        if config.is_file():
            data = load_config(config).get("data")
            target = data.get("_target_") if isinstance(data, DictConfig) else None
            if str(target).startswith("robustdyn."):
                return folder
    return None


def required_run_of(checkpoint: Path) -> Path:
    """As ``run_of``.

    Raises:
        ConfigError: The file lies in no run directory.
    """
    run_dir = run_of(checkpoint)
    if run_dir is None:
        raise ConfigError(f"checkpoint={checkpoint} does not lie in a run directory; give a run's checkpoint")
    return run_dir


def changed_run(run: DictConfig, changes: DictConfig) -> DictConfig:
    """A run's configuration with the changes that a command was given under ``run``.

    Raises:
        ConfigError: They do not fit it, or make a value that cannot be.
    """
    try:
        changed = OmegaConf.merge(run, changes)
        assert isinstance(changed, DictConfig)
        check(changed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"run: {' '.join(str(error).split())}") from error
    return changed


def load_config(path: Path) -> DictConfig:
    """A configuration that a run left; what is built of it must be told ``from_file``.

    Raises:
        RecordError: It cannot be read.
    """
    return read_config(path, "restore it, or move the checkpoint away", (*PURE_RESOLVERS, DATA_ROOT))


def device_of(name: str) -> torch.device:
    """The device of this name; ``auto``: a GPU if there is one.

    Raises:
        ConfigError: It is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name} is not here; choose auto or cpu") from error
    return device


def type_name(node: DictConfig) -> str:
    """``CIFAR10`` for a node whose target is ``robustdyn.data.CIFAR10``."""
    return str(node._target_).rpartition(".")[2]
