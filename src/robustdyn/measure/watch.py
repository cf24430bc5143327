"""Ends a run whose loss is no longer finite, and keeps what is needed to find out why."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from robustdyn.errors import TrainingError
from robustdyn.methods import AdversarialTraining
from robustdyn.records.run_directory import RunDirectory


class StopOnNonFinite(Callback):
    """Stops at the first training loss that is NaN or infinite, before the weights take it in.

    The snapshot ``nonfinite/step_<n>.pt`` of the run directory contains the batch, the weights at which the
    loss was computed (perturbed, if they were), and the step. The last checkpoint is older than the step, so
    a run resumed from it reaches the same step again. This shows everything that the snapshot does not
    contain.

    On a GPU, checking every loss would make the host wait at every step. There the losses are checked every
    ``every_steps`` steps, and the snapshot is of the step at which they are checked.

    Args:
        run_dir: The run directory.
        every_steps: On a GPU, check every so many steps, ≥ 1, and at the end of an epoch.
    """

    def __init__(self, run_dir: Path, *, every_steps: int) -> None:
        self._folder = RunDirectory(run_dir).nonfinite
        self._every = every_steps
        self._batch: Any = None
        self._first: Tensor | None = None  # on a GPU: the first bad step, -1 for none so far

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep hold of the batch."""
        self._batch = batch

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        """Check the loss.

        Raises:
            TrainingError: It is not finite.
        """
        step = trainer.global_step
        if loss.device.type == "cpu":
            if not bool(loss.isfinite()):
                self._stop(trainer, pl_module, step)
            return
        if self._first is None:
            self._first = torch.full_like(loss, -1, dtype=torch.int64)
        self._first = torch.where((self._first < 0) & ~loss.detach().isfinite(), step, self._first)
        if (step + 1) % self._every == 0 or trainer.is_last_batch:
            first = int(self._first)
            if first >= 0:
                self._stop(trainer, pl_module, first)

    def _stop(self, trainer: lightning.Trainer, module: lightning.LightningModule, step: int) -> None:
        assert isinstance(module, AdversarialTraining)
        path = self._folder / f"step_{step}.pt"
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "step": step,
                "seen_at_step": trainer.global_step,
                "epoch": trainer.current_epoch,
                "model": module.model.state_dict(),
                **{name: value.cpu() for name, value in self._batch._asdict().items()},
            },
            path,
        )
        raise TrainingError(
            f"the training loss is not finite at step {step} of the run (epoch {trainer.current_epoch}); "
            f"batch and weights are in {path}, and the last checkpoint is from before; a lower optimizer.lr "
            "may help, with resume=changed to continue from there"
        )
