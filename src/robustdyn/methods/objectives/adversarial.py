"""Adversarial training as Madry et al. define it."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustdyn.attacks import AttackLoss, summed_cross_entropy
from robustdyn.methods.objectives.objective import StepLoss


class AdversarialCrossEntropy:
    """mean_b ℓ(f(x_b + δ_b), y_b), ℓ the cross-entropy (Madry et al., ICLR 2018, eq. 2.1).

    Args:
        label_smoothing: s in [0, 1): the descent's targets become (1 − s) y + s / K; the attack keeps y.

    Raises:
        ValueError: ``label_smoothing`` outside its range.
    """

    takes_probabilities: ClassVar[bool] = True

    def __init__(self, *, label_smoothing: float) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self._label_smoothing = label_smoothing

    def attack_loss(self, model: nn.Module, images: Tensor) -> AttackLoss:
        """Σ_b ℓ_b."""
        return summed_cross_entropy

    def __call__(self, model: nn.Module, images: Tensor, adversarial: Tensor, targets: Tensor) -> StepLoss:
        """Mean cross-entropy of the adversarial images."""
        logits = model(adversarial)
        return StepLoss(F.cross_entropy(logits, targets, label_smoothing=self._label_smoothing), logits)
