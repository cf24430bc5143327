"""The state of a run that measurements see: the loss on fixed adversarial examples, and the optimiser.

Results that several measurements need are computed once, when the first of them requests them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustdyn import streams
from robustdyn.attacks import PGD
from robustdyn.curvature import (
    EigenResult,
    EmpiricalRisk,
    GradientCovariance,
    Hessian,
    LinearOperator,
    ProjectedCovariance,
    lanczos,
    projected_covariance,
)
from robustdyn.curvature.examples import Structure, take
from robustdyn.defaults import default
from robustdyn.methods import OptimizerState
from robustdyn.theory import minibatch_noise_factor

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """How leading eigenpairs are found, for both the Hessian and the gradient covariance.

    Attributes:
        directions: k, the algebraically largest eigenvalues.
        tolerance: Stop when every residual is below this share of the largest eigenvalue.
        max_products: Give up, and record the residuals reached, beyond this many products.
        extra_vectors: Lanczos vectors in addition to the k directions, at least 2; each as large as a
            gradient.
        warm_start: Start from the eigenvectors of the last measured epoch.

    Raises:
        ValueError: A setting outside its range.
    """

    directions: int = default("measure/default", "eigenpairs.directions")
    tolerance: float = default("measure/default", "eigenpairs.tolerance")
    max_products: int = default("measure/default", "eigenpairs.max_products")
    extra_vectors: int = default("measure/default", "eigenpairs.extra_vectors")
    warm_start: bool = default("measure/default", "eigenpairs.warm_start")

    def __post_init__(self) -> None:
        if self.directions < 1:
            raise ValueError(f"directions must be at least 1, got {self.directions}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be between 0 and 1, got {self.tolerance}")
        if self.max_products < self.directions:
            raise ValueError(
                f"max_products={self.max_products} cannot give directions={self.directions}: allow at least "
                "as many"
            )
        if self.extra_vectors < 2:
            raise ValueError(f"extra_vectors must be at least 2, got {self.extra_vectors}")

    def of(self, operator: LinearOperator, generator: torch.Generator, start: Tensor | None) -> EigenResult:
        """The leading eigenpairs of an operator, from a starting vector (P,) or a random one."""
        return lanczos(
            operator,
            self.directions,
            which="largest",
            tol=self.tolerance,
            max_products=self.max_products,
            max_basis=self.directions + self.extra_vectors,
            generator=generator,
            start=start if self.warm_start else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class AlongEigenvectors:
    """Curvature and noise along the leading eigenvectors, corrected by another attack on the examples.

    Along eigenvectors of the same adversarial examples both are too large, because the eigenvectors fit the
    noise of the attack's random start. Some of the examples are attacked a second time, and the difference
    between their two attacks corrects the values of all (double sampling: Cochran, Sampling Techniques, 1977,
    chapter 12). Two biases remain: the bias of order 1/s of a ratio over s examples, and the fit of the
    eigenvectors to the choice of examples.

    Attributes:
        curvature: (k,), λ_i plus the mean difference of the two attacks' Gauss–Newton curvatures uᵀ G u,
            which have a value for each example.
        curvature_standard_errors: (k,), over examples, of the Gauss–Newton part.
        variances: (k,), of one example's gradient: the variance under the first attack, times the ratio of
            the second attack's mean square to the first's.
        variance_standard_errors: (k,), over examples.
        attack_shares: (k,), one minus the correlation of the two attacks' gradients over examples.
        curvature_samples: For each of the s examples what a second attack changes, and the value under it,
            (2, s, k).
        variance_samples: The same for the variances.
        examples: m.
    """

    curvature: Array
    curvature_standard_errors: Array
    variances: Array
    variance_standard_errors: Array
    attack_shares: Array
    curvature_samples: Array
    variance_samples: Array
    examples: int

    def standard_error(self, by_curvature: Array, by_variance: Array) -> float:
        """Standard error of a function of curvature and variances, to first order.

        The errors of all directions come from the same examples, and the result contains their correlation.

        Args:
            by_curvature: (k,), the function's derivatives by the curvature.
            by_variance: (k,), by the variances.
        """
        samples = self.curvature_samples @ by_curvature + self.variance_samples @ by_variance
        return float(double_sampling_error(samples[:, :, None], self.examples)[0])


def double_sampling_error(samples: Array, examples: int) -> Array:
    """Standard errors (k,) under double sampling.

    Args:
        samples: For s of the examples the difference and the whole value, (2, s, k).
        examples: m, all examples.
    """
    spread, whole = samples.var(axis=1, ddof=1)
    return np.asarray(np.sqrt(spread / samples.shape[1] + (whole - spread).clip(min=0.0) / examples))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The run at the end of an epoch.

    Attributes:
        epoch: Epoch that just ended, from 0.
        step: Optimiser steps taken so far.
        risk: Mean loss over the measurement set, its adversarial examples held fixed.
        again: The same over the first few of these examples, attacked from other random starts; given θ (P,),
            attacked and measured at θ, from the same starts.
        optimizer: Settings of the last optimiser step.
        train_examples: n, size of the training set.
        batch_size: B, examples that one optimiser step averages over, on all ranks together. None if it is
            not known; the noise of a mini-batch is NaN then.
        seed: The run's seed.
        eigenpairs: How leading eigenpairs are found.
        starts: Starting vectors (P,) for ``"hessian"`` and ``"noise"``, where there are any.
        unperturbed: Returns this process's inputs of the same examples without the attack.
        attack: The attack, if it is PGD.
        initial: The parameters before training by name; None if they are not known.
        added_noise: Covariance of the Gaussian noise that is added to a step's gradient, in multiples of
            C₁ / B, with the attack's noise in C₁; see ``robustdyn.methods.GradientNoise``.
        rows: What the epoch's measurements have found so far, by table.
        past: Reads a table of the run's record, which holds the rates of all steps so far; None if there is
            no record, and on all processes but the first.
    """

    epoch: int
    step: int
    risk: EmpiricalRisk
    again: Callable[[Tensor | None], EmpiricalRisk]
    optimizer: OptimizerState
    train_examples: int
    batch_size: int | None
    seed: int
    eigenpairs: Eigenpairs
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    unperturbed: Callable[[], Structure] | None = None
    attack: PGD | None = None
    initial: Mapping[str, Tensor] | None = None
    added_noise: float = 0.0
    rows: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    past: Callable[[str], pd.DataFrame] | None = None

    @property
    def batch(self) -> float:
        """B; NaN if it is not known."""
        return math.nan if self.batch_size is None else self.batch_size

    @property
    def noise_factor(self) -> float:
        """What an unbiased C₁ is multiplied with to give the covariance of a step's gradient.

        NaN without B. A sample of the training set estimates without bias the covariance with denominator
        n − 1 (Cochran, Sampling Techniques, 1977, chapter 2), and the factor is for the one with n.
        """
        if self.batch_size is None:
            return math.nan
        n = self.train_examples
        drawn = minibatch_noise_factor(n, self.batch_size, replacement=False) * (n - 1) / n
        return drawn + self.added_noise / self.batch_size

    def generator(self, stream: str) -> torch.Generator:
        """Random stream of one estimator, a function of (seed, stream, epoch)."""
        return streams.generator(self.seed, f"measure-{stream}", self.epoch, device=self.risk.device)

    @cached_property
    def hessian(self) -> EigenResult:
        """Leading eigenpairs of H."""
        operator = Hessian(self.risk)
        return self.eigenpairs.of(operator, self.generator("hessian"), self.starts.get("hessian"))

    @cached_property
    def noise(self) -> EigenResult:
        """Leading eigenpairs of C₁, the covariance of one example's gradient (population denominator)."""
        operator = GradientCovariance(self.risk)
        return self.eigenpairs.of(operator, self.generator("noise"), self.starts.get("noise"))

    @cached_property
    def projected(self) -> ProjectedCovariance:
        """C₁ along the leading eigenvectors of H."""
        return projected_covariance(self.risk, self.hessian.eigenvectors)

    @cached_property
    def along(self) -> AlongEigenvectors:
        """H and C₁ along the leading eigenvectors of H, from another attack than the eigenvectors."""
        directions, projections = self.hessian.eigenvectors, self.projected.projections.numpy()
        again = self.again(None)
        m, s = self.risk.examples, again.examples
        (_, curved), (g, curved_again) = (
            _of_examples(risk, directions) for risk in (_first(self.risk, s), again)
        )
        middle = projections.mean(axis=0)
        first, second = projections[:s] - middle, g - middle
        ratio = (second**2).sum(axis=0) / (first**2).sum(axis=0)
        apart = curved_again - curved

        of_curvature = np.stack([apart, curved_again])
        of_variance = np.stack([second**2 - ratio * first**2, second**2])
        same = (first * second).sum(axis=0) / np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
        return AlongEigenvectors(
            curvature=self.hessian.eigenvalues.numpy() + apart.mean(axis=0),
            curvature_standard_errors=double_sampling_error(of_curvature, m),
            variances=self.projected.variances.numpy() * ratio,
            variance_standard_errors=double_sampling_error(of_variance, m),
            attack_shares=1 - same.clip(min=0.0),
            curvature_samples=of_curvature,
            variance_samples=of_variance,
            examples=m,
        )

    @property
    def solved(self) -> dict[str, EigenResult]:
        """The eigenpairs found so far, as ``"hessian"`` and ``"noise"``; this call computes nothing."""
        return {name: self.__dict__[name] for name in ("hessian", "noise") if name in self.__dict__}


def _first(risk: EmpiricalRisk, count: int) -> EmpiricalRisk:
    """The risk over the first ``count`` examples of all processes."""
    own = slice(max(0, count - risk.shards.own.start))
    return risk.over(take(risk.inputs, own), take(risk.targets, own))


def _of_examples(risk: EmpiricalRisk, directions: Tensor) -> tuple[Array, Array]:
    """g_iᵀ u_j and u_jᵀ G_i u_j of every example of all processes, (m, k) each."""
    parts = [tuple(risk.split(column).values()) for column in directions.unbind(dim=1)]
    own = torch.zeros(risk.held, 2, len(parts), dtype=risk.dtype, device=risk.device)
    with risk.guard(products=True):
        for (tape, _), rows in zip(risk.tapes(), risk.rows_of_chunks(own), strict=True):
            for index, part in enumerate(parts):
                change = tape.jacobian_product(part)
                rows[:, 0, index] = (tape.slopes.detach() * change).flatten(1).sum(dim=1)
                rows[:, 1, index] = (change * tape.loss_curvature_product(change)).flatten(1).sum(dim=1)
    values = risk.shards.rows(own).double().cpu().numpy()
    return values[:, 0], values[:, 1]
