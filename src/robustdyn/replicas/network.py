"""Computes several copies of one network, each with its own weights, in one pass.

Shapes: R replicas, P parameters, B examples a replica sees, K classes. θ of all replicas is one matrix (R,
P), each row in the order of ``model.named_parameters()``, as in ``robustdyn.curvature.EmpiricalRisk``.
"""

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from robustdyn.curvature.risk_function import call_with

Engine = Literal["vmapped", "looped"]
"""Whether replicas pass together (``torch.func.vmap``; convolutions become grouped ones) or one by one."""

_SLAB = 2**16  # parameters that are converted to float64 at a time


class StackedNetwork(nn.Module):
    """R copies of a network as one network, from images (R·B, ...) to outputs (R·B, K), replica by replica.

    Attacks, objectives and the scopes of ``robustdyn.models.modes`` can use it like an ordinary network. It
    holds a copy of ``model``. A pass uses the weights and running statistics that were last given to ``use``.
    BatchNorm in eval mode is computed as a scale and a shift, x·s + t, which takes a third of the time of
    PyTorch's own on a CPU and differs by rounding.

    Attributes:
        names: Names of the parameter tensors that require gradients, in the order of θ.
        numel: P.
        engine: How replicas are computed.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        """Copy the network.

        Args:
            model: From a batch to outputs (B, ...). All its floating parameters have one dtype and device.
            engine: How replicas are computed.

        Raises:
            ValueError: The engine is unknown, or parameters share memory.
        """
        super().__init__()
        if engine not in get_args(Engine):
            raise ValueError(f"engine must be {' or '.join(get_args(Engine))}, got {engine}")
        self.engine: Engine = engine
        self.base = _with_affine_norms(copy.deepcopy(model))
        learned = {name: p for name, p in self.base.named_parameters() if p.requires_grad}
        if len(learned) != sum(p.requires_grad for p in model.parameters()):
            raise ValueError("the network's parameters are not those of its copy: are some shared?")
        self.names = tuple(learned)
        self._shapes = [p.shape for p in learned.values()]
        self._sizes = [p.numel() for p in learned.values()]
        self.numel = sum(self._sizes)
        self._fixed = {n: p.detach() for n, p in self.base.named_parameters() if n not in learned}
        self._parameters_now: dict[str, Tensor] = {}
        self._buffers_now: dict[str, Tensor] = {}

    def theta(self) -> Tensor:
        """θ (P,) of the network that was copied."""
        present = dict(self.base.named_parameters())
        return torch.cat([present[name].detach().reshape(-1) for name in self.names])

    def statistics(self, replicas: int) -> dict[str, Tensor]:
        """The copied network's buffers, once for each replica: (R, ...) by name."""
        return {
            name: buffer.detach().expand(replicas, *buffer.shape).clone()
            for name, buffer in self.base.named_buffers()
        }

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views (R, ...) of a matrix (R, P), one per name."""
        parts = flat.split(self._sizes, dim=1)
        return [
            part.unflatten(1, shape) if shape else part.squeeze(1)
            for part, shape in zip(parts, self._shapes, strict=True)
        ]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        return torch.cat(
            [tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] for tensor in tensors], 1
        )

    def use(self, theta: Tensor, statistics: dict[str, Tensor], *, learn: bool = False) -> list[Tensor]:
        """Use these weights in the following passes.

        Args:
            theta: (R, P); views of it are used, so that later changes in place have an effect.
            statistics: From the method ``statistics``; BatchNorm in train mode updates them in place.
            learn: Whether gradients with respect to the weights will be needed.

        Returns:
            The leaves (R, ...), one per name, with respect to which gradients can be taken.
        """
        leaves = [part.detach().requires_grad_(learn) for part in self.split(theta)]
        self._parameters_now = dict(zip(self.names, leaves, strict=True))
        self._buffers_now = statistics
        return leaves

    def forward(self, inputs: Tensor) -> Tensor:
        """(R·B, ...) -> (R·B, ...), the first B rows by the first replica, and so on."""
        replicas = len(next(iter(self._parameters_now.values())))
        stacked = inputs.unflatten(0, (replicas, -1))
        if self.engine == "vmapped" and replicas > 1:
            outputs: Tensor = vmap(self._one)(self._parameters_now, self._buffers_now, stacked)
        else:
            outputs = torch.stack([self._nth(index, stacked[index]) for index in range(replicas)])
        return outputs.flatten(0, 1)

    def _nth(self, index: int, inputs: Tensor) -> Tensor:
        parameters = {name: value[index] for name, value in self._parameters_now.items()}
        return self._one(parameters, {n: value[index] for n, value in self._buffers_now.items()}, inputs)

    def _one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        everything = {**self._fixed, **parameters}
        outputs: Tensor = call_with(self.base, {**everything, **buffers}, inputs)
        return outputs


def project(rows: Tensor, directions: Tensor) -> NDArray[np.float64]:
    """Inner products of rows (R, P) with directions (P, k), summed in float64: (R, k)."""
    total = torch.zeros(len(rows), directions.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], _SLAB):
        slab = slice(start, start + _SLAB)
        total += rows[:, slab].double() @ directions[slab].double()
    return total.cpu().numpy()


class _AffineNorm(nn.Module):
    """BatchNorm under the same names; in eval mode s = w / √(running_var + ε), t = b − s · running_mean."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)
        self.eps, self.momentum = norm.eps, norm.momentum
        self.training = norm.training

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            assert self.momentum is not None
            return F.batch_norm(
                inputs,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=True,
                momentum=self.momentum,
                eps=self.eps,
            )
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = torch.addcmul(self.bias, self.running_mean, scale, value=-1)
        shape = (-1, *[1] * (inputs.dim() - 2))
        return torch.addcmul(shift.view(shape), inputs, scale.view(shape))


def _with_affine_norms(module: nn.Module) -> nn.Module:
    """Replace the BatchNorm layers that can be replaced; other kinds of BatchNorm stay as they are."""
    for name, child in module.named_children():
        plain = type(child) in (nn.BatchNorm1d, nn.BatchNorm2d)
        if plain and child.affine and child.track_running_stats and child.momentum is not None:
            setattr(module, name, _AffineNorm(child))  # type: ignore[arg-type]
        else:
            _with_affine_norms(child)
    return module
