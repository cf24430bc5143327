"""What a measurement sees of a run: its loss on fixed adversarial examples and the optimiser's state.

What several measurements need is computed once, when the first of them asks for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from robustdyn import streams
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
from robustdyn.methods import OptimizerState


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """How leading eigenpairs are found, of the Hessian and of the gradient covariance alike.

    Attributes:
        directions: k, the algebraically largest eigenvalues.
        tolerance: Stop when every residual is below this share of the largest eigenvalue.
        max_products: Give up, and record the residuals reached, beyond this many products.
        extra_vectors: Lanczos vectors held beyond the k directions, at least 2; each is a gradient large.
        warm_start: Start from the eigenvectors of the last measured epoch.

    Raises:
        ValueError: A setting outside its range.
    """

    directions: int
    tolerance: float
    max_products: int
    extra_vectors: int
    warm_start: bool

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


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The run at the end of an epoch.

    Attributes:
        epoch: Epoch that just ended, from 0.
        step: Optimiser steps taken so far.
        risk: Mean loss over the measurement set, its adversarial examples held fixed.
        optimizer: Settings of the last optimiser step.
        train_examples: n, size of the training set.
        batch_size: B, examples that one optimiser step averages over, on all ranks together.
        seed: The run's seed.
        eigenpairs: How leading eigenpairs are found.
        starts: Starting vectors (P,) for ``"hessian"`` and ``"noise"``, where there are any.
    """

    epoch: int
    step: int
    risk: EmpiricalRisk
    optimizer: OptimizerState
    train_examples: int
    batch_size: int
    seed: int
    eigenpairs: Eigenpairs
    starts: Mapping[str, Tensor] = field(default_factory=dict)

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

    @property
    def solved(self) -> dict[str, EigenResult]:
        """The eigenpairs found so far, as ``"hessian"`` and ``"noise"``; asking starts nothing."""
        return {name: self.__dict__[name] for name in ("hessian", "noise") if name in self.__dict__}
