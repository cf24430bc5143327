"""The run's log file: one JSON object per line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

IN_FILE_ONLY = {"in_file_only": True}
"""``extra`` of what the terminal shows in its own way."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", *IN_FILE_ONLY}


class JsonLines(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``message``, what was passed as ``extra``, and ``traceback``."""

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
    """Lets through what is not meant for the file alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show it."""
        return not any(getattr(record, key, False) for key in IN_FILE_ONLY)


class Terminal(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment: it outlives a command whose stream was closed."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write it."""
        self.stream = sys.stderr
        super().emit(record)
