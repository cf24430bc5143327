"""Loss and error of one kind of example, summed over an epoch and over ranks."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric


class LossAndError(Metric):
    """Mean cross-entropy and 0-1 error over all examples seen since the last reset.

    If targets are probabilities (mixed images), the error is the expected one, 1 minus the probability of the
    predicted class. A NaN loss gives a NaN mean.
    """

    loss: Tensor
    right: Tensor
    examples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss", "right", "examples"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (B, K), targets (B,) classes or (B, K) probabilities."""
        self.loss += F.cross_entropy(logits.float(), targets, reduction="sum")
        predicted = logits.argmax(dim=1)
        right = predicted == targets if targets.dim() == 1 else targets.gather(1, predicted[:, None])
        self.right += right.sum()
        self.examples += len(targets)

    def compute(self) -> tuple[float, float]:
        """(mean loss in nats, error in [0, 1]), over all ranks."""
        return float(self.loss / self.examples), 1.0 - float(self.right / self.examples)

    def sums(self) -> Tensor:
        """The sums behind ``compute``, over all ranks, (3,) on the CPU; every rank must call it."""
        own = torch.stack([self.loss, self.right, self.examples])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(own)
        return own.cpu()

    def take_sums(self, sums: Tensor) -> None:
        """Resume from what ``sums`` returned."""
        self.loss, self.right, self.examples = sums.to(self.loss).unbind()
        self._update_count = int(self.examples > 0)


class RobustMetrics(nn.Module):
    """Robust (adversarial) and clean ``LossAndError`` of one split."""

    def __init__(self) -> None:
        super().__init__()
        self.robust = LossAndError()
        self.clean = LossAndError()

    def compute(self, split: str) -> dict[str, float]:
        """``{split}_robust_loss``, ``{split}_robust_error`` and the same for clean, as far as seen."""
        values: dict[str, float] = {}
        for kind, metric in (("robust", self.robust), ("clean", self.clean)):
            if metric.update_called:
                values[f"{split}_{kind}_loss"], values[f"{split}_{kind}_error"] = metric.compute()
        return values

    def sums(self) -> dict[str, Tensor]:
        """What has been seen so far, over all ranks; every rank must call it."""
        return {"robust": self.robust.sums(), "clean": self.clean.sums()}

    def take_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Resume from what ``sums`` returned; without it, start empty."""
        self.reset()
        for kind, values in sums.items():
            getattr(self, kind).take_sums(values)

    def reset(self) -> None:
        """Forget everything seen."""
        self.robust.reset()
        self.clean.reset()
