"""Gaussian noise in the gradient, with the covariance that the mini-batch gradient has by itself."""

import torch
from torch import Tensor, nn

from robustdyn.data import Part


class GradientNoise:
    """Adds noise to the gradient of every step, so that the covariance of its noise becomes (1 + factor) C.

    With g_b the gradient of one example's loss and the mean g = (1/B) Σ_b g_b, a step takes g + z,

        z = √(factor / (B (B − 1))) Σ_b (w_b − w̄) g_b,  w_b independent and standard normal.

    Given the batch, z is Gaussian with mean 0 and covariance factor · S / B, where S is the covariance of the
    g_b with denominator B − 1. S is unbiased for the covariance C₁ of one example's gradient, so that z has
    factor times the covariance C = C₁ / B of a batch of independent examples. g + z is the gradient of a
    weighted mean of the examples' losses and costs no further pass.

    With BatchNorm in train mode g_b is the derivative of example b's loss with the whole batch's statistics
    as functions of the weights. The batch's gradient is then the mean of g_b that depend on each other, and
    z has the covariance of their spread, which is no longer exactly that of the gradients of other batches.

    Args:
        factor: Covariance of z in multiples of C, ≥ 0.

    Raises:
        ValueError: ``factor`` outside its range.
    """

    def __init__(self, *, factor: float) -> None:
        if not factor >= 0:
            raise ValueError(f"factor must be at least 0, got {factor}")
        self.factor = factor

    def weighted(self, model: nn.Module, part: Part, generator: torch.Generator) -> nn.Module:
        """``model`` with the same outputs, through which losses have the gradient g + z.

        Args:
            model: From images (B, ...) of one part of a batch to logits (B, K). The loss must be a mean over
                examples, each with its own logits. A pass may stack several kinds of images of the part.
            part: The part of a batch that this process has. The w_b are drawn for the whole batch.
            generator: Source of the w_b, on the device of the model.

        Raises:
            ValueError: The batch has one example, whose gradient has no covariance.
        """
        if part.whole < 2:
            raise ValueError("gradient noise needs a batch of at least two examples, got one")
        draws = torch.randn(part.whole, generator=generator, device=generator.device)
        scale = (self.factor * part.whole / (part.whole - 1)) ** 0.5
        weights = 1 + scale * (draws - draws.mean())
        return _Weighted(model, weights[part.places])


class _Weighted(nn.Module):
    """Multiplies what the backward pass brings to an example's logits with the example's weight."""

    def __init__(self, model: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.model, self._weights = model, weights

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self._weight)
        return logits

    def _weight(self, gradient: Tensor) -> Tensor:
        weights = self._weights.repeat(len(gradient) // len(self._weights))
        return (gradient * weights.view(-1, *[1] * (gradient.dim() - 1))).to(gradient.dtype)
