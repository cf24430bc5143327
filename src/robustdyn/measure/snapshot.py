"""What a measurement sees of a run: its loss on fixed adversarial examples and the optimiser's state."""

from dataclasses import dataclass

import torch

from robustdyn import streams
from robustdyn.curvature import EmpiricalRisk
from robustdyn.methods import OptimizerState


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The run at the end of an epoch.

    Attributes:
        epoch: Epoch that just ended, from 0.
        step: Optimiser steps taken so far.
        risk: Mean loss over the measurement set, its adversarial examples held fixed.
        optimizer: Settings of the last optimiser step.
        train_examples: n, size of the training set.
        batch_size: B, examples a mini-batch holds over all ranks.
        seed: The run's seed.
    """

    epoch: int
    step: int
    risk: EmpiricalRisk
    optimizer: OptimizerState
    train_examples: int
    batch_size: int
    seed: int

    def generator(self, stream: str) -> torch.Generator:
        """Random stream of one estimator, a function of (seed, stream, epoch)."""
        return streams.generator(self.seed, f"measure-{stream}", self.epoch, device=self.risk.device)
