"""Quotes paths on the command line for Hydra, and makes a relative path of a data set absolute."""

import glob
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from robustdyn.records.command_line import quoted
from robustdyn.records.run_directory import RunDirectory
from robustdyn.run.of_checkpoint import load_config

DATA = ("data.root", "data.path")
"""Where a data set is; relative to the folder where the command was given."""
PATHS = ("checkpoint", "output", *DATA, *(f"run.{key}" for key in DATA), "hydra.run.dir", "hydra.sweep.dir")

_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_SWEEP = re.compile(r"(choice|glob|shuffle|sort|tag)\(")


def quoted_paths(arguments: Sequence[str], also: Collection[str] = ()) -> list[str]:
    """The arguments of a command with its paths quoted, because Hydra would parse ``=`` or ``(`` in them.

    ``~`` becomes the home directory, and a relative path of a data set becomes absolute. Text that is already
    quoted keeps its meaning. In a multirun, commas separate the values of a key, except within file names.

    Args:
        arguments: The arguments as they were typed.
        also: Keys of further paths, in addition to those that all commands have.
    """
    several = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)
    found = []
    for argument in arguments:
        name, _, text = argument.partition("=")
        key = name.lstrip("+")
        if key in (*PATHS, *also) and text not in ("", "null") and not (several and _SWEEP.match(text)):
            parts = _parted(text) if several and not key.startswith("hydra.") else [text]
            found.append(f"{name}={','.join(_quoted(key, part) for part in parts)}")
        else:
            found.append(argument)
    return found


def anchor(cfg: DictConfig, folder: str | Path) -> None:
    """Make a relative path of a data set absolute; it is relative to the folder of the command."""
    for key in DATA:
        path = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if path is not None:
            OmegaConf.update(cfg, key, str(Path(folder, Path(str(path)).expanduser())))


def load_run(run_dir: Path) -> DictConfig:
    """The configuration of a run; a relative path of its data is resolved as the run did, if it still exists.

    Raises:
        RecordError: It cannot be read.
    """
    place = RunDirectory(run_dir)
    run, recorded = load_config(place.config), place.hydra_config
    folder = OmegaConf.select(load_config(recorded), "hydra.runtime.cwd") if recorded.is_file() else None
    paths = [OmegaConf.select(run, key, throw_on_resolution_failure=False) for key in DATA]
    if folder is not None and any(path and Path(str(folder), str(path)).exists() for path in paths):
        anchor(run, str(folder))
    return run


def _parted(text: str) -> list[str]:
    """Split at commas, except in quotes and in names of existing files and patterns that match some."""
    parts = re.findall(rf"(?:{_QUOTED}|[^,])+", text)
    found = []
    while parts:
        joined = (",".join(parts[:n]) for n in range(len(parts), 0, -1))
        found.append(next((name for name in joined if _is_there(name)), parts[0]))
        parts = parts[found[-1].count(",") + 1 :]
    return found


def _is_there(name: str) -> bool:
    path = str(Path(name).expanduser())
    return Path(path).exists() or bool(glob.glob(path))  # noqa: PTH207 (the pattern may be absolute)


def _quoted(key: str, text: str) -> str:
    if re.fullmatch(_QUOTED, text):
        try:
            text = str(OverridesParser.create().parse_override(f"{key}={text}").value())
        except HydraException:
            return text  # Hydra will say what is wrong with it
    if text.startswith("~"):
        text = str(Path(text).expanduser())
    if key.endswith(DATA) and not text.startswith("${"):
        text = str(Path(text).absolute())
    return quoted(text)
