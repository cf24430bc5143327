"""Computes the updates of SGD and Adam for many replicas at once, exactly as PyTorch does.

Shapes: R replicas, P parameters. Weight decay is PyTorch's, a term ω θ in the gradient, with one ω for all
parameters or one for each (P,). With one ω, the effective Hessian is H + ω I.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robustdyn.theory import MomentumDynamics

State = dict[str, Tensor]
"""Tensors (R, P) by name."""


class Update(Protocol):
    """An optimiser's rule."""

    @property
    def weight_decay(self) -> float | Tensor:
        """Its ω ≥ 0, a number or (P,)."""

    def begin(self, theta: Tensor) -> State:
        """The state before the first step of replicas at ``theta`` (R, P)."""

    def step(self, theta: Tensor, gradient: Tensor, state: State, learning_rate: float, count: int) -> None:
        """One step in place.

        Args:
            theta: (R, P), the weights at which the optimiser steps; perturbed weights, if it steps at these.
            gradient: (R, P) of the loss without weight decay; it may be overwritten.
            state: Changed in place.
            learning_rate: η of this step.
            count: Steps that this replica has taken before.
        """

    def buffer(self, state: State) -> Tensor:
        """The vector v (R, P): the part of the state that moves the weights."""

    def dynamics(self, learning_rate: float, *, decay_inside: bool) -> MomentumDynamics:
        """The rule as momentum SGD along ``robustdyn.replicas.Directions``.

        Args:
            learning_rate: η of a step.
            decay_inside: Whether the curvature already includes weight decay, so that ω is 0 here.

        Raises:
            ValueError: ω is not one number and ``decay_inside`` is false.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class MomentumUpdate:
    """v ← μ v + g + ω θ; θ ← θ − η v: ``torch.optim.SGD`` without Nesterov or dampening.

    Attributes:
        momentum: μ in [0, 1).
        weight_decay: ω ≥ 0, a number or (P,).
        initial_buffer: v before the first step (P,); None for zero.

    Raises:
        ValueError: A setting outside its range.
    """

    momentum: float
    weight_decay: float | Tensor
    initial_buffer: Tensor | None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")
        _check_decay(self.weight_decay)

    def begin(self, theta: Tensor) -> State:
        """See ``Update``."""
        return {"buffer": _start(self.initial_buffer, theta)}

    def step(self, theta: Tensor, gradient: Tensor, state: State, learning_rate: float, count: int) -> None:
        """See ``Update``. η only affects the weights, so that (θ, v) is continuous when η changes."""
        _add_decay(gradient, theta, self.weight_decay)
        state["buffer"].mul_(self.momentum).add_(gradient)
        theta.add_(state["buffer"], alpha=-learning_rate)

    def buffer(self, state: State) -> Tensor:
        """See ``Update``."""
        return state["buffer"]

    def dynamics(self, learning_rate: float, *, decay_inside: bool) -> MomentumDynamics:
        """See ``Update``: η, μ and ω without any change."""
        decay = _one_decay(self.weight_decay, decay_inside)
        return MomentumDynamics(learning_rate, self.momentum, decay)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamUpdate:
    """``torch.optim.Adam``, or with ``frozen`` the same with a fixed preconditioner D = diag(1/(√v̂ + ε)).

    Frozen, the update is m ← β₁ m + (1 − β₁)(g + ω θ); θ ← θ − η D m, without bias corrections. This is
    exactly momentum SGD in other coordinates (equation (27) of docs/theory.md). Comparing replicas with and
    without ``frozen`` shows how far Adam itself is from momentum SGD.

    Attributes:
        beta1: β₁ in [0, 1).
        beta2: β₂ in [0, 1).
        epsilon: ε ≥ 0.
        weight_decay: ω ≥ 0, a number or (P,).
        initial_buffer: m before the first step (P,); None for zero.
        second_moment: v before the first step (P,) ≥ 0, as PyTorch keeps it (v̂ = v / (1 − β₂^count)); None
            for zero.
        initial_count: Steps taken before the first one, for the bias corrections.
        frozen: Whether D is fixed at the value from ``second_moment``, which is then taken as v̂.

    Raises:
        ValueError: A setting is outside its range, or ``frozen`` is set without a second moment.
    """

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float | Tensor
    initial_buffer: Tensor | None
    second_moment: Tensor | None
    initial_count: int
    frozen: bool

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {beta}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be at least 0, got {self.epsilon}")
        if self.frozen and self.second_moment is None:
            raise ValueError("frozen needs a second_moment to hold")
        _check_decay(self.weight_decay)

    def begin(self, theta: Tensor) -> State:
        """See ``Update``."""
        return {
            "buffer": _start(self.initial_buffer, theta),
            "second": _start(self.second_moment, theta),
        }

    def step(self, theta: Tensor, gradient: Tensor, state: State, learning_rate: float, count: int) -> None:
        """See ``Update``."""
        _add_decay(gradient, theta, self.weight_decay)
        first, second = state["buffer"], state["second"]
        first.lerp_(gradient, 1 - self.beta1)
        if self.frozen:
            theta.addcdiv_(first, second.sqrt().add_(self.epsilon), value=-learning_rate)
            return
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        done = self.initial_count + count + 1
        root = (1 - self.beta2**done) ** 0.5
        scale = second.sqrt().div_(root).add_(self.epsilon)
        theta.addcdiv_(first, scale, value=-learning_rate / (1 - self.beta1**done))

    def buffer(self, state: State) -> Tensor:
        """See ``Update``: m."""
        return state["buffer"]

    def dynamics(self, learning_rate: float, *, decay_inside: bool) -> MomentumDynamics:
        """See ``Update``: η (1 − β₁) and β₁, equation (27) of docs/theory.md."""
        decay = _one_decay(self.weight_decay, decay_inside)
        return MomentumDynamics(learning_rate * (1 - self.beta1), self.beta1, decay)


def _one_decay(weight_decay: float | Tensor, inside: bool) -> float:
    if inside:
        return 0.0
    if isinstance(weight_decay, Tensor):
        raise ValueError("weight decay differs between parameters; put it into the curvature")
    return weight_decay


def _start(initial: Tensor | None, theta: Tensor) -> Tensor:
    return torch.zeros_like(theta) if initial is None else initial.to(theta).expand_as(theta).clone()


def _add_decay(gradient: Tensor, theta: Tensor, weight_decay: float | Tensor) -> None:
    if isinstance(weight_decay, Tensor):
        gradient.addcmul_(theta, weight_decay)
    elif weight_decay:
        gradient.add_(theta, alpha=weight_decay)


def _check_decay(weight_decay: float | Tensor) -> None:
    if not bool((torch.as_tensor(weight_decay) >= 0).all()):
        raise ValueError("weight_decay must be at least 0")
