"""Writes the run's ``epochs`` and ``rates`` tables and its summary."""

import logging
import time

import lightning
from lightning.pytorch.callbacks import Callback

from robustdyn.errors import RecordError
from robustdyn.methods import AdversarialTraining
from robustdyn.records import RunRecords, read_table, summarise
from robustdyn.records.schema import EPOCHS

_log = logging.getLogger(__name__)


class RecordEpochs(Callback):
    """One row per epoch, appended when the epoch ends; a resumed run first drops rows it will write again.

    Args:
        records: The run's record; only the first rank writes.
    """

    def __init__(self, records: RunRecords) -> None:
        self._records = records
        self._started = 0.0
        self._rate: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Cut the record off where the checkpoint ends, perhaps within an epoch."""
        self._started = time.perf_counter()
        if trainer.is_global_zero:
            self._records.truncate(trainer.current_epoch, trainer.global_step)
            rates = read_table(self._records.run_dir, "rates")["lr"]
            recorded = len(read_table(self._records.run_dir, "epochs"))
            if recorded < trainer.current_epoch or (rates.empty and trainer.global_step):
                raise RecordError(
                    f"{self._records.path('epochs').parent}: the records of the checkpoint's "
                    f"{trainer.current_epoch} epochs are not all there; restore them from a copy, or remove "
                    "the checkpoint to start from the beginning"
                )
            self._rate = None if rates.empty else float(rates.iloc[-1])

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Append a ``rates`` row where the rate changed: the schedule actually used, step by step."""
        assert isinstance(pl_module, AdversarialTraining)
        if not trainer.is_global_zero or pl_module.last_step is None:
            return
        rate = pl_module.last_step.learning_rate
        if rate != self._rate:
            self._rate = rate
            row = {"epoch": trainer.current_epoch, "step": trainer.global_step - 1, "lr": rate}
            self._records.append("rates", row)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """A checkpoint must never be ahead of the record, not even if the machine crashes."""
        if trainer.is_global_zero:
            self._records.sync()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Append the row and update summary.json."""
        assert isinstance(pl_module, AdversarialTraining)
        metrics = pl_module.epoch_metrics()  # reduces over ranks, so every rank must call it
        if not trainer.is_global_zero or pl_module.last_step is None:
            return
        row = dict.fromkeys(EPOCHS.required) | {  # null where this epoch was not evaluated
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": pl_module.last_step.learning_rate,
            "seconds": time.perf_counter() - self._started,
        }
        self._records.append("epochs", row | metrics)
        _log.info("epoch finished", extra=row | metrics)
        self._records.write_summary(summarise(read_table(self._records.run_dir, "epochs")))
