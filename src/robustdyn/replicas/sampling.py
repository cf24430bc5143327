"""Draws the mini-batches of replicas, and gives the gradient noise that follows from how they are drawn.

With C₁ the population covariance of one example's gradient (denominator n), a mini-batch mean has

- with replacement: covariance C₁ / B, independent from step to step;
- without replacement within an epoch: covariance C₁ (n − B) / (B (n − 1)), and −C₁ / (n − 1) between any two
  batches of the same epoch, for any sizes. At fixed weights the mean over an epoch of equal batches that uses
  all examples has no noise. A short last batch, or examples that are left out, keep some of it. Noise along
  slow directions (relaxation time longer than an epoch) largely cancels, so that the formula for independent
  batches overestimates their variance. ``robustdyn.theory.propagate_coupled`` has the exact one.

Noise of the attack's random start is added to this, and is independent from step to step in both cases.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn import streams
from robustdyn.theory import BatchSampling


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How mini-batches are drawn. The batch of replica r at step t depends only on (seed, r, t).

    Attributes:
        examples: n.
        batch_size: B in [1, n].
        replacement: True: every example of every batch independently. False: shuffled epochs.
        drop_last: Without replacement, leave out an epoch's last batch if it is shorter than B.

    Raises:
        ValueError: The batch size is outside its range.
    """

    examples: int
    batch_size: int
    replacement: bool
    drop_last: bool

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.examples:
            raise ValueError(f"batch_size must lie in [1, {self.examples}], got {self.batch_size}")

    @property
    def epoch(self) -> int:
        """Steps in an epoch, after which the examples are shuffled again; 1 with replacement."""
        if self.replacement:
            return 1
        whole, rest = divmod(self.examples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def indices(self, seed: int, replica: int, step: int) -> Tensor:
        """The examples of a batch, int64 (B,) or fewer; ``step`` counts from 0."""
        if self.replacement:
            draws = streams.generator(seed, "replica-order", replica, step)
            return torch.randint(self.examples, (self.batch_size,), generator=draws)
        epoch, number = divmod(step, self.epoch)
        order = torch.randperm(
            self.examples, generator=streams.generator(seed, "replica-order", replica, epoch)
        )
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def batches(self, steps: int) -> BatchSampling:
        """The sampling of the first ``steps`` steps, in the form that the theory takes."""
        epoch = None if self.replacement else self.epoch
        return BatchSampling(examples=self.examples, sizes=self.sizes(steps), epoch=epoch)

    def sizes(self, steps: int) -> NDArray[np.int64]:
        """Examples in the batch of each of the first ``steps`` steps, the same for all replicas: (steps,)."""
        first = np.arange(steps) % self.epoch * self.batch_size
        return np.minimum(self.batch_size, self.examples - first).astype(np.int64)
