"""Train/eval flags, BatchNorm statistics and what requires a gradient, as scopes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
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
