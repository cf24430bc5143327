"""The covariance C₁ of one example's gradient, without ever storing a per-example gradient.

Shapes: m examples, P parameters, k directions. g_i is the gradient of example i, ḡ their mean. With BatchNorm
on batch statistics the loss of one example depends on the others, g_i is not defined, and everything here
refuses.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustdyn.curvature.empirical_risk import EmpiricalRisk
from robustdyn.curvature.operators import RiskOperator
from robustdyn.curvature.probes import rademacher
from robustdyn.curvature.risk_function import plain
from robustdyn.curvature.tape import Tape


class GradientCovariance(RiskOperator):
    """C₁ = (1/m) Σ_i (g_i − ḡ)(g_i − ḡ)ᵀ, the population covariance over the measurement set.

    A product takes all a_i = g_iᵀ v from one pass through the gradient's graph, then one reverse pass with
    weights a_i: C₁ v = (1/m) Σ_i a_i g_i − ḡ (ḡᵀ v). On a kept graph that is 1.3 gradients' time. The
    subtraction costs a relative accuracy of rounding times ‖ḡ‖²/‖C₁‖, which is of order one or less.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        """The gradient covariance of a risk; computes ḡ, which takes one gradient's time.

        Args:
            risk: A risk whose examples do not interact.

        Raises:
            ValueError: If examples depend on each other, as with BatchNorm on batch statistics.
            FloatingPointError: If ḡ is not finite.
        """
        _require_independent_examples(risk)
        super().__init__(risk)
        self._mean = risk.gradient()

    def _apply(self, tape: Tape, parts: tuple[Tensor, ...], *, last: bool) -> tuple[Tensor, ...]:
        projections = tape.projections(parts)
        slopes = tape.slopes.detach()
        weighted = projections.view(-1, *[1] * (slopes.dim() - 1)) * slopes
        return tape.jacobian_transpose_product(weighted, last=last)

    def _matmat(self, matrix: Tensor) -> Tensor:
        return super()._matmat(matrix) - self._mean[:, None] * (self._mean @ matrix)

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random vector z (P,) with E z = 0 and E z zᵀ = C₁, for one gradient's time.

        z = Σ_i ε_i (g_i − ḡ) / √m with random signs ε_i. Drives noise-weighted estimators: Tr(C₁ h(A)) is
        the mean of zᵀ h(A) z.

        Args:
            generator: Source of the m signs; on every process the same.
        """
        self._check_state()
        signs = rademacher((self.risk.examples,), generator, self.dtype, self.device)
        return self.risk.weighted_gradient((signs - signs.mean()) * self.risk.examples**0.5)


def gradient_projections(risk: EmpiricalRisk, directions: Tensor) -> Tensor:
    """a_ij = g_iᵀ u_j: each example's gradient along each direction.

    Args:
        risk: A risk whose examples do not interact.
        directions: (P, k), not necessarily orthonormal.

    Returns:
        (m, k), in the risk's dtype and on its device, the examples of all processes in rank order. Costs two
        thirds of a gradient's time for each direction, and the gradient's graph where it is not kept.

    Raises:
        ValueError: If examples depend on each other or the directions' shape is not (P, k).
        FloatingPointError: If a projection is not finite; all processes raise together.
    """
    _require_independent_examples(risk)
    if directions.dim() != 2 or len(directions) != risk.numel:
        raise ValueError(f"directions must be ({risk.numel}, k), got {tuple(directions.shape)}")
    parts = [tuple(risk.split(plain(column)).values()) for column in directions.unbind(dim=1)]
    with risk.guard(products=True):
        own = torch.zeros(risk.held, len(parts), dtype=risk.dtype, device=risk.device)
        for (tape, _), rows in zip(risk.tapes(), risk.rows_of_chunks(own), strict=True):
            for index, part in enumerate(parts):
                rows[:, index] = tape.projections(part)
    rows = risk.shards.rows(own)
    if not bool(rows.isfinite().all()):
        raise risk.not_finite("the projection of a gradient")
    return rows


@dataclass(frozen=True, eq=False)
class ProjectedCovariance:
    """C₁ seen in a k-dimensional subspace, float64 on the CPU.

    Attributes:
        covariance: (k, k), uᵀ C₁ u, the unbiased (m−1) estimate.
        variances: (k,), its diagonal: the variance of one example's gradient along each direction.
        standard_errors: (k,), of the variances, over examples.
        mean: (k,), ḡᵀ u.
        projections: (m, k), g_iᵀ u of every example.
        examples: m.
        products: Passes through the gradient's graph, one for each direction.
        seconds: Wall time.
    """

    covariance: Tensor
    variances: Tensor
    standard_errors: Tensor
    mean: Tensor
    projections: Tensor = field(repr=False)
    examples: int
    products: int
    seconds: float


def projected_covariance(risk: EmpiricalRisk, directions: Tensor) -> ProjectedCovariance:
    """C₁ in the subspace spanned by some directions, with standard errors of the variances.

    The stationary laws need the noise γ of a mini-batch. It is this covariance times
    ``robustdyn.theory.minibatch_noise_factor``.

    The standard error uses the sample fourth moment m₄ about the mean,
    se² = (m₄ − (m−3)/(m−1) s⁴)/m, which needs no normality (Mood, Graybill & Boes, 1974, section VI.2.2).

    Args:
        risk: A risk whose examples do not interact.
        directions: (P, k).

    Raises:
        ValueError: With fewer than two examples, or as ``gradient_projections``.
    """
    if risk.examples < 2:
        raise ValueError("a covariance needs at least two examples")
    began = time.perf_counter()
    projections = gradient_projections(risk, directions).double().cpu()
    m = risk.examples
    mean = projections.mean(dim=0)
    centred = projections - mean
    covariance = centred.T @ centred / (m - 1)
    variances = covariance.diagonal().clone()
    fourth = centred.pow(4).mean(dim=0)
    squared_error = (fourth - (m - 3) / (m - 1) * variances**2) / m
    return ProjectedCovariance(
        covariance=covariance,
        variances=variances,
        standard_errors=squared_error.clamp(min=0.0).sqrt(),
        mean=mean,
        projections=projections,
        examples=m,
        products=directions.shape[1],
        seconds=time.perf_counter() - began,
    )


def _require_independent_examples(risk: EmpiricalRisk) -> None:
    if risk.batchnorm == "train" and risk.has_batchnorm:
        raise ValueError(
            "the gradient of one example is not defined while BatchNorm uses batch statistics: "
            "build the EmpiricalRisk with batchnorm='eval'"
        )
    if not risk.independent:
        raise ValueError(
            "the gradient of one example is not defined here: its loss depends on which others pass through "
            "the model with it"
        )
    if not risk.separable:
        raise ValueError(
            "per-example gradients need outputs with the examples first and losses of one example each, but "
            "the first example's loss depends on more than outputs[0]"
        )
