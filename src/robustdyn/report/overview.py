"""The runs of a report side by side: one row each, with their factors, numbers and curves.

Everything here is text and plain numbers for the page; how it looks is the template's business.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from robustdyn.records import schema
from robustdyn.records.columns import Column
from robustdyn.records.command_line import at, command
from robustdyn.records.labels import SEED
from robustdyn.records.progress import STATES, RunState
from robustdyn.records.reader import Run
from robustdyn.records.run_directory import MULTIRUN, RunDirectory
from robustdyn.records.schema import ROBUST_LOSS_GAP, TEST_ROBUST_ERROR, TEST_ROBUST_LOSS
from robustdyn.records.untrusted import read_yaml
from robustdyn.report import style
from robustdyn.report.factors import Factor, factors
from robustdyn.report.plotting import MAX_MARKS
from robustdyn.report.reference import Reference
from robustdyn.report.statistics import (
    BEST_ON_TEST,
    FINAL,
    by_run,
    decay_epochs,
    format_metric,
    format_number,
)

PANELS = (  # table and column of the curves that the page draws itself
    ("epochs", TEST_ROBUST_ERROR),
    ("epochs", TEST_ROBUST_LOSS),
    ("epochs", ROBUST_LOSS_GAP),
    ("wci", "wci"),
)
NUMBERS = (  # selection and column of the epochs table, or WCI: the run table's numbers
    (BEST_ON_TEST, TEST_ROBUST_ERROR),
    (FINAL, TEST_ROBUST_ERROR),
    (FINAL, TEST_ROBUST_LOSS),
    (FINAL, ROBUST_LOSS_GAP),
)
MOST_COLOURS = len(style.PALETTE)  # values of a factor that colour curves without being asked
DIGITS = 5  # significant ones of a point on a curve: less than a pixel

_OTHER_SWEEP = ("hydra.sweep.dir=", "hydra.mode=", "hydra.callbacks.")


@dataclass(frozen=True)
class Cell:
    """A number of the run table: as read, as sorted by, and what to say beside it."""

    text: str
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Link:
    """A place beside the page: relative to it, and readable as an address."""

    text: str
    href: str


@dataclass(frozen=True)
class RunRow:
    """One run, started or not.

    Attributes:
        name: Its label; of a missing run its overrides.
        state: See ``robustdyn.records.progress``.
        remark: The error, or how far it has come.
        factors: Its value of each factor.
        numbers: See ``NUMBERS``; then the WCI.
        progress: How far it has come: ``3 of 40 epochs finished``.
        folder: Its directory; None if it is missing.
        links: What lies in it.
        command: Runs this one alone, if it is not done and was started once.
        run: The run; None if it is missing.
    """

    name: str
    state: str
    remark: str
    factors: tuple[str, ...]
    numbers: tuple[Cell, ...] = (Cell("–"),) * (len(NUMBERS) + 1)
    progress: str = ""
    folder: Link | None = None
    links: tuple[Link, ...] = ()
    command: str | None = None
    run: Run | None = None


@dataclass(frozen=True)
class Overview:
    """All runs of a report.

    Attributes:
        factors: What tells them apart.
        rows: One for each run: those of the states in their order, then all others.
        commands: One line for each sweep that has runs to do: does them all.
    """

    factors: tuple[Factor, ...]
    rows: tuple[RunRow, ...]
    commands: tuple[str, ...]

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the rows' numbers."""
        words = {BEST_ON_TEST: "best", FINAL: "final"}
        return (
            *(f"{words[selection]} {schema.EPOCHS[column].shown}" for selection, column in NUMBERS),
            f"last {schema.WCI['wci'].shown}",
        )

    @property
    def counts(self) -> dict[str, int]:
        """The states there are, and how many runs are in each."""
        numbers = Counter(row.state for row in self.rows)
        return {state: numbers[state] for state in STATES if numbers[state]}

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs that means are taken over: those that are done, for a failed one's last epoch is no end.

        All of them where none is done.
        """
        found = [(row.state, row.run) for row in self.rows if row.run is not None]
        return tuple(run for state, run in found if state == "done") or tuple(run for _, run in found)

    def size(self, factor: int, value: str) -> int:
        """How many runs have a value of a factor."""
        return sum(row.factors[factor] == value for row in self.rows)

    @property
    def undone(self) -> tuple[RunRow, ...]:
        """The rows that are not done."""
        return tuple(row for row in self.rows if row.state != "done")


# ---------------------------------------------------------------------- one row per run


def overview(
    runs: Sequence[Run],
    states: Sequence[RunState],
    frames: Mapping[str, pd.DataFrame],
    summary: pd.DataFrame,
    page: Path,
    sweeps: Iterable[Path] = (),
) -> Overview:
    """One row per run.

    Args:
        runs: The runs found.
        states: Where runs stand, missing ones included.
        frames: Tidy tables of the runs.
        summary: As ``robustdyn.report.statistics.final_and_best`` gives it.
        page: The page that links are relative to.
        sweeps: Directories that may be those of a sweep.
    """
    by_path = {run.path.resolve(): run for run in runs}
    stated = [
        (state, None if state.path is None else by_path.pop(state.path.resolve(), None)) for state in states
    ]
    stated += [(RunState(run.label, "unfinished", run=run), run) for run in by_path.values()]
    known = factors(runs, [state.name if run is None else run for state, run in stated])
    wci = by_run(frames["wci"].dropna(subset=["wci"]))
    best = {(facts["run"], facts["selection"]): facts for facts in summary.to_dict("records")}
    rows = tuple(
        _row(state, run, tuple(factor.column[i] for factor in known), wci, best, page)
        for i, (state, run) in enumerate(stated)
    )
    commands = [_sweep_command(path) for path in sweeps if any(row.state != "done" for row in rows)]
    return Overview(known, rows, tuple(filter(None, commands)))


def _row(
    state: RunState,
    run: Run | None,
    factors: tuple[str, ...],
    wci: Mapping[str, pd.DataFrame],
    best: Mapping[tuple[str, str], Mapping[Hashable, Any]],
    page: Path,
) -> RunRow:
    if run is None:
        return RunRow(state.name, state.state, state.remark, factors)
    measured = wci[run.label]
    last = None if measured.empty else measured.iloc[-1]
    # a failed run's remark is the error
    planned = "" if state.planned is None else f" of {state.planned}"
    come = f"{state.epochs}{planned} epochs finished" if state.state == "failed" else state.remark
    return RunRow(
        name=run.label,
        state=state.state,
        remark=state.remark,
        factors=factors,
        numbers=(
            *(_cell(best.get((run.label, selection)), schema.EPOCHS[name]) for selection, name in NUMBERS),
            _cell(last, schema.WCI["wci"]),
        ),
        progress=come,
        folder=link_to(run.path, page, "folder"),
        links=tuple(_links(run, page)),
        command=None if state.state == "done" else _run_command(run),
        run=run,
    )


def _cell(facts: Mapping[Any, Any] | pd.Series | None, column: Column) -> Cell:
    """A number of one epoch; a dash where there is none."""
    if facts is None or math.isnan(facts[column.name]):
        return Cell("–")
    value = float(facts[column.name])
    text = format_number(value) if column.name == "wci" else format_metric(column, value)
    return Cell(text, value * column.scale, f"epoch {int(facts['epoch'])}")


def _links(run: Run, page: Path) -> Iterable[Link]:
    """Its own page, log and traceback, where they are."""
    its = RunDirectory(run.path)
    files = {"report": its.report / "index.html", "traceback": its.traceback}
    logs = [path for path in (its.log, *sorted(run.path.glob("*.log"))) if path.is_file()]
    if logs:
        files["log"] = logs[0]
    for text, file in files.items():
        if file.is_file() and file.resolve() != page.resolve():
            yield link_to(file, page, text)


def link_to(target: Path, page: Path, text: str) -> Link:
    """A link from the page to a file or directory."""
    relative = os.path.relpath(target.resolve(), page.parent.resolve())
    href = quote(Path(relative).as_posix())
    # a first part with a colon would be read as a scheme
    return Link(text, f"./{href}/" if target.is_dir() else f"./{href}")


# ---------------------------------------------------------------------- what makes the missing ones


def _run_command(run: Run) -> str:
    """Does one run again, or what is left of it."""
    alone = any(text.startswith("experiment=") for text in run.overrides)  # which may ask for a sweep
    words = (*(["hydra.mode=RUN"] if alone else []), at("hydra.run.dir", run.path), *run.overrides)
    return command("robustdyn-train", *words)


def _sweep_command(folder: Path) -> str | None:
    """The command of a sweep, in the sweep's directory: does what is not done."""
    try:
        plain = read_yaml(folder / MULTIRUN)["hydra"]["overrides"]
        words = [str(text) for text in plain["task"]]
        hydra = [str(text) for text in plain["hydra"] if not str(text).startswith(_OTHER_SWEEP)]
    except (ValueError, KeyError, TypeError):
        return None
    return command("robustdyn-train", "-m", *words, *hydra, at("hydra.sweep.dir", folder))


# ---------------------------------------------------------------------- curves


def curves(
    overview: Overview, frames: Mapping[str, pd.DataFrame], reference: Reference | None = None
) -> dict[str, Any]:
    """What the page's script draws from; JSON can hold it.

    Returns:
        ``factors`` (key, name in the address, values, colours, dashes), ``rows`` of the table (name, state,
        factors, decays), ``colours`` and ``dashes`` of the rows, ``colour`` to start with, ``reference`` (its
        name or null), and ``panels``: title, unit, for each row its points ``[epochs, values]`` or null, and
        the band ``[epochs, centre, low, high]`` of the reference or null.
    """
    factors = [
        {"key": f.key, "name": f.name, "values": f.values, **_looks(len(f.values))} for f in overview.factors
    ]
    rows, epochs = [], by_run(frames["epochs"])
    for row in overview.rows:
        decays = [] if row.run is None else decay_epochs(epochs[row.run.label])
        decays = decays if len(decays) <= MAX_MARKS else []
        rows.append({"name": row.name, "state": row.state, "factors": row.factors, "decays": decays})
    colouring = [f.name for f in overview.factors if f.key != SEED and len(f.values) <= MOST_COLOURS]
    return {
        "factors": factors,
        "rows": rows,
        **_looks(len(rows)),
        "colour": colouring[0] if colouring else "",
        "reference": None if reference is None else reference.name,
        "panels": [
            panel
            for panel in (_panel(overview.rows, frames[t], schema.TABLES[t][c], reference) for t, c in PANELS)
            if any(points is not None for points in panel["points"])
        ],
    }


def _looks(n: int) -> dict[str, list[str]]:
    return {"colours": list(style.colours(n)), "dashes": list(style.dashes(n))}


def _panel(
    rows: Sequence[RunRow], frame: pd.DataFrame, column: Column, reference: Reference | None
) -> dict[str, Any]:
    points, band, recorded = [], None, by_run(frame)
    if reference is not None and not frame.empty:
        bounds = reference.of(column.name, int(frame["epoch"].max()))
        ends = ([_short(x * column.scale) for x in bounds[end]] for end in ("centre", "low", "high"))
        band = [[int(epoch) for epoch in bounds["epoch"]], *ends] if len(bounds) else None
    for row in rows:
        own = frame.head(0) if row.run is None else recorded[row.run.label]
        values = own[column.name].to_numpy(dtype=float) * column.scale
        finite = np.isfinite(values)  # JSON has no infinity
        shown = [_short(value) for value in values[finite]]
        points.append([own["epoch"].to_numpy()[finite].tolist(), shown] if shown else None)
    label = column.label[:1].upper() + column.label[1:]
    return {
        "name": column.name,
        "title": f"{label} ({column.shown_unit})" if column.shown_unit else label,
        "unit": column.shown_unit,
        "points": points,
        "band": band,
    }


def _short(value: float) -> float:
    """The number with as many digits as a curve shows."""
    return float(f"{value:.{DIGITS}g}")
