"""What is added to the loss or done to the parameters, with any objective."""

from typing import Any, Literal

import torch
from torch import Tensor, nn


class Regularizer:
    """Weight penalties.

    Args:
        l1: Factor ≥ 0 on Σ|w| over weights with more than one dimension (Rice et al., ICML 2020).
        weight_decay_on: ``"all"`` parameters, as both papers do, or ``"weights"`` only: those with more than
            one dimension, without BatchNorm and biases.

    Raises:
        ValueError: A setting outside its range.
    """

    def __init__(self, *, l1: float, weight_decay_on: Literal["all", "weights"]) -> None:
        if not l1 >= 0:
            raise ValueError(f"l1 must be at least 0, got {l1}")
        if weight_decay_on not in ("all", "weights"):
            raise ValueError(f"weight_decay_on must be all or weights, got {weight_decay_on}")
        self._l1, self._weight_decay_on = l1, weight_decay_on

    def penalty(self, model: nn.Module) -> Tensor | float:
        """The term added to the training loss, a scalar."""
        if self._l1 == 0:
            return 0.0
        return self._l1 * torch.stack([p.abs().sum() for p in model.parameters() if p.dim() > 1]).sum()

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimiser's groups: one, or the weights and, without decay, all the rest."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self._weight_decay_on == "all":
            return [{"params": parameters}]
        weights = [p for p in parameters if p.dim() > 1]
        rest = [p for p in parameters if p.dim() <= 1]
        return [{"params": weights}, {"params": rest, "weight_decay": 0.0}]
