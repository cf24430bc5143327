"""Runs the missing parts of an ensemble, from a checkpoint's file or from a training in progress.

The network, its optimiser and the data are used in their current state.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robustdyn.attacks import PGD
from robustdyn.curvature.risk_function import BatchNormMode
from robustdyn.data.tensors import ImageTensors, to_unit
from robustdyn.errors import ConfigError, config_errors
from robustdyn.methods.objectives.objective import Objective
from robustdyn.methods.perturbations import WeightPerturbation
from robustdyn.models.sync_batchnorm import desynchronize
from robustdyn.replicas.ensemble import Ensemble, Recorded
from robustdyn.replicas.ensemble_record import EnsembleRecord
from robustdyn.replicas.expansion import measure_lines
from robustdyn.replicas.network import Engine, StackedNetwork
from robustdyn.replicas.noise_free import Children, NoiseFreeSettings, decays, mean_path
from robustdyn.replicas.optimizer import (
    InitialState,
    check_optimizer,
    held_state,
    initial_buffer,
    read_update,
    weight_decay,
)
from robustdyn.replicas.point import (
    MeasuredPoint,
    PointSettings,
    example_loss,
    line_units,
    measure_point,
)
from robustdyn.replicas.prediction import PlannedEnsemble, refreshed_covariance
from robustdyn.replicas.sampled_batches import second_moment
from robustdyn.replicas.sampling import Sampling
from robustdyn.replicas.training_step import Training, refuse_dropout
from robustdyn.replicas.updates import MomentumUpdate

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """Settings of an ensemble, apart from its starting point; conf/ensemble has the defaults.

    Attributes:
        replicas: R, a multiple of ``chunk``.
        chunk: Replicas in one pass.
        engine: How replicas are computed.
        seed: Seed of all random numbers.
        initial_state: State of the optimiser's buffer at the start.
        freeze_preconditioner: Whether Adam keeps its preconditioner of the start.
        batchnorm: See ``robustdyn.replicas.Training``.
        learning_rate: η that the factors multiply; None for the rate of the training's next step.
        factors: Factor on the learning rate at each step (T,).
        batch_size: Examples in a replica's batch; None for the training's batch size.
        replacement: See ``robustdyn.replicas.Sampling``.
        drop_last: See ``robustdyn.replicas.Sampling``.
        recorded: What is recorded; at most all examples are used as loss examples.
        start: How the start is measured, and the path of the mean.
        noise_free: Which noise-free paths are followed.
        multiples: Distances at which the loss is measured along the directions, in predicted standard
            deviations; empty for no expansion.
        prefix: Prefix of the names of these settings in errors, e.g. ``"ensemble."``.

    Raises:
        ValueError: ``replicas`` or the children's number is not a multiple of ``chunk``, or other settings do
            not allow noise-free paths.
    """

    replicas: int
    chunk: int
    engine: Engine
    seed: int
    initial_state: InitialState
    freeze_preconditioner: bool
    batchnorm: BatchNormMode
    learning_rate: float | None
    factors: tuple[float, ...]
    batch_size: int | None
    replacement: bool
    drop_last: bool
    recorded: Recorded
    start: PointSettings
    noise_free: NoiseFreeSettings
    multiples: tuple[float, ...]
    prefix: str

    def __post_init__(self) -> None:
        if self.replicas % self.chunk:
            near = -(-self.replicas // self.chunk) * self.chunk
            raise ValueError(
                f"replicas={self.replicas} is not a multiple of chunk={self.chunk}; choose {near}"
            )
        children = self.noise_free.children
        if children % self.chunk or children > self.replicas:
            raise ValueError(
                f"noise_free.children={children} must be a multiple of chunk={self.chunk} and at most "
                f"replicas={self.replicas}"
            )
        if children and not decays(self.factors):
            raise ValueError(
                f"noise_free.children={children} has no decay to start from; set schedule.milestones, or 0"
            )
        slopes = self.start.slope_batches
        if self.noise_free.wanted and not (slopes and self.batchnorm == "eval"):
            raise ValueError(
                f"noise-free paths need slopes and running statistics; start.slope_batches={slopes} and "
                f"batchnorm={self.batchnorm} must be at least 2 and eval, or noise_free.repetitions and "
                "noise_free.children 0"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingState:
    """The state of a training from which replicas start.

    Attributes:
        model: The network; not changed. A BatchNorm that uses the batches of several processes is replaced by
            one that uses its own.
        optimizer: Its optimiser, in its current state.
        next_rate: η of the training's next step.
        images: The training examples.
        batch_size: B.
        objective: See ``robustdyn.replicas.Training``.
        attack: See ``robustdyn.replicas.Training``.
        perturbation: See ``robustdyn.replicas.Training``.
        identity: Distinguishes this point from others, e.g. its ``fingerprint``; for the record.
        description: The configuration behind all this, on which the numbers also depend; for the record. The
            laws of ``robustdyn.replicas.prediction``, and noise-free paths, read its ``optimizer``.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    next_rate: float
    images: ImageTensors
    batch_size: int
    objective: Objective
    attack: PGD
    perturbation: WeightPerturbation | None
    identity: str
    description: Mapping[str, object]


class EnsembleRun:
    """Runs an ensemble from a training's state. The constructor checks the settings and computes nothing.

    Args:
        settings: The ensemble's settings.
        state: The state from which replicas start.

    Raises:
        ConfigError: Replicas do not support a setting, the optimiser or the objective.
    """

    def __init__(self, settings: EnsembleSettings, state: TrainingState) -> None:
        self._settings, self._state = settings, state
        check_optimizer(state.optimizer)
        if settings.noise_free.wanted and "optimizer" not in state.description:
            raise ConfigError("noise-free paths need the optimizer's settings in TrainingState.description")
        frozen = settings.freeze_preconditioner or not isinstance(state.optimizer, torch.optim.Adam)
        if settings.noise_free.wanted and not frozen:
            raise ConfigError(
                f"{settings.prefix}freeze_preconditioner=false changes Adam's preconditioner with the noise, "
                f"which noise-free paths lack; choose true, or {settings.prefix}noise_free.repetitions=0 and "
                f"{settings.prefix}noise_free.children=0"
            )
        recorded, examples = settings.recorded, len(state.images)
        self._recorded = replace(recorded, loss_examples=min(recorded.loss_examples, examples))
        rate = state.next_rate if settings.learning_rate is None else settings.learning_rate
        with config_errors(f"{settings.prefix}sampling."):
            sampling = Sampling(
                examples=examples,
                batch_size=settings.batch_size or state.batch_size,
                replacement=settings.replacement,
                drop_last=settings.drop_last,
            )
        with config_errors(settings.prefix):
            # only the optimiser's weight decay is read here, because the rest may take long
            self._training = Training(
                images=to_unit(state.images.images).to(next(state.model.parameters()).dtype),
                targets=state.images.labels,
                objective=state.objective,
                attack=state.attack,
                perturbation=state.perturbation,
                update=MomentumUpdate(
                    momentum=0.0, weight_decay=weight_decay(state.optimizer, state.model), initial_buffer=None
                ),
                learning_rate=[rate * factor for factor in settings.factors],
                sampling=sampling,
                batchnorm=settings.batchnorm,
                seed=settings.seed,
            )
            if settings.batchnorm == "train":
                refuse_dropout(state.model)
        with config_errors("objective: "):
            example_loss(self._training)

    def settings(self) -> dict[str, object]:
        """Everything on which the numbers depend, in the form in which it is recorded."""
        chosen, state, training = self._settings, self._state, self._training
        start = asdict(chosen.start)
        del start["memory"]
        return {
            "checkpoint": state.identity,
            "images": state.images.digest(),
            "examples": len(state.images),
            **state.description,
            "initial_state": chosen.initial_state,
            "freeze_preconditioner": chosen.freeze_preconditioner,
            "batchnorm": chosen.batchnorm,
            "steps": len(chosen.factors),
            "learning_rate": list(training.learning_rate),
            "sampling.batch_size": training.sampling.batch_size,
            "sampling.replacement": training.sampling.replacement,
            "sampling.drop_last": training.sampling.drop_last,
            "record.steps": list(self._recorded.steps),
            "record.loss_steps": list(self._recorded.loss_steps),
            "record.loss_examples": self._recorded.loss_examples,
            "record.loss_draws": self._recorded.loss_draws,
            "expansion.multiples": list(chosen.multiples),
            "record.mean_steps": list(self._recorded.mean_steps),
            "start": start,
            "noise_free": asdict(chosen.noise_free),
            "seed": chosen.seed,
        }

    def run(
        self,
        directory: Path,
        provenance: Mapping[str, object],
        *,
        shard: int,
        shards: int,
        say: Callable[[str], None],
        wait: Callable[[], object] | None,
    ) -> int:
        """Run the missing parts of the ensemble: the start, a shard's chunks and noise-free paths, the path.

        Args:
            directory: The ensemble's directory; several processes may work in it.
            provenance: See ``robustdyn.replicas.EnsembleRecord``.
            shard: The shard of this process.
            shards: Number of shards.
            say: Called with each line of progress.
            wait: Called when this shard's chunks are done; returns when all shards are. None not to wait.

        Returns:
            How many chunks of other shards are still missing; if any, those shards will measure the path.

        Raises:
            ConfigError: Replicas diverged, or the optimiser holds no state to start with.
            RecordError: The directory cannot be used, or holds another ensemble.
        """
        settings, state = self._settings, self._state
        with config_errors(settings.prefix):
            buffer = initial_buffer(state.optimizer, state.model, settings.initial_state)
        record = EnsembleRecord(directory, self.settings(), provenance, chunk=settings.chunk)
        kept = self._recorded.weights
        todo = list(record.missing(settings.replicas, shard=shard, shards=shards, weights=kept))
        model = _alone(state.model)
        update, preconditioner = read_update(
            state.optimizer,
            state.model,
            buffer=buffer,
            frozen=settings.freeze_preconditioner,
            measured=partial(self._second_moment, model),
        )
        training = replace(self._training, update=update)
        measure = partial(
            measure_point,
            training=training,
            settings=settings.start,
            engine=settings.engine,
            chunk=settings.chunk,
            preconditioner=preconditioner,
        )

        def measured() -> MeasuredPoint:
            say("start       measuring curvature and noise where replicas start")
            return measure(model)

        start = record.start(measured, training.images.device)
        last = start.eigenvalues[settings.start.eigenvectors - 1]
        say(
            f"start       loss {start.loss:.4f}, eigenvalues {start.eigenvalues[0]:.4g} to {last:.4g}"
            + ("" if start.converged else f" (not all converged: raise {settings.prefix}start.max_products)")
        )
        ensemble = Ensemble(
            model,
            training,
            directions=start.directions,
            recorded=self._recorded,
            engine=settings.engine,
        )
        if settings.multiples:
            say("lines       measuring the loss along the directions")
            record.lines(
                lambda: measure_lines(
                    ensemble.loss,
                    start.directions.forces,
                    line_units(start, training),
                    multiples=settings.multiples,
                    chunk=settings.chunk,
                )
            )
        for number, replicas in enumerate(todo, start=1):
            began = time.perf_counter()
            children = None
            if replicas.start < settings.noise_free.children:
                children = Children(ensemble.network, training)
            try:
                arrays = ensemble.run(replicas, watch=children)
            except FloatingPointError as error:
                raise ConfigError(
                    f"{settings.prefix}learning_rate={training.learning_rate[0]:g}: {error}; choose less"
                ) from error
            if children is not None:
                arrays["child"] = children.positions(start.directions, self._recorded.steps)
            elif settings.noise_free.children:
                arrays["child"] = np.full_like(arrays["position"], np.nan)
            record.add(replicas, arrays)
            each = 1e3 * (time.perf_counter() - began) / (len(replicas) * len(settings.factors))
            say(
                f"replicas    {replicas.start} to {replicas.stop - 1} done, {each:.1f} ms a step "
                f"({number} of {len(todo)} chunks)"
            )
        self._mean_paths(record, ensemble, start, shard=shard, shards=shards, say=say)
        if wait is not None:
            wait()
        left = sum(1 for _ in record.missing(settings.replicas, weights=kept))
        if self._recorded.mean_steps and not left:
            say("path        measuring curvature and noise along the replicas' mean")
            record.path(
                settings.replicas,
                self._recorded.mean_steps,
                lambda move: measure(moved(model, torch.from_numpy(move)), directions=start.directions),
            )
        return left

    def _mean_paths(
        self,
        record: EnsembleRecord,
        ensemble: Ensemble,
        start: MeasuredPoint,
        *,
        shard: int,
        shards: int,
        say: Callable[[str], None],
    ) -> None:
        """Follow a shard's repetitions of the noise-free path of the mean."""
        chosen, training = self._settings.noise_free, ensemble.training
        rates = np.array(training.learning_rate)
        planned = PlannedEnsemble(settings=self.settings(), start=start, learning_rate=rates)
        for repetition in range(shard, chosen.repetitions, shards):

            def follow(repetition: int = repetition) -> tuple[Array, Array]:
                say(f"noise-free  path {repetition + 1} of {chosen.repetitions} of the mean")
                with config_errors(f"{self._settings.prefix}noise_free.repetitions: "):
                    covariance = refreshed_covariance(planned)
                return mean_path(
                    ensemble.network,
                    training,
                    start.directions,
                    covariance,
                    chosen,
                    repetition=repetition,
                    record_steps=self._recorded.steps,
                    chunk=self._settings.chunk,
                )

            record.mean_path(repetition, follow)

    def _second_moment(self, model: nn.Module) -> Tensor:
        """Adam's second moment for a training with another optimiser, from as many batches as the noise."""
        settings = self._settings
        network = StackedNetwork(model, settings.engine)
        batches = max(settings.start.noise_batches, 1)
        return second_moment(network, self._training, batches=batches, chunk=settings.chunk)


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest that identifies a point by its weights, running statistics and the optimiser's state.

    A training in progress has the same digest as the checkpoint that it writes, in any memory layout.
    """
    found = hashlib.sha256()
    for name, tensor in {**model.state_dict(), **held_state(optimizer, model)}.items():
        content = hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {content}".encode())
    return found.hexdigest()


def _alone(model: nn.Module) -> nn.Module:
    """A copy in eval mode, in which no BatchNorm waits for other processes."""
    copied = copy.deepcopy(model).eval()
    desynchronize(copied)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                plain = nn.BatchNorm2d(
                    child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
                )
                # the same tensors, on their device
                plain._parameters, plain._buffers = child._parameters, child._buffers
                setattr(module, name, plain.eval())
    return copied


def moved(model: nn.Module, move: Tensor) -> nn.Module:
    """A copy of a network with its learned weights at θ + move (P,)."""
    copied = copy.deepcopy(model)
    learned = [p for p in copied.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, part in zip(learned, move.to(learned[0]).split([p.numel() for p in learned]), strict=True):
            p.add_(part.view_as(p))
    return copied
