"""A small problem in float64, and a reference for a replica's training in plain PyTorch."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from robustdyn.attacks import PGD
from robustdyn.methods import AdversarialCrossEntropy
from robustdyn.replicas import Directions, MomentumUpdate, Sampling, Training
from tests.cases import PreActNet, _unsettle

EXAMPLES = 10


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = PreActNet().double().eval()
        _unsettle(model)
    return model


def images():
    draws = torch.Generator().manual_seed(4)
    inputs = torch.rand(EXAMPLES, 2, 6, 6, generator=draws, dtype=torch.float64)
    return inputs, torch.randint(3, (EXAMPLES,), generator=draws)


def attack(**changes):
    settings = {
        "norm": "linf",
        "eps": 0.1,
        "step_size": 0.04,
        "steps": 3,
        "random_start": "uniform",
        "start_std": 1e-3,
        "batchnorm": "eval",
    }
    return PGD(**(settings | changes))


def sampling(**changes):
    settings = {"examples": EXAMPLES, "batch_size": 4, "replacement": False, "drop_last": False}
    return Sampling(**(settings | changes))


def momentum(**changes):
    return MomentumUpdate(**({"momentum": 0.9, "weight_decay": 5e-3, "initial_buffer": None} | changes))


def training(**changes):
    inputs, targets = images()
    settings = {
        "images": inputs,
        "targets": targets,
        "objective": AdversarialCrossEntropy(label_smoothing=0.0),
        "attack": attack(),
        "perturbation": None,
        "update": momentum(),
        "learning_rate": [0.05] * 4 + [0.005] * 3,  # a decay, in the second epoch
        "sampling": sampling(),
        "batchnorm": "eval",
        "seed": 7,
    }
    return Training(**(settings | changes))


def directions(model, count=5):
    size = sum(p.numel() for p in model.parameters())
    draws = torch.Generator().manual_seed(5)
    vectors, _ = torch.linalg.qr(torch.randn(size, count, generator=draws, dtype=torch.float64))
    return Directions(positions=vectors, forces=vectors)


def by_hand(model, problem, optimizer, replica, perturbation=None):
    """θ after each step of one replica, with torch.optim and backward(); only the draws are the package's."""
    from robustdyn import streams

    model = copy.deepcopy(model)
    optimizer = optimizer(model.parameters())
    eps, size, steps = problem.attack.eps, problem.attack.step_size, problem.attack.steps
    flat = lambda: torch.cat([p.detach().reshape(-1) for p in model.parameters()])  # noqa: E731
    path = [flat()]
    for step, rate in enumerate(problem.learning_rate):
        which = problem.sampling.indices(problem.seed, replica, step)
        x, y = problem.images[which], problem.targets[which]
        draws = streams.generator(problem.seed, "replica-attack", replica, step)
        start = torch.empty_like(x).uniform_(-eps, eps, generator=draws)
        model.train(problem.batchnorm == "train" and problem.attack.batchnorm == "train")
        adversarial = (x + start).clamp(0, 1)
        for _ in range(steps):
            adversarial.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(adversarial), y), adversarial)
            moved = adversarial.detach() + size * gradient.sign()
            adversarial = torch.max(torch.min(moved, x + eps), x - eps).clamp(0, 1)
        model.train(problem.batchnorm == "train")
        if perturbation is not None:
            buffers = [b.clone() for b in model.buffers()]
            perturbation.apply(model, F.cross_entropy(model(adversarial), y))
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        optimizer.zero_grad()
        F.cross_entropy(model(adversarial), y).backward()
        if perturbation is not None and perturbation.step_at == "original":
            perturbation.restore()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if perturbation is not None:
            perturbation.restore()
        path.append(flat())
    return torch.stack(path)


class Quadratic(nn.Module):
    """The loss ½ (θ − z)ᵀ H (θ − z) of examples z, with Hessian H and noise of known covariance."""

    def __init__(self, hessian, start):
        super().__init__()
        self.theta = nn.Parameter(start.clone())
        self.register_buffer("hessian", hessian)

    def forward(self, z):
        offset = self.theta - z
        return 0.5 * ((offset @ self.hessian) * offset).sum(dim=1, keepdim=True)
