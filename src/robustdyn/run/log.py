"""Formats the run's log file, one JSON object per line, and decides which messages reach the terminal."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

IN_FILE_ONLY = {"in_file_only": True}
"""Pass as ``extra`` for messages that the terminal already shows in another form."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", *IN_FILE_ONLY}


class JsonLines(logging.Formatter):
    """One object with ``time`` (UTC), ``level``, ``logger``, ``message``, all of ``extra``, ``traceback``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class ForTerminal(logging.Filter):
    """Drops messages that are only meant for the file."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show it."""
        return not any(getattr(record, key, False) for key in IN_FILE_ONLY)


class Terminal(logging.StreamHandler[TextIO]):
    """Writes to the current standard error, so that it still works if an earlier stream was closed."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write it."""
        self.stream = sys.stderr
        super().emit(record)
