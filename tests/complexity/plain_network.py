"""A plain convolutional network whose weights and inputs follow a fixed formula, and other small networks.

The public code of Dziugaite et al. (NeurIPS 2020, nitarshan/robust-generalization-measures) was run on the
first, and its values are in the tests.
"""

import torch
from torch import Tensor, nn

from robustdyn.complexity import NetworkOnExamples
from robustdyn.curvature import EmpiricalRisk


def waves(tensor: Tensor, phase: float, size: float) -> None:
    """Fill a tensor with size · sin(1.7 k + 0.3 k² + phase) in place of random numbers."""
    k = torch.arange(tensor.numel(), dtype=torch.float64)
    with torch.no_grad():
        tensor.copy_((size * torch.sin(1.7 * k + 0.3 * k**2 + phase)).view_as(tensor))


def plain(phase: float) -> nn.Sequential:
    """Convolutions with biases, each followed by BatchNorm, in float64."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4, eps=1e-12),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1),
        nn.BatchNorm2d(5, eps=1e-12),
        nn.ReLU(),
        nn.Conv2d(5, 3, 1),
        nn.BatchNorm2d(3, eps=1e-12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for index, parameter in enumerate(model.double().eval().parameters()):
        waves(parameter, phase + index, 0.5)
        if parameter.dim() == 1:
            parameter.data.add_(0.8)
    return model


def trained() -> nn.Sequential:
    model = plain(0.2)
    for index, norm in enumerate(m for m in model if isinstance(m, nn.BatchNorm2d)):
        waves(norm.running_mean, 5 + index, 0.4)
        waves(norm.running_var, 7 + index, 0.3)
        norm.running_var.add_(0.9)
    return model


def images() -> Tensor:
    inputs = torch.empty(40, 2, 6, 6, dtype=torch.float64)
    waves(inputs, 0.7, 0.5)
    return inputs + 0.5


def on(model: nn.Module, clean: Tensor, targets: Tensor | None = None, **settings) -> NetworkOnExamples:
    """The network on inputs and, as adversarial examples, on shifted ones; every fourth class is wrong."""
    adversarial = settings.pop("adversarial", 0.8 * clean + 0.2 * clean.flip(0))
    if targets is None:
        with torch.no_grad():
            outputs = model(clean)
        predicted = outputs.argmax(dim=1)
        wrong = torch.arange(len(clean)) % 4 == 0
        targets = torch.where(wrong, (predicted + 1) % outputs.shape[1], predicted)
    return NetworkOnExamples(
        model=model,
        clean=clean,
        adversarial=adversarial,
        targets=targets,
        risk=EmpiricalRisk(model, adversarial, targets, chunk_size=16),
        **settings,
    )


def unsettled(model: nn.Module) -> nn.Module:
    """The network in float64 with other statistics, weights and biases of BatchNorm than at its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        for module in model.double().eval().modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.eps = 1e-12  # nothing here depends on it
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
    return model
