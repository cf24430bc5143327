"""The convolutions and linear layers of a network, with the scale of BatchNorm folded into them.

The layers are found by watching one forward pass, so that any module works: what counts is which function was
called with which weight, and which result went where. A BatchNorm in eval mode is x ↦ s x + t for each
channel, with s = γ/√(running variance + ε). Its scale is folded

- into the layer in front of it, if that layer's output goes nowhere else: row i of the weight times s_i;
- otherwise into all layers behind it, if only ReLU, pooling and reshaping lie between: column i times |s_i|,
  because ReLU(s x + t) = |s| ReLU(± x + t/|s|). Pre-activation networks need this where a BatchNorm follows
  the sum of two branches.

A network with any other BatchNorm has no folded weights.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from robustdyn.complexity.convolution import convolution_norm

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_BATCH_NORM = inspect.signature(F.batch_norm)
_SHAPES = ("flatten", "view", "reshape", "squeeze", "contiguous", "clone", "to", "float", "double", "detach")
_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
HOMOGENEOUS = ("relu", "leaky_relu", "dropout", "dropout2d", "mean", "pad", *_SHAPES)
"""Functions f of each channel with f(c x) = c f(x) for c ≥ 0, beside pooling; dropout does nothing here."""
_SUMS = ("add", "iadd", "radd", "sum", "cat")


class UndefinedMeasure(Exception):
    """A measure is not defined for this network; the message says why, in a sentence."""


@dataclass(eq=False)
class Call:
    """One function call of the forward pass that made a tensor.

    Attributes:
        name: Of the function, without underscores.
        made_from: The calls that made its arguments; the network's input has none.
        arguments: By name, of layers and BatchNorm only.
        shape: Of the result.
        used_by: The calls that take the result.
    """

    name: str
    made_from: tuple["Call", ...]
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    used_by: list["Call"] = field(default_factory=list)

    @property
    def is_layer(self) -> bool:
        """Whether it is a convolution or a linear layer."""
        return self.name == "linear" or self.name in _CONVOLUTIONS

    @property
    def is_homogeneous(self) -> bool:
        """Whether a positive factor of a channel passes through it."""
        return self.name in HOMOGENEOUS or self.name.startswith(_POOLS)

    @property
    def is_sum(self) -> bool:
        """Whether it adds up or joins other results."""
        return self.name in _SUMS

    @cached_property
    def sees_input(self) -> bool:
        """Whether no layer or BatchNorm lies between the network's input and its result."""
        weighted = self.is_layer or self.name == "batch_norm"
        return not weighted and all(call.sees_input for call in self.made_from)


class _Watch(TorchFunctionMode):
    """Notes the calls of a forward pass."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = [Call("input", (), {}, tuple(inputs.shape))]
        self._made = {id(inputs): self.calls[0]}
        self._alive: list[Tensor] = [inputs]  # or another tensor could get the same id

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "").strip("_")
        if isinstance(result, Tensor):
            made_from = dict.fromkeys(
                self._made[id(t)] for t in _tensors([args, kwargs]) if id(t) in self._made
            )
            if made_from:  # not a function of parameters alone
                call = Call(name, tuple(made_from), named_arguments(name, args, kwargs), tuple(result.shape))
                for earlier in made_from:
                    earlier.used_by.append(call)
                self.calls.append(call)
                self._made[id(result)] = call
                self._alive.append(result)
        return result


def named_arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a layer or BatchNorm by name; none of another function."""
    if name == "batch_norm":
        bound = _BATCH_NORM.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    if name == "linear" or name in _CONVOLUTIONS:
        return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    return {}


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


@dataclass(frozen=True, eq=False)
class FoldedNorm:
    """One BatchNorm in eval mode.

    Attributes:
        call: Its call.
        weight: Name of γ; empty if it has none.
        variance: Name of the running variance.
        front: The layer into which it is folded, if that is the one in front of it.
        behind: The layers behind it into which it is folded otherwise.
    """

    call: Call
    weight: str
    variance: str
    front: Call | None
    behind: tuple[Call, ...]

    @property
    def scale(self) -> Tensor:
        """s, (C,) in float64."""
        given = self.call.arguments
        scale: Tensor = (given["running_var"].double() + given["eps"]).rsqrt()
        if given["weight"] is not None:
            scale = scale * given["weight"].detach().double()
        return scale

    @property
    def shift(self) -> Tensor:
        """t, (C,) in float64."""
        given = self.call.arguments
        moved: Tensor = -self.scale * given["running_mean"].double()
        if given["bias"] is not None:
            moved = moved + given["bias"].detach().double()
        return moved

    def scale_before_training(self, initial: Mapping[str, Tensor]) -> Tensor:
        """The scale before training; unless they are given, the statistics were 0 and 1 then."""
        like = self.scale
        variance = initial.get(self.variance, torch.ones_like(like)).to(like)
        scale: Tensor = (variance + self.call.arguments["eps"]).rsqrt()
        if self.weight in initial:
            scale = scale * initial[self.weight].detach().to(like)
        return scale


@dataclass(frozen=True, eq=False)
class FoldedLayer:
    """A convolution or linear layer with the scale of BatchNorm folded into its weight.

    Attributes:
        name: Of the weight; empty if it is not a parameter.
        call: Its call.
        weight: (out, in/groups, *kernel) in float64, folded.
        initial: The same before training; None if it is not known.
        size: Spatial size of the input, without padding; empty for a linear layer.
    """

    name: str
    call: Call
    weight: Tensor
    initial: Tensor | None
    size: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Output positions of a convolution; 1 for a linear layer on vectors."""
        return math.prod(self.call.shape[2:])

    @cached_property
    def frobenius_sq(self) -> float:
        """‖W‖²_F of the weight tensor."""
        return float(self.weight.square().sum())

    @cached_property
    def spectral(self) -> float:
        """‖W‖₂ of the linear map; of a convolution with circular padding."""
        return self._norm_of_map(self.weight)

    @cached_property
    def spectral_reshaped(self) -> float:
        """‖W‖₂ of the weight tensor as a matrix (out, in/groups · kernel)."""
        return float(torch.linalg.matrix_norm(self.weight.flatten(1), 2))

    @cached_property
    def spectral_distance(self) -> float:
        """‖W − W⁰‖₂ of the linear maps."""
        return self._norm_of_map(self.change)

    @property
    def change(self) -> Tensor:
        """W − W⁰.

        Raises:
            UndefinedMeasure: W⁰ is not known.
        """
        if self.initial is None:
            raise UndefinedMeasure("the weights before training are not known")
        return self.weight - self.initial

    def _norm_of_map(self, weight: Tensor) -> float:
        if not self.size:
            return float(torch.linalg.matrix_norm(weight, 2))
        given = self.call.arguments
        dims = len(self.size)
        return convolution_norm(
            weight,
            self.size,
            stride=_each(given.get("stride", 1), dims),
            dilation=_each(given.get("dilation", 1), dims),
            groups=int(given.get("groups", 1)),
        )


@dataclass(frozen=True, eq=False)
class FoldedLayers:
    """All layers of a network, in the order of the forward pass, each weight once.

    Attributes:
        each: The layers.
        norms: All BatchNorm.
        calls: All calls of the forward pass.
    """

    each: tuple[FoldedLayer, ...]
    norms: tuple[FoldedNorm, ...]
    calls: tuple[Call, ...]


def folded_layers(model: nn.Module, inputs: Tensor, initial: Mapping[str, Tensor] | None) -> FoldedLayers:
    """The layers of a network in eval mode.

    Args:
        model: The network.
        inputs: A few of its inputs (B, ...), for a forward pass.
        initial: Parameters before training by name; may have the running statistics, too.

    Raises:
        UndefinedMeasure: A weight is used by another function than a layer, a BatchNorm cannot be folded, or
            there is no layer.
    """
    with torch.no_grad(), _Watch(inputs) as watch:
        model(inputs)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    layers: dict[int, Call] = {}
    for call in watch.calls:
        if call.is_layer:
            layers.setdefault(id(call.arguments["weight"]), call)
    if not layers:
        raise UndefinedMeasure("the network has no convolution and no linear layer")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in layers:
            raise UndefinedMeasure(f"{name} is not the weight of a convolution or linear layer")
    norms = tuple(_folded(call, names) for call in watch.calls if call.name == "batch_norm")
    each = []
    for call in layers.values():
        tensor = call.arguments["weight"]
        name = names.get(id(tensor), "")
        before = None
        if initial is not None and name in initial:
            first = initial[name].detach().to(tensor.device).double()
            before = _fold(first, call, [(n, n.scale_before_training(initial)) for n in norms])
        weight = _fold(tensor.detach().double(), call, [(n, n.scale) for n in norms])
        each.append(FoldedLayer(name, call, weight, before, _size(call)))
    return FoldedLayers(tuple(each), norms, tuple(watch.calls))


def _folded(norm: Call, names: Mapping[int, str]) -> FoldedNorm:
    """A BatchNorm, with where it is folded.

    Raises:
        UndefinedMeasure: Nowhere, or it is not in eval mode.
    """
    given = norm.arguments
    variance = names.get(id(given["running_var"]), "")
    if given["training"] or given["running_var"] is None:
        raise UndefinedMeasure("a BatchNorm uses the statistics of its batch, and has no fixed scale")
    weight = names.get(id(given["weight"]), "")
    (source,) = norm.made_from
    if source.is_layer and source.used_by == [norm]:
        return FoldedNorm(norm, weight, variance, source, ())
    behind = []
    left = list(norm.used_by)
    while left:
        call = left.pop()
        if call.is_layer:
            behind.append(call)
        elif call.is_homogeneous and call.used_by:
            left += call.used_by
        else:
            behind = []
            break
    if not behind:
        raise UndefinedMeasure(
            f"the BatchNorm {variance.rpartition('.')[0]} cannot be folded: it follows no layer alone, and "
            "its output does not go to layers alone"
        )
    return FoldedNorm(norm, weight, variance, None, tuple(behind))


def _fold(weight: Tensor, call: Call, scales: Iterable[tuple[FoldedNorm, Tensor]]) -> Tensor:
    """The weight of a layer with the scales that belong to it."""
    for norm, scale in scales:
        if norm.front is call:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        for _ in range(norm.behind.count(call)):
            groups = int(call.arguments.get("groups", 1))
            if weight.shape[1] * groups % len(scale):
                raise UndefinedMeasure(
                    f"the BatchNorm {norm.variance.rpartition('.')[0]} and the layer behind it do not fit"
                )
            columns = scale.abs().repeat_interleave(weight.shape[1] * groups // len(scale))
            rows = columns.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
            weight = weight * rows.view(*rows.shape, *[1] * (weight.dim() - 2))
    return weight


def _size(call: Call) -> tuple[int, ...]:
    """Spatial size of a convolution's input, before padding that is a call of its own."""
    if call.name == "linear":
        return ()
    (source,) = call.made_from
    return (source.made_from[0] if source.name == "pad" else source).shape[2:]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A setting of a convolution for each dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values
