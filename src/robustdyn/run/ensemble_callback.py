"""The callback that runs ensembles of replicas (see replicas/) after set epochs of a training."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from robustdyn.data import ImageDataModule
from robustdyn.errors import ConfigError, TrainingError
from robustdyn.measure.when import EpochSpec, measured_epochs
from robustdyn.methods import AdversarialTraining
from robustdyn.replicas import EnsembleRun, EnsembleSettings, TrainingState, fingerprint

_log = logging.getLogger(__name__)

KEY = "ensemble"


class RunEnsembles(Callback):
    """Trains many replicas from the state of the training at the end of set epochs.

    They start from the trained weights, not from an average of them, with the present running statistics and
    state of the optimiser. Their training images are neither augmented nor mixed. The training itself does
    not change. The ranks share the chunks and wait until all are done. A run that was killed meanwhile trains
    up to the end of that epoch again and then runs the missing chunks.

    Place it after the callbacks that a learning-rate rule reads and before the one that records times.

    Args:
        epochs: When to run; see ``robustdyn.measure.when.measured_epochs``, but the last epoch is not added.
        settings: Settings of every ensemble; their ``prefix`` is ``"ensemble."``.
        description: How the training is configured; see ``robustdyn.replicas.TrainingState``.
        provenance: Returns what to record about computing on a device.
        folder: Folder for the ensembles; the one after N epochs is in ``epoch_N``, with at least four digits.
    """

    def __init__(
        self,
        *,
        epochs: EpochSpec,
        settings: EnsembleSettings,
        description: Mapping[str, object],
        provenance: Callable[[torch.device], Mapping[str, object]],
        folder: Path,
    ) -> None:
        self._spec = epochs
        self._settings = settings
        self._description = description
        self._provenance = provenance
        self._folder = folder
        self._epochs: frozenset[int] = frozenset()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Determine the epochs and check that ensembles are possible, before long work starts.

        Raises:
            ConfigError: They are not.
        """
        assert isinstance(pl_module, AdversarialTraining)
        max_epochs = int(trainer.max_epochs or 0)
        schedule = pl_module.schedule
        self._epochs = measured_epochs(
            self._spec,
            max_epochs=max_epochs,
            decay_epochs=schedule.decay_epochs(max_epochs),
            key=f"{KEY}.epochs",
            always_last=False,
        )
        if not self._epochs:
            return
        EnsembleRun(self._settings, self._state(trainer, pl_module, next_rate=1.0))
        if self._settings.learning_rate is None and not schedule.factor(max(self._epochs) + 1) > 0:
            raise ConfigError(
                f"{KEY}.learning_rate=null is the rate of the next step, which is 0 after epoch "
                f"{max(self._epochs)}; choose a rate"
            )

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Run the ensemble, or the missing part of it, if this epoch is one of those set.

        Raises:
            ConfigError: Replicas diverged, or the run's folder is not the same for all ranks.
            TrainingError: The ensemble does not fit in memory.
        """
        assert isinstance(pl_module, AdversarialTraining)
        epoch = trainer.current_epoch
        if epoch not in self._epochs:
            return
        directory = self._folder / f"epoch_{epoch + 1:04d}"
        when = {"epoch": epoch, "step": trainer.global_step}
        with pl_module.stopwatch.section("measurement"), pl_module.execution.eager():
            try:
                ensemble = EnsembleRun(
                    self._settings, self._state(trainer, pl_module, next_rate=_next_rate(pl_module))
                )
                left = ensemble.run(
                    directory,
                    {**self._provenance(pl_module.device), **when},
                    shard=trainer.global_rank,
                    shards=trainer.world_size,
                    say=partial(_say, trainer, when),
                    wait=trainer.strategy.barrier,
                )
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"out of memory in the ensemble after epoch {epoch}: {str(error).splitlines()[0]} "
                    f"lower {KEY}.start.memory_mib, or {KEY}.chunk and delete {directory}, and run the same "
                    "command again to continue"
                ) from error
        if left:
            raise ConfigError(
                f"{directory}: {left} chunks of other devices are missing here; put hydra.run.dir on a file "
                "system that all devices share"
            )

    def _state(
        self, trainer: lightning.Trainer, module: AdversarialTraining, *, next_rate: float
    ) -> TrainingState:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageDataModule)
        return TrainingState(
            model=module.model,
            optimizer=trainer.optimizers[0],
            next_rate=next_rate,
            images=data.split("train"),
            batch_size=data.batch_size,
            objective=module.objective,
            attack=module.attack,
            perturbation=module.perturbation,
            identity=fingerprint(module.model, trainer.optimizers[0]),
            description=self._description,
        )


def _say(trainer: lightning.Trainer, when: Mapping[str, int], line: str) -> None:
    """Write a line to the run's log and, since an ensemble takes long, to the terminal."""
    _log.info(line, extra=when)
    progress = trainer.progress_bar_callback
    if progress is not None:
        progress.print(line)


def _next_rate(module: AdversarialTraining) -> float:
    """The learning rate of the next epoch, which may follow this epoch's measurements."""
    scheduler = module.lr_schedulers()
    assert isinstance(scheduler, LambdaLR)
    return float(scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch))
