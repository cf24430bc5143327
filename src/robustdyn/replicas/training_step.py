"""One step of the training of several replicas: its batches, attack, weight perturbation and update.

Shapes: R replicas, P parameters, B examples of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from robustdyn import streams
from robustdyn.attacks import PGD, AttackLoss
from robustdyn.curvature.risk_function import BatchNormMode
from robustdyn.methods.objectives.objective import Objective
from robustdyn.methods.perturbations import WeightPerturbation
from robustdyn.models.modes import mode
from robustdyn.replicas.network import StackedNetwork
from robustdyn.replicas.sampling import Sampling
from robustdyn.replicas.updates import State, Update


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """How every replica is trained.

    A batch is attacked at the replica's weights, the weights are perturbed if there is a perturbation, and
    the optimiser steps on the objective. This is the step of ``robustdyn.methods.AdversarialTraining``,
    without augmentation, warm-up or L1 penalty. Random numbers of replica r at step t are a function of
    (seed, r, t).

    Attributes:
        images: Training examples (n, ...) in [0, 1], on the network's device.
        targets: (n,) classes or (n, K) probabilities.
        objective: What the attack maximises and the optimiser minimises; a mean over the batch of the losses
            of single examples.
        attack: Makes the adversarial examples; always with running statistics if ``batchnorm`` is ``"eval"``.
        perturbation: The weight perturbation, computed for each replica at every step; None for none.
        update: The optimiser's rule.
        learning_rate: η of each step (T,).
        sampling: How batches are drawn.
        batchnorm: ``"eval"`` normalises with the running statistics and does not change them, so that each
            example has a deterministic loss. ``"train"`` normalises with the statistics of each batch and
            updates the running statistics, as training does.
        seed: Seed of all random numbers.

    Raises:
        ValueError: Settings do not fit together.
    """

    images: Tensor
    targets: Tensor
    objective: Objective
    attack: PGD
    perturbation: WeightPerturbation | None
    update: Update
    learning_rate: Sequence[float]
    sampling: Sampling
    batchnorm: BatchNormMode
    seed: int

    def __post_init__(self) -> None:
        if self.batchnorm not in get_args(BatchNormMode):
            raise ValueError(f"batchnorm must be eval or train, got {self.batchnorm}")
        if not len(self.images) == len(self.targets) == self.sampling.examples:
            raise ValueError(
                f"images, targets and sampling must be of as many examples, got {len(self.images)}, "
                f"{len(self.targets)} and {self.sampling.examples}"
            )
        if any(not rate > 0 for rate in self.learning_rate):
            raise ValueError("learning_rate must be positive at every step")


def batch_gradients(
    network: StackedNetwork,
    theta: Tensor,
    statistics: dict[str, Tensor],
    training: Training,
    replicas: Sequence[int],
    step: int,
    *,
    starts_of: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients that the replicas' optimisers receive in one step.

    Args:
        network: The stacked network.
        theta: (R, P), weights; not changed.
        statistics: Running statistics, moved in place where ``training.batchnorm`` is ``"train"``.
        training: How every replica is trained.
        replicas: The numbers of the R replicas.
        step: Number of the step, from 0.
        starts_of: The numbers of R replicas whose random starts the attack takes; None for their own.

    Returns:
        Gradients (R, P) of the objective on each replica's batch, without weight decay, at the perturbed
        weights where there is a perturbation; the objective's value (R,); the perturbation (R, P) or None.
    """
    which = [training.sampling.indices(training.seed, replica, step) for replica in replicas]
    size = len(which[0])
    chosen = torch.cat(which).to(training.images.device)
    images, targets = training.images[chosen], training.targets[chosen]
    starts = [
        training.attack.start(part, _draws(training, replica, step))
        for part, replica in zip(images.split(size), starts_of or replicas, strict=True)
    ]
    return gradients_on(network, theta, statistics, training, images, targets, torch.cat(starts))


def gradients_on(
    network: StackedNetwork,
    theta: Tensor,
    statistics: dict[str, Tensor],
    training: Training,
    images: Tensor,
    targets: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``batch_gradients`` on given batches (R·B, ...), replica by replica, attacked from given ``starts``."""
    trained = training.batchnorm == "train"
    network.use(theta, statistics)
    with mode(network, training=trained):
        adversarial = attacked(network, training, images, targets, starts)
        moves = None
        if training.perturbation is not None:
            # in train mode BatchNorm also normalises with the batch here, but its statistics do not change
            aside = {name: value.clone() for name, value in statistics.items()} if trained else statistics
            leaves = network.use(theta, aside, learn=True)
            loss, _ = _losses(network, training, images, adversarial, targets, len(theta))
            moves = perturb(network, training.perturbation, leaves, torch.autograd.grad(loss, leaves))
        at = theta if moves is None else theta + moves
        leaves = network.use(at, statistics, learn=True)
        loss, losses = _losses(network, training, images, adversarial, targets, len(theta))
        gradients = torch.autograd.grad(loss, leaves)
    return network.flatten(gradients), losses, moves


def advance(
    training: Training, theta: Tensor, gradient: Tensor, moves: Tensor | None, state: State, step: int
) -> None:
    """One step of the optimiser in place, from the results of ``batch_gradients``.

    Args:
        training: How replicas are trained.
        theta: (R, P), weights.
        gradient: (R, P); it may be overwritten.
        moves: (R, P), the weight perturbation; None for none.
        state: The optimiser's state.
        step: Number of the step, from 0.
    """
    perturbed = training.perturbation is not None and training.perturbation.step_at == "perturbed"
    if moves is not None:
        theta.add_(moves)
        if not perturbed:  # as in training, the weights return from w + v with the same rounding
            theta.sub_(moves)
    training.update.step(theta, gradient, state, training.learning_rate[step], step)
    if moves is not None and perturbed:
        theta.sub_(moves)


def attacked(
    network: nn.Module, training: Training, images: Tensor, targets: Tensor, starts: Tensor
) -> Tensor:
    """Adversarial images of a batch (N, ...), as training makes them; the images if there is no attack."""
    attack = training.attack
    if training.batchnorm == "eval" and attack.batchnorm != "eval":
        attack = replace(attack, batchnorm="eval")
    with torch.no_grad(), attack.mode(network):
        loss: AttackLoss | None = training.objective.attack_loss(network, images)
    return images if loss is None else attack.climb(network, images, targets, starts, loss)


def perturb(
    network: StackedNetwork,
    perturbation: WeightPerturbation,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Tensor:
    """The moves v (R, P): each replica's own weight perturbation from its own gradients.

    Args:
        network: The stacked network, which names the tensors.
        perturbation: The rule.
        weights: (R, ...), one tensor per name.
        gradients: Gradients of the loss at these weights.
    """
    present = dict(network.base.named_parameters())
    moves = [torch.zeros_like(weight) for weight in weights]
    moved = [i for i, name in enumerate(network.names) if perturbation.selects(name, present[name])]
    if moved:
        with torch.no_grad():
            found = vmap(perturbation.direction)(
                [weights[i].detach() for i in moved], [gradients[i] for i in moved]
            )
        for index, move in zip(moved, found, strict=True):
            moves[index] = move
    return network.flatten(moves)


def refuse_dropout(model: nn.Module) -> None:
    """Raise ValueError if train mode would draw random numbers from the global generator."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"batchnorm=train would turn on Dropout in {name!r}; use batchnorm=eval")


def _losses(
    network: StackedNetwork,
    training: Training,
    images: Tensor,
    adversarial: Tensor,
    targets: Tensor,
    replicas: int,
) -> tuple[Tensor, Tensor]:
    """The sum of the replicas' objectives, a scalar to differentiate, and each one's robust loss (R,)."""
    outcome = training.objective(network, images, adversarial, targets)
    logits = outcome.robust_logits
    total = replicas * outcome.loss
    if logits is None:  # the objective uses no adversarial images: NaN
        return total, torch.full((replicas,), float("nan"))
    with torch.no_grad():
        each = F.cross_entropy(logits, targets, reduction="none").view(replicas, -1).mean(dim=1)
    return total, each


def _draws(training: Training, replica: int, step: int) -> torch.Generator:
    return streams.generator(training.seed, "replica-attack", replica, step, device=training.images.device)
