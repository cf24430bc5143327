"""The callback that measures during training: it decides when, on which examples, and what to measure."""

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.curvature import shard
from robustdyn.curvature.empirical_risk import unwrapped
from robustdyn.data import Batch, ImageDataModule
from robustdyn.errors import ConfigError, TrainingError, UserError
from robustdyn.measure.plan import Measurement, MeasurementPlan, deployed, parameters_now
from robustdyn.measure.snapshot import Snapshot
from robustdyn.measure.when import EpochSpec, measured_epochs
from robustdyn.methods import AdversarialTraining
from robustdyn.methods.averaging import Averaging
from robustdyn.records import RunRecords, read_table

_log = logging.getLogger(__name__)
_INITIAL = "initial"  # beside the names of the warm starts


class Measure(Callback):
    """Runs measurements at set epochs, all on one set of adversarial training examples.

    The examples are drawn once per run and attacked again at each measured epoch. The attack is the
    evaluation attack on the cross-entropy, for any training objective, and always from the same random
    starts. The examples are spread over the ranks. Values along directions that were found on them are
    corrected by a second attack on some of them. Training's random streams, weights, buffers and gradients do
    not change.

    A learning-rate rule that follows a measurement gets its row at the epochs that it requests. At epochs
    that are not measured anyway, only what the rule reads is computed and recorded.

    The sum of the last eigenvectors is kept as the start for the next epoch's, and the weights before
    training if a measurement compares with them. Both are saved in the checkpoint, so that a resumed run
    measures the same numbers.

    Args:
        epochs: When to measure; see ``robustdyn.measure.when.measured_epochs``.
        examples: Size of the measurement set, over all ranks.
        inputs: ``"adversarial"``, or ``"clean"`` for the loss of the unperturbed examples.
        weights: ``"trained"``, or ``"averaged"`` for the average that an ``Averaging`` callback keeps. A
            learning-rate rule follows the same weights.
        plan: What is measured and how.
        records: The run's record; only the first rank writes.
    """

    def __init__(
        self,
        *,
        epochs: EpochSpec,
        examples: int,
        inputs: Literal["adversarial", "clean"],
        weights: Literal["trained", "averaged"],
        plan: MeasurementPlan,
        records: RunRecords,
    ) -> None:
        self._spec = epochs
        self._counts = examples, min(plan.second_attack, examples)
        self._inputs = inputs
        self._weights = weights
        self._plan = plan
        self._records = records
        self._epochs: frozenset[int] = frozenset()
        self._rule_epochs: frozenset[int] = frozenset()
        self._starts: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The warm starts, (P,) each, and ``initial``: the parameters before training, if they are needed."""
        return dict(self._starts) | ({} if self._initial is None else {_INITIAL: self._initial})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the warm starts and the parameters before training."""
        self._initial = state_dict.get(_INITIAL)
        self._starts = {name: start for name, start in state_dict.items() if name != _INITIAL}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Determine the epochs and check that the measurement set exists, before long work starts."""
        assert isinstance(pl_module, AdversarialTraining)
        max_epochs = int(trainer.max_epochs or 0)
        decays = pl_module.schedule.decay_epochs(max_epochs)
        self._epochs = measured_epochs(self._spec, max_epochs=max_epochs, decay_epochs=decays)
        self._rule_epochs = frozenset(pl_module.schedule.reading_epochs(max_epochs))
        if self._plan.needs_initial and trainer.global_step == 0:
            self._initial = parameters_now(unwrapped(pl_module.model))
        if self._epochs | self._rule_epochs:
            data = _data(trainer)
            data.measurement_subset(self._counts[0], pl_module.seed)
            for name, count in zip(("examples", "second_attack"), self._counts, strict=True):
                if count < trainer.world_size:
                    raise ConfigError(
                        f"measure.{name}={count} cannot be spread over {trainer.world_size} devices; "
                        "choose at least one for each"
                    )
            if min(self._counts) < 2:
                raise ConfigError("measure.examples=1 has no spread; choose at least 2")
        if self._epochs and trainer.is_global_zero and not pl_module.plain_momentum:
            _log.warning(
                "the stationary laws recorded are those of momentum SGD without Nesterov, dampening, several "
                "weight decays or clipped gradients: with this optimiser their columns stay empty"
            )

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure, if this epoch is one of those set.

        Raises:
            ConfigError: The learning-rate rule cannot follow what was measured.
            TrainingError: The network cannot be measured, for instance because losses are not finite.
        """
        assert isinstance(pl_module, AdversarialTraining)
        measurements = self._due(trainer.current_epoch, pl_module.schedule.reads)
        if not measurements:
            return
        with (
            pl_module.stopwatch.section("measurement"),
            pl_module.execution.eager(),
            self._measured_weights(trainer, pl_module),
            deployed(pl_module.model, _group(trainer)),
        ):
            began = time.perf_counter()
            try:
                snapshot = self._snapshot(trainer, pl_module)
                for table, row in self._plan.rows(snapshot, began, measurements):
                    if trainer.is_global_zero:
                        self._records.append(table, row)
                    _observe(pl_module, table, row)
            except UserError:
                raise
            except (FloatingPointError, ValueError) as error:
                raise TrainingError(
                    f"the network cannot be measured after epoch {trainer.current_epoch}: {error}; if "
                    "training diverged, a lower optimizer.lr may help"
                ) from error
        self._starts |= self._plan.next_starts(snapshot)

    def _measured_weights(
        self, trainer: lightning.Trainer, module: AdversarialTraining
    ) -> AbstractContextManager[None]:
        """The scope in which the network has the weights that are measured."""
        if self._weights == "trained":
            return nullcontext()
        (averaging,) = (c for c in trainer.callbacks if isinstance(c, Averaging))  # type: ignore[attr-defined]
        return averaging.in_place(module)

    def _due(self, epoch: int, read: str | None) -> list[Measurement]:
        """What to measure after ``epoch``: everything, what the rule reads, or nothing."""
        measurements = list(self._plan.measurements.values())
        if epoch in self._epochs:
            return measurements
        if epoch in self._rule_epochs:
            return [m for m in measurements if read in m.tables]
        return []

    def _snapshot(self, trainer: lightning.Trainer, module: AdversarialTraining) -> Snapshot:
        assert module.last_step is not None
        data = _data(trainer)
        evaluation = module.evaluation_attack if self._inputs == "adversarial" else None

        def examples(network: nn.Module, draw: int, attack: PGD | None = evaluation) -> tuple[Tensor, Tensor]:
            return attacked_images(
                network,
                attack,
                data.measurement_subset(self._counts[draw], module.seed),
                seed=module.seed,
                draw=draw,
                # on all ranks together the evaluation's size, which fits in memory; the attack here runs in
                # the weights' own precision and takes up to twice the memory of evaluation in half precision
                batch_size=-(-data.eval_batch_size // trainer.world_size),
                rank=trainer.global_rank,
                ranks=trainer.world_size,
            )

        return self._plan.snapshot(
            module.model,
            examples,
            epoch=trainer.current_epoch,
            step=trainer.global_step,
            optimizer=module.last_step,
            train_examples=len(data.split("train").labels),
            batch_size=data.batch_size * trainer.accumulate_grad_batches,
            seed=module.seed,
            starts=self._starts,
            unperturbed=lambda: examples(module.model, 0, None)[0],
            attack=evaluation,
            initial=self._initial,
            added_noise=0.0 if module.added_noise is None else module.added_noise.factor,
            past=partial(read_table, self._records.run_dir) if trainer.is_global_zero else None,
            group=_group(trainer),
        )


def attacked_images(
    model: nn.Module,
    attack: PGD | None,
    subset: Batch,
    *,
    seed: int,
    draw: int,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[Tensor, Tensor]:
    """One rank's part of the images that a run is measured on, and their labels.

    Args:
        model: The network; the images are converted to the precision of its weights.
        attack: The attack; None to leave the images as they are.
        subset: All images, on the model's device.
        seed: The run's seed.
        draw: Number of the attack; each has its own random starts.
        batch_size: Images of one pass.
        rank: This rank.
        ranks: How many share the images.
    """
    precision, device = next(model.parameters()).dtype, subset.images.device
    images, labels = subset.images.to(precision), subset.targets
    if attack is None:
        images, labels = shard((images, labels), rank, ranks)
        return images, labels
    # random starts are drawn for all examples, so that they do not depend on the number of ranks
    generator = streams.generator(seed, "measure-attack", *([draw] if draw else []), device=device)
    starts = attack.start(subset.images, generator).to(precision)
    parts = shard((images, labels, starts), rank, ranks)
    batches = zip(*(part.split(batch_size) for part in parts), strict=True)
    return torch.cat([attack.climb(model, *batch) for batch in batches]), parts[1]


def _observe(module: AdversarialTraining, table: str, row: Mapping[str, Any]) -> None:
    """Show a row to the learning-rate rule.

    Raises:
        ConfigError: The rule cannot follow it.
    """
    try:
        module.observe(table, row)
    except ValueError as error:
        raise ConfigError(
            f"schedule: {error}; if training diverged, choose a smaller optimizer.lr, else another schedule"
        ) from error


def _group(trainer: lightning.Trainer) -> dist.ProcessGroup | None:
    return dist.group.WORLD if trainer.world_size > 1 else None


def _data(trainer: lightning.Trainer) -> ImageDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, ImageDataModule)
    return data
