"""The mean loss over fixed examples as a pure function of the model's parameters.

This is the part of ``EmpiricalRisk`` that handles the model: it passes examples through it with other tensors
in place of the parameters, and leaves the model exactly as it was.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from robustdyn.curvature.examples import Structure, leaves, length, mapped, rebuilt, shapes, structure
from robustdyn.curvature.kernels import Precision
from robustdyn.curvature.sharding import Shards
from robustdyn.curvature.tape import Tape

PerExampleLoss = Callable[[Any, Any], Tensor]
BatchNormMode = Literal["eval", "train"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example.

    Args:
        logits: (B, K).
        targets: Class indices (B,), or class probabilities (B, K).

    Returns:
        (B,) losses in nats.

    Raises:
        TypeError: The logits are not one tensor.
        ValueError: The targets are neither class indices nor probabilities of these classes.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            "cross_entropy needs one tensor of logits (B, K), but the model returned a "
            f"{type(logits).__name__}: give loss=lambda outputs, targets: cross_entropy(outputs[...], "
            "targets) with the entry that holds the logits, and with cross_entropy from robustdyn.curvature"
        )
    if targets.is_floating_point():
        if targets.dim() < 2:
            raise ValueError(
                "cross_entropy needs class indices as integers, or probabilities (B, K), but the targets are "
                f"{targets.dtype} of shape {tuple(targets.shape)}: use targets.long(), or another loss for "
                "regression"
            )
        return F.cross_entropy(logits, targets.to(logits), reduction="none")
    if targets.dim() != logits.dim() - 1:
        remedy = "another loss"
        if logits.dim() > 1 and targets.dim() > 1:
            remedy = "targets.float()" if targets.shape == logits.shape else "targets.flatten()"
        raise ValueError(
            f"cross_entropy needs class indices (B,) for logits of shape {tuple(logits.shape)}, but the "
            f"targets are integers of shape {tuple(targets.shape)}: use {remedy}"
        )
    try:
        return F.cross_entropy(logits, targets.long(), reduction="none")
    except IndexError as error:  # on a CPU; a GPU would have to wait for the check
        raise ValueError(
            f"the targets are classes {int(targets.min())} to {int(targets.max())}, but the model has "
            f"{logits.shape[1]} outputs, for the classes 0 to {logits.shape[1] - 1}"
        ) from error


class RiskFunction:
    """ℓ of fixed examples as a function of θ; the attributes are those of ``EmpiricalRisk``."""

    model: nn.Module
    inputs: Structure
    targets: Structure
    held: int
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
    _several: Structure  # the last outputs, if they are not one tensor: how they are packed

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

    def chunks(self) -> Iterator[tuple[Structure, Structure]]:
        """This process's examples in order, ``chunk_size`` at a time, on the parameters' device."""
        for start in range(0, self.held, self.chunk_size):
            yield self.subset(slice(start, start + self.chunk_size))

    def rows_of_chunks(self, values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Views of ``values``, which has an entry for each of this process's examples along ``dim``.

        Empty, as ``tapes`` and ``chunks`` are, where this process has no examples.
        """
        return values.split(self.chunk_size, dim) if self.held else ()

    def subset(self, which: slice) -> tuple[Structure, Structure]:
        """Copies of some of this process's inputs and targets, on the parameters' device.

        Copies, because a model may normalise its inputs in place.
        """

        def copied(tensor: Tensor) -> Tensor:
            return tensor[which].to(self.device, copy=True)

        with torch.inference_mode(False):
            return mapped(copied, self.inputs), mapped(copied, self.targets)

    def few(self, count: int) -> slice:
        """At most so many of this process's examples, spread over all of them."""
        step = max(1, self.held // count)
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

    def tape(self, inputs: Structure, targets: Structure) -> Tape:
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
            examples=length(inputs),
            precision=self.precision,
        )

    def outputs(self, parameters: Mapping[str, Tensor], inputs: Structure) -> Tensor:
        """f(x; θ) as a pure function; call it inside ``guard``.

        Several outputs are packed into one tensor, from which ``losses_of`` takes them again.

        Args:
            parameters: A tensor for each of ``names``, or for more of the model's parameters.
            inputs: (B, ...).

        Returns:
            The model's output, usually (B, K) logits; of several, (B, numbers of an example).

        Raises:
            ValueError: One of several outputs has not the examples first.
        """
        everything = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        everything.update(parameters)
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        outputs = call_with(self.model, {**everything, **buffers}, inputs)
        self._several = None if isinstance(outputs, Tensor) else structure(outputs, "the model's output")
        return outputs if self._several is None else _packed(self._several, length(inputs))

    def losses(self, parameters: Mapping[str, Tensor], inputs: Structure, targets: Structure) -> Tensor:
        """ℓ of each example, shape (B,), as a pure function of the parameters.

        Raises:
            ValueError: If ``loss`` does not return one number per example.
        """
        return self.losses_of(self.outputs(parameters, inputs), targets)

    def losses_of(self, outputs: Tensor, targets: Structure) -> Tensor:
        """As ``losses``, of outputs."""
        taken = outputs if self._several is None else _unpacked(outputs, self._several)
        losses = self.loss(taken, targets)
        count = length(targets)
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
            raise ValueError(
                f"loss must return one number per example: for {count} of the {self.held} examples, "
                f"outputs {shapes(taken)} and targets {shapes(targets)}, it returned {tuple(losses.shape)}, "
                f"not ({count},): {remedy}"
            )
        return losses

    @property
    def has_batchnorm(self) -> bool:
        """Whether the model contains a BatchNorm layer."""
        return any(isinstance(module, _BatchNorm) for module in self.model.modules())


def _packed(outputs: Structure, examples: int) -> Tensor:
    """Several outputs (B, ...) as one tensor, (B, numbers of an example)."""
    for leaf in leaves(outputs):
        if leaf.dim() == 0 or len(leaf) != examples or not leaf.is_floating_point():
            raise ValueError(
                f"the model returns several outputs, {shapes(outputs)}, and one of them is no floating-point "
                f"tensor with the {examples} examples first: wrap the model so that it returns those that "
                "the loss takes"
            )
    return torch.cat([leaf.reshape(examples, -1) for leaf in leaves(outputs)], dim=1)


def _unpacked(packed: Tensor, like: Structure) -> Structure:
    """The inverse of ``_packed``; ``like`` may have another number of examples."""
    wholes = [leaf.shape[1:] for leaf in leaves(like)]
    parts = packed.split([whole.numel() for whole in wholes], dim=1)
    views = [part.reshape(len(packed), *whole) for part, whole in zip(parts, wholes, strict=True)]
    return rebuilt(views, like)


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Structure) -> Any:
    """The model's output with other tensors in place of its parameters and buffers.

    ``functional_call`` finds out by itself which names share a tensor, but then leaves the model changed
    where one module has two names. Here each module is visited once.

    Args:
        model: Left as it is.
        tensors: By their names in ``named_parameters()`` and ``named_buffers()``.
        inputs: (B, ...); a tuple holds the positional arguments, and a dictionary the keyword arguments.
    """
    present = chain(model.named_parameters(), model.named_buffers())
    replacement = {id(tensor): tensors[name] for name, tensor in present if name in tensors}
    everywhere = {
        f"{prefix}.{key}" if prefix else key: replacement[id(tensor)]
        for prefix, module in model.named_modules()
        for key, tensor in chain(module._parameters.items(), module._buffers.items())
        if id(tensor) in replacement
    }
    named = inputs if isinstance(inputs, dict) else {}
    positional = () if named else inputs if isinstance(inputs, tuple) else (inputs,)
    return functional_call(model, everywhere, positional, named, tie_weights=False)


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
