"""Records how each epoch's time was spent (the ``timing`` table), and profiles single training steps."""

import logging
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PyTorchProfiler

from robustdyn.methods import AdversarialTraining
from robustdyn.methods.flops import bfloat16_peak, training_flops
from robustdyn.records import RunRecords
from robustdyn.records.progress import one_line
from robustdyn.records.schema import TIMED

_log = logging.getLogger(__name__)


class RecordTiming(Callback):
    """One row per epoch: images per second, and the shares of attack, step, data, evaluation and measurement.

    On a GPU that is known, the row also says how many of the operations that the card can do training used,
    if they can be counted.

    Place it after the measuring callback, whose time belongs in the row. On a GPU the shares are those of the
    GPU's time, for which the host waits once, at the end of the epoch.

    Args:
        records: The run's record; only the first rank writes, and it writes its own times.
    """

    def __init__(self, records: RunRecords) -> None:
        self._records = records
        self._started = 0.0
        self._images = 0
        self._peak: float | None = None
        self._flops: int | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reset the times here too: a run that resumes within an epoch times the rest of it."""
        self._peak = _peak(trainer)
        self._start(pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reset the times."""
        self._start(pl_module)

    def _start(self, module: lightning.LightningModule) -> None:
        _module(module).stopwatch.read()
        self._started = time.perf_counter()
        self._images = 0
        self._flops = None  # a weight perturbation may begin with this epoch
        _module(module).stopwatch.start("data")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on, the time counts as the step's."""
        _module(pl_module).stopwatch.stop("data")
        if self._peak is not None and self._flops is None:
            try:
                self._flops = training_flops(_module(pl_module), batch.images, batch.targets)
            except Exception as error:  # a class of the user's may raise anything, and training can continue
                self._peak = None
                if trainer.is_global_zero:
                    _log.warning(
                        "model_flop_utilisation stays empty: operations are counted on one image, taken "
                        "twice, which ended in %s",
                        one_line(error),
                    )
        _module(pl_module).stopwatch.start("step")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """From here on, the time counts as making the next batch, unless this batch was the last."""
        _module(pl_module).stopwatch.stop("step")
        # counted, because an epoch may be cut short; the ranks' parts differ by at most one image
        self._images += len(batch.images) * trainer.world_size
        if not trainer.is_last_batch:
            _module(pl_module).stopwatch.start("data")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The evaluation begins, perhaps within the epoch."""
        _module(pl_module).stopwatch.stop("data")
        _module(pl_module).stopwatch.start("evaluation")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The evaluation ends."""
        _module(pl_module).stopwatch.stop("evaluation")
        if not trainer.is_last_batch:
            _module(pl_module).stopwatch.start("data")

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Append the row."""
        seconds = dict.fromkeys(TIMED, 0.0) | _module(pl_module).stopwatch.read()
        elapsed = time.perf_counter() - self._started
        training = seconds["data"] + seconds["step"]  # the attack is within the step
        seconds["step"] -= seconds["attack"]
        row: dict[str, float | None] = {f"{name}_share": seconds[name] / elapsed for name in TIMED}
        speed = self._images / training
        row["images_per_second"] = speed
        row["model_flop_utilisation"] = None
        if self._peak is not None and self._flops is not None:
            row["model_flop_utilisation"] = speed * self._flops / self._peak
        if trainer.is_global_zero:
            stamp = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            self._records.append("timing", stamp | row | {"seconds": elapsed})


def _peak(trainer: lightning.Trainer) -> float | None:
    """Operations a second that all devices together can do in bfloat16, if they are known."""
    device = trainer.strategy.root_device
    peak = bfloat16_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if peak is None else peak * trainer.world_size


def _module(module: lightning.LightningModule) -> AdversarialTraining:
    assert isinstance(module, AdversarialTraining)
    return module


class TrainingStepProfiler(PyTorchProfiler):
    """Lightning's PyTorch profiler, whose schedule counts training steps alone.

    Lightning's own profiler also counts evaluation steps. It traces whichever kind of step completes the
    schedule first, and it loses the table of sums.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.STEP_FUNCTIONS = {"training_step"}
