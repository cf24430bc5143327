"""TRADES."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from robustdyn.attacks import AttackLoss
from robustdyn.methods.objectives.objective import StepLoss


class TRADES:
    """mean_b [ ℓ(f(x_b), y_b) + β · KL(p(x_b) ‖ p(x_b + δ_b)) ] (Zhang et al., ICML 2019, eq. 5).

    p is the softmax of the logits. δ maximises the same KL, with p(x) held fixed. Clean and adversarial
    images go through the network separately, each with its own batch statistics, as in the authors' code.

    Args:
        beta: β = 1/λ of the paper, ≥ 0.
        label_smoothing: s in [0, 1) of the first term's targets, (1 − s) y + s / K.

    Raises:
        ValueError: A setting outside its range.
    """

    takes_probabilities: ClassVar[bool] = True

    def __init__(self, *, beta: float, label_smoothing: float) -> None:
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0, got {beta}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self._beta, self._label_smoothing = beta, label_smoothing

    def attack_loss(self, model: nn.Module, images: Tensor) -> AttackLoss:
        """Σ_b KL(p(x_b) ‖ p(x_b + δ_b)), which does not depend on the labels."""
        clean = F.softmax(model(images), dim=1)
        return lambda logits, targets: F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="sum")

    def __call__(self, model: nn.Module, images: Tensor, adversarial: Tensor, targets: Tensor) -> StepLoss:
        """Cross-entropy of the clean images plus β times the divergence."""
        clean, robust = model(images), model(adversarial)
        natural = F.cross_entropy(clean, targets, label_smoothing=self._label_smoothing)
        # both as logarithms: a clean probability that rounds to 0 would have a gradient of NaN
        log_q, log_p = F.log_softmax(robust, dim=1), F.log_softmax(clean, dim=1)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return StepLoss(natural + self._beta * divergence, robust)
