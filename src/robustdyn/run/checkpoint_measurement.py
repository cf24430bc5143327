"""Measures a network from a checkpoint, on the examples and with the attack of its run's own measurements."""

import time
from collections.abc import Callable, Collection, Mapping

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from robustdyn.attacks import PGD
from robustdyn.data import Batch, ImageDataModule
from robustdyn.errors import TrainingError, UserError
from robustdyn.measure.callback import attacked_images
from robustdyn.measure.model_measurement import UNKNOWN_OPTIMIZER
from robustdyn.measure.plan import TableRow, deployed
from robustdyn.methods import OptimizerState
from robustdyn.run.config import build
from robustdyn.run.parts import measurement_plan


class CheckpointMeasurement:
    """The measurements that a configuration asks for, of one network after the other.

    Args:
        cfg: The configuration of ``robustdyn-measure``.
        allow: As in ``build``.
        data: Gives the training images.
        device: Where to measure.

    Raises:
        ConfigError: A part of the configuration cannot be built, or there are too few training images.
    """

    def __init__(
        self,
        cfg: DictConfig,
        allow: Collection[str] | None,
        data: ImageDataModule,
        device: torch.device,
        *,
        added_noise: float,
    ) -> None:
        self._cfg, self._data, self._added_noise = cfg, data, added_noise
        self._plan = measurement_plan(cfg, allow)
        attack: PGD = build(cfg, "attack.evaluation", allow=allow)
        self._attack = attack if cfg.measure.inputs == "adversarial" else None
        whole = data.measurement_subset(cfg.measure.examples, cfg.seed)
        self._subset = Batch(*(part.to(device) for part in whole))

    def __call__(
        self,
        model: nn.Module,
        *,
        epoch: int,
        step: int,
        optimizer: OptimizerState | None,
        starts: Mapping[str, Tensor],
        past: Callable[[str], pd.DataFrame],
    ) -> tuple[list[TableRow], dict[str, Tensor]]:
        """The rows of one epoch, the last one its whole cost, and the starting vectors for the next epoch.

        Args:
            model: The network, on the device.
            epoch: The epoch of its checkpoint.
            step: Optimiser steps up to the checkpoint.
            optimizer: The settings of the last step; None if they are not known.
            starts: Starting vectors that the epoch before left.
            past: Reads a table of the record of the epochs before.

        Raises:
            TrainingError: The network cannot be measured, for instance because losses are not finite.
        """
        cfg, began = self._cfg, time.perf_counter()

        def examples(
            network: nn.Module, draw: int, attack: PGD | None = self._attack
        ) -> tuple[Tensor, Tensor]:
            count = min(self._plan.second_attack, cfg.measure.examples) if draw else cfg.measure.examples
            return attacked_images(
                network,
                attack,
                Batch(*(part[:count] for part in self._subset)),
                seed=cfg.seed,
                draw=draw,
                batch_size=self._data.eval_batch_size,
            )

        try:
            with deployed(model):
                snapshot = self._plan.snapshot(
                    model,
                    examples,
                    epoch=epoch,
                    step=step,
                    optimizer=UNKNOWN_OPTIMIZER if optimizer is None else optimizer,
                    train_examples=len(self._data.split("train").labels),
                    batch_size=cfg.batch_size,
                    seed=cfg.seed,
                    starts=starts,
                    unperturbed=lambda: examples(model, 0, None)[0],
                    attack=self._attack,
                    added_noise=self._added_noise,
                    past=past,
                )
                rows = list(self._plan.rows(snapshot, began))
        except UserError:
            raise
        except (FloatingPointError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            raise TrainingError(f"the network of epoch {epoch} cannot be measured: {said}") from error
        return rows, {**starts, **self._plan.next_starts(snapshot)}
