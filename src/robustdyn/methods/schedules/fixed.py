"""Rules that are functions of the epoch alone."""

import math
from bisect import bisect_right
from collections.abc import Sequence

from robustdyn.methods.schedules.schedule import Schedule


class Constant(Schedule):
    """η = η₀ throughout."""

    def factor(self, epoch: float) -> float:
        """1."""
        return 1.0


class Piecewise(Schedule):
    """η = η₀ · factor^(number of milestones reached), or η₀ times the factors of those reached.

    With milestones at 1/2 and 3/4 of the run and factor 0.1 it is the rule of Rice et al. (ICML 2020).

    Args:
        milestones: First epochs with the lower rate, strictly increasing, ≥ 1.
        factor: Multiplies the rate at each milestone, > 0; or a list, one for each milestone.

    Raises:
        ValueError: Milestones that are not a list or do not increase from 1 on; factors that are not
            positive, or not as many as milestones.
    """

    def __init__(self, milestones: Sequence[int], factor: float | Sequence[float]) -> None:
        if not isinstance(milestones, Sequence) or not all(isinstance(step, int) for step in milestones):
            raise ValueError(f"milestones must be a list of epochs, got {milestones}")
        steps = list(milestones)
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            raise ValueError(f"milestones must increase strictly from 1 on, got {steps}")
        factors = list(factor) if isinstance(factor, Sequence) else [factor] * len(steps)
        if len(factors) != len(steps):
            raise ValueError(f"factor has {len(factors)} values for {len(steps)} milestones")
        if not all(value > 0 for value in factors):
            raise ValueError(f"factor must be positive, got {factor}")
        self._milestones = tuple(steps)
        self._factors = [math.prod(factors[:count]) for count in range(len(steps) + 1)]

    def factor(self, epoch: float) -> float:
        """Product of the factors of the milestones ≤ ``epoch``."""
        return float(self._factors[bisect_right(self._milestones, epoch)])

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """The milestones that the run reaches."""
        return tuple(milestone for milestone in self._milestones if milestone < max_epochs)


class MultiDecay(Schedule):
    """η falls by η₀/n after each n-th of the run, a staircase to η₀/n (Rice et al., ICML 2020, section 4).

    Args:
        length: Epochs of the run, ≥ 1; if n is larger, the rate also falls within epochs.
        decays: n, ≥ 1.

    Raises:
        ValueError: A setting outside its range.
    """

    def __init__(self, *, length: int, decays: int) -> None:
        for name, value in (("length", length), ("decays", decays)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._length, self._decays = length, decays

    def factor(self, epoch: float) -> float:
        """1 − ⌊n · epoch / length⌋ / n, at least 1/n."""
        reached = min(math.floor(self._decays * epoch / self._length), self._decays - 1)
        return 1.0 - reached / self._decays

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """First epoch of each step that is entirely at the lower rate."""
        first = {math.ceil(step * self._length / self._decays) for step in range(1, self._decays)}
        return tuple(sorted(epoch for epoch in first if epoch < max_epochs))


class Interpolated(Schedule):
    """Straight lines between given points: linear decays, one-cycle rules.

    Args:
        length: Epochs of the run, ≥ 1.
        at: Points as fractions of the run, strictly increasing from 0 to 1.
        factors: η/η₀ at each point, > 0; ≥ 0 at the first and the last one, which no step's middle reaches.

    Raises:
        ValueError: Points or factors that do not fit.
    """

    def __init__(self, *, length: int, at: Sequence[float], factors: Sequence[float]) -> None:
        points = list(at)
        if points != sorted(set(points)) or not points or points[0] != 0 or points[-1] != 1:
            raise ValueError(f"at must increase strictly from 0 to 1, got {points}")
        if len(factors) != len(points):
            raise ValueError(f"factors has {len(factors)} values for {len(points)} points in at")
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        if not all(value >= 0 for value in factors):
            raise ValueError(f"factors must be at least 0, got {list(factors)}")
        if not all(factors[1:-1]):
            raise ValueError(f"factors may be 0 at the ends only, got {list(factors)}")
        self._epochs = [point * length for point in points]
        self._factors = [float(value) for value in factors]

    def factor(self, epoch: float) -> float:
        """On the line; the last point's value after the run."""
        right = bisect_right(self._epochs, epoch)
        if right == len(self._epochs):
            return self._factors[-1]
        (a, b), (low, high) = self._epochs[right - 1 : right + 1], self._factors[right - 1 : right + 1]
        return low + (high - low) * (epoch - a) / (b - a)


class Cosine(Schedule):
    """η = η₀ · ½ (1 + cos(π · epoch / length)) (Loshchilov and Hutter, ICLR 2017, eq. 5, without restarts).

    Args:
        length: Epochs of the run, ≥ 1.

    Raises:
        ValueError: A length below 1.
    """

    def __init__(self, *, length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self._length = length

    def factor(self, epoch: float) -> float:
        """Half a period of the cosine over the run."""
        return 0.5 * (1.0 + math.cos(math.pi * min(epoch / self._length, 1.0)))
