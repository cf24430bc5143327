"""Published curves that a run is held against: their band, and in which epochs a run lies within it.

Each reference is two files in ``references/``: NAME.csv with the numbers and NAME.yaml, which says where they
come from and which settings they were made with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from robustdyn.errors import ConfigError
from robustdyn.records import schema
from robustdyn.records.columns import Column, parse_table
from robustdyn.records.labels import flatten, format_value
from robustdyn.records.reader import Run
from robustdyn.records.untrusted import read_yaml
from robustdyn.report import style
from robustdyn.report.statistics import by_run

REFERENCES = Path(__file__).with_name("references")
PUBLISHED = "published:"
BAND = "reference"
_JUDGED = (schema.TEST_ROBUST_ERROR, schema.TEST_ROBUST_LOSS)

COMPARISON = parse_table("""
    reference | one quantity at one epoch | quantity epoch
    quantity str | quantity | the column of the table epochs that is compared
    epoch
    value float | value | the run's number
    centre float | reference | mean of the reference's runs
    low float | low end | low end of the reference's band
    high float | high end | high end of the reference's band
    within bool | within | whether the run's number lies in the band, its ends included
""")


@dataclass(frozen=True)
class Reference:
    """A published curve with its band.

    Attributes:
        name: What it is asked for by: ``published:cifar10_standard``.
        title: What was trained.
        source: Where the numbers come from.
        band: What the band is built from, how, and what may be expected of it.
        phases: First epoch of each phase of training; epochs are counted by phase.
        protocol: The settings that it was made with, by their dotted keys.
        bounds: ``quantity``, ``epoch``, ``centre``, ``low`` and ``high``; errors are fractions.
    """

    name: str
    title: str
    source: str
    band: str
    phases: tuple[int, ...]
    protocol: Mapping[str, object]
    bounds: pd.DataFrame

    def of(self, quantity: str, until: int) -> pd.DataFrame:
        """``epoch``, ``centre``, ``low`` and ``high`` of a column of the table ``epochs``, up to an epoch."""
        mine = (self.bounds["quantity"] == quantity) & (self.bounds["epoch"] <= until)
        return self.bounds[mine]

    def draw(self, ax: Axes, column: Column, line: str, until: int) -> None:
        """Draw a quantity's band in grey and a line at its centre, behind all else, if it has one."""
        rows = self.of(column.name, until)
        if rows.empty:
            return
        centre, low, high = (rows[end] * column.scale for end in ("centre", "low", "high"))
        look: dict[str, Any] = {"color": style.MARK, "linewidth": 0}
        ax.fill_between(rows["epoch"], low, high, alpha=style.BAND_ALPHA, zorder=0.8, label=BAND, **look)
        ax.plot(rows["epoch"], centre, color=style.MARK, linestyle=line, linewidth=0.9, zorder=0.9)

    def compare(self, epochs: pd.DataFrame) -> pd.DataFrame:
        """In which epochs runs lie within the band.

        Args:
            epochs: Rows of the table ``epochs`` with ``run`` and ``group``.

        Returns:
            ``run``, ``group`` and the columns of ``COMPARISON``: a row for each run, quantity and epoch that
            both the run and the reference have.
        """
        names = ["run", "group", *COMPARISON.names]
        parts = []
        for rows in by_run(epochs).values():
            for quantity, bounds in self.bounds.groupby("quantity", sort=False):
                own = rows[["run", "group", "epoch", quantity]].rename(columns={quantity: "value"})
                parts.append(own.dropna(subset=["value"]).merge(bounds, on="epoch"))
        rows = pd.concat(parts, ignore_index=True)
        rows["within"] = (rows["low"] <= rows["value"]) & (rows["value"] <= rows["high"])
        return rows[names]

    @property
    def spans(self) -> tuple[str, ...]:
        """The phases as text: ``0–99``."""
        ends = [*(start - 1 for start in self.phases[1:]), int(self.bounds["epoch"].max())]
        return tuple(f"{start}–{end}" for start, end in zip(self.phases, ends, strict=True))

    def standings(self, comparison: pd.DataFrame) -> list[Standing]:
        """One for each run and quantity of a comparison."""
        found = []
        for (run, quantity), rows in comparison.groupby(["run", "quantity"], sort=False):
            phase = np.searchsorted(self.phases, rows["epoch"], side="right") - 1
            parts = [rows["within"][phase == i] for i in range(len(self.phases))]
            found.append(
                Standing(
                    run=str(run),
                    quantity=schema.EPOCHS[str(quantity)].shown,
                    within=tuple(f"{part.sum()} of {len(part)}" if len(part) else "–" for part in parts),
                    above=spans(rows.loc[rows["value"] > rows["high"], "epoch"]),
                    below=spans(rows.loc[rows["value"] < rows["low"], "epoch"]),
                )
            )
        return found

    def differences(self, run: Run) -> Differences:
        """In which settings a run differs from the protocol, and which of them it did not record."""
        flat = flatten(run.config)
        changed, unknown = [], []
        for key, wanted in self.protocol.items():
            if key not in flat and wanted is not None:
                unknown.append(key)
            elif not _same(flat.get(key), wanted):
                changed.append(f"{key}={format_value(flat.get(key))} (reference: {format_value(wanted)})")
        root = str(flat.get("data.root", ""))
        if "jpeg" in Path(root).name.lower():  # experiments/cifar10_at/from_jpeg.py insists on such a name
            changed.append(f"data.root={root}, a lossy copy (reference: the official images)")
        return Differences(tuple(changed), tuple(unknown))


@dataclass(frozen=True)
class Differences:
    """What sets a run apart from a reference's protocol.

    Attributes:
        changed: ``attack.steps=20 (reference: 10)`` for each setting that differs.
        unknown: The settings that the run did not record.
    """

    changed: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Standing:
    """How one quantity of one run stands to the band.

    Attributes:
        run: Label of the run.
        quantity: Label of the quantity.
        within: In how many epochs of each phase it lies within the band: ``97 of 100``; a dash for none.
        above: The epochs above the band: ``3, 7–9``.
        below: The epochs below it.
    """

    run: str
    quantity: str
    within: tuple[str, ...]
    above: str
    below: str


@dataclass(frozen=True)
class Against:
    """Runs held against a reference.

    Attributes:
        reference: The reference.
        differences: What sets the runs apart from its protocol, with the labels of the runs it is true of.
        table: As ``Reference.compare`` returns it.
        standings: One for each run and quantity.
    """

    reference: Reference
    differences: tuple[tuple[str, Differences], ...]
    table: pd.DataFrame
    standings: tuple[Standing, ...]

    @classmethod
    def of(cls, reference: Reference, runs: Sequence[Run], epochs: pd.DataFrame) -> Against:
        """Hold runs against a reference; ``epochs`` is their table, with ``run`` and ``group``."""
        whose: dict[Differences, list[str]] = {}
        for run in runs:
            whose.setdefault(reference.differences(run), []).append(run.label)
        table = reference.compare(epochs)
        told = tuple((", ".join(labels), differing) for differing, labels in whose.items())
        return cls(reference, told, table, tuple(reference.standings(table)))

    @property
    def headline(self) -> tuple[str, ...]:
        """One line for a terminal, of a single run's test robust error and loss."""
        counts = {row.quantity: row.within for row in self.standings}
        if len(counts) < len(self.standings):
            return ()
        said = []
        for column in map(schema.EPOCHS.__getitem__, _JUDGED):
            phases = zip(counts.get(column.shown, ()), self.reference.spans, strict=False)
            parts = [f"{count} (epochs {span})" for count, span in phases if count != "–"]
            said += [f"{column.label} {', '.join(parts)}"] if parts else []
        return (f"{self.reference.name}, epochs within its band: {'; '.join(said)}",) if said else ()


def known_references() -> list[str]:
    """The names of all references."""
    return [PUBLISHED + path.stem for path in sorted(REFERENCES.glob("*.csv"))]


def load_reference(name: str) -> Reference:
    """The reference of this name.

    Raises:
        ConfigError: There is no such reference; the message lists those there are.
    """
    if name not in known_references():
        raise ConfigError(f"--reference {name}: not known; give one of: {', '.join(known_references())}")
    stem = REFERENCES / name.removeprefix(PUBLISHED)
    about: dict[str, Any] = read_yaml(stem.with_suffix(".yaml"))
    return Reference(
        name=name,
        title=about["title"],
        source=about["source"],
        band=about["band"],
        phases=tuple(about["phases"]),
        protocol=about["protocol"],
        bounds=pd.read_csv(stem.with_suffix(".csv")),
    )


def spans(epochs: Iterable[int]) -> str:
    """Ascending whole numbers as text: ``3, 7–9``."""
    numbers: Sequence[int] = [int(epoch) for epoch in epochs]
    runs = [
        [number for _, number in part]
        for _, part in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _same(given: object, wanted: object) -> bool:
    """Whether two settings are equal, as people write them."""
    return format_value(given) == format_value(wanted)
