"""Learning-rate rules: the factor on the optimiser's rate as a function of the epoch."""

from collections.abc import Sequence
from typing import Protocol


class Schedule(Protocol):
    """One axis of a method."""

    def factor(self, epoch: float) -> float:
        """η(epoch) / η₀; ``epoch`` counts from 0 and may lie between two epochs."""

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """First epochs with a suddenly lower rate, below ``max_epochs``."""


class Constant:
    """η = η₀ throughout."""

    def factor(self, epoch: float) -> float:
        """1."""
        return 1.0

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """None."""
        return ()


class Piecewise:
    """η = η₀ · factor^(number of milestones reached) (Rice et al., ICML 2020).

    Args:
        milestones: First epochs with the lower rate, strictly increasing, ≥ 1.
        factor: Multiplies the rate at each milestone, > 0.

    Raises:
        ValueError: Milestones that are no list or do not increase from 1 on; a factor that is not positive.
    """

    def __init__(self, milestones: Sequence[int], factor: float) -> None:
        if not isinstance(milestones, Sequence) or not all(isinstance(step, int) for step in milestones):
            raise ValueError(f"milestones must be a list of epochs, got {milestones}")
        steps = list(milestones)
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            raise ValueError(f"milestones must increase strictly from 1 on, got {steps}")
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor}")
        self._milestones = tuple(steps)
        self._factor = factor

    def factor(self, epoch: float) -> float:
        """factor^(milestones ≤ epoch)."""
        return float(self._factor ** sum(epoch >= milestone for milestone in self._milestones))

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """The milestones that the run reaches."""
        return tuple(milestone for milestone in self._milestones if milestone < max_epochs)
