"""BatchNorm with the statistics of the whole batch, on processes that each hold a part of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize(model: nn.Module) -> None:
    """From now on BatchNorm layers in train mode use the statistics of all examples on all processes.

    This is for devices on which ``torch.nn.SyncBatchNorm`` does not work: CPUs (PyTorch 2.13). The processes
    may hold different numbers of examples. Every pass in train mode, forward and backward, is collective. The
    layers keep their type, and eval mode does not change. It is written in differentiable steps, where
    PyTorch's is one fused kernel. It therefore has every derivative, and takes more time.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Every process takes the buffers of the first one, its running statistics. A collective call."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def desynchronize(model: nn.Module) -> None:
    """Undo ``synchronize``."""
    for module in _synchronized(model):
        del module.__dict__["forward"]


@contextmanager
def desynchronized(model: nn.Module) -> Iterator[None]:
    """Inside, the layers have no forward method of their own, with which layer traces cannot be exact."""
    modules = _synchronized(model)
    desynchronize(model)
    try:
        yield
    finally:
        for module in modules:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _synchronized(model: nn.Module) -> list[_BatchNorm]:
    layers = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [m for m in layers if getattr(vars(m).get("forward"), "func", None) is _forward]


def _forward(module: _BatchNorm, input: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C, ...), B examples of this process."""
    if not module.training:
        return type(module).forward(module, input)
    module._check_input_dim(input)
    x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
    over = [0, *range(2, x.dim())]
    own = x.new_full((1,), x.numel() // x.shape[1])
    sums = sum_over_processes(torch.cat([x.sum(over), own]))
    count = sums[-1].detach()  # values of a channel, on all processes
    mean = sums[:-1] / count
    # twice through the data and two reductions: in E[x²] − E[x]² the digits that both share are lost
    centred = x - _along(mean, x)
    variance = sum_over_processes(centred.square().sum(over)) / count
    _track(module, mean.detach(), (variance * count / (count - 1)).detach())
    scale = torch.rsqrt(variance + module.eps)
    out = centred * _along(scale if module.weight is None else scale * module.weight, x)
    if module.bias is not None:
        out = out + _along(module.bias, x)
    return out.to(input.dtype)


@torch.no_grad()
def _track(module: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    if module.running_mean is None or module.running_var is None or module.num_batches_tracked is None:
        return
    module.num_batches_tracked.add_(1)
    momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
    module.running_var.lerp_(variance.to(module.running_var.dtype), momentum)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Σ_r t_r, the same on every process; its gradient is the sum of all gradients. A collective call."""
    total: Tensor = _SumOverProcesses.apply(tensor)
    return total


class _SumOverProcesses(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)


def _along(values: Tensor, like: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
