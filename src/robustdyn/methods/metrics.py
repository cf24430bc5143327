"""Loss and error of one kind of example, summed over an epoch and over ranks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy


class LossAndError(nn.Module):
    """Mean cross-entropy and 0-1 error over all examples seen since the last reset.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy="disable")  # a NaN loss must show, not vanish
        self.accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, K), labels (B,)."""
        self.loss.update(F.cross_entropy(logits.float(), labels), weight=len(labels))
        self.accuracy.update(logits, labels)

    def compute(self) -> tuple[float, float]:
        """(mean loss in nats, error in [0, 1]), over all ranks."""
        return float(self.loss.compute()), 1.0 - float(self.accuracy.compute())

    def reset(self) -> None:
        """Forget everything seen."""
        self.loss.reset()
        self.accuracy.reset()


class RobustMetrics(nn.Module):
    """Robust (adversarial) and clean :class:`LossAndError` of one split."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.robust = LossAndError(num_classes)
        self.clean = LossAndError(num_classes)

    def compute(self, split: str) -> dict[str, float]:
        """``{split}_robust_loss``, ``{split}_robust_error`` and the same for clean."""
        robust_loss, robust_error = self.robust.compute()
        clean_loss, clean_error = self.clean.compute()
        return {
            f"{split}_robust_loss": robust_loss,
            f"{split}_robust_error": robust_error,
            f"{split}_clean_loss": clean_loss,
            f"{split}_clean_error": clean_error,
        }

    def reset(self) -> None:
        """Forget everything seen."""
        self.robust.reset()
        self.clean.reset()
