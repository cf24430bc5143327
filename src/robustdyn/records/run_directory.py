"""Names every file and folder of a run, and reads from Hydra's files how the run was made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import RecordError
from robustdyn.records import schema
from robustdyn.records.files import read_object
from robustdyn.records.labels import Setup, flatten
from robustdyn.records.untrusted import read_config, read_yaml

CONFIG = Path(".hydra", "config.yaml")
"""A folder that holds this file is a run directory."""
HYDRA_FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")
MULTIRUN = "multirun.yaml"
"""The file that Hydra writes into the folder of a sweep."""
_REMEDY = "restore the file or leave this run out"


class RunDirectory:
    """The files and folders of a run; none of them need exist.

    Attributes:
        path: The run directory.
        hydra: Folder of the files that Hydra writes, ``HYDRA_FILES``.
        config: The composed configuration.
        hydra_config: Hydra's own settings: the options chosen and the working directory.
        overrides: The arguments typed on the command line.
        records: Folder of the tables; see ``table``.
        summary: The final and the best epoch.
        settings: In the directory of an evaluation, which also has tables and a summary: what was evaluated.
        environment: Versions, hardware and code revision.
        status: Whether the run is running, done or failed.
        traceback: The stack trace of an unforeseen error.
        log: The log, one JSON object per line.
        checkpoints: Folder of the checkpoints.
        last_checkpoint: The checkpoint from which training resumes.
        fork: In the directory of a branch: of which checkpoint it is a branch, and what was changed.
        nonfinite: Folder for the batch and weights of a step whose loss was not finite.
        report: Folder of the run's page and figures.
        evaluations: Folder of the checkpoints' evaluations, one folder each.
        measured: Folder of the checkpoints' measurements, one folder each with records like a run's own.
        replicas: Folder of the checkpoints' ensembles of replicas, one folder each.
        certificates: Folder of the checkpoints' certificates.
        wandb: Folder of Weights & Biases.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / CONFIG
        self.hydra = self.config.parent
        self.hydra_config = self.hydra / "hydra.yaml"
        self.overrides = self.hydra / "overrides.yaml"
        self.records = self.path / "records"
        self.summary = self.path / "summary.json"
        self.settings = self.path / "settings.json"
        self.environment = self.path / "environment.json"
        self.status = self.path / "status.json"
        self.traceback = self.path / "error.txt"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.fork = self.path / "fork.json"
        self.nonfinite = self.path / "nonfinite"
        self.report = self.path / "report"
        self.evaluations = self.path / "evaluation"
        self.measured = self.path / "measured"
        self.replicas = self.path / "replicas"
        self.certificates = self.path / "certificate"
        self.wandb = self.path / "wandb"

    def table(self, name: str) -> Path:
        """File of a table.

        Raises:
            ValueError: There is no such table.
        """
        return self.records / f"{schema.table(name).name}.jsonl"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint that is kept after an epoch, as ``checkpoint.keep_epochs`` asks for it."""
        return self.checkpoints / f"epoch={epoch:03d}.ckpt"

    def best_checkpoint(self, split: str) -> Path:
        """The checkpoint with the lowest robust error on ``split``, which is test or validation."""
        return self.checkpoints / f"best_on_{split}.ckpt"

    def read_status(self) -> dict[str, Any] | None:
        """The content of the status file; None if it is missing or cannot be read."""
        return read_object(self.status)

    def read_environment(self) -> dict[str, Any] | None:
        """Versions, hardware and code revision; None if the file is missing or cannot be read."""
        return read_object(self.environment)

    def setup(self) -> Setup:
        """How the run was made, from Hydra's files.

        Raises:
            RecordError: One of them cannot be read.
        """
        config = read_config(self.config, _REMEDY)
        typed = _load_yaml(self.overrides) if self.overrides.is_file() else []
        choices = _load_yaml(self.hydra_config) if self.hydra_config.is_file() else {}
        for key in ("hydra", "runtime", "choices"):
            choices = choices.get(key) if isinstance(choices, dict) else {}
        chosen = choices.items() if isinstance(choices, dict) else ()
        return Setup(
            path=self.path,
            config=_plain(config),
            overrides=tuple(map(str, typed if isinstance(typed, list) else [])),
            choices={str(group): str(choice) for group, choice in chosen if choice is not None},
            derived=frozenset(_interpolated(config)),
        )


def _load_yaml(path: Path) -> Any:
    try:
        return read_yaml(path)
    except ValueError as error:
        raise RecordError(f"{path}: cannot read ({error}); {_REMEDY}") from error


def _plain(node: object) -> Any:
    """A configuration as plain containers; interpolations that cannot be resolved here stay text."""
    if isinstance(node, DictConfig):
        return {str(key): _plain(_resolved(node, key)) for key in node}
    if isinstance(node, ListConfig):
        return [_plain(_resolved(node, i)) for i in range(len(node))]
    return node


def _resolved(node: DictConfig | ListConfig, key: Any) -> object:
    try:
        return node[key]
    except OmegaConfBaseException:
        raw = OmegaConf.to_container(node, resolve=False)
        assert isinstance(raw, dict | list)
        return raw[key]


def _interpolated(config: DictConfig) -> list[str]:
    """Dotted keys whose value is an interpolation (``${seed}``): they differ when their source does."""
    raw = OmegaConf.to_container(config, resolve=False)
    assert isinstance(raw, dict)
    named = {str(key): value for key, value in raw.items()}
    return [key for key, value in flatten(named).items() if isinstance(value, str) and "${" in value]
