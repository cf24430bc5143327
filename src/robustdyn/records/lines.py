"""Parses the JSON lines of a record file, for the reader and for the writer of a resumed run."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

from robustdyn.errors import RecordError

LONGEST = 1 << 20
"""Most bytes in a line; a row usually has a few hundred."""
LAST_EPOCH = 10**9
REMEDY = "remove the line, or restore the file from a copy"

_DECODER = json.JSONDecoder(parse_constant=lambda name: None)


def decode(line: bytes, *, epochs: bool = True) -> dict[str, Any] | None:
    """The row in one line, or ``None`` if the line is broken; NaN and infinities become null.

    A truncated line never decodes, because the closing brace is its last character. With ``epochs`` a row
    without an epoch also counts as broken; the tables of an evaluation have no epochs.
    """
    try:
        row = _DECODER.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    epoch = row.get("epoch")
    return row if not epochs or (type(epoch) is int and 0 <= epoch <= LAST_EPOCH) else None


def parse_lines(
    path: Path, *, warn: bool = True, epochs: bool = True, remedy: str = REMEDY
) -> list[dict[str, Any]]:
    """All rows of a record file, in order; none if there is no file.

    A broken last line (the process was killed while writing it) is left out.

    Args:
        path: The file.
        warn: Whether to warn of a broken last line.
        epochs: Whether every row must have an epoch.
        remedy: What the user can do about a broken line, for the message.

    Raises:
        RecordError: The file cannot be read, a line before the last is broken, or a line is too long.
    """
    rows: list[dict[str, Any]] = []
    broken: int | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
                if not line.strip():
                    continue
                row = decode(line, epochs=epochs) if len(line) <= LONGEST else None
                if broken is not None or len(line) > LONGEST:
                    raise RecordError(f"{path}, line {broken or number}: not a record; {remedy}")
                if row is None:
                    broken = number
                else:
                    rows.append(row)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path}: cannot read ({error.strerror})") from error
    if broken is not None and warn:
        warn_once(f"{path}, line {broken}: half-written last line left out")
    return rows


@functools.cache
def warn_once(text: str) -> None:
    """Give a warning only the first time, however often a file is read."""
    warnings.warn(text, stacklevel=2)
