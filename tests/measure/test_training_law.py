"""Compares the recorded posterior of a run with replicas of it, which a loop without this package trains."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from robustdyn.attacks import PGD
from robustdyn.measure import Eigenpairs, Recorder, RefreshedSlope, Spectrum
from robustdyn.records import read_table

N, BATCH, EPOCHS, HIDDEN, K = 200, 32, 3, 16, 5  # the last batch of an epoch has eight examples
EPS, STEP, STEPS = 0.15, 0.05, 5
MU, OMEGA = 0.9, 5e-4
REPLICAS = 256  # a standard error of 4 % for the geometric mean of five variances


def logits(weights, images):
    """(R, b, 10) of R networks, each with images (b, 64) of its own."""
    first, shift, second, last = weights
    hidden = torch.relu(torch.baddbmm(shift[:, None], images, first.transpose(1, 2)))
    return torch.baddbmm(last[:, None], hidden, second.transpose(1, 2))


def attacked(weights, images, targets, draws):
    """PGD in the l∞ ball from uniform starts (Madry et al., ICLR 2018)."""
    low, high = (images - EPS).clamp(0, 1), (images + EPS).clamp(0, 1)
    here = (images + EPS * (2 * torch.rand(images.shape, generator=draws) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        here.requires_grad_()
        loss = F.cross_entropy(logits(weights, here).flatten(0, 1), targets.flatten(), reduction="sum")
        up = torch.autograd.grad(loss, here)[0].sign()
        here = torch.minimum(torch.maximum(here.detach() + STEP * up, low), high)
    return here


def gradients(weights, images, targets, draws):
    """Of each network's mean loss on its own batch, under an attack on it."""
    here = attacked(weights, images, targets, draws)
    leaves = [w.clone().requires_grad_() for w in weights]
    losses = F.cross_entropy(logits(leaves, here).flatten(0, 1), targets.flatten(), reduction="none")
    return torch.autograd.grad(losses.view(targets.shape).mean(dim=1).sum(), leaves)


def trained(weights, images, targets, epochs, draws, *, batch, rate):
    """Momentum SGD with shuffled epochs: the weights (R, P) after every epoch."""
    buffers, ends = [torch.zeros_like(w) for w in weights], []
    for _ in range(epochs):
        order = torch.stack([torch.randperm(N, generator=draws) for _ in range(len(weights[0]))])
        for rows in order.split(batch, dim=1):
            found = gradients(weights, images[rows], targets[rows], draws)
            buffers = [MU * v + g + OMEGA * w for v, g, w in zip(buffers, found, weights, strict=True)]
            weights = [w - rate * v for w, v in zip(weights, buffers, strict=True)]
        ends.append(torch.cat([w.flatten(1) for w in weights], dim=1))
    return ends


def eigenvectors(network, images, targets, draws):
    """The leading K of the dense Hessian (P, K), under another attack than the measurement's."""
    weights = [w.detach()[None] for w in network.parameters()]
    here = attacked(weights, images[None], targets[None], draws).double()

    def loss(theta):
        parts = theta.split([w.numel() for w in weights])
        shaped = [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
        return F.cross_entropy(logits(shaped, here)[0], targets)

    theta = torch.cat([w.flatten() for w in weights]).double()
    hessian = torch.func.jacrev(torch.func.grad(loss), chunk_size=256)(theta)
    return torch.linalg.eigh(hessian).eigenvectors[:, -K:].flip(1).float()


@pytest.mark.slow  # 8 s each, the Hessians of 1,210 parameters
@pytest.mark.parametrize("rate", [0.05, 0.005])  # directions faster than an epoch, and slower ones
def test_variances_of_replicas_are_within_a_quarter_of_those_recorded(tmp_path, rate):
    digits = load_digits()
    images = torch.tensor(digits.images[:N] / 16, dtype=torch.float32).flatten(1)
    targets = torch.tensor(digits.target[:N])
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    draws = torch.Generator().manual_seed(1)
    start = [w.detach()[None] for w in network.parameters()]
    (*_, start) = trained(start, images, targets, 400, draws, batch=N, rate=0.05)
    nn.utils.vector_to_parameters(start[0], network.parameters())
    copies = [w.detach().repeat(REPLICAS, *[1] * w.dim()) for w in network.parameters()]
    replicas = trained(copies, images, targets, EPOCHS, draws, batch=BATCH, rate=rate)

    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=MU, weight_decay=OMEGA)
    directions = []
    with Recorder(
        network,
        images,
        targets,
        tmp_path / "run",
        attack=PGD(norm="linf", eps=EPS, step_size=STEP, steps=STEPS),
        batch_size=BATCH,
        measurements={"spectrum": Spectrum(), "slopes": RefreshedSlope()},
        eigenpairs=Eigenpairs(directions=K),
        second_attack=N,
    ) as recorder:
        for epoch in range(EPOCHS):
            for rows in torch.randperm(N, generator=draws).split(BATCH):
                weights = [w.detach()[None] for w in network.parameters()]
                found = gradients(weights, images[rows][None], targets[rows][None], draws)
                for parameter, gradient in zip(network.parameters(), found, strict=True):
                    parameter.grad = gradient[0]
                optimizer.step()
                recorder.step(optimizer)
            recorder.measure(epoch)
            directions.append(eigenvectors(network, images, targets, draws))

    recorded = read_table(tmp_path / "run", "posterior")
    assert recorded["attack_follows"].all()
    for epoch, (places, along) in enumerate(zip(replicas, directions, strict=True)):
        measured = (places @ along).var(dim=0).numpy()
        law = recorded[recorded["epoch"] == epoch]["posterior_variance"].to_numpy()
        # what the theory claims of a network, whose directions turn; their geometric mean
        assert 0.8 < np.exp(np.log(measured / law).mean()) < 1.25
