"""``robustdyn-evaluate``: measures clean and robust accuracy of a checkpoint, which may be from elsewhere."""

import difflib
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from robustdyn.data import ImageDataModule, ImageTensors
from robustdyn.errors import ConfigError, RecordError
from robustdyn.evaluation import Ball, EvaluationRecord, Result, evaluate
from robustdyn.launch.application import run_app
from robustdyn.launch.paths import load_run
from robustdyn.models import load_weights
from robustdyn.records.command_line import hydra_quoted
from robustdyn.records.files import file_digest
from robustdyn.records.labels import flatten
from robustdyn.records.run_directory import CONFIG, RunDirectory
from robustdyn.records.schema import ACCURACY_SE, EVALUATION
from robustdyn.run.config import (
    COUNT,
    POSITIVE,
    SEED,
    Rule,
    build,
    check,
    check_rules,
    config_dir,
)
from robustdyn.run.environment import device_name, versions
from robustdyn.run.of_checkpoint import (
    checkpoint_of,
    device_of,
    load_config,
    run_of,
    type_name,
)
from robustdyn.run.status import say
from robustdyn.run.targets import allowed, targets_in

NAME = "evaluate"
OF_THE_RUN = ("data", "model", "attack")
THREAT = ("norm", "eps_255")
LINES_WITHOUT_TERMINAL = 60.0  # seconds between two lines

RULES: Mapping[str, Rule] = {
    "seed": SEED,
    "evaluation.batch_size": COUNT,
    "evaluation.split": Rule(
        lambda v: v in ("test", "validation", "train"), "must be test, validation or train"
    ),
}


def main() -> None:
    """The ``robustdyn-evaluate`` command."""
    sys.argv[1:] = _deferred(sys.argv[1:])
    run_app(evaluate_checkpoint, NAME)


def evaluate_checkpoint(typed: DictConfig) -> None:
    """Evaluate one checkpoint, then record and print the result; a killed evaluation is resumed.

    Raises:
        UserError: The configuration, the checkpoint, the data or the record cannot be used.
    """
    checkpoint = checkpoint_of(typed)
    run_dir = run_of(checkpoint)
    cfg, allow = _of_run(checkpoint, run_dir)
    _check(cfg)
    device = device_of(cfg.device)

    evaluators = {name: build(cfg, f"evaluation.attacks.{name}") for name in cfg.evaluation.attacks}
    sanity = build(cfg, "evaluation.sanity")
    ball = Ball(cfg.attack.norm, cfg.attack.eps_255 / 255)
    model: nn.Module = build(cfg, "model", allow=allow)
    layout = load_weights(model, checkpoint, layout=cfg.layout)
    split = _split(cfg, allow)
    data = split.take(torch.arange(cfg.evaluation.examples or len(split))).to(device)
    default = RunDirectory(run_dir or checkpoint.parent).evaluations / checkpoint.stem
    output = Path(cfg.output) if cfg.output else default
    settings = _settings(cfg, checkpoint, layout, ball, data)
    # another device rounds differently, which hardly changes the outcomes
    provenance = {**versions("pyautoattack"), "device": device_name(device)}

    say(f"checkpoint  {checkpoint} ({layout})")
    which = "all" if len(data) == len(split) else f"the first {len(data):,} of"
    say(f"examples    {which} {len(split):,} of the {cfg.evaluation.split} split of {type_name(cfg.data)}")
    say(f"ball        {ball.norm}, radius {cfg.attack.eps_255:g}/255")
    with EvaluationRecord.open(output, settings, provenance) as record, _Progress() as progress:
        try:
            result = evaluate(
                model.to(device),
                data,
                evaluators,
                ball=ball,
                sanity=sanity,
                batch_size=cfg.evaluation.batch_size,
                seed=cfg.seed,
                record=record,
                progress=progress,
            )
        except ValueError as error:
            raise ConfigError(f"evaluation.attacks: {error}") from error
    for line in evaluation_lines(result):
        say(line)
    say(f"record: {output}")


def evaluation_lines(result: Result) -> Iterator[str]:
    """Lines to print: a table of accuracies, then every warning."""
    width = max(len(row["evaluator"]) for row in result.rows)
    accuracy = EVALUATION["accuracy"]
    yield ""
    yield f"{'attack':<{width}}  {accuracy.shown:>12}  {'s.e.':>5}  {'time (s)':>9}"
    for row in sorted(result.rows, key=lambda row: row["evaluator"] in result.checks):
        mean, error = (row[key] * accuracy.scale for key in ("accuracy", ACCURACY_SE))
        aside = "  (a check, not the threat model: should be 0)" if row["evaluator"] in result.checks else ""
        yield f"{row['evaluator']:<{width}}  {mean:>12.2f}  {error:>5.2f}  {row['seconds']:>9.1f}{aside}"
    yield ""
    for (name, evaluator), message in result.warnings.items():
        yield f"warning: {evaluator}: {message} [{name}]"
    if result.warnings:
        many = "this warning" if len(result.warnings) == 1 else f"these {len(result.warnings)} warnings"
        yield f"robustness may be overstated: look into {many} before quoting the figures above"


# ---------------------------------------------------------------------- the configuration


def _deferred(arguments: Sequence[str]) -> list[str]:
    """Keep settings of data, model and attack until the checkpoint has determined the choice in each group.

    Hydra composes before it knows the checkpoint. It would refuse a key such as ``data.root`` if the default
    data set did not have it.
    """
    keys = [text.partition("=")[0] for text in arguments]
    sections = [key.partition(".")[0] if "." in key else "" for key in keys]
    return [
        f"++{text}" if section in OF_THE_RUN else text
        for section, text in zip(sections, arguments, strict=True)
    ]


@dataclass(frozen=True)
class _Typed:
    """The typed overrides: those of keys in data, model and attack, by key, and all others.

    ``groups`` says for which of data, model and attack an option was chosen.
    """

    settings: Mapping[str, str]
    others: tuple[str, ...]
    groups: frozenset[str]


def _typed() -> _Typed:
    settings, others, groups = {}, [], set()
    for override in OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task)):
        key, text = override.key_or_group, override.input_line or ""
        section, dot, _ = key.partition(".")
        if section in OF_THE_RUN and dot:
            settings[key] = text.removeprefix("++")
            continue
        others.append(text)
        if section in OF_THE_RUN:
            groups.add(section)
    return _Typed(settings, tuple(others), frozenset(groups))


def _of_run(checkpoint: Path, run_dir: Path | None) -> tuple[DictConfig, Collection[str] | None]:
    """The command's configuration with data, model and attack of the run, and the typed overrides.

    Returns:
        The configuration, and what it may name as in ``build``: what the user allows or has typed himself.

    Raises:
        ConfigError: A checkpoint outside a run directory without data and model, or an unknown typed key.
        RecordError: The run's configuration cannot be read.
    """
    typed = _typed()
    if run_dir is None:
        if "data" not in typed.groups:
            raise ConfigError(
                f"checkpoint={checkpoint} is not in a run directory (no {CONFIG} there): give "
                "its data set and network with data=... model=..."
            )
        return _composed([], typed), None
    run = load_run(run_dir)
    kept = [group for group in OF_THE_RUN if group not in typed.groups and group in run]
    for group in kept:
        if not isinstance(run[group], DictConfig):
            raise RecordError(
                f"{RunDirectory(run_dir).config}: {group} is not a section; restore it, or move the "
                "checkpoint away"
            )
    cfg = _composed(
        [f"{group}={choice}" for group, choice in _choices(run_dir).items() if group in kept], typed
    )
    values = {key: OmegaConf.select(cfg, key) for key in typed.settings}
    own = [OmegaConf.to_container(cfg[group], resolve=True) for group in typed.groups]
    own += [{leaf: value} for key, value in values.items() if (leaf := key.rpartition(".")[2]) == "_target_"]
    allow = {*allowed(cfg), *targets_in(own)}
    for group in kept:
        if cfg[group].get("_target_") == run[group].get("_target_"):
            cfg[group] = OmegaConf.merge(cfg[group], run[group])  # what a run of an older version lacks
        else:
            cfg[group] = run[group]
    for key, value in values.items():
        OmegaConf.update(cfg, key, value)
    return cfg, allow


def _composed(choices: Sequence[str], typed: _Typed) -> DictConfig:
    """The command's configuration with these choices in the groups.

    Raises:
        ConfigError: A typed key does not exist with these choices, or has no effect on an evaluation.
    """
    without = _compose([*choices, *typed.others])
    for key, text in typed.settings.items():
        section, _, leaf = key.partition(".")
        if not text.startswith(("+", "~")) and not _has(without, key):
            known = [f"{section}.{name}" for name in flatten(OmegaConf.to_container(without[section]))]  # type: ignore[arg-type]
            close = difflib.get_close_matches(key, known, n=2)
            remedy = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown config key {key}; {remedy} (+{key}=... adds a new key)")
        if section == "attack" and leaf not in THREAT:
            raise ConfigError(
                f"{key} belongs to training; an evaluation takes attack.norm and attack.eps_255, and "
                "steps and the like from evaluation.attacks, e.g. evaluation.attacks.pgd20.steps=100"
            )
    overrides = [*choices, *typed.others, *typed.settings.values()]
    cfg = _compose(overrides) if typed.settings else without
    OmegaConf.set_struct(cfg, False)
    return cfg


def _compose(overrides: Sequence[str]) -> DictConfig:
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(NAME, list(overrides))
    # in a launcher's worker, which does not know the user's own folders
    sources = HydraConfig.get().runtime.config_sources
    own = [
        hydra_quoted(f"{source.schema}://{source.path}")
        for source in sources
        if source.provider == "command-line" or source.provider.startswith("hydra.searchpath")
    ]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        return hydra.compose(NAME, [*overrides, f"hydra.searchpath=[{','.join(own)}]"])


def _has(cfg: DictConfig, key: str) -> bool:
    """Whether the key exists, even with a null value."""
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent)
    return isinstance(node, DictConfig) and leaf in node


def _choices(run_dir: Path) -> dict[str, str]:
    """The option that the run chose in each group, if it still exists."""
    path = RunDirectory(run_dir).hydra_config
    recorded = OmegaConf.select(load_config(path), "hydra.runtime.choices") if path.is_file() else None
    if not isinstance(recorded, DictConfig):
        return {}
    # compare names, because a choice such as ../../x would compose a file from somewhere else
    return {
        group: str(recorded[group])
        for group in OF_THE_RUN
        if recorded.get(group) in {file.stem for file in (config_dir() / group).glob("*.yaml")}
    }


def _check(cfg: DictConfig) -> None:
    check(cfg)
    check_rules(cfg, RULES)
    examples = cfg.evaluation.examples
    if examples is not None and not COUNT.holds(examples):
        raise ConfigError(f"evaluation.examples={examples} {COUNT.requirement}, or null for all")
    if not POSITIVE.holds(cfg.attack.eps_255):
        raise ConfigError(
            f"attack.eps_255={cfg.attack.eps_255} {POSITIVE.requirement}; evaluation=clean attacks nothing"
        )


# ---------------------------------------------------------------------- what is evaluated


def _split(cfg: DictConfig, allow: Collection[str] | None) -> ImageTensors:
    """All images of the split, in its order.

    Raises:
        ConfigError: There is no such split, or it has fewer images than are to be evaluated.
        DataFileError: A file is missing or has the wrong content.
    """
    module: ImageDataModule = build(cfg, "data", allow=allow)
    module.prepare_data()
    module.setup("test")
    split, wanted = module.split(cfg.evaluation.split), cfg.evaluation.examples
    if wanted is not None and wanted > len(split):
        raise ConfigError(
            f"evaluation.examples={wanted} exceeds the {len(split)} images of the {cfg.evaluation.split} "
            "split; choose fewer, or null for all"
        )
    return split


def _settings(
    cfg: DictConfig, checkpoint: Path, layout: str, ball: Ball, data: ImageTensors
) -> dict[str, Any]:
    """The settings on which the outcomes of every attack depend; compared when an evaluation resumes."""
    return {
        "checkpoint": file_digest(checkpoint),
        "layout": layout,
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "data": type_name(cfg.data),
        "evaluation.split": cfg.evaluation.split,
        "evaluation.examples": len(data),
        "images": data.digest(),
        "evaluation.batch_size": cfg.evaluation.batch_size,
        "attack.norm": ball.norm,
        "attack.eps_255": cfg.attack.eps_255,
        "seed": cfg.seed,
    }


# ---------------------------------------------------------------------- the terminal


class _Progress:
    """One progress bar for each attack, or an occasional line if there is no terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._name = ""
        self._said = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            if name != self._name:
                self.__exit__()
                self._bar = tqdm(total=total, desc=name, unit="example", dynamic_ncols=True, leave=False)
            assert self._bar is not None
            self._bar.n = done
            self._bar.refresh()
        elif time.monotonic() - self._said > LINES_WITHOUT_TERMINAL:
            print(f"{name}: {done}/{total} examples", file=sys.stderr, flush=True)
            self._said = time.monotonic()
        self._name = name


if __name__ == "__main__":
    # imported by name, so that a launcher's workers find it
    from robustdyn.commands.evaluate import main as command

    command()
