"""Composes a command's configuration for checkpoints: sections of their run, and what was typed.

It also refuses a run whose settings lack what this version needs.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError, RecordError
from robustdyn.launch.paths import load_run
from robustdyn.records.command_line import hydra_quoted
from robustdyn.records.labels import flatten
from robustdyn.records.progress import is_of
from robustdyn.records.run_directory import CONFIG, RunDirectory
from robustdyn.run.config_keys import unknown_key
from robustdyn.run.targets import allowed, targets_in

NAMED_FREELY = ("logger", "measure.measurements")
"""Sections whose entries a run may leave out: nothing asks for one of them by its name."""


def deferred(arguments: Sequence[str], groups: Collection[str]) -> list[str]:
    """Keep settings in these groups until the checkpoint has determined the choice in each group.

    Hydra composes before it knows the checkpoint. It would refuse a key such as ``data.root`` if the default
    data set did not have it.
    """
    keys = [text.partition("=")[0] for text in arguments]
    sections = [key.partition(".")[0] if "." in key else "" for key in keys]
    return [
        f"++{text}" if section in groups else text for section, text in zip(sections, arguments, strict=True)
    ]


@dataclass(frozen=True)
class Typed:
    """The typed overrides.

    Attributes:
        settings: Those of keys in the groups of a run, by key.
        others: All others, as they were typed.
        groups: The groups of a run in which an option was chosen.
        keys: The keys of the others.
    """

    settings: Mapping[str, str]
    others: tuple[str, ...]
    groups: frozenset[str]
    keys: frozenset[str]

    @classmethod
    def now(cls, groups: Collection[str]) -> "Typed":
        """Of the command that runs; ``groups`` are those that a run determines."""
        settings, others, chosen, keys = {}, [], set(), set()
        for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task)):
            key, text = override.key_or_group, override.input_line or ""
            section, dot, _ = key.partition(".")
            if section in groups and dot:
                settings[key] = text.removeprefix("++")
                continue
            others.append(text)
            keys.add(key)
            if section in groups:
                chosen.add(section)
        return cls(settings, tuple(others), frozenset(chosen), frozenset(keys))


def of_run(
    command: str,
    checkpoint: Path,
    run_dir: Path | None,
    typed: Typed,
    groups: Sequence[str],
    refuse: Callable[[str], None] = lambda key: None,
) -> tuple[DictConfig, Collection[str] | None]:
    """A command's configuration with sections of the run, and the typed overrides.

    A class of the user's own that is typed as a ``_target_`` gets the arguments that are typed with it: those
    of the class that it takes the place of would not fit.

    Args:
        command: The name of the command's configuration.
        checkpoint: For messages.
        run_dir: The run that the checkpoint is of; None for a file from elsewhere.
        typed: The typed overrides.
        groups: The sections that are the run's where nothing else was typed.
        refuse: Called with each typed key in these groups; raises a ``ConfigError`` if it has no effect.

    Returns:
        The configuration, and what it may name as in ``build``: what the user allows or has typed himself.

    Raises:
        ConfigError: A checkpoint outside a run directory without a data set, or an unknown typed key.
        RecordError: The run's configuration cannot be read.
    """
    if run_dir is None:
        if "data" not in typed.groups:
            raise ConfigError(
                f"checkpoint={checkpoint} is not in a run directory (no {CONFIG} there): give "
                "its data set and network with data=... model=..."
            )
        return _composed(command, [], typed, refuse), None
    run = load_run(run_dir)
    kept = [group for group in groups if group not in typed.groups and group in run]
    for group in kept:
        if not isinstance(run[group], DictConfig):
            raise RecordError(
                f"{RunDirectory(run_dir).config}: {group} is not a section; restore it, or move the "
                "checkpoint away"
            )
    choices = _choices(RunDirectory(run_dir).setup().choices, groups)
    chosen = [f"{group}={choice}" for group, choice in choices.items() if group in kept]
    cfg = _composed(command, chosen, typed, refuse)
    values = {key: OmegaConf.select(cfg, key) for key in typed.settings}
    own = [OmegaConf.to_container(cfg[group], resolve=True) for group in typed.groups]
    own += [{leaf: value} for key, value in values.items() if (leaf := key.rpartition(".")[2]) == "_target_"]
    allow = {*allowed(cfg), *targets_in(own)}
    for group in kept:
        target = cfg[group].get("_target_")
        if target == run[group].get("_target_"):
            cfg[group] = OmegaConf.merge(cfg[group], run[group])  # what a run of an older version lacks
        elif f"{group}._target_" not in values:
            cfg[group] = run[group]
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    return cfg, allow


def _composed(
    command: str, choices: Sequence[str], typed: Typed, refuse: Callable[[str], None]
) -> DictConfig:
    """The command's configuration with these choices in the groups.

    Raises:
        ConfigError: A typed key does not exist with these choices, or has no effect on the command.
    """
    without = _compose(command, [*choices, *typed.others])
    overrides = [*choices, *typed.others]
    replaced = []
    for key, text in typed.settings.items():
        section = key.partition(".")[0]
        own = typed.settings.get(f"{section}._target_", "").partition("=")[2]
        if own and own != without[section].get("_target_"):
            replaced.append(section)
            overrides.append(text if text.startswith(("+", "~")) else f"++{text}")
            continue
        if not text.startswith(("+", "~")) and not _has(without, key):
            known = [f"{section}.{name}" for name in flatten(OmegaConf.to_container(without[section]))]  # type: ignore[arg-type]
            raise ConfigError(unknown_key(key, known))
        refuse(key)
        overrides.append(text)
    cfg = _compose(command, overrides) if typed.settings else without
    OmegaConf.set_struct(cfg, False)
    for section in dict.fromkeys(replaced):
        given = {key: OmegaConf.select(cfg, key) for key in typed.settings if key.startswith(f"{section}.")}
        cfg[section] = {}
        for key, value in given.items():
            OmegaConf.update(cfg, key, value)
    return cfg


def _compose(command: str, overrides: Sequence[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(command, list(overrides))
    # in a launcher's worker, which does not know the user's own folders, or before Hydra starts
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    own = [
        hydra_quoted(f"{source.schema}://{source.path}")
        for source in sources
        if source.provider == "command-line" or source.provider.startswith("hydra.searchpath")
    ]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose(command, [*overrides, f"hydra.searchpath=[{','.join(own)}]"])


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether the key exists, even with a null value."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent)
    return isinstance(node, DictConfig) and leaf in node


def _choices(recorded: Mapping[str, str], groups: Collection[str]) -> dict[str, str]:
    """The option that a run chose in each of these groups, if it still exists."""
    # compare names, because a choice such as ../../x would compose a file from somewhere else
    return {
        group: recorded[group]
        for group in groups
        if recorded.get(group) in {file.stem for file in (config_dir() / group).glob("*.yaml")}
    }


# ---------------------------------------------------------------------- runs of other versions


def check_complete(
    run_dir: Path,
    recorded: DictConfig,
    *,
    sections: Collection[str] | None = None,
    given: Collection[str] = (),
    typed: str = "+",
) -> None:
    """Refuse a run whose settings lack a key that a new run with the same choices has.

    Args:
        run_dir: The run.
        recorded: Its settings.
        sections: Those that are needed; None for all.
        given: Keys and sections that the command line sets besides.
        typed: What comes before a key where the command line sets it; empty if it cannot.

    Raises:
        RecordError: Keys are missing; the message names them, the version of the run, and the remedy.
    """
    missing = [key for key in missing_settings(run_dir, recorded, sections) if not is_of(key, list(given))]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        give = f", or give what is missing: {' '.join(f'{typed}{key}=...' for key in missing[:5])}"
        raise RecordError(
            f"{run_dir}: the settings of this run lack {', '.join(missing[:5])}{more}, because another "
            f"version of robustdyn recorded it{_version_of(run_dir)}; train it again, or use that version"
            f"{give if typed else ''}"
        )


def missing_settings(
    run_dir: Path, recorded: DictConfig, sections: Collection[str] | None = None
) -> list[str]:
    """The keys that a new run with the same choices has, and the recorded settings of a run have not.

    ``sections`` are those that are needed; None for all.
    """
    setup = RunDirectory(run_dir).setup()
    groups = [folder.name for folder in sorted(config_dir().iterdir()) if folder.name in recorded]
    chosen = _choices(setup.choices, groups)
    present = _present(tuple(f"{group}={choice}" for group, choice in chosen.items()))
    needed = {key: node for key, node in present.items() if sections is None or key in sections}
    left_out = [text[1:].partition("=")[0] for text in setup.overrides if text.startswith("~")]
    found = _missing(needed, OmegaConf.to_container(recorded, resolve=False))
    return [key for key in found if not is_of(key, left_out)]


@cache
def _present(choices: tuple[str, ...]) -> dict[str, Any]:
    """What a new run with these choices has."""
    composed: Any = OmegaConf.to_container(_compose("train", choices), resolve=False)
    return dict(composed)


def _missing(needed: Mapping[str, Any], recorded: Any, prefix: str = "") -> Iterator[str]:
    """The keys that are only in ``needed``, except in sections of another class and in those left empty."""
    for key, node in needed.items():
        name = f"{prefix}{key}"
        if key not in recorded:
            if prefix.rstrip(".") not in NAMED_FREELY:
                yield name
            continue
        own = recorded[key]
        sections = isinstance(node, dict) and isinstance(own, dict) and bool(own)
        if sections and own.get("_target_") == node.get("_target_"):
            yield from _missing(node, own, f"{name}.")


def _version_of(run_dir: Path) -> str:
    """In brackets, the version and the revision that recorded the run; empty if it does not say."""
    facts = flatten(RunDirectory(run_dir).read_environment() or {})
    known = {"": facts.get("packages.robustdyn"), "revision ": facts.get("code_revision")}
    said = ", ".join(name + " ".join(str(value).split())[:60] for name, value in known.items() if value)
    return f" ({said})" if said else ""
