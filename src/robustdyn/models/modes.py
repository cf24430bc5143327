"""Train/eval flags, BatchNorm statistics and what requires a gradient, as scopes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every submodule in train or eval mode inside the scope; each one's own flag back afterwards.

    ``model.train(previous)`` would not do: it forgets submodules that were set one by one.
    """
    flags = [(module, module.training) for module in model.modules()]
    if all(flag == training for _, flag in flags):
        yield
        return
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm in train mode normalises with the batch inside the scope; its buffers are as before after it.

    The buffers are restored rather than protected, so that a compiled network does the same pass as outside.
    """
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in module.buffers(recurse=False)
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            # .data: autograd holds the buffers for the backward pass, which in train mode does not read them
            buffer.data.copy_(value)


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises with its running statistics inside the scope and does not update them.

    ``model.train()`` inside the scope does not reach these layers, because an attack with the statistics of
    the batch would otherwise update them.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    flags = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False
        layer.train = partial(_unchanged, layer)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            del layer.__dict__["train"]
            layer.training = flag


def _unchanged(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside the scope; each one's own flag back afterwards.

    An eager ``autograd.grad`` for the images alone skips the weights anyway. A compiled backward pass
    computes every gradient that is required.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
