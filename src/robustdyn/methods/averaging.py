"""Weight averaging: Lightning's callback, and when to average."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Averaging(WeightAveraging):
    """An average that replaces the weights during evaluation and in checkpoints.

    BatchNorm's running statistics are averaged with the weights. Izmailov et al. estimate them again from
    training images instead. Until there is an average, the weights themselves are evaluated and saved.
    """

    kind: ClassVar[type[AveragedModel]] = AveragedModel

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Create the average on the weights' later device; they are moved only after this hook."""
        if stage == "fit":
            device = trainer.strategy.root_device
            self._average_model = self.kind(pl_module, device=device, use_buffers=True, **self._kwargs)
            trainer.precision_plugin.convert_module(self._average_model)
            # read at every step, for which the processor would wait for a GPU
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_validation_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Evaluate the average."""
        self._follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average, and what training needs to resume."""
        self._follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the average behind."""
        self._follow(pl_module)
        super().on_train_end(trainer, pl_module)

    @contextmanager
    def in_place(self, module: lightning.LightningModule) -> Iterator[None]:
        """The average in place of the module's weights inside the scope; afterwards they are as before."""
        self._follow(module)
        self._swap_models(module)
        try:
            yield
        finally:
            self._swap_models(module)

    def _follow(self, module: lightning.LightningModule) -> None:
        """Until something was averaged, the average equals the weights."""
        if self._average_model is not None and self._average_model.n_averaged == 0:
            self._average_model.module.load_state_dict(module.state_dict())


class _Exponential(AveragedModel):
    """PyTorch's, without moving the count to a GPU, where nothing reads it and for which the host waits."""

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """As PyTorch's."""
        if self.n_averaged == 0:
            super().update_parameters(model)
            return
        assert self.multi_avg_fn is not None
        mine, theirs = ([*net.parameters(), *net.buffers()] for net in (self.module, model))
        for dtype in {tensor.dtype for tensor in mine}:
            alike = [place for place, tensor in enumerate(mine) if tensor.dtype == dtype]
            self.multi_avg_fn([mine[n] for n in alike], [theirs[n] for n in alike], self.n_averaged)
        self.n_averaged += 1


class ExponentialAveraging(Averaging):
    """w̄ ← d · w̄ + (1 − d) · w after every optimiser step, from the first step's w on.

    It replaces the weights during evaluation and in checkpoints. BatchNorm's running statistics are averaged
    with the weights. After t averages d is (1 + t) / (10 + t), as in TensorFlow's ExponentialMovingAverage,
    but at most ``decay``. Without this warm-up, the average of a short run would remain close to the weights
    before training.

    Args:
        decay: The decay after the warm-up, in [0, 1).

    Raises:
        ValueError: ``decay`` outside its range.
    """

    kind = _Exponential

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self._decay = decay
        super().__init__(use_buffers=True, multi_avg_fn=self._update)

    def _update(self, averages: list[Tensor], weights: list[Tensor], count: Tensor | int) -> None:
        """Update some of the averages in place."""
        averaged = int(count)  # on the host
        decay = min(self._decay, (1 + averaged) / (10 + averaged))
        get_ema_multi_avg_fn(decay)(averages, weights, averaged)


class EpochAveraging(Averaging):
    """Equal average of the weights at the ends of epochs from ``start_epoch`` on (Izmailov et al., UAI 2018).

    It replaces the weights during evaluation, including the evaluation of the averaged epoch, and in
    checkpoints. Before ``start_epoch`` there is no average, and the weights themselves are evaluated and
    saved. BatchNorm's running statistics are averaged with the weights, where Izmailov et al. estimate them
    again.

    Args:
        start_epoch: First epoch whose end is averaged, counted from 0.

    Raises:
        ValueError: A negative ``start_epoch``.
    """

    def __init__(self, *, start_epoch: int) -> None:
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be at least 0, got {start_epoch}")
        super().__init__(use_buffers=True)
        self._start_epoch = start_epoch
        self._epoch_ends = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After the last step of an epoch, from the first averaged one on."""
        return step_idx is not None and self._epoch_ends

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Average before the epoch's evaluation; the hook at its end comes after."""
        self._epoch_ends = trainer.is_last_batch and trainer.current_epoch >= self._start_epoch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
