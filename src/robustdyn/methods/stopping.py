"""Early stopping by Lightning's own callback, for runs that may be resumed."""

from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping


class EarlyStopping(LightningEarlyStopping):
    """Lightning's callback, with two differences when a run resumes from a checkpoint.

    A run that had stopped stays stopped, where Lightning's would train one more epoch. The patience comes
    from the configuration, so that it can be increased; Lightning's comes from the checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stay stopped."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
