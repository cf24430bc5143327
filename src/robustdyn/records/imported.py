"""Turns runs that other programs logged into run directories, with their settings under our keys."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robustdyn.errors import RecordError
from robustdyn.records.files import file_digest
from robustdyn.records.progress import RunStatus
from robustdyn.records.reader import read_table
from robustdyn.records.run_directory import RunDirectory
from robustdyn.records.schema import TRAIN_ROBUST_LOSS
from robustdyn.records.training_logs import AWP, ROBUST_OVERFITTING, LoggedRun, with_gaps
from robustdyn.records.writer import RunRecords, summarise

DATA_SETS = {"cifar100": "CIFAR100", "cifar10": "CIFAR10", "svhn": "SVHN"}
"""The data sets that are found in a run's name, and their classes."""
NORMS = {"l_inf": "linf", "linf": "linf", "l_2": "l2", "l2": "l2"}
ATTACKS = ("pgd", "fgsm", "none")
UNITS = "losses in nats, errors as fractions (an accuracy a is recorded as the error 1 - a)"

_SCRIPTS = (ROBUST_OVERFITTING, AWP)
_VALIDATION_SIZE = 1000  # of Rice et al., ICML 2020; their logs say only whether images were held out
_OBJECTIVES = ("robustdyn.methods.AdversarialCrossEntropy", "robustdyn.methods.CrossEntropy")
_FOLDER = re.compile(r"[\w()+=,@-][\w()+=,.@ -]*")
"""A part of a run's name: no hidden folder, no way out of the output, no interpolation."""


def write_runs(runs: Sequence[LoggedRun], output: Path, data: str | None = None) -> list[Path]:
    """Write a run directory for each run, ``output/STUDY/NAME``: all of them or none.

    Args:
        runs: As ``robustdyn.records.training_logs.read_logs`` returns them.
        output: Where to; made if absent.
        data: The data set, where names do not say it.

    Returns:
        The run directories, in the runs' order.

    Raises:
        RecordError: A setting cannot be used, a directory is there already or would lie in another one, or
            ``output`` cannot be written.
    """
    places = _places(runs, output)
    configs = [_config(run, data) for run in runs]
    stage = output / f".importing-{os.getpid()}"
    moved: list[Path] = []
    try:
        for run, place, (config, choices) in zip(runs, places, configs, strict=True):
            _write(run, stage / place.relative_to(output), config, choices)
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            (stage / place.relative_to(output)).rename(place)
            moved.append(place)
    except OSError as error:
        for place in moved:
            shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{output}: cannot write ({error.strerror}); pick another --output") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return places


def _places(runs: Sequence[LoggedRun], output: Path) -> list[Path]:
    """The directory of each run."""
    places: dict[Path, LoggedRun] = {}
    for run in runs:
        parts = [run.study, *run.name.split("/")]
        if not all(_FOLDER.fullmatch(part) for part in parts):
            raise RecordError(
                f"{run.file}: {'/'.join(parts)[:100]!r} cannot name a folder; name study and run with "
                "letters, digits and ()+=,.@-, and slashes between folders"
            )
        place = output.joinpath(*parts)
        if place in places:
            raise RecordError(
                f"{run.file}: {places[place].file} has a run {'/'.join(parts)} too; import them into "
                "different folders, or give the folder that both are in"
            )
        places[place] = run
    for place, run in places.items():
        outer = next((path for path in place.parents if path in places), None)
        if outer is not None:
            raise RecordError(f"{run.file}: run {run.name} would lie in run {places[outer].name}; rename one")
        if place.exists():
            raise RecordError(f"{place}: is there already; delete it, or choose another --output")
        held = next((path for path in place.parents if RunDirectory(path).config.is_file()), None)
        if held is not None:
            raise RecordError(f"{held}: is a run itself; choose another --output")
    return list(places)


def _write(run: LoggedRun, path: Path, config: dict[str, Any], choices: Mapping[str, str]) -> None:
    directory = RunDirectory(path)
    directory.hydra.mkdir(parents=True)
    # JSON is YAML
    directory.config.write_text(json.dumps(config, indent=1), encoding="utf-8")
    chosen = {"hydra": {"runtime": {"choices": choices}}}
    directory.hydra_config.write_text(json.dumps(chosen, indent=1), encoding="utf-8")
    records = RunRecords(path)
    records.extend("epochs", _comparable(run, config))
    records.write_summary(summarise(read_table(path, "epochs")))
    told = {
        "imported": {
            "source": run.study,
            "run": run.name,
            "file": run.file.name,
            "kind": run.kind,
            "sha256": file_digest(run.file),
            "units": UNITS,
        }
    }
    directory.environment.write_text(json.dumps(told, indent=1), encoding="utf-8")
    RunStatus(path, config).done()


def _comparable(run: LoggedRun, config: Mapping[str, Any]) -> list[Mapping[str, float | None]]:
    """The epochs without the numbers that are not what their columns say.

    Without an attack nothing is robust, and the scripts add the l1 penalty to the robust loss in training.
    """
    dropped: list[str] = []
    if run.arguments.get("attack") == "none":
        dropped = [name for name in run.epochs[0] if "robust" in name]
    elif run.study in _SCRIPTS and config.get("regularizer", {}).get("l1"):
        dropped = [TRAIN_ROBUST_LOSS]
    return [with_gaps({**row, **dict.fromkeys(dropped)}) for row in run.epochs] if dropped else [*run.epochs]


# ---------------------------------------------------------------------- settings


class _Arguments:
    """The settings of a run as text, read as what they are."""

    def __init__(self, run: LoggedRun) -> None:
        self._given, self._at = run.arguments, run.arguments_at

    def number(self, key: str) -> float | None:
        """The number called ``key``; None where it was not logged.

        Raises:
            RecordError: It is none.
        """
        if key not in self._given:
            return None
        try:
            value = float(self._given[key])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise RecordError(f"{self._at}: {key}={self._given[key][:40]!r} is not a number")
        return int(value) if value.is_integer() else value

    def name(self, key: str) -> str | None:
        """The name called ``key``, which is one word; None where it was not logged."""
        text = self._given.get(key)
        if text is not None and not re.fullmatch(r"[\w.+-]{1,60}", text):
            raise RecordError(f"{self._at}: {key}={text[:40]!r} is not a name")
        return text

    def one_of(self, key: str, known: Mapping[str, str]) -> str | None:
        """What the name called ``key`` stands for."""
        text = self.name(key)
        if text is not None and text not in known:
            raise RecordError(f"{self._at}: {key}={text}; known are {', '.join(known)}")
        return None if text is None else known[text]


def _config(run: LoggedRun, data: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings under our keys, and the options that they amount to."""
    given = _Arguments(run)
    attack = given.one_of("attack", dict(zip(ATTACKS, ATTACKS, strict=True)))
    gamma = given.number("awp_gamma") or given.number("awp_size")
    schedule, drop = given.name("lr_schedule"), given.number("lr_drop_epoch")
    l2 = given.number("l2")
    data_set = _data_set(run, given.name("data") or data)
    once = schedule == "onedrop"
    sections: dict[str, Any] = {
        "data": {
            "_target_": f"robustdyn.data.{data_set}" if data_set in DATA_SETS.values() else data_set,
            "batch_size": given.number("batch_size"),
            "validation_size": _VALIDATION_SIZE if run.arguments.get("val") == "True" else None,
            "augment": _known({"cutout": given.number("cutout_len")}),
            "mixup": given.number("mixup_alpha"),
        },
        "model": _model(run, given),
        "attack": _attack(given, attack),
        "objective": {"_target_": _OBJECTIVES[attack == "none"]} if attack else {},
        "perturbation": {
            "_target_": "robustdyn.methods.AWP",
            "gamma": gamma,
            "warmup_epochs": given.number("awp_warmup"),
        }
        if gamma
        else {},
        "regularizer": {"l1": given.number("l1") or None, "weight_decay_on": "weights" if l2 else None},
        "optimizer": {
            "_target_": "torch.optim.SGD" if run.study in _SCRIPTS else None,
            "lr": given.number("lr_max"),
            "weight_decay": l2 or given.number("weight_decay"),
        },
        "schedule": {
            "name": schedule,
            "milestones": [drop] if once and drop else None,
            "lr_one_drop": given.number("lr_one_drop") if once else None,
        },
        "trainer": {"max_epochs": given.number("epochs") or 1 + int(run.epochs[-1]["epoch"] or 0)},
    }
    known = {name: _known(section) for name, section in sections.items()}
    config = {"name": run.name, "source": {"study": run.study}, "seed": given.number("seed") or 0}
    method = "standard" if attack == "none" else "awp" if gamma else "at"
    choices = {"method": method if attack else None, "data": data_set, "schedule": schedule}
    return config | {name: section for name, section in known.items() if section}, _known(choices)


def _known(section: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a section."""
    return {key: value for key, value in section.items() if value is not None and value != {}}


def _data_set(run: LoggedRun, named: str | None) -> str:
    """The class of the data set: named, or found in the run's names.

    Raises:
        RecordError: It is in none of them, or cannot be a name.
    """
    places = f"{run.name} {run.arguments.get('fname', '')} {run.arguments.get('data_dir', '')}".lower()
    found = next((DATA_SETS[key] for key in DATA_SETS if key in places.replace("-", "")), None)
    if named is None and found is None:
        raise RecordError(
            f"{run.file}: nothing says on which data set {run.name} ran; say it with --data NAME"
        )
    if named is None:
        return found or ""
    if not re.fullmatch(r"[\w-]+", named):
        raise RecordError(
            f"{run.arguments_at}: {named[:40]!r} cannot be a data set's name; use letters and digits"
        )
    return DATA_SETS.get(named.lower().replace("-", ""), named)


def _model(run: LoggedRun, given: _Arguments) -> dict[str, Any]:
    """Name and width of the network; early logs say the first only in the run's name."""
    name = given.name("model")
    if name is None and re.search("wideresnet|wrn", f"{run.name} {run.arguments.get('fname', '')}".lower()):
        name = "WideResNet"
    wide = name is not None and name.startswith("WideResNet")
    return {"name": name, "widen_factor": given.number("width_factor") if wide else None}


def _attack(given: _Arguments, attack: str | None) -> dict[str, Any]:
    """The attack in training, radii and steps in 1/255; ``evaluation`` where the one in testing differs."""
    if attack is None or attack == "none":
        return {}
    eps, steps, step = (given.number(key) for key in ("epsilon", "attack_iters", "pgd_alpha"))
    tested = given.number("attack_iters_test") or steps
    training: tuple[float | None, float | None] = (steps, step)
    if attack == "fgsm":  # one step of this part of the radius
        part = given.number("fgsm_alpha")
        training = (1, None if part is None or eps is None else part * eps)
    evaluation = _known({"steps": tested, "step_255": step})
    own = {"norm": given.one_of("norm", NORMS), "eps_255": eps, "step_255": training[1], "steps": training[0]}
    return {**own, "evaluation": evaluation} if training != (tested, step) else own
