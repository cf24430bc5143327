"""Small networks on examples in float64, for which measures can be computed by brute force."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from robustdyn.attacks import PGD
from robustdyn.complexity import NetworkOnExamples
from robustdyn.curvature import EmpiricalRisk

INPUTS, HIDDEN, CLASSES, EXAMPLES = 6, 5, 3, 40
ATTACK = PGD(norm="linf", eps=0.03, step_size=0.01, steps=5)


def relu_network() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def tanh_network() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))


def batchnorm_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def initialised(build: Callable[[], nn.Module], scale: float = 3.0) -> nn.Module:
    """The network with large random weights, so that its curvature is far from that of a linear one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = build().double().eval()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=scale / module.in_features**0.5)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.3)
            if isinstance(module, nn.BatchNorm1d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def on_examples(
    model: nn.Module,
    *,
    attack: PGD | None = ATTACK,
    like: NetworkOnExamples | None = None,
    seed: int = 0,
    chunk_size: int | None = 16,
) -> NetworkOnExamples:
    """The network on 40 examples, about three quarters of which it classifies correctly.

    Args:
        model: In eval mode.
        attack: None gives examples without an attack, which are their own adversarial examples.
        like: Takes the inputs of another network on examples.
        seed: Of the measures.
        chunk_size: Of the risk; the last chunk is smaller.
    """
    if like is None:
        generator = torch.Generator().manual_seed(1)
        clean = torch.rand(EXAMPLES, INPUTS, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            logits = model(clean)
            targets = logits.argmax(dim=1)
        random = torch.randint(logits.shape[1], (EXAMPLES,), generator=generator)
        targets = torch.where(torch.rand(EXAMPLES, generator=generator) < 0.3, random, targets)
        adversarial = clean if attack is None else attack.perturb(model, clean, targets, generator)
    else:
        clean, adversarial, targets = like.clean, like.adversarial, like.targets
    return NetworkOnExamples(
        model=model,
        clean=clean,
        adversarial=adversarial,
        targets=targets,
        risk=EmpiricalRisk(model, adversarial, targets, chunk_size=chunk_size),
        attack=attack,
        seed=seed,
    )


def loss_of(network: NetworkOnExamples) -> Callable[[Tensor], Tensor]:
    """The mean cross-entropy on the adversarial examples as a function of flat parameters (P,)."""
    parameters = dict(network.model.named_parameters())
    sizes = [p.numel() for p in parameters.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        named = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(network.model, named, (network.adversarial,)), network.targets)

    return loss


def flat_weights(network: NetworkOnExamples) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in network.model.parameters()])


def dense_hessian(network: NetworkOnExamples) -> Tensor:
    return torch.func.hessian(loss_of(network))(flat_weights(network))


@torch.no_grad()
def relu_rescaling(model: nn.Sequential, factor: float = 4.0) -> None:
    """The first layer times a power of two, the next one divided by it: the function keeps its bits."""
    model[0].weight *= factor
    model[0].bias *= factor
    model[-1].weight /= factor


@torch.no_grad()
def batchnorm_scale(model: nn.Sequential, factor: float = 4.0) -> None:
    """The layer in front of the BatchNorm times a factor, which its running statistics follow."""
    model[0].weight *= factor
    model[0].bias *= factor
    norm = model[1]
    norm.running_mean *= factor
    norm.running_var.copy_(factor**2 * (norm.running_var + norm.eps) - norm.eps)


REPARAMETRISATIONS = {
    "relu_rescaling": (relu_network, relu_rescaling),
    "batchnorm_scale": (batchnorm_network, batchnorm_scale),
}


def state_of(model: nn.Module) -> tuple[object, ...]:
    """All that a measure could change: tensors, gradients, flags and hooks."""
    tensors = [(name, t.clone()) for name, t in model.state_dict().items()]
    return (
        [(name, t.tolist()) for name, t in tensors],
        [p.grad is None for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
    )


class Fragile(nn.Module):
    """Raises an error in a chosen forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.passes_left: float = float("inf")

    def forward(self, x: Tensor) -> Tensor:
        self.passes_left -= 1
        if self.passes_left < 0:
            raise RuntimeError("this pass fails")
        return self.inner(x)


def assert_model_is_as_before(measure, *, passes: int) -> None:
    """The measure leaves the model as it was, also if it fails after this many passes."""
    network = on_examples(Fragile(initialised(relu_network)).eval())
    before = state_of(network.model)
    assert math.isfinite(measure(network).value)
    assert state_of(network.model) == before
    network.model.passes_left = passes
    with pytest.raises(RuntimeError, match="this pass fails"):
        measure(network)
    assert state_of(network.model) == before
