"""The covariance C₁ of one example's gradient, without ever storing a per-example gradient.

Shapes: m examples, P parameters, k directions. g_i is the gradient of example i, ḡ their mean. With BatchNorm
on batch statistics the loss of one example depends on the others, g_i is not defined, and everything here
refuses.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

from robustdyn.curvature.empirical_risk import EmpiricalRisk, gradients, plain
from robustdyn.curvature.operators import LinearOperator


class GradientCovariance(LinearOperator):
    """C₁ = (1/m) Σ_i (g_i − ḡ)(g_i − ḡ)ᵀ, the population covariance over the measurement set.

    A product is two sweeps over the examples: forward mode gives all a_i = g_iᵀ v at once, then one reverse
    pass with weights a_i − ā gives C₁ v = (1/m) Σ_i (a_i − ā) g_i. Centring the weights rather than
    subtracting ḡ (ḡᵀ v) afterwards loses nothing to cancellation where the mean gradient is large.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        """The gradient covariance of a risk.

        Args:
            risk: A risk whose examples do not interact.

        Raises:
            ValueError: If BatchNorm uses batch statistics.
        """
        _require_independent_examples(risk)
        super().__init__(risk.numel, risk.dtype, risk.device)
        self.risk = risk

    def _matvec(self, vector: Tensor) -> Tensor:
        risk = self.risk
        projections = gradient_projections(risk, vector[:, None])[:, 0]
        weights = (projections - projections.mean()) / risk.examples
        with risk.guard():
            total = torch.zeros_like(vector)
            leaves = risk.leaves()
            for (inputs, targets), part in zip(risk.chunks(), weights.split(risk.chunk_size), strict=True):
                weighted = (part * risk.losses(leaves, inputs, targets)).sum()
                total += risk.flatten(gradients(weighted, tuple(leaves.values())))
            return total


def gradient_projections(risk: EmpiricalRisk, directions: Tensor) -> Tensor:
    """a_ij = g_iᵀ u_j: each example's gradient along each direction, by forward-mode differentiation.

    Args:
        risk: A risk whose examples do not interact.
        directions: (P, k), not necessarily orthonormal.

    Returns:
        (m, k), in the risk's dtype. Costs k forward-mode passes over the examples.

    Raises:
        ValueError: If BatchNorm uses batch statistics or the directions' shape is not (P, k).
    """
    _require_independent_examples(risk)
    if directions.dim() != 2 or len(directions) != risk.numel:
        raise ValueError(f"directions must be ({risk.numel}, k), got {tuple(directions.shape)}")
    tangents = [risk.split(plain(column)) for column in directions.unbind(dim=1)]
    rows = []
    with risk.guard():
        parameters = risk.parameters()
        for inputs, targets in risk.chunks():

            def losses(
                parameters: dict[str, Tensor], inputs: Tensor = inputs, targets: Tensor = targets
            ) -> Tensor:
                return risk.losses(parameters, inputs, targets)

            columns = [jvp(losses, (parameters,), (tangent,))[1] for tangent in tangents]
            rows.append(torch.stack(columns, dim=1) if columns else inputs.new_zeros(len(inputs), 0))
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class ProjectedCovariance:
    """C₁ seen in a k-dimensional subspace, float64 on the CPU.

    Attributes:
        covariance: (k, k), uᵀ C₁ u, the unbiased (m−1) estimate.
        variances: (k,), its diagonal: the variance of one example's gradient along each direction.
        standard_errors: (k,), of the variances, over examples.
        mean: (k,), ḡᵀ u.
        examples: m.
        products: Forward-mode passes over the examples.
        seconds: Wall time.
    """

    covariance: Tensor
    variances: Tensor
    standard_errors: Tensor
    mean: Tensor
    examples: int
    products: int
    seconds: float


def projected_covariance(risk: EmpiricalRisk, directions: Tensor) -> ProjectedCovariance:
    """C₁ in the subspace spanned by some directions, with standard errors of the variances.

    The standard error uses the sample fourth moment m₄ about the mean,
    se² = (m₄ − (m−3)/(m−1) s⁴)/m, which needs no normality (Mood, Graybill & Boes, 1974, section VI.2.2).

    Args:
        risk: A risk whose examples do not interact.
        directions: (P, k).

    Raises:
        ValueError: With fewer than two examples, or as :func:`gradient_projections`.
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
