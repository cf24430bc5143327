"""The Hessian of the empirical risk as a linear operator."""

import torch
from torch import Tensor

from robustdyn.curvature.empirical_risk import EmpiricalRisk, gradients
from robustdyn.curvature.operators import LinearOperator


class Hessian(LinearOperator):
    """H = ∇²L_S(θ) at the model's present weights, with the examples held fixed.

    One product costs one forward pass, one backward pass and one backward pass through that, per chunk
    (Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994). It is exact: finite
    differences of gradients are not, on ReLU networks in float32.
    """

    def __init__(self, risk: EmpiricalRisk) -> None:
        """The Hessian of a risk.

        Args:
            risk: Any risk, with BatchNorm in either mode.
        """
        super().__init__(risk.numel, risk.dtype, risk.device)
        self.risk = risk

    def _matvec(self, vector: Tensor) -> Tensor:
        risk = self.risk
        parts = risk.split(vector)
        with risk.guard():
            total = torch.zeros_like(vector)
            leaves = risk.leaves()
            weights = tuple(leaves.values())
            for inputs, targets in risk.chunks():
                loss = risk.losses(leaves, inputs, targets).sum()
                gradient = gradients(loss, weights, differentiable=True)
                slope = torch.stack(
                    [(g * part).sum() for g, part in zip(gradient, parts.values(), strict=True)]
                ).sum()
                total += risk.flatten(gradients(slope, weights))
            return total / risk.examples
