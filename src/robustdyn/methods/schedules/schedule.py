"""What a learning-rate rule is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar


class Schedule(ABC):
    """One axis of a method.

    A rule that follows a measurement names the record table that it reads and the epochs after which it needs
    a row. The measuring callback ensures that the row exists and is computed only once.
    """

    reads: ClassVar[str | None] = None
    """The table whose rows ``observe`` gets; None for a rule that needs none."""

    @abstractmethod
    def factor(self, epoch: float) -> float:
        """η(epoch) / η₀; ``epoch`` counts from 0 and need not be a whole number."""

    def decay_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """First epochs with a suddenly lower rate, below ``max_epochs``."""
        return ()

    def reading_epochs(self, max_epochs: int) -> tuple[int, ...]:
        """Epochs, counted from 0, after which the rule needs a row of ``reads``."""
        return ()

    def observe(self, row: Mapping[str, Any]) -> None:  # noqa: B027 - most rules measure nothing
        """Take note of a row of ``reads``, measured after its epoch."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore it."""
