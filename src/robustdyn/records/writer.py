"""Writes a run's records: one JSON line per row, in ``records/<table>.jsonl`` of the run directory.

In a run with several processes only the first one writes. Rows are passed to the operating system at once, so
that a killed process loses none. They are *not* forced to the disk row by row, because a measurement writes
dozens of rows, and on a cluster's file system each ``fsync`` can take tens of milliseconds. Call ``sync``
before a checkpoint is saved; then no checkpoint is ahead of its records, even if the machine crashes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from robustdyn.errors import RecordError
from robustdyn.records import schema
from robustdyn.records.columns import Column, Kind, Table
from robustdyn.records.files import replace_file
from robustdyn.records.lines import decode, parse_lines
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import TEST_ROBUST_ERROR, TEST_ROBUST_LOSS

_TYPES: dict[Kind, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


class RunRecords:
    """The records of one run directory.

    Args:
        run_dir: The run directory. Its folder ``records/`` is made when the first row is written.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._files = RunDirectory(run_dir)
        self._whole: set[str] = set()  # tables whose last line is known to be complete

    def path(self, table: str) -> Path:
        """The file of a table."""
        return self._files.table(table)

    def append(self, table: str, row: Mapping[str, object]) -> None:
        """Append one row; see ``extend``."""
        self.extend(table, [row])

    def extend(self, table: str, rows: Iterable[Mapping[str, object]]) -> None:
        """Append rows and flush them.

        NumPy and torch scalars become numbers; NaN and infinities become null.

        Raises:
            ValueError: A row lacks a required column, has an unknown one, or has a value of the wrong kind.
            RecordError: The file cannot be written, its last line cannot be read to complete it, or a file
                that this object wrote is gone.
        """
        spec = schema.table(table)
        lines = "".join(_encode(spec, row) + "\n" for row in rows)
        path = self.path(table)
        for begun in map(self.path, sorted(self._whole)):
            if not begun.is_file():
                raise RecordError(
                    f"{begun} was removed while the run was in progress; restore the run directory from a "
                    "copy, or start again with another hydra.run.dir"
                )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if table not in self._whole:
                _complete_last_line(path)
                self._whole.add(table)
            with path.open("ab") as file:
                file.write(lines.encode())
        except RecordError:
            raise
        except OSError as error:
            raise _unwritable(path, error) from error

    def replace(self, table: str, rows: Iterable[Mapping[str, object]]) -> int:
        """Replace a whole table atomically, for example one that is computed from other tables.

        Returns:
            The number of rows.

        Raises:
            ValueError: As in ``extend``.
            RecordError: The file cannot be written.
        """
        spec = schema.table(table)
        path = self.path(table)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [_encode(spec, row) + "\n" for row in rows]
        _replace(path, "".join(lines))
        self._whole.add(table)
        return len(lines)

    def truncate(self, from_epoch: int, from_step: int = 0) -> None:
        """Drop from every table the rows that a resumed run will write again, and any half-written last line.

        Rows of epochs before ``from_epoch`` are kept, and rows of that epoch with steps before ``from_step``,
        counted from 0 over the whole run. Each file is replaced atomically; a second call changes nothing.

        Raises:
            RecordError: A line other than the last is broken; the message names file and line.
        """
        for name in schema.TABLES:
            path = self.path(name)
            if path.is_file():
                rows = parse_lines(path, warn=False)
                kept = [
                    row
                    for row in rows
                    if row["epoch"] < from_epoch
                    or (row["epoch"] == from_epoch and row.get("step", from_step) < from_step)
                ]
                _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
                self._whole.add(name)

    def sync(self) -> None:
        """Force all rows written so far to the disk."""
        for name in schema.TABLES:
            if self.path(name).is_file():
                with self.path(name).open("rb") as file:
                    os.fsync(file.fileno())

    def write_summary(self, summary: Mapping[str, object]) -> Path:
        """Replace ``summary.json`` atomically; NaN and infinities become null.

        Returns:
            The file written.
        """
        path = self._files.summary
        self.run_dir.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(jsonable(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return path


def jsonable(value: object) -> Any:
    """A value that JSON can hold: array scalars become numbers, and non-finite numbers become ``None``.

    Raises:
        ValueError: The value is not a scalar or text, nor a mapping or sequence of these.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    item = getattr(value, "item", None)
    if callable(item):
        try:
            value = item()
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError("an array of several numbers is not a scalar") from error
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ValueError(f"{type(value).__name__} cannot be recorded")


def summarise(epochs: pd.DataFrame) -> dict[str, object]:
    """The content of ``summary.json``.

    Args:
        epochs: The run's ``epochs`` table, one row per epoch.

    Returns:
        ``final`` (the last row), ``best_on_test`` (the row with the lowest test robust error, selected on the
        test set as in the papers), ``best_on_validation`` (if a validation split was recorded),
        ``min_test_robust_loss`` with ``epoch`` and ``value``, and ``robust_loss_rise`` (final − minimum). A
        row is ``None`` if the column that selects it holds no number.

    Raises:
        ValueError: The table has no rows.
    """
    if epochs.empty:
        raise ValueError("a run without a finished epoch has no summary")
    ordered = epochs.sort_values("epoch", kind="stable").reset_index(drop=True)
    lowest = _lowest(ordered, TEST_ROBUST_LOSS)
    final = _row(ordered, len(ordered) - 1)
    summary: dict[str, object] = {
        "final": final,
        "best_on_test": _row(ordered, _lowest(ordered, TEST_ROBUST_ERROR)),
    }
    validation = _lowest(ordered, "validation_robust_error")
    if validation is not None:
        summary["best_on_validation"] = _row(ordered, validation)
    minimum = None if lowest is None else float(ordered[TEST_ROBUST_LOSS].iloc[lowest])
    last = ordered[TEST_ROBUST_LOSS].iloc[-1]
    summary["min_test_robust_loss"] = {
        "epoch": None if lowest is None else int(ordered["epoch"].iloc[lowest]),
        "value": minimum,
    }
    summary["robust_loss_rise"] = None if minimum is None else jsonable(float(last) - minimum)
    return summary


def _lowest(frame: pd.DataFrame, column: str) -> int | None:
    """Position of the first row with the smallest value of ``column``."""
    if column not in frame or frame[column].isna().all():
        return None
    return int(frame[column].astype(float).argmin())


def _row(frame: pd.DataFrame, position: int | None) -> dict[str, object] | None:
    """One row as plain values, without the optional columns that are empty."""
    if position is None:
        return None
    optional = {c.name for c in schema.EPOCHS.columns if not c.required}
    return {
        str(name): jsonable(None if pd.isna(series.iloc[position]) else series.iloc[position])
        for name, series in frame.items()
        if not (name in optional and series.isna().all())
    }


def _encode(spec: Table, row: Mapping[str, object]) -> str:
    """One JSON line, columns in the schema's order."""
    unknown = [name for name in row if name not in spec.names]
    missing = [name for name in spec.required if name not in row]
    if unknown or missing:
        faults = [
            f"{what} {', '.join(names)}"
            for what, names in (("unknown", unknown), ("missing", missing))
            if names
        ]
        raise ValueError(
            f"row of table {spec.name!r}: {'; '.join(faults)} (columns are declared in records/schema.py)"
        )
    values = {c.name: _value(spec, c, row[c.name]) for c in spec.columns if c.name in row}
    return json.dumps(values, ensure_ascii=False, allow_nan=False)


def _value(spec: Table, column: Column, value: object) -> object:
    """One value, checked against its column."""
    where = f"row of table {spec.name!r}, column {column.name!r}"
    try:
        value = jsonable(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if value is None:
        if column.name in spec.key:
            raise ValueError(f"{where}: a key column cannot be null")
        return None
    if column.kind == "int" and isinstance(value, float) and value.is_integer():
        return int(value)
    expected = _TYPES[column.kind]
    is_stray_bool = isinstance(value, bool) and column.kind != "bool"
    if is_stray_bool or not isinstance(value, expected):
        raise ValueError(f"{where}: {value!r} is not of kind {column.kind}")
    return float(value) if column.kind == "float" and isinstance(value, int) else value


def _complete_last_line(path: Path) -> None:
    """Drop a half-written last line, or add the newline to a complete one that lacks only that."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if not content or content.endswith(b"\n"):
        return
    head, _, tail = content.rpartition(b"\n")
    kept = tail + b"\n" if decode(tail) is not None else b""
    _replace(path, ((head + b"\n" if head else b"") + kept).decode())


def _replace(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(f"{path}: cannot write ({error.strerror}); free space or pick another run directory")
