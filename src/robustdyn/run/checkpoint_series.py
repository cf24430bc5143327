"""Finds the checkpoints of a training: one file, a folder or a pattern, with an epoch for each file."""

import difflib
import glob
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustdyn.errors import ConfigError, DataFileError
from robustdyn.models.weight_files import SUFFIXES, WeightFile, read_weight_file
from robustdyn.records.run_directory import RunDirectory

_MAGIC = re.compile(r"[*?\[]")
# epoch=3, epoch_3, epoch3, ep-3, e3; otherwise a number that ends the name, as in model_3
_EPOCH = re.compile(r"(?:^|[^a-z])(?:epoch|ep|e)[=_-]?(\d+)(?!\d)", re.IGNORECASE)
_LAST_NUMBER = re.compile(r"(?:^|[_.-])(\d+)$")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one epoch.

    Attributes:
        path: The file.
        epoch: The epoch after which it was saved: its entry ``epoch``, else the number in its name.
        step: Optimiser steps taken; None if the file does not say.
        groups: The optimiser's parameter groups, from the file or from a file ``opt*`` of this epoch beside
            it; none if neither has them.
        averaged: Whether the file holds an average of the weights beside the weights that were trained.
    """

    path: Path
    epoch: int
    step: int | None
    groups: Sequence[Mapping[str, Any]]
    averaged: bool


def find_checkpoints(given: str, say: Callable[[str], object]) -> list[Checkpoint]:
    """The checkpoints that a setting names, in the order of their epochs.

    Files of an optimiser alone are not among them, and of a folder only the files that hold weights. A single
    file whose epoch is not known counts as epoch 0.

    Args:
        given: A file, a folder (or run directory), or a pattern such as ``DIR/model_*.pth``.
        say: Told which files of a folder are left out, and why.

    Raises:
        ConfigError: No file was found, two files are of one epoch, or one of several has no epoch.
        DataFileError: A file that was named cannot be read.
    """
    named = not Path(given).is_dir()
    found: list[tuple[int | None, WeightFile]] = []
    for path in _files(given):
        try:
            file = read_weight_file(path)
        except DataFileError as error:
            if named:
                raise
            say(f"left out: {error}")
            continue
        if file.weights:  # which are not kept: there may be hundreds of files
            epoch = _number(path) if file.epoch is None else file.epoch
            found.append((epoch, replace(file, weights={})))
    if not found:
        raise ConfigError(f"checkpoint={given}: no file with weights; give one, or the folder of several")
    chosen: dict[int, Checkpoint] = {}
    for epoch, file in found:
        path, step = file.path, file.step
        if epoch is None and len(found) > 1:
            raise ConfigError(
                f"{path}: neither the file nor its name says its epoch; leave it out with a pattern, such as "
                f"checkpoint='{path.parent}/*_[0-9]*{path.suffix}'"
            )
        here = Checkpoint(path, epoch or 0, step, file.groups, file.averaged)
        other = chosen.setdefault(here.epoch, here)
        if other is not here and (step is None or other.step != step):  # of one step: the last is the best
            raise ConfigError(
                f"{other.path} and {path.name} are both of epoch {epoch}; leave one out with a pattern, such "
                f"as checkpoint='{path.parent}/NAME_*{path.suffix}'"
            )
    beside = _optimisers({(file.path.parent, epoch) for epoch, file in found if not file.groups})
    return [
        replace(one, groups=beside.get((one.path.parent, one.epoch), one.groups))
        for _, one in sorted(chosen.items())
    ]


def _files(given: str) -> list[Path]:
    """The files that were named, in natural order."""
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        folder = RunDirectory(path).checkpoints if RunDirectory(path).checkpoints.is_dir() else path
        return sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
    if _MAGIC.search(given):
        found = glob.glob(given, recursive=True)  # noqa: PTH207 (the pattern may be absolute)
        return sorted(file for file in map(Path, found) if file.is_file())
    names = [file.name for file in path.parent.glob("*") if file.is_file()]
    near = difflib.get_close_matches(path.name, names, n=3)
    remedy = f"did you mean {' or '.join(near)}?" if near else "check the path"
    raise DataFileError(f"checkpoint={path}: no such file; {remedy}")


def _number(path: Path) -> int | None:
    """The epoch in a file's name."""
    stem = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    numbers = _EPOCH.findall(stem) or _LAST_NUMBER.findall(stem)
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 10 else None


def _optimisers(
    wanted: Collection[tuple[Path, int | None]],
) -> dict[tuple[Path, int], Sequence[Mapping[str, Any]]]:
    """The parameter groups in files named ``opt*`` of these folders and epochs."""
    groups = {}
    for folder in {folder for folder, _ in wanted}:
        for path in folder.iterdir():
            number = _number(path)
            if "opt" in path.name and path.name.endswith(SUFFIXES) and number is not None:
                try:
                    if (folder, number) in wanted:
                        groups[folder, number] = read_weight_file(path).groups
                except DataFileError:  # not an optimiser's file: nothing is known from it
                    continue
    return groups
