"""Configurations that lie in run directories, which somebody else may have written.

Reading one never runs code, never looks at this machine, and takes no more time or memory than its size asks.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import RecordError

LARGEST = 1 << 20  # bytes; Hydra's files take some thousand
DEEPEST = 50  # nested lists and dictionaries
PURE_RESOLVERS = ("at_fractions", "first", "first_at_fraction", "oc.select", "per_255", "short")
"""Those of ``conf/`` whose value follows from the configuration alone."""
DATA_ROOT = "oc.env:ROBUSTDYN_DATA"
"""Where this machine has its data: what a run's ``data.root`` may ask for."""


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain dictionaries and lists, interpolations as they are written.

    Raises:
        ValueError: It cannot be read; the message is the reason alone, in one line.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        _check_structure(text)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from error


def untrusted_config(content: Any, resolvers: Sequence[str] = PURE_RESOLVERS) -> DictConfig | ListConfig:
    """A configuration of what ``read_yaml`` returned.

    Strings with an interpolation that asks for more than keys of the configuration and these resolvers, such
    as ``${oc.env:HOME}``, stay text.
    """
    names = "|".join(map(re.escape, resolvers))
    known = re.compile(rf"\$\{{\s*(?:[\w.\[\]]*\s*\}}|(?:{names})\s*[:,])")
    config = OmegaConf.create(_without_foreign(content, known))
    assert isinstance(config, DictConfig | ListConfig)
    return config


def read_config(path: Path, remedy: str, resolvers: Sequence[str] = PURE_RESOLVERS) -> DictConfig:
    """The configuration in a file, as ``untrusted_config`` gives it.

    Raises:
        RecordError: It cannot be read, or is none; the message ends with the remedy.
    """
    try:
        config = untrusted_config(read_yaml(path), resolvers)
    except ValueError as error:
        raise RecordError(f"{path}: cannot read ({error}); {remedy}") from error
    if not isinstance(config, DictConfig):
        raise RecordError(f"{path}: not a configuration; {remedy}")
    return config


def _check_structure(text: str) -> None:
    """Refuse what a parser would spend hours or its stack on; Hydra writes neither.

    Raises:
        ValueError: Aliases, which can double the content at every line, or deep nesting.
    """
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has YAML aliases")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def _without_foreign(content: Any, known: re.Pattern[str]) -> Any:
    if isinstance(content, dict):
        return {key: _without_foreign(value, known) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_foreign(value, known) for value in content]
    if isinstance(content, str) and len(known.findall(content)) < content.count("${"):
        # an odd number of backslashes makes it text, of which every two are one
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", content)
    return content
