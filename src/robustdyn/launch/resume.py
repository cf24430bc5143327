"""Continues a run by ``robustdyn-train resume=DIR``: with the run's own settings, and what is typed besides.

The run's configuration becomes the one from which Hydra starts, so that typed settings have their usual
meaning. It may be a stranger's: its targets are checked, and nothing in it is looked up on this machine.
"""

import difflib
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError, RecordError
from robustdyn.launch.of_run import check_complete
from robustdyn.records.command_line import at
from robustdyn.records.labels import flatten
from robustdyn.records.progress import is_of
from robustdyn.records.run_directory import CONFIG, MULTIRUN, RunDirectory
from robustdyn.records.untrusted import read_config
from robustdyn.run.checkpointing import last_checkpoint, restore_hydra_files
from robustdyn.run.log import IN_FILE_ONLY
from robustdyn.run.status import say
from robustdyn.run.targets import allowed, check_targets

_log = logging.getLogger(__name__)
_unlogged: list[str] = []

COMPOSED = "resumed"
"""The name under which Hydra finds the configuration of the run that continues."""
LENGTH = "trainer.max_epochs"
KEPT = ("attack", "data", "model", "trainer")
"""Groups whose choices would replace the run's length, network or images."""
_REMEDY = "restore it, or give the run's own command again with hydra.run.dir"
_NOT_A_DIRECTORY = ("same", "changed", None)


def resumed(name: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """What Hydra has to compose.

    Args:
        name: The command's own configuration.
        arguments: The arguments of the command, with quoted paths.

    Returns:
        With ``resume=DIR`` the name of the run's configuration, and the other arguments; else what was given.

    Raises:
        ConfigError: DIR is no run that can continue, its configuration names a class that is not allowed, or
            an argument does not go with ``resume=DIR``.
        UserError: A file of the run cannot be read.
    """
    given = _given(arguments, "resume")
    override = OverridesParser.create().parse_override(given[-1]) if given else None
    if override is None or (not override.is_sweep_override() and override.value() in _NOT_A_DIRECTORY):
        if _given(arguments, "allow"):
            raise ConfigError("allow goes with resume=DIR: a command that you type may name any class")
        return name, list(arguments)
    if override.is_sweep_override() or not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments):
        raise ConfigError(
            "resume=DIR continues one run; a sweep continues when its own command is given again with "
            "hydra.sweep.dir=DIR"
        )
    if any(is_of(text, ["hydra.run.dir"]) for text in arguments):
        raise ConfigError("resume=DIR continues the run in DIR; leave out hydra.run.dir")
    run = _run(Path(str(override.value())).absolute())
    rest = [text for text in arguments if text not in given]
    recorded = recorded_settings(run, _last_settings(run), rest)
    recorded.resume = "changed"
    rest = [text for text in rest if text not in _given(rest, "allow")]
    typed = typed_settings(rest)
    _unlogged.clear()
    notes = [f"{run.path}: continues with its own settings"]
    changes = [_change(recorded, one) for one in typed if not one.is_hydra_override()]
    if changes:
        notes.append(f"changed: {'; '.join(changes)}")
    if kept := keep_schedule(recorded, typed):
        notes.append(f"kept, although {LENGTH} changed: {'; '.join(kept)}; give them to change them")
    arguments = [replaced_group([recorded], text) for text in rest]
    ConfigStore.instance().store(COMPOSED, _primary(recorded, run, typed))
    for note in notes:
        say(note, sys.stderr)
    _unlogged.extend(notes)
    return COMPOSED, arguments


def _given(arguments: Sequence[str], key: str) -> list[str]:
    return [text for text in arguments if re.match(rf"\+{{0,2}}{key}=", text)]


def typed_settings(arguments: Sequence[str]) -> list[Override]:
    """The arguments that set something, parsed.

    Raises:
        HydraException: One cannot be read.
    """
    parser = OverridesParser.create()
    return [parser.parse_override(text) for text in arguments if re.match(r"[+~]*[\w./@]+=", text)]


def log_changes() -> None:
    """Write into the run's log what ``resumed`` has said, which is before Hydra sets up the log."""
    for note in _unlogged:
        _log.info(note, extra=IN_FILE_ONLY)
    _unlogged.clear()


# ---------------------------------------------------------------------- the run


def _run(path: Path) -> RunDirectory:
    run, where = RunDirectory(path), at("resume", path)
    if run.config.is_file():
        return run
    if not path.exists():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=3
        )
        remedy = " or ".join(str(path.parent / name) for name in near)
        raise ConfigError(f"{where}: no such directory; {f'did you mean {remedy}?' if near else 'check it'}")
    for parent in path.parents[:3]:
        if RunDirectory(parent).config.is_file():
            raise ConfigError(f"{where} lies in a run directory; give {at('resume', parent)}")
    below = [file.parent.parent for depth in range(1, 4) for file in path.glob("*/" * depth + str(CONFIG))]
    if not below:
        raise ConfigError(f"{where} is not a run directory (no {CONFIG} in it); give the folder of a run")
    some = ", ".join(at("resume", found) for found in below[:3]) + (", ..." if len(below) > 3 else "")
    sweep = (
        f"; the whole sweep continues when its own command is given with {at('hydra.sweep.dir', path)}"
        if (path / MULTIRUN).is_file()
        else ""
    )
    raise ConfigError(f"{where} holds {len(below)} runs; give one of them: {some}{sweep}")


def _last_settings(run: RunDirectory) -> object:
    """The settings that the run was last trained with.

    Raises:
        UserError: A file cannot be read.
    """
    checkpoint = last_checkpoint(run)
    if checkpoint is not None:
        restore_hydra_files(checkpoint, run)
        return checkpoint["config"]
    return (run.read_status() or {}).get("settings")  # killed before the first checkpoint


def recorded_settings(run: RunDirectory, settings: object, arguments: Sequence[str]) -> DictConfig:
    """The run's configuration, with these values.

    Interpolations to other keys are kept, so that settings still follow those that are typed. Whatever else
    determined a value, such as an environment variable, has no effect any more.

    Args:
        run: The run.
        settings: The values, without interpolations.
        arguments: Those of the command, which may set what the run lacks; ``allow=[...]`` names the classes
            that the run may name besides ours.

    Raises:
        RecordError: The run recorded no settings, they cannot be read, or they lack what this version needs.
        ConfigError: They name a class that is not allowed.
    """
    if not isinstance(settings, dict) or not settings:
        raise RecordError(f"{run.path}: no checkpoint and no record of its settings; {_REMEDY}")
    recorded = read_config(run.config, _REMEDY)
    for reserved in ("defaults", "hydra", "allow"):
        recorded.pop(reserved, None)
    for key, section in settings.items():  # another choice of a group has other keys
        if isinstance(section, dict) and section.get("_target_") != _target(recorded, key):
            recorded[key] = literal(section)
    for key, value in flatten(settings).items():
        try:
            same = _plain(recorded, key) == value
        except OmegaConfBaseException:
            same = False
        if not same:
            OmegaConf.update(recorded, key, literal(value), force_add=True)
    granted = _given(arguments, "allow")
    allow = OverridesParser.create().parse_override(granted[-1]).value() if granted else []
    for key, section in OmegaConf.to_container(recorded, resolve=False).items():  # type: ignore[union-attr]
        check_targets(section, str(key), allowed(OmegaConf.create({"allow": allow})))
    check_complete(run.path, recorded, given=[one.key_or_group for one in typed_settings(arguments)])
    return recorded


def _target(recorded: DictConfig, key: str) -> object:
    return OmegaConf.select(recorded, f"{key}._target_", throw_on_resolution_failure=False)


def literal(value: Any) -> Any:
    """A value in which nothing is an interpolation."""
    if isinstance(value, dict):
        return {key: literal(child) for key, child in value.items()}
    if isinstance(value, list):
        return [literal(child) for child in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _plain(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


# ---------------------------------------------------------------------- what is typed


def _change(recorded: DictConfig, typed: Override) -> str:
    """``optimizer.lr=0.05 (was 0.1)``."""
    key, text = typed.key_or_group, (typed.input_line or "").lstrip("+")
    node = OmegaConf.select(recorded, key, throw_on_resolution_failure=False)
    return text if node is None or isinstance(node, DictConfig) else f"{text} (was {_plain(recorded, key)})"


def keep_schedule(recorded: DictConfig, typed: Sequence[Override]) -> list[str]:
    """Fix the settings that follow from the run's length at the run's values, if the length is typed.

    A run that is extended has its decays behind it; they must not move.

    Returns:
        The settings that would have another value.
    """
    given = [one for one in typed if one.key_or_group == LENGTH]
    if not given:
        return []
    length = list(given[-1].sweep_iterator())[-1] if given[-1].is_sweep_override() else given[-1].value()
    longer = recorded.copy()
    OmegaConf.update(longer, LENGTH, length)
    raw: Any = OmegaConf.to_container(recorded, resolve=False)
    follow = [
        key for key, text in flatten(raw).items() if re.search(r"\$\{.*\b" + re.escape(LENGTH), str(text))
    ]
    values = {key: (_plain(recorded, key), _plain(longer, key)) for key in follow}
    for key, (old, _) in values.items():
        OmegaConf.update(recorded, key, literal(old))
    keys = {one.key_or_group for one in typed}
    return [
        f"{key}={old} (in a new run {new})"
        for key, (old, new) in values.items()
        if old != new and key not in keys
    ]


def replaced_group(recorded: Sequence[DictConfig], text: str) -> str:
    """Let a typed choice of a group, such as ``logger=wandb``, replace that section of the runs.

    Raises:
        ConfigError: The group is a preset of other groups, or has settings that the run must keep.
    """
    key, equals, choice = text.partition("=")
    if not equals or not re.fullmatch(r"\w+", key) or not (config_dir() / key).is_dir():
        return text
    if key in KEPT or any(key not in one for one in recorded):
        raise ConfigError(
            f"{text} would replace settings that the continued run keeps; give those of {choice} one by "
            "one, such as trainer.devices=2"
        )
    for one in recorded:
        del one[key]
    return f"+{text}"


def _primary(recorded: DictConfig, run: RunDirectory, typed: Sequence[Override]) -> dict[str, Any]:
    """The configuration from which Hydra starts."""
    ours = own_hydra()
    ours["run"]["dir"] = literal(str(run.path))
    keys = [str(one.key_or_group) for one in typed]
    earlier = run.setup().overrides
    ours["overrides"] = {"task": [literal(text) for text in earlier if not is_of(text, [*keys, "resume"])]}
    ours["runtime"] = {"choices": recorded_choices(run)}
    sections: Any = OmegaConf.to_container(recorded, resolve=False)
    defaults = [{f"override hydra/{group}": "robustdyn"} for group in ("help", "job_logging")]
    return {"defaults": ["_self_", *defaults], **sections, "hydra": ours}


def own_hydra() -> dict[str, Any]:
    """What ``conf/train.yaml`` sets of Hydra's own configuration."""
    ours: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "train.yaml").hydra, resolve=False)
    return dict(ours)


def recorded_choices(run: RunDirectory) -> dict[str, str]:
    """The options that the run chose, by their groups."""
    chosen = run.setup().choices.items()
    return {group: literal(choice) for group, choice in chosen if not group.startswith("hydra/")}
