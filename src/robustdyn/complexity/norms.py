"""Norms of the weights: Frobenius, distance from initialisation, path norm and Fisher–Rao norm.

W_l are the weight tensors of the convolutions and linear layers, l = 1 ... L, with the scale of BatchNorm
folded into them (``robustdyn.complexity.layers``); biases do not count. The sources fold BatchNorm as well,
into the layer in front of it. Only the Fisher–Rao norm takes the parameters as they are.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from robustdyn.complexity.layers import FoldedLayers, UndefinedMeasure, named_arguments
from robustdyn.complexity.network import (
    INVARIANCES,
    ComplexityMeasure,
    Invariance,
    MeasureValue,
    NetworkOnExamples,
)
from robustdyn.complexity.values import mean_over_examples
from robustdyn.curvature.gradient_covariance import gradient_projections


def frobenius_sum(network: NetworkOnExamples) -> MeasureValue:
    """Σ_l ‖W_l‖²_F (Jiang et al., ICLR 2020, equation 42: the parameter norm)."""
    return MeasureValue(value=sum(layer.frobenius_sq for layer in network.layers.each))


def frobenius_log_product(network: NetworkOnExamples) -> MeasureValue:
    """Σ_l ln ‖W_l‖²_F (Jiang et al., ICLR 2020, equation 37, whose value this is the logarithm of)."""
    return MeasureValue(value=log_sum([layer.frobenius_sq for layer in network.layers.each]))


def frobenius_distance(network: NetworkOnExamples) -> MeasureValue:
    """Σ_l ‖W_l − W_l⁰‖²_F, the distance from initialisation (Jiang et al., ICLR 2020, equation 40).

    BatchNorm is folded into the weights W_l⁰ before training, too, with the statistics that it had then, 0
    and 1.
    """
    return MeasureValue(value=sum(float(layer.change.square().sum()) for layer in network.layers.each))


def path_norm(network: NetworkOnExamples) -> MeasureValue:
    """Σ over all paths from an input to an output of Π w², the squared path norm.

    Source: Neyshabur, Tomioka & Srebro, COLT 2015; Jiang et al., ICLR 2020, equation 44. It is the sum of the
    outputs for an input of ones to the network with squared weights. Biases count, too, as weights of paths
    that begin at a unit of constant value 1. A BatchNorm x ↦ s x + t behind a layer is folded into weight and
    bias of that layer first; any other one is an edge of weight s and a bias t. Pooling is left as it is, and
    a constant normalisation of the input is left out.

    Raises:
        UndefinedMeasure: The network has other functions than ReLU, pooling and sums.
    """
    layers = network.layers
    for call in layers.calls:
        norm = call.name == "batch_norm"
        if not (call.is_layer or call.is_homogeneous or call.is_sum or call.sees_input or norm):
            raise UndefinedMeasure(f"the path norm is one of ReLU networks, and this network has {call.name}")
    with network.risk.guard(), torch.no_grad(), _Squared(layers):
        value = float(network.model(network.clean[:1].clone()).sum())
    return MeasureValue(value=value)


class _Squared(TorchFunctionMode):
    """Replaces layers by those with squared weights, and the input by ones."""

    def __init__(self, layers: FoldedLayers) -> None:
        super().__init__()
        self._layers = iter([call for call in layers.calls if call.is_layer])
        self._norms = iter(layers.norms)
        self._in_front = {id(norm.front): norm for norm in layers.norms if norm.front is not None}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").strip("_")
        given = named_arguments(name, args, kwargs)
        if not given:
            return function(*args, **kwargs)
        x: Tensor = given.pop("input").double()
        if name == "batch_norm":
            norm = next(self._norms)
            if all(call.sees_input for call in norm.call.made_from):
                x = torch.ones_like(x)
            if norm.front is not None:
                return x
            return x * _of_channels(norm.scale.square(), x) + _of_channels(norm.shift.square(), x)
        call = next(self._layers)
        if all(earlier.sees_input for earlier in call.made_from):
            x = torch.ones_like(x)
        weight, bias = given.pop("weight").double(), given.pop("bias", None)
        bias = None if bias is None else bias.double()
        if id(call) in self._in_front:
            norm = self._in_front[id(call)]
            scale = norm.scale
            bias = norm.shift if bias is None else norm.shift + scale * bias
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        return function(x, weight.square(), None if bias is None else bias.square(), **given)


def _of_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 2))


def fisher_rao(network: NetworkOnExamples) -> MeasureValue:
    """(1/m) Σ_i ⟨θ, ∇ℓ_i⟩², the squared Fisher–Rao norm (Liang et al., AISTATS 2019, definition 2).

    θ are all parameters, ℓ_i the cross-entropy of adversarial example i. For ReLU networks of L layers
    without biases ⟨θ, ∇ℓ_i⟩ = L ⟨f(x_i), ∂ℓ_i/∂f⟩ (their theorem 3.1), which other code computes; with
    biases, BatchNorm or skip connections only the definition is right. BatchNorm is not folded: its weights
    and biases belong to θ. Scaling a layer in front of it does not change the value.

    Cost: a gradient's graph and one product with it. The standard error is over examples.
    """
    along = gradient_projections(network.risk, network.risk.theta()[:, None])[:, 0]
    return mean_over_examples(along.double().square(), gradients=5 / 3)


def log_sum(values: list[float]) -> float:
    """Σ ln v; refuses zeros.

    Raises:
        UndefinedMeasure: A weight is zero.
    """
    if min(values) <= 0:
        raise UndefinedMeasure("all weights of a layer are zero, and the product has no logarithm")
    return sum(map(math.log, values))


_JIANG = "Jiang et al., ICLR 2020, eq."
_SCALE = frozenset[Invariance]({"batchnorm_scale"})

MEASURES: tuple[ComplexityMeasure, ...] = (
    ComplexityMeasure(
        name="frobenius_sum",
        label="Σ ‖W‖²_F",
        family="norm",
        source=f"{_JIANG} 42",
        function=frobenius_sum,
        invariances=_SCALE,
    ),
    ComplexityMeasure(
        name="frobenius_log_product",
        label="ln Π ‖W‖²_F",
        family="norm",
        source=f"{_JIANG} 37",
        function=frobenius_log_product,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="frobenius_distance",
        label="Σ ‖W − W⁰‖²_F",
        family="norm",
        source=f"{_JIANG} 40",
        function=frobenius_distance,
        needs_initial=True,
        invariances=_SCALE,
    ),
    ComplexityMeasure(
        name="path_norm",
        label="path norm",
        family="norm",
        source="Neyshabur et al., COLT 2015; " + _JIANG + " 44",
        function=path_norm,
        invariances=INVARIANCES,
    ),
    ComplexityMeasure(
        name="fisher_rao",
        label="Fisher–Rao norm",
        family="norm",
        source="Liang et al., AISTATS 2019, definition 2",
        function=fisher_rao,
        invariances=INVARIANCES,
    ),
)
