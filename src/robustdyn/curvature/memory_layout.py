"""Where PyTorch's CPU kernels cannot be trusted with the channels innermost in memory (found with 2.13)."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_VECTOR = 8  # float32 numbers of an AVX2 register
_TWICE_DIFFERENTIABLE = (
    *(nn.Conv2d, nn.Linear, _BatchNorm, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity),
    *(nn.Dropout, nn.Dropout2d, nn.Sequential, nn.ModuleList, nn.ModuleDict),
)


def trains_channels_last(model: nn.Module) -> bool:
    """Whether forward and backward passes of ``model`` may run with the channels innermost.

    A strided convolution of 1x1 pixels and fewer than eight channels writes past the end of its weights'
    gradient on processors without AVX-512.
    """
    return not any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < _VECTOR
        for module in model.modules()
    )


def curves_channels_last(model: nn.Module) -> bool:
    """Whether second derivatives of ``model`` may be taken with the channels innermost.

    The second derivatives of ``GroupNorm`` read memory out of bounds, so only layers known to be safe are
    allowed.
    """
    return trains_channels_last(model) and all(
        isinstance(module, _TWICE_DIFFERENTIABLE) or not type(module).__module__.startswith("torch.nn.")
        for module in model.modules()
    )
