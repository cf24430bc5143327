"""Writes a run's checkpoints atomically, and resumes from them only with the settings they were made with."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from robustdyn.errors import CheckpointError, ConfigError
from robustdyn.measure.when import EpochSpec, measured_epochs
from robustdyn.methods import AdversarialTraining
from robustdyn.models.weight_files import why_not_loaded
from robustdyn.records.command_line import at, command
from robustdyn.records.labels import change
from robustdyn.records.progress import is_of
from robustdyn.records.run_directory import HYDRA_FILES, RunDirectory
from robustdyn.run.targets import named_in_conf, targets_in

_log = logging.getLogger(__name__)

_REMEDY = "restore it from a copy, or remove it to start from the beginning"
_PARTS = {
    "config": dict,
    "hydra": dict,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "schedule": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
"""The entries that a checkpoint must have for training to resume."""

TRAINING_IMAGES = "training_images"
"""The entry that lists the digests of all training sets of which a checkpoint's training may know."""
UNKNOWN_IMAGES = "unknown"
"""In that list: the training went on from a checkpoint that does not say."""

CHANGEABLE = (
    "checkpoint",
    "data.download",
    "data.eval_batch_size",
    "data.path",
    "data.root",
    "decay_epochs",  # the settings that depend on it are compared
    "decay_fractions",
    "ensemble",  # an ensemble's own record refuses other settings
    "fork",  # where the branch's first checkpoint was copied from
    "logger",
    "metric",
    "measure.memory_mib",
    "name",
    "nonfinite",
    "report",
    "resume",
    "trainer.accelerator",
    "trainer.callbacks",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.max_epochs",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)
"""Settings that a resumed run may change: they determine where and how it runs, not what it computes."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, forces it to the disk, and then replaces the old checkpoint.

    If the process is killed while writing, or the disk is full, the old checkpoint stays as it was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            CheckpointError: The file cannot be written.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
            _sync_directory(target.parent)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            before = "the checkpoint that is there is unharmed: " if target.is_file() else ""
            raise CheckpointError(
                f"{target}: cannot write ({_why_not_written(error)}); {before}free space or correct the "
                "folder's permissions and run the same command again, with the same hydra.run.dir"
            ) from error


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` up to date, within long epochs too, and keeps the checkpoints of some epochs.

    Every checkpoint of the run gets the configuration, so that a resumed run can tell whether it is the same.

    Args:
        run: The run directory.
        every_minutes: Save within an epoch if the last checkpoint is so many minutes old; None for never.
        keep_epochs: After which epochs a checkpoint of their own is kept; see
            ``robustdyn.measure.when.measured_epochs``.
        cfg: The run's configuration.
    """

    def __init__(
        self, run: RunDirectory, *, every_minutes: float | None, keep_epochs: EpochSpec, cfg: DictConfig
    ) -> None:
        self._run = run
        self._keep_epochs = keep_epochs
        self._kept: frozenset[int] = frozenset()
        self._interval = None if every_minutes is None else 60 * every_minutes
        self._cfg = cfg
        self._images: set[str] = set()
        self._saved = 0.0

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep in mind on which images the checkpoint was trained."""
        self._images.update(checkpoint.get(TRAINING_IMAGES, [UNKNOWN_IMAGES]))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock, and determine the epochs to keep.

        Raises:
            ConfigError: ``checkpoint.keep_epochs`` cannot be read, or names an epoch outside the run.
        """
        assert isinstance(pl_module, AdversarialTraining)
        self._images.add(trainer.datamodule.split("train").digest())  # type: ignore[attr-defined]
        self._saved = time.monotonic()
        max_epochs = int(trainer.max_epochs or 0)
        self._kept = measured_epochs(
            self._keep_epochs,
            max_epochs=max_epochs,
            decay_epochs=pl_module.schedule.decay_epochs(max_epochs),
            key="checkpoint.keep_epochs",
            always_last=False,
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save if it is time, but not after the last batch, before the evaluation that ends the epoch."""
        if self._interval is None or trainer.is_last_batch:
            return
        due = time.monotonic() - self._saved >= self._interval
        if trainer.strategy.broadcast(due):  # one clock decides for all ranks
            self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save, because all rows of the epoch are written by now."""
        if trainer.current_epoch in self._kept:
            trainer.save_checkpoint(self._run.epoch_checkpoint(trainer.current_epoch))
        self._save(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the configuration, Hydra's files as they are on disk, and which images training has seen."""
        checkpoint["config"] = OmegaConf.to_container(self._cfg, resolve=True)
        checkpoint[TRAINING_IMAGES] = sorted(self._images)
        checkpoint["hydra"] = hydra_files(self._run)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(self._run.last_checkpoint)
        self._saved = time.monotonic()


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint``, but it keeps its best score even if the run directory was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scores, with the files' paths in the run's present folder."""
        assert self.dirpath is not None

        def here(path: str) -> str:  # Lightning deletes this file: a name such as .. must not pass
            return str(Path(str(self.dirpath)) / Path(path).name) if path.endswith(".ckpt") else ""

        super().load_state_dict(
            state_dict
            | {
                "dirpath": self.dirpath,
                "best_model_path": here(state_dict["best_model_path"]),
                "kth_best_model_path": here(state_dict["kth_best_model_path"]),
                "best_k_models": {here(path): score for path, score in state_dict["best_k_models"].items()},
            }
        )


def last_checkpoint(run: RunDirectory) -> dict[str, Any] | None:
    """The content of the checkpoint from which the run resumes; None if there is none.

    Raises:
        CheckpointError: It cannot be read.
    """
    return read_checkpoint(run.last_checkpoint, _REMEDY) if run.last_checkpoint.is_file() else None


def read_checkpoint(path: Path, remedy: str) -> dict[str, Any]:
    """The content of a checkpoint from which training can continue; reading it runs no code.

    Raises:
        CheckpointError: It cannot be read, or lacks something; the message ends with the remedy.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        raise CheckpointError(f"{path}: cannot read ({why_not_loaded(error)}); {remedy}") from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), kind) for key, kind in _PARTS.items()
    ):
        raise CheckpointError(f"{path}: not a checkpoint of robustdyn-train; {remedy}")
    return checkpoint


def hydra_files(run: RunDirectory) -> dict[str, str]:
    """What Hydra's files of a run say, by their names."""
    return {name: (run.hydra / name).read_text() for name in HYDRA_FILES if (run.hydra / name).is_file()}


def restore_hydra_files(checkpoint: Mapping[str, Any], run: RunDirectory) -> None:
    """Make Hydra's files those of the checkpoint again; a command with other settings has replaced them."""
    for name in HYDRA_FILES:
        if isinstance(text := checkpoint["hydra"].get(name), str):
            (run.hydra / name).write_text(text)


def resume_from(
    cfg: DictConfig, run_dir: Path, missing: Callable[[Path, DictConfig], Sequence[str]]
) -> Path | None:
    """The checkpoint from which a run in ``run_dir`` resumes; None for a new run.

    ``missing`` gives the keys that this version needs and that the recorded settings of a run do not have.

    Raises:
        ConfigError: The checkpoint was made with other settings and ``resume`` is not ``changed``. Hydra's
            files are then restored.
        CheckpointError: It cannot be read.
    """
    run = RunDirectory(run_dir)
    path, checkpoint = run.last_checkpoint, last_checkpoint(run)
    if checkpoint is None:
        return None
    present: Any = OmegaConf.to_container(cfg, resolve=True)
    changes = [
        change(name, *("null" if value is None else str(value) for value in values), longest=60)
        for name, *values in changed_settings(checkpoint["config"], present)
    ]
    if changes and cfg.resume != "changed":
        restore_hydra_files(checkpoint, run)
        new = missing(run_dir, OmegaConf.create(checkpoint["config"]))
        kind = " and those that another version of robustdyn did not have" if new else ""
        raise ConfigError(
            f"{path} is of a run with other settings: {'; '.join(changes[:5])}"
            f"{f' and {len(changes) - 5} more' if len(changes) > 5 else ''}; choose another hydra.run.dir, "
            "or set resume=changed to continue from it with the new ones; to continue with its own"
            f"{kind}: {_own_command(checkpoint, cfg, run_dir, new)}"
        )
    if changes:
        _log.info("settings that differ from the checkpoint's: %s", "; ".join(changes))
    return path


def _own_command(
    checkpoint: Mapping[str, Any], cfg: DictConfig, run_dir: Path, missing: Sequence[str]
) -> str:
    """A command that resumes with the checkpoint's settings, and those typed ones that change no result.

    Settings that it is ``missing`` get the values that this command gives them.
    """
    before = OmegaConf.create(checkpoint["config"])
    kept = []
    for text in HydraConfig.get().overrides.task:
        key = text.lstrip("+~").partition("=")[0]
        if is_of(text, CHANGEABLE) and key != "resume" and _at(before, key) != _at(cfg, key):
            kept.append(text)
    kept += [f"+{key}={_choice(cfg, key)}" for key in missing if not any(is_of(text, [key]) for text in kept)]
    packages = sorted(
        {
            target.partition(".")[0]
            for key, section in checkpoint["config"].items()
            for target in targets_in(section) - named_in_conf(str(key))
        }
    )
    allow = [f"allow=[{','.join(packages)}]"] if packages else []
    return command("robustdyn-train", at("resume", run_dir), *allow, *kept)


def _choice(cfg: DictConfig, key: str) -> str:
    """What the command line would give a key: an option of a group, or a plain value."""
    value = HydraConfig.get().runtime.choices.get(key, _at(cfg, key))
    if OmegaConf.is_config(value):
        return "..."
    return value if isinstance(value, str) else json.dumps(value)


def _at(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Name, old and new value of every setting that changed, except those in ``CHANGEABLE``."""
    for key in sorted({*before, *now}, key=str):
        name = f"{prefix}{key}"
        if name in CHANGEABLE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changed_settings(old, new, f"{name}.")
        elif old != new:
            yield name, old, new


def _why_not_written(error: BaseException) -> str:
    """The operating system's reason, even if torch's writer has hidden it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return "the disk may be full"


def _sync_directory(folder: Path) -> None:
    """Force the new file name itself to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
