"""Trains many replicas of one network from one point, with different mini-batches and attack noise.

Shapes: R replicas of a chunk, P parameters, k directions, T steps, S recorded steps, B examples of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from robustdyn import streams
from robustdyn.attacks import PGD, AttackLoss
from robustdyn.curvature.risk_function import BatchNormMode, cross_entropy
from robustdyn.methods.objectives.objective import Objective
from robustdyn.methods.perturbations import WeightPerturbation
from robustdyn.models.modes import mode
from robustdyn.replicas.expansion import RobustLoss
from robustdyn.replicas.network import Engine, StackedNetwork, project
from robustdyn.replicas.sampling import Sampling
from robustdyn.replicas.updates import Update

Arrays = dict[str, NDArray[np.floating[Any]]]

EXPANDED = ("recomputed_loss", "held_loss", "linear_loss", "expanded_loss", "outside")


@dataclass(frozen=True, kw_only=True, eq=False)
class Directions:
    """The directions on which weights and gradients are projected.

    For momentum SGD both are projected on the same orthonormal vectors u_i. Under a diagonal preconditioner
    D, with u_i orthonormal in the coordinates y = D^{−1/2} θ, weights are projected on D^{−1/2} u_i and
    gradients on D^{1/2} u_i.

    Attributes:
        positions: (P, k); x_i = positions_iᵀ (θ − θ_0).
        forces: (P, k); g_i = forces_iᵀ g. The optimiser's buffer is also projected on them.
    """

    positions: Tensor
    forces: Tensor

    @property
    def count(self) -> int:
        """The number of directions, k."""
        return self.positions.shape[1]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What is recorded and when, in steps taken; 0 is the start.

    Attributes:
        steps: S steps at which positions are recorded, strictly increasing, ≥ 0.
        loss_steps: Steps at which the robust loss is also measured, strictly increasing, ≥ 0.
        loss_examples: Number of training examples, the first ones, over which the loss is the mean.
        mean_steps: Steps at which the mean of the chunk's weights is kept, strictly increasing, ≥ 0. The mean
            is the centre of a measured posterior, and curvature and noise can be measured again along it.
        loss_draws: Random starts of the attack for each example, ≥ 1; the losses are means over these.
        expansion: Whether at the loss steps the robust loss is also measured on the adversarial examples of
            θ_0, and expanded around θ_0.
        weights: Whether the weights of every replica after the last step are kept.

    Raises:
        ValueError: Steps do not increase, there is no draw, or positions are not recorded for an expansion.
    """

    steps: tuple[int, ...]
    loss_steps: tuple[int, ...]
    loss_examples: int
    mean_steps: tuple[int, ...]
    loss_draws: int
    expansion: bool
    weights: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "loss_steps", "mean_steps"):
            steps = getattr(self, name)
            if list(steps) != sorted(set(steps)) or (steps and steps[0] < 0):
                raise ValueError(f"{name} must increase strictly from 0 on, got {list(steps)}")
        if self.loss_draws < 1:
            raise ValueError(f"loss_draws must be at least 1, got {self.loss_draws}")
        lacking = sorted(set(self.loss_steps) - set(self.steps))
        if self.expansion and lacking:
            raise ValueError(f"steps must hold all loss_steps for an expansion; add {lacking}")


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


class Ensemble:
    """Trains chunks of replicas of one network and records them.

    Args:
        model: The network at the common starting point θ_0; it is copied, never changed.
        training: How every replica is trained.
        directions: The directions on which weights and gradients are projected.
        recorded: What is recorded.
        engine: How the replicas of a chunk are computed.

    Raises:
        ValueError: The directions and θ differ in length, a recorded step is beyond the last, or a network
            with Dropout is to be trained in train mode.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        *,
        directions: Directions,
        recorded: Recorded,
        engine: Engine,
    ) -> None:
        self.training, self.directions, self.recorded = training, directions, recorded
        self.network = StackedNetwork(model, engine)
        self.start = self.network.theta()
        self.loss = loss_around(self.network, training, recorded.loss_examples, recorded.loss_draws)
        steps = len(training.learning_rate)
        for name in ("steps", "loss_steps", "mean_steps"):
            when = getattr(recorded, name)
            if when and when[-1] > steps:
                raise ValueError(f"{name} has {when[-1]}, but there are {steps} steps")
        wanted = (self.network.numel, directions.count)
        if directions.positions.shape != wanted or directions.forces.shape != wanted:
            raise ValueError(f"directions must be {wanted}, got {tuple(directions.positions.shape)}")
        if training.batchnorm == "train":
            refuse_dropout(model)

    def run(self, replicas: Sequence[int]) -> Arrays:
        """Train some replicas from the start to the end.

        Args:
            replicas: The numbers of the R replicas. A replica's path is a function of its number, except for
                rounding, which may differ between chunks of different sizes.

        Returns:
            Arrays by name, as ``robustdyn.replicas.RecordedEnsemble`` describes them: ``position``,
            ``buffer``, ``gradient``, ``distance``, ``batch_loss``, ``robust_loss``, ``robust_error`` and,
            with an expansion, ``EXPANDED``. All are float64 except ``mean_move`` (1, M, P) float32, the mean
            over these R replicas, and, if they are kept, ``weights`` (R, P), θ after the last step.

        Raises:
            FloatingPointError: A replica's weights are not finite.
        """
        training, steps = self.training, len(self.training.learning_rate)
        theta = self.start.expand(len(replicas), -1).clone()
        statistics = self.network.statistics(len(replicas))
        state = training.update.begin(theta)
        record = _Record(len(replicas), self)
        record.note(0, theta, training.update.buffer(state), None)
        record.note_mean(0, theta)
        self._note_loss(record, 0, theta, statistics)
        for step, rate in enumerate(training.learning_rate):
            gradient, losses, moves = batch_gradients(
                self.network, theta, statistics, training, replicas, step
            )
            record.arrays["batch_loss"][:, step] = losses.double().cpu().numpy()
            # the optimiser changes the gradient in place, so it is copied if it is recorded
            kept = gradient.clone() if step + 1 in record.rows else None
            perturbed = training.perturbation is not None and training.perturbation.step_at == "perturbed"
            if moves is not None:
                theta.add_(moves)
                if not perturbed:  # as in training, the weights return from w + v with the same rounding
                    theta.sub_(moves)
            training.update.step(theta, gradient, state, rate, step)
            if moves is not None and perturbed:
                theta.sub_(moves)
            record.note(step + 1, theta, training.update.buffer(state), kept)
            record.note_mean(step + 1, theta)
            self._note_loss(record, step + 1, theta, statistics)
        finite = theta.isfinite().all(dim=1)
        if not bool(finite.all()):
            worst = [number for number, good in zip(replicas, finite.tolist(), strict=True) if not good]
            raise FloatingPointError(f"replicas {worst} diverged within {steps} steps")
        return record.arrays | ({"weights": theta.cpu().numpy()} if self.recorded.weights else {})

    def _note_loss(self, record: "_Record", step: int, theta: Tensor, statistics: dict[str, Tensor]) -> None:
        if step not in self.recorded.loss_steps:
            return
        losses, errors = self.loss.recomputed(theta, statistics)
        found: Arrays = {
            "robust_loss": losses.mean(dim=1).cpu().numpy(),
            "robust_error": errors.cpu().numpy(),
        }
        if self.recorded.expansion:
            moves = theta - self.start
            found["linear_loss"], found["expanded_loss"] = self.loss.expanded(moves)
            found["recomputed_loss"] = losses.cpu().numpy()
            found["held_loss"] = self.loss.held(theta, statistics)[0].mean(dim=1).cpu().numpy()
            spanned = (moves @ self.directions.positions) @ self.directions.forces.T
            found["outside"] = (moves - spanned).double().norm(dim=1).cpu().numpy()
        column = self.recorded.loss_steps.index(step)
        for name, values in found.items():
            record.arrays[name][:, column] = values


class _Record:
    """The arrays of a chunk, which are filled step by step."""

    def __init__(self, replicas: int, ensemble: Ensemble) -> None:
        recorded, self.directions, self.start = ensemble.recorded, ensemble.directions, ensemble.start
        self.rows = {step: row for row, step in enumerate(recorded.steps)}
        self.mean_rows = {step: row for row, step in enumerate(recorded.mean_steps)}
        projected = (replicas, len(recorded.steps), self.directions.count)
        losses = (replicas, len(recorded.loss_steps))
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("position", "buffer", "gradient"), projected)
        shapes |= {"distance": projected[:2], "batch_loss": (replicas, len(ensemble.training.learning_rate))}
        shapes |= dict.fromkeys(("robust_loss", "robust_error"), losses)
        if recorded.expansion:
            shapes |= dict.fromkeys(EXPANDED, losses) | {"recomputed_loss": (*losses, recorded.loss_draws)}
        self.arrays: Arrays = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
        moves = (1, len(recorded.mean_steps), len(self.start))
        self.arrays["mean_move"] = np.full(moves, np.nan, dtype=np.float32)

    def note_mean(self, step: int, theta: Tensor) -> None:
        row = self.mean_rows.get(step)
        if row is not None:
            self.arrays["mean_move"][0, row] = (theta - self.start).double().mean(dim=0).cpu().numpy()

    def note(self, step: int, theta: Tensor, buffer: Tensor, gradient: Tensor | None) -> None:
        row = self.rows.get(step)
        if row is None:
            return
        moved = theta - self.start
        self.arrays["position"][:, row] = project(moved, self.directions.positions)
        self.arrays["buffer"][:, row] = project(buffer, self.directions.forces)
        self.arrays["distance"][:, row] = moved.double().norm(dim=1).cpu().numpy()
        if gradient is not None:
            self.arrays["gradient"][:, row] = project(gradient, self.directions.forces)


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
    trained = training.batchnorm == "train"
    network.use(theta, statistics)
    with mode(network, training=trained):
        starts = [
            training.attack.start(part, _draws(training, replica, step))
            for part, replica in zip(images.split(size), starts_of or replicas, strict=True)
        ]
        adversarial = attacked(network, training, images, targets, torch.cat(starts))
        moves = None
        if training.perturbation is not None:
            # in train mode BatchNorm also normalises with the batch here, but its statistics do not change
            aside = {name: value.clone() for name, value in statistics.items()} if trained else statistics
            leaves = network.use(theta, aside, learn=True)
            loss, _ = _losses(network, training, images, adversarial, targets, len(replicas))
            moves = perturb(network, training.perturbation, leaves, torch.autograd.grad(loss, leaves))
        at = theta if moves is None else theta + moves
        leaves = network.use(at, statistics, learn=True)
        loss, losses = _losses(network, training, images, adversarial, targets, len(replicas))
        gradients = torch.autograd.grad(loss, leaves)
    return network.flatten(gradients), losses, moves


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


def loss_around(network: StackedNetwork, training: Training, examples: int, draws: int) -> RobustLoss:
    """Cross-entropy on the first training examples, made adversarial by training's attack on cross-entropy.

    This is the loss in evaluation, for any objective and any mode of BatchNorm in training.

    Args:
        network: The stacked network, copied at θ_0.
        training: Data, attack and seed.
        examples: m ≥ 1.
        draws: A ≥ 1, random starts of the attack for each example.
    """
    return RobustLoss(
        network,
        training.images[:examples],
        training.targets[:examples],
        cross_entropy,
        training.attack,
        draws=draws,
        batch_size=training.sampling.batch_size,
        seed=training.seed,
    )


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
