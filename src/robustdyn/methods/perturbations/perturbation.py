"""What a weight perturbation is: an ascent step in the weights before the descent step, undone later."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn


class WeightPerturbation(ABC):
    """Moves weights from w to w + v, v from the loss's gradient at w, and back.

    Subclasses define which tensors move and how v follows from their gradients. The model itself is moved.
    There is no second copy of it, and only v is kept.

    Args:
        warmup_epochs: First epochs, counted from 0, without a perturbation.

    Raises:
        ValueError: A negative ``warmup_epochs``.
    """

    step_at: ClassVar[Literal["perturbed", "original"]]
    """Where the optimiser's step is taken: weight decay and momentum see w + v, or w."""

    def __init__(self, *, warmup_epochs: int) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        self.warmup_epochs = warmup_epochs
        self._applied: list[tuple[nn.Parameter, Tensor]] = []

    @abstractmethod
    def selects(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the tensor of this name moves."""

    @abstractmethod
    def direction(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """v, a tensor for each of ``weights``, from the loss's gradients there."""

    @torch.no_grad()
    def apply(self, model: nn.Module, loss: Tensor, *, loss_scale: float | None = None) -> None:
        """Move ``model`` to w + v.

        The gradient is averaged over the ranks of a data-parallel run, so that all of them move alike; no
        ``.grad`` is touched.

        Args:
            model: Network, at w.
            loss: Scalar with a graph, the loss at w; its graph is freed.
            loss_scale: Factor that keeps half-precision gradients from vanishing; None without one. v does
                not depend on it, except that v is 0 for all tensors and ranks if it makes a gradient
                infinite.

        Raises:
            RuntimeError: The last perturbation was not undone.
        """
        if self._applied:
            raise RuntimeError("the weights are perturbed already: restore() comes first")
        weights = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and self.selects(name, parameter)
        ]
        gradients = _mean_over_ranks(_gradients(loss, weights, loss_scale))
        if loss_scale is not None:
            finite = torch.stack([g.isfinite().all() for g in gradients]).all()
            gradients = [torch.where(finite, g / loss_scale, 0.0) for g in gradients]
        moves = self.direction(weights, gradients)
        for weight, move in zip(weights, moves, strict=True):
            weight.add_(move)
        self._applied = list(zip(weights, moves, strict=True))
        torch.clear_autocast_cache()  # else autocast would keep using the half-precision copies of w

    @torch.no_grad()
    def restore(self) -> None:
        """Subtract v from the current weights; does nothing without a perturbation."""
        for weight, move in self._applied:
            weight.sub_(move)
        self._applied = []
        torch.clear_autocast_cache()


def _gradients(loss: Tensor, weights: Sequence[Tensor], loss_scale: float | None) -> list[Tensor]:
    """Of the scaled loss; zero where it does not depend on a weight."""
    scale = None if loss_scale is None else torch.full_like(loss, loss_scale)
    # as the descent's backward pass, which runs outside autocast too
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(loss, weights, grad_outputs=scale, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


def _mean_over_ranks(gradients: list[Tensor]) -> list[Tensor]:
    """One all-reduce for all of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return gradients
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    return [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
