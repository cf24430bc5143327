"""How a plain command ends: status 0, or one line and status 1 for what a user can mend."""

import os
import sys
from collections.abc import Callable
from typing import TextIO

from robustdyn.errors import UserError


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on the terminal or on ``stream``; a reader that has gone ends nothing."""
    stream = stream or sys.stdout
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def status_of(action: Callable[[], None]) -> int:
    """Run ``action``; its exit status. With ``HYDRA_FULL_ERROR`` set, errors keep their stack trace."""
    try:
        action()
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
