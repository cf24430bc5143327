"""Finds runs and reads their records as data frames."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import json

from robustdyn.errors import RecordError
from robustdyn.records import schema
from robustdyn.records.columns import Column, Table
from robustdyn.records.labels import SEED, Setup, distinguishing, format_value, labels
from robustdyn.records.lines import LAST_EPOCH, parse_lines, warn_once
from robustdyn.records.run_directory import CONFIG, RunDirectory
from robustdyn.records.waiting import with_bar

LARGEST_INTEGER = 2**53  # up to here, float64 represents every whole number
ALL_SEEDS = "all seeds"
LARGEST_AT_ONCE = 1 << 28
"""Bytes of a file that is read at once; a larger one is read line by line."""

_ARROW = {"int": pa.int64(), "float": pa.float64(), "str": pa.string(), "bool": pa.bool_()}


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
    return _rows([RunDirectory(run_dir).table(table)], schema.table(table))[0]


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
    return pd.DataFrame(_typed_columns(_values(rows, spec), spec, source))


def find_runs(paths: Iterable[str | os.PathLike[str]] | str | os.PathLike[str]) -> list[Run]:
    """All runs in the given paths, each once, in natural order of their paths and labelled by what differs.

    Args:
        paths: Run directories, or folders to search, such as a sweep's. A run directory is one that holds
            ``.hydra/config.yaml``; it is not searched for others.

    Raises:
        RecordError: A path does not exist or has no run in it, or a configuration cannot be read.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: dict[Path, Path] = {}
    for path in map(Path, given):
        if not path.exists():
            raise RecordError(f"{path}: no such directory; give a run or sweep directory")
        directories = _run_directories(path)
        if not directories:
            raise RecordError(
                f"{path}: no run in it; a run directory holds {CONFIG.as_posix()}, which training writes"
            )
        for directory in directories:
            found.setdefault(directory.resolve(), directory)
    return label_runs([RunDirectory(path).setup() for path in with_bar([*found.values()], "reading runs")])


def label_runs(setups: Sequence[Setup]) -> list[Run]:
    """Label runs by the settings that differ among these runs."""
    names = labels(setups)
    groups = labels(setups, without=[SEED])
    seeds_differ = SEED in distinguishing(setups)
    runs = []
    for setup, name, group in zip(setups, names, groups, strict=True):
        fallback = ALL_SEEDS if seeds_differ else name
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
    """The rows of all runs in one frame; see ``combine_tables``."""
    return combine_tables(runs, [table])[table]


def combine_tables(runs: Sequence[Run], tables: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Tables with the rows of all runs.

    Args:
        runs: Runs as ``find_runs`` returns them.
        tables: Names of tables of ``records.schema``.

    Returns:
        By table: ``run`` and ``group`` (labels), one column per setting that tells the runs apart (named by
        its config key, or ``config.<key>`` if the table has a column of that name), then the table's columns.
        A column that the schema does not know becomes ``recorded.<name>`` if a label or a setting has its
        name, and becomes text if its values are of several types.
    """
    settings = {key: _uniform(values) for key, values in distinguishing(runs).items()}
    directories = [RunDirectory(run.path) for run in runs]
    return {
        table: _combined(runs, directories, schema.table(table), settings)
        for table in with_bar([*tables], "reading records")
    }


def _combined(
    runs: Sequence[Run],
    directories: Sequence[RunDirectory],
    spec: Table,
    settings: Mapping[str, Sequence[object]],
) -> pd.DataFrame:
    """One table with the rows of all runs, and the runs' settings beside them."""
    heads: dict[str, Sequence[object]] = {
        "run": [run.label for run in runs],
        "group": [run.group for run in runs],
    }
    heads |= {
        f"config.{key}" if key in (*spec.names, "run", "group") else key: values
        for key, values in settings.items()
    }
    whole, rows = _rows([own.table(spec.name) for own in directories], spec)
    unknown = whole.columns.difference([*spec.names])
    for name in unknown:
        if whole[name].dtype == "object":
            known = whole[name].notna()
            whole.loc[known, name] = pd.Series(_uniform(whole.loc[known, name].tolist()), whole.index[known])
    whole = whole.rename(columns={name: f"recorded.{name}" for name in unknown if name in heads})
    head = pd.DataFrame({name: [*values] for name, values in heads.items()}).take(rows)
    return pd.concat([head.reset_index(drop=True), whole], axis=1)


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
    return sorted(found, key=natural)


def natural(path: Path) -> list[tuple[int, str]]:
    """Sort key in which 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _rows(paths: Sequence[Path], spec: Table) -> tuple[pd.DataFrame, NDArray[np.intp]]:
    """The rows of these files of a table in one frame, and for each row the position of its file."""
    columns = []
    for path in paths:
        values = _usual_values(path, spec)
        columns.append(
            _typed_columns(_values(parse_lines(path), spec) if values is None else values, spec, str(path))
        )
    sizes = [len(of_file[spec.names[0]]) for of_file in columns]
    filled = [(of_file, size) for of_file, size in zip(columns, sizes, strict=True) if size] or [
        (columns[0], 0)
    ]
    names = dict.fromkeys(name for of_file, _ in filled for name in of_file)
    frame = pd.DataFrame(
        {name: _joined([of_file.get(name, [None] * size) for of_file, size in filled]) for name in names}
    )
    origin = np.repeat(np.arange(len(paths)), sizes)
    repeated = frame[[*spec.key]].assign(file=origin).duplicated(keep="last").to_numpy()
    for i, number in enumerate(np.bincount(origin[repeated])):
        if number:
            warn_once(f"{paths[i]}: {number} rows written twice, the last one counts")
    return (frame[~repeated].reset_index(drop=True), origin[~repeated]) if repeated.any() else (frame, origin)


def _usual_values(path: Path, spec: Table) -> dict[str, Any] | None:
    """The values of each column of a file, read fast; None if the file is not as runs write it.

    What is read here is what ``parse_lines`` reads. That function knows every other file, and what is wrong
    with it.
    """
    options = json.ParseOptions(
        explicit_schema=pa.schema([(column.name, _ARROW[column.kind]) for column in spec.columns]),
        unexpected_field_behavior="error",
    )
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_AT_ONCE + 1)  # it may also be a device without an end
        if len(content) > LARGEST_AT_ONCE:
            return None
        rows = json.read_json(pa.BufferReader(content), parse_options=options)
        values = {
            c.name: rows[c.name].to_numpy() if c.kind in ("int", "float") else rows[c.name].to_pylist()
            for c in spec.columns
        }
    except (OSError, ValueError):  # all errors of Arrow's parser are ValueErrors
        return None
    whole_lines = b"\n" + content.removesuffix(b"\n")
    one_each = whole_lines.count(b"\n") == whole_lines.count(b"\n{") == rows.num_rows
    epochs = values["epoch"]
    return values if one_each and ((epochs >= 0) & (epochs <= LAST_EPOCH)).all() else None


def _values(rows: Sequence[Mapping[str, Any]], spec: Table) -> dict[str, list[Any]]:
    """The values of the schema's columns, then of those that it does not know."""
    layouts = dict.fromkeys(tuple(row) for row in rows)  # few: most rows have the same keys
    names = dict.fromkeys([*spec.names, *(key for layout in layouts for key in layout)])
    return {name: [row.get(name) for row in rows] for name in names}


def _typed_columns(values: Mapping[str, Any], spec: Table, source: str) -> dict[str, Any]:
    """The columns, those of the schema in its types."""
    typed = {column.name: _typed(values[column.name], column, spec, source) for column in spec.columns}
    return {**values, **typed}


def _joined(parts: Sequence[Any]) -> Any:
    """The parts of a column one below the other."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    if all(isinstance(part, pd.Series) for part in parts):
        return pd.concat(parts, ignore_index=True)
    return [value for part in parts for value in part]


def _typed(values: Any, column: Column, spec: Table, source: str) -> pd.Series | NDArray[Any]:
    """A column in the type that the schema declares; integers with gaps become floats."""
    try:
        if column.kind in ("int", "float"):
            numbers = np.array(values, dtype=np.float64)
            if numbers.ndim != 1:
                raise ValueError("lists instead of numbers")
            if column.name in spec.key and np.isnan(numbers).any():
                raise ValueError("null or absent in some rows")
            finite = np.isfinite(numbers)  # 1e999 is read as infinity
            numbers[~finite] = math.nan
            if column.kind == "float":
                return numbers
            known = numbers[finite]
            if ((known % 1 != 0) | (np.abs(known) > LARGEST_INTEGER)).any():
                raise ValueError("not a whole number, or beyond 2^53")
            return numbers if len(known) < len(numbers) else numbers.astype(np.int64)
        if column.name in spec.key and any(value is None for value in values):
            raise ValueError("null or absent in some rows")
        if column.kind == "str" and not all(value is None or isinstance(value, str) for value in values):
            raise ValueError("not text in some rows")
        return pd.Series(values, dtype="boolean" if column.kind == "bool" else "object")
    except (TypeError, ValueError, OverflowError) as error:
        raise RecordError(
            f"{source}: column {column.name}: {error}; is the file from another program?"
        ) from error


def _uniform(values: list[object]) -> list[object]:
    """Values of one type, so that a table of them can be stored: numbers, otherwise text."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values
    return [None if value is None else format_value(value) for value in values]
