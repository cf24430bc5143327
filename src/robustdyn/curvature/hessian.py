"""The Hessian of the empirical risk, and its Gauss–Newton part, as linear operators."""

from torch import Tensor

from robustdyn.curvature.operators import RiskOperator
from robustdyn.curvature.tape import Tape


class Hessian(RiskOperator):
    """H = ∇²L_S(θ), with the examples held fixed.

    One product costs a backward pass through the gradient's graph (Pearlmutter, "Fast exact multiplication by
    the Hessian", Neural Computation 1994): two gradients' time, and one more wherever the graph is not kept
    (``memory`` of the risk). It is exact: finite differences of gradients are not, on ReLU networks in
    float32.
    """

    def _apply(self, tape: Tape, parts: tuple[Tensor, ...], *, last: bool) -> tuple[Tensor, ...]:
        return tape.hessian_product(parts, last=last)


class GaussNewton(RiskOperator):
    """G = (1/m) Σ_i J_iᵀ Λ_i J_i, J the outputs' derivative and Λ the loss's curvature in the outputs.

    H without the curvature of the network itself; positive semi-definite for convex losses, and for
    cross-entropy the Fisher information of the model's own labels (Schraudolph, Neural Computation 2002;
    Martens, JMLR 2020). One product costs about 1.3 gradients' time on a kept graph.
    """

    def _apply(self, tape: Tape, parts: tuple[Tensor, ...], *, last: bool) -> tuple[Tensor, ...]:
        curved = tape.loss_curvature_product(tape.jacobian_product(parts))
        return tape.jacobian_transpose_product(curved, last=last)
