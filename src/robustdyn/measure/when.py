"""Parses the setting that says after which epochs to measure."""

import re
from collections.abc import Sequence

from robustdyn.errors import ConfigError

EpochSpec = int | str | Sequence["int | str"]

_SYNTAX = "use 'every N', 'around decays N', 'last', epoch numbers, or a list of these"


def measured_epochs(
    spec: EpochSpec,
    *,
    max_epochs: int,
    decay_epochs: Sequence[int],
    key: str = "measure.epochs",
    always_last: bool = True,
) -> frozenset[int]:
    """The epochs after which to measure, counted from 0.

    ``every N`` is 0, N, 2N, ...; ``around decays N`` is every epoch from N before to N after the first epoch
    of each decay; ``last`` is the last epoch of the run; a list is the union of its items.

    Args:
        spec: The setting, in the syntax of ``measure.epochs``.
        max_epochs: Length of the run.
        decay_epochs: First epochs with a lower rate.
        key: The setting's key, for error messages.
        always_last: Whether the last epoch is always included, unless the spec is empty.

    Raises:
        ConfigError: A spec that cannot be read, or an epoch outside the run.
    """
    items = [spec] if isinstance(spec, int | str) else list(spec)
    if not items:
        return frozenset()
    chosen = {max_epochs - 1} if always_last else set()
    for item in items:
        chosen |= _one(item, max_epochs, decay_epochs, key)
    return frozenset(chosen)


def _one(item: int | str, max_epochs: int, decay_epochs: Sequence[int], key: str) -> set[int]:
    if isinstance(item, int) and not isinstance(item, bool):
        if not 0 <= item < max_epochs:
            raise ConfigError(f"{key}: epoch {item} is outside the run's epochs 0..{max_epochs - 1}")
        return {item}
    text = str(item).strip()
    if text == "last":
        return {max_epochs - 1}
    if match := re.fullmatch(r"every (\d+)", text):
        if int(match[1]) < 1:
            raise ConfigError(f"{key}: 'every N' needs N of at least 1")
        return set(range(0, max_epochs, int(match[1])))
    if match := re.fullmatch(r"around decays (\d+)", text):
        reach = int(match[1])
        around = {decay + shift for decay in decay_epochs for shift in range(-reach, reach + 1)}
        return around & set(range(max_epochs))
    raise ConfigError(f"{key}={item} cannot be read; {_SYNTAX}")
