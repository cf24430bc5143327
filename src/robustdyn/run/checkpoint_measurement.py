"""Measures a network from a checkpoint, on the examples and with the attack of the run's own measurements."""

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from robustdyn import streams
from robustdyn.curvature import EmpiricalRisk
from robustdyn.data import ImageDataModule
from robustdyn.errors import ConfigError, TrainingError, UserError
from robustdyn.measure import Snapshot
from robustdyn.measure.callback import TableRow, _costs
from robustdyn.methods import OptimizerState
from robustdyn.models.modes import mode
from robustdyn.run.config import build

UNKNOWN = OptimizerState(float("nan"), float("nan"), float("nan"), plain=False)
"""Of an optimiser that is not known: there are no stationary laws."""


class CheckpointMeasurement:
    """The measurements that a configuration asks for, of one network after the other.

    Args:
        cfg: The configuration of ``robustdyn-measure``.
        allow: As in ``build``.
        data: Gives the training images.
        device: Where to measure.

    Raises:
        ConfigError: A part of the configuration cannot be built, or there are too few examples.
    """

    def __init__(
        self, cfg: DictConfig, allow: Collection[str] | None, data: ImageDataModule, device: torch.device
    ) -> None:
        self._cfg, self._data, self._device = cfg, data, device
        self._attack = build(cfg, "attack.evaluation", allow=allow)
        self._eigenpairs = build(cfg, "measure.eigenpairs", allow=allow)
        self._measurements = {
            name: build(cfg, f"measure.measurements.{name}", allow=allow)
            for name, chosen in cfg.measure.measurements.items()
            if chosen is not None
        }
        self._second = min(cfg.measure.second_attack, cfg.measure.examples)
        if self._second < 2:
            raise ConfigError(
                f"measure.second_attack={self._second} examples have no spread; choose at least 2"
            )
        data.measurement_subset(cfg.measure.examples, cfg.seed)  # refuses too many, before long work starts

    def __call__(
        self,
        model: nn.Module,
        *,
        epoch: int,
        step: int,
        optimizer: OptimizerState | None,
        starts: Mapping[str, Tensor],
    ) -> tuple[list[TableRow], dict[str, Tensor]]:
        """The rows of one epoch, the last one its whole cost, and the starting vectors for the next epoch.

        Args:
            model: The network, on the device; restored to its mode.
            epoch: The epoch of its checkpoint.
            step: Optimiser steps up to the checkpoint.
            optimizer: The settings of the last step; None if they are not known.
            starts: Starting vectors that the epoch before left.

        Raises:
            TrainingError: The network cannot be measured, for instance because losses are not finite.
        """
        began, cfg = time.perf_counter(), self._cfg
        try:
            with mode(model, training=False):  # the network as deployed
                risk = EmpiricalRisk(
                    model,
                    *self._attacked(model, cfg.measure.examples),
                    memory=cfg.measure.memory_mib * 2**20,
                    precision=cfg.measure.precision,
                    batchnorm="eval",
                )
                snapshot = Snapshot(
                    epoch=epoch,
                    step=step,
                    risk=risk,
                    again=lambda: risk.over(*self._attacked(model, self._second, 1)),
                    optimizer=UNKNOWN if optimizer is None else optimizer,
                    train_examples=len(self._data.split("train").labels),
                    batch_size=cfg.batch_size,
                    seed=cfg.seed,
                    eigenpairs=self._eigenpairs,
                    starts=starts,
                )
                rows = [row for part in self._measurements.values() for row in part.measure(snapshot)]
        except UserError:
            raise
        except (FloatingPointError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise TrainingError(f"the network of epoch {epoch} cannot be measured: {said}") from error
        rows += [("costs", row) for row in _costs(snapshot, time.perf_counter() - began)]
        # as the run itself keeps them: a starting vector needs no more digits
        after = {name: pairs.warm_start.bfloat16().cpu() for name, pairs in snapshot.solved.items()}
        return rows, {**starts, **after} if self._eigenpairs.warm_start else {}

    def _attacked(self, model: nn.Module, count: int, *draw: int) -> tuple[Any, Tensor]:
        """The first examples as they are, or under the evaluation attack from the random starts of a draw."""
        subset = self._data.measurement_subset(count, self._cfg.seed)
        generator = streams.generator(self._cfg.seed, "measure-attack", *draw, device=self._device)
        images, labels = subset.images.to(self._device), subset.targets.to(self._device)
        starts = self._attack.start(images, generator)
        precision = next(model.parameters()).dtype
        images, starts = images.to(precision), starts.to(precision)
        if self._cfg.measure.inputs == "adversarial":
            batches = zip(
                *(t.split(self._data.eval_batch_size) for t in (images, labels, starts)), strict=True
            )
            images = torch.cat([self._attack.climb(model, *batch) for batch in batches])
        return images, labels
