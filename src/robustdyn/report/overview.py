"""The runs of a report side by side: one row each, their factors, curves, evaluations and times.

Everything here is text and plain numbers for the page; how it looks is the template's business.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from robustdyn.records import schema
from robustdyn.records.command_line import at, command
from robustdyn.records.files import read_object
from robustdyn.records.labels import SEED, distinguishing, flatten, format_value
from robustdyn.records.lines import parse_lines
from robustdyn.records.progress import STATES, RunState
from robustdyn.records.reader import Run
from robustdyn.records.run_directory import MULTIRUN, RunDirectory
from robustdyn.records.untrusted import read_yaml
from robustdyn.report import style
from robustdyn.report.describe import environment
from robustdyn.report.plotting import MAX_MARKS
from robustdyn.report.statistics import (
    BEST_ON_TEST,
    FINAL,
    decay_epochs,
    format_number,
    of_run,
)

WORST_CASE = "worst_case"
PANELS = (  # table and column of the curves that the page draws itself
    ("epochs", "test_robust_error"),
    ("epochs", "test_robust_loss"),
    ("epochs", "robust_loss_gap"),
    ("wci", "wci"),
)
NUMBERS = (  # selection and column of the epochs table, or WCI: the run table's numbers
    (BEST_ON_TEST, "test_robust_error"),
    (FINAL, "test_robust_error"),
    (FINAL, "test_robust_loss"),
    (FINAL, "robust_loss_gap"),
)
MOST_COLOURS = len(style.PALETTE)  # values of a factor that colour curves without being asked
DIGITS = 5  # significant ones of a point on a curve: less than a pixel

_RESERVED = {"colour", "sort", "state"}  # what the address says beside the factors
_KEY = re.compile(r"(?:^|\s)[+~]*([A-Za-z_][\w./@-]*)=")
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
        progress: How far it has come: ``3 of 40 epochs finished``.
        factors: Its value of each factor.
        numbers: See ``NUMBERS``; then the WCI.
        folder: Its directory; None if it is missing.
        links: What lies in it.
        command: Runs this one alone, if it is not done and was started once.
        run: The run; None if it is missing.
    """

    name: str
    state: str
    remark: str
    progress: str
    factors: tuple[str, ...]
    numbers: tuple[Cell, ...]
    folder: Link | None
    links: tuple[Link, ...]
    command: str | None
    run: Run | None


@dataclass(frozen=True)
class Factor:
    """A setting that tells runs apart.

    Attributes:
        key: Its key, of the configuration; unique.
        name: What the address calls it: the key, unless that has another meaning there.
        values: Its distinct values, in natural order.
    """

    key: str
    name: str
    values: tuple[str, ...]


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


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a checkpoint.

    Attributes:
        run: Label of the run.
        link: Its directory, which is called after the checkpoint.
        on: Examples and split.
        ball: The threat model.
        accuracies: Attack -> ``81.11 ± 1.68``; empty as long as there is no result.
        warnings: Signs that robustness may be overstated.
    """

    run: str
    link: Link
    on: str
    ball: str
    accuracies: Mapping[str, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Evaluations:
    """All evaluations of the runs' checkpoints.

    Attributes:
        each: One for each checkpoint.
        attacks: Name and heading of all attacks; those that an ensemble consists of are left out.
        table: Their rows, tidy, with ``run``, ``group`` and ``checkpoint``.
    """

    each: tuple[Evaluation, ...]
    attacks: Mapping[str, str]
    table: pd.DataFrame


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
    stated += [(RunState(run.label, "unfinished", path=run.path), run) for run in by_path.values()]
    values = _factor_values(runs, stated)
    rows = tuple(
        _row(state, run, tuple(column[i] for column in values.values()), frames, summary, page)
        for i, (state, run) in enumerate(stated)
    )
    factors = tuple(
        Factor(key, f"config.{key}" if key in _RESERVED else key, tuple(sorted(set(column), key=_natural)))
        for key, column in values.items()
    )
    unfinished = any(row.state != "done" for row in rows)
    commands = [_sweep_command(path) for path in sweeps] if unfinished else []
    return Overview(factors, rows, tuple(command for command in commands if command))


def _factor_values(
    runs: Sequence[Run], stated: Sequence[tuple[RunState, Run | None]]
) -> dict[str, list[str]]:
    """Setting -> its value in each row; of runs that were never started, what their name says."""
    known = distinguishing(runs)
    named = [_overrides([state.name]) if run is None else {} for state, run in stated]
    for key in dict.fromkeys(key for texts in named for key in texts):
        if key not in known:  # all runs that were started have the same value
            known[key] = [_setting(run, key) for run in runs]
    keys = sorted(known, key=lambda key: key == SEED)
    index = {run.path: i for i, run in enumerate(runs)}
    table: dict[str, list[str]] = {}
    for key in keys:
        column = [
            texts.get(key, "?") if run is None else format_value(known[key][index[run.path]])
            for (_, run), texts in zip(stated, named, strict=True)
        ]
        if len(set(column)) > 1:
            table[key] = column
    return {key: column for key, column in table.items() if not _said_by_another(key, table)}


def _said_by_another(key: str, table: Mapping[str, Sequence[str]]) -> bool:
    """Whether another setting's value settles this one's, as a method its milestones; never the seed's."""
    for other, column in table.items():
        if other in (key, SEED) or key == SEED:
            continue
        pairs = len(set(zip(column, table[key], strict=True)))
        values, own = len(set(column)), len(set(table[key]))
        # where either settles the other, the first one stays
        if pairs == values and (own < values or list(table).index(other) < list(table).index(key)):
            return True
    return False


def _overrides(texts: Iterable[str]) -> dict[str, str]:
    """``{"method": "awp", "seed": "0"}`` of ``method=awp seed=0``, values as configurations show them."""
    found = {}
    for text in texts:
        marks = list(_KEY.finditer(text))
        for mark, after in zip(marks, [*marks[1:], None], strict=True):
            value = text[mark.end() : after.start() if after else None].strip()
            found[mark.group(1).partition("@")[0]] = _as_shown(value)
    return found


def _as_shown(value: str) -> str:
    """A value typed, as configurations show it: ``[25,75]`` of ``[25, 75]``, ``0.001`` of ``1e-3``."""
    try:
        read = OmegaConf.to_container(OmegaConf.create(f"value: {value}"), resolve=False)
    except (YAMLError, OmegaConfBaseException):
        return value
    return format_value(read.get("value")) if isinstance(read, dict) else value


def _setting(run: Run, key: str) -> object:
    """A setting of a run: what was typed, picked, or configured."""
    typed = _overrides(run.overrides)
    return typed.get(key, run.choices.get(key, flatten(run.config).get(key)))


def _row(
    state: RunState,
    run: Run | None,
    factors: tuple[str, ...],
    frames: Mapping[str, pd.DataFrame],
    summary: pd.DataFrame,
    page: Path,
) -> RunRow:
    if run is None:
        empty = (Cell("–"),) * (len(NUMBERS) + 1)
        return RunRow(state.name, state.state, state.remark, "", factors, empty, None, (), None, None)
    own = {
        str(facts["selection"]): {str(key): value for key, value in facts.items()}
        for facts in summary[summary["run"] == run.label].to_dict("records")
    }
    numbers = [_metric(own, selection, column) for selection, column in NUMBERS]
    measured = of_run(frames["wci"], run.label).dropna(subset=["wci"])
    if measured.empty:
        numbers.append(Cell("–"))
    else:
        last = measured.iloc[-1]
        wci = float(last["wci"])
        numbers.append(Cell(format_number(wci), wci, f"epoch {int(last['epoch'])}"))
    return RunRow(
        name=run.label,
        state=state.state,
        remark=state.remark,
        progress=_finished(state) if state.state == "failed" else state.remark,
        factors=factors,
        numbers=tuple(numbers),
        folder=_link("folder", run.path, page),
        links=tuple(_links(run, page)),
        command=None if state.state == "done" else _run_command(run),
        run=run,
    )


def _finished(state: RunState) -> str:
    """How far a failed run came: its remark is the error."""
    return f"{state.epochs}{'' if state.planned is None else f' of {state.planned}'} epochs finished"


def _metric(own: Mapping[str, Mapping[str, Any]], selection: str, name: str) -> Cell:
    column = schema.EPOCHS[name]
    facts = own.get(selection)
    if facts is None or math.isnan(facts[name]):
        return Cell("–")
    value = float(facts[name]) * column.scale
    text = f"{value:.2f}" if column.scale > 1 else f"{value:.3f}"
    return Cell(text, value, f"epoch {facts['epoch']}")


def _links(run: Run, page: Path) -> Iterable[Link]:
    """Its own page, log and traceback, where they are."""
    its = RunDirectory(run.path)
    files = {"report": its.report / "index.html", "traceback": its.traceback}
    logs = [path for path in (its.log, *sorted(run.path.glob("*.log"))) if path.is_file()]
    if logs:
        files["log"] = logs[0]
    for text, file in files.items():
        if file.is_file() and file.resolve() != page.resolve():
            yield _link(text, file, page)


def _link(text: str, target: Path, page: Path) -> Link:
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


def curves(overview: Overview, frames: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What the page's script draws from; JSON can hold it.

    Returns:
        ``factors`` (key, name in the address, values, colours), ``rows`` of the table (name, state, factors,
        decays), ``colours`` of the rows, ``colour`` to start with, and ``panels``: title, unit, and for each
        row its points ``[epochs, values]`` or null.
    """
    factors = [
        {"key": f.key, "name": f.name, "values": f.values, "colours": list(style.colours(len(f.values)))}
        for f in overview.factors
    ]
    rows = []
    for row in overview.rows:
        decays = decay_epochs(of_run(frames["epochs"], row.run.label)) if row.run is not None else []
        decays = decays if len(decays) <= MAX_MARKS else []
        rows.append({"name": row.name, "state": row.state, "factors": row.factors, "decays": decays})
    colouring = [f.name for f in overview.factors if f.key != SEED and len(f.values) <= MOST_COLOURS]
    return {
        "factors": factors,
        "rows": rows,
        "colours": list(style.colours(len(rows))),
        "colour": colouring[0] if colouring else "",
        "panels": [
            panel
            for panel in (_panel(overview.rows, frames[t], schema.TABLES[t][c]) for t, c in PANELS)
            if any(points is not None for points in panel["points"])
        ],
    }


def _panel(rows: Sequence[RunRow], frame: pd.DataFrame, column: schema.Column) -> dict[str, Any]:
    points = []
    for row in rows:
        own = frame.head(0) if row.run is None else of_run(frame, row.run.label)
        own = own[(own[column.name] * column.scale).abs() < math.inf]  # JSON has no infinity
        values = [float(f"{value * column.scale:.{DIGITS}g}") for value in own[column.name]]
        points.append([[int(epoch) for epoch in own["epoch"]], values] if values else None)
    label = column.label[:1].upper() + column.label[1:]
    return {
        "name": column.name,
        "title": f"{label} ({column.shown_unit})" if column.shown_unit else label,
        "unit": column.shown_unit,
        "points": points,
    }


# ---------------------------------------------------------------------- evaluations


def evaluations(runs: Sequence[Run], page: Path) -> Evaluations:
    """What ``robustdyn-evaluate`` recorded in the runs' directories.

    Raises:
        RecordError: A record is broken.
    """
    found, frames = [], []
    attacks: dict[str, str] = {}
    for run in runs:
        for folder in sorted(RunDirectory(run.path).evaluations.glob("*/")):
            settings = read_object(RunDirectory(folder).settings)
            if not settings:
                continue
            rows = _recorded(folder, schema.EVALUATION)
            checks = _outside_the_ball(settings)
            for name in _whole(rows)["evaluator"]:
                attacks[name] = f"{name} (a check: should be 0)" if name in checks else name
            found.append(_evaluation(run, folder, settings, _whole(rows), page))
            heads = {"run": run.label, "group": run.group, "checkpoint": folder.name}
            frames.append(rows.assign(**heads)[[*heads, *rows.columns]])
    filled = [frame for frame in frames if not frame.empty]
    return Evaluations(
        tuple(found),
        # checks, which say nothing about robustness, behind all others
        dict(sorted(attacks.items(), key=lambda item: (item[0] != item[1], item[0] == WORST_CASE))),
        pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(),
    )


def _recorded(folder: Path, table: schema.Table) -> pd.DataFrame:
    """A table of an evaluation, which has no epochs; without a last line that a killed process left half."""
    remedy = "evaluate again into another directory, and delete this one"
    path = RunDirectory(folder).table(table.name)
    rows = parse_lines(path, warn=False, epochs=False, remedy=remedy)
    return pd.DataFrame(rows, columns=list(table.names))


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Without the attacks that an ensemble consists of."""
    return rows[~rows["evaluator"].astype(str).str.contains("/")]


def _evaluation(
    run: Run, folder: Path, settings: Mapping[str, Any], rows: pd.DataFrame, page: Path
) -> Evaluation:
    about = settings.get("evaluation", {})
    scale = schema.EVALUATION["accuracy"].scale
    found = zip(rows["evaluator"], rows["accuracy"] * scale, rows["accuracy_se"] * scale, strict=True)
    told = _recorded(folder, schema.WARNINGS)
    return Evaluation(
        run=run.label,
        link=_link(folder.name, folder, page),
        on=f"{about.get('evaluation.examples', '?')} {about.get('evaluation.split', '')}".strip(),
        ball=f"{about.get('attack.norm', '?')}, {format_value(about.get('attack.eps_255', '?'))}/255",
        accuracies={name: f"{accuracy:.2f} ± {error:.2f}" for name, accuracy, error in found},
        warnings=tuple(
            f"{attack}: {message} [{check}]"
            for attack, message, check in zip(told["evaluator"], told["message"], told["check"], strict=True)
        ),
    )


def _outside_the_ball(settings: Mapping[str, Any]) -> set[str]:
    """Names of the attacks that are checks, not of the threat model."""
    evaluators = settings.get("evaluators", {})
    attacks = [item for one in evaluators.values() for item in one.get("attacks", {}).items()]
    return {name for name, about in attacks if about.get("in_ball") is False}


# ---------------------------------------------------------------------- times


def times(runs: Sequence[Run], timing: pd.DataFrame) -> list[tuple[str, tuple[Cell, ...]]]:
    """Label and cells of each run that recorded its times: device, epochs, time, speed, and shares.

    The speed is the median over epochs, so that a first one that compiles says little; shares are of the time
    of all epochs together.
    """
    rows = []
    for run in runs:
        own = of_run(timing, run.label)
        if own.empty:
            continue
        seconds = own["seconds"].sum()
        speed = float(own["images_per_second"].median())
        shares = [
            float((own[f"{part}_share"] * own["seconds"]).sum() / seconds) if seconds > 0 else float("nan")
            for part in schema.TIMED
        ]
        rows.append(
            (
                run.label,
                (
                    Cell(_device(run)),
                    Cell(str(len(own)), float(len(own))),
                    Cell(duration(float(seconds)), float(seconds)),
                    Cell("–") if pd.isna(speed) else Cell(f"{speed:,.0f}", speed),
                    *(Cell("–") if pd.isna(s) else Cell(f"{100 * s:.1f}", 100 * s) for s in shares),
                ),
            )
        )
    return rows


TIMES = (
    "device",
    "epochs",
    "wall time",
    f"speed ({schema.TIMING['images_per_second'].unit})",
    *(f"{part} (%)" for part in schema.TIMED),
)
"""Headings of the cells of ``times``."""


def _device(run: Run) -> str:
    facts = environment(run)
    device = facts.get("device", "?")
    name = facts.get("processor", device) if device == "cpu" else device
    several = facts.get("devices", "1")
    return name if several == "1" else f"{several} × {name}"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``26 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key: numbers by size, before words; 2 before 10 within words."""
    try:
        return [(0, float(text), "")]
    except ValueError:
        parts = re.split(r"(\d+)", text)
        return [(1, float(part), "") if part.isdigit() else (2, 0.0, part) for part in parts]
