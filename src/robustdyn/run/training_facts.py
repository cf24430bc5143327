"""What is known of the training that checkpoints are of: its learning rates, momentum, decay and steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from robustdyn.errors import ConfigError
from robustdyn.methods import OptimizerState
from robustdyn.records import read_table
from robustdyn.records.schema import EPOCHS
from robustdyn.run.checkpoint_series import Checkpoint
from robustdyn.run.config import FRACTION, NON_NEGATIVE, POSITIVE

_RULES = {"learning_rate": POSITIVE, "momentum": FRACTION, "weight_decay": NON_NEGATIVE}


@dataclass(frozen=True)
class Training:
    """The training that some checkpoints are of.

    Attributes:
        checkpoints: The checkpoints, in the order of their epochs.
        typed: ``learning_rate`` (a number, or rates by their first epoch), ``momentum`` and ``weight_decay``
            as they were typed; None where they were not.
        run_dir: The run directory, if it is a run of robustdyn.
        steps_per_epoch: Optimiser steps in an epoch.
    """

    checkpoints: Sequence[Checkpoint]
    typed: Mapping[str, Any]
    run_dir: Path | None
    steps_per_epoch: int

    @classmethod
    def of(
        cls, checkpoints: Sequence[Checkpoint], cfg: DictConfig, run_dir: Path | None, steps_per_epoch: int
    ) -> "Training":
        """Of the checkpoints that a command was given.

        Raises:
            ConfigError: A typed setting cannot be, or the typed rates begin after the first checkpoint.
        """
        typed = {name: _plain(cfg[name]) for name in _RULES}
        for name, rule in _RULES.items():
            values = typed[name].values() if isinstance(typed[name], dict) else [typed[name]]
            for value in values:
                if value is not None and not rule.holds(value):
                    raise ConfigError(f"{name}={typed[name]} {rule.requirement}")
        rates = typed["learning_rate"]
        if isinstance(rates, dict):
            if not rates or not all(isinstance(epoch, int) and epoch >= 0 for epoch in rates):
                raise ConfigError(f"learning_rate={rates} must name epochs, as in '{{0: 0.1, 100: 0.01}}'")
            if min(rates) > checkpoints[0].epoch:
                raise ConfigError(
                    f"learning_rate={rates} begins after epoch {checkpoints[0].epoch}, of "
                    f"{checkpoints[0].path.name}; give the rate from epoch 0"
                )
        return cls(checkpoints, typed, run_dir, steps_per_epoch)

    def step(self, checkpoint: Checkpoint) -> int:
        """Optimiser steps up to a checkpoint; epochs count from 0 where the file does not say."""
        if checkpoint.step is not None:
            return checkpoint.step
        return (checkpoint.epoch + 1) * self.steps_per_epoch

    def optimizer(self, checkpoint: Checkpoint) -> OptimizerState | None:
        """The optimiser's last step before a checkpoint; None if it is not known.

        Raises:
            ConfigError: Some settings are known and others are not.
        """
        group = checkpoint.groups[0] if checkpoint.groups else {}
        known = {
            "learning_rate": self._rate(checkpoint),
            "momentum": _first(self.typed["momentum"], group.get("momentum"), 0.0 if "lr" in group else None),
            "weight_decay": _first(self.typed["weight_decay"], group.get("weight_decay")),
        }
        values = {name: value for name, value in known.items() if value is not None}
        if not values:
            return None
        if missing := [name for name in known if name not in values]:
            raise ConfigError(
                f"{checkpoint.path} does not say the {' and '.join(missing)} of its training: give "
                + " ".join(f"{name}=..." for name in missing)
            )
        return OptimizerState(**values, plain=_plain_momentum(checkpoint.groups))

    def history(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows of the tables ``epochs`` and ``rates``, the latter only if every step's rate is known.

        They are the run's own up to the last checkpoint. Of another training there is a row for each epoch
        if the rates are known, else one for each checkpoint, without losses.
        """
        last = self.checkpoints[-1].epoch
        if self.run_dir is not None:
            tables = (read_table(self.run_dir, name) for name in ("epochs", "rates"))
            epochs, rates = (_rows(table[table["epoch"] <= last]) for table in tables)
            if epochs:
                return epochs, rates
        of_epoch = dict(self._known_rates())
        empty = dict.fromkeys(EPOCHS.required)
        measured = {checkpoint.epoch: self.step(checkpoint) for checkpoint in self.checkpoints}
        epochs = [
            empty
            | {
                "epoch": epoch,
                "step": measured.get(epoch, (epoch + 1) * self.steps_per_epoch),
                "lr": of_epoch.get(epoch),
            }
            for epoch in (range(last + 1) if of_epoch else measured)
        ]
        rates = [
            {"epoch": epoch, "step": epoch * self.steps_per_epoch, "lr": rate}
            for epoch, rate in of_epoch.items()
            if rate != of_epoch.get(epoch - 1)
        ]
        return epochs, rates

    def _rate(self, checkpoint: Checkpoint) -> float | None:
        """The rate of the last step before a checkpoint: what was typed, of the run, or of the file."""
        typed = self.typed["learning_rate"]
        if isinstance(typed, dict):
            return float(typed[max(epoch for epoch in typed if epoch <= checkpoint.epoch)])
        if typed is not None:
            return float(typed)
        if self.run_dir is not None and checkpoint.step is not None:
            # the schedule has already set the next step's rate in the file
            rates = read_table(self.run_dir, "rates")
            before = rates.loc[rates["step"] < checkpoint.step, "lr"]
            if len(before):
                return float(before.iloc[-1])
        return _number(checkpoint.groups[0].get("lr")) if checkpoint.groups else None

    def _known_rates(self) -> Iterator[tuple[int, float]]:
        """The rate of every epoch up to the last checkpoint; nothing if one of them is not known.

        Between two checkpoints with the same rate it is taken to have stayed the same.
        """
        typed, last = self.typed["learning_rate"], self.checkpoints[-1].epoch
        if typed is not None:
            rates = typed if isinstance(typed, dict) else {0: typed}
            starts = sorted(rates)
            for epoch in range(last + 1):
                yield epoch, float(rates[max([s for s in starts if s <= epoch], default=starts[0])])
            return
        found = [(checkpoint.epoch, self._rate(checkpoint)) for checkpoint in self.checkpoints]
        gaps = [b - a > 1 and before != after for (a, before), (b, after) in pairwise(found)]
        if found[0][0] > 1 or any(gaps) or any(rate is None for _, rate in found):
            return
        for epoch in range(last + 1):
            rate = next(rate for at, rate in found if at >= epoch)
            assert rate is not None
            yield epoch, rate


def _plain_momentum(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the groups are those of momentum SGD as in docs/theory.md, as far as they are known."""
    return all(
        "betas" not in group
        and "alpha" not in group  # RMSprop
        and not group.get("nesterov")
        and group.get("dampening", 0) == 0
        and group.get("weight_decay") == groups[0].get("weight_decay")
        for group in groups
    )


def _first(*values: object) -> float | None:
    numbers = (_number(value) for value in values)
    return next((number for number in numbers if number is not None), None)


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _plain(value: object) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]
