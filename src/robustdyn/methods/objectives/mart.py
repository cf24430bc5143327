"""MART."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustdyn.attacks import AttackLoss, summed_cross_entropy
from robustdyn.methods.objectives.objective import StepLoss

# From the authors' code, for 1, 0 and 1, so that logarithms of adversarial probabilities stay finite.
_MARGIN, _FLOOR, _CORRECT = 1.0001, 1e-12, 1.0000001


class MART:
    """mean_b [ BCE_b + β · KL(p(x_b) ‖ p(x_b + δ_b)) · (1 − p_y(x_b)) ] (Wang et al., ICLR 2020, eqs. 7-11).

    BCE_b = −ln p_y(x_b + δ_b) − ln(1 − max_{k≠y} p_k(x_b + δ_b)), the boosted cross-entropy; the last factor
    gives more weight to misclassified examples. δ maximises the cross-entropy. The margin needs a class to
    compare with, so that targets must be class numbers. As in the authors' code, 1.0001 replaces the 1 in the
    second logarithm, which caps it at 9.2 and changes it by less than 1e-4 / (1 − max_{k≠y} p_k).

    Args:
        beta: β, λ of the paper, ≥ 0.

    Raises:
        ValueError: ``beta`` outside its range.
    """

    takes_probabilities: ClassVar[bool] = False

    def __init__(self, *, beta: float) -> None:
        if not beta >= 0:
            raise ValueError(f"beta must be at least 0, got {beta}")
        self._beta = beta

    def attack_loss(self, model: nn.Module, images: Tensor) -> AttackLoss:
        """Σ_b cross-entropy."""
        return summed_cross_entropy

    def __call__(self, model: nn.Module, images: Tensor, adversarial: Tensor, targets: Tensor) -> StepLoss:
        """The boosted cross-entropy of the adversarial images plus the weighted divergence."""
        clean, robust = model(images), model(adversarial)
        robust_p, clean_log_p = F.softmax(robust, dim=1), F.log_softmax(clean, dim=1)
        clean_p = clean_log_p.exp()  # may round to 0, its own logarithm would be -inf
        others = robust_p.scatter(1, targets[:, None], -1.0)  # no probability, so never the largest
        runner_up = others.amax(dim=1)
        boosted = F.cross_entropy(robust, targets) - torch.log(_MARGIN - runner_up + _FLOOR).mean()
        divergence = (clean_p * (clean_log_p - torch.log(robust_p + _FLOOR))).sum(dim=1)
        unsure = _CORRECT - clean_p.gather(1, targets[:, None]).squeeze(1)
        return StepLoss(boosted + self._beta * (divergence * unsure).mean(), robust)
