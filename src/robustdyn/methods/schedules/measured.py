"""Rules that follow a measurement."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from robustdyn.methods.schedules.schedule import Schedule


class MeasuredRate(Schedule):
    """η₀ until the first decay, and from then on a rate that follows the last measurement.

    Args:
        start_epoch: First epoch at a rate that follows, ≥ 1; measured from the end of the epoch before on.
        interval: Epochs from one measurement to the next, ≥ 1.
        column: What is followed, a column of ``reads``.
        unmeasured: η / η₀ from ``start_epoch`` on if a run began under another rule and nothing was measured
            yet.

    Raises:
        ValueError: A setting outside its range.
    """

    def __init__(self, *, start_epoch: int, interval: int, column: str, unmeasured: float) -> None:
        for name, value in (("start_epoch", start_epoch), ("interval", interval)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._start_epoch, self._interval, self._column = start_epoch, interval, column
        self._unmeasured = self._followed = unmeasured

    @abstractmethod
    def follow(self, measured: float, row: Mapping[str, Any]) -> float:
        """η / η₀ from the finite value of the column, and the rest of its row."""

    def factor(self, epoch: float) -> float:
        """1, and from ``start_epoch`` on what followed from the last measurement."""
        return 1.0 if epoch < self._start_epoch else self._followed

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """``start_epoch``, if the run reaches it."""
        return (self._start_epoch,) if self._start_epoch < max_epochs else ()

    def reading_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """Every ``interval`` epochs from the last one at η₀ on, except where no rate follows."""
        return tuple(range(self._start_epoch - 1, max_epochs - 1, self._interval))

    def observe(self, row: Mapping[str, Any]) -> None:
        """Follow a row of ``reads``; rows of other epochs than ``reading_epochs`` change nothing.

        Raises:
            ValueError: The measured quantity is not finite.
        """
        since = int(row["epoch"]) - (self._start_epoch - 1)
        if since < 0 or since % self._interval:
            return
        measured = float(row[self._column])
        if not math.isfinite(measured):
            raise ValueError(
                f"the learning rate cannot follow {self._column}={measured} of epoch {row['epoch']}"
            )
        self._followed = self.follow(measured, row)

    def state_dict(self) -> dict[str, Any]:
        """η / η₀ as it followed from the last measurement."""
        return {"followed": self._followed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; a run that began under a rule that follows nothing starts unmeasured."""
        self._followed = float(state.get("followed", self._unmeasured))


class WCIRate(MeasuredRate):
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
        super().__init__(start_epoch=start_epoch, interval=interval, column=quantity, unmeasured=factor)
        _require_positive(factor=factor, threshold=threshold)
        if quantity not in ("wci", "hessian_trace"):
            raise ValueError(f"quantity must be wci or hessian_trace, got {quantity}")
        self._factor, self._threshold, self._monotone = factor, threshold, monotone

    def follow(self, measured: float, row: Mapping[str, Any]) -> float:
        """(η₁/η₀) · min(1, τ / q); undamped where q ≤ 0."""
        rate = self._factor * (min(1.0, self._threshold / measured) if measured > 0 else 1.0)
        return min(rate, self._followed) if self._monotone else rate


class BoundRate(MeasuredRate):
    """η₀ until the first decay, then the rate that minimises the PAC-Bayes bound's dominating terms.

    Over the tracked directions these terms are ½ Σ λσ², which grows with the rate, and −(1/2β) Σ ln σ², which
    falls with it. To leading order they are smallest at η* of equation (37d) of docs/theory.md. η* is
    inversely proportional to the measured gradient noise and to β. The rule does not know how fast the loss
    falls, and so does not know whether training is finished.

    Args:
        start_epoch: First epoch at η*, ≥ 1; it is measured from the end of the epoch before on.
        interval: Epochs from one measurement to the next, ≥ 1.
        beta_per_example: β / n, > 0.
        learning_rate: η₀ > 0, the optimiser's rate.
        lowest: Smallest η / η₀, > 0.
        highest: Largest η / η₀, at least ``lowest``.

    Raises:
        ValueError: A setting outside its range.
    """

    reads: ClassVar[str | None] = "bounds"

    def __init__(
        self,
        *,
        start_epoch: int,
        interval: int,
        beta_per_example: float,
        learning_rate: float,
        lowest: float,
        highest: float,
    ) -> None:
        super().__init__(
            start_epoch=start_epoch, interval=interval, column="best_rate_top_k", unmeasured=highest
        )
        _require_positive(beta_per_example=beta_per_example, learning_rate=learning_rate, lowest=lowest)
        if not lowest <= highest < math.inf:
            raise ValueError(f"highest must be finite and at least lowest={lowest}, got {highest}")
        self._beta_per_example, self._learning_rate = beta_per_example, learning_rate
        self._lowest, self._highest = lowest, highest

    def follow(self, measured: float, row: Mapping[str, Any]) -> float:
        """η* / η₀ between the lowest and the highest, from η* at β = 1."""
        best = measured / (self._beta_per_example * int(row["train_examples"]))
        return min(max(best / self._learning_rate, self._lowest), self._highest)


def _require_positive(**settings: float) -> None:
    for name, number in settings.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
