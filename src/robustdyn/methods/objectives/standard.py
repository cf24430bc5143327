"""Standard training, without an attack."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustdyn.methods.objectives.objective import StepLoss


class CrossEntropy:
    """mean_b ℓ(f(x_b), y_b), ℓ the cross-entropy: no adversarial images, none of their metrics.

    Args:
        label_smoothing: s in [0, 1): targets become (1 − s) y + s / K (Szegedy et al., CVPR 2016, section 7).

    Raises:
        ValueError: ``label_smoothing`` outside its range.
    """

    takes_probabilities: ClassVar[bool] = True

    def __init__(self, *, label_smoothing: float) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self._label_smoothing = label_smoothing

    def attack_loss(self, model: nn.Module, images: Tensor) -> None:
        """None: no attack."""

    def __call__(self, model: nn.Module, images: Tensor, adversarial: Tensor, targets: Tensor) -> StepLoss:
        """Cross-entropy of the unperturbed images."""
        loss = F.cross_entropy(model(images), targets, label_smoothing=self._label_smoothing)
        return StepLoss(loss, None)
