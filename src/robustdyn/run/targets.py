"""Decides which classes and functions a configuration may name as a ``_target_``.

A command that the user types may name anything that can be imported. A configuration that is read back from a
run directory may be a stranger's. It may name what ``conf/`` itself names for the same section, and what
belongs to a package that the user allows by name on the command line (``allow=[mypackage]``).
"""

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from robustdyn.defaults import config_dir
from robustdyn.errors import ConfigError

BORROWED = {"ensemble": "schedule"}
"""Sections of the configuration that also take the choices of another group."""
UNSAFE = ("hydra", "lightning", "numpy", "omegaconf", "robustdyn", "torch")
"""Packages with functions that can do anything, which no message advises to allow as a whole."""

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def allowed(cfg: DictConfig) -> tuple[str, ...]:
    """The packages and modules that the setting ``allow`` names.

    Raises:
        ConfigError: It is not a list of such names.
    """
    given = OmegaConf.select(cfg, "allow")
    names: Any = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) and _NAME.fullmatch(n) for n in names):
        raise ConfigError(f"allow={names} must be a list of packages or modules, such as [mypackage]")
    return tuple(names)


def check_targets(node: object, key: str, allow: Collection[str] | None) -> None:
    """Refuse targets that must not be called, and those that cannot be imported.

    Args:
        node: A section of a configuration, as plain dictionaries and lists.
        key: Its key, for messages; the first part names the group of ``conf/`` that it belongs to.
        allow: As in ``robustdyn.run.config.build``.

    Raises:
        ConfigError: A target is not allowed or unknown; the message names the key and the remedy.
    """
    if isinstance(node, dict):
        if (target := node.get("_target_")) is not None:
            _check_target(str(target), key, allow)
        for name, child in node.items():
            check_targets(child, f"{key}.{name}", allow)
    elif isinstance(node, list):
        for index, child in enumerate(node):
            check_targets(child, f"{key}[{index}]", allow)


def targets_in(node: object) -> set[str]:
    """All targets of a section, which is given as plain dictionaries and lists."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    found = {target for child in children for target in targets_in(child)}
    return found | ({str(node["_target_"])} if isinstance(node, dict) and "_target_" in node else set())


def imported(target: str, where: str) -> object:
    """The object of this name; the folder where the command was given is searched last.

    Args:
        target: The full name.
        where: Begins the messages.

    Raises:
        ConfigError: There is no such module, or it has no such name, or importing it failed.
    """
    top, _, rest = target.partition(".")
    if not _NAME.fullmatch(target) or not rest:
        raise ConfigError(f"{where} must be a full name, such as mypackage.MyClass")
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        folder = Path(HydraConfig.get().runtime.cwd if HydraConfig.initialized() else Path.cwd())
        if not ((folder / top).is_dir() or (folder / f"{top}.py").is_file()):
            raise ConfigError(
                f"{where}: there is no module {top} on Python's path or in {folder}; install it, or give the "
                "command in the folder that holds it"
            )
        sys.path.append(str(folder))  # last, so that it hides no installed module
    try:
        return _located(target)
    except Exception as error:  # importing runs the user's module, which can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        parent, _, name = target.rpartition(".")
        names = dir(sys.modules[parent]) if parent in sys.modules else []
        close = difflib.get_close_matches(name, names, n=1)
        remedy = f"did you mean {parent}.{close[0]}?" if close else "correct the name or the module"
        raise ConfigError(f"{where}: cannot be imported ({reason}); {remedy}") from error


def _located(target: str) -> object:
    """As Hydra finds it, but without an entry in the log if that fails."""
    parts = target.split(".")
    found: object = importlib.import_module(parts[0])
    for place, name in enumerate(parts[1:], 2):
        try:
            found = getattr(found, name)
        except AttributeError:
            if not isinstance(found, ModuleType) or not hasattr(found, "__path__"):
                raise
            found = importlib.import_module(".".join(parts[:place]))
    return found


def _check_target(target: str, key: str, allow: Collection[str] | None) -> None:
    known = named_in_conf(key.partition(".")[0].partition("[")[0])
    if target in known:
        return
    if allow is None:
        imported(target, f"{key}._target_={target}")
        return
    packages = [name for name in allow if target == name or target.startswith(f"{name}.")]
    if not packages:
        top = target.partition(".")[0]
        unsafe = top in UNSAFE or top in sys.stdlib_module_names or not _NAME.fullmatch(top)
        remedy = "" if unsafe else f"allow=[{top}]"
        raise ConfigError(
            f"{key}._target_={target} is not allowed in a configuration that is read from a run directory; "
            f"allowed are {', '.join(sorted(known)) or 'none of this group'}"
            + (f", and with {remedy} on the command line what that package defines" if remedy else "")
        )
    found = imported(target, f"{key}._target_={target}")
    if target in packages:
        return  # the user named the very object
    # a package also has what it imports: mypackage.os.system must not pass as a part of mypackage
    home = str(getattr(found, "__module__", "")).partition(".")[0]
    if not isinstance(found, type | FunctionType) or home not in {p.partition(".")[0] for p in packages}:
        raise ConfigError(
            f"{key}._target_={target} is not allowed: it is not a class or function that "
            f"{' or '.join(packages)} defines; if you trust the run directory, allow it by its full name, "
            f"allow=[{target}]"
        )


@cache
def named_in_conf(group: str) -> frozenset[str]:
    """The targets that ``conf/`` names for a section.

    They are full names: the prefix ``torch.`` would also allow ``torch.os.system``.
    """
    groups = {group, BORROWED.get(group, group)}
    return frozenset(
        target for sections, targets in _conf_targets() if sections & groups for target in targets
    )


@cache
def _conf_targets() -> list[tuple[set[str], list[str]]]:
    """For each file of ``conf/``, the sections that it may belong to, and its targets."""
    root, found = config_dir(), []
    for file in root.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        package = re.match(r"# @package (\w+)", text)
        sections = {file.relative_to(root).parts[0], *(package.groups() if package else ())}
        found.append((sections, re.findall(r"_target_: *(\S+)", text)))
    return found
