"""Early stopping by Lightning's own callback, in runs that are started again."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping


class EarlyStopping(LightningEarlyStopping):
    """Lightning's, with two differences when a run goes on from a checkpoint.

    A run that had stopped stays stopped, where Lightning's trains one more epoch; and the patience is that
    of the configuration, so that a run can be given more of it, where Lightning's is the checkpoint's.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what was counted."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stay stopped."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
