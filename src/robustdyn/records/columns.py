"""Describes the columns and tables of a run's records, and reads such descriptions from text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

Kind = Literal["int", "float", "str", "bool"]
Direction = Literal["lower", "higher"]

FRACTION, FRACTION_DIFFERENCE = "fraction", "difference of fractions"
_SHOWN_UNITS = {FRACTION: "%", FRACTION_DIFFERENCE: "percentage points"}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: The key in a record.
        kind: Type of its values; every column except a key column may also hold null.
        unit: Unit of the recorded number; empty for a pure number, a name or a flag.
        label: Short label for figures and for the tables that people read.
        meaning: One line that says what the number is.
        better: For a metric, which direction is better; ``None`` for everything else.
        required: Whether every row must have the key (its value may be null).
    """

    name: str
    kind: Kind
    unit: str
    label: str
    meaning: str
    better: Direction | None = None
    required: bool = True

    @property
    def scale(self) -> float:
        """Factor from the recorded number to the one that people read (100 for fractions)."""
        return 100.0 if self.unit in _SHOWN_UNITS else 1.0

    @property
    def shown_unit(self) -> str:
        """Unit of the number that people read."""
        return _SHOWN_UNITS.get(self.unit, self.unit)

    @property
    def shown(self) -> str:
        """Label with the unit that people read, for an axis or a table heading."""
        return f"{self.label} ({self.shown_unit})" if self.shown_unit else self.label


@dataclass(frozen=True)
class Table:
    """One table of a run: what a row is, which columns make it unique, and its columns in order."""

    name: str
    row: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]

    def __getitem__(self, name: str) -> Column:
        """The column called ``name``.

        Raises:
            KeyError: The table has no such column.
        """
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"table {self.name!r} has no column {name!r}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all columns, in order."""
        return tuple(column.name for column in self.columns)

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Names of the columns that every row must have."""
        return tuple(column.name for column in self.columns if column.required)


_SHARED = {
    "epoch": "epoch int | epoch | epoch the row belongs to, counted from 0",
    "step": "step int steps | step | optimiser steps taken when the row was written",
    "seconds": "seconds float s | wall time | wall time that the row took to compute",
}


def parse_table(text: str) -> Table:
    """Parse a table from text: ``name | row | key columns``, then one line for each column.

    A column is ``name kind unit | label | meaning``, or only a name from ``_SHARED``. Flags may follow:
    ``lower`` or ``higher`` says which is better, and ``optional`` that rows need not have it. For estimates
    from random vectors, ``s.e.`` and ``truncation`` add a column each. A line that is indented further
    continues the one above.
    """
    title, *lines = re.sub(r"\n +", " ", textwrap.dedent(text)).strip().splitlines()
    name, row, key = title.split(" | ")
    return Table(name, row, tuple(key.split()), tuple(column for line in lines for column in _columns(line)))


def _columns(line: str) -> Iterator[Column]:
    """The column that a line declares, then those for its standard error and truncation, if asked for."""
    head, *rest = line.split(" | ")
    head, label, meaning, *flags = [*_SHARED.get(head, head).split(" | "), *rest]
    name, kind, *unit = head.split(maxsplit=2)
    if kind not in get_args(Kind) or not {*flags} <= {*get_args(Direction), "optional", "s.e.", "truncation"}:
        raise ValueError(f"not a column: {line!r}")
    better = next((cast(Direction, flag) for flag in flags if flag in get_args(Direction)), None)
    required = "optional" not in flags
    yield Column(name, cast(Kind, kind), "".join(unit), label, meaning, better, required)
    if "s.e." in flags:
        said = f"standard error of {name} over random vectors"
        yield Column(f"{name}_se", "float", "", f"s.e. of {label}", said)
    if "truncation" in flags:
        said = f"relative change of {name} if half the Lanczos steps had been taken"
        yield Column(f"{name}_truncation", "float", "", f"truncation of {label}", said)
