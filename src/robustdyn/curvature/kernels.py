"""Layers for curvature products: cheap to differentiate twice, in the requested precision.

PyTorch differentiates a convolution's backward pass by convolutions with kernels as large as images, and
BatchNorm on running statistics by a long chain of elementwise passes. Both have shorter forms. With these
and the channels-last layout a product through a kept graph takes 1.7 to 2.0 gradients' time instead of 2.3 to
2.6 (PreActResNet-18 of width 16 on a CPU; experiments/benchmarks/curvature_products.py).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Precision = Literal["full", "tf32", "bfloat16"]

_CONVOLUTIONS: dict[Callable[..., Any], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class TwiceDifferentiable(TorchFunctionMode):
    """While active, convolutions and BatchNorm on running statistics are recorded in their short forms.

    It is needed during the forward pass only. Calls it has no short form for pass through unchanged.
    Activation checkpointing recomputes outside of it: torch refuses that where a BatchNorm is recomputed.
    """

    def __init__(self, precision: Precision) -> None:
        """Choose the precision.

        Args:
            precision: With ``"bfloat16"`` convolutions and linear layers multiply numbers rounded to
                bfloat16, and nothing else changes. ``"tf32"`` changes torch's settings, and not the layers.
        """
        super().__init__()
        self._half = precision == "bfloat16"
        # Set while a backward pass needs derivatives by the loss's slopes only. Autograd cannot inform a
        # function that its other results, and the convolutions behind them, are not used.
        self.outputs_only = False

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in _CONVOLUTIONS:
            return self._convolution(function, *args, **kwargs)
        if function is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if function is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        if function is F.linear and self._half:
            return self._linear(*args, **kwargs)
        return function(*args, **kwargs)

    def _convolution(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        dims = _CONVOLUTIONS[function]
        margins = _margins(padding, weight, _each(dilation, dims), dims)
        if margins is None or input.dim() != dims + 2:
            return function(input, weight, bias, stride, padding, dilation, groups)
        if self._half:
            input, weight = input.bfloat16(), weight.bfloat16()
        settings = (_each(stride, dims), margins, _each(dilation, dims), groups)
        output: Tensor = _Convolution.apply(input, weight, settings, self)
        output = output.float() if self._half else output
        return output if bias is None else output + bias.view(1, -1, *[1] * dims)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(input.bfloat16(), weight.bfloat16()).float()
        return output if bias is None else output + bias


_Settings = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, settings: _Settings, kernels: TwiceDifferentiable) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.settings, ctx.kernels = settings, kernels
        return _convolve(x, w, settings)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return (
            *_ConvolutionBackward.apply(dy, x, w, ctx.settings, ctx.kernels, *ctx.needs_input_grad[:2]),
            None,
            None,
        )


class _ConvolutionBackward(torch.autograd.Function):
    """(dy, x, w) -> (dx, dw), both bilinear: their derivatives are convolutions of the same kind."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        w: Tensor,
        settings: _Settings,
        kernels: TwiceDifferentiable,
        wants_x: bool,
        wants_w: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, w)
        ctx.settings, ctx.kernels = settings, kernels
        return _convolve_backward(dy, x, w, settings, wants_x, wants_w)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        """U and v multiply dx and dw: they have the shapes of x and w."""
        dy, x, w = ctx.saved_tensors
        settings: _Settings = ctx.settings
        to_dy = None
        if ctx.needs_input_grad[0]:
            if u is not None:
                to_dy = _convolve(u, w, settings)
            if v is not None:
                other = _convolve(x, v, settings)
                to_dy = other if to_dy is None else to_dy + other
        if ctx.kernels.outputs_only:
            return to_dy, None, None, None, None, None, None
        to_x, to_w = _convolve_backward(
            dy,
            x if u is None else u,
            w if v is None else v,
            settings,
            v is not None and ctx.needs_input_grad[1],
            u is not None and ctx.needs_input_grad[2],
        )
        return to_dy, to_x, to_w, None, None, None, None


def _convolve(x: Tensor, w: Tensor, settings: _Settings) -> Tensor:
    stride, padding, dilation, groups = settings
    wide = (_summable(x), _summable(w))
    return torch.convolution(*wide, None, stride, padding, dilation, False, [0] * len(stride), groups).to(
        x.dtype
    )


def _convolve_backward(
    dy: Tensor, x: Tensor, w: Tensor, settings: _Settings, wants_x: bool, wants_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (wants_x or wants_w):
        return None, None
    stride, padding, dilation, groups = settings
    wide = (_summable(dy), _summable(x), _summable(w))
    wanted = [wants_x, wants_w, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        *wide, None, stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )
    return (None if dx is None else dx.to(x.dtype)), (None if dw is None else dw.to(w.dtype))


def _summable(tensor: Tensor) -> Tensor:
    """The tensor, in float32 if this processor would add up products of bfloat16 numbers in bfloat16."""
    half = tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu"
    return tensor.float() if half and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else tensor


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or input.dim() < 2:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return input * scale.view(shape) + shift.view(shape)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Of weight normalisation; PyTorch's own second derivative of it is wrong (2.13)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _each(value: int | Sequence[int], dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    return list(value) if len(value) == dims else list(value) * dims


def _margins(
    padding: str | int | Sequence[int], weight: Tensor, dilation: list[int], dims: int
) -> list[int] | None:
    """Zeros added on either side; None if both sides differ, which the short form does not support."""
    if not isinstance(padding, str):
        return _each(padding, dims)
    if padding == "valid":
        return [0] * dims
    reach = [gap * (taps - 1) for gap, taps in zip(dilation, weight.shape[2:], strict=True)]
    return None if any(r % 2 for r in reach) else [r // 2 for r in reach]
