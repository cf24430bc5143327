"""Finds runs and reads their records as data frames."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from robustdyn.errors import RecordError
from robustdyn.records import schema
from robustdyn.records.columns import Column, Table
from robustdyn.records.labels import SEED, Setup, distinguishing, format_value, labels
from robustdyn.records.lines import parse_lines, warn_once
from robustdyn.records.run_directory import CONFIG, RunDirectory

LARGEST_INTEGER = 2**53  # up to here, float64 represents every whole number
ALL_SEEDS = "all seeds"


@dataclass(frozen=True)
class Run(Setup):
    """One run directory, with labels that tell it from the runs it is compared with.

    Attributes:
        label: Tells the run from its peers (``method=awp seed=0``); for a single run the directory's name.
        group: The label without the seed: runs of one group are repetitions of one another.
    """

    label: str
    group: str


def read_table(run_dir: str | os.PathLike[str], table: str) -> pd.DataFrame:
    """One table of one run.

    Args:
        run_dir: The run directory.
        table: Name of a table of ``records.schema``.

    Returns:
        One row per record in the order written, with all columns of the schema in its order (null where not
        recorded, NaN or infinite), then any column the schema does not know. No rows if there is no file. If
        a row was written twice, the last one counts, with a warning. A half-written last line is left out,
        with a warning.

    Raises:
        RecordError: A line other than the last is broken; the message names file and line.
        ValueError: There is no such table.
    """
    spec = schema.table(table)
    path = RunDirectory(run_dir).table(table)
    frame = typed_frame(table, parse_lines(path), str(path))
    repeated = frame.duplicated(list(spec.key), keep="last")
    if repeated.any():
        warn_once(f"{path}: {int(repeated.sum())} rows written twice, the last one counts")
        frame = frame[~repeated].reset_index(drop=True)
    return frame


def typed_frame(table: str, rows: Sequence[Mapping[str, Any]], source: str = "rows") -> pd.DataFrame:
    """Rows as a data frame with the columns and types of the schema; null where a row has no value.

    Args:
        table: Name of a table of ``records.schema``.
        rows: Rows as they were written or read.
        source: Where they come from, for error messages.

    Raises:
        RecordError: A value is not of its column's type.
        ValueError: There is no such table.
    """
    spec = schema.table(table)
    frame = pd.DataFrame([*rows], columns=_columns(spec, rows))
    for column in spec.columns:
        frame[column.name] = _typed(frame[column.name], column, spec, source)
    return frame


def find_runs(paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Run]:
    """All runs in the given paths, each once, in natural order of their paths and labelled by what differs.

    Args:
        paths: Run directories, or folders to search, such as a sweep's. A run directory is one that holds
            ``.hydra/config.yaml``; it is not searched for others.

    Raises:
        RecordError: A path does not exist or has no run in it, or a configuration cannot be read.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: dict[Path, Setup] = {}
    for path in map(Path, given):
        if not path.exists():
            raise RecordError(f"{path}: no such directory; give a run or sweep directory")
        directories = _run_directories(path)
        if not directories:
            raise RecordError(
                f"{path}: no run in it; a run directory holds {CONFIG.as_posix()}, which training writes"
            )
        for directory in directories:
            resolved = directory.resolve()
            if resolved not in found:
                found[resolved] = RunDirectory(directory).setup()
    return label_runs(list(found.values()))


def label_runs(setups: Sequence[Setup]) -> list[Run]:
    """Label runs by the settings that differ among these runs."""
    names = labels(setups)
    groups = labels(setups, without=[SEED])
    runs = []
    for setup, name, group in zip(setups, names, groups, strict=True):
        fallback = ALL_SEEDS if len(setups) > 1 and SEED in distinguishing(setups) else name
        runs.append(
            Run(
                path=setup.path,
                config=setup.config,
                overrides=setup.overrides,
                choices=setup.choices,
                derived=setup.derived,
                label=name,
                group=group or fallback,
            )
        )
    return runs


def combine(runs: Sequence[Run], table: str) -> pd.DataFrame:
    """The rows of all runs in one frame.

    Args:
        runs: Runs as ``find_runs`` returns them.
        table: Name of a table of ``records.schema``.

    Returns:
        ``run`` and ``group`` (labels), one column per setting that tells the runs apart (named by its config
        key, or ``config.<key>`` if the table has a column of that name), then the table's columns. A column
        that the schema does not know becomes ``recorded.<name>`` if a label or a setting has its name, and
        becomes text if its values are of several types.
    """
    spec = schema.table(table)
    settings = {
        f"config.{key}" if key in (*spec.names, "run", "group") else key: _uniform(values)
        for key, values in distinguishing(runs).items()
    }
    frames = []
    for i, run in enumerate(runs):
        frame = read_table(run.path, table)
        names = {"run": run.label, "group": run.group} | {key: values[i] for key, values in settings.items()}
        head = pd.DataFrame({key: [value] * len(frame) for key, value in names.items()}, index=frame.index)
        frame = frame.rename(columns={name: f"recorded.{name}" for name in frame if name in names})
        frames.append(pd.concat([head, frame], axis=1))
    filled = [frame for frame in frames if not frame.empty]
    whole = pd.concat(filled, ignore_index=True) if filled else frames[0]
    for name in whole.columns.difference([*settings, *spec.names, "run", "group"]):
        if whole[name].dtype == "object":
            known = whole[name].notna()
            whole.loc[known, name] = pd.Series(_uniform(whole.loc[known, name].tolist()), whole.index[known])
    return whole


def _run_directories(path: Path) -> list[Path]:
    """Run directories at or below ``path``, in natural order."""
    if (path / CONFIG).is_file():
        return [path]
    found = []
    for parent, folders, _ in os.walk(path):
        if Path(parent, CONFIG).is_file():
            found.append(Path(parent))
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key in which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _columns(spec: Table, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The schema's columns, then those it does not know."""
    return list(dict.fromkeys([*spec.names, *(key for row in rows for key in row)]))


def _typed(values: pd.Series, column: Column, spec: Table, source: str) -> pd.Series:
    """A column in the type that the schema declares; integers with gaps become floats."""
    try:
        if column.name in spec.key and values.isna().any():
            raise ValueError("null or absent in some rows")
        if column.kind in ("int", "float"):
            numbers = pd.to_numeric(values).astype("float64")
            numbers = numbers.where(numbers.abs() < math.inf)  # 1e999 is read as infinity
            if column.kind == "float":
                return numbers
            known = numbers.dropna()
            if ((known % 1 != 0) | (known.abs() > LARGEST_INTEGER)).any():
                raise ValueError("not a whole number, or beyond 2^53")
            return numbers if len(known) < len(numbers) else numbers.astype("int64")
        if column.kind == "str" and not values.dropna().map(lambda value: isinstance(value, str)).all():
            raise ValueError("not text in some rows")
        return values.astype("boolean" if column.kind == "bool" else "object")
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"{source}: column {column.name}: {error}; is the file from another program?"
        ) from error


def _uniform(values: list[object]) -> list[object]:
    """Values of one type, so that a table of them can be stored: numbers, otherwise text."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values
    return [None if value is None else format_value(value) for value in values]
