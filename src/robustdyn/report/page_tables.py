"""Tables of the page: complexity measures, evaluations of checkpoints, and the time that training took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from robustdyn.records import schema
from robustdyn.records.columns import Table
from robustdyn.records.files import read_object
from robustdyn.records.labels import format_value
from robustdyn.records.lines import parse_lines
from robustdyn.records.reader import Run
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import ACCURACY_SE
from robustdyn.report.describe import environment
from robustdyn.report.overview import Cell, Link, link_to
from robustdyn.report.statistics import by_run

WORST_CASE = "worst_case"
TIMES = (
    "device",
    "epochs",
    "wall time",
    f"speed ({schema.TIMING['images_per_second'].unit})",
    schema.TIMING["model_flop_utilisation"].shown,
    *(f"{part} (%)" for part in schema.TIMED),
)
"""Headings of the cells of ``times``."""


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
            whole = rows[~rows["evaluator"].astype(str).str.contains("/")]  # without parts of an ensemble
            checks = _outside_the_ball(settings)
            for name in whole["evaluator"]:
                attacks[name] = f"{name} (a check: should be 0)" if name in checks else name
            found.append(_evaluation(run, folder, settings, whole, page))
            heads = {"run": run.label, "group": run.group, "checkpoint": folder.name}
            if not rows.empty:
                frames.append(rows.assign(**heads)[[*heads, *rows.columns]])
    return Evaluations(
        tuple(found),
        # checks, which say nothing about robustness, come last
        dict(sorted(attacks.items(), key=lambda item: (item[0] != item[1], item[0] == WORST_CASE))),
        pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(),
    )


def _recorded(folder: Path, table: Table) -> pd.DataFrame:
    """A table of an evaluation, which has no epochs, without a last line that a killed process left half."""
    remedy = "evaluate again into another directory, and delete this one"
    path = RunDirectory(folder).table(table.name)
    rows = parse_lines(path, warn=False, epochs=False, remedy=remedy)
    return pd.DataFrame(rows, columns=list(table.names))


def _evaluation(
    run: Run, folder: Path, settings: Mapping[str, Any], rows: pd.DataFrame, page: Path
) -> Evaluation:
    about = settings.get("evaluation", {})
    scale = schema.EVALUATION["accuracy"].scale
    found = zip(rows["evaluator"], rows["accuracy"] * scale, rows[ACCURACY_SE] * scale, strict=True)
    told = _recorded(folder, schema.WARNINGS)[["evaluator", "message", "check"]]
    return Evaluation(
        run=run.label,
        link=link_to(folder, page, folder.name),
        on=f"{about.get('evaluation.examples', '?')} {about.get('evaluation.split', '')}".strip(),
        ball=f"{about.get('attack.norm', '?')}, {format_value(about.get('attack.eps_255', '?'))}/255",
        accuracies={name: f"{accuracy:.2f} ± {error:.2f}" for name, accuracy, error in found},
        warnings=tuple(f"{attack}: {message} [{check}]" for attack, message, check in told.to_numpy()),
    )


def _outside_the_ball(settings: Mapping[str, Any]) -> set[str]:
    """Names of the attacks that are checks, not of the threat model."""
    evaluators = settings.get("evaluators", {}).values()
    attacks = [item for one in evaluators for item in one.get("attacks", {}).items()]
    return {name for name, about in attacks if about.get("in_ball") is False}


def last_measures(
    runs: Sequence[Run], measures: pd.DataFrame
) -> tuple[tuple[str, ...], list[tuple[str, tuple[str, ...]]]]:
    """Complexity measures of each run's last measured epoch.

    Returns:
        The runs with their epochs, and for each measure the values, ``1.234 ± 0.05``, of all of them.
    """
    heads, columns, recorded = [], [], by_run(measures)
    for run in runs:
        own = recorded[run.label]
        if not own.empty:
            last = own[own["epoch"] == own["epoch"].max()]
            heads.append(f"{run.label}, epoch {int(last['epoch'].iloc[0])}")
            values = zip(last["measure"], last["value"], last["value_se"], strict=True)
            columns.append({name: _with_error(value, error) for name, value, error in values})
    names = dict.fromkeys(name for column in columns for name in column)
    return tuple(heads), [(name, tuple(column.get(name, "–") for column in columns)) for name in names]


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.4g}" if math.isnan(error) else f"{value:.4g} ± {error:.2g}"


def times(runs: Sequence[Run], timing: pd.DataFrame) -> list[tuple[str, tuple[Cell, ...]]]:
    """Label and cells of each run that recorded its times: device, epochs, time, speed, and shares.

    Speed and utilisation are medians over epochs, which a first epoch with compilation hardly moves. The
    shares are of the time of all epochs together.
    """
    rows, recorded = [], by_run(timing)
    for run in runs:
        own = recorded[run.label]
        if own.empty:
            continue
        # the median of NaN alone is NaN, but pandas 2 also warns of it
        seconds, speed = float(own["seconds"].sum()), float(own["images_per_second"].dropna().median())
        used = 100 * float(own["model_flop_utilisation"].dropna().median())
        spent = [float((own[f"{part}_share"] * own["seconds"]).sum()) for part in schema.TIMED]
        shares = [100 * part / seconds if seconds > 0 else float("nan") for part in spent]
        cells = (
            Cell(_device(run)),
            Cell(str(len(own)), float(len(own))),
            Cell(duration(seconds), seconds),
            *(Cell("–") if pd.isna(n) else Cell(f"{n:,.0f}", n) for n in [speed]),
            *(Cell("–") if pd.isna(n) else Cell(f"{n:.1f}", n) for n in [used, *shares]),
        )
        rows.append((run.label, cells))
    return rows


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
