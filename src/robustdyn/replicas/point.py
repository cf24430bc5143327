"""Measures the loss at one point: everything that a prediction of the replicas' distribution needs.

The point is the replicas' common start, or a point on the path of their mean. Shapes: n training examples, P
parameters, k directions, A attack draws, M mini-batches.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from robustdyn import streams
from robustdyn.curvature import (
    DiagonallyScaled,
    EmpiricalRisk,
    Hessian,
    LinearOperator,
    gradient_projections,
    lanczos,
)
from robustdyn.curvature.risk_function import PerExampleLoss
from robustdyn.methods.objectives import AdversarialCrossEntropy, CrossEntropy
from robustdyn.models.modes import mode
from robustdyn.replicas.ensemble import Directions
from robustdyn.replicas.network import Engine, StackedNetwork, project
from robustdyn.replicas.sampled_batches import gradient_slopes, sampled_gradients
from robustdyn.replicas.training_step import Training, attacked, perturb, refuse_dropout
from robustdyn.theory import MeasuredSpectrum, minibatch_noise_factor, propagate

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PointSettings:
    """How a point is measured.

    Attributes:
        eigenvectors: Leading eigenvectors of the Hessian (algebraically largest) to follow, ≥ 1.
        random_directions: Random directions, orthogonal to these and to each other, to follow as well, ≥ 0.
        attack_draws: A ≥ 1, random starts of the attack for each example for the eigenvectors, and as many
            other starts for all values along them. With 2 or more, the attack's noise is separated from the
            examples'.
        noise_batches: M, mini-batches drawn at the start as replicas draw theirs, each attacked twice. The
            covariance of their gradients is valid for every method. 0 for none, else at least 2.
        slope_batches: Mini-batches over which the slopes of their gradients are averaged; 0 for none, else at
            least 2.
        slope_distance: Distance of the two points of a slope from the middle, in standard deviations that the
            theory predicts there, > 0.
        tolerance: Of an eigenpair's residual, relative to the largest eigenvalue.
        max_products: Largest number of Hessian products.
        memory: Bytes for passes and graphs kept; see ``robustdyn.curvature.EmpiricalRisk``.

    Raises:
        ValueError: A setting outside its range.
    """

    eigenvectors: int
    random_directions: int
    attack_draws: int
    noise_batches: int
    slope_batches: int
    slope_distance: float
    tolerance: float
    max_products: int
    memory: int

    def __post_init__(self) -> None:
        for name, least in (("eigenvectors", 1), ("random_directions", 0), ("attack_draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("noise_batches", "slope_batches"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise ValueError(f"{name} must be 0 or at least 2, got {getattr(self, name)}")
        if not self.slope_distance > 0:
            raise ValueError(f"slope_distance must be positive, got {self.slope_distance}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie between 0 and 1, got {self.tolerance}")
        if self.max_products < self.eigenvectors:
            raise ValueError(f"max_products must be at least eigenvectors={self.eigenvectors}")


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredPoint:
    """The loss at θ as the theory needs it. With a weight perturbation v: at θ + v, v from the whole set.

    Adversarial examples are made at θ with the training attack and held fixed, A for each example. The
    sampled quantities, ``sampled_gradients`` and ``slopes``, have their own attacks. The eigenvectors come
    from A other adversarial examples for each example, because along eigenvectors H and C of the same
    adversarial examples are too large. Units: θ has none, losses are in nats. All arrays except the
    directions are float64.

    Attributes:
        directions: k of them, in the order eigenvectors, random ones.
        eigenvalues: (k,), uᵀ H u, the diagonal of ``hessian``.
        residuals: (k,), ‖H u_i − λ_i u_i‖ of the eigenvectors, with H and λ_i for the adversarial examples
            from which they come; NaN for the others.
        converged: Whether all eigenpairs met the tolerance.
        hessian: (k, k), H between the directions: the off-diagonal shows how far they are from eigenvectors.
        mean_gradient: (k,), of the loss without weight decay.
        decay_gradient: (k,), of weight decay's term, ω θ; the pull on the mean is the sum of both.
        example_covariance: C₁ (k, k), population covariance (denominator n) over examples of their mean
            gradient over attack draws; NaN where an example has no gradient of its own (BatchNorm in train
            mode).
        attack_covariance: C_a (k, k), mean over examples of the covariance over attack draws; 0 with one
            draw, when ``example_covariance`` includes the attack's noise.
        noise: C (k, k), covariance of a full batch's gradient that follows, for independent batches.
        sampled_gradients: (M, k), of mini-batches drawn, attacked and perturbed like a replica's.
        sampled_again: (M, k), of the same mini-batches, attacked from other starts.
        slopes: J (k, k), ∂g_i/∂x_j of the mean mini-batch gradient g that the optimiser receives, without
            weight decay. Adversarial examples and weight perturbation follow the weights, as in training. H
            does not include the motion of the maximiser; for the gradient of a maximum, J is its Hessian. By
            central differences, with the same M batches and starts of the attack at both ends; NaN without
            batches.
        slope_errors: (k, k), standard errors of these over batches.
        slope_distances: (k,), from the middle to either end.
        loss: Mean adversarial loss at θ (+ v).
        curvature_has_decay: Whether ``eigenvalues`` and ``hessian`` include weight decay, so that the theory
            has to be given 0. This is so with a preconditioner, or if parameters have different decays.
    """

    directions: Directions
    eigenvalues: Array
    residuals: Array
    converged: bool
    hessian: Array
    mean_gradient: Array
    decay_gradient: Array
    example_covariance: Array
    attack_covariance: Array
    noise: Array
    sampled_gradients: Array
    sampled_again: Array
    slopes: Array
    slope_errors: Array
    slope_distances: Array
    loss: float
    curvature_has_decay: bool

    @property
    def sampled_noise(self) -> Array:
        """C (k, k) from the M sampled batches, denominator M − 1; relative standard errors at most √(2/M)."""
        both = (self.sampled_gradients, self.sampled_again)
        return np.asarray(sum(np.atleast_2d(np.cov(some, rowvar=False)) for some in both) / 2)

    @property
    def sampled_attack_noise(self) -> Array:
        """The part (k, k) of ``sampled_noise`` that comes from the attack's random start."""
        apart = self.sampled_gradients - self.sampled_again
        return np.asarray(apart.T @ apart / (2 * len(apart)))

    def arrays(self) -> dict[str, Any]:
        """The arrays from which ``from_arrays`` restores this."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "directions"}
        sides = {name: getattr(self.directions, name).cpu().numpy() for name in ("positions", "forces")}
        return plain | sides

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any], device: torch.device) -> "MeasuredPoint":
        """A starting point from the result of ``arrays``."""
        rest: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
        sides = {name: torch.as_tensor(rest.pop(name), device=device) for name in ("positions", "forces")}
        numbers: Any = {name: rest.pop(name).item() for name in ("converged", "loss", "curvature_has_decay")}
        return cls(directions=Directions(**sides), **numbers, **rest)


def measure_point(
    model: nn.Module,
    training: Training,
    settings: PointSettings,
    *,
    engine: Engine,
    chunk: int,
    preconditioner: Tensor | None = None,
    directions: Directions | None = None,
) -> MeasuredPoint:
    """Measure the loss at a point.

    Args:
        model: The point; it is not changed.
        training: How replicas are trained; its update has the weight decay.
        settings: How to measure.
        engine: How sampled mini-batches pass.
        chunk: How many of them at a time.
        preconditioner: d (P,) > 0, diagonal of D, of an optimiser that steps along D m; None for 1. The
            eigenvectors are then those of D^{1/2} (H + ω) D^{1/2}; see ``Directions``.
        directions: Measure along these directions of the start, instead of the eigenvectors here.

    Raises:
        ValueError: A preconditioner that is not positive, or Dropout in train mode.
    """
    if preconditioner is not None and not bool((preconditioner > 0).all()):
        raise ValueError("preconditioner must be positive")
    if training.batchnorm == "train":
        refuse_dropout(model)
    network = StackedNetwork(model, engine)
    theta = network.theta()[None]
    draws = settings.attack_draws
    images, targets = (
        each.repeat(draws, *[1] * (each.dim() - 1)) for each in (training.images, training.targets)
    )
    adversarial = _adversarial(network, training, range(draws, 2 * draws))
    point = theta + _whole_set_perturbation(network, training, images, adversarial, targets)
    decay = training.update.weight_decay
    inside = preconditioner is not None or isinstance(decay, Tensor)
    root = None if preconditioner is None else preconditioner.to(theta).sqrt()

    def curvature(risk: EmpiricalRisk) -> LinearOperator:
        operator: LinearOperator = _WithDecay(Hessian(risk), decay) if inside else Hessian(risk)
        return operator if root is None else DiagonallyScaled(operator, root)

    with mode(model, training=False):
        risk = EmpiricalRisk(
            model,
            adversarial,
            targets,
            loss=example_loss(training),
            memory=None if training.batchnorm == "train" else settings.memory,
            batchnorm=training.batchnorm,
        ).at(point[0])
        converged, residuals = True, np.empty(0)
        if directions is None:
            others = _adversarial(network, training, range(draws))
            top = lanczos(
                curvature(risk.over(others, targets)),
                settings.eigenvectors,
                which="largest",
                tol=settings.tolerance,
                max_products=settings.max_products,
                generator=streams.generator(training.seed, "replica-eigenvectors", device=risk.device),
            )
            converged, residuals = top.all_converged, top.residuals.numpy()
            vectors = _with_random(top.eigenvectors, settings.random_directions, training.seed)
            directions = _directions(vectors, root)
        else:
            vectors = directions.positions if root is None else directions.positions * root[:, None]
        curved = vectors.double().T @ (curvature(risk) @ vectors).double()
        gradient = project(risk.gradient()[None], directions.forces)[0]
        between, within = _covariances(risk, directions, draws)
    hessian = ((curved + curved.T) / 2).cpu().numpy()
    examples, size = training.sampling.examples, training.sampling.batch_size
    factor = minibatch_noise_factor(examples, size, replacement=training.sampling.replacement)
    noise = factor * between + within / size
    sampled, again = sampled_gradients(
        network, training, directions, batches=settings.noise_batches, chunk=chunk
    )
    distances = np.full(len(hessian), np.nan)
    if settings.slope_batches:
        known = np.cov(sampled, rowvar=False) if len(sampled) else noise
        distances = settings.slope_distance * _deviations(
            np.diag(hessian), np.diag(np.atleast_2d(known)), training, decay_inside=inside
        )
    slopes, errors = gradient_slopes(
        network, training, directions, distances, batches=settings.slope_batches, chunk=chunk
    )
    return MeasuredPoint(
        directions=directions,
        eigenvalues=np.diag(hessian).copy(),
        residuals=np.concatenate([residuals, np.full(len(hessian) - len(residuals), np.nan)]),
        converged=converged,
        hessian=hessian,
        mean_gradient=gradient,
        decay_gradient=project(theta * decay, directions.forces)[0],
        example_covariance=between,
        attack_covariance=within,
        noise=noise,
        sampled_gradients=sampled,
        sampled_again=again,
        slopes=slopes,
        slope_errors=errors,
        slope_distances=distances,
        loss=risk.value(),
        curvature_has_decay=inside,
    )


def predicted_deviations(point: MeasuredPoint, training: Training) -> Array:
    """Standard deviations (k,) along the directions that the theory predicts for replicas from this point.

    They use H's curvature and the noise of sampled mini-batches, or of the examples if there are none. The
    rate is the largest rate throughout, and the result is the largest over the steps.

    Raises:
        ValueError: A direction without noise has none.
    """
    noise = point.sampled_noise if len(point.sampled_gradients) else point.noise
    return _deviations(point.eigenvalues, np.diag(noise), training, decay_inside=point.curvature_has_decay)


def line_units(point: MeasuredPoint, training: Training) -> Array:
    """Units (k,) in which to measure how far along the directions the loss is quadratic.

    The unit is the predicted deviation σ, and √P σ along random directions. There a single deviation is very
    small, and replicas move along all P of them at once, by a norm of √P σ if all are equal.

    Raises:
        ValueError: As ``predicted_deviations``.
    """
    random = np.isnan(point.residuals)
    units = predicted_deviations(point, training)
    units[random] *= np.sqrt(point.directions.positions.shape[0])
    return units


def _deviations(eigenvalues: Array, noise: Array, training: Training, *, decay_inside: bool) -> Array:
    """Standard deviations (k,) that the theory predicts at the end or, if sooner, once stationary.

    Raises:
        ValueError: A direction without noise has none.
    """
    # a schedule may begin with next to no rate
    dynamics = training.update.dynamics(max(training.learning_rate), decay_inside=decay_inside)
    if not (noise > 0).all():
        raise ValueError("slope_batches must be 0: along some direction batches have no noise to scale by")
    # a distance is wanted along directions, too, that have no stationary law
    tame = np.clip(eigenvalues, 0.0, 0.9 * dynamics.stable_eigenvalues[1])
    spectrum = MeasuredSpectrum(np.array([0]), tame[None], noise[None], "piecewise_constant")
    steps = np.arange(len(training.learning_rate) + 1)
    law = propagate(
        spectrum,
        np.full(len(training.learning_rate), dynamics.learning_rate),
        momentum=dynamics.momentum,
        weight_decay=dynamics.weight_decay,
        record_steps=steps,
    )
    return np.asarray(np.sqrt(law.variance[1:].max(axis=0)))


class _WithDecay(LinearOperator):
    """A + diag(ω)."""

    def __init__(self, operator: LinearOperator, weight_decay: float | Tensor) -> None:
        super().__init__(operator.shape[0], operator.dtype, operator.device)
        self._operator, self._decay = operator, weight_decay

    def _matvec(self, vector: Tensor) -> Tensor:
        return self._operator.matvec(vector) + self._decay * vector


def _adversarial(network: StackedNetwork, training: Training, draws: range) -> Tensor:
    """All training images attacked at θ_0, from the starts of each of ``draws`` in turn."""
    network.use(network.theta()[None], network.statistics(1))
    size, found = training.sampling.batch_size, []
    with mode(network, training=training.batchnorm == "train"):
        for draw in draws:
            generator = streams.generator(
                training.seed, "replica-start-attack", draw, device=training.images.device
            )
            starts = training.attack.start(training.images, generator)
            # batches as large as training's; with BatchNorm in train mode their statistics matter
            parts = (tensor.split(size) for tensor in (training.images, training.targets, starts))
            found += [attacked(network, training, *part) for part in zip(*parts, strict=True)]
    return torch.cat(found)


def _whole_set_perturbation(
    network: StackedNetwork, training: Training, images: Tensor, adversarial: Tensor, targets: Tensor
) -> Tensor:
    """The move v (1, P) that follows from the gradient over all training examples."""
    theta = network.theta()[None]
    if training.perturbation is None:
        return torch.zeros_like(theta)
    trained = training.batchnorm == "train"
    leaves = network.use(theta, network.statistics(1), learn=True)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    size = len(images) if trained else max(1, training.sampling.batch_size)
    with mode(network, training=trained):
        for x, a, y in zip(images.split(size), adversarial.split(size), targets.split(size), strict=True):
            loss = training.objective(network, x, a, y).loss * (len(x) / len(images))
            for part, gradient in zip(total, torch.autograd.grad(loss, leaves), strict=True):
                part += gradient
    return perturb(network, training.perturbation, leaves, total)


def example_loss(training: Training) -> PerExampleLoss:
    """The objective's loss of each example as a function of the adversarial logits.

    Raises:
        ValueError: The objective needs more than these.
    """
    objective = training.objective
    if not isinstance(objective, AdversarialCrossEntropy | CrossEntropy):
        raise ValueError(
            f"the Hessian of {type(objective).__name__} is not that of a loss of the logits alone; "
            "choose adversarial or standard cross-entropy"
        )
    smoothing = objective._label_smoothing
    return lambda logits, targets: F.cross_entropy(
        logits, targets, label_smoothing=smoothing, reduction="none"
    )


def _with_random(vectors: Tensor, count: int, seed: int) -> Tensor:
    """Orthonormal columns: the eigenvectors, then random ones."""
    if count == 0:
        return vectors
    draws = streams.generator(seed, "replica-directions")
    extra = torch.randn(len(vectors), count, generator=draws, dtype=torch.float64)
    known = vectors.double().cpu()
    for _ in range(2):  # twice is enough
        extra -= known @ (known.T @ extra)
    basis, _ = torch.linalg.qr(extra)
    return torch.cat([vectors, basis.to(vectors)], dim=1)


def _directions(vectors: Tensor, root: Tensor | None) -> Directions:
    if root is None:
        vectors = vectors.contiguous()
        return Directions(positions=vectors, forces=vectors)
    return Directions(positions=vectors / root[:, None], forces=vectors * root[:, None])


def _covariances(risk: EmpiricalRisk, directions: Directions, draws: int) -> tuple[Array, Array]:
    """C₁ and C_a, of the gradients projected."""
    k = directions.count
    if risk.batchnorm == "train" and risk.has_batchnorm:
        return np.full((k, k), np.nan), np.full((k, k), np.nan)
    rows = gradient_projections(risk, directions.forces).double().cpu().numpy().reshape(draws, -1, k)
    means = rows.mean(axis=0)
    centred = means - means.mean(axis=0)
    between = centred.T @ centred / len(means)
    if draws == 1:
        return between, np.zeros((k, k))
    spread = rows - means
    within = np.einsum("ani,anj->ij", spread, spread) / (len(means) * (draws - 1))
    # the means of a few draws still hold the attack's noise
    return between - within / draws, within
