"""Small models whose robustness is known or cheap to attack, and helpers to evaluate them."""

import math

import torch
from torch import Tensor, nn

from robustdyn.data import ImageTensors
from robustdyn.data.digits import read_digits
from robustdyn.evaluation import Ball, EvaluationRecord, PGDEvaluator, Sanity, UnboundedPGD, evaluate
from robustdyn.streams import generator

SANITY = {"accuracy_tolerance": 0.002, "logit_tolerance": 1e-4, "unbounded_accuracy": 0.02}
SETTINGS = {"model": "the only one"}


def pgd(kind=PGDEvaluator, **changes):
    settings = {
        "steps": 20,
        "relative_step": 0.25,
        "restarts": 1,
        "loss": "cross_entropy",
        "random_start": "uniform",
        "start_std": 1e-3,
        "iterates": "last",
    }
    return kind(**(settings | changes))


def unbounded(**changes):
    return pgd(UnboundedPGD, **changes)


def run(directory, model, data, evaluators, *, ball, batch_size=32, seed=0, settings=SETTINGS, **changes):
    """The result of an evaluation recorded in ``directory``."""
    with EvaluationRecord.open(directory, settings, {}) as record:
        return evaluate(
            model,
            data,
            evaluators,
            ball=ball,
            sanity=Sanity(**SANITY),
            batch_size=batch_size,
            seed=seed,
            record=record,
            **changes,
        )


class Linear(nn.Module):
    """Logits W x + b of flattened images, so that the distance to every boundary is known."""

    def __init__(self, classes: int, pixels: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, pixels, generator=draw))
        self.bias = nn.Parameter(0.1 * torch.randn(classes, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T + self.bias

    def robust(self, images: Tensor, labels: Tensor, ball: Ball) -> Tensor:
        """Whether no image of the ball is closer to another class, where [0, 1] does not cut the ball.

        x ± δ crosses the boundary between y and k iff ε ‖w_y − w_k‖_* ≥ z_y − z_k, * the dual norm.
        """
        logits = self(images)
        gaps = logits.gather(1, labels[:, None]) - logits
        between = self.weight[labels][:, None] - self.weight[None]
        sizes = between.abs().sum(dim=2) if ball.norm == "linf" else between.norm(dim=2)
        other = torch.arange(len(self.weight)) != labels[:, None]
        return ((gaps > ball.eps * sizes) | ~other).all(dim=1)


def grey_images(count: int, classes: int, *, seed: int = 1, size: int = 4) -> ImageTensors:
    """Images without values near black or white, with random labels."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(90, 166, (count, 1, size, size), generator=draw, dtype=torch.uint8)
    return ImageTensors(images, torch.randint(classes, (count,), generator=draw))


def labelled_by(model: nn.Module, data: ImageTensors, wrong_every: int) -> ImageTensors:
    """The same images with the model's predictions as labels, except for every ``wrong_every``-th image."""
    with torch.no_grad():
        logits = model(data.images / 255)
    labels = logits.argmax(dim=1)
    labels[::wrong_every] = (labels[::wrong_every] + 1) % logits.shape[1]
    return ImageTensors(data.images, labels)


def digits(count: int, *, skip: int = 600) -> ImageTensors:
    return read_digits().take(torch.arange(skip, skip + count))


def trained_net(*, adversarially: bool) -> nn.Module:
    """A convolutional net trained on 600 digits for a second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10)
        )
    data = read_digits().take(torch.arange(600))
    images, labels = data.images / 255, data.labels
    attack = pgd(steps=4, relative_step=0.4).pgd(Ball("linf", 0.15))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for step in range(80):
        chosen = torch.randperm(600, generator=generator(0, "batches", step))[:200]
        x, y = images[chosen], labels[chosen]
        if adversarially:
            x = attack.perturb(net, x, y, generator(0, "attack", step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def binomial_se(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)
