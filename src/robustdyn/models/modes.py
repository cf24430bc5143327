"""Train/eval flags and BatchNorm statistics as scopes."""

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
    """BatchNorm in train mode normalises with the batch inside the scope, but leaves its buffers alone."""
    tracking = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and module.track_running_stats
    ]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
