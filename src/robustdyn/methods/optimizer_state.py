"""The settings of an optimiser, in the terms of momentum SGD too, and what sets its rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR


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


class Rates(LambdaLR):
    """Sets the rate of every step by a rule; a checkpoint restores the step, and no setting of the optimiser.

    Args:
        optimizer: Its settings are those that it has now.
        rule: From a step, counted from 0, to the factor of the rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rule: Callable[[int], float]) -> None:
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        super().__init__(optimizer, rule)

    def state_dict(self) -> dict[str, Any]:
        """That of ``LambdaLR``."""
        return {key: value for key, value in super().state_dict().items() if key != "_settings"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step; the optimiser's state must be restored before."""
        own = [settings["lr"] for settings in self._settings]
        super().load_state_dict(state_dict | {"base_lrs": own})
        for group, settings, base in zip(
            self.optimizer.param_groups, self._settings, state_dict["base_lrs"], strict=True
        ):
            # within an epoch the rate is kept until the next step
            rate = group["lr"] if settings["lr"] == base else group["lr"] * settings["lr"] / base
            group.update(settings | {"lr": rate})

    def set_rates(self, step: int) -> None:
        """Go to a step, and set its rates."""
        self.last_epoch = step
        for group, base, rule in zip(
            self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True
        ):
            group["lr"] = base * rule(step)
