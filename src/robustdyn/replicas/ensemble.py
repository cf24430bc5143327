"""Trains many replicas of one network from one point, with different mini-batches and attack noise.

Shapes: R replicas of a chunk, P parameters, k directions, T steps, S recorded steps, B examples of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from robustdyn.curvature.risk_function import cross_entropy
from robustdyn.replicas.expansion import RobustLoss
from robustdyn.replicas.network import Engine, StackedNetwork, project
from robustdyn.replicas.training_step import Training, advance, batch_gradients, refuse_dropout
from robustdyn.replicas.updates import State

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
    weights: bool

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

    def run(
        self, replicas: Sequence[int], watch: Callable[[int, Tensor, State], object] | None = None
    ) -> Arrays:
        """Train some replicas from the start to the end.

        Args:
            replicas: The numbers of the R replicas. A replica's path is a function of its number, except for
                rounding, which may differ between chunks of different sizes.
            watch: Called after each step with the number of steps taken, θ (R, P) and the optimiser's state,
                which change in place later.

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
        for step in range(steps):
            gradient, losses, moves = batch_gradients(
                self.network, theta, statistics, training, replicas, step
            )
            record.arrays["batch_loss"][:, step] = losses.double().cpu().numpy()
            # the optimiser changes the gradient in place, so it is copied if it is recorded
            kept = gradient.clone() if step + 1 in record.rows else None
            advance(training, theta, gradient, moves, state, step)
            if watch is not None:
                watch(step + 1, theta, state)
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
