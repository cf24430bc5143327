"""The mean loss over fixed examples as a pure function of the model's parameters.

This is the part of ``EmpiricalRisk`` that handles the model: it passes examples through it with other tensors
in place of the parameters, and leaves the model exactly as it was.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from robustdyn.curvature.kernels import Precision
from robustdyn.curvature.sharding import Shards
from robustdyn.curvature.tape import Tape

PerExampleLoss = Callable[[Tensor, Tensor], Tensor]
BatchNormMode = Literal["eval", "train"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example.

    Args:
        logits: (B, K).
        targets: Class indices (B,), or class probabilities (B, K).

    Returns:
        (B,) losses in nats.

    Raises:
        ValueError: If there is one number for each example, and it is no integer.
    """
    if targets.is_floating_point():
        if targets.dim() < 2:
            raise ValueError(
                "cross_entropy needs class indices as integers, or probabilities (B, K), but the targets are "
                f"{targets.dtype} of shape {tuple(targets.shape)}: use targets.long(), or another loss for "
                "regression"
            )
        return F.cross_entropy(logits, targets.to(logits), reduction="none")
    return F.cross_entropy(logits, targets.long(), reduction="none")


class RiskFunction:
    """ℓ of fixed examples as a function of θ; the attributes are those of ``EmpiricalRisk``."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: PerExampleLoss
    names: tuple[str, ...]
    blocks: dict[str, slice]
    shapes: dict[str, torch.Size]
    numel: int
    examples: int
    shards: Shards
    chunk_size: int
    batchnorm: BatchNormMode
    independent: bool
    precision: Precision
    dtype: torch.dtype
    device: torch.device
    channels_last: bool  # whether 4-d inputs may come in that layout
    point: Tensor | None  # θ, if it is not the model's

    # ------------------------------------------------------------------ θ as one vector and as tensors

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector, one per parameter tensor.

        Args:
            flat: (P,).

        Raises:
            ValueError: If the length is not P.
        """
        if flat.shape != (self.numel,):
            raise ValueError(f"expected a vector of shape ({self.numel},), got {tuple(flat.shape)}")
        return {name: flat[self.blocks[name]].view(self.shapes[name]) for name in self.names}

    def flatten(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The inverse of ``split``: one tensor per name, in order, to a (P,) vector."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def add(self, flat: Tensor, tensors: Iterable[Tensor]) -> None:
        """Add one tensor per name, in order, to a (P,) vector in place."""
        torch._foreach_add_(list(self.split(flat).values()), [tensor.detach() for tensor in tensors])

    def parameters(self) -> dict[str, Tensor]:
        """The measured tensors by name, detached: the model's own, or views of the fixed point."""
        if self.point is not None:
            return self.split(self.point)
        present = dict(self.model.named_parameters())
        return {name: present[name].detach() for name in self.names}

    def leaves(self) -> dict[str, Tensor]:
        """As ``parameters``, but fresh leaves of the autograd graph that require gradients."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.parameters().items()}

    # ------------------------------------------------------------------ the examples

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's examples in order, ``chunk_size`` at a time, on the parameters' device."""
        for start in range(0, len(self.inputs), self.chunk_size):
            yield self.subset(slice(start, start + self.chunk_size))

    def rows_of_chunks(self, values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Views of ``values``, which has an entry for each of this process's examples along ``dim``.

        Empty, as ``tapes`` and ``chunks`` are, where this process has no examples.
        """
        return values.split(self.chunk_size, dim) if len(self.inputs) else ()

    def subset(self, which: slice) -> tuple[Tensor, Tensor]:
        """Copies of some of this process's inputs and targets, on the parameters' device.

        Copies, because a model may normalise its inputs in place.
        """
        with torch.inference_mode(False):
            inputs = self.inputs[which].to(self.device, copy=True)
            return inputs, self.targets[which].to(self.device, copy=True)

    def few(self, count: int) -> slice:
        """At most so many of this process's examples, spread over all of them."""
        step = max(1, len(self.inputs) // count)
        return slice(0, step * count, step)

    # ------------------------------------------------------------------ passes

    @contextmanager
    def guard(self, *, products: bool = False) -> Iterator[None]:
        """The context in which every measurement runs; it restores the previous state at its end.

        Inside, gradients are on. Inference mode, autocast and compiled code are off, BatchNorm has the chosen
        mode, attention uses its mathematical kernel, and TensorFloat-32 is off unless ``products`` may use
        it. Afterwards training flags, torch's random state and its settings are as before. Weights, buffers,
        ``.grad`` and ``requires_grad`` are never changed, because the model only receives detached parameters
        and copies of its buffers.
        """
        flags = [(module, module.training) for module in self.model.modules()]
        cuda = self.device.type == "cuda"
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[self.device] if cuda else []))
            if cuda:
                stack.enter_context(tensor_float_32(products and self.precision == "tf32"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # flash attention has no second derivative
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                for module, _ in flags:
                    if isinstance(module, _BatchNorm):
                        module.training = self.batchnorm == "train"
                yield
            finally:
                for module, training in flags:
                    module.training = training

    def tape(self, inputs: Tensor, targets: Tensor) -> Tape:
        """A chunk's passes, recorded; inside ``guard``.

        Args:
            inputs: (b, ...).
            targets: (b, ...).
        """
        leaves = self.leaves()
        if self.channels_last:
            # measured on a PreActResNet-18: products take 15 % less time in this layout
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return Tape(
            tuple(leaves.values()),
            lambda: self.outputs(leaves, inputs),
            lambda outputs: self.losses_of(outputs, targets),
            examples=len(inputs),
            precision=self.precision,
        )

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """f(x; θ) as a pure function; call it inside ``guard``.

        Args:
            parameters: A tensor for each of ``names``, or for more of the model's parameters.
            inputs: (B, ...).

        Returns:
            The model's output, usually (B, K) logits.
        """
        everything = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        everything.update(parameters)
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        return call_with(self.model, {**everything, **buffers}, inputs)

    def losses(self, parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """ℓ of each example, shape (B,), as a pure function of the parameters.

        Raises:
            ValueError: If ``loss`` does not return one number per example.
        """
        return self.losses_of(self.outputs(parameters, inputs), targets)

    def losses_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """As ``losses``, of outputs."""
        losses = self.loss(outputs, targets)
        count = len(targets)
        if losses.shape != (count,):
            if losses.dim() == 0:
                remedy = "use reduction='none'"
            elif losses.numel() == count:
                remedy = "drop the dimensions of size one, for instance by .flatten()"
            else:
                remedy = (
                    "average over all dimensions but the first; where outputs and targets differ in shape, "
                    "PyTorch has broadcast them"
                )
            given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"loss must return one number per example: for {count} of the {len(self.inputs)} examples, "
                f"outputs {given} and targets {tuple(targets.shape)}, it returned {tuple(losses.shape)}, not "
                f"({count},): {remedy}"
            )
        return losses

    @property
    def has_batchnorm(self) -> bool:
        """Whether the model contains a BatchNorm layer."""
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The model's output with other tensors in place of its parameters and buffers.

    ``functional_call`` finds out by itself which names share a tensor, but then leaves the model changed
    where one module has two names. Here each module is visited once.

    Args:
        model: Left as it is.
        tensors: By their names in ``named_parameters()`` and ``named_buffers()``.
        inputs: (B, ...).
    """
    present = chain(model.named_parameters(), model.named_buffers())
    replacement = {id(tensor): tensors[name] for name, tensor in present if name in tensors}
    everywhere = {
        f"{prefix}.{key}" if prefix else key: replacement[id(tensor)]
        for prefix, module in model.named_modules()
        for key, tensor in chain(module._parameters.items(), module._buffers.items())
        if id(tensor) in replacement
    }
    outputs: Tensor = functional_call(model, everywhere, (inputs,), tie_weights=False)
    return outputs


def plain(tensor: Tensor) -> Tensor:
    """The tensor detached, and copied if it was made under inference_mode, which autograd cannot use."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def rows_not_finite(values: Tensor) -> list[int]:
    """Numbers of the rows (first dimension) with a number that is not finite."""
    finite = values.isfinite().reshape(len(values), -1).all(dim=1)
    return finite.logical_not().nonzero()[:, 0].tolist()


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Switch TensorFloat-32 on or off: PyTorch uses it for convolutions on NVIDIA GPUs by default."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
