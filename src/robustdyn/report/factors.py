"""The factors of a report: the settings that tell its runs apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from robustdyn.records.labels import SEED, distinguishing, flatten, format_value
from robustdyn.records.reader import Run

_RESERVED = {"colour", "sort", "state"}  # what the address says beside the factors
_KEY = re.compile(r"(?:^|\s)[+~]*([A-Za-z_][\w./@-]*)=")


@dataclass(frozen=True)
class Factor:
    """A setting that tells runs apart.

    Attributes:
        key: Its key, of the configuration; unique.
        column: Its value in each run.
    """

    key: str
    column: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the address calls it: the key, unless that has another meaning there."""
        return f"config.{self.key}" if self.key in _RESERVED else self.key

    @property
    def values(self) -> tuple[str, ...]:
        """Its distinct values, in natural order."""
        return tuple(sorted(set(self.column), key=_natural))

    def settles(self, other: Factor) -> bool:
        """Whether its value is enough to know the other's, as that of a method its milestones."""
        return len(set(zip(self.column, other.column, strict=True))) == len(set(self.column))


def factors(runs: Sequence[Run], rows: Sequence[Run | str]) -> tuple[Factor, ...]:
    """The settings with several values, without those that another one settles; the seed comes last.

    Args:
        runs: The runs found.
        rows: The runs in the order of the columns; one that was never started by its overrides.
    """
    known = distinguishing(runs)
    named = [_overrides(row) if isinstance(row, str) else {} for row in rows]
    for key in dict.fromkeys(key for texts in named for key in texts):
        if key not in known:  # all runs that were started have the same value
            known[key] = [_setting(run, key) for run in runs]
    index = {run.path: i for i, run in enumerate(runs)}
    found = []
    for key in sorted(known, key=lambda key: key == SEED):
        column = tuple(
            texts.get(key, "?") if isinstance(row, str) else format_value(known[key][index[row.path]])
            for row, texts in zip(rows, named, strict=True)
        )
        if len(set(column)) > 1:
            found.append(Factor(key, column))
    return tuple(
        factor
        for i, factor in enumerate(found)
        if factor.key == SEED
        or not any(
            # where either settles the other, the first one stays
            other.key not in (SEED, factor.key)
            and other.settles(factor)
            and (j < i or not factor.settles(other))
            for j, other in enumerate(found)
        )
    )


def _overrides(text: str) -> dict[str, str]:
    """``{"method": "awp", "seed": "0"}`` of ``method=awp seed=0``, values as configurations show them."""
    marks = list(_KEY.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return {
        mark.group(1).partition("@")[0]: _as_shown(text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    }


def _as_shown(value: str) -> str:
    """A value typed, as configurations show it: ``[25,75]`` of ``[25, 75]``, ``0.001`` of ``1e-3``."""
    try:
        read = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
    except (YAMLError, OmegaConfBaseException):
        return value
    return format_value(read.get("value")) if isinstance(read, dict) else value


def _setting(run: Run, key: str) -> object:
    """A setting of a run: what was typed, picked, or configured."""
    typed = {name: value for text in run.overrides for name, value in _overrides(text).items()}
    return typed.get(key, run.choices.get(key, flatten(run.config).get(key)))


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key: numbers by size, before words; 2 before 10 within words."""
    try:
        return [(0, float(text), "")]
    except ValueError:
        parts = re.split(r"(\d+)", text)
        return [(1, float(part), "") if part.isdigit() else (2, 0.0, part) for part in parts]
