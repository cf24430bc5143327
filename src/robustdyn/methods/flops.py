"""Floating-point operations of a training step, and how many a GPU can do.

A multiplication and the addition after it are two operations, in both numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robustdyn import streams
from robustdyn.models.modes import frozen_statistics

if TYPE_CHECKING:
    from robustdyn.methods.adversarial_training import AdversarialTraining

# Longer names first, because a name is compared from its start.
BFLOAT16_PEAKS: Mapping[str, float] = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A40": 150e12,
}
"""Operations a second in bfloat16, without sparsity, from NVIDIA's data sheets, by PyTorch's names."""


class _Counter(TorchDispatchMode):
    """Adds up PyTorch's formulas. Its own counter also follows modules, and then refuses autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def bfloat16_peak(card: str) -> float | None:
    """Operations a second that a GPU can do at most in bfloat16; None if the card is not known.

    Args:
        card: The name that ``torch.cuda.get_device_name`` returns.
    """
    if " MIG " in card:  # a part of a card
        return None
    return next((peak for name, peak in BFLOAT16_PEAKS.items() if card.startswith(name)), None)


def training_flops(module: "AdversarialTraining", images: Tensor, targets: Tensor) -> int:
    """Operations that attack, weight perturbation and descent need for one training image.

    Counted in eager passes: convolutions and matrix products, forward and backward. Passes that only the
    metrics need do not count, nor do a curvature penalty and the optimiser. The network, its gradients and
    PyTorch's random numbers are left as they were.

    Args:
        module: At the epoch it is in, which decides whether the weights are perturbed.
        images: A batch (B, C, H, W), of which the first is taken.
        targets: (B,) classes, or (B, K) probabilities.
    """
    # twice the same, since BatchNorm needs two values of each channel
    images, targets = images[:1].repeat(2, 1, 1, 1), targets[:1].repeat_interleave(2, dim=0)
    images = module.execution.images(images)
    model, attack, objective = module.model, module.attack, module.objective

    def descend() -> None:
        loss = objective(model, images, images, targets).loss
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)

    def clean() -> None:
        with torch.no_grad(), attack.mode(model):
            objective.attack_loss(model, images)

    def one_step() -> None:
        with torch.no_grad(), attack.mode(model):
            loss = objective.attack_loss(model, images)
        if loss is not None:
            draws = streams.generator(module.seed, "flops", device=images.device)
            start = attack.start(images, draws)
            replace(attack, steps=1).climb(model, images, targets, start, loss)

    def counted(passes: Callable[[], None]) -> int:
        with (
            # dropout must draw the same in training, and in a run that resumes within the epoch
            torch.random.fork_rng([images.device] if images.is_cuda else []),
            frozen_statistics(model),
            module.execution.eager(),
            torch.enable_grad(),
            _Counter() as counter,
        ):
            passes()
        return int(counter.flops)

    before = counted(clean)
    of_attack = before + attack.steps * (counted(one_step) - before)
    perturbation = module.perturbation
    perturbed = perturbation is not None and module.current_epoch >= perturbation.warmup_epochs
    return (of_attack + (1 + perturbed) * counted(descend)) // 2
