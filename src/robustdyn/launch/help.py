"""Prints ``--help``: the groups that a command uses, and its settings with the comments from ``conf/``."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from robustdyn.defaults import config_dir

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.]+):(?P<rest>.*)")


def show_help(command: str) -> None:
    """Print the help of a Hydra command and exit, if ``sys.argv`` asks for it.

    It imports nothing slow, and unlike Hydra's own help it does not list every choice of every group. If the
    arguments do not compose it returns, because the command itself then says what is wrong with them.
    """
    if {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        return
    register_help()
    typed, _ = get_args_parser().parse_known_args()
    overrides = typed.overrides
    if typed.config_dir:
        overrides.append(f"hydra.searchpath=['file://{Path(typed.config_dir).absolute()}']")
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = hydra.compose(command, overrides, return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            print(Template(cfg.hydra.help.template).substitute())  # as in Hydra
    except HydraException:
        return
    sys.exit(0)


def register_help() -> None:
    """Register the resolvers that the templates in ``conf/hydra/help`` use.

    ``help_groups`` gives a line for each group of the command, with its choices. ``help_settings`` gives the
    settings of the command that is named.
    """
    OmegaConf.register_new_resolver("help_groups", _groups, replace=True)
    OmegaConf.register_new_resolver("help_settings", _settings, replace=True)


def _groups(_root_: DictConfig) -> str:
    """One line for each group that the command uses, without groups that follow the choice of another."""
    commands = "".join(path.read_text(encoding="utf-8") for path in config_dir().glob("*.yaml"))
    following = set(re.findall(r"(?m)^ +- optional (\w+):", commands))
    used = {_group(name) for name in _root_.hydra.runtime.choices} - {""} - following
    choices: dict[str, set[str]] = {}
    for source in _folders(_root_):
        for path in source.rglob("*.yaml"):
            choices.setdefault(path.parent.relative_to(source).as_posix(), set()).add(path.stem)
    return "\n".join(
        f"{group}: {', '.join(sorted(choices[group]))}"
        for group in sorted(choices)
        if group in used or group.rpartition("/")[0] in used
    )


def _settings(command: str, _root_: DictConfig) -> str:
    """The composed configuration as YAML, each line with the comment from the file that sets its value."""
    comments = dict(_comments(config_dir() / f"{command}.yaml", ""))
    for name, choice in _root_.hydra.runtime.choices.items():
        group, _, package = name.partition("@")
        found = [path for folder in _folders(_root_) if (path := folder / group / f"{choice}.yaml").is_file()]
        if _group(name) and choice is not None and found:
            path = found[0]
            told = re.match(r"# @package (\S+)", path.read_text(encoding="utf-8"))
            place = package or (told.group(1) if told else group.replace("/", "."))
            comments.update(_comments(path, "" if place == "_global_" else f"{place}."))
    shown = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key != "hydra"])
    lines = [
        f"{line}  # {comments[key]}" if key in comments else line
        for key, line in _keys(OmegaConf.to_yaml(shown, resolve=False))
    ]
    return "\n".join(lines).replace("$", "$$")  # because the text is used as a template


def _folders(_root_: DictConfig) -> list[Path]:
    """The folders of settings: ours, and those that the user names."""
    return [Path(source.path) for source in _root_.hydra.runtime.config_sources if source.schema == "file"]


def _group(name: str) -> str:
    return "" if name.startswith("hydra/") else name.partition("@")[0]


def _comments(path: Path, prefix: str) -> Iterator[tuple[str, str]]:
    for key, line in _keys(path.read_text(encoding="utf-8")):
        comment = re.search(r"\s#\s*(.*)", line)
        if key and comment is not None:
            yield prefix + key, comment.group(1)


def _keys(text: str) -> Iterator[tuple[str, str]]:
    """Every line with its dotted key; the key is empty if the line does not begin a setting."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is None:
            yield "", line
            continue
        indent = len(found["indent"])
        above = [(i, key) for i, key in above if i < indent] + [(indent, found["key"])]
        yield ".".join(key for _, key in above), line
