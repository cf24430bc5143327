"""Composes the branches of ``robustdyn-fork``: the settings of a checkpoint's run, and those typed.

Every checkpoint's run becomes an option of the group ``trunk``, so that a sweep can start from several.
"""

import difflib
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import ChoiceSweep
from omegaconf import DictConfig, OmegaConf

from robustdyn.errors import ConfigError
from robustdyn.launch.resume import (
    keep_schedule,
    literal,
    own_hydra,
    recorded_choices,
    recorded_settings,
    replaced_group,
    typed_settings,
)
from robustdyn.records.run_directory import RunDirectory
from robustdyn.run.forking import fork_point
from robustdyn.run.of_checkpoint import checkpoint_of, required_run_of

COMPOSED = "forked"
"""The name under which Hydra finds the configuration of the branches."""
TRUNK = "trunk"
OWN_GROUPS = ("branch", "experiment", "sweep_folder")
"""Groups that a branch chooses itself."""
_EXAMPLE = "checkpoint=RUN/checkpoints/epoch=024.ckpt"
_MAGIC = re.compile(r"[*?\[]")


def forked(name: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """What Hydra has to compose.

    Args:
        name: The command's own configuration, for ``--help``.
        arguments: The arguments of the command, with quoted paths.

    Returns:
        The name of the configuration of the branches, and the other arguments. Several checkpoints are swept.

    Raises:
        ConfigError: There is no such checkpoint, or it is in no run directory; its run names a class that is
            not allowed; or an argument does not go with a branch.
        UserError: A file cannot be read.
    """
    keys = [text.lstrip("+").partition("=")[0] for text in arguments]
    given = [text for text, key in zip(arguments, keys, strict=True) if key == "checkpoint"]
    if not given:
        raise ConfigError(f"checkpoint is not given; give {_EXAMPLE}")
    if "resume" in keys:
        raise ConfigError(
            "robustdyn-fork begins new runs; robustdyn-train resume=DIR continues the run in DIR"
        )
    rest = [text for text, key in zip(arguments, keys, strict=True) if key not in ("checkpoint", "allow")]
    typed = typed_settings(rest)
    trunks: dict[str, Path] = {}
    configs = []
    for path in _files(given[-1]):
        run = RunDirectory(required_run_of(path))
        label = re.sub(r"[^\w.-]+", "_", f"{run.path.name}_{path.stem}").strip("_")
        if label in trunks:
            raise ConfigError(
                f"{trunks[label]} and {path} would share the name {label}; give them to two commands"
            )
        trunks[label] = path
        checkpoint = fork_point(path)
        recorded = recorded_settings(run, checkpoint["config"], arguments)
        keep_schedule(recorded, typed)
        recorded.name = f"{str(checkpoint['config'].get('name', 'run')).removesuffix('_fork')}_fork"
        recorded.resume = "same"
        recorded.fork = {"path": literal(str(path)), "epoch": checkpoint["epoch"] + 1}
        configs.append(recorded)
    rest = [text if text.partition("=")[0] in OWN_GROUPS else replaced_group(configs, text) for text in rest]
    for label, path, recorded in zip(trunks, trunks.values(), configs, strict=True):
        _store(label, recorded, RunDirectory(required_run_of(path)))
    ConfigStore.instance().store(COMPOSED, _primary(next(iter(trunks))))
    if len(trunks) > 1:
        rest = ["--multirun", *(text for text in rest if text not in ("-m", "--multirun"))]
        rest.append(f"{TRUNK}={','.join(trunks)}")
    return COMPOSED, rest


def _files(given: str) -> list[Path]:
    """The checkpoints that an argument names: a file, a pattern, or several of these in a sweep.

    Raises:
        ConfigError: It is no list of files and patterns, or a pattern matches nothing.
        DataFileError: There is no such file.
    """
    if given.partition("=")[2].startswith(("glob(", "range(", "interval(")):
        raise ConfigError(
            f"{given}: Hydra's functions do not see files; quote a pattern instead, such as "
            "checkpoint='DIR/*/checkpoints/epoch=024.ckpt'"
        )
    (override,) = typed_settings([given])
    given_value = override.value()
    values = given_value.list if isinstance(given_value, ChoiceSweep) else [given_value]
    found = []
    for value in values:
        text = str(getattr(value, "text", value))
        if Path(text).exists() or not _MAGIC.search(text):
            found.append(checkpoint_of(OmegaConf.create({"checkpoint": literal(text)})).absolute())
            continue
        matches = sorted(Path(name).absolute() for name in glob.glob(text, recursive=True))  # noqa: PTH207
        if not matches:
            raise ConfigError(f"checkpoint={text}: {_nearest(text)}")
        found += matches
    return list(dict.fromkeys(found))


def _nearest(pattern: str) -> str:
    """What a pattern that matches no file may have meant."""
    folder, _, name = pattern.rpartition("/")
    others = sorted({Path(path).name for path in glob.glob(f"{folder or '.'}/*")})  # noqa: PTH207
    near = difflib.get_close_matches(name, others, n=3) or others[:3]
    there = f"there are {', '.join(near)}" if near else f"there is nothing in {folder or '.'}"
    return f"matches no file; {there}"


def _store(label: str, recorded: DictConfig, run: RunDirectory) -> None:
    """Make a run's settings, and the options it chose, an option of the group ``trunk``."""
    sections: Any = OmegaConf.to_container(recorded, resolve=False)
    sections["hydra"] = {"runtime": {"choices": recorded_choices(run)}}
    ConfigStore.instance().store(name=label, group=TRUNK, node=sections, package="_global_")


def _primary(label: str) -> dict[str, Any]:
    """The configuration from which Hydra starts."""
    files = [{f"override hydra/{group}": "robustdyn"} for group in ("help", "job_logging")]
    own = [{"branch": "unchanged"}, {"sweep_folder": "dated"}, {"experiment": None}]
    return {"defaults": ["_self_", {TRUNK: label}, *own, *files], "hydra": own_hydra()}
