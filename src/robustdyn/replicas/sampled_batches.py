"""Gradients of mini-batches that are drawn, attacked and perturbed as replicas do it, at one point.

Shapes: P parameters, k directions, M mini-batches.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn.replicas.ensemble import Directions
from robustdyn.replicas.network import StackedNetwork, project
from robustdyn.replicas.training_step import Training, batch_gradients

Array = NDArray[np.float64]


def sampled_gradients(
    network: StackedNetwork, training: Training, directions: Directions, *, batches: int, chunk: int
) -> tuple[Array, Array]:
    """Gradients at θ_0 of mini-batches that are drawn like the first batches of further replicas.

    Their mean and covariance need no assumption. They are valid with weight perturbations, with BatchNorm in
    train mode and for any sampling. Without replacement a batch is the first of an epoch. Each is attacked
    from two starts, which separates the attack's noise from the examples'.

    Args:
        network: At θ_0.
        training: How.
        directions: Projected on.
        batches: M.
        chunk: Batches at a time.

    Returns:
        (M, k), and (M, k) of the same batches from other starts.
    """
    found = np.empty((2, batches, directions.count))
    for half, later in enumerate((0, batches)):  # the starts of further batches, which none of these has
        for numbers, gradients in _first_batches(network, training, batches, chunk, later):
            found[half, numbers] = project(gradients, directions.forces)
    return found[0], found[1]


def gradient_slopes(
    network: StackedNetwork,
    training: Training,
    directions: Directions,
    distances: Array,
    *,
    batches: int,
    chunk: int,
) -> tuple[Array, Array]:
    """How the mean mini-batch gradient changes along directions, if the attack is repeated at each point.

    Central differences between x_j = ± h_j, with the same batches and starts of the attack at both ends, so
    that the sampling noise of a batch largely cancels. They measure the loss on the scale h, over which the
    kinks of ReLU and of the attack's signs average out.

    Args:
        network: At θ.
        training: How.
        directions: k of them.
        distances: h (k,) > 0; not read without batches.
        batches: M ≥ 2, or 0 for none; different from those of replicas.
        chunk: Networks at a time.

    Returns:
        J_ij = ∂g_i/∂x_j (k, k) and its standard errors over batches; NaN for no batches.
    """
    k = directions.count
    if not batches:
        return np.full((k, k), np.nan), np.full((k, k), np.nan)
    start = network.theta()
    found = np.empty((batches, k, k))  # batch, moved along, seen along
    ends = [(j, sign) for j in range(k) for sign in (1.0, -1.0)]
    for number in range(batches):
        seen = np.empty((len(ends), k))
        for first in range(0, len(ends), chunk):
            some = ends[first : first + chunk]
            # along the forces D^{1/2} u a unit of x is D^{1/2} y; the same as positions where D = 1
            moves = torch.stack([directions.forces[:, j] * (sign * distances[j]) for j, sign in some])
            gradients, _, _ = batch_gradients(
                network,
                start + moves.to(start),
                network.statistics(len(some)),
                training,
                [-1 - number] * len(some),
                0,
            )
            seen[first : first + len(some)] = project(gradients, directions.forces)
        found[number] = (seen[0::2] - seen[1::2]) / (2 * distances[:, None])
    jacobian = found.transpose(0, 2, 1)
    return jacobian.mean(axis=0), jacobian.std(axis=0, ddof=1) / np.sqrt(batches)


def second_moment(network: StackedNetwork, training: Training, *, batches: int, chunk: int) -> Tensor:
    """Mean square (P,) of the mini-batch gradient at θ_0 with weight decay: Adam's v̂, had it stayed there.

    Args:
        network: At θ_0.
        training: How.
        batches: M ≥ 1 mini-batches, different from those of replicas.
        chunk: Batches at a time.
    """
    start = network.theta()
    total = torch.zeros_like(start, dtype=torch.float64)
    for _, gradients in _first_batches(network, training, batches, chunk):
        total += (gradients + training.update.weight_decay * start).double().square().sum(dim=0)
    return (total / batches).to(start)


def _first_batches(
    network: StackedNetwork, training: Training, batches: int, chunk: int, later: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Numbers and gradients (c, P) of mini-batches, attacked from the starts of those ``later`` ones on."""
    for first in range(0, batches, chunk):
        # negative numbers: no trained replica has these batches
        whose = [-1 - number for number in range(first, min(first + chunk, batches))]
        gradients, _, _ = batch_gradients(
            network,
            network.theta().expand(len(whose), -1),
            network.statistics(len(whose)),
            training,
            whose,
            0,
            starts_of=[replica - later for replica in whose],
        )
        yield slice(first, first + len(whose)), gradients
