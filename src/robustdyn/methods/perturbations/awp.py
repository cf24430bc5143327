"""Adversarial weight perturbation, per tensor and with one ratio for all."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from robustdyn.methods.perturbations.perturbation import WeightPerturbation

_TINY = 1e-20  # from the authors' code: a tensor without gradient does not move


class AWP(WeightPerturbation):
    """v_k = γ ‖w_k‖ g_k / ‖g_k‖ for each convolution or linear weight (Wu et al., NeurIPS 2020, eqs. 8-10).

    As in the authors' code, there is one ascent step, BatchNorm parameters and biases do not move, and the
    optimiser steps at w + v before v is removed, so that its weight decay acts on w + v.

    Args:
        gamma: γ, size of each tensor's perturbation relative to the tensor, ≥ 0.
        warmup_epochs: First epochs without a perturbation.

    Raises:
        ValueError: A setting outside its range.
    """

    step_at: ClassVar[Literal["perturbed", "original"]] = "perturbed"

    def __init__(self, *, gamma: float, warmup_epochs: int) -> None:
        super().__init__(warmup_epochs=warmup_epochs)
        if not gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        self._gamma = gamma

    def selects(self, name: str, parameter: nn.Parameter) -> bool:
        """Weights with more than one dimension: no BatchNorm, no bias."""
        return parameter.dim() > 1 and "weight" in name

    def direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """γ ‖w_k‖ g_k / ‖g_k‖, tensor by tensor."""
        return [
            gradient * (self._gamma * weight.norm() / (gradient.norm() + _TINY))
            for weight, gradient in zip(weights, gradients, strict=True)
        ]


class GlobalAWP(WeightPerturbation):
    """v = γ (‖w‖ / ‖g‖) g with the norms over all parameters at once, BatchNorm and biases included.

    The variant of the MAIR library, which calls it AWP. There is one ratio for the whole network, so that the
    relative perturbation of a single tensor can have any size. v is removed before the optimiser steps, as in
    SAM.

    Args:
        gamma: γ, size of the perturbation relative to the weights, ≥ 0.
        warmup_epochs: First epochs without a perturbation.

    Raises:
        ValueError: A setting outside its range.
    """

    step_at: ClassVar[Literal["perturbed", "original"]] = "original"

    def __init__(self, *, gamma: float, warmup_epochs: int) -> None:
        super().__init__(warmup_epochs=warmup_epochs)
        if not gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        self._gamma = gamma

    def selects(self, name: str, parameter: nn.Parameter) -> bool:
        """Every parameter."""
        return True

    def direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """γ (‖w‖ / ‖g‖) g."""
        scale = self._gamma * global_norm(weights) / (global_norm(gradients) + _TINY)
        return [gradient * scale for gradient in gradients]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """l2 norm of all entries of all tensors, a scalar."""
    norm: Tensor = torch.stack([tensor.norm() for tensor in tensors]).norm()
    return norm
