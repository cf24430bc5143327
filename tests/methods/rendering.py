"""Reference implementation of the training methods in plain PyTorch, written from their papers.

Attack, objectives, ascent in the weights and optimisers follow the formulas, with explicit probabilities, and
with copied networks where the authors copy them. Only the named random stream of the attack's starting noise
is taken from robustdyn. Clarity comes before speed.

Legend: B batch, K classes, w weights, v their perturbation.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from robustdyn import streams


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training method; pixel radii on the [0, 1] scale."""

    objective: Literal["at", "standard", "trades", "mart"] = "at"
    beta: float = 0.0
    label_smoothing: float = 0.0
    # the attack
    norm: Literal["linf", "l2"] = "linf"
    eps: float = 0.2
    step: float = 0.05
    steps: int = 2
    start: Literal["uniform", "gaussian"] = "uniform"
    attacked_in: Literal["train", "eval"] = "train"
    # the ascent in the weights
    ascent: Literal["none", "awp", "awp_global", "sam"] = "none"
    size: float = 0.0  # γ or ρ
    warmup_epochs: int = 0  # without ascent
    # the descent
    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    decay_all: bool = True  # else only tensors that multiply: no biases, no BatchNorm
    l1: float = 0.0
    decay_epoch: int  # from here on a tenth of the rate


@dataclass
class Trace:
    """The results of a run: the loss of every step and the training metrics of every epoch."""

    losses: list[float] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)


# Objectives -------------------------------------------------------------------------------------------------


def probabilities(logits: Tensor) -> Tensor:
    """Softmax, (B, K)."""
    e = torch.exp(logits - logits.detach().amax(dim=1, keepdim=True))
    return e / e.sum(dim=1, keepdim=True)


def wanted(targets: Tensor, p: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(1 − s) y + s / K as probabilities (B, K), of classes (B,) or probabilities (B, K)."""
    classes = p.shape[1]
    y = torch.eye(classes, dtype=p.dtype)[targets] if targets.dim() == 1 else targets.to(p.dtype)
    return (1 - label_smoothing) * y + label_smoothing / classes


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−Σ_k y_k ln p_k of each example, (B,)."""
    p = probabilities(logits)
    return -(wanted(targets, p, label_smoothing) * p.log()).sum(dim=1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_k p_k (ln p_k − ln q_k) of each example, (B,)."""
    return (p * (p.log() - q.log())).sum(dim=1)


def trades(
    clean: Tensor, robust: Tensor, targets: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Zhang et al., ICML 2019, eq. 5, for each example (B,)."""
    apart = divergence(probabilities(clean), probabilities(robust))
    return cross_entropy(clean, targets, label_smoothing) + beta * apart


def mart(clean: Tensor, robust: Tensor, targets: Tensor, beta: float, *, margins: bool = True) -> Tensor:
    """Wang et al., ICLR 2020, eqs. 7-11, for each example (B,).

    ``margins`` adds the three constants that the authors' code has in its logarithms and weights; otherwise
    this is exactly the paper's formula.
    """
    one_bce, zero, one_weight = (1.0001, 1e-12, 1.0000001) if margins else (1.0, 0.0, 1.0)
    p, q = probabilities(clean), probabilities(robust)
    labelled = torch.eye(p.shape[1], dtype=torch.bool)[targets]
    runner_up = q[~labelled].view(len(q), -1).amax(dim=1)
    boosted = -q[labelled].log() - torch.log(one_bce - runner_up + zero)
    return boosted + beta * divergence(p, q + zero) * (one_weight - p[labelled])


def objective(
    recipe: Recipe, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The loss to descend on and the logits of the adversarial images; clean images go first."""
    if recipe.objective == "standard":
        return cross_entropy(model(x), y, recipe.label_smoothing).mean(), None
    if recipe.objective == "at":
        robust = model(x_adv)
        return cross_entropy(robust, y, recipe.label_smoothing).mean(), robust
    clean, robust = model(x), model(x_adv)
    if recipe.objective == "trades":
        return trades(clean, robust, y, recipe.beta, recipe.label_smoothing).mean(), robust
    return mart(clean, robust, y, recipe.beta).mean(), robust


# Attack -----------------------------------------------------------------------------------------------------


def attack(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    """PGD: start at random in the ball, climb, and project on the ball and on [0, 1]."""
    if recipe.objective == "standard":
        return x
    model.train(recipe.attacked_in == "train")
    climbed: Callable[[Tensor], Tensor] = lambda logits: cross_entropy(logits, y)  # noqa: E731
    if recipe.objective == "trades":
        p = probabilities(model(x)).detach()
        climbed = lambda logits: divergence(p, probabilities(logits))  # noqa: E731
    x_adv = back_to_the_ball(recipe, x, start(recipe, x, draws))
    for _ in range(recipe.steps):
        at = x_adv.clone().requires_grad_(True)
        climbed(model(at)).sum().backward(inputs=[at])
        g = at.grad
        direction = torch.sign(g) if recipe.norm == "linf" else g / lengths(g)
        x_adv = back_to_the_ball(recipe, x, x_adv + recipe.step * direction)
    model.train()
    return x_adv


def start(recipe: Recipe, x: Tensor, draws: torch.Generator) -> Tensor:
    if recipe.start == "gaussian":
        return x + 0.001 * torch.empty_like(x).normal_(generator=draws)
    if recipe.norm == "linf":
        return x + torch.empty_like(x).uniform_(-recipe.eps, recipe.eps, generator=draws)
    direction = torch.empty_like(x).normal_(generator=draws)
    share_of_volume = torch.rand(len(x), 1, 1, 1, generator=draws, dtype=x.dtype)
    return x + recipe.eps * share_of_volume ** (1 / x[0].numel()) * direction / lengths(direction)


def back_to_the_ball(recipe: Recipe, x: Tensor, moved: Tensor) -> Tensor:
    if recipe.norm == "linf":
        inside = torch.maximum(torch.minimum(moved, x + recipe.eps), x - recipe.eps)
    else:
        inside = x + (moved - x) * torch.clamp(recipe.eps / lengths(moved - x), max=1.0)
    return torch.clamp(inside, 0.0, 1.0)


def lengths(x: Tensor) -> Tensor:
    return x.pow(2).sum(dim=(1, 2, 3), keepdim=True).sqrt()


# Ascent in the weights --------------------------------------------------------------------------------------


def weight_perturbation(recipe: Recipe, proxy: nn.Module, loss: Tensor) -> list[Tensor]:
    """v for every parameter, from the loss of a copy of the network."""
    w = [p.detach() for p in proxy.parameters()]
    g = torch.autograd.grad(loss, list(proxy.parameters()))
    if recipe.ascent == "sam":
        return [recipe.size * gk / length_of_all(g) for gk in g]
    if recipe.ascent == "awp_global":
        return [recipe.size * length_of_all(w) * gk / length_of_all(g) for gk in g]
    moved = multiplying(proxy)
    return [
        recipe.size * wk.norm() * gk / gk.norm() if chosen else torch.zeros_like(wk)
        for wk, gk, chosen in zip(w, g, moved, strict=True)
    ]


def multiplying(model: nn.Module) -> list[bool]:
    """Which parameters are weights of convolutions or linear layers."""
    weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return [id(p) in weights for p in model.parameters()]


def length_of_all(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


# Descent ----------------------------------------------------------------------------------------------------


class Optimizer:
    """Momentum SGD, Nesterov's, Adam (decay in the gradient) and AdamW (decay apart), from their formulas."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.recipe, self.t = recipe, 0
        self.weights = list(model.parameters())
        self.decay = [recipe.weight_decay * (recipe.decay_all or m) for m in multiplying(model)]
        self.first = [torch.zeros_like(w) for w in self.weights]
        self.second = [torch.zeros_like(w) for w in self.weights]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        kind, self.t = self.recipe.optimizer, self.t + 1
        for w, g, decay, m, s in zip(
            self.weights, gradients, self.decay, self.first, self.second, strict=True
        ):
            if kind == "adamw":
                w.copy_(w - lr * decay * w)
            else:
                g = g + decay * w
            if kind in ("sgd", "nesterov"):
                m.copy_(0.9 * m + g)
                w.copy_(w - lr * (g + 0.9 * m if kind == "nesterov" else m))
            else:
                m.copy_(0.9 * m + 0.1 * g)
                s.copy_(0.999 * s + 0.001 * g**2)
                w.copy_(w - lr * (m / (1 - 0.9**self.t)) / ((s / (1 - 0.999**self.t)).sqrt() + 1e-8))


# Training ---------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe, model: nn.Module, epochs: Sequence[Sequence[tuple[Tensor, Tensor]]], seed: int
) -> Trace:
    """Train ``model`` on the batches of each epoch, images in [0, 1] and targets."""
    model.train()
    optimizer, trace, step = Optimizer(recipe, model), Trace(), 0
    for epoch, batches in enumerate(epochs):
        lr = recipe.lr * (0.1 if epoch >= recipe.decay_epoch else 1.0)
        sums: dict[str, float] = {}
        for x, y in batches:
            x_adv = attack(recipe, model, x, y, streams.generator(seed, "attack", step, 0))
            w = [p.detach().clone() for p in model.parameters()]
            v = [torch.zeros_like(wk) for wk in w]
            ascent = "none" if epoch < recipe.warmup_epochs else recipe.ascent
            if ascent == "none":
                loss, robust = objective(recipe, model, x, x_adv, y)
                add_metrics(sums, model, robust, x, y)
            else:
                proxy = copy.deepcopy(model)  # the ascent moves no running statistics of the model itself
                at_w, robust = objective(recipe, proxy, x, x_adv, y)
                add_metrics(sums, model, robust, x, y)
                v = weight_perturbation(recipe, proxy, at_w)
                put(model, [wk + vk for wk, vk in zip(w, v, strict=True)])
                loss, _ = objective(recipe, model, x, x_adv, y)
            if recipe.l1:
                weights = [p for p, m in zip(model.parameters(), multiplying(model), strict=True) if m]
                loss = loss + recipe.l1 * sum(p.abs().sum() for p in weights)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            if ascent == "awp":  # step at w + v, then v off (Wu et al., NeurIPS 2020, eq. 11)
                optimizer.step(gradients, lr)
                put(model, [p - vk for p, vk in zip(model.parameters(), v, strict=True)])
            else:  # step at w (Foret et al., ICLR 2021, algorithm 1)
                put(model, w)
                optimizer.step(gradients, lr)
            trace.losses.append(loss.item())
            step += 1
        seen = sum(len(y) for _, y in batches)
        trace.epochs.append({name: value / seen for name, value in sums.items()})
    return trace


@torch.no_grad()
def put(model: nn.Module, weights: Sequence[Tensor]) -> None:
    for p, value in zip(model.parameters(), weights, strict=True):
        p.copy_(value)


@torch.no_grad()
def add_metrics(
    sums: dict[str, float], model: nn.Module, robust: Tensor | None, x: Tensor, y: Tensor
) -> None:
    """Add loss and error of the batch at the unperturbed weights; clean metrics are in eval mode."""
    clean = model.eval()(x)
    model.train()
    for kind, logits in (("robust", robust), ("clean", clean)):
        if logits is not None:
            wrong = (logits.argmax(dim=1) != y).sum()
            for name, value in (("loss", cross_entropy(logits, y).sum()), ("error", wrong)):
                key = f"train_{kind}_{name}"
                sums[key] = sums.get(key, 0.0) + float(value)
