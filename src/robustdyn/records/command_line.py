"""Commands as text: what is printed runs when it is pasted into a shell, from any folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def command(program: str, *arguments: str) -> str:
    """One line for a shell. Arguments that name a place come from ``at``."""
    return shlex.join([program, *arguments])


def at(key: str, path: Path) -> str:
    """``key=path`` with the absolute path, as our commands read it."""
    text = str(path.absolute())
    # without quotes of Hydra's grammar where none are needed: the commands add them to paths
    return f"{key}={hydra_quoted(text) if '${' in text else text}"


def hydra_quoted(text: str) -> str:
    """A text in the grammar of Hydra's overrides that stands for just itself."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return quoted(text)


def quoted(text: str) -> str:
    """A text in the grammar of Hydra's overrides; interpolations in it count."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"
