"""The settings of an optimiser in the terms of momentum SGD, and whether the theory's laws hold for it."""

from typing import NamedTuple

import torch


class OptimizerState(NamedTuple):
    """Settings of the optimiser's last step, in the terms of momentum SGD.

    ``plain``: whether the theory's laws hold for the step; see ``AdversarialTraining.plain_momentum``.
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    plain: bool = True


def is_plain_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is momentum SGD as in docs/theory.md: no Nesterov, no dampening, one decay for all."""
    return type(optimizer) is torch.optim.SGD and all(
        not group["nesterov"]
        and not group["maximize"]
        and group["dampening"] == 0
        and group["weight_decay"] == optimizer.param_groups[0]["weight_decay"]
        for group in optimizer.param_groups
    )


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The optimiser's present settings; an optimiser without momentum or weight decay has 0 there."""
    group = optimizer.param_groups[0]
    one_rate = all(other["lr"] == group["lr"] for other in optimizer.param_groups)
    return OptimizerState(
        float(group["lr"]),
        float(group.get("momentum", 0.0)),
        float(group.get("weight_decay", 0.0)),
        is_plain_momentum(optimizer) and one_rate,
    )
