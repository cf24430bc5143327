"""Labels runs by the few settings in which they differ, with the keys used on the command line.

Labels come from the composed configurations alone. Settings that only follow from another one (everything
that ``method=awp`` implies) are left out, unless somebody typed them on the command line. Settings that say
where files go or which job ran are always left out.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = "seed"
_IGNORED_SECTIONS = {"experiment_name", "hydra", "logger", "name", "paths", "report", "resume", "trunk"}
_IGNORED_LEAVES = re.compile(r"(^|[._])(dir|path|root|file|folder|output|job|id|num_workers|progress_bar)$")


@dataclass(frozen=True)
class Setup:
    """What a run directory says about how the run was made.

    Attributes:
        path: The run directory.
        config: The composed configuration as a plain dict.
        overrides: The arguments typed on the command line, as Hydra recorded them.
        choices: The option chosen in each config group (``{"method": "awp"}``), as far as recorded.
        derived: Dotted keys whose value follows from another key's (``data.seed: ${seed}``).
    """

    path: Path
    config: Mapping[str, Any]
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    derived: frozenset[str]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Leaves of a nested configuration under dotted keys; a list is one leaf."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def format_value(value: object) -> str:
    """A setting as text: ``8``, ``0.0005``, ``[30,36]``, ``none``."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(format_value(item) for item in value) + "]"
    return str(value)


def differences(setups: Sequence[Setup]) -> dict[str, list[object]]:
    """The leaves of the configurations that differ between runs, except those that follow from another key.

    Returns:
        Dotted key -> its value in each run (``None`` where a run has no such key).
    """
    flats = [flatten(setup.config) for setup in setups]
    own = [{k: v for k, v in f.items() if k not in s.derived} for f, s in zip(flats, setups, strict=True)]
    keys = [key for key in _ordered_union(own) if not _ignored(key)]
    return {k: [f.get(k) for f in flats] for k in keys if len({format_value(f.get(k)) for f in flats}) > 1}


def changes(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """The settings that changed, as in ``eps=0.1 (now 0.2), seed=0 (now 1)``."""
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return ", ".join(change(key, old.get(key), new.get(key)) for key in keys)


def change(key: str, old: object, new: object, *, longest: int = 40) -> str:
    """One change as in ``eps=0.1 (now 0.2)``, with at most ``longest`` characters of each value."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (old, new)]
    before, now = (text if len(text) <= longest else f"{text[: longest - 3]}..." for text in texts)
    return f"{key}={before} (now {now})"


def distinguishing(setups: Sequence[Setup]) -> dict[str, list[object]]:
    """The settings that tell the runs apart: typed ones and seeds, then others that these do not imply.

    Returns:
        Setting (a config group or a dotted key) -> its value in each run (``None`` where absent).
    """
    if len(setups) < 2:
        return {}
    choices = [_choices(setup) for setup in setups]
    candidates: dict[str, list[object]] = {
        key: [choice.get(key) for choice in choices]
        for key in _ordered_union(choices)
        if len({choice.get(key) for choice in choices}) > 1
    }
    candidates.update(differences(setups))
    typed = {_override_key(text) for setup in setups for text in setup.overrides} | {SEED}
    selected = [key for key in candidates if key in typed]
    for key, values in candidates.items():
        if key not in selected and not _implied(values, [candidates[k] for k in selected]):
            selected.append(key)
    selected.sort(key=lambda key: key == SEED)
    return {key: candidates[key] for key in selected}


def labels(setups: Sequence[Setup], without: Iterable[str] = ()) -> list[str]:
    """One label for each run, such as ``method=awp seed=0``.

    Args:
        setups: The runs to tell apart.
        without: Settings to leave out (the seed, for the label of a group of runs).

    Returns:
        Labels in the runs' order. Runs with equal settings also get the name of their directory, and a single
        run is named after its directory, unless ``without`` is given.
    """
    dropped = set(without)
    facts = {key: values for key, values in distinguishing(setups).items() if key not in dropped}
    texts = [_text({key: values[i] for key, values in facts.items()}) for i in range(len(setups))]
    if dropped:
        return texts
    names = _directory_names([setup.path for setup in setups])
    return [
        text if text and texts.count(text) == 1 else f"{text} ({name})" if text else name
        for text, name in zip(texts, names, strict=True)
    ]


def _text(facts: Mapping[str, object]) -> str:
    """``key=value`` pairs; settings that the run does not have are left out, unless it has none of them."""
    said = {key: value for key, value in facts.items() if value is not None} or facts
    return " ".join(f"{key}={format_value(value)}" for key, value in said.items())


def _choices(setup: Setup) -> dict[str, object]:
    """The option chosen in each group: as Hydra recorded it, otherwise the section's ``name`` or class."""
    picked: dict[str, object] = {}
    for key, value in setup.config.items():
        if isinstance(value, Mapping):
            name = value.get("name", value.get("_target_"))
            picked[key] = str(name).rpartition(".")[2] if name is not None else None
    picked.update({k: v for k, v in setup.choices.items() if k.partition("/")[0] not in _IGNORED_SECTIONS})
    return {key: value for key, value in picked.items() if key not in _IGNORED_SECTIONS}


def _override_key(text: str) -> str:
    """``method`` from ``+method=awp``."""
    return text.lstrip("+~").partition("=")[0].partition("@")[0]


def _implied(values: Sequence[object], selected: Sequence[Sequence[object]]) -> bool:
    """Whether runs that agree in all selected settings also agree in this one."""
    seen: dict[tuple[str, ...], str] = {}
    for i, value in enumerate(values):
        state = tuple(format_value(column[i]) for column in selected)
        if seen.setdefault(state, format_value(value)) != format_value(value):
            return False
    return True


def _ignored(key: str) -> bool:
    """Whether a key only says where files are or which job ran."""
    return key.partition(".")[0] in _IGNORED_SECTIONS or _IGNORED_LEAVES.search(key) is not None


def _ordered_union(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _directory_names(paths: Sequence[Path]) -> list[str]:
    """Each directory's name, or its path below the common parent where names repeat."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(paths)
    return [path.relative_to(common).as_posix() for path in paths]
