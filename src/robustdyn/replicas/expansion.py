"""Compares the robust loss around θ_0 with its second-order expansion, along lines and at any point.

The loss is a mean over fixed training examples, with running statistics. Weight decay and weight
perturbations are not part of it. Its adversarial examples are either *held* fixed as they were made at θ_0,
or *recomputed* at every point from the same random starts. H is the Hessian of the held loss. Both losses
have the same slopes at θ_0 if the attack finds a maximum (Danskin's theorem). Whether PGD finds it is
measured.

PGD of a few steps is chaotic: from one draw of its starts to another, the loss with attacks made again jumps
by more than it rises within a deviation, and only the mean over many draws is smooth. There are therefore A
draws of each example's start. The loss is given for each draw, and differences are taken draw by draw.

Shapes: m examples, A draws, R points, P parameters, k directions, M distances on either side.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.curvature import EmpiricalRisk, Hessian
from robustdyn.curvature.risk_function import PerExampleLoss
from robustdyn.models.modes import mode
from robustdyn.replicas.network import StackedNetwork, project

Array = NDArray[np.float64]
Statistics = dict[str, Tensor]


class RobustLoss:
    """The loss over fixed examples, of several networks at once; θ_0 is where ``network`` was copied.

    Args:
        network: The stacked network.
        images: (m, ...) in [0, 1], on the network's device.
        targets: (m,) classes or (m, K) probabilities.
        loss: Loss of each example, from outputs and targets; the attack maximises its sum.
        attack: Makes the adversarial examples, always with running statistics.
        draws: A ≥ 1, random starts of the attack for each example, the same at every point.
        batch_size: Examples of each network in one pass.
        seed: Seed of the random starts.
    """

    def __init__(
        self,
        network: StackedNetwork,
        images: Tensor,
        targets: Tensor,
        loss: PerExampleLoss,
        attack: PGD,
        *,
        draws: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.network, self.loss, self.draws, self.examples = network, loss, draws, len(images)
        self.images = images.repeat(draws, *[1] * (images.dim() - 1))
        self.targets = targets.repeat(draws, *[1] * (targets.dim() - 1))
        self._attack, self._batch = replace(attack, batchnorm="eval"), batch_size
        self._seed = seed

    def attacked(self, theta: Tensor, statistics: Statistics) -> Tensor:
        """Adversarial examples (R, A·m, ...) made at θ (R, P), with the networks' statistics."""
        count = len(theta)
        self.network.use(theta, statistics)
        with mode(self.network, training=False):
            made = [
                self._attack.climb(self.network, images, targets, starts, self._total)
                for starts, targets, images in self._passes(
                    _many(self._starts, count), _many(self.images, count)
                )
            ]
        return torch.cat([part.unflatten(0, (count, -1)) for part in made], dim=1)

    def losses(self, theta: Tensor, statistics: Statistics, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and error of each network.

        Args:
            theta: (R, P).
            statistics: Running statistics of the R networks.
            adversarial: (R, A·m, ...).

        Returns:
            (R, A) losses in nats, means over examples, and (R,) fractions misclassified; float64.
        """
        found = []
        self.network.use(theta, statistics)
        with mode(self.network, training=False), torch.no_grad():
            for examples, targets in self._passes(adversarial):
                # float64 from here on: a rise is a small difference of losses
                logits = self.network(examples).double()
                hard = targets.dim() == 1
                wrong = logits.argmax(dim=1) != (targets if hard else targets.argmax(dim=1))
                each = self.loss(logits, targets if hard else targets.double())
                found.append(torch.stack([each, wrong.double()]).unflatten(1, (len(theta), -1)))
        losses, errors = torch.cat(found, dim=2)
        return losses.unflatten(1, (self.draws, -1)).mean(dim=2), errors.mean(dim=1)

    def recomputed(self, theta: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """``losses`` with adversarial examples made at θ (R, P)."""
        return self.losses(theta, statistics, self.attacked(theta, statistics))

    def held(self, theta: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """``losses`` with the adversarial examples made at θ_0."""
        return self.losses(theta, statistics, _many(self._held, len(theta)))

    def gradients(self, theta: Tensor, statistics: Statistics, adversarial: Tensor) -> Tensor:
        """Gradients (R, P) with respect to the weights, at fixed adversarial examples (R, A·m, ...)."""
        leaves = self.network.use(theta, statistics, learn=True)
        total = [torch.zeros_like(leaf) for leaf in leaves]
        with mode(self.network, training=False):
            for examples, targets in self._passes(adversarial):
                loss = self._total(self.network(examples), targets) / len(self.images)
                for part, gradient in zip(total, torch.autograd.grad(loss, leaves), strict=True):
                    part += gradient
        return self.network.flatten(total)

    @cached_property
    def starts(self) -> Array:
        """L_0 of each draw, (A,): the losses at θ_0, where both kinds of loss are the same."""
        found: Array = self.held(self._theta, self.network.statistics(1))[0][0].cpu().numpy()
        return found

    @cached_property
    def gradient(self) -> Tensor:
        """The gradient g (P,) at θ_0, with the adversarial examples held fixed."""
        return self.gradients(self._theta, self.network.statistics(1), self._held[None])[0]

    def curved(self, moves: Tensor) -> Tensor:
        """Products H Δ (R, P) for moves Δ (R, P), at θ_0 with the adversarial examples held fixed."""
        with mode(self.network, training=False):
            return (Hessian(self._risk) @ moves.to(self._theta).T).T

    def expanded(self, moves: Tensor) -> tuple[Array, Array]:
        """The expansion of the held loss at θ_0 + Δ, one Hessian product for each.

        Args:
            moves: Δ (R, P).

        Returns:
            L_0 + g·Δ and L_0 + g·Δ + Δᵀ H Δ / 2, (R,) each.
        """
        first = self.starts.mean() + project(moves, self.gradient[:, None])[:, 0]
        second = [project(d[None], h[:, None]).item() for d, h in zip(moves, self.curved(moves), strict=True)]
        return first, first + np.array(second) / 2

    @cached_property
    def _starts(self) -> Tensor:
        draws = streams.generator(self._seed, "replica-loss", device=self.images.device)
        batches = [b for images in self.images.split(self.examples) for b in images.split(self._batch)]
        return torch.cat([self._attack.start(images, draws) for images in batches])

    @cached_property
    def _theta(self) -> Tensor:
        return self.network.theta()[None]

    @cached_property
    def _held(self) -> Tensor:
        return self.attacked(self._theta, self.network.statistics(1))[0]

    @cached_property
    def _risk(self) -> EmpiricalRisk:
        return EmpiricalRisk(
            self.network.base, self._held, self.targets, loss=self.loss, chunk_size=self._batch
        )

    def _total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets).sum()

    def _passes(self, inputs: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield inputs, targets and more, from (R, A·m, ...), as (R·b, ...): b examples of each network."""
        targets = _many(self.targets, len(inputs))
        parts = [t.split(self._batch, dim=1) for t in (inputs, targets, *more)]
        for tensors in zip(*parts, strict=True):
            yield tuple(tensor.flatten(0, 1) for tensor in tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class Lines:
    """The loss along single directions, θ_0 + x u_i, with x = c σ_i; all arrays float64.

    Attributes:
        deviations: σ (k,), the unit of distance along each direction; see
            ``robustdyn.replicas.line_units``.
        multiples: c (2M,), ascending; the same on both sides.
        examples: m.
        starts: L_0 of each draw, (A,).
        gradient: g (k,), along the directions, mean over draws.
        hessian: H (k, k) between the directions, of the held loss, mean over draws.
        held: (k, 2M), loss with the adversarial examples of θ_0, mean over draws.
        recomputed: (A, k, 2M), loss with adversarial examples made at each point, of each draw.
        recomputed_gradient: (k, 2M), slope along the line with adversarial examples made at the point and
            then fixed. For an attack that finds the maximum it is the derivative of ``recomputed``.
        slopes: J (k, k), ∂g_i/∂x_j of that gradient, by central differences between the two points next to
            one deviation. For an attack that finds the maximum it is the Hessian of ``recomputed``.
    """

    deviations: Array
    multiples: Array
    examples: int
    starts: Array
    gradient: Array
    hessian: Array
    held: Array
    recomputed: Array
    recomputed_gradient: Array
    slopes: Array

    @property
    def loss(self) -> float:
        """L_0, mean over draws."""
        return float(self.starts.mean())

    def arrays(self) -> dict[str, Any]:
        """The arrays from which ``from_arrays`` restores this."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "Lines":
        """Lines from the result of ``arrays``."""
        rest: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
        return cls(examples=rest.pop("examples").item(), **rest)


def measure_lines(
    loss: RobustLoss, vectors: Tensor, deviations: Array, *, multiples: Sequence[float], chunk: int
) -> Lines:
    """Measure the loss along lines through θ_0.

    Args:
        loss: The loss around θ_0.
        vectors: (P, k), moves of the weights for one unit of x; under a preconditioner the forces of
            ``robustdyn.replicas.Directions``, D^{1/2} u_i.
        deviations: (k,) > 0.
        multiples: Distances in deviations, > 0, strictly increasing; each is used on both sides.
        chunk: Number of networks in one pass.

    Raises:
        ValueError: Multiples do not increase from above 0, or deviations are not positive.
    """
    given, k = list(multiples), vectors.shape[1]
    if not given or not given[0] > 0 or given != sorted(set(given)):
        raise ValueError(f"multiples must increase strictly from above 0, got {given}")
    if deviations.shape != (k,) or not bool((deviations > 0).all()):
        raise ValueError(f"deviations must be {k} positive numbers, got {deviations}")
    distances = np.array([-c for c in reversed(given)] + given)
    unit = min(given, key=lambda c: abs(math.log(c)))
    held, recomputed = np.empty((k, len(distances))), np.empty((loss.draws, k, len(distances)))
    along, ends = np.empty((k, len(distances), k)), np.abs(distances) == unit
    todo = [(i, j) for i in range(k) for j in range(len(distances))]
    theta = loss.network.theta()
    for first in range(0, len(todo), chunk):
        some = todo[first : first + chunk]
        moves = torch.stack([vectors[:, i] * (deviations[i] * distances[j]) for i, j in some])
        points, statistics = theta + moves.to(theta), loss.network.statistics(len(some))
        made = loss.attacked(points, statistics)
        rows, columns = np.array(some).T
        held[rows, columns] = loss.held(points, statistics)[0].mean(dim=1).cpu().numpy()
        recomputed[:, rows, columns] = loss.losses(points, statistics, made)[0].T.cpu().numpy()
        along[rows, columns] = project(loss.gradients(points, statistics, made), vectors)
    hessian = project(loss.curved(vectors.T), vectors)
    low, high = along[:, ends].transpose(1, 0, 2)
    return Lines(
        deviations=np.asarray(deviations, dtype=np.float64),
        multiples=distances,
        examples=loss.examples,
        starts=loss.starts,
        gradient=project(loss.gradient[None], vectors)[0],
        hessian=(hessian + hessian.T) / 2,
        held=held,
        recomputed=recomputed,
        recomputed_gradient=np.einsum("ici->ic", along),
        slopes=((high - low) / (2 * unit * deviations[:, None])).T,
    )


def _many(one: Tensor, count: int) -> Tensor:
    """The same (A·m, ...) for each of R networks, (R, A·m, ...), without a copy."""
    return one.expand(count, *one.shape)
