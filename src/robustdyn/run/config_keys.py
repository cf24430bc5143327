"""Finds the key that a user probably meant, and settings that nothing reads."""

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError
from robustdyn.records.labels import flatten
from robustdyn.run.targets import targets_in


def unknown_key(key: str, known: Collection[str]) -> str:
    """The message for a key that the chosen options do not have.

    Args:
        key: The key.
        known: The keys that it may have been meant for.
    """
    section = key.partition(".")[0]
    options = [option for option, keys in _options(section) if key in keys]
    if options:
        choices = " or ".join(f"{section}={option}" for option in options[:3])
        return f"config key {key} does not exist with the chosen options; leave it out, or choose {choices}"
    if key in known:
        return f"config key {key} does not exist with the chosen options; leave it out or choose others"
    parent = key.rpartition(".")[0]
    more = f" (+{key}=... passes a further argument to {parent})" if f"{parent}._target_" in known else ""
    return f"unknown config key {key}; {_meant(key, known)}{more}"


def refuse_unread(cfg: DictConfig, command: str, typed: Sequence[str], groups: Collection[str]) -> None:
    """Refuse a key that was added with ``+``, if no class takes it and no other setting refers to it.

    A key with ``++`` may be one that exists, and is not checked.

    Args:
        cfg: The configuration of a command.
        command: The name of the command's own configuration, such as ``"train"``. A section ``run`` in it
            takes any setting of a run.
        typed: The overrides from which it was composed.
        groups: The groups of which it has an option; ``+group=option`` may choose one of the user's own.

    Raises:
        ConfigError: There is such a key; the message names those that come closest.
    """
    added = re.findall(r"^\+([\w.]+)=", "\n".join(typed), re.MULTILINE)
    added = [key for key in added if key not in groups and not _passed_on(cfg, key)]
    if not added:
        return
    of_run = OmegaConf.select(OmegaConf.load(config_dir() / f"{command}.yaml"), "run") is not None
    settings = OmegaConf.to_yaml(cfg)
    for key in added:
        section, dot, _ = key.partition(".")
        of_options = section in groups and any(key in keys for _, keys in _options(section))
        if of_options or _referred_to(key, settings) or (of_run and section == "run"):
            continue
        others = set(flatten(OmegaConf.to_container(cfg, resolve=False))) - {key}  # type: ignore[arg-type]
        meant = f"did you mean +run.{key}?" if of_run and dot else _meant(key, others)
        raise ConfigError(f"nothing reads {key}; {meant}")


def _meant(key: str, known: Collection[str]) -> str:
    name = key.rpartition(".")[2]
    others = [o for o in sorted(known) if not o.endswith("._target_") and not key.startswith(f"{o}.")]
    leaves = {other: other.rpartition(".")[2] for other in others}
    alike = [other for other, leaf in leaves.items() if name == leaf or name in leaf.split("_")]
    close = [
        *difflib.get_close_matches(key, leaves, n=1, cutoff=0.8),
        *sorted(alike, key=lambda other: (other.count("."), leaves[other] != name)),
        *difflib.get_close_matches(key, leaves, n=3, cutoff=0.6),
    ]
    first = list(dict.fromkeys(close))[:4]
    return f"did you mean {' or '.join(first)}?" if first else "see --help for all keys"


def _passed_on(cfg: DictConfig, key: str) -> bool:
    """Whether the key is, or belongs to, an argument of a class, or names a class."""
    parts = key.split(".")
    above = [OmegaConf.select(cfg, ".".join(parts[:count])) for count in range(1, len(parts))]
    if any(isinstance(node, DictConfig) and "_target_" in node for node in above):
        return True
    own = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    return parts[-1] == "_target_" or bool(
        targets_in(OmegaConf.to_container(own, resolve=False)) if OmegaConf.is_config(own) else ()
    )


def _options(section: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The options of a group in ``conf/``, with the settings that their own files contain."""
    for file in sorted((config_dir() / section).glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        content: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        if "@package _global_" not in text:
            yield file.stem, flatten(content, f"{section}.")


def _referred_to(key: str, settings: str) -> bool:
    """Whether an interpolation names the key, such as ``${key}``, ``${oc.select:key}`` or ``${.key}``."""
    leaf = re.escape(key.rpartition(".")[2])
    return re.search(rf"\$\{{(?:[^{{}}]*[^\w.{{}}])?(?:{re.escape(key)}|\.+{leaf})\b", settings) is not None
