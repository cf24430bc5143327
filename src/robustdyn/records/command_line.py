"""Builds command lines to show to the user, which can be pasted into a shell in any folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def command(program: str, *arguments: str) -> str:
    """One line for a shell. Arguments that are paths come from ``at``."""
    return shlex.join([program, *arguments])


def at(key: str, path: Path) -> str:
    """``key=path`` with the absolute path, in the form that our commands accept."""
    text = str(path.absolute())
    # quoted for Hydra only if it contains an interpolation: the commands quote paths themselves
    return f"{key}={hydra_quoted(text) if '${' in text else text}"


def hydra_quoted(text: str) -> str:
    """A text quoted for Hydra's overrides, so that it is taken literally."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # escape interpolations
    return quoted(text)


def quoted(text: str) -> str:
    """A text quoted for Hydra's overrides; interpolations in it are still resolved."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"
