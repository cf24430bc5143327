"""Follows noise-free paths: replicas whose optimiser receives the gradient over all training examples.

Their attack is made again at every step, from other starts. A weight perturbation follows a mini-batch's
gradient, and its mean over batches is not the perturbation of the whole set. It is therefore computed for
parts of the set as large as a batch.

There are two kinds of path (docs/theory.md, sections 3.4 and 3.5): those of the mean from the common start,
with and without the third-order drift, and those of children, each from where a replica is at a decay.

Shapes: n examples, R paths, P parameters, k directions, T steps, S recorded steps, K repetitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn import streams
from robustdyn.replicas.ensemble import Directions
from robustdyn.replicas.network import StackedNetwork, project
from robustdyn.replicas.training_step import Training, advance, gradients_on
from robustdyn.replicas.updates import State
from robustdyn.theory.transient import DECAY

Array = NDArray[np.float64]

OF_CHILDREN = -1  # the random numbers of all children, which repetitions of the mean path do not have


@dataclass(frozen=True, kw_only=True)
class NoiseFreeSettings:
    """Which noise-free paths are followed beside an ensemble.

    Attributes:
        repetitions: K, repetitions of the mean path, each with other random numbers, whose spread gives a
            standard error; 0 for none, else at least 2.
        pairs: Antithetic pairs of displacements from which a repetition takes the third-order drift, ≥ 1.
        every: Steps for which a drift is held, ≥ 1.
        children: Replicas, the first ones, whose noise-free children are followed from every decay of the
            rate; 0 for none, else at least 3.

    Raises:
        ValueError: A setting outside its range.
    """

    repetitions: int
    pairs: int
    every: int
    children: int

    @property
    def wanted(self) -> bool:
        """Whether any path is followed."""
        return bool(self.repetitions or self.children)

    def __post_init__(self) -> None:
        for name, least in (("repetitions", 2), ("children", 3)):
            if getattr(self, name) != 0 and getattr(self, name) < least:
                raise ValueError(f"{name} must be 0 or at least {least}, got {getattr(self, name)}")
        for name in ("pairs", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanPaths:
    """Noise-free paths from the replicas' common start.

    Attributes:
        plain: x (K, S, k), without the third-order drift.
        drifting: x (K, S, k), with it.
    """

    plain: Array
    drifting: Array


def decays(learning_rate: Sequence[float] | Array) -> list[int]:
    """Numbers of steps after which the rate falls by more than a fifth in one step."""
    rates = np.asarray(learning_rate, dtype=np.float64)
    return [int(step) for step in np.flatnonzero(rates[1:] < (1 - DECAY) * rates[:-1]) + 1]


def full_gradients(
    network: StackedNetwork, theta: Tensor, training: Training, *, whose: int, step: int, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients over all training examples, with the same starts of the attack for all paths.

    Args:
        network: The stacked network; its running statistics are used.
        theta: (R, P), weights; not changed.
        training: How replicas are trained.
        whose: Number of the repetition, or ``OF_CHILDREN``; with the step it determines the random numbers.
        step: Number of the step, from 0.
        chunk: Paths in one pass.

    Returns:
        Gradients (R, P) of the objective, without weight decay, and the mean weight perturbations (R, P) or
        None.
    """
    n = training.sampling.examples
    order = torch.randperm(n, generator=streams.generator(training.seed, "noise-free-order", whose, step))
    device = training.images.device
    draws = streams.generator(training.seed, "noise-free-attack", whose, step, device=device)
    gradient = torch.zeros_like(theta)
    moves: Tensor | None = None
    # parts of about equal size, because a short one would have a weight perturbation of its own kind
    for which in order.tensor_split(max(1, round(n / training.sampling.batch_size))):
        images, targets = (all_[which.to(device)] for all_ in (training.images, training.targets))
        starts, share = training.attack.start(images, draws), len(which) / n
        found = []
        for some in theta.split(chunk):
            many = (t.repeat(len(some), *[1] * (t.dim() - 1)) for t in (images, targets, starts))
            found.append(gradients_on(network, some, network.statistics(len(some)), training, *many))
        gradient += share * torch.cat([part for part, _, _ in found])
        shifts = [part for _, _, part in found if part is not None]
        if shifts:
            moves = share * torch.cat(shifts) + (0 if moves is None else moves)
    return gradient, moves


def mean_path(
    network: StackedNetwork,
    training: Training,
    directions: Directions,
    covariance: Array,
    settings: NoiseFreeSettings,
    *,
    repetition: int,
    record_steps: Sequence[int],
    chunk: int,
) -> tuple[Array, Array]:
    """One repetition of the path of the mean, without and with the third-order drift.

    At every ``settings.every`` steps the drift D is taken at the path's weights m as the mean of g over
    displaced weights, less g(m): equation (25e) of docs/theory.md. The displacements are pairs ± d along the
    directions, Gaussian with the covariance in the middle of the steps for which D is held. All of these
    gradients have the same starts of the attack.

    Args:
        network: At the start.
        training: How replicas are trained.
        directions: Along which weights are displaced, and positions recorded.
        covariance: (T + 1, k, k), of replicas' positions after each number of steps.
        settings: Pairs and steps.
        repetition: Number of the repetition.
        record_steps: S steps.
        chunk: Paths in one pass.

    Returns:
        Positions (S, k) of the plain path, and of the one with the drift.
    """
    start, steps = network.theta(), len(training.learning_rate)
    theta = start.expand(2, -1).clone()  # without the drift, and with it
    state, drift = training.update.begin(theta), torch.zeros_like(start)
    normal = np.random.default_rng(streams.stream_seed(training.seed, "noise-free-drift", repetition))
    found = {0: np.zeros((2, directions.count))}
    for step in range(steps):
        points, renewed = theta, step % settings.every == 0
        if renewed:
            spread = covariance[min(step + settings.every // 2, steps)]
            values, vectors = np.linalg.eigh(spread)
            root = vectors * np.sqrt(np.clip(values, 0, None))
            drawn = normal.standard_normal((settings.pairs, directions.count)) @ root.T
            # along the forces D^{1/2} u a unit of x is D^{1/2} y; the same as positions where D = 1
            away = torch.from_numpy(drawn).to(start) @ directions.forces.to(start).T
            points = torch.cat([theta, theta[1] + away, theta[1] - away])
        gradient, moves = full_gradients(network, points, training, whose=repetition, step=step, chunk=chunk)
        if renewed:
            drift = gradient[2:].mean(dim=0) - gradient[1]
        gradient = gradient[:2].clone()
        gradient[1] += drift
        advance(training, theta, gradient, None if moves is None else moves[:2], state, step)
        if step + 1 in record_steps:
            found[step + 1] = project(theta - start, directions.positions)
    plain, drifting = np.stack([found[step] for step in record_steps], axis=1)
    return plain, drifting


class Children:
    """Noise-free children of some replicas, from every decay to the next one or to the end.

    It is the ``watch`` of ``robustdyn.replicas.Ensemble.run``. Children have the replica's weights and the
    optimiser's state at the decay, and all of them the same starts of the attack at a step.

    Args:
        network: At the start.
        training: How replicas are trained.
    """

    def __init__(self, network: StackedNetwork, training: Training) -> None:
        self._network, self._training = network, training
        self._decays = decays(training.learning_rate)
        self._parents: dict[int, tuple[Tensor, State]] = {}

    def __call__(self, step: int, theta: Tensor, state: State) -> None:
        """Note where replicas (R, P) are, if the rate falls now."""
        if step in self._decays:
            held = {name: value.clone() for name, value in state.items()}
            self._parents[step] = theta.clone(), held

    def positions(self, directions: Directions, record_steps: Sequence[int]) -> Array:
        """Follow the children, and return x (R, S, k) of them; NaN up to and including the first decay."""
        start, training = self._network.theta(), self._training
        ends = [*self._decays[1:], len(training.learning_rate)]
        count = len(next(iter(self._parents.values()))[0])
        found = np.full((count, len(record_steps), directions.count), np.nan)
        for begin, end in zip(self._decays, ends, strict=True):
            theta, state = self._parents[begin]
            for step in range(begin, end):
                gradient, moves = full_gradients(
                    self._network, theta, training, whose=OF_CHILDREN, step=step, chunk=count
                )
                advance(training, theta, gradient, moves, state, step)
                if step + 1 in record_steps:
                    row = list(record_steps).index(step + 1)
                    found[:, row] = project(theta - start, directions.positions)
        return found
