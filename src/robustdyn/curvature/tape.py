"""One chunk's forward and backward pass, kept so that products can run through it repeatedly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from robustdyn.curvature.kernels import Precision, TwiceDifferentiable


class Tape:
    """Sums over the b examples of one chunk: gradient, and products with H, J, Jᵀ and Λ, all from one graph.

    The graph is recorded in two steps, θ -> outputs z -> losses and back, losses -> ∂ℓ/∂z -> Σ∂ℓ/∂θ, with
    J = ∂z/∂θ, one block of rows per example, and Λ = ∂²ℓ/∂z², one block per example. Products with H run
    back through both halves, those with J through the second and those with Jᵀ through the first.

    Make and use it inside the risk's guard.

    Attributes:
        examples: b.
        gradient: Σ_i ∇ℓ_i, one tensor for each measured parameter; on the graph.
        slopes: ∂ℓ_i/∂z_i, shape of the outputs; on the graph.
    """

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        outputs: Callable[[], Tensor],
        losses: Callable[[Tensor], Tensor],
        *,
        examples: int,
        precision: Precision,
    ) -> None:
        """Record the passes.

        Args:
            weights: θ, leaves that require gradients.
            outputs: z, first dimension the examples; computed from ``weights``.
            losses: ℓ (b,) of the outputs.
            examples: b.
            precision: Of the products.
        """
        self.examples = examples
        self._weights = weights
        self._kernels = TwiceDifferentiable(precision)
        with self._kernels:
            self._outputs = outputs()
        (slopes,) = gradients(losses(self._outputs).sum(), (self._outputs,), differentiable=True)
        # a loss linear in the outputs has constant slopes; J's products differentiate with respect to them
        self.slopes = slopes if slopes.requires_grad else slopes.requires_grad_()
        self.gradient = _products((self._outputs,), self._weights, (self.slopes,), differentiable=True)

    def hessian_product(self, parts: tuple[Tensor, ...], *, last: bool) -> tuple[Tensor, ...]:
        """Σ_i ∇²ℓ_i v.

        Args:
            parts: v, one tensor for each parameter.
            last: Free the graph on the way; the tape cannot be used afterwards.
        """
        return _products(self.gradient, self._weights, parts, keep=not last)

    def jacobian_product(self, parts: tuple[Tensor, ...]) -> Tensor:
        """J v, shape of the outputs; arguments as ``hessian_product``."""
        self._kernels.outputs_only = True  # half the convolutions
        try:
            return _products(self.gradient, (self.slopes,), parts)[0]
        finally:
            self._kernels.outputs_only = False

    def jacobian_transpose_product(self, cotangents: Tensor, *, last: bool) -> tuple[Tensor, ...]:
        """Jᵀ u, one tensor for each parameter.

        Args:
            cotangents: u, shape of the outputs.
            last: As in ``hessian_product``.
        """
        return _products((self._outputs,), self._weights, (cotangents,), keep=not last)

    def loss_curvature_product(self, changes: Tensor) -> Tensor:
        """Λ u, shape of the outputs."""
        return _products((self.slopes,), (self._outputs,), (changes,))[0]

    def block_form(self, place: int, vector: Tensor) -> Tensor:
        """Σ_i vᵀ ∇²_kk ℓ_i v for one parameter tensor k alone, float64.

        Args:
            place: k, in the order of the names.
            vector: v, of the tensor's shape.
        """
        (product,) = _products((self.gradient[place],), (self._weights[place],), (vector,))
        return (product * vector).double().sum()

    def projections(self, parts: tuple[Tensor, ...]) -> Tensor:
        """g_iᵀ v for every example, shape (b,); arguments as ``hessian_product``."""
        if len(self.slopes) != self.examples:
            raise ValueError(
                f"per-example gradients need outputs with the examples first, ({self.examples}, ...), but "
                f"the model returns {tuple(self.slopes.shape)}"
            )
        return (self.slopes.detach() * self.jacobian_product(parts)).reshape(self.examples, -1).sum(dim=1)

    def release(self) -> None:
        """Free the graph; the tape cannot be used afterwards."""
        del self.gradient, self.slopes, self._outputs


def gradients(
    output: Tensor, inputs: tuple[Tensor, ...], *, differentiable: bool = False
) -> tuple[Tensor, ...]:
    """∂output/∂inputs with zeros where there is no dependence (torch would raise or return None).

    Args:
        output: Scalar.
        inputs: Leaves or intermediate tensors.
        differentiable: Keep the graph so that the result can be differentiated again.
    """
    return _products((output,), inputs, (torch.ones_like(output),), differentiable=differentiable, keep=False)


@contextmanager
def count_saved_bytes() -> Iterator[list[int]]:
    """Inside, the list's only number counts the bytes that autograd keeps for backward passes.

    Graphs that were recorded inside cannot be used afterwards.
    """
    seen: set[int] = set()
    total = [0]
    held: list[list[Tensor]] = []

    def pack(tensor: Tensor) -> list[Tensor]:
        storage = tensor.untyped_storage()
        if not tensor.is_leaf or not tensor.requires_grad:  # parameters are there anyway
            pointer = storage.data_ptr()
            if pointer not in seen:
                seen.add(pointer)
                total[0] += storage.nbytes()
        held.append([tensor])
        return held[-1]

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder[0]):
            yield total
    finally:
        # a node that saved its own output would be held by it for ever
        for holder in held:
            holder.clear()


def _products(
    outputs: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    *,
    differentiable: bool = False,
    keep: bool = True,
) -> tuple[Tensor, ...]:
    """Σ cotangentᵀ ∂output/∂input, with zeros where there is no dependence."""
    on_graph = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad
    ]
    if not on_graph or not any(tensor.requires_grad for tensor in inputs):
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(
        [output for output, _ in on_graph],
        inputs,
        [cotangent for _, cotangent in on_graph],
        create_graph=differentiable,
        retain_graph=keep or differentiable,
        allow_unused=True,
        materialize_grads=True,
    )
