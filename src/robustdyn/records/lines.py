"""The line format of a record file, shared by the writer (when a run resumes) and the reader."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from robustdyn.errors import RecordError


def decode(line: bytes) -> dict[str, Any] | None:
    """The row in one line, or ``None`` when the line is broken.

    A line cut short never decodes: the closing brace is its last character.
    """
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("epoch"), int) else None


def parse_lines(path: Path, *, warn: bool = True) -> list[dict[str, Any]]:
    """All rows of a record file, in order.

    A broken last line (the process was killed while writing it) is left out, with a warning if ``warn``.

    Raises:
        RecordError: The file cannot be read, or a line before the last is broken.
    """
    try:
        lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    except OSError as error:
        raise RecordError(f"{path}: cannot read ({error.strerror})") from error
    rows: list[dict[str, Any]] = []
    for number, line in lines:
        row = decode(line)
        if row is not None:
            rows.append(row)
        elif number == lines[-1][0]:
            if warn:
                warnings.warn(f"{path}, line {number}: half-written last line left out", stacklevel=3)
        else:
            raise RecordError(
                f"{path}, line {number}: not a record; remove the line, or restore the file from a copy"
            )
    return rows
