"""Ends commands properly: an error that the user can correct gives one line and exit status 1."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from robustdyn.errors import UserError


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, on the terminal or on ``stream``."""
    print(text, file=stream or sys.stdout, flush=True)


def status_of(action: Callable[[], None]) -> int:
    """Run ``action`` and return an exit status; ``HYDRA_FULL_ERROR`` makes errors keep their stack trace."""
    speak_safely()
    try:
        action()
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


class Terminated(KeyboardInterrupt):
    """Raised when the process receives SIGTERM."""


def terminate(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM; see ``terminable``."""
    raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM interrupts the main thread as Ctrl-C does, unless it already has a handler."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Unfailing:
    """A text stream that keeps working if its reader is gone or its encoding lacks a character."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream; text that cannot be written is lost."""
        self._safely(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, ignoring errors."""
        self._safely(self._stream.flush)

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):  # a pipe without a reader, or a closed stream
            self._stream = open(os.devnull, "w")  # noqa: PTH123, SIM115


def speak_safely() -> None:
    """Make standard output and error accept any text, so that printing a message never ends a command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Unfailing):
            setattr(sys, name, _Unfailing(open(os.devnull, "w") if stream is None else stream))  # noqa: PTH123, SIM115
