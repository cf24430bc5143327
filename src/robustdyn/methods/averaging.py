"""Weight averaging by Lightning's own callback, once an epoch."""

from typing import Any

from lightning.pytorch.callbacks import WeightAveraging


class EpochAveraging(WeightAveraging):
    """Equal average of the weights at the ends of epochs from ``start_epoch`` on (Izmailov et al., UAI 2018).

    As Lightning's averages do, it stands in for the weights during evaluation and in checkpoints. BatchNorm's
    running statistics are averaged with the weights.

    Args:
        start_epoch: First epoch whose end is averaged, counted from 0.

    Raises:
        ValueError: A negative ``start_epoch``.
    """

    def __init__(self, *, start_epoch: int) -> None:
        if start_epoch < 0:
            raise ValueError(f"start_epoch must be at least 0, got {start_epoch}")
        super().__init__(use_buffers=True)
        self._start_epoch = start_epoch

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """At the ends of epochs, from the first one on."""
        return epoch_idx is not None and epoch_idx >= self._start_epoch

    def state_dict(self) -> dict[str, Any]:
        """Lightning's own, and the last averaged epoch, which it forgets."""
        return super().state_dict() | {"latest_update_epoch": self._latest_update_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        super().load_state_dict(state_dict)
        self._latest_update_epoch = state_dict["latest_update_epoch"]
