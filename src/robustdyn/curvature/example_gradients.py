"""Squared norms of per-example gradients, one parameter tensor at a time, without forming the gradients.

For a layer that is linear in its weight, the gradient of example i is a product of the layer's input and the
gradient at its output, δ. Both pass by during one ordinary forward and backward pass, so hooks can turn them
into ‖g_i‖² on the fly (Goodfellow, arXiv 1510.01799, for linear layers; Rochette et al., arXiv 1912.06015,
for convolutions).

Shapes: b examples in the pass, C and O input and output channels, G groups, T output positions, and
D = (C/G) · kernel height · kernel width numbers in one patch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

# Numbers in the largest temporary. On a CPU it should stay in the cache (2^20 against 2^24: 1.2 s against
# 1.9 s on a narrow PreActResNet-18); an accelerator wants large kernels instead.
_WORKSPACE = {"cpu": 2**20}
_WORKSPACE_ELSEWHERE = 2**24


class UnsupportedPassError(Exception):
    """The forward pass used a layer in a way that these formulas do not cover; the message says how."""


@dataclass
class _Layer:
    name: str
    module: nn.Module
    columns: dict[str, int]  # "weight" / "bias" -> column of the result
    calls: int = 0
    node: Any = None  # of autograd, that made the layer's output
    cache: dict[str, Tensor] = field(default_factory=dict)


class SquaredGradientNorms:
    """While entered, every backward pass adds each example's squared gradient norms to ``totals``.

    The reverse pass must be seeded per example and reach the layers' outputs; gradients with respect to the
    parameters themselves are not needed.

    Example:
        >>> with SquaredGradientNorms(modules, names, passes=1) as norms:
        ...     norms.begin(len(inputs), inputs.device)
        ...     outputs = model(inputs.requires_grad_())
        ...     torch.autograd.grad(outputs, inputs, grad_outputs=cotangents)
        ...     norms.totals  # (b, L)
    """

    def __init__(self, modules: Mapping[str, nn.Module], names: tuple[str, ...], passes: int) -> None:
        """Choose the tensors.

        Args:
            modules: The model's modules by name, at least those that own the tensors. Supported: Conv2d,
                Linear and BatchNorm in eval mode.
            names: L qualified parameter names, the order of the columns of ``totals``.
            passes: Backward passes for each forward pass; decides which formula is cheaper.
        """
        self.passes = passes
        self.width = len(names)
        self.totals = torch.zeros(0, self.width, dtype=torch.float64)
        self._layers: dict[str, _Layer] = {}
        self._handles: list[RemovableHandle] = []
        for column, name in enumerate(names):
            owner, _, kind = name.rpartition(".")
            layer = self._layers.setdefault(owner, _Layer(owner, modules[owner], {}))
            layer.columns[kind] = column

    def __enter__(self) -> "SquaredGradientNorms":
        for layer in self._layers.values():
            hook = partial(self._after_forward, layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def begin(self, examples: int, device: torch.device) -> None:
        """Before each forward pass: forget the last one and set ``totals`` (examples, L) to zero."""
        self.totals = torch.zeros(examples, self.width, dtype=torch.float64, device=device)
        self._forget()

    def _forget(self) -> None:
        """Drop what the last forward pass left.

        A node refers to its hooks, and these to this object: a cycle through autograd, which Python's garbage
        collector does not see, would keep the graph for ever.
        """
        for layer in self._layers.values():
            layer.calls, layer.node = 0, None
            layer.cache.clear()

    def check_used_once(self) -> None:
        """After a forward pass.

        Raises:
            UnsupportedPassError: If a layer was not called exactly once: its weight would be shared or
                unused.
        """
        for layer in self._layers.values():
            if layer.calls != 1:
                raise UnsupportedPassError(f"layer {layer.name!r} is called {layer.calls} times in one pass")

    def nodes(self) -> dict[str, Any]:
        """For each tensor's name autograd's node that made its layer's output in the last forward pass."""
        return {
            ".".join(filter(None, (layer.name, kind))): layer.node
            for layer in self._layers.values()
            for kind in layer.columns
        }

    def _after_forward(
        self, layer: _Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        layer.calls += 1
        inputs: Tensor = (args[0] if args else kwargs["input"]).detach()
        if len(inputs) != len(self.totals):
            raise UnsupportedPassError(
                f"layer {layer.name!r} sees a batch of {len(inputs)}, not of {len(self.totals)} examples"
            )
        if not output.requires_grad:
            raise UnsupportedPassError(
                f"the output of layer {layer.name!r} is cut off from the model's input"
            )
        with torch._C.DisableTorchFunction():  # not for GradientAccess, which looks for other hooks than ours
            layer.node = output.grad_fn
            # A tensor hook registered here keeps referring to this value if an in-place ReLU follows.
            output.register_hook(partial(self._after_backward, layer, inputs, inputs._version))

    def _after_backward(self, layer: _Layer, inputs: Tensor, version: int, deltas: Tensor) -> None:
        if inputs._version != version:
            raise UnsupportedPassError(f"the input of layer {layer.name!r} is changed in place after its use")
        for kind, column in layer.columns.items():
            self.totals[:, column] += self._squared_norms(layer, kind, inputs, deltas.detach()).double()

    def _squared_norms(self, layer: _Layer, kind: str, inputs: Tensor, deltas: Tensor) -> Tensor:
        module = layer.module
        if kind == "bias":
            channel = -1 if isinstance(module, nn.Linear) else 1
            return _sum_but(deltas, channel).square().sum(dim=1)
        if isinstance(module, _BatchNorm):
            return _sum_but(deltas * _normalised(module, inputs), 1).square().sum(dim=1)
        if isinstance(module, nn.Linear):
            return _linear_weight(inputs, deltas)
        assert isinstance(module, nn.Conv2d)
        return _conv2d_weight(module, inputs, deltas, self.passes, layer.cache)


def _sum_but(tensor: Tensor, channel: int) -> Tensor:
    """Sum over everything except examples (dimension 0) and channels: (b, channels)."""
    return tensor.movedim(channel, 1).flatten(start_dim=2).sum(dim=2) if tensor.dim() > 2 else tensor


def _normalised(norm: _BatchNorm, inputs: Tensor) -> Tensor:
    """What BatchNorm in eval mode multiplies its weight with."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    shape = (1, -1) + (1,) * (inputs.dim() - 2)
    scale = (norm.running_var + norm.eps).rsqrt()
    return (inputs - norm.running_mean.view(shape)) * scale.view(shape)


def _linear_weight(inputs: Tensor, deltas: Tensor) -> Tensor:
    """‖Σ_t δ_t a_tᵀ‖² for a linear layer applied at T positions (T = 1 for (b, features) inputs)."""
    if inputs.dim() == 2:
        return deltas.square().sum(dim=1) * inputs.square().sum(dim=1)
    a = inputs.flatten(1, -2)
    d = deltas.flatten(1, -2)
    positions, width, height = a.shape[1], a.shape[2], d.shape[2]
    if positions * (width + height) < width * height:
        return ((a @ a.mT) * (d @ d.mT)).sum(dim=(1, 2))
    step = _examples_at_once(width * height, a.device)
    parts = [(y.mT @ x).square().sum(dim=(1, 2)) for x, y in zip(a.split(step), d.split(step), strict=True)]
    return torch.cat(parts)


def _examples_at_once(numbers: int, device: torch.device) -> int:
    """How many examples, each needing so many numbers, fit into the work space."""
    return max(1, _WORKSPACE.get(device.type, _WORKSPACE_ELSEWHERE) // numbers)


def _conv2d_weight(
    conv: nn.Conv2d, inputs: Tensor, deltas: Tensor, passes: int, cache: dict[str, Tensor]
) -> Tensor:
    """‖δ Aᵀ‖² for a convolution, A (G, D, T) its input patches and δ (G, O/G, T).

    Directly it costs T·O·D multiplications per example. The Gram form Σ_ts (AᵀA)_ts (δᵀδ)_ts costs T²·O, plus
    T²·D·G once for all passes over the same inputs: far less where the image is small and the layer wide.
    """
    groups, outputs, positions = conv.groups, conv.out_channels, deltas[0, 0].numel()
    patch = conv.weight[0].numel()
    d = deltas.reshape(len(deltas), groups, outputs // groups, positions)
    gram_cost = positions**2 * (outputs + patch * groups / passes)
    # The cached Gram matrices of all layers together then hold at most twice the layers' inputs.
    gram_fits = groups * positions**2 <= 2 * inputs[0].numel()
    use_gram = gram_fits and gram_cost < positions * outputs * patch
    step = _examples_at_once(max(groups * patch * positions, outputs * patch), inputs.device)
    if use_gram:
        if "gram" not in cache:
            cache["gram"] = torch.cat([a.mT @ a for a in _patches(conv, inputs, step)])
        return (cache["gram"] * (d.mT @ d)).sum(dim=(1, 2, 3))
    parts = [
        (y @ a.mT).square().sum(dim=(1, 2, 3))
        for a, y in zip(_patches(conv, inputs, step), d.split(step), strict=True)
    ]
    return torch.cat(parts)


def _patches(conv: nn.Conv2d, inputs: Tensor, step: int) -> Iterator[Tensor]:
    """Input patches (b', G, D, T), ``step`` examples at a time."""
    # torch keeps the padding of every mode ('same' and 'circular' too) in this form, last dimension first.
    margins = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    for piece in inputs.split(step):
        padded = F.pad(piece, margins, mode=mode).contiguous()
        # A strided view copied once is 1.4 times faster than F.unfold, which dominated the whole estimator.
        view = _window(_window(padded, conv, 0), conv, 1)
        yield view.permute(0, 1, 4, 5, 2, 3).reshape(len(piece), conv.groups, conv.weight[0].numel(), -1)


def _window(images: Tensor, conv: nn.Conv2d, axis: int) -> Tensor:
    """A view whose last, new, dimension runs over the kernel's taps along one image axis."""
    taps, gap = conv.kernel_size[axis], conv.dilation[axis]
    return images.unfold(2 + axis, gap * (taps - 1) + 1, conv.stride[axis])[..., ::gap]
