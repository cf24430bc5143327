"""The measuring callback: when, on which data, and what; the mathematics is in curvature/ and theory/."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from robustdyn import streams
from robustdyn.curvature import EmpiricalRisk
from robustdyn.data import ImageDataModule
from robustdyn.measure.snapshot import Snapshot
from robustdyn.measure.when import EpochSpec, measured_epochs
from robustdyn.methods import AdversarialTraining
from robustdyn.records import RunRecords

Row = tuple[str, Mapping[str, Any]]
"""(table, columns) of one record."""


class Measurement(Protocol):
    """What to measure."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse, before training starts, an optimiser that the measurement's formulas do not describe.

        Raises:
            ConfigError: Names the optimiser and the remedy.
        """

    def measure(self, snapshot: Snapshot) -> Iterable[Row]:
        """Rows for the record, computed from the snapshot alone."""


class Measure(Callback):
    """Runs measurements at set epochs, all on one set of adversarial training examples.

    The examples are drawn once per run and attacked anew, with the evaluation attack, at each measured epoch.
    Training's random streams, weights, buffers and gradients are as before afterwards.

    Args:
        epochs: When; see :func:`robustdyn.measure.when.measured_epochs`.
        examples: Size of the measurement set.
        chunk_size: Examples per forward-backward pass.
        measurements: What, by name.
        records: The run's record; only the first rank writes.
    """

    def __init__(
        self,
        *,
        epochs: EpochSpec,
        examples: int,
        chunk_size: int,
        measurements: Mapping[str, Measurement],
        records: RunRecords,
    ) -> None:
        self._spec = epochs
        self._examples = examples
        self._chunk_size = chunk_size
        self._measurements = measurements
        self._records = records
        self._epochs: frozenset[int] = frozenset()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Settle the epochs and see that the measurement set can be had, before long work starts."""
        assert isinstance(pl_module, AdversarialTraining)
        max_epochs = int(trainer.max_epochs or 0)
        decays = pl_module.schedule.decay_epochs(max_epochs)
        self._epochs = measured_epochs(self._spec, max_epochs=max_epochs, decay_epochs=decays)
        if self._epochs:
            _data(trainer).measurement_subset(self._examples, pl_module.seed)
            for measurement in self._measurements.values():
                measurement.check(trainer.optimizers[0])

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure, if this epoch is one of those set."""
        if trainer.current_epoch not in self._epochs:
            return
        assert isinstance(pl_module, AdversarialTraining)
        snapshot = self._snapshot(trainer, pl_module)
        for measurement in self._measurements.values():
            for table, row in measurement.measure(snapshot):
                if trainer.is_global_zero:
                    self._records.append(table, row)
                if "index" not in row and "layer" not in row:  # one row per epoch: a curve
                    pl_module.log_dict(_curves(table, row), rank_zero_only=True)

    def _snapshot(self, trainer: lightning.Trainer, module: AdversarialTraining) -> Snapshot:
        assert module.last_step is not None
        data = _data(trainer)
        epoch = trainer.current_epoch
        subset = data.measurement_subset(self._examples, module.seed)
        start = streams.generator(module.seed, "measure-attack", epoch, device=module.device)
        # in chunks: measuring must not need more activations than training does
        adversarial = torch.cat(
            [
                module.evaluation_attack.perturb(
                    module.model, images, labels, start, module.objective.attack_loss
                )
                for images, labels in zip(
                    subset.images.split(self._chunk_size), subset.labels.split(self._chunk_size), strict=True
                )
            ]
        )
        risk = EmpiricalRisk(
            module.model, adversarial, subset.labels, chunk_size=self._chunk_size, batchnorm="eval"
        )
        return Snapshot(
            epoch=epoch,
            step=trainer.global_step,
            risk=risk,
            optimizer=module.last_step,
            train_examples=len(data.split("train").labels),
            batch_size=data.batch_size,
            seed=module.seed,
        )


def _data(trainer: lightning.Trainer) -> ImageDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, ImageDataModule)
    return data


def _curves(table: str, row: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{table}/{column}": float(value)
        for column, value in row.items()
        if column not in ("epoch", "step") and isinstance(value, int | float)
    }
