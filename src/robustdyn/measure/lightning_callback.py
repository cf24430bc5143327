"""A Lightning callback that measures any LightningModule."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import nn

from robustdyn.curvature import cross_entropy
from robustdyn.curvature.risk_function import PerExampleLoss
from robustdyn.errors import ConfigError
from robustdyn.measure.examples import Attack
from robustdyn.measure.recorder import Recorder
from robustdyn.measure.when import EpochSpec, measured_epochs
from robustdyn.records.points import points
from robustdyn.records.schema import EPOCHS

_OURS = ("epoch", "step", "lr", "seconds")


class MeasureCurvature(Callback):
    """Measures curvature, gradient noise and posterior while any LightningModule trains.

    The rows go to a run directory, which ``robustdyn-report`` reads, and to the module's loggers. Metrics
    that the module logs under the names of the ``epochs`` table, such as ``test_robust_loss``, are recorded,
    too. Training is left as it is. In data-parallel training the examples are spread over the processes. A
    resumed training continues its record.

    Args:
        inputs: Training examples; see ``robustdyn.measure_model``. Or a function without arguments that
            returns a pair (inputs, targets), or a loader of pairs; it is called when training starts.
        targets: Of the same examples; None where ``inputs`` has both.
        epochs: When to measure: ``"every N"``, ``"last"``, epoch numbers, or a list of these. The last epoch
            is always measured.
        run_dir: Where to write; None for ``curvature`` in the folder of the module's logger, which is a new
            one whenever training starts. Several callbacks need folders with different names.
        model: Takes the LightningModule and returns the network; None for the module itself, whose
            ``forward`` then gives the outputs.
        loss: ``(outputs, targets) -> (B,)``.
        attack: PGD, a function, or None.
        train_examples: n; None asks the training loader's data set for its length.
        batch_size: B, over all devices and accumulated batches; None asks the training loader.
        **settings: Further arguments of ``robustdyn.Recorder``.
    """

    def __init__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        epochs: EpochSpec = "every 5",
        run_dir: str | os.PathLike[str] | None = None,
        model: Callable[[Any], nn.Module] | None = None,
        loss: PerExampleLoss = cross_entropy,
        attack: Attack | None = None,
        train_examples: int | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        self._inputs, self._targets = inputs, targets
        self._spec, self._run_dir, self._model = epochs, run_dir, model
        self._sizes = train_examples, batch_size
        self._settings = {"loss": loss, "attack": attack, **settings}
        self._epochs: frozenset[int] = frozenset()
        self._loaded: dict[str, Any] | None = None
        self.recorder: Recorder | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the record.

        Raises:
            ConfigError: The trainer has several optimisers or no end, the network or the examples cannot be
                found, or training continues from a checkpoint without this record.
            RecordError: The directory holds another record, or not the one that continues.
        """
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"MeasureCurvature needs one optimiser, but the module has {len(trainer.optimizers)}: use "
                "robustdyn.measure_model or robustdyn.Recorder"
            )
        if not trainer.max_epochs or trainer.max_epochs < 0:
            raise ConfigError("MeasureCurvature needs Trainer(max_epochs=...), to know the last epoch")
        if self._loaded is None and trainer.global_step:
            raise ConfigError(
                f"training continues after {trainer.global_step} steps, but its checkpoint holds no record "
                f"of {self.state_key}: it was saved without this callback, or with another run_dir; train "
                "from the start, or load the weights alone"
            )
        self._epochs = measured_epochs(
            self._spec, max_epochs=trainer.max_epochs, decay_epochs=(), key="MeasureCurvature(epochs=...)"
        )
        inputs, targets = self._inputs, self._targets
        if isinstance(inputs, lightning.LightningDataModule):
            raise ConfigError(
                "MeasureCurvature(inputs=...) is a data module: give lambda: datamodule.train_dataloader(), "
                "and examples=... for the first ones of the loader"
            )
        if targets is None and callable(inputs):
            given = inputs()
            inputs, targets = given if isinstance(given, tuple) else (given, None)
        found = _sizes(trainer)
        train_examples, batch_size = (
            own if own is not None else known for own, known in zip(self._sizes, found, strict=True)
        )
        run_dir = self._run_dir or Path(trainer.log_dir or trainer.default_root_dir, "curvature")
        self.recorder = Recorder(
            self._network(pl_module),
            inputs,
            targets,
            run_dir,
            train_examples=train_examples,
            batch_size=batch_size,
            resume=self._loaded is not None,
            group=dist.group.WORLD if trainer.world_size > 1 else None,
            **self._settings,
        )
        if self._loaded is not None:
            self.recorder.load_state_dict(self._loaded)

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Note the step, here because the scheduler moves before any later hook."""
        assert self.recorder is not None
        self.recorder.step(optimizer, clipped=bool(trainer.gradient_clip_val))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the epoch, and measure if it is one of those set."""
        assert self.recorder is not None
        epoch = trainer.current_epoch
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name in EPOCHS.names and name not in _OURS
        }
        if epoch not in self._epochs:
            self.recorder.end_epoch(epoch, **metrics)
            return
        rows = self.recorder.measure(epoch, **metrics)
        curves: dict[str, int | float] = {}
        for table, found in rows.items():
            for row in found:
                curves |= points(table, row)
        for logger in trainer.loggers:
            logger.log_metrics(curves, step=trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Record the posterior."""
        if self.recorder is not None:
            self.recorder.finish()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Record the error."""
        if self.recorder is not None:
            self.recorder.__exit__(type(exception), exception, exception.__traceback__)

    @property
    def state_key(self) -> str:
        """Tells apart the states of several callbacks, which measure different examples or networks."""
        name = None if self._run_dir is None else Path(self._run_dir).name  # the folder may be moved
        return self._generate_state_key(run_dir=name)

    def state_dict(self) -> dict[str, Any]:
        """The record's state."""
        return {} if self.recorder is None else self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record where the checkpoint was saved."""
        self._loaded = dict(state_dict) or None

    def _network(self, module: lightning.LightningModule) -> nn.Module:
        if self._model is not None:
            return self._model(module)
        if type(module).forward is lightning.LightningModule.forward:
            raise ConfigError(
                f"{type(module).__name__} has no forward method: give MeasureCurvature(model=lambda module: "
                "module.network), with the name of your network"
            )
        return module


def _sizes(trainer: lightning.Trainer) -> tuple[int | None, int | None]:
    """N and B as the training loader says; None where it does not."""
    loader = trainer.train_dataloader
    data, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    try:
        examples = None if data is None else len(data)
    except TypeError:  # a stream has no length
        examples = None
    factor = trainer.world_size * trainer.accumulate_grad_batches
    return examples, size * factor if isinstance(size, int) else None
