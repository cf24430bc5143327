"""Rules that follow a measurement."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from robustdyn.methods.schedules.schedule import Schedule


class WCIRate(Schedule):
    """η₀ until the first decay, then η₁ · min(1, τ / q), q the last measured WCI (WCI paper, algorithm 1).

    This is the rule as far as the paper's text defines it. The rate decays to η₁ at ``start_epoch``. From
    then on q is measured, and if it exceeds the threshold, the rate is inversely proportional to it.

    Args:
        start_epoch: First epoch at η₁, ≥ 1; q is measured from the end of the epoch before on.
        factor: η₁ / η₀, > 0.
        interval: Epochs from one measurement to the next, ≥ 1.
        quantity: q: ``"wci"``, or ``"hessian_trace"`` for a rate inverse to the trace, as motivated in the
            text.
        threshold: τ, in the units of q, > 0.
        monotone: Whether the rate may only fall from ``start_epoch`` on.

    Raises:
        ValueError: A setting outside its range.
    """

    reads: ClassVar[str | None] = "wci"

    def __init__(
        self,
        *,
        start_epoch: int,
        factor: float,
        interval: int,
        quantity: Literal["wci", "hessian_trace"],
        threshold: float,
        monotone: bool,
    ) -> None:
        for name, value in (("start_epoch", start_epoch), ("interval", interval)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, number in (("factor", factor), ("threshold", threshold)):
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        if quantity not in ("wci", "hessian_trace"):
            raise ValueError(f"quantity must be wci or hessian_trace, got {quantity}")
        self._start_epoch, self._factor, self._interval = start_epoch, factor, interval
        self._quantity, self._threshold, self._monotone = quantity, threshold, monotone
        self._damping = 1.0  # min(1, τ / q)

    def factor(self, epoch: float) -> float:
        """1, and from ``start_epoch`` on (η₁/η₀) · min(1, τ / q)."""
        return 1.0 if epoch < self._start_epoch else self._factor * self._damping

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """``start_epoch``, if the run reaches it."""
        return (self._start_epoch,) if self._start_epoch < max_epochs else ()

    def reading_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """Every ``interval`` epochs from the last one at η₀ on, except where no rate follows."""
        return tuple(range(self._start_epoch - 1, max_epochs - 1, self._interval))

    def observe(self, row: Mapping[str, Any]) -> None:
        """Follow a ``wci`` row; rows of other epochs than ``reading_epochs`` change nothing.

        Raises:
            ValueError: The measured quantity is not finite.
        """
        since = int(row["epoch"]) - (self._start_epoch - 1)
        if since < 0 or since % self._interval:
            return
        measured = float(row[self._quantity])
        if not math.isfinite(measured):
            raise ValueError(
                f"the learning rate cannot follow {self._quantity}={measured} of epoch {row['epoch']}"
            )
        damping = min(1.0, self._threshold / measured) if measured > 0 else 1.0
        self._damping = min(damping, self._damping) if self._monotone else damping

    def state_dict(self) -> dict[str, Any]:
        """The present damping."""
        return {"damping": self._damping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the damping; a run that began under another rule starts undamped."""
        self._damping = float(state.get("damping", 1.0))
