"""Objectives: what the attack climbs and what the optimiser descends.

Shapes: B batch, C x H x W image, K classes.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from robustdyn.attacks import summed_cross_entropy


class Objective(Protocol):
    """One axis of a method; the adversarial example is made once per step, by the module."""

    def attack_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar the attack climbs, a sum over examples, from logits (B, K) and labels (B,)."""

    def __call__(
        self, model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(training loss, scalar mean over B; logits (B, K) of the adversarial images)."""


class AdversarialCrossEntropy:
    """mean_b ℓ(f(x_b + δ_b), y_b), ℓ the cross-entropy (Madry et al., ICLR 2018, eq. 2.1)."""

    def attack_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Σ_b ℓ_b."""
        return summed_cross_entropy(logits, labels)

    def __call__(
        self, model: nn.Module, images: Tensor, adversarial: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy of the adversarial images, their logits (B, K))."""
        logits = model(adversarial)
        return F.cross_entropy(logits, labels), logits
