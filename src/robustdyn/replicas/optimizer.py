"""Translates an optimiser of torch.optim into the update rule and the state with which replicas start."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustdyn.errors import ConfigError
from robustdyn.replicas.updates import AdamUpdate, MomentumUpdate, Update
from robustdyn.theory import adam_scale

InitialState = Literal["zero", "checkpoint"]
"""State of the optimiser's buffer: zero, or as it is at the point from which replicas start."""

_SETTLED = 10**6  # steps after which Adam has no bias left to correct


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Check that replicas support the optimiser's step; its state does not matter.

    Raises:
        ConfigError: They do not.
    """
    groups = optimizer.param_groups
    if type(optimizer) is torch.optim.SGD:
        if any(group["nesterov"] or group["dampening"] for group in groups):
            raise ConfigError(
                "optimizer: replicas support SGD without Nesterov or dampening; set "
                "nesterov=false, dampening=0"
            )
        shared = ["momentum"]
    elif type(optimizer) is torch.optim.Adam:
        if any(group["amsgrad"] or group["decoupled_weight_decay"] for group in groups):
            raise ConfigError(
                "optimizer: replicas support Adam without amsgrad or decoupled weight decay; turn both off"
            )
        shared = ["betas", "eps"]
    else:
        raise ConfigError(
            f"optimizer: replicas support SGD and Adam, not {type(optimizer).__name__}; choose sgd or adam"
        )
    if any(group["maximize"] for group in groups):
        raise ConfigError("optimizer: replicas only support minimisation; set maximize to false")
    for name in ("lr", *shared):
        if any(group[name] != groups[0][name] for group in groups):
            raise ConfigError(f"optimizer: replicas only support one {name} for all weights; choose one")


def weight_decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> float | Tensor:
    """ω, or (P,) in the order of the network's parameters if they decay differently.

    Raises:
        ConfigError: The optimiser does not hold all learned parameters of the network.
    """
    of = {id(p): float(group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    learned = [p for p in model.parameters() if p.requires_grad]
    if not all(id(p) in of for p in learned):
        raise ConfigError("optimizer: it does not hold all parameters of the network; give it those")
    if len({of[id(p)] for p in learned}) == 1:
        return of[id(learned[0])]
    return torch.cat([p.detach().new_full((p.numel(),), of[id(p)]) for p in learned])


def initial_buffer(
    optimizer: torch.optim.Optimizer, model: nn.Module, initial_state: InitialState
) -> Tensor | None:
    """The optimiser's v or m before the replicas' first step (P,); None for zero.

    Raises:
        ValueError: The optimiser's own is asked for, but it holds none.
    """
    momentum = optimizer.param_groups[0].get("momentum")
    if initial_state == "zero" or momentum == 0:  # without momentum there is no buffer
        return None
    name = "exp_avg" if momentum is None else "momentum_buffer"
    held = _held(optimizer, model, name)
    if held is None:
        raise ValueError(
            f"initial_state=checkpoint: the optimiser holds no {name}, the state of "
            f"{type(optimizer).__name__}; choose zero"
        )
    return held


def read_update(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    buffer: Tensor | None,
    frozen: bool,
    measured: Callable[[], Tensor],
) -> tuple[Update, Tensor | None]:
    """The optimiser's rule and, for Adam, the preconditioner d (P,) at the start.

    Args:
        optimizer: An optimiser that passes ``check_optimizer``.
        model: The network whose parameters it updates.
        buffer: From ``initial_buffer``.
        frozen: Whether to keep Adam's preconditioner fixed.
        measured: Called for Adam's second moment (P,) if the optimiser holds none.
    """
    options, decay = optimizer.param_groups[0], weight_decay(optimizer, model)
    if type(optimizer) is torch.optim.SGD:
        rule = MomentumUpdate(momentum=options["momentum"], weight_decay=decay, initial_buffer=buffer)
        return rule, None
    beta1, beta2 = options["betas"]
    second = _held(optimizer, model, "exp_avg_sq")
    if second is None:
        second, count = measured(), _SETTLED
        estimate = second
    else:
        count = int(optimizer.state[next(p for p in model.parameters() if p.requires_grad)]["step"])
        estimate = second / (1 - beta2**count)
    scale = adam_scale(estimate.double().cpu().numpy(), options["eps"])
    adam = AdamUpdate(
        beta1=beta1,
        beta2=beta2,
        epsilon=options["eps"],
        weight_decay=decay,
        initial_buffer=buffer,
        second_moment=estimate if frozen else second,
        initial_count=count,
        frozen=frozen,
    )
    return adam, torch.as_tensor(scale).to(estimate)


def held_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """All state tensors that the optimiser holds for the network's parameters, by parameter and name."""
    return {
        f"{parameter}.{name}": value
        for parameter, p in model.named_parameters()
        for name, value in sorted(_state(optimizer, p).items())
        if isinstance(value, Tensor)
    }


def _held(optimizer: torch.optim.Optimizer, model: nn.Module, name: str) -> Tensor | None:
    """One state tensor of all parameters, flattened to (P,); None unless all parameters have it."""
    found = [_state(optimizer, p).get(name) for p in model.parameters() if p.requires_grad]
    if not all(isinstance(value, Tensor) for value in found):
        return None
    return torch.cat([value.detach().contiguous().reshape(-1) for value in found if value is not None])


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = optimizer.state.get(parameter, {})
    return found
