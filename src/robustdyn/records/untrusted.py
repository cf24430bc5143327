"""Reads configurations safely from run directories that somebody else may have written.

Reading one never runs code and never looks up anything on this machine, such as an environment variable. Its
time and memory are bounded by the size of the file.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustdyn.errors import RecordError

LARGEST_FILE = 1 << 20  # bytes; Hydra's files have a few thousand
DEEPEST = 50  # levels of nested lists and dictionaries
PURE_RESOLVERS = ("at_fractions", "first", "first_at_fraction", "oc.select", "per_255", "short", "times")
"""The resolvers in ``conf/`` whose value follows from the configuration alone."""
DATA_ROOT = "oc.env:ROBUSTDYN_DATA"
"""The environment variable that a run's ``data.root`` may refer to: where this machine has its data."""

_REFERENCE = re.compile(r"\$\{\s*(?:oc\.select:\s*)?(\.*)([\w.\[\]-]+)")
"""A reference to another key: the dots that make it relative, and the key."""
_BY_DATA = "${data._target_}"
"""The only reference by which a key is computed in ``conf/`` (scale/small_images.yaml)."""
_COMPUTED = re.compile(r"oc\.select:[^,}]*\$\{")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads scalars as OmegaConf does, 1e-3 as a number and dates as text, many times as fast."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """The dictionary of a node; PyYAML alone would take the last of the values of a key."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ValueError(
                    f"the key {key.value[:60]!r} is there twice, again in line {key.start_mark.line + 1}"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file as plain dictionaries and lists, with interpolations left as text.

    Raises:
        ValueError: It cannot be read; the message is only the reason, in one line.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"larger than {LARGEST_FILE >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        _check_structure(text)
        content = yaml.load(text, _Loader)
        if not isinstance(content, dict | list):
            raise ValueError("neither keys with values nor a list")
        check_expansion(content)
        return content
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(_first_line(error)) from error


def untrusted_config(content: Any, resolvers: Sequence[str] = PURE_RESOLVERS) -> DictConfig | ListConfig:
    """A configuration from what ``read_yaml`` returned.

    Interpolations may only refer to keys of the configuration and to these resolvers. Strings with any other
    one, such as ``${oc.env:HOME}``, stay text.
    """
    names = "|".join(map(re.escape, resolvers))
    known = re.compile(rf"\$\{{\s*(?:[\w.\[\]]*\s*\}}|(?:{names})\s*[:,])")
    config = OmegaConf.create(_without_foreign(content, known))
    assert isinstance(config, DictConfig | ListConfig)
    return config


def read_config(path: Path, remedy: str, resolvers: Sequence[str] = PURE_RESOLVERS) -> DictConfig:
    """The configuration in a file, as ``untrusted_config`` returns it.

    Raises:
        RecordError: It cannot be read, or is not a configuration; the message ends with the remedy.
    """
    try:
        config = untrusted_config(read_yaml(path), resolvers)
    except (ValueError, OmegaConfBaseException) as error:
        raise RecordError(f"{path}: cannot read ({_first_line(error)}); {remedy}") from error
    if not isinstance(config, DictConfig):
        raise RecordError(f"{path}: not a configuration; {remedy}")
    return config


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_structure(text: str) -> None:
    """Refuse content that would take a parser hours or overflow its stack; Hydra never writes it.

    Raises:
        ValueError: The text has aliases, which can double the content with every line, or is nested deeply.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has YAML aliases")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} deep")


def check_expansion(content: Any) -> None:
    """Refuse interpolations that double the content step by step, as aliases could.

    Raises:
        ValueError: The resolved content would be larger than a file may be, or a key is itself computed.
    """
    sizes: dict[tuple[str, ...], int] = {}
    data = str(_at(content, ("data", "_target_")))

    def resolved(path: tuple[str, ...], node: Any) -> int:
        if path in sizes:
            return sizes[path]
        sizes[path] = 0  # while it is being computed: OmegaConf refuses what refers to itself
        if isinstance(node, dict | list):
            total = sum(resolved((*path, str(key)), child) for key, child in _items(node))
        else:
            text = str(node) if "$" in data else str(node).replace(_BY_DATA, data)
            if _COMPUTED.search(text):
                where = ".".join(path)
                raise ValueError(f"{where}: a key is computed by an interpolation in {text[:80]!r}")
            total = len(text)
            for dots, name in _REFERENCE.findall(text):
                target = (*path[: len(path) - len(dots)] * bool(dots), *re.findall(r"[^.\[\]]+", name))
                total += resolved(target, _at(content, target))
        if total > LARGEST_FILE:
            raise ValueError(f"its interpolations make it larger than {LARGEST_FILE >> 20} MiB")
        sizes[path] = total
        return total

    resolved((), content)


def _items(node: dict[Any, Any] | list[Any]) -> Iterable[tuple[Any, Any]]:
    return node.items() if isinstance(node, dict) else enumerate(node)


def _at(content: Any, path: Sequence[str]) -> Any:
    """The node at a path of keys and positions; an empty text if there is none."""
    for key in path:
        children = {str(k): child for k, child in _items(content)} if isinstance(content, dict | list) else {}
        content = children.get(key, "")
    return content


def _without_foreign(content: Any, known: re.Pattern[str]) -> Any:
    if isinstance(content, dict):
        return {key: _without_foreign(value, known) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_foreign(value, known) for value in content]
    if isinstance(content, str) and len(known.findall(content)) < content.count("${"):
        # an odd number of backslashes escapes the interpolation; two backslashes stand for one
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", content)
    return content
